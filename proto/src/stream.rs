//! One event of an OpenAI stream, chat or completions, read for what a gateway acts on: is it the end, an error, a first
//! token, a finished choice, usage?
//!
//! Everything else in a chunk is skipped unread. Keys may be missing, `null`, doubled (the last counts) or a vendor's own;
//! a chunk is [`Chunk::Malformed`] only if it is no JSON object or its choices are not the objects that they must be.
//! Not here: the `/v1/responses` and Anthropic streams, and what the text says.

mod completeness;
#[cfg(test)]
mod tests;
mod usage;
mod wire;

pub use completeness::Completeness;
use smallvec::SmallVec;
pub use usage::Usage;

use crate::error::ApiError;
use crate::peek::Span;

/// What one event says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chunk {
    /// `[DONE]`. Alone it does not mean success: vLLM sends it after an error event too.
    Done,
    /// Any engine's error, in OpenAI's words.
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

/// The model that an answer, or an event of one, says it comes from.
#[must_use]
pub fn model(json: &[u8]) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Named {
        model: Option<String>,
    }
    serde_json::from_slice::<Named>(json).ok()?.model
}

/// Reads the data of one event.
#[must_use]
pub fn read(data: &[u8]) -> Chunk {
    if data.trim_ascii() == b"[DONE]" {
        return Chunk::Done;
    }
    let Some(chunk) = wire::Chunk::read(data) else { return Chunk::Malformed };
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
