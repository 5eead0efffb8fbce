//! One event of an OpenAI stream, chat or completions, read for what a gateway acts on: is it the end, an error, a first
//! token, a finished choice, usage?
//!
//! Everything else in a chunk is skipped unread. Keys may be missing, `null`, doubled (the last counts) or a vendor's own;
//! a chunk is [`Chunk::Malformed`] only if it is no JSON object or its choices are not the objects that they must be.
//! Not here: the `/v1/responses` and Anthropic streams, and what the text says.

mod completeness;
mod reader;
#[cfg(test)]
mod tests;
mod usage;
mod wire;

use std::fmt;
use std::sync::LazyLock;

pub use completeness::Completeness;
use memchr::memmem::Finder;
pub use reader::Reader;
use serde::Deserializer;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};
use smallvec::SmallVec;
pub use usage::Usage;

use crate::error::ApiError;
use crate::peek::Span;

/// What one event says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chunk {
    /// `[DONE]`. Alone it does not mean success: vLLM sends it after an error event too.
    Done,
    /// Any engine's error, in OpenAI's words; also a choice that it gave up, see [`gave_up`].
    Error {
        error: ApiError,
        /// The HTTP status that the engine would have given, where it says so.
        status: Option<u16>,
    },
    Delta(Delta),
    Malformed,
}

/// A piece of an answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Delta {
    /// The choices in it, in order. A missing index counts as 0.
    pub choices: SmallVec<[Choice; 2]>,
    /// Whether it carries any output: text, reasoning, a refusal, a tool call, audio or token ids. A role alone is none.
    pub has_content: bool,
    /// Usage, unless absent or `null`. With `continuous_usage_stats` every chunk has one, and the last counts.
    pub usage: Option<Usage>,
    /// Whether this is the chunk that `include_usage` adds: usage and no choice.
    pub usage_only: bool,
    /// The member `"usage": …`, `null` or not, with one of the commas beside it: cut it out, and the rest is still JSON.
    pub usage_member: Option<Span>,
}

/// One choice of a [`Delta`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    pub index: u32,
    /// Whether it has a finish reason.
    pub finished: bool,
}

/// Whether the first member called `model`, at whatever depth, is this plain name. It cannot be met inside of a string:
/// there its quotes would have backslashes before them.
#[must_use]
pub fn names(json: &[u8], model: &str) -> bool {
    static KEY: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(br#""model""#));
    let value = KEY.find(json).and_then(|at| json.get(at + KEY.needle().len()..));
    let value = value.and_then(|rest| rest.trim_ascii_start().strip_prefix(b":"));
    let value = value.and_then(|rest| rest.trim_ascii_start().strip_prefix(b"\""));
    value.and_then(|rest| rest.strip_prefix(model.as_bytes())).is_some_and(|rest| rest.starts_with(b"\""))
}

/// The model that an answer, or an event of one, says it comes from. Nothing is read behind it, and engines name it before
/// what is long.
#[must_use]
pub fn model(json: &[u8]) -> Option<String> {
    /// Where the name goes, since the rest of the object makes an error of a reader that stops.
    struct Name<'n>(&'n mut Option<String>);

    impl<'de> Visitor<'de> for Name<'_> {
        type Value = ();

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a JSON object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
            while let Some(is_model) = map.next_key_seed(IsModel)? {
                if is_model {
                    *self.0 = map.next_value()?;
                    break;
                }
                map.next_value::<IgnoredAny>()?;
            }
            Ok(())
        }
    }

    /// Whether a key is the one, without a copy of it.
    struct IsModel;

    impl<'de> DeserializeSeed<'de> for IsModel {
        type Value = bool;

        fn deserialize<D: Deserializer<'de>>(self, key: D) -> Result<bool, D::Error> {
            key.deserialize_str(self)
        }
    }

    impl Visitor<'_> for IsModel {
        type Value = bool;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a key")
        }

        fn visit_str<E>(self, key: &str) -> Result<bool, E> {
            Ok(key == "model")
        }
    }

    let mut name = None;
    let _ = serde_json::Deserializer::from_slice(json).deserialize_map(Name(&mut name));
    name
}

/// The finish reason that vLLM and SGLang give to what they let go of: to shut down, to sleep, to make room.
const ABORT: &str = r#""abort""#;

/// Whether a whole answer, or a choice of it, is one that the engine let go of.
///
/// The words cannot be met inside of a string: there its quotes would have backslashes before them.
#[must_use]
pub fn is_given_up(answer: &[u8]) -> bool {
    memchr::memmem::find_iter(answer, ABORT).any(|at| {
        let before = answer.get(..at).unwrap_or_default().trim_ascii_end();
        before.strip_suffix(b":").is_some_and(|key| key.trim_ascii_end().ends_with(br#""finish_reason""#))
    })
}

/// The same as an engine would tell it, had it found words, with the HTTP status of that: not now, and not here.
#[must_use]
pub fn gave_up() -> (ApiError, u16) {
    let error = ApiError {
        message: "The engine gave the request up.".to_owned(),
        kind: "service_unavailable_error".to_owned(),
        param: None,
        code: None,
    };
    (error, 503)
}

/// Reads the data of one event.
#[must_use]
pub fn read(data: &[u8]) -> Chunk {
    if data.trim_ascii() == b"[DONE]" {
        return Chunk::Done;
    }
    let Some(chunk) = wire::Chunk::read(data) else { return Chunk::Malformed };
    if chunk.gave_up {
        let (error, status) = gave_up();
        return Chunk::Error { error, status: Some(status) };
    }
    if chunk.is_error {
        let (error, status) = crate::error::from_event(data);
        return Chunk::Error { error, status };
    }
    let usage = chunk.usage.and_then(|raw| Usage::read(raw.as_bytes()));
    Chunk::Delta(Delta {
        usage_only: usage.is_some() && chunk.choices.is_empty(),
        usage,
        usage_member: chunk.usage.and_then(|raw| usage::member(data, raw)),
        choices: chunk.choices,
        has_content: chunk.has_content,
    })
}
