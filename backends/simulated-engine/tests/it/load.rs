//! Time, batching, caches and metrics, and clients that leave.

use std::time::Duration;

use forebay_simulated_engine::{EngineConfig, Options};
use serde_json::{Value, json};

use crate::client::{Server, fast, slow, until};

const RUNNING: &str = "vllm:num_requests_running";
const WAITING: &str = "vllm:num_requests_waiting{";
const KV_USAGE: &str = "vllm:kv_cache_usage_perc";

fn endless(stream: bool) -> Value {
    json!({"model": "sim", "prompt": "On and on", "max_tokens": 20_000, "ignore_eos": true, "stream": stream})
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_sequence() {
    let server = Server::start(slow()).await;
    for stream in [true, false] {
        let mut connection = server.open("/v1/completions", &endless(stream)).await;
        if stream {
            connection.events(3).await;
        }
        until("it runs", || async { server.metric(RUNNING).await == 1.0 }).await;
        assert!(server.metric(KV_USAGE).await > 0.0);
        drop(connection);
        until("it is gone", || async { server.metric(RUNNING).await == 0.0 }).await;
        assert_eq!(server.metric(KV_USAGE).await, 0.0);
    }
    let log = server.log().await;
    assert_eq!(log["requests"], json!({"begun": 2, "finished": 0, "aborted": 2}));
    assert_eq!(log["sequences"]["aborted"], 2);
    assert_eq!(server.metric("vllm:request_success_total{engine=\"0\",finished_reason=\"abort\"").await, 0.0);
}

#[tokio::test]
async fn what_does_not_fit_the_batch_waits() {
    let timing = EngineConfig { max_batch: 2, ..EngineConfig::default() };
    let server = Server::start(Options { timing, ..slow() }).await;
    let mut connections = Vec::new();
    for _ in 0..3 {
        connections.push(server.open("/v1/completions", &endless(true)).await);
    }
    until("one waits", || async { server.metric(WAITING).await == 1.0 }).await;
    assert_eq!(server.metric(RUNNING).await, 2.0);
    connections[0].events(2).await;
    connections.remove(0);
    until("it moves up", || async { server.metric(WAITING).await == 0.0 }).await;
    connections[1].events(1).await;
}

#[tokio::test]
async fn a_full_queue_refuses_when_it_has_a_bound() {
    let server = Server::start(Options { max_queued_requests: Some(2), ..slow() }).await;
    let mut first = server.open("/v1/completions", &endless(true)).await;
    first.events(1).await;
    let two = json!({"model": "sim", "prompt": "x", "n": 2});
    let reply = server.post("/v1/completions", &two).await;
    let error = reply.json()["error"].clone();
    assert_eq!((reply.status, &error["type"], &error["code"]), (503, &json!("Service Unavailable"), &json!(503)));
    assert_eq!(reply.header("retry-after"), None);
    let rejected = "vllm:admission_rejections_total{model_name=\"sim\",reason=\"max_num_queued_reqs\"";
    assert_eq!(server.metric(rejected).await, 1.0);
    assert_eq!(server.post("/v1/completions", &json!({"model": "sim", "prompt": "x"})).await.status, 200);
}

#[tokio::test]
async fn a_seen_prefix_is_cached_and_a_salt_parts_it() {
    let server = Server::start(fast()).await;
    let prompt = "The water stands before the turbines and waits. ".repeat(20);
    let ask = async |more: Value| {
        let mut body = json!({"model": "sim", "prompt": prompt, "max_tokens": 2});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/completions", &body).await.json()["usage"].clone()
    };
    let first = ask(json!({})).await;
    assert_eq!(first["prompt_tokens_details"]["cached_tokens"], 0);
    let total = first["prompt_tokens"].as_u64().unwrap();
    let cached = (total - 1) / 16 * 16;
    assert_eq!(ask(json!({})).await["prompt_tokens_details"]["cached_tokens"], cached);
    assert_eq!(ask(json!({"cache_salt": "a"})).await["prompt_tokens_details"]["cached_tokens"], 0);
    assert_eq!(ask(json!({"cache_salt": "a"})).await["prompt_tokens_details"]["cached_tokens"], cached);
    assert_eq!(server.metric("vllm:prefix_cache_queries_total").await, 4.0 * total as f64);
    assert_eq!(server.metric("vllm:prefix_cache_hits_total").await, 2.0 * cached as f64);
    assert_eq!(server.metric("vllm:prompt_tokens_total").await, 4.0 * total as f64);
    assert_eq!(server.metric("vllm:generation_tokens_total").await, 8.0);
    let length = "vllm:request_success_total{engine=\"0\",finished_reason=\"length\"";
    assert_eq!(server.metric(length).await, 4.0);
    assert_eq!(server.metric("vllm:time_to_first_token_seconds_count").await, 4.0);
}

#[tokio::test]
async fn the_next_turn_finds_the_last_answer_cached() {
    let server = Server::start(fast()).await;
    let mut messages = json!([{"role": "user", "content": "Tell me about the river. ".repeat(8)}]);
    let reply = server.post("/v1/chat/completions", &json!({"messages": messages, "min_tokens": 200})).await.json();
    let answer = reply["choices"][0]["message"]["content"].clone();
    messages.as_array_mut().unwrap().push(json!({"role": "assistant", "content": answer}));
    messages.as_array_mut().unwrap().push(json!({"role": "user", "content": "Go on."}));
    let next = server.post("/v1/chat/completions", &json!({"messages": messages, "max_tokens": 1})).await.json();
    let cached = next["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    let first_prompt = reply["usage"]["prompt_tokens"].as_u64().unwrap();
    // More than the first prompt: blocks of the answer too, as far as it is encoded again to the same tokens.
    assert!(cached > first_prompt + 16, "{cached} of {}", next["usage"]["prompt_tokens"]);
}

#[tokio::test]
async fn an_idle_connection_is_closed() {
    let server = Server::start(Options { connection_keep_alive: Duration::from_millis(50), ..fast() }).await;
    let request = b"GET /health HTTP/1.1\r\nHost: sim\r\n\r\n";
    let mut connection = server.send(request).await;
    while connection.read().await.unwrap().is_some() {}
    let reply = connection.reply().await;
    assert_eq!(reply.status, 200);
}

#[tokio::test]
async fn shutdown_ends_streams_and_tasks() {
    let server = Server::start(slow()).await;
    let mut connection = server.open("/v1/completions", &endless(true)).await;
    connection.events(2).await;
    server.stop().await;
    let reply = connection.reply().await;
    assert!(!reply.whole && !reply.is_done());
}
