//! From file, environment and flags to a [`Config`] or to all mistakes in them.
//!
//! A text that is not TOML everywhere is read as far as it goes: the broken lines are reported, blanked, and what is
//! left is checked too, except that nothing is then called missing. Where blanking would change what other lines mean,
//! only the broken lines are reported.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::Read;
use std::path::Path;

use toml::de::DeTable;

use super::log::{At, Log};
use super::tree::{Override, Section};
use super::{Config, Mistake, Mistakes, Place, model, node, server};

/// Some ten thousand workers, far beyond any real file.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The variable with a name of its own.
const DATA_DIR: &str = "FOREBAY_DATA_DIR";
/// What the name of any other variable for a key begins with, as in `FOREBAY__SERVER__LISTEN`. The doubled underscore
/// keeps clear of the variables that Kubernetes makes for a service called `forebay`.
const KEY_PREFIX: &str = "FOREBAY__";

/// The variables of a process.
#[derive(Clone, Default)]
pub struct Environment(BTreeMap<String, OsString>);

impl Environment {
    /// A copy of this process's variables; names that are not UTF-8 are none of ours.
    #[must_use]
    pub fn of_process() -> Self {
        Self(std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value))).collect())
    }

    pub(super) fn get(&self, name: &str) -> Option<&OsStr> {
        self.0.get(name).map(OsString::as_os_str)
    }
}

impl<N: Into<String>, V: Into<OsString>> FromIterator<(N, V)> for Environment {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(variables: I) -> Self {
        Self(variables.into_iter().map(|(name, value)| (name.into(), value.into())).collect())
    }
}

/// Names only: any value may be a secret.
impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.keys()).finish()
    }
}

/// A command-line flag that gives a key of `[server]`.
#[derive(Debug, Clone)]
pub struct Flag {
    /// As typed, for mistakes: `--listen`.
    pub name: &'static str,
    /// The key in `[server]`: `listen`.
    pub key: &'static str,
    pub value: String,
}

/// All that decides what a text means. Kept for the life of the process, so that a reload reads as the start did.
///
/// Reading blocks: it looks for the directories and reads the secrets that the text names.
#[derive(Debug, Clone)]
pub struct Reader {
    pub environment: Environment,
    pub flags: Vec<Flag>,
    /// The engines that a worker may name.
    pub engines: Vec<&'static str>,
}

impl Reader {
    /// Reads and checks a file.
    pub fn load(&self, path: &Path) -> Result<Config, Mistakes> {
        let name = path.display().to_string();
        let whole_file = |value: String, remedy: &str| {
            let (place, key) = (Place::File(name.as_str().into()), "the file".to_owned());
            Mistakes::from(Mistake { place, key, value, remedy: remedy.to_owned() })
        };
        let bytes = read_bounded(path, FILE_BYTES_MAX)
            .map_err(|error| whole_file(format!("not readable ({error})"), "check the path and its permissions"))?;
        let text = String::from_utf8(bytes).map_err(|error| {
            let offset = error.utf8_error().valid_up_to();
            let readable = String::from_utf8_lossy(error.as_bytes());
            let log = Log::new(&name, &readable);
            log.refuse(&At::offset("the text", offset), "not UTF-8 here", "save the file as UTF-8");
            log.mistakes().unwrap_or_else(|| whole_file("not UTF-8".to_owned(), "save the file as UTF-8"))
        })?;
        self.text(&name, &text)
    }

    /// Reads and checks a text as if it stood in the file of that name.
    pub fn text(&self, file_name: &str, text: &str) -> Result<Config, Mistakes> {
        let log = Log::new(file_name, text);
        let Some(readable) = readable(&log, text) else { return self.config(&log, &DeTable::new()) };
        let tree = DeTable::parse_recoverable(&readable).0;
        let tree = tree.get_ref();
        let models = tree.get("model").map(|models| models.get_ref().as_array().map(|models| models.len()));
        if matches!(models, None | Some(Some(0))) {
            let remedy = "add a `[[model]]` and its workers (engines are looked for only where there is no file)";
            log.refuse_absence(&At::offset("model", 0), "missing", remedy);
        }
        self.config(&log, tree)
    }

    /// Defaults, environment and flags: a gateway that has yet to look for its engines. It has no models.
    pub fn without_file(&self) -> Result<Config, Mistakes> {
        self.config(&Log::new("", ""), &DeTable::new())
    }

    fn config(&self, log: &Log<'_>, tree: &DeTable<'_>) -> Result<Config, Mistakes> {
        let (empty, overrides) = (DeTable::new(), self.overrides(log));
        let mut root = Section::root(log, tree);
        let server = server::read(root.table("server", &empty, &overrides));
        let nodes = node::read_all(&mut root);
        let models = model::read_all(&mut root, self, &nodes, server.body_bytes_max);
        root.finish(&["provider"]);
        match log.mistakes() {
            None => Ok(Config { server, nodes, models }),
            Some(mistakes) => Err(mistakes),
        }
    }

    /// What overrides keys of `[server]`, the strongest last.
    fn overrides(&self, log: &Log<'_>) -> Vec<Override> {
        let mut overrides = Vec::new();
        let variables = &self.environment.0;
        let special =
            variables.get_key_value(DATA_DIR).map(|(name, value)| (name, "server__data_dir".to_owned(), value));
        let general = variables.iter().filter_map(|(name, value)| {
            let path = name.strip_prefix(KEY_PREFIX)?;
            Some((name, path.to_ascii_lowercase(), value))
        });
        for (name, path, value) in special.into_iter().chain(general) {
            let at = At::given(path.replace("__", "."), name);
            let Some(key) = path.strip_prefix("server__") else {
                let remedy = format!(
                    "write it in the config file (variables give the keys of one table, `{KEY_PREFIX}SERVER__…`)"
                );
                log.refuse(&at, "not for the environment", remedy);
                continue;
            };
            match value.to_str() {
                Some(text) => {
                    overrides.push(Override { key: key.to_owned(), name: name.clone(), text: text.to_owned() });
                }
                None => log.refuse(&at, "not UTF-8", "must be readable text"),
            }
        }
        let flags = self.flags.iter();
        overrides.extend(flags.map(|Flag { name, key, value }| Override {
            key: (*key).to_owned(),
            name: (*name).to_owned(),
            text: value.clone(),
        }));
        overrides
    }
}

/// The text as valid TOML of the same length, broken lines blanked and reported; `None` where that cannot be.
fn readable<'t>(log: &Log<'_>, text: &'t str) -> Option<Cow<'t, str>> {
    let errors = DeTable::parse_recoverable(text).1;
    if errors.is_empty() {
        return Some(Cow::Borrowed(text));
    }
    log.mark_incomplete();
    let mut broken: Vec<usize> = Vec::new();
    for error in &errors {
        let offset = error.span().map_or(0, |span| span.start);
        log.refuse(&At::offset("the text", offset), "not valid TOML", error.message());
        broken.push(offset.min(text.len()));
    }
    broken.sort_unstable();
    let mut blanked = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        let (start, end) = (blanked.len(), blanked.len() + line.len());
        let next = broken.partition_point(|offset| *offset < start);
        // An error at the end of the text belongs to the last line.
        let touched = broken.get(next).is_some_and(|offset| *offset < end || end == text.len());
        if !touched {
            blanked.push_str(line);
        } else if line.trim_start().starts_with('[') {
            return None; // a header: without it the keys below would belong to another table
        } else {
            blanked.extend(line.bytes().map(|byte| if byte == b'\n' { '\n' } else { ' ' }));
        }
    }
    DeTable::parse(&blanked).is_ok().then_some(Cow::Owned(blanked))
}

/// The whole of a file of at most `bytes_max`.
pub(super) fn read_bounded(path: &Path, bytes_max: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(bytes_max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max { Err(std::io::ErrorKind::FileTooLarge.into()) } else { Ok(bytes) }
}
