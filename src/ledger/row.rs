//! The shape of one row, as it stands in the journal and in the access log.

use std::sync::Arc;
use std::time::SystemTime;

use serde::Serialize;

use crate::ids::RequestName;
use crate::telemetry::metrics::Api;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    fn name(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Refused => "refused",
            Self::EngineRefused => "engine_refused",
            Self::Failed => "failed",
            Self::Cut => "cut",
            Self::ClientGone => "client_gone",
        }
    }

    /// In a word what went wrong, if anything did, as traces tell it.
    pub(super) fn error(self) -> Option<&'static str> {
        (self != Self::Completed).then(|| self.name())
    }
}

/// Where a token count comes from, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokensFrom {
    /// The engine's own `usage`.
    Engine,
    /// The engine's for a call of several requests, divided in the proportion of our own counts.
    Apportioned,
    /// The model's tokenizer, here or at the engine.
    Tokenizer,
    /// Events with content (engines send one a token unless told otherwise).
    Events,
    /// Bytes over a typical bytes-per-token.
    Estimate,
    /// Nothing was counted.
    None,
}

impl TokensFrom {
    fn name(self) -> &'static str {
        match self {
            Self::Engine => "engine",
            Self::Apportioned => "apportioned",
            Self::Tokenizer => "tokenizer",
            Self::Events => "events",
            Self::Estimate => "estimate",
            Self::None => "none",
        }
    }
}

/// One request. Times in milliseconds.
#[derive(Debug, Clone)]
pub struct Row {
    /// Arrival, seconds since the Unix epoch.
    pub time: f64,
    pub request: RequestName,
    pub api: Api,
    /// The configured model; absent when the request named none that exists.
    pub model: Option<Arc<str>>,
    /// Where it was answered, else where it was sent last; absent when it was sent nowhere.
    pub worker: Option<Arc<str>>,
    /// Where its prompt was computed, if that was another.
    pub prefill_worker: Option<Arc<str>>,
    pub stream: bool,
    /// HTTP status; 499 when the client left before it had one.
    pub status: u16,
    pub outcome: Outcome,
    /// Attempts at workers, the last one included; a prompt that is computed apart is one.
    pub attempts: u32,
    pub prompt_tokens: u32,
    pub prompt_tokens_from: TokensFrom,
    pub cached_tokens: Option<u32>,
    /// Prompt tokens that the worker was expected to have in its KV cache.
    pub matched_tokens: Option<u32>,
    pub output_tokens: u32,
    pub output_tokens_from: TokensFrom,
    /// `coalesced`: its answer and its counts are those of a call that stands in the row of another request.
    pub cache: Option<&'static str>,
    /// In lanes, over all attempts; also of a request that was never sent.
    pub queue_ms: f64,
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
            prefill_worker: None,
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

    /// Adds the row as a line of JSON. Written out here, since what is ours needs no escapes: a third of the work.
    pub(super) fn write(&self, line: &mut Vec<u8>) {
        value(line, "{\"time\":", &self.time);
        word(line, ",\"request\":\"", self.request.as_str());
        word(line, ",\"api\":\"", self.api.name());
        given(line, ",\"model\":", self.model.as_ref());
        given(line, ",\"worker\":", self.worker.as_ref());
        given(line, ",\"prefill_worker\":", self.prefill_worker.as_ref());
        value(line, ",\"stream\":", &self.stream);
        value(line, ",\"status\":", &self.status);
        word(line, ",\"outcome\":\"", self.outcome.name());
        value(line, ",\"attempts\":", &self.attempts);
        value(line, ",\"prompt_tokens\":", &self.prompt_tokens);
        word(line, ",\"prompt_tokens_from\":\"", self.prompt_tokens_from.name());
        given(line, ",\"cached_tokens\":", self.cached_tokens.as_ref());
        given(line, ",\"matched_tokens\":", self.matched_tokens.as_ref());
        given(line, ",\"cache\":", self.cache.as_ref());
        value(line, ",\"output_tokens\":", &self.output_tokens);
        word(line, ",\"output_tokens_from\":\"", self.output_tokens_from.name());
        value(line, ",\"queue_ms\":", &self.queue_ms);
        given(line, ",\"ttft_ms\":", self.ttft_ms.as_ref());
        value(line, ",\"total_ms\":", &self.total_ms);
        line.extend_from_slice(b"}\n");
    }
}

fn value(line: &mut Vec<u8>, before: &str, value: &impl Serialize) {
    line.extend_from_slice(before.as_bytes());
    // Numbers, flags and text: nothing that could fail.
    let _ = serde_json::to_writer(line, value);
}

fn given(line: &mut Vec<u8>, before: &str, given: Option<&impl Serialize>) {
    if let Some(given) = given {
        value(line, before, given);
    }
}

/// A word of ours, or a request's name, which has no characters but harmless ones.
fn word(line: &mut Vec<u8>, before: &str, word: &str) {
    line.extend_from_slice(before.as_bytes());
    line.extend_from_slice(word.as_bytes());
    line.push(b'"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_a_line_of_json() {
        let mut row = Row::new(RequestName::from_client(Some(b"a.1")), Api::Chat, SystemTime::UNIX_EPOCH);
        let mut line = Vec::new();
        row.write(&mut line);
        assert_eq!(
            String::from_utf8(line).unwrap(),
            "{\"time\":0.0,\"request\":\"a.1\",\"api\":\"chat\",\"stream\":false,\"status\":499,\
             \"outcome\":\"client_gone\",\"attempts\":0,\"prompt_tokens\":0,\"prompt_tokens_from\":\"none\",\
             \"output_tokens\":0,\"output_tokens_from\":\"none\",\"queue_ms\":0.0,\"total_ms\":0.0}\n"
        );
        row.model = Some("a \"model\"\n".into());
        (row.worker, row.cached_tokens, row.ttft_ms) = (Some("w".into()), Some(1), Some(0.5));
        let mut line = Vec::new();
        row.write(&mut line);
        let read: serde_json::Value = serde_json::from_slice(&line).unwrap();
        assert_eq!(read["model"], "a \"model\"\n");
        assert_eq!((&read["worker"], &read["cached_tokens"], &read["ttft_ms"]), (&"w".into(), &1.into(), &0.5.into()));
    }
}
