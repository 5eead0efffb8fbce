//! `trtllm-serve`'s HTTP surface, as far as it differs from vLLM's: it knows its fields and refuses all others, tells no
//! context length, its statistics are JSON that can be read once, and when it dies a stream is cut.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures::future::BoxFuture;
use http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use serde_json::{Map, Value, json};

use crate::{
    body::Death,
    server::{Answer, Service},
    sglang::flat,
    vllm::{self, Caller, Task, error::Failure, json_answer, now_seconds, ok},
    wire::{Wire, message_of, reshaped, without},
};

pub(crate) struct TrtLlm;

/// How long a reading of empty statistics waits for some.
const STATISTICS_WAIT: Duration = Duration::from_secs(2);

/// Fields of both generating routes.
const COMMON: [&str; 36] = [
    "model",
    "stream",
    "stream_options",
    "max_tokens",
    "temperature",
    "top_p",
    "n",
    "stop",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "top_k",
    "top_p_min",
    "min_p",
    "repetition_penalty",
    "length_penalty",
    "early_stopping",
    "best_of",
    "use_beam_search",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "truncate_prompt_tokens",
    "lora_request",
    "echo",
    "add_special_tokens",
    "response_format",
    "disaggregated_params",
    "conversation_params",
    "cache_salt",
    "priority",
];
const CHAT: [&str; 15] = [
    "messages",
    "prompt_token_ids",
    "max_completion_tokens",
    "tools",
    "tool_choice",
    "top_logprobs",
    "add_generation_prompt",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "reasoning_effort",
    "thinking",
    "thinking_token_budget",
    "media_io_kwargs",
    "mm_processor_kwargs",
];
const COMPLETION: [&str; 3] = ["prompt", "suffix", "detokenize"];
const EMBEDDING: [&str; 5] = ["model", "input", "encoding_format", "dimensions", "truncate_prompt_tokens"];

impl Wire for TrtLlm {
    fn answer<'a>(&'a self, service: &'a Arc<Service>, request: Request<Incoming>) -> BoxFuture<'a, Answer> {
        Box::pin(async move { route(service, request).await.unwrap_or_else(|failure| self.refusal(failure)) })
    }

    fn refusal(&self, failure: Failure) -> Answer {
        let status = failure.status();
        let message = match failure.message() {
            long if long.contains("context length") => {
                "The sum of prompt length and max_tokens should not exceed max_seq_len"
            }
            other => other,
        };
        json_answer(status, &flat(status, message, None))
    }

    fn death_events(&self) -> Death {
        Death::Cut
    }
}

async fn route(service: &Arc<Service>, request: Request<Incoming>) -> Result<Answer, Failure> {
    let (parts, body) = request.into_parts();
    match (&parts.method, parts.uri.path()) {
        (&Method::GET, "/health") => Ok(vllm::empty(StatusCode::OK, Vec::new())),
        (&Method::GET, "/version") => Ok(ok(&json!({"version": "1.3.0"}))),
        (&Method::GET, "/v1/models") => {
            let model = &service.options.model;
            let entry = json!({"id": model, "object": "model", "created": now_seconds(), "owned_by": "tensorrt_llm"});
            Ok(ok(&json!({"object": "list", "data": [entry]})))
        }
        (&Method::GET, "/metrics") => Ok(ok(&statistics(service).await)),
        (&Method::POST, path) => {
            let task = match path {
                "/v1/chat/completions" => Task::Chat,
                "/v1/completions" => Task::Completion,
                "/v1/embeddings" => Task::Embedding,
                _ => return Err(Failure::not_found()),
            };
            let body = vllm::read(&parts.headers, body).await?;
            infer(service, task, body).await
        }
        _ => Err(Failure::not_found()),
    }
}

async fn infer(service: &Arc<Service>, task: Task, mut body: Map<String, Value>) -> Result<Answer, Failure> {
    let known: &[&[&str]] = match task {
        Task::Chat => &[&COMMON, &CHAT],
        Task::Completion => &[&COMMON, &COMPLETION],
        _ => &[&EMBEDDING],
    };
    if let Some(name) = body.keys().find(|name| !known.iter().any(|list| list.contains(&name.as_str()))) {
        let message = format!(
            "[{{'type': 'extra_forbidden', 'loc': ('body', '{name}'), 'msg': 'Extra inputs are not permitted'}}]"
        );
        return Err(Failure::plain(StatusCode::BAD_REQUEST, &message));
    }
    if body.contains_key("max_tokens") && body.contains_key("max_completion_tokens") {
        return Err(Failure::plain(StatusCode::BAD_REQUEST, "max_tokens and max_completion_tokens are one field"));
    }
    // When the options are given at all, usage is told unless it is refused.
    if let Some(options) = body.get_mut("stream_options").and_then(Value::as_object_mut) {
        options.entry("include_usage").or_insert(true.into());
    }
    let answer = vllm::run(service, task, &body, &Caller::default()).await?;
    if task == Task::Embedding {
        return Ok(answer);
    }
    Ok(reshaped(answer, |mut value| {
        let gone = [
            "service_tier",
            "system_fingerprint",
            "prompt_logprobs",
            "prompt_text",
            "kv_transfer_params",
            "ec_transfer_params",
            "metrics",
        ];
        without(&mut value, &gone);
        for choice in value.get_mut("choices").and_then(Value::as_array_mut).into_iter().flatten() {
            without(choice, &["token_ids", "routed_experts", "prompt_logprobs", "prompt_token_ids"]);
            if let Some(message) = message_of(choice) {
                message.remove("reasoning");
                message.insert("reasoning_content".to_owned(), Value::Null);
            }
        }
        Some(value)
    }))
}

/// The iterations since the last reading; here all of them in one entry.
async fn statistics(service: &Service) -> Value {
    let deadline = tokio::time::Instant::now() + STATISTICS_WAIT;
    loop {
        let (load, _) = service.driver.load();
        let tokens = load.prompt_tokens + load.generation_tokens;
        if service.log.drained.swap(tokens, Ordering::Relaxed) != tokens {
            let timing = &service.options.timing;
            let used = (load.kv_usage * f64::from(timing.kv_blocks)).round() as u64;
            return json!([{
                "iter": load.generation_tokens, "iterLatencyMS": timing.step_ms, "numActiveRequests": load.running,
                "numQueuedRequests": load.waiting, "maxNumActiveRequests": timing.max_batch,
                "kvCacheStats": {"maxNumBlocks": timing.kv_blocks, "freeNumBlocks": u64::from(timing.kv_blocks) - used,
                    "usedNumBlocks": used, "tokensPerBlock": timing.block_tokens},
            }]);
        }
        if tokio::time::Instant::now() >= deadline {
            return json!([]);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
