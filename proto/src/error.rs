//! Errors in OpenAI's shape: writing them, and reading every engine's into it.
//!
//! What a client sees of an engine's error is the engine's message without hosts, paths and keys, under a `type` and a
//! `code` that mean the same whichever engine it came from. Which status goes with it is the caller's decision.

mod engine;
mod redact;

use bytes::Bytes;
pub use engine::from_engine;
pub(crate) use engine::from_event;
use serde_json::{Value, json};

/// OpenAI's error object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    pub message: String,
    /// OpenAI's `type`, such as `invalid_request_error`.
    pub kind: String,
    /// The request's field that is at fault.
    pub param: Option<String>,
    /// A stable word for programs, such as `context_length_exceeded`.
    pub code: Option<String>,
}

/// The body of an error answer: all four keys, `code` a string or null.
#[must_use]
pub fn openai_body(error: &ApiError) -> Bytes {
    object(error).to_string().into()
}

/// The event that ends a stream which fails after its begin. Nothing may follow it, not even `[DONE]`.
#[must_use]
pub fn openai_event(error: &ApiError) -> Bytes {
    format!("data: {}\n\n", object(error)).into()
}

fn object(error: &ApiError) -> Value {
    json!({"error": {
        "message": error.message,
        "type": error.kind,
        "param": error.param,
        "code": error.code,
    }})
}

#[cfg(test)]
mod tests;
