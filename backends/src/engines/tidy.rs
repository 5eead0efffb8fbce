//! Small differences of engines that speak OpenAI's dialect: a key of another name, a word of another meaning.
//!
//! They are mended in the bytes, and only where they stand: everything else goes on as it came.

use bytes::Bytes;
use memchr::memmem;

use super::answer::{Translator, event};

/// What is different.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rule {
    /// This key has another name in OpenAI's answers and vLLM's. The quotes are part of it.
    Key(&'static str, &'static str),
    /// This value of `finish_reason` has another name. The quotes are part of it.
    Finish(&'static str, &'static str),
}

/// Thinking text, under the name that vLLM, Ollama and OpenAI's own open models have for it.
pub(super) const THINKING: Rule = Rule::Key(r#""reasoning_content""#, r#""reasoning""#);

/// A translator by rules alone.
#[derive(Debug)]
pub(super) struct Tidy(pub(super) &'static [Rule]);

impl Translator for Tidy {
    fn event(&mut self, data: &[u8], out: &mut Vec<u8>) -> bool {
        let Some(data) = tidy(self.0, data) else { return false };
        event(out, data);
        true
    }

    fn whole(&mut self, body: &Bytes) -> Option<Bytes> {
        Some(tidy(self.0, body).map_or_else(|| body.clone(), Bytes::from))
    }
}

/// `None` where nothing has to be changed.
fn tidy(rules: &[Rule], json: &[u8]) -> Option<Vec<u8>> {
    let mut changed: Option<Vec<u8>> = None;
    for rule in rules {
        let now = changed.as_deref().unwrap_or(json);
        let next = match rule {
            Rule::Key(from, to) => replaced(now, from, to, |_, after| begins(after, b':')),
            Rule::Finish(from, to) => replaced(now, from, to, |before, _| is_finish(before)),
        };
        changed = next.or(changed);
    }
    changed
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

    const RULES: &[Rule] = &[THINKING, Rule::Finish(r#""eos_token""#, r#""stop""#)];

    fn tidied(json: &str) -> String {
        let tidied = tidy(RULES, json.as_bytes()).unwrap_or_else(|| json.as_bytes().to_vec());
        String::from_utf8(tidied).expect("UTF-8")
    }

    #[test]
    fn words_are_changed_where_they_mean_something() {
        assert_eq!(
            tidied(r#"{"d":{"reasoning_content" : "hm"},"finish_reason": "eos_token"}"#),
            r#"{"d":{"reasoning" : "hm"},"finish_reason": "stop"}"#
        );
        for same in [
            r#"{"content":"reasoning_content","text":"eos_token"}"#,
            r#"{"content":"\"reasoning_content\": \"finish_reason\":\"eos_token\""}"#,
            r#"{"finish_reason":null,"stop_reason":"eos_token","x":"eos_token"}"#,
            "",
        ] {
            assert_eq!(tidied(same), same);
        }
    }
}
