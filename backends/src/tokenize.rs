//! Counting tokens with an engine's own tokenizer, for models whose tokenizer is not at hand.

use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use serde::Deserialize;

use crate::{Error, transport::Channel};

/// Longer than vLLM takes for a prompt of a million tokens (some microseconds each) beside other work.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Two million ids of up to seven characters each.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// Where vLLM counts a prompt.
pub const TOKENIZE: &str = "/tokenize";
/// Where vLLM writes ids as text.
pub const DETOKENIZE: &str = "/detokenize";

#[derive(Deserialize)]
struct Answer {
    tokens: Vec<u32>,
}

/// Posts `body` to the engine's `/tokenize` and reads the ids. Body and answer have vLLM's shape (0.33): `{"model",
/// "prompt"}` or `{"model", "messages"}`, and `{"count", "max_model_len", "tokens"}`. Ask only engines that serve
/// [`Api::Tokenize`](crate::engines::Api::Tokenize).
///
/// # Errors
/// [`Error::Status`] when the engine refuses (400: the template or a field is not to its taste), else as
/// [`Channel::post`].
pub async fn tokenize(channel: &Channel, body: Bytes) -> Result<Vec<u32>, Error> {
    let (status, answer) = ask(channel, TOKENIZE, body).await?;
    if status != StatusCode::OK {
        return Err(Error::Status { status });
    }
    let answer: Answer = serde_json::from_slice(&answer).map_err(|_| Error::Unreadable)?;
    Ok(answer.tokens)
}

/// Posts `body` to [`TOKENIZE`] or [`DETOKENIZE`]; the engine's answer as it came, whatever its status.
///
/// # Errors
/// As [`Channel::post`].
pub async fn ask(channel: &Channel, path: &'static str, body: Bytes) -> Result<(StatusCode, Bytes), Error> {
    channel.post(path, body, ANSWER_LIMIT, ANSWER_BYTES_MAX).await
}
