//! The shape of one row, as it stands in the journal and in the access log.

use std::sync::Arc;
use std::time::SystemTime;

use serde::Serialize;

use crate::ids::RequestName;
use crate::telemetry::metrics::Api;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The whole answer was handed to the client.
    Completed,
    /// We refused it; no engine saw it, or none could take it.
    Refused,
    /// The engine refused it (its own 4xx).
    EngineRefused,
    /// Every attempt failed before the first byte.
    Failed,
    /// The answer broke off after its first byte; the client got an error event or a cut body.
    Cut,
    /// The client left.
    ClientGone,
}

impl Outcome {
    /// In a word what went wrong, if anything did, as traces tell it.
    pub(super) fn error(self) -> Option<&'static str> {
        match self {
            Self::Completed => None,
            Self::Refused => Some("refused"),
            Self::EngineRefused => Some("engine_refused"),
            Self::Failed => Some("failed"),
            Self::Cut => Some("cut"),
            Self::ClientGone => Some("client_gone"),
        }
    }
}

/// Where a token count comes from, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TokensFrom {
    /// The engine's own `usage`.
    Engine,
    /// The model's tokenizer, here or at the engine.
    Tokenizer,
    /// Events with content (engines send one a token unless told otherwise).
    Events,
    /// Bytes over a typical bytes-per-token.
    Estimate,
    /// Nothing was counted.
    None,
}

/// One request. Times in milliseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Arrival, seconds since the Unix epoch.
    pub time: f64,
    #[serde(serialize_with = "name")]
    pub request: RequestName,
    #[serde(serialize_with = "api")]
    pub api: Api,
    /// The configured model; absent when the request named none that exists.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<Arc<str>>,
    /// Where it was sent last; absent when it was sent nowhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker: Option<Arc<str>>,
    pub stream: bool,
    /// HTTP status; 499 when the client left before it had one.
    pub status: u16,
    pub outcome: Outcome,
    /// Attempts at workers, the last one included.
    pub attempts: u32,
    pub prompt_tokens: u32,
    pub prompt_tokens_from: TokensFrom,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cached_tokens: Option<u32>,
    /// Prompt tokens that the worker was expected to have in its KV cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub matched_tokens: Option<u32>,
    pub output_tokens: u32,
    pub output_tokens_from: TokensFrom,
    /// `coalesced`: its answer and its counts are those of a call that stands in the row of another request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<&'static str>,
    /// In lanes, over all attempts; also of a request that was never sent.
    pub queue_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttft_ms: Option<f64>,
    pub total_ms: f64,
}

impl Row {
    pub(super) fn new(request: RequestName, api: Api, time: SystemTime) -> Self {
        Self {
            time: time.duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64()),
            request,
            api,
            model: None,
            worker: None,
            stream: false,
            status: 499,
            outcome: Outcome::ClientGone,
            attempts: 0,
            prompt_tokens: 0,
            prompt_tokens_from: TokensFrom::None,
            cached_tokens: None,
            matched_tokens: None,
            output_tokens: 0,
            output_tokens_from: TokensFrom::None,
            cache: None,
            queue_ms: 0.0,
            ttft_ms: None,
            total_ms: 0.0,
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn api<S: serde::Serializer>(api: &Api, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(api.name())
}

fn name<S: serde::Serializer>(name: &RequestName, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(name.as_str())
}
