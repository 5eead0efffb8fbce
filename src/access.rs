//! Who is it? So far there is one whom the gateway knows: its owner, who holds the key of the ops listener.
//!
//! The first start makes the key and keeps it in the data directory; later starts read it there.
//!
//! Invariants: the file is readable by its owner alone from its first byte on; the key is never logged, and `Debug`
//! does not show it; a presented key is compared in constant time.
//!
//! Not here: keys of clients and tenants.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use secrecy::{ExposeSecret, SecretString};
use subtle::ConstantTimeEq;

/// The key's file in the data directory.
const FILE: &str = "owner.key";
/// What tells an owner key from others when one turns up in the wrong place.
const PREFIX: &str = "fbo_";
/// Bits of chance in a key: out of reach for guessing, with or without a limit on tries.
const KEY_BYTES: usize = 32;
/// Longest file that can be a key; a key itself has 68 characters.
const FILE_BYTES_MAX: u64 = 4096;
/// Shortest text that may stand in the file: 128 bits in hexadecimal digits, for keys that somebody made by hand.
const KEY_CHARS_MIN: usize = 32;

/// Why there is no owner key.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the owner key `{}`", .path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot write the owner key `{}`", .path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("`{}` holds no key: remove it, and the next start of the gateway makes a new one", .path.display())]
    Malformed { path: PathBuf },
}

/// The key that opens `/admin` on the ops listener.
#[derive(Debug)]
pub struct OwnerKey {
    key: SecretString,
    fresh: bool,
}

impl OwnerKey {
    /// Where the key of this data directory stands.
    #[must_use]
    pub fn path(data_dir: &Path) -> PathBuf {
        data_dir.join(FILE)
    }

    /// Reads the key that an earlier start left in `data_dir`.
    ///
    /// # Errors
    /// When the file cannot be read or holds no key.
    pub fn load(data_dir: &Path) -> Result<Self, Error> {
        let path = Self::path(data_dir);
        let mut text = String::new();
        let read = File::open(&path).and_then(|file| file.take(FILE_BYTES_MAX).read_to_string(&mut text));
        if let Err(source) = read {
            return Err(match source.kind() {
                ErrorKind::InvalidData => Error::Malformed { path },
                _ => Error::Read { path, source },
            });
        }
        let key = text.trim();
        let usable = key.len() >= KEY_CHARS_MIN && key.bytes().all(|byte| byte.is_ascii_graphic());
        if !usable {
            return Err(Error::Malformed { path });
        }
        Ok(Self { key: key.into(), fresh: false })
    }

    /// The key in `data_dir`, which is made when there is none, and so is the directory.
    ///
    /// # Errors
    /// As [`OwnerKey::load`], and when the new key cannot be written.
    pub fn load_or_make(data_dir: &Path) -> Result<Self, Error> {
        match Self::load(data_dir) {
            Err(Error::Read { source, .. }) if source.kind() == ErrorKind::NotFound => Self::make(data_dir),
            Ok(key) => {
                key.guard(data_dir);
                Ok(key)
            }
            Err(error) => Err(error),
        }
    }

    fn make(data_dir: &Path) -> Result<Self, Error> {
        let bytes: [u8; KEY_BYTES] = rand::random();
        let key: String = PREFIX.chars().chain(bytes.iter().flat_map(|byte| hexadecimal(*byte))).collect();
        let path = Self::path(data_dir);
        // Written aside and renamed, so that a crash in between leaves no half of a key.
        let aside = data_dir.join(format!("{FILE}.new"));
        let write = || {
            fs::create_dir_all(data_dir)?;
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
            // A file that stood there before kept its mode.
            file.set_permissions(Permissions::from_mode(0o600))?;
            writeln!(file, "{key}")?;
            file.sync_all()?;
            fs::rename(&aside, &path)
        };
        write().map_err(|source| Error::Write { path: path.clone(), source })?;
        Ok(Self { key: key.into(), fresh: true })
    }

    /// Says so when others on this machine can read the key.
    fn guard(&self, data_dir: &Path) {
        let path = Self::path(data_dir);
        let open = fs::metadata(&path).is_ok_and(|facts| facts.permissions().mode() & 0o077 != 0);
        if open {
            tracing::warn!(file = %path.display(), "others can read the owner key: chmod 600");
        }
    }

    /// The key, when this start made it and somebody should be told.
    #[must_use]
    pub fn fresh(&self) -> Option<&SecretString> {
        self.fresh.then_some(&self.key)
    }

    /// The key, to be sent to a gateway.
    #[must_use]
    pub fn secret(&self) -> &SecretString {
        &self.key
    }

    /// Whether this is the key. Takes as long for a wrong one as for the right one.
    #[must_use]
    pub fn is(&self, presented: &[u8]) -> bool {
        self.key.expose_secret().as_bytes().ct_eq(presented).into()
    }
}

fn hexadecimal(byte: u8) -> [char; 2] {
    [byte >> 4, byte & 15].map(|digit| char::from_digit(digit.into(), 16).unwrap_or('0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_start_makes_a_key_and_later_ones_read_it() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("deep/data");
        assert!(matches!(OwnerKey::load(&data), Err(Error::Read { .. })));
        let made = OwnerKey::load_or_make(&data).unwrap();
        let text = made.fresh().expect("a new key is to be shown").expose_secret().to_owned();
        assert_eq!((text.len(), text.starts_with(PREFIX)), (PREFIX.len() + 2 * KEY_BYTES, true), "{text}");
        let mode = fs::metadata(data.join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::read_dir(&data).unwrap().count(), 1, "nothing is left aside");

        let read = OwnerKey::load_or_make(&data).unwrap();
        assert!(read.fresh().is_none(), "shown once");
        assert!(read.is(text.as_bytes()));
        for wrong in ["", "fbo_", &text[1..], &format!("{text} "), &text.to_uppercase()] {
            assert!(!read.is(wrong.as_bytes()), "{wrong:?}");
        }
        assert!(!format!("{made:?}{read:?}").contains(&text));
        let other = OwnerKey::load_or_make(&directory.path().join("other")).unwrap();
        assert!(!other.is(text.as_bytes()));
    }

    #[test]
    fn what_is_no_key_is_not_taken_for_one() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join(FILE);
        for bad in [&b""[..], b"\n", b"short", b"two words that are together long enough to be a key", b"\xff\xfe"] {
            fs::write(&file, bad).unwrap();
            let error = OwnerKey::load_or_make(directory.path()).expect_err("no key");
            assert!(matches!(error, Error::Malformed { .. }), "{bad:?}: {error}");
            assert_eq!(fs::read(&file).unwrap(), bad, "left as it was");
        }
        fs::write(&file, format!("{}\n", "k".repeat(KEY_CHARS_MIN))).unwrap();
        assert!(OwnerKey::load_or_make(directory.path()).unwrap().is("k".repeat(KEY_CHARS_MIN).as_bytes()));
    }
}
