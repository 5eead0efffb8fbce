//! Reading an engine's error, whatever its shape.
//!
//! | engine | body |
//! |---|---|
//! | vLLM | `{"error": {message, type, param, code: 400}}`, `{"error": "Unauthorized"}`, `{"detail": …}` |
//! | TGI | `{"error": "…", "error_type": "…"}`; in streams `{"error": {message, http_status_code}}` |
//! | SGLang, TensorRT-LLM | `{"object": "error", message, type, param, code: 400}` |
//! | llama.cpp | `{"error": {code: 400, message, type}}` |
//! | Ollama, Triton | `{"error": "…"}` |
//! | proxies, frameworks | plain text, HTML, nothing |

use serde_json::{Map, Value};

use super::ApiError;
use super::redact::redact;

/// A longer message is cut. Pydantic repeats itself once for each type that a body could have had.
const MESSAGE_CHARS_MAX: usize = 1000;
/// Text that is no JSON is taken for a message up to here; beyond, it is a page.
const TEXT_BYTES_MAX: usize = 300;

/// The error that an engine answered with `status` and `body`.
#[must_use]
pub fn from_engine(status: u16, body: &[u8]) -> ApiError {
    let json = serde_json::from_slice(body);
    match &json {
        Ok(Value::Object(object)) => Found::read(object),
        Ok(Value::String(text)) => Found { message: plain_text(text.as_bytes()), ..Found::default() },
        Ok(_) => Found::default(),
        Err(_) => Found { message: plain_text(body), ..Found::default() },
    }
    .into_error(status)
}

/// The error that an event of a stream tells of, and its status if it names one.
pub(crate) fn from_event(data: &[u8]) -> (ApiError, Option<u16>) {
    let json = serde_json::from_slice(data);
    let found = match &json {
        Ok(Value::Object(object)) => Found::read(object),
        _ => Found::default(),
    };
    let status = found.status;
    (found.into_error(status.unwrap_or(500)), status)
}

/// What the body says, each in the engine's own words.
#[derive(Default)]
struct Found<'a> {
    message: Option<String>,
    kind: &'a str,
    param: Option<&'a str>,
    code: &'a str,
    status: Option<u16>,
}

impl<'a> Found<'a> {
    fn read(body: &'a Map<String, Value>) -> Self {
        let error = match body.get("error") {
            Some(Value::Object(error)) => error,
            _ => body,
        };
        let text = |key: &str| error.get(key).and_then(Value::as_str);
        let message =
            [error.get("message"), error.get("error"), body.get("detail")].into_iter().flatten().find_map(said);
        Self {
            message,
            kind: text("type").or_else(|| text("error_type")).unwrap_or_default(),
            param: text("param"),
            code: text("code").unwrap_or_default(),
            status: ["code", "http_status_code", "status", "status_code"]
                .iter()
                .find_map(|key| u16::try_from(error.get(*key)?.as_u64()?).ok())
                .filter(|status| (400..600).contains(status)),
        }
    }

    fn into_error(self, status: u16) -> ApiError {
        let message = match &self.message {
            Some(message) => redact(message, MESSAGE_CHARS_MAX),
            None => format!("The model server answered with status {status} and no readable message."),
        };
        ApiError {
            kind: self.openai_type(status).to_owned(),
            param: self.openai_param(),
            code: self.openai_code(status, &message),
            message,
        }
    }

    fn openai_type(&self, status: u16) -> &'a str {
        match status {
            429 if matches!(self.kind, "requests" | "tokens" | "insufficient_quota") => self.kind,
            429 => "rate_limit_error",
            // TGI's: a shard failed.
            424 => "server_error",
            400..=499 => "invalid_request_error",
            503 => "service_unavailable_error",
            _ => "server_error",
        }
    }

    /// vLLM names places in the body: `body.messages`, `body.34` for a position, `body` for all of it.
    fn openai_param(&self) -> Option<String> {
        let param = self.param?;
        let name = match param.strip_prefix("body") {
            Some(rest) => rest.strip_prefix('.').unwrap_or(rest),
            None => param,
        };
        let is_name = name.bytes().next().is_some_and(|b| b.is_ascii_alphabetic()) && name.len() <= 128;
        is_name.then(|| redact(name, MESSAGE_CHARS_MAX))
    }

    fn openai_code(&self, status: u16, message: &str) -> Option<String> {
        let code = match status {
            400 | 413 | 422 if self.is_context_length(message) => "context_length_exceeded",
            404 if self.is_model(message) => "model_not_found",
            _ if is_word(self.code) => self.code,
            401 => "invalid_api_key",
            429 => "rate_limit_exceeded",
            502 => "upstream_error",
            503 => "server_is_overloaded",
            504 => "upstream_timeout",
            _ => return None,
        };
        Some(code.to_owned())
    }

    fn is_context_length(&self, message: &str) -> bool {
        // Each with the engine that says so.
        const SAID: [&str; 9] = [
            "maximum context length",             // vLLM, SGLang, OpenAI
            "greater than max_model_len",         // vLLM, of max_tokens
            "exceeds the available context size", // llama.cpp
            "longer than the model's context",    // SGLang
            "exceeds the maximum allowed length", // SGLang
            "`inputs` must have less than",       // TGI
            "`inputs` tokens + `max_new_tokens`", // TGI
            "should not exceed max_seq_len",      // TensorRT-LLM
            "exceeds maximum input length",       // TensorRT-LLM behind Triton
        ];
        self.kind == "exceed_context_size_error" || SAID.iter().any(|said| message.contains(said))
    }

    fn is_model(&self, message: &str) -> bool {
        let message = message.to_ascii_lowercase();
        self.param == Some("model")
            || message.contains("model") && (message.contains("does not exist") || message.contains("not found"))
    }
}

/// A message: text, or FastAPI's list of what is wrong where.
fn said(value: &Value) -> Option<String> {
    match value {
        Value::String(text) if text.is_empty() => None,
        Value::String(text) => Some(text.clone()),
        Value::Array(problems) => {
            let problems: Vec<String> = problems.iter().take(8).filter_map(problem).collect();
            (!problems.is_empty()).then(|| problems.join("; "))
        }
        _ => None,
    }
}

/// `{"loc": ["body", "messages"], "msg": "Field required", …}`
fn problem(value: &Value) -> Option<String> {
    let said = value.get("msg")?.as_str()?;
    let place: Vec<&str> = value.get("loc")?.as_array()?.iter().filter_map(Value::as_str).collect();
    Some(format!("{}: {said}", place.join(".")))
}

/// A short line of text that is no markup.
fn plain_text(body: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(body).ok()?.trim();
    let is_message = !text.is_empty()
        && text.len() <= TEXT_BYTES_MAX
        && !text.starts_with(['<', '{', '['])
        && !text.chars().any(|c| c.is_control() && !c.is_ascii_whitespace());
    is_message.then(|| text.to_owned())
}

/// A code as OpenAI writes them.
fn is_word(code: &str) -> bool {
    (1..=64).contains(&code.len())
        && code.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        && code.bytes().any(|b| b.is_ascii_lowercase())
}
