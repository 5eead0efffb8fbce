//! vLLM 0.32.0's HTTP surface: routes, method and key checks, JSON bodies.
//!
//! Not here: what each endpoint says (`chat`, `completions`, `embeddings`, `tokenize`, `metrics`), the shape of errors
//! (`error`), or the shape of streams (`stream`).

mod chat;
mod completions;
mod embeddings;
mod error;
mod fields;
mod logprobs;
mod metrics;
mod request;
mod stream;
mod tokenize;
mod tools;
mod usage;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use serde_json::{Map, Value, json};
use xxhash_rust::xxh3::xxh3_64;

use self::error::Failure;
use crate::{
    body::Death,
    faults::Status,
    server::{Answer, Service},
};

const VERSION: &str = "0.32.0";
const FINGERPRINT: &str = "vllm-0.32.0-simulated";

/// Largest request body that is read.
const BODY_BYTES_MAX: usize = 64 << 20;

/// Routes and the one method of each, but `/ping`, which has two.
const ROUTES: [(&str, Method); 12] = [
    ("/v1/chat/completions", Method::POST),
    ("/v1/completions", Method::POST),
    ("/v1/embeddings", Method::POST),
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

/// Whether requests for `path` run the model.
pub(crate) fn runs_model(path: &str) -> bool {
    matches!(path, "/v1/chat/completions" | "/v1/completions" | "/v1/embeddings")
}

pub(crate) async fn answer(service: &Arc<Service>, request: Request<Incoming>) -> Answer {
    match route(service, request).await {
        Ok(answer) => answer,
        Err(failure) => failure.into_answer(),
    }
}

/// An answer in place of the real one, in the engine's error shape unless a body is given.
pub(crate) fn failure(status: &Status) -> Answer {
    let code = StatusCode::from_u16(status.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut answer = Failure::injected(code).into_answer();
    if let Answer::Whole { headers, body, .. } = &mut answer {
        if let Some(text) = &status.body {
            *body = Bytes::from(text.clone());
        }
        headers.extend(status.retry_after.map(|seconds| (header::RETRY_AFTER, HeaderValue::from(seconds))));
    }
    answer
}

/// What a whole answer becomes when the engine process dies under it.
pub(crate) fn death() -> Answer {
    Failure::engine_death().into_answer()
}

/// How a stream ends when the engine process dies under it: an error event, spaced as Python's `json.dumps` does, and
/// the usual end mark.
pub(crate) fn death_events() -> Death {
    let event = concat!(
        r#"data: {"error": {"message": "EngineCore encountered an issue. See stack trace (above) for the root cause.","#,
        r#" "type": "InternalServerError", "param": null, "code": 500}}"#,
        "\n\n"
    );
    Death { events: [Bytes::from_static(event.as_bytes()), stream::DONE] }
}

async fn route(service: &Arc<Service>, request: Request<Incoming>) -> Result<Answer, Failure> {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path();
    authorize(service, path, &parts.headers)?;
    let Some((_, method)) = ROUTES.iter().find(|(route, _)| *route == path) else {
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
        _ => {}
    }
    let body = read(&parts.headers, body).await?;
    let caller = Caller { request_id: text_of(&parts.headers, "x-request-id").map(str::to_owned) };
    match path {
        "/v1/chat/completions" => chat::answer(service, &body, &caller).await,
        "/v1/completions" => completions::answer(service, &body, &caller).await,
        "/v1/embeddings" => embeddings::answer(service, &body, &caller).await,
        "/tokenize" => tokenize::tokenize(service, &body),
        _ => tokenize::detokenize(service, &body),
    }
}

/// What the headers say beyond the body.
struct Caller {
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
fn authorize(service: &Service, path: &str, headers: &HeaderMap) -> Result<(), Failure> {
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

fn text_of<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Reads a body as a JSON object.
async fn read(headers: &HeaderMap, body: Incoming) -> Result<Map<String, Value>, Failure> {
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

fn models(service: &Service) -> Value {
    let created = now_seconds();
    json!({"object": "list", "data": [{
        "id": service.options.model,
        "object": "model",
        "created": created,
        "owned_by": "vllm",
        "root": service.options.model,
        "parent": null,
        "max_model_len": service.options.max_model_len,
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
    }]})
}

/// An object with its fields in this order.
fn object<const N: usize>(fields: [(&str, Value); N]) -> Map<String, Value> {
    fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn ok(value: &Value) -> Answer {
    json_answer(StatusCode::OK, value)
}

fn json_answer(status: StatusCode, value: &Value) -> Answer {
    let json = HeaderValue::from_static("application/json");
    Answer::Whole { status, headers: vec![(header::CONTENT_TYPE, json)], body: Bytes::from(value.to_string()) }
}

fn empty(status: StatusCode, headers: Vec<(header::HeaderName, HeaderValue)>) -> Answer {
    Answer::Whole { status, headers, body: Bytes::new() }
}

fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn now_seconds() -> u64 {
    since_epoch().as_secs()
}

/// Sixteen hexadecimal digits, unlike those of any other answer.
fn new_id() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let mut seed = since_epoch().as_nanos().to_le_bytes().to_vec();
    seed.extend(count.to_le_bytes());
    format!("{:016x}", xxh3_64(&seed))
}
