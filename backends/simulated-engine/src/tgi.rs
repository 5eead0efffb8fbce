//! TGI 3.3's HTTP surface: its own routes and OpenAI's, its own words for why an answer ends, a validation that refuses
//! with 422, and tool calls that are a grammar underneath.

mod native;

use std::{fmt::Write as _, sync::Arc};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderName, HeaderValue, Method, Request, StatusCode, header};
use hyper::body::Incoming;
use serde_json::{Map, Value, json};

use crate::{
    body::Death,
    server::{Answer, Service},
    vllm::{self, Caller, Task, error::Failure, json_answer, now_seconds, ok},
    wire::{Wire, at, message_of, metrics_page, reshaped},
};

pub(crate) struct Tgi {
    /// Releases before 1.4 have only its own.
    pub(crate) openai_routes: bool,
}

/// What `max_tokens` is for a completion that names none.
const COMPLETION_TOKENS: u32 = 100;

impl Wire for Tgi {
    fn answer<'a>(&'a self, service: &'a Arc<Service>, request: Request<Incoming>) -> BoxFuture<'a, Answer> {
        Box::pin(async move { self.route(service, request).await.unwrap_or_else(|failure| self.refusal(failure)) })
    }

    fn refusal(&self, failure: Failure) -> Answer {
        let (status, message) = (failure.status(), failure.message());
        let (status, kind) = match status.as_u16() {
            401 => return vllm::empty(status, Vec::new()),
            404 => return vllm::empty(status, Vec::new()),
            429 | 503 => (StatusCode::TOO_MANY_REQUESTS, "overloaded"),
            424 | 500 => (StatusCode::FAILED_DEPENDENCY, "generation"),
            400 | 422 => (StatusCode::UNPROCESSABLE_ENTITY, "validation"),
            _ => (status, "generation"),
        };
        let message = if message.contains("context length") {
            "Input validation error: `inputs` tokens + `max_new_tokens` must be <= the limit".to_owned()
        } else {
            message.to_owned()
        };
        json_answer(status, &json!({"error": message, "error_type": kind}))
    }

    fn death_events(&self) -> Death {
        let error = if self.openai_routes {
            json!({"error": {"message": "Request failed during generation: Server error", "http_status_code": 422}})
        } else {
            json!({"error": "Request failed during generation: Server error", "error_type": "generation"})
        };
        Death::Events(vec![Bytes::from(format!("data: {error}\n\n"))])
    }

    fn headers(&self) -> Vec<(HeaderName, &'static str)> {
        vec![(HeaderName::from_static("x-compute-type"), "cpu+simulated")]
    }
}

impl Tgi {
    async fn route(&self, service: &Arc<Service>, request: Request<Incoming>) -> Result<Answer, Failure> {
        let (parts, body) = request.into_parts();
        if parts.method == Method::POST {
            authorize(service, &parts.headers)?;
        }
        let path = parts.uri.path();
        if path.starts_with("/v1/") && !self.openai_routes {
            return Err(Failure::not_found());
        }
        match (&parts.method, path) {
            (&Method::GET, "/health" | "/ping" | "/") => Ok(vllm::empty(StatusCode::OK, Vec::new())),
            (&Method::GET, "/info") => Ok(ok(&self.info(service))),
            (&Method::GET, "/v1/models") => {
                let model = &service.options.model;
                let entry = json!({"id": model, "object": "model", "created": now_seconds(), "owned_by": model});
                Ok(ok(&json!({"object": "list", "data": [entry]})))
            }
            (&Method::GET, "/metrics") => Ok(metrics_page(metrics(service))),
            (&Method::POST, "/generate" | "/generate_stream") => {
                let body = read(&parts.headers, body).await?;
                native::answer(service, &body, path == "/generate_stream").await
            }
            (&Method::POST, "/v1/chat/completions") => {
                infer(service, Task::Chat, read(&parts.headers, body).await?).await
            }
            (&Method::POST, "/v1/completions") => {
                infer(service, Task::Completion, read(&parts.headers, body).await?).await
            }
            _ => Err(Failure::not_found()),
        }
    }

    fn info(&self, service: &Service) -> Value {
        let length = service.options.max_model_len;
        json!({
            "model_id": service.options.model, "model_sha": null, "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": service.options.max_queued_requests.unwrap_or(128), "max_best_of": 2,
            "max_stop_sequences": 4, "max_input_tokens": length - 1, "max_total_tokens": length,
            "validation_workers": 2, "max_client_batch_size": 4, "router": "text-generation-router",
            "version": if self.openai_routes { "3.3.7" } else { "1.3.4" }, "sha": null, "docker_label": null,
        })
    }
}

fn authorize(service: &Service, headers: &http::HeaderMap) -> Result<(), Failure> {
    let keys = &service.options.api_keys;
    let given = vllm::text_of(headers, "authorization").and_then(|value| value.strip_prefix("Bearer "));
    let known = keys.is_empty() || given.is_some_and(|given| keys.iter().any(|key| key.eq_ignore_ascii_case(given)));
    if known { Ok(()) } else { Err(Failure::unauthorized()) }
}

async fn read(headers: &http::HeaderMap, body: Incoming) -> Result<Map<String, Value>, Failure> {
    vllm::read(headers, body).await
}

fn validation(message: &str) -> Failure {
    Failure::plain(StatusCode::UNPROCESSABLE_ENTITY, message)
}

/// What it refuses on every route.
fn validate(fields: &Map<String, Value>) -> Result<(), Failure> {
    let number = |name| fields.get(name).and_then(Value::as_f64);
    if number("top_p").is_some_and(|top_p| top_p <= 0.0 || top_p >= 1.0) {
        return Err(validation("Input validation error: `top_p` must be > 0.0 and < 1.0"));
    }
    if number("temperature").is_some_and(|temperature| temperature < 0.0) {
        return Err(validation("Input validation error: `temperature` must be strictly positive"));
    }
    match fields.get("stop") {
        None | Some(Value::Null) => Ok(()),
        Some(Value::Array(stop)) if stop.len() <= 4 => Ok(()),
        Some(Value::Array(_)) => Err(validation("Input validation error: `stop` supports up to 4 stop sequences")),
        Some(_) => Err(validation("invalid type: string, expected a sequence")),
    }
}

async fn infer(service: &Arc<Service>, task: Task, mut body: Map<String, Value>) -> Result<Answer, Failure> {
    validate(&body)?;
    if body.get("logit_bias").is_some_and(|bias| !bias.is_array()) {
        return Err(validation("invalid type: map, expected a sequence"));
    }
    if body.contains_key("max_tokens") && body.contains_key("max_completion_tokens") {
        return Err(validation("duplicate field `max_tokens`"));
    }
    if body.get("suffix").is_some_and(|suffix| !suffix.is_null()) {
        return Err(validation("Suffix is not supported and can be achieved by preprocessing the prompt."));
    }
    let format = body.remove("response_format").filter(|format| !format.is_null());
    if let Some(format) = format {
        let Some(value) = format.get("value") else { return Err(validation("missing field `value`")) };
        let schema = if at(&format, "type") == "json_schema" { at(value, "schema") } else { value };
        body.insert("structured_outputs".to_owned(), json!({"json": schema}));
    }
    // What it does not know it does not see, and `n` it does not heed.
    for name in ["n", "logit_bias", "echo", "top_k", "min_p", "stop_token_ids", "ignore_eos", "min_tokens", "best_of"] {
        body.remove(name);
    }
    if task == Task::Completion {
        body.remove("logprobs");
        body.entry("max_tokens").or_insert(COMPLETION_TOKENS.into());
    }
    body.insert("model".to_owned(), service.options.model.as_str().into());
    let answer = vllm::run(service, task, &body, &Caller::default()).await?;
    let mut calls_tool = false;
    Ok(reshaped(answer, move |mut value| {
        let streamed = at(&value, "object") == "chat.completion.chunk";
        let Some(choice) = value.pointer_mut("/choices/0") else {
            return Some(json!({"id": "", "object": at(&value, "object"), "created": at(&value, "created"),
                "model": at(&value, "model"),
                "system_fingerprint": "3.3.7-native", "choices": [], "usage": usage(at(&value, "usage"))}));
        };
        let finish = ended(choice);
        let message = message_of(choice).cloned().unwrap_or_default();
        let calls = message.get("tool_calls").and_then(|calls| calls.pointer("/0/function")).cloned();
        calls_tool |= calls.is_some();
        let shaped = match (task, calls) {
            (Task::Chat, Some(function)) if streamed => {
                json!({"role": "assistant", "tool_calls": [{"index": 0, "id": "0",
                "type": "function", "function": {"name": function.get("name"),
                    "arguments": function.get("arguments").and_then(Value::as_str).unwrap_or_default()}}]})
            }
            (Task::Chat, Some(function)) => {
                let arguments = function.get("arguments").and_then(Value::as_str).unwrap_or_default();
                let arguments: Value = serde_json::from_str(arguments).unwrap_or_default();
                json!({"role": "assistant", "tool_calls": [{"id": "0", "type": "function",
                    "function": {"name": function.get("name"), "arguments": arguments}}]})
            }
            // The event that would tell why a tool's call ended is lost in the parser of its grammar.
            (Task::Chat, None) if streamed && calls_tool => return None,
            // There is no event for the role alone.
            (Task::Chat, None) if streamed && finish.is_null() && message.get("content") == Some(&json!("")) => {
                return None;
            }
            (Task::Chat, None) => {
                let content = message.get("content").and_then(Value::as_str).unwrap_or_default();
                json!({"role": "assistant", "content": content})
            }
            _ => Value::Null,
        };
        let logprobs = choice.get("logprobs").cloned().unwrap_or_default();
        let choice = match (task, streamed) {
            (Task::Chat, true) => json!({"index": 0, "delta": shaped, "logprobs": logprobs, "finish_reason": finish}),
            (Task::Chat, false) => {
                json!({"index": 0, "message": shaped, "logprobs": logprobs, "finish_reason": finish})
            }
            _ => {
                json!({"index": at(choice, "index"), "text": at(choice, "text"), "logprobs": null,
                    "finish_reason": finish})
            }
        };
        Some(json!({"id": "", "object": at(&value, "object"), "created": at(&value, "created"),
                "model": at(&value, "model"),
            "system_fingerprint": "3.3.7-native", "choices": [choice], "usage": usage(at(&value, "usage"))}))
    }))
}

fn usage(usage: &Value) -> Value {
    match usage.as_object() {
        Some(usage) => {
            json!({"prompt_tokens": usage.get("prompt_tokens"), "completion_tokens": usage.get("completion_tokens"),
            "total_tokens": usage.get("total_tokens")})
        }
        None => Value::Null,
    }
}

/// Why a choice ended: `eos_token` is said as `stop`, a stop string as itself.
fn ended(choice: &Value) -> Value {
    match choice.get("finish_reason").and_then(Value::as_str) {
        None => Value::Null,
        Some("length") => "length".into(),
        Some(_) if choice.get("stop_reason").is_some_and(Value::is_string) => "stop_sequence".into(),
        Some(_) => "stop".into(),
    }
}

fn metrics(service: &Service) -> String {
    let (load, _) = service.driver.load();
    let timing = &service.options.timing;
    let budget = f64::from(timing.kv_blocks) * f64::from(timing.block_tokens);
    let mut page = String::new();
    for (name, value) in [
        ("tgi_queue_size", f64::from(load.waiting)),
        ("tgi_batch_current_size", f64::from(load.running)),
        ("tgi_batch_current_max_tokens", (load.kv_usage * budget).round()),
        ("tgi_batch_max_total_tokens", budget),
        ("tgi_request_input_length_sum", load.prompt_tokens as f64),
        ("tgi_request_generated_tokens_sum", load.generation_tokens as f64),
    ] {
        // Writing to a string does not fail.
        let _ = writeln!(page, "{name} {value}");
    }
    page
}

/// A whole answer's numbers travel in headers, too.
fn counted(prompt_tokens: usize, generated_tokens: usize) -> Vec<(HeaderName, HeaderValue)> {
    let json = (header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let count = |name, count: usize| (HeaderName::from_static(name), HeaderValue::from(count));
    vec![json, count("x-prompt-tokens", prompt_tokens), count("x-generated-tokens", generated_tokens)]
}
