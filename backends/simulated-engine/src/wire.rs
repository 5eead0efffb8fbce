//! What the engines' wires have in common: which one a server speaks, and how an answer of vLLM's shape becomes another's.
//!
//! An engine is one module and one line in [`EngineKind::wire`]. Where its OpenAI routes differ from vLLM's in details
//! only, vLLM's do the work and [`reshaped`] changes what stands in the answer.

use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, future::BoxFuture};
use http::{HeaderName, HeaderValue, Request, StatusCode, header};
use hyper::body::Incoming;
use serde_json::Value;

use crate::{
    EngineKind,
    body::Death,
    faults::Status,
    llamacpp::LlamaCpp,
    ollama::Ollama,
    server::{Answer, Service},
    sglang::SgLang,
    tgi::Tgi,
    triton::{self, Triton},
    trtllm::TrtLlm,
    vllm::{Vllm, error::Failure},
};

/// How one engine talks.
pub(crate) trait Wire: Sync {
    fn answer<'a>(&'a self, service: &'a Arc<Service>, request: Request<Incoming>) -> BoxFuture<'a, Answer>;

    /// A refusal in the engine's shape.
    fn refusal(&self, failure: Failure) -> Answer;

    /// What a whole answer becomes when the engine dies under it.
    fn death(&self) -> Answer {
        self.refusal(Failure::engine_death())
    }

    /// How a stream ends when the engine dies under it.
    fn death_events(&self) -> Death;

    /// Whether answers are gRPC's, with a status behind them.
    fn is_grpc(&self) -> bool {
        false
    }

    /// Headers of every answer.
    fn headers(&self) -> Vec<(HeaderName, &'static str)> {
        // Most of them stand on the same web framework.
        vec![(header::SERVER, "uvicorn"), (header::VARY, "Origin")]
    }
}

impl EngineKind {
    pub(crate) fn wire(self) -> &'static dyn Wire {
        match self {
            Self::Vllm => &Vllm,
            Self::Sglang => &SgLang,
            Self::Tgi => &Tgi { openai_routes: true },
            Self::TgiNative => &Tgi { openai_routes: false },
            Self::Trtllm => &TrtLlm,
            Self::Llamacpp => &LlamaCpp,
            Self::Ollama => &Ollama,
            Self::Triton => &Triton { ids: false },
            Self::TritonIds => &Triton { ids: true },
        }
    }
}

/// Paths that run the model, of all engines.
const MODEL_PATHS: [&str; 14] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/rerank",
    "/v1/score",
    "/pooling",
    "/classify",
    "/v1/classify",
    "/generate",
    "/generate_stream",
    "/api/chat",
    "/api/generate",
    triton::INFER,
    triton::STREAM,
];

/// Whether requests for `path` run the model.
pub(crate) fn runs_model(path: &str) -> bool {
    MODEL_PATHS.contains(&path)
}

/// An answer in place of the real one, in the engine's error shape unless a body is given.
pub(crate) fn failure(wire: &dyn Wire, status: &Status) -> Answer {
    let code = StatusCode::from_u16(status.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut answer = wire.refusal(Failure::injected(code));
    if let Answer::Whole { headers, body, .. } = &mut answer {
        if let Some(text) = &status.body {
            *body = Bytes::from(text.clone());
        }
        headers.extend(status.retry_after.map(|seconds| (header::RETRY_AFTER, HeaderValue::from(seconds))));
    }
    answer
}

/// The same answer with each of its objects changed: a whole one, or the data of each event. An event that `change`
/// takes away is not sent.
pub(crate) fn reshaped(answer: Answer, mut change: impl FnMut(Value) -> Option<Value> + Send + 'static) -> Answer {
    match answer {
        Answer::Whole { status, headers, body } if status.is_success() => {
            let value = serde_json::from_slice(&body).ok().and_then(change);
            Answer::Whole { status, headers, body: value.map_or(body, |value| value.to_string().into()) }
        }
        Answer::Events(events) => {
            let events = events.filter_map(move |event| {
                let data = event.strip_prefix(b"data: ").and_then(|data| serde_json::from_slice(data).ok());
                let event = match data {
                    Some(value) => change(value).map(|value| Bytes::from(format!("data: {value}\n\n"))),
                    None => Some(event),
                };
                std::future::ready(event)
            });
            Answer::Events(Box::pin(events))
        }
        other => other,
    }
}

/// The first choice's message, or delta.
pub(crate) fn message_of(choice: &mut Value) -> Option<&mut serde_json::Map<String, Value>> {
    let name = if choice.get("delta").is_some() { "delta" } else { "message" };
    choice.get_mut(name)?.as_object_mut()
}

/// A member, null where it is not.
pub(crate) fn at<'a>(value: &'a Value, name: &str) -> &'a Value {
    value.get(name).unwrap_or(&Value::Null)
}

/// Puts a member into an object.
pub(crate) fn set(value: &mut Value, name: &str, to: impl Into<Value>) {
    if let Some(object) = value.as_object_mut() {
        object.insert(name.to_owned(), to.into());
    }
}

/// Takes members out of an object.
pub(crate) fn without(value: &mut Value, names: &[&str]) {
    if let Some(object) = value.as_object_mut() {
        object.retain(|name, _| !names.contains(&name.as_str()));
    }
}

/// A page of metrics.
pub(crate) fn metrics_page(text: String) -> Answer {
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    Answer::Whole { status: StatusCode::OK, headers: vec![(header::CONTENT_TYPE, kind)], body: text.into() }
}
