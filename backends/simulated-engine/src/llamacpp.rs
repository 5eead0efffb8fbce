//! llama.cpp's server, as far as it differs from vLLM's: any model name is served, members of a chunk stand in another
//! order with `timings` at the end, errors have their code first.

use std::{fmt::Write as _, sync::Arc};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderName, Method, Request, StatusCode, header};
use hyper::body::Incoming;
use serde_json::{Map, Value, json};

use crate::{
    body::Death,
    server::{Answer, Service},
    vllm::{self, Caller, Task, error::Failure, json_answer, now_seconds, ok},
    wire::{Wire, at, message_of, metrics_page, reshaped, without},
};

pub(crate) struct LlamaCpp;

impl Wire for LlamaCpp {
    fn answer<'a>(&'a self, service: &'a Arc<Service>, request: Request<Incoming>) -> BoxFuture<'a, Answer> {
        Box::pin(async move { route(service, request).await.unwrap_or_else(|failure| self.refusal(failure)) })
    }

    fn refusal(&self, failure: Failure) -> Answer {
        let status = failure.status();
        let message = failure.message();
        let kind = match status.as_u16() {
            _ if message.contains("context length") => "exceed_context_size_error",
            401 => "authentication_error",
            404 => "not_found_error",
            501 => "not_supported_error",
            503 => "unavailable_error",
            400..=499 => "invalid_request_error",
            _ => "server_error",
        };
        if kind == "exceed_context_size_error" {
            let message = "request exceeds the available context size, try increasing it";
            return json_answer(status, &json!({"error": {"code": status.as_u16(), "message": message, "type": kind}}));
        }
        json_answer(status, &json!({"error": {"code": status.as_u16(), "message": message, "type": kind}}))
    }

    fn death_events(&self) -> Death {
        let error = json!({"error": {"code": 500, "message": "the server died", "type": "server_error"}});
        Death::Events(vec![Bytes::from(format!("data: {error}\n\n"))])
    }

    fn headers(&self) -> Vec<(HeaderName, &'static str)> {
        vec![(header::SERVER, "llama.cpp")]
    }
}

async fn route(service: &Arc<Service>, request: Request<Incoming>) -> Result<Answer, Failure> {
    let (parts, body) = request.into_parts();
    vllm::authorize(service, parts.uri.path(), &parts.headers)?;
    let context = service.options.max_model_len;
    match (&parts.method, parts.uri.path()) {
        (&Method::GET, "/health" | "/v1/health") => Ok(ok(&json!({"status": "ok"}))),
        (&Method::GET, "/v1/models" | "/models") => {
            let model = &service.options.model;
            Ok(ok(&json!({"object": "list", "data": [{
                "id": model, "aliases": [model], "tags": [], "object": "model", "created": now_seconds(),
                "owned_by": "llamacpp", "meta": {"n_ctx": context, "n_ctx_train": context},
            }]})))
        }
        (&Method::GET, "/props") => {
            let slots = service.options.timing.max_batch;
            Ok(ok(&json!({"default_generation_settings": {"n_ctx": context}, "total_slots": slots})))
        }
        (&Method::GET, "/metrics") => Ok(metrics_page(metrics(service))),
        (&Method::POST, path) => {
            let task = match path {
                "/v1/chat/completions" => Task::Chat,
                "/v1/completions" => Task::Completion,
                "/v1/embeddings" => Task::Embedding,
                "/v1/rerank" => Task::Rerank,
                _ => return Err(Failure::plain(StatusCode::NOT_FOUND, "File Not Found")),
            };
            let body = vllm::read(&parts.headers, body).await?;
            infer(service, task, body).await
        }
        _ => Err(Failure::plain(StatusCode::NOT_FOUND, "File Not Found")),
    }
}

async fn infer(service: &Arc<Service>, task: Task, mut body: Map<String, Value>) -> Result<Answer, Failure> {
    let model = service.options.model.clone();
    body.insert("model".to_owned(), model.as_str().into());
    // Nothing bounds an answer but the context.
    body.entry("max_tokens").or_insert((service.options.max_model_len / 2).into());
    let answer = vllm::run(service, task, &body, &Caller::default()).await?;
    if !matches!(task, Task::Chat | Task::Completion) {
        return Ok(answer);
    }
    Ok(reshaped(answer, move |value| Some(shape(value))))
}

/// A chunk or an answer with its members in this engine's order.
fn shape(mut value: Value) -> Value {
    let choices = value.get_mut("choices").map(Value::take).unwrap_or_default();
    let choices: Vec<Value> = choices.as_array().into_iter().flatten().cloned().map(choice).collect();
    let last = choices.iter().any(|choice| !at(choice, "finish_reason").is_null());
    let mut shaped = json!({
        "choices": choices,
        "created": at(&value, "created"),
        "model": at(&value, "model"),
        "system_fingerprint": "b0-unknown",
        "object": at(&value, "object"),
    });
    if let Some(shaped) = shaped.as_object_mut() {
        if let Some(usage) = value.get_mut("usage").filter(|usage| !usage.is_null()) {
            without(usage, &["completion_tokens_details"]);
            shaped.insert("usage".to_owned(), usage.take());
        }
        shaped.insert("id".to_owned(), at(&value, "id").clone());
        if last {
            shaped.insert("timings".to_owned(), json!({"cache_n": 0, "prompt_n": 1, "predicted_n": 1}));
        }
    }
    shaped
}

fn choice(mut choice: Value) -> Value {
    without(&mut choice, &["stop_reason", "token_ids", "routed_experts", "prompt_logprobs", "prompt_token_ids"]);
    if let Some(message) = message_of(&mut choice) {
        let opening = message.get("role").is_some() && message.get("content") == Some(&json!("")) && message.len() == 2;
        if opening {
            message.insert("content".to_owned(), Value::Null);
        }
        message.retain(|name, value| matches!(name.as_str(), "role" | "content" | "tool_calls") || !value.is_null());
    }
    choice
}

fn metrics(service: &Service) -> String {
    let (load, _) = service.driver.load();
    let mut page = String::new();
    for (name, value) in [
        ("prompt_tokens_total", load.prompt_tokens.saturating_sub(load.prefix_hits_tokens)),
        ("prompt_tokens_cached_total", load.prefix_hits_tokens),
        ("tokens_predicted_total", load.generation_tokens),
        ("requests_processing", u64::from(load.running)),
        ("requests_deferred", u64::from(load.waiting)),
    ] {
        // Writing to a string does not fail.
        let _ = writeln!(page, "llamacpp:{name} {value}");
    }
    page
}
