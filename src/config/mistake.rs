//! What is wrong with a configuration, in words that let the reader mend it.

use std::fmt;
use std::sync::Arc;

/// Mistakes listed of one file; what is beyond is only counted, so that a file that is no configuration at all does not
/// flood the reader.
const LISTED_MAX: usize = 200;

/// Where a value was given.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// The file as a whole.
    File(Arc<str>),
    /// `line` and `column` count from 1, the column in characters.
    Text { file: Arc<str>, line: usize, column: usize },
    /// An environment variable or a flag, by name.
    Given(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(file) => f.write_str(file),
            Self::Text { file, line, column } => write!(f, "{file}:{line}:{column}"),
            Self::Given(name) => f.write_str(name),
        }
    }
}

/// One mistake:
/// `forebay.toml:12:22: model[0].queue_requests_max is 0: must be at least 1 (omit the key for the default 4096)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    pub place: Place,
    /// The path of the key, as in `model[0].worker[1].url`.
    pub key: String,
    /// What stands there, quoted and shortened, secrets redacted; or what is the matter with the key itself.
    pub value: String,
    /// What to write instead.
    pub remedy: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} is {}: {}", self.place, self.key, self.value, self.remedy)
    }
}

/// All mistakes of one configuration, in the order of the file; at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistakes {
    listed: Vec<Mistake>,
    left_out: usize,
}

impl Mistakes {
    /// `None` when there is nothing to mend. Mistakes beyond the bound are only counted.
    pub(super) fn of(mut found: impl ExactSizeIterator<Item = Mistake>) -> Option<Self> {
        let listed: Vec<_> = found.by_ref().take(LISTED_MAX).collect();
        if listed.is_empty() { None } else { Some(Self { listed, left_out: found.len() }) }
    }

    pub fn iter(&self) -> std::slice::Iter<'_, Mistake> {
        self.listed.iter()
    }
}

impl From<Mistake> for Mistakes {
    fn from(only: Mistake) -> Self {
        Self { listed: vec![only], left_out: 0 }
    }
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (row, mistake) in self.listed.iter().enumerate() {
            let line_break = if row == 0 { "" } else { "\n" };
            write!(f, "{line_break}{mistake}")?;
        }
        match self.left_out {
            0 => Ok(()),
            more => write!(f, "\nand {more} more"),
        }
    }
}

impl std::error::Error for Mistakes {}

/// A text as a mistake shows it: quoted, control characters escaped, at most some 80 characters.
pub(super) fn quoted(text: &str) -> String {
    format!("{:?}", shortened(text))
}

/// The first 80 characters.
pub(super) fn shortened(text: &str) -> String {
    const SHOWN_MAX: usize = 80;
    match text.char_indices().nth(SHOWN_MAX) {
        Some((cut, _)) => format!("{}…", text.get(..cut).unwrap_or_default()),
        None => text.to_owned(),
    }
}
