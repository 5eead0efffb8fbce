//! Small differences of engines that speak OpenAI's dialect: a key of another name, a word of another meaning.
//!
//! They are mended in the bytes, and only where they stand: everything else goes on as it came.

use bytes::Bytes;
use http::StatusCode;
use memchr::memmem;

use super::answer::{Translator, event};
use crate::Error;

/// What is different.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rule {
    /// This key has another name in OpenAI's answers and vLLM's. The quotes are part of it.
    Key(&'static str, &'static str),
    /// This value of `finish_reason` has another name. The quotes are part of it.
    Finish(&'static str, &'static str),
    /// This value of `finish_reason` is the engine's way to say that it failed.
    Failed(&'static str),
}

/// Thinking text, under the name that vLLM, Ollama and OpenAI's own open models have for it.
pub(super) const THINKING: Rule = Rule::Key(r#""reasoning_content""#, r#""reasoning""#);

/// A translator by rules alone.
#[derive(Debug)]
pub(super) struct Tidy(pub(super) &'static [Rule]);

impl Translator for Tidy {
    fn event(&mut self, data: &[u8], out: &mut Vec<u8>) -> bool {
        match tidy(self.0, data) {
            Tidied::AsItCame => false,
            Tidied::Changed(data) => {
                event(out, data);
                true
            }
            Tidied::Failed => {
                event(out, FAILED);
                true
            }
        }
    }

    fn whole(&mut self, body: &Bytes) -> Option<Bytes> {
        match tidy(self.0, body) {
            Tidied::AsItCame => Some(body.clone()),
            Tidied::Changed(body) => Some(body.into()),
            Tidied::Failed => None,
        }
    }

    /// The engine threw the request out of its queue: load, as the event of a stream says it.
    fn refused(&self) -> Error {
        Error::Status { status: StatusCode::TOO_MANY_REQUESTS }
    }
}

/// As an engine would tell it, had it found words.
pub(super) const FAILED: &str =
    r#"{"error":{"message":"The engine gave the request up.","type":"service_unavailable_error","code":503}}"#;

pub(super) enum Tidied {
    AsItCame,
    Changed(Vec<u8>),
    Failed,
}

pub(super) fn tidy(rules: &[Rule], json: &[u8]) -> Tidied {
    let mut changed: Option<Vec<u8>> = None;
    for rule in rules {
        let now = changed.as_deref().unwrap_or(json);
        let next = match rule {
            Rule::Key(from, to) => replaced(now, from, to, |_, after| begins(after, b':')),
            Rule::Finish(from, to) => replaced(now, from, to, |before, _| is_finish(before)),
            Rule::Failed(word) => match replaced(now, word, "", |before, _| is_finish(before)) {
                Some(_) => return Tidied::Failed,
                None => None,
            },
        };
        changed = next.or(changed);
    }
    changed.map_or(Tidied::AsItCame, Tidied::Changed)
}

/// Replaces a quoted word where it `fits`, given what stands before and after it.
///
/// The word cannot be met inside of a string: there its closing quote would have a backslash before it.
fn replaced(json: &[u8], from: &str, to: &str, fits: impl Fn(&[u8], &[u8]) -> bool) -> Option<Vec<u8>> {
    let mut out: Option<Vec<u8>> = None;
    let mut done = 0;
    for at in memmem::find_iter(json, from) {
        let (before, rest) = json.split_at_checked(at)?;
        let after = rest.get(from.len()..)?;
        if fits(before, after) {
            let out = out.get_or_insert_default();
            out.extend_from_slice(json.get(done..at)?);
            out.extend_from_slice(to.as_bytes());
            done = at + from.len();
        }
    }
    out.as_mut()?.extend_from_slice(json.get(done..)?);
    out
}

fn begins(text: &[u8], with: u8) -> bool {
    text.trim_ascii_start().first() == Some(&with)
}

/// Whether the value that follows is a `finish_reason`'s.
fn is_finish(before: &[u8]) -> bool {
    let key = before.trim_ascii_end().strip_suffix(b":").map(<[u8]>::trim_ascii_end);
    key.is_some_and(|key| key.ends_with(br#""finish_reason""#))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: &[Rule] = &[THINKING, Rule::Finish(r#""eos_token""#, r#""stop""#), Rule::Failed(r#""abort""#)];

    fn tidied(json: &str) -> Option<String> {
        match tidy(RULES, json.as_bytes()) {
            Tidied::AsItCame => Some(json.to_owned()),
            Tidied::Changed(bytes) => Some(String::from_utf8(bytes).expect("UTF-8")),
            Tidied::Failed => None,
        }
    }

    #[test]
    fn words_are_changed_where_they_mean_something() {
        assert_eq!(
            tidied(r#"{"d":{"reasoning_content" : "hm"},"finish_reason": "eos_token"}"#).as_deref(),
            Some(r#"{"d":{"reasoning" : "hm"},"finish_reason": "stop"}"#)
        );
        for same in [
            r#"{"content":"reasoning_content","text":"eos_token"}"#,
            r#"{"content":"\"reasoning_content\": \"finish_reason\":\"abort\""}"#,
            r#"{"finish_reason":null,"stop_reason":"abort","x":"eos_token"}"#,
            "",
        ] {
            assert_eq!(tidied(same).as_deref(), Some(same));
        }
        assert_eq!(tidied(r#"{"finish_reason":"abort"}"#), None);
    }
}
