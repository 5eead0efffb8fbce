//! Ollama 0.33's HTTP surface: OpenAI's routes with fewer fields, which it passes over without a word, and its own chat in
//! lines of JSON. A prompt that is too long it shortens. A model that is not in memory is loaded by whatever asks for it.

mod native;

use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderName, Method, Request, StatusCode};
use hyper::body::Incoming;
use serde_json::{Map, Value, json};

use crate::{
    body::Death,
    server::{Answer, Service},
    vllm::{self, Caller, Task, error::Failure, json_answer, now_seconds, ok, sleep},
    wire::{Wire, at, message_of, reshaped, set},
};

pub(crate) struct Ollama;

/// Fields of its OpenAI chat and completions.
const CHAT: [&str; 16] = [
    "model",
    "messages",
    "stream",
    "stream_options",
    "max_tokens",
    "seed",
    "stop",
    "temperature",
    "frequency_penalty",
    "presence_penalty",
    "top_p",
    "response_format",
    "tools",
    "reasoning_effort",
    "logprobs",
    "top_logprobs",
];
const COMPLETION: [&str; 11] = [
    "model",
    "prompt",
    "stream",
    "stream_options",
    "max_tokens",
    "seed",
    "stop",
    "temperature",
    "frequency_penalty",
    "presence_penalty",
    "top_p",
];

impl Wire for Ollama {
    fn answer<'a>(&'a self, service: &'a Arc<Service>, request: Request<Incoming>) -> BoxFuture<'a, Answer> {
        Box::pin(async move {
            let own = request.uri().path().starts_with("/api/");
            route(service, request).await.unwrap_or_else(|failure| {
                if own {
                    json_answer(failure.status(), &json!({"error": failure.message()}))
                } else {
                    self.refusal(failure)
                }
            })
        })
    }

    fn refusal(&self, failure: Failure) -> Answer {
        let status = failure.status();
        let kind = match status.as_u16() {
            400 => "invalid_request_error",
            404 => "not_found_error",
            _ => "api_error",
        };
        json_answer(
            status,
            &json!({"error": {"message": failure.message(), "type": kind, "param": null, "code": null}}),
        )
    }

    fn death_events(&self) -> Death {
        Death::Events(vec![Bytes::from_static(b"{\"error\":\"llama runner process has terminated\"}\n\n")])
    }

    fn headers(&self) -> Vec<(HeaderName, &'static str)> {
        Vec::new()
    }
}

async fn route(service: &Arc<Service>, request: Request<Incoming>) -> Result<Answer, Failure> {
    let (parts, body) = request.into_parts();
    let model = &service.options.model;
    match (&parts.method, parts.uri.path()) {
        (&Method::GET, "/") => {
            Ok(Answer::Whole { status: StatusCode::OK, headers: Vec::new(), body: "Ollama is running".into() })
        }
        (&Method::GET, "/api/version") => Ok(ok(&json!({"version": "0.33.0"}))),
        (&Method::GET, "/api/ps") => {
            let length = service.options.max_model_len;
            let loaded = json!({"name": model, "model": model, "size": 1, "digest": "", "context_length": length});
            let models: Vec<Value> = Some(loaded).filter(|_| !service.sleep.is_asleep()).into_iter().collect();
            Ok(ok(&json!({"models": models})))
        }
        (&Method::GET, "/api/tags") => {
            Ok(ok(&json!({"models": [{"name": model, "model": model, "size": 1, "digest": ""}]})))
        }
        (&Method::GET, "/v1/models") => {
            let entry = json!({"id": model, "object": "model", "created": now_seconds(), "owned_by": "library"});
            Ok(ok(&json!({"object": "list", "data": [entry]})))
        }
        (&Method::POST, path) => {
            let task = match path {
                "/v1/chat/completions" => Task::Chat,
                "/v1/completions" => Task::Completion,
                "/v1/embeddings" => Task::Embedding,
                "/api/chat" => {
                    let body = vllm::read(&parts.headers, body).await?;
                    loaded(service, &body).await?;
                    return native::answer(service, &body).await;
                }
                // Of these two only what loads and unloads.
                "/api/embed" | "/api/generate" => {
                    let body = vllm::read(&parts.headers, body).await?;
                    return match (path, body.get("keep_alive").and_then(Value::as_i64)) {
                        ("/api/embed", Some(..0)) if !body.contains_key("input") => {
                            loaded(service, &body).await?;
                            Ok(ok(&json!({"model": model, "embeddings": []})))
                        }
                        ("/api/generate", Some(0)) if !body.contains_key("prompt") => {
                            known(service, &body)?;
                            sleep::fall_asleep(service).await;
                            Ok(ok(&json!({"model": model, "response": "", "done": true, "done_reason": "unload"})))
                        }
                        _ => Err(Failure::not_found()),
                    };
                }
                _ => return Err(Failure::not_found()),
            };
            let body = vllm::read(&parts.headers, body).await?;
            loaded(service, &body).await?;
            infer(service, task, body).await
        }
        _ => Err(Failure::not_found()),
    }
}

fn known(service: &Service, body: &Map<String, Value>) -> Result<(), Failure> {
    match body.get("model").and_then(Value::as_str) {
        Some(model) if model == service.options.model => Ok(()),
        other => {
            let message = format!("model \"{}\" not found, try pulling it first", other.unwrap_or_default());
            Err(Failure::plain(StatusCode::NOT_FOUND, &message))
        }
    }
}

async fn loaded(service: &Service, body: &Map<String, Value>) -> Result<(), Failure> {
    known(service, body)?;
    sleep::wake(service).await;
    Ok(())
}

async fn infer(service: &Arc<Service>, task: Task, mut body: Map<String, Value>) -> Result<Answer, Failure> {
    if task == Task::Embedding {
        return vllm::run(service, task, &body, &Caller::default()).await;
    }
    let fields: &[&str] = if task == Task::Chat { &CHAT } else { &COMPLETION };
    body.retain(|name, _| fields.contains(&name.as_str()));
    if body.get("prompt").is_some_and(|prompt| !prompt.is_string()) {
        return Err(Failure::plain(
            StatusCode::BAD_REQUEST,
            "json: cannot unmarshal array into Go struct field .prompt of type string",
        ));
    }
    // Nothing bounds an answer but the context.
    body.entry("max_tokens").or_insert((service.options.max_model_len / 2).into());
    let mut calls_tool = false;
    let answer = vllm::run(service, task, &body, &Caller::default()).await?;
    Ok(reshaped(answer, move |mut value| {
        let head = json!({"id": at(&value, "id"), "object": at(&value, "object"), "created": at(&value, "created"),
            "model": at(&value, "model"),
            "system_fingerprint": "fp_ollama"});
        let Some(choice) = value.pointer_mut("/choices/0") else {
            return Some(with(head, &json!([]), at(&value, "usage")));
        };
        let finish = choice.get("finish_reason").cloned().unwrap_or_default();
        let logprobs = choice.get("logprobs").cloned().unwrap_or_default();
        let choice = if task == Task::Chat {
            let streamed = choice.get("delta").is_some();
            let message = message_of(choice).cloned().unwrap_or_default();
            let calls = message.get("tool_calls").cloned();
            calls_tool |= calls.is_some();
            let content = message.get("content").and_then(Value::as_str).unwrap_or_default();
            let mut own = json!({"role": "assistant", "content": content});
            if let (Some(own), Some(calls)) = (own.as_object_mut(), calls) {
                own.insert("tool_calls".to_owned(), calls);
            }
            let finish = if calls_tool && finish == "stop" { "tool_calls".into() } else { finish };
            let name = if streamed { "delta" } else { "message" };
            json!({"index": 0, name: own, "logprobs": logprobs, "finish_reason": finish})
        } else {
            json!({"text": at(choice, "text"), "index": 0, "finish_reason": finish})
        };
        Some(with(head, &json!([choice]), at(&value, "usage")))
    }))
}

fn with(mut head: Value, choices: &Value, usage: &Value) -> Value {
    set(&mut head, "choices", choices.clone());
    if let Some(usage) = usage.as_object() {
        let usage = json!({"prompt_tokens": usage.get("prompt_tokens"),
            "completion_tokens": usage.get("completion_tokens"), "total_tokens": usage.get("total_tokens")});
        set(&mut head, "usage", usage);
    }
    head
}
