//! A name that can stand in a header, a label, a log line and a JSON string without being escaped out of recognition.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

/// Longest name in bytes. Engines use paths as model names, so it is not short.
const BYTES_MAX: usize = 256;

/// 1 to 256 bytes without control characters and without white space at either end. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Arc<str>);

/// A text that cannot be a [`Name`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be 1 to 256 bytes long, without control characters and without spaces at its ends")]
pub struct BadName;

impl Name {
    pub fn new(text: &str) -> Result<Self, BadName> {
        let fits = (1..=BYTES_MAX).contains(&text.len());
        let clean = text.trim() == text && !text.chars().any(char::is_control);
        if fits && clean { Ok(Self(Arc::from(text))) } else { Err(BadName) }
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Deref for Name {
    type Target = str;
    fn deref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let check = |text: &str, good: bool| assert_eq!(Name::new(text).is_ok(), good, "{text:?}");
        check("llama-3.1-8b", true);
        check("meta-llama/Llama-3.1-8B-Instruct", true);
        check("/models/My Model", true);
        check("模型", true);
        check(&"x".repeat(256), true);
        check("", false);
        check(" a", false);
        check("a ", false);
        check("a\r\nx-evil: 1", false);
        check("a\u{7f}", false);
        check(&"x".repeat(257), false);
    }
}
