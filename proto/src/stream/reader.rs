//! The events of one stream, which engines write all alike but for the piece of text in them.

use memchr::memmem;

use super::{Chunk, Delta, read};
use crate::strings::string_length;

/// Members whose text is what one event has and the next has another of.
const TEXTS: [&str; 4] = [r#""content":"#, r#""text":"#, r#""reasoning_content":"#, r#""reasoning":"#];
/// Longer events are not remembered: their length is not their frame's.
const FRAME_BYTES_MAX: usize = 4096;

/// Reads the events of one stream, each as [`read`] does. One that is, but for a piece of plain text, to the byte what the
/// last was says the same, and is not parsed: a tenth of the work.
#[derive(Debug, Default)]
pub struct Reader {
    last: Option<Likeness>,
}

/// An event without its text.
#[derive(Debug)]
struct Likeness {
    /// Up to the text's opening quote, and from its closing one on.
    frame: Box<[u8]>,
    before: usize,
    delta: Delta,
    /// Bytes of the event with its text.
    length: usize,
}

impl Reader {
    /// As [`read`]. The data must be UTF-8, as those of a well-formed event are.
    pub fn read(&mut self, data: &[u8]) -> Chunk {
        let text = self.last.as_ref().and_then(|last| Some((last, last.text_of(data)?)));
        if let Some((last, text)) = text
            && is_plain(text)
        {
            return Chunk::Delta(last.with_length(data.len()));
        }
        let is_like_the_last = text.is_some();
        let chunk = read(data);
        if let (Chunk::Delta(delta), false) = (&chunk, is_like_the_last) {
            self.last = Likeness::of(data, delta);
        }
        chunk
    }
}

impl Likeness {
    /// Of an event with text, and without a usage that will be another in the next.
    fn of(data: &[u8], delta: &Delta) -> Option<Self> {
        if !delta.has_content || delta.usage.is_some() || data.len() > FRAME_BYTES_MAX {
            return None;
        }
        TEXTS.iter().find_map(|key| {
            // The key's quotes cannot be met inside of a string: there they would have backslashes before them.
            let value = memmem::find(data, key.as_bytes())? + key.len();
            let blank = data.get(value..)?.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            let text = data.get(value + blank..)?.strip_prefix(b"\"")?;
            let before = data.len() - text.len();
            let after = text.get(string_length(text).checked_sub(1)?..)?;
            if text.len() == after.len() {
                return None; // it is empty, and the text elsewhere
            }
            let frame = [data.get(..before)?, after].concat().into();
            Some(Self { frame, before, delta: delta.clone(), length: data.len() })
        })
    }

    /// The text of an event that is otherwise the same.
    fn text_of<'d>(&self, data: &'d [u8]) -> Option<&'d [u8]> {
        let (before, after) = self.frame.split_at_checked(self.before)?;
        data.strip_prefix(before)?.strip_suffix(after)
    }

    fn with_length(&self, length: usize) -> Delta {
        let mut delta = self.delta.clone();
        // What stands behind the text moves with its length.
        if let Some(member) = delta.usage_member.as_mut().filter(|member| member.start >= self.before) {
            *member = member.start + length - self.length..member.end + length - self.length;
        }
        delta
    }
}

/// Whether it is the inside of a JSON string, without escapes, and not empty.
fn is_plain(text: &[u8]) -> bool {
    !text.is_empty() && !text.iter().any(|byte| matches!(byte, b'"' | b'\\' | 0..0x20))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FORMS: [(&str, &str); 6] = [
        (r#"{"id":"x","choices":[{"index":0,"delta":{"content":""#, r#""},"finish_reason":null}],"usage":null}"#),
        (r#"{"id":"x","choices":[{"index":1,"text": ""#, r#"","logprobs":null,"finish_reason":null}]}"#),
        (r#"{"usage":null,"choices":[{"delta":{"reasoning_content":""#, r#"","content":null}}]}"#),
        (r#"{"choices":[{"delta":{"content":""#, r#""},"finish_reason":"stop"}]}"#),
        (r#"{"choices":[{"delta":{"content":""#, r#""}}],"usage":{"prompt_tokens":1,"completion_tokens":2}}"#),
        (r#"{"error":{"message":"content","text":""#, r#""}}"#),
    ];

    #[test]
    fn what_is_alike_is_not_parsed() {
        let event = |text: &str| format!("{}{text}{}", FORMS[0].0, FORMS[0].1);
        let mut reader = Reader::default();
        let first = reader.read(event("one").as_bytes());
        assert_eq!(first, read(event("one").as_bytes()));
        let second = event(" two");
        assert_eq!(reader.last.as_ref().and_then(|last| last.text_of(second.as_bytes())), Some(&b" two"[..]));
        // What only looks alike is read.
        for text in ["", r#"a"},"x":{"y":"z"#, r"\n", "\u{1}", r"\"] {
            assert_eq!(reader.read(event(text).as_bytes()), read(event(text).as_bytes()), "{text:?}");
        }
    }

    proptest! {
        /// Whatever came before, each event is read as by itself.
        #[test]
        fn a_reader_remembers_nothing_wrongly(
            events in proptest::collection::vec(
                (0..FORMS.len(), prop_oneof!["[a-zü \\\\\"n{},:]{0,6}", Just("[DONE]".to_owned()), Just("héllo".to_owned())]),
                1..12,
            ),
        ) {
            let mut reader = Reader::default();
            for (form, text) in events {
                let (before, after) = FORMS[form];
                let data = format!("{before}{text}{after}");
                prop_assert_eq!(reader.read(data.as_bytes()), read(data.as_bytes()), "{}", data);
            }
        }
    }
}
