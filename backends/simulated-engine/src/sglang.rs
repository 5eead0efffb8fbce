//! SGLang 0.5's HTTP surface, as far as it differs from vLLM's: flat errors, pages of its own about load and model, any
//! model name is served, unknown fields are passed over.

use std::{fmt::Write as _, sync::Arc};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use serde_json::{Map, Value, json};

use crate::{
    body::Death,
    server::{Answer, Service},
    vllm::{self, Caller, Task, error::Failure, json_answer, now_seconds, ok},
    wire::{Wire, at, message_of, metrics_page, reshaped, set, without},
};

pub(crate) struct SgLang;

/// Of vLLM's fields those that this engine does not know and therefore does not see.
const UNKNOWN: [&str; 9] = [
    "structured_outputs",
    "include_stop_str_in_output",
    "allowed_token_ids",
    "bad_words",
    "prompt_logprobs",
    "truncate_prompt_tokens",
    "use_beam_search",
    "best_of",
    "request_id",
];

impl Wire for SgLang {
    fn answer<'a>(&'a self, service: &'a Arc<Service>, request: Request<Incoming>) -> BoxFuture<'a, Answer> {
        Box::pin(async move { route(service, request).await.unwrap_or_else(|failure| self.refusal(failure)) })
    }

    fn refusal(&self, failure: Failure) -> Answer {
        let status = failure.status();
        json_answer(status, &flat(status, failure.message(), None))
    }

    fn death_events(&self) -> Death {
        let error = json!({"error": flat(StatusCode::INTERNAL_SERVER_ERROR, "The scheduler died.", None)});
        Death::Events(vec![Bytes::from(format!("data: {error}\n\n")), vllm::stream::DONE])
    }
}

/// An error; also trtllm-serve's.
pub(crate) fn flat(status: StatusCode, message: &str, param: Option<&str>) -> Value {
    let kind = if status.is_server_error() { "InternalServerError" } else { "BadRequestError" };
    json!({"object": "error", "message": message, "type": kind, "param": param, "code": status.as_u16()})
}

async fn route(service: &Arc<Service>, request: Request<Incoming>) -> Result<Answer, Failure> {
    let (parts, body) = request.into_parts();
    vllm::authorize(service, parts.uri.path(), &parts.headers)?;
    let model = &service.options.model;
    match (&parts.method, parts.uri.path()) {
        (&Method::GET, "/health" | "/health_generate" | "/ready") => Ok(vllm::empty(StatusCode::OK, Vec::new())),
        (&Method::GET, "/v1/models") => Ok(ok(&models(service))),
        (&Method::GET, "/model_info" | "/get_model_info") => Ok(ok(&json!({
            "model_path": model, "served_model_name": model, "tokenizer_path": model, "is_generation": true,
            "preferred_sampling_params": null, "weight_version": "default", "model_type": "llama",
        }))),
        (&Method::GET, "/v1/loads") => Ok(ok(&loads(service))),
        (&Method::GET, "/metrics") => Ok(metrics_page(metrics(service))),
        (&Method::POST, path @ ("/load_lora_adapter" | "/unload_lora_adapter")) => {
            Ok(change_adapters(service, path, &vllm::read(&parts.headers, body).await?).await)
        }
        (&Method::POST, path) => {
            let task = match path {
                "/v1/chat/completions" => Task::Chat,
                "/v1/completions" => Task::Completion,
                "/v1/embeddings" => Task::Embedding,
                "/v1/rerank" => Task::Rerank,
                "/v1/classify" => Task::Classify,
                _ => return Err(Failure::not_found()),
            };
            let body = vllm::read(&parts.headers, body).await?;
            infer(service, task, body).await
        }
        _ => Err(Failure::not_found()),
    }
}

/// The model, then its adapters.
fn models(service: &Service) -> Value {
    let model = service.options.model.as_str();
    let entry = |id: &str, root: &str, parent: Option<&str>, max_model_len: Option<u32>| {
        json!({"id": id, "object": "model", "created": now_seconds(), "owned_by": "sglang", "root": root,
            "parent": parent, "max_model_len": max_model_len})
    };
    let mut data = vec![entry(model, model, None, Some(service.options.max_model_len))];
    data.extend(service.adapters.list().iter().map(|(name, path)| entry(name, path, Some(model), None)));
    json!({"object": "list", "data": data})
}

/// Loads an adapter or unloads one, in SGLang's words.
async fn change_adapters(service: &Service, path: &str, body: &Map<String, Value>) -> Answer {
    let changed = match path {
        _ if !service.options.adapter_updates => {
            Err(Failure::bad_request("LoRA is not enabled. Please set `--enable-lora` to enable LoRA.", None))
        }
        "/load_lora_adapter" => vllm::lora::load(service, body).await,
        _ => vllm::lora::unload(service, body),
    };
    match changed {
        Ok(_) => {
            let loaded: Map<String, Value> =
                service.adapters.list().into_iter().map(|(name, path)| (name, path.into())).collect();
            ok(&json!({"success": true, "loaded_adapters": loaded}))
        }
        Err(failure) => {
            let said = json!({"success": false, "error_message": failure.message(), "loaded_adapters": null});
            json_answer(StatusCode::BAD_REQUEST, &said)
        }
    }
}

async fn infer(service: &Arc<Service>, task: Task, mut body: Map<String, Value>) -> Result<Answer, Failure> {
    // `base:adapter` names an adapter; any other name is the model's.
    let adapter =
        body.get("model").and_then(Value::as_str).and_then(|model| model.split_once(':')).map(|(_, name)| name);
    if let Some(name) = adapter.filter(|name| !service.adapters.has(name)) {
        return Err(Failure::bad_request(&format!("Got LoRA adapter that has never been loaded: {name}"), None));
    }
    let model = adapter.unwrap_or(&service.options.model).to_owned();
    let asked = body.insert("model".to_owned(), model.into()).unwrap_or(Value::Null);
    body.retain(|name, _| !UNKNOWN.contains(&name.as_str()));
    if let Some(keep) = body.remove("no_stop_trim") {
        body.insert("include_stop_str_in_output".to_owned(), keep);
    }
    let answer = vllm::run(service, task, &body, &Caller::default()).await?;
    match task {
        Task::Chat | Task::Completion => {}
        Task::Rerank => return Ok(reshaped(answer, |value| Some(ranked(&value)))),
        _ => return Ok(answer),
    }
    Ok(reshaped(answer, move |mut value| {
        const GONE: [&str; 8] = [
            "service_tier",
            "system_fingerprint",
            "prompt_logprobs",
            "prompt_token_ids",
            "prompt_text",
            "kv_transfer_params",
            "ec_transfer_params",
            "metrics",
        ];
        without(&mut value, &GONE);
        set(&mut value, "model", asked.clone());
        for choice in value.get_mut("choices").and_then(Value::as_array_mut).into_iter().flatten() {
            let matched = choice.get("stop_reason").cloned();
            without(choice, &["stop_reason", "token_ids", "routed_experts", "prompt_logprobs", "prompt_token_ids"]);
            set(choice, "matched_stop", matched.unwrap_or_default());
            if let Some(message) = message_of(choice) {
                message.remove("reasoning");
                message.insert("reasoning_content".to_owned(), Value::Null);
                message.entry("tool_calls").or_insert(Value::Null);
            }
        }
        Some(value)
    }))
}

/// A bare list.
fn ranked(value: &Value) -> Value {
    let tokens = value.pointer("/usage/prompt_tokens").cloned().unwrap_or_default();
    let results = at(value, "results").as_array().into_iter().flatten().enumerate();
    let item = |(place, item): (usize, &Value)| {
        let tokens = if place == 0 { tokens.clone() } else { 0.into() };
        json!({"score": at(item, "relevance_score"), "document": item.pointer("/document/text"),
            "index": at(item, "index"),
            "meta_info": {"prompt_tokens": tokens}})
    };
    results.map(item).collect()
}

fn loads(service: &Service) -> Value {
    let (load, _) = service.driver.load();
    let timing = &service.options.timing;
    let tokens = u64::from(timing.kv_blocks) * u64::from(timing.block_tokens);
    json!({"timestamp": now_seconds(), "version": "0.5.23", "accelerator": "simulated", "num_accelerators": 1, "loads": [{
        "dp_rank": 0, "num_running_reqs": load.running, "num_waiting_reqs": load.waiting,
        "token_usage": load.kv_usage, "max_total_num_tokens": tokens, "max_running_requests": timing.max_batch,
    }]})
}

fn metrics(service: &Service) -> String {
    let (load, _) = service.driver.load();
    let timing = &service.options.timing;
    let mut page = String::new();
    let labels = format!(r#"{{engine_type="unified",model_name="{}",pp_rank="0",tp_rank="0"}}"#, service.options.model);
    for (name, value) in [
        ("num_running_reqs", f64::from(load.running)),
        ("num_queue_reqs", f64::from(load.waiting)),
        ("token_usage", load.kv_usage),
        ("max_total_num_tokens", f64::from(timing.kv_blocks) * f64::from(timing.block_tokens)),
        ("page_size", f64::from(timing.block_tokens)),
        ("prompt_tokens_total", load.prompt_tokens as f64),
        ("generation_tokens_total", load.generation_tokens as f64),
        ("cached_tokens_total", load.prefix_hits_tokens as f64),
    ] {
        // Writing to a string does not fail.
        let _ = writeln!(page, "sglang:{name}{labels} {value:?}");
    }
    page
}
