//! A secret that other files or the environment hold: `{ env = "NAME" }` or `{ file = "PATH" }`.
//!
//! Never shown: not by `Debug`, not in a mistake, and not where somebody wrote the secret itself in place of the name
//! of a variable.

use std::fmt;
use std::path::Path;

use secrecy::{ExposeSecret, SecretString};
use toml::de::DeValue;

use super::mistake::quoted;
use super::read::{Environment, read_bounded};
use super::tree::{Raw, Refusal};

/// Every HTTP server takes a header of this length.
const BYTES_MAX: u64 = 4096;

/// One line of printable ASCII, so that it can stand in a header. Equality compares what is inside, for reloads.
#[derive(Clone)]
pub struct Secret(SecretString);

impl Secret {
    #[must_use]
    pub fn inner(&self) -> &SecretString {
        &self.0
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.0.expose_secret() == other.0.expose_secret()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(redacted)")
    }
}

const FORM: &str = "must be { env = \"NAME\" } or { file = \"PATH\" }";

pub(super) fn read(raw: &Raw<'_>, environment: &Environment) -> Result<Secret, Refusal> {
    let malformed = || Refusal::showing("(redacted)", FORM);
    let Raw::Toml(DeValue::Table(table), _) = raw else { return Err(malformed()) };
    let mut entries = table.iter().map(|(key, value)| (key.get_ref().as_ref(), value.get_ref().as_str()));
    match (entries.next(), entries.next()) {
        (Some(("env", Some(name))), None) => from_variable(name, environment),
        (Some(("file", Some(path))), None) => from_file(path),
        _ => Err(malformed()),
    }
}

fn from_variable(name: &str, environment: &Environment) -> Result<Secret, Refusal> {
    // By convention names are in capitals; whatever else stands here may be the secret itself.
    let is_name = name.bytes().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_');
    let shown = if is_name { format!("{{ env = {} }}", quoted(name)) } else { "{ env = (redacted) }".to_owned() };
    match environment.get(name) {
        None => Err(Refusal::showing(shown, "must name a variable that is set in the environment of this process")),
        Some(value) => checked(value.as_encoded_bytes(), &shown),
    }
}

fn from_file(path: &str) -> Result<Secret, Refusal> {
    let is_path = path.contains('/') || Path::new(path).exists();
    let shown = if is_path { format!("{{ file = {} }}", quoted(path)) } else { "{ file = (redacted) }".to_owned() };
    match read_bounded(Path::new(path), BYTES_MAX) {
        Err(error) => {
            Err(Refusal::showing(shown, format!("must name a file that this process can read ({})", error.kind())))
        }
        Ok(bytes) => checked(&bytes, &shown),
    }
}

fn checked(bytes: &[u8], shown: &str) -> Result<Secret, Refusal> {
    let bytes = bytes.trim_ascii();
    let printable = bytes.len() as u64 <= BYTES_MAX && bytes.iter().all(u8::is_ascii_graphic);
    match std::str::from_utf8(bytes) {
        Ok(text) if printable && !text.is_empty() => Ok(Secret(SecretString::from(text))),
        _ => Err(Refusal::showing(shown, "must hold a key: one line of printable ASCII, not empty")),
    }
}
