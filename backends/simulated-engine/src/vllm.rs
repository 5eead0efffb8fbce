//! vLLM 0.32.0's HTTP surface: routes, method and key checks, JSON bodies.
//!
//! Not here: what each endpoint says (`chat`, `completions`, `embeddings`, `tokenize`, `metrics`), the shape of errors
//! (`error`), or the shape of streams (`stream`).

pub(crate) mod chat;
pub(crate) mod completions;
mod embeddings;
pub(crate) mod error;
pub(crate) mod fields;
mod logprobs;
pub(crate) mod lora;
mod metrics;
mod ranking;
pub(crate) mod request;
pub(crate) mod sleep;
pub(crate) mod stream;
pub(crate) mod tokenize;
pub(crate) mod tools;
pub(crate) mod usage;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use serde_json::{Map, Value, json};
use xxhash_rust::xxh3::xxh3_64;

use self::error::Failure;
use crate::{
    body::Death,
    server::{Answer, Service},
    wire::{Wire, runs_model},
};

const VERSION: &str = "0.32.0";
const FINGERPRINT: &str = "vllm-0.32.0-simulated";

/// Largest request body that is read.
const BODY_BYTES_MAX: usize = 64 << 20;

/// Routes and the one method of each, but `/ping`, which has two.
const ROUTES: [(&str, Method); 18] = [
    ("/v1/chat/completions", Method::POST),
    ("/v1/completions", Method::POST),
    ("/v1/embeddings", Method::POST),
    ("/v1/rerank", Method::POST),
    ("/rerank", Method::POST),
    ("/v1/score", Method::POST),
    ("/score", Method::POST),
    ("/pooling", Method::POST),
    ("/classify", Method::POST),
    ("/tokenize", Method::POST),
    ("/detokenize", Method::POST),
    ("/v1/models", Method::GET),
    ("/health", Method::GET),
    ("/ping", Method::GET),
    ("/version", Method::GET),
    ("/metrics", Method::GET),
    ("/load", Method::GET),
    ("/kv_event_sources", Method::GET),
];

/// The same of a server with sleep mode.
const SLEEP_ROUTES: [(&str, Method); 3] =
    [("/sleep", Method::POST), ("/wake_up", Method::POST), ("/is_sleeping", Method::GET)];

/// The same of a server that loads adapters when asked.
const ADAPTER_ROUTES: [(&str, Method); 2] =
    [("/v1/load_lora_adapter", Method::POST), ("/v1/unload_lora_adapter", Method::POST)];

/// The wire, see the module.
pub(crate) struct Vllm;

impl Wire for Vllm {
    fn answer<'a>(&'a self, service: &'a Arc<Service>, request: Request<Incoming>) -> BoxFuture<'a, Answer> {
        Box::pin(async move { route(service, request).await.unwrap_or_else(Failure::into_answer) })
    }

    fn refusal(&self, failure: Failure) -> Answer {
        failure.into_answer()
    }

    /// An error event, spaced as Python's `json.dumps` does, and the usual end mark.
    fn death_events(&self) -> Death {
        let event = concat!(
            r#"data: {"error": {"message": "EngineCore encountered an issue. See stack trace (above) for the root cause.","#,
            r#" "type": "InternalServerError", "param": null, "code": 500}}"#,
            "\n\n"
        );
        Death::Events(vec![Bytes::from_static(event.as_bytes()), stream::DONE])
    }
}

/// What runs the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    Chat,
    Completion,
    Embedding,
    Rerank,
    Score,
    Pooling,
    Classify,
}

/// Runs the model as vLLM would.
pub(crate) async fn run(
    service: &Arc<Service>,
    task: Task,
    body: &Map<String, Value>,
    caller: &Caller,
) -> Result<Answer, Failure> {
    match task {
        Task::Chat => chat::answer(service, body, caller).await,
        Task::Completion => completions::answer(service, body, caller).await,
        Task::Embedding => embeddings::answer(service, body, caller).await,
        Task::Pooling => embeddings::pool(service, body, caller).await,
        Task::Classify => embeddings::classify(service, body, caller).await,
        Task::Rerank => ranking::rerank(service, body, caller).await,
        Task::Score => ranking::score(service, body, caller).await,
    }
}

async fn route(service: &Arc<Service>, request: Request<Incoming>) -> Result<Answer, Failure> {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path();
    authorize(service, path, &parts.headers)?;
    let sleeps = SLEEP_ROUTES.iter().filter(|_| service.options.sleep_mode);
    let adapters = ADAPTER_ROUTES.iter().filter(|_| service.options.adapter_updates);
    let Some((_, method)) = ROUTES.iter().chain(sleeps).chain(adapters).find(|(route, _)| *route == path) else {
        return Err(unknown(path, &parts.headers));
    };
    if parts.method != method && !(path == "/ping" && parts.method == Method::POST) {
        return Err(Failure::method_not_allowed(method));
    }
    match path {
        "/health" | "/ping" => return Ok(empty(StatusCode::OK, Vec::new())),
        "/version" => return Ok(ok(&json!({"version": VERSION}))),
        "/load" => {
            // This request itself is not counted.
            let load = service.log.in_flight.load(Ordering::Relaxed).saturating_sub(1);
            return Ok(ok(&json!({"server_load": load})));
        }
        "/kv_event_sources" => {
            let ranks = service.driver.publisher().map(|publisher| ("0".to_owned(), publisher.describe()));
            return Ok(ok(&Value::Object(ranks.into_iter().collect())));
        }
        "/metrics" => return Ok(metrics::answer(service)),
        "/v1/models" => return Ok(ok(&models(service))),
        "/sleep" | "/wake_up" | "/is_sleeping" => return sleep::answer(service, path).await,
        _ => {}
    }
    let body = read(&parts.headers, body).await?;
    if runs_model(path) {
        service.sleep.require_awake()?;
    }
    let caller = Caller { request_id: text_of(&parts.headers, "x-request-id").map(str::to_owned) };
    match path {
        "/v1/chat/completions" => run(service, Task::Chat, &body, &caller).await,
        "/v1/completions" => run(service, Task::Completion, &body, &caller).await,
        "/v1/rerank" | "/rerank" => run(service, Task::Rerank, &body, &caller).await,
        "/v1/score" | "/score" => run(service, Task::Score, &body, &caller).await,
        "/v1/embeddings" => run(service, Task::Embedding, &body, &caller).await,
        "/v1/load_lora_adapter" => lora::load(service, &body).await,
        "/v1/unload_lora_adapter" => lora::unload(service, &body),
        "/pooling" => run(service, Task::Pooling, &body, &caller).await,
        "/classify" => run(service, Task::Classify, &body, &caller).await,
        "/tokenize" => tokenize::tokenize(service, &body),
        _ => tokenize::detokenize(service, &body),
    }
}

/// What the headers say beyond the body.
#[derive(Default)]
pub(crate) struct Caller {
    request_id: Option<String>,
}

impl Caller {
    /// The id of an answer: the header's, else the body's, else a new one.
    fn answer_id(&self, prefix: &str, body: Option<&str>) -> String {
        match self.request_id.as_deref().or(body) {
            Some(id) => format!("{prefix}-{id}"),
            None => format!("{prefix}-{}", new_id()),
        }
    }
}

/// Keys guard `/v1` only, as in vLLM.
pub(crate) fn authorize(service: &Service, path: &str, headers: &HeaderMap) -> Result<(), Failure> {
    let keys = &service.options.api_keys;
    if keys.is_empty() || !path.starts_with("/v1") {
        return Ok(());
    }
    let given = text_of(headers, "authorization").and_then(|value| value.split_once(' '));
    match given {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") && keys.iter().any(|known| known == key) => Ok(()),
        _ => Err(Failure::unauthorized()),
    }
}

/// Not found, unless it is a known path with a slash too many, which is redirected.
fn unknown(path: &str, headers: &HeaderMap) -> Failure {
    let trimmed = path.trim_end_matches('/');
    let known = path != trimmed && ROUTES.iter().any(|(route, _)| *route == trimmed);
    match text_of(headers, "host").filter(|_| known) {
        Some(host) => Failure::redirect(&format!("http://{host}{trimmed}")),
        None => Failure::not_found(),
    }
}

pub(crate) fn text_of<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Reads a body as a JSON object.
pub(crate) async fn read(headers: &HeaderMap, body: Incoming) -> Result<Map<String, Value>, Failure> {
    let kind = text_of(headers, "content-type").unwrap_or_default();
    let media = kind.split(';').next().unwrap_or_default().trim();
    let collected = Limited::new(body, BODY_BYTES_MAX).collect().await;
    if !media.eq_ignore_ascii_case("application/json") {
        return Err(Failure::unsupported_media_type());
    }
    let bytes = collected.map_err(|_| Failure::unreadable())?.to_bytes();
    if bytes.is_empty() {
        return Err(Failure::invalid("missing", "body", "Field required", "None"));
    }
    let text = std::str::from_utf8(&bytes).map_err(|_| Failure::unreadable())?;
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => {
            let message = "Input should be a valid dictionary or object to extract fields from";
            Err(Failure::invalid("model_attributes_type", "body", message, &fields::shown(&other)))
        }
        Err(error) => Err(Failure::invalid_json(position(text, &error))),
    }
}

/// Characters before the place where the JSON is wrong.
fn position(text: &str, error: &serde_json::Error) -> usize {
    if error.is_eof() {
        return text.chars().count();
    }
    let before: usize =
        text.split('\n').take(error.line().saturating_sub(1)).map(|line| line.chars().count() + 1).sum();
    before + error.column().saturating_sub(1)
}

/// The model, then its adapters.
fn models(service: &Service) -> Value {
    let model = &service.options.model;
    let mut data = vec![entry(model, model, None, Some(service.options.max_model_len))];
    data.extend(service.adapters.list().iter().map(|(name, path)| entry(name, path, Some(model), None)));
    json!({"object": "list", "data": data})
}

fn entry(name: &str, root: &str, parent: Option<&str>, max_model_len: Option<u32>) -> Value {
    let created = now_seconds();
    json!({
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "vllm",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
        "permission": [{
            "id": format!("modelperm-{}", new_id()),
            "object": "model_permission",
            "created": created,
            "allow_create_engine": false,
            "allow_sampling": true,
            "allow_logprobs": true,
            "allow_search_indices": false,
            "allow_view": true,
            "allow_fine_tuning": false,
            "organization": "*",
            "group": null,
            "is_blocking": false,
        }],
    })
}

/// An object with its fields in this order.
pub(crate) fn object<const N: usize>(fields: [(&str, Value); N]) -> Map<String, Value> {
    fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

pub(crate) fn ok(value: &Value) -> Answer {
    json_answer(StatusCode::OK, value)
}

pub(crate) fn json_answer(status: StatusCode, value: &Value) -> Answer {
    let json = HeaderValue::from_static("application/json");
    Answer::Whole { status, headers: vec![(header::CONTENT_TYPE, json)], body: Bytes::from(value.to_string()) }
}

pub(crate) fn empty(status: StatusCode, headers: Vec<(header::HeaderName, HeaderValue)>) -> Answer {
    Answer::Whole { status, headers, body: Bytes::new() }
}

fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

pub(crate) fn now_seconds() -> u64 {
    since_epoch().as_secs()
}

/// Sixteen hexadecimal digits, unlike those of any other answer.
pub(crate) fn new_id() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let mut seed = since_epoch().as_nanos().to_le_bytes().to_vec();
    seed.extend(count.to_le_bytes());
    format!("{:016x}", xxh3_64(&seed))
}
