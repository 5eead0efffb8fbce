//! `forebay simulated-worker`: its flags. What it says is compared with a real engine's bytes in its own crate.

use std::time::{Duration, Instant};

use crate::support::body::{chat, streamed};
use crate::support::client::{Connection, get, post, post_with};
use crate::support::eventually;
use crate::support::process::{Worker, tokenizer};

#[test]
fn names_and_sizes() {
    let worker =
        Worker::start(&["--model", "named", "--max-model-len", "64", "--kv-blocks", "10", "--block-tokens", "32"]);
    let models = get(worker.address, "/v1/models").json();
    assert_eq!((&models["data"][0]["id"], &models["data"][0]["max_model_len"]), (&"named".into(), &64.into()));
    let metrics = get(worker.address, "/metrics").text();
    assert!(metrics.contains("block_size=\"32\"") && metrics.contains("num_gpu_blocks=\"10\""), "{metrics}");
    let long = post(worker.address, "/v1/completions", r#"{"model":"named","prompt":"a b c","max_tokens":100}"#);
    assert_eq!(long.status, 400, "{}", long.text());
}

#[test]
fn keys_are_asked_for() {
    let worker = Worker::start(&["--model", "m", "--api-key", "one", "--api-key", "two"]);
    let ask = |headers: &[&str]| post_with(worker.address, "/v1/chat/completions", headers, &chat("hi", "")).status;
    assert_eq!(ask(&[]), 401);
    assert_eq!(ask(&["authorization: Bearer three"]), 401);
    assert_eq!((ask(&["authorization: Bearer one"]), ask(&["authorization: Bearer two"])), (200, 200));
}

#[test]
fn equal_seeds_say_the_same() {
    let tokenizer = tokenizer();
    let tokenizer = tokenizer.to_str().expect("UTF-8");
    let said = |flags: &[&str]| {
        let worker = Worker::start(&[&["--model", "m"], flags].concat());
        post(worker.address, "/v1/chat/completions", &chat("hi", "")).json()["choices"][0]["message"]["content"].clone()
    };
    let first = said(&["--seed", "7"]);
    assert_eq!(first, said(&["--seed", "7", "--tokenizer", tokenizer]));
    assert_ne!(first, said(&["--seed", "8"]));
}

#[test]
fn time_passes_as_told() {
    // A thousand tokens at 1000 a second, then 10 steps of 50 ms.
    let flags =
        ["--model", "m", "--speed", "1", "--prefill-tokens-per-s", "1000", "--step-ms", "50", "--step-ms-per-seq", "0"];
    let worker = Worker::start(&flags);
    let prompt = vec!["7"; 1000].join(",");
    let began = Instant::now();
    let body = format!(r#"{{"model":"m","prompt":[{prompt}],"max_tokens":10,"ignore_eos":true}}"#);
    let answer = post(worker.address, "/v1/completions", &body);
    let took = began.elapsed();
    assert_eq!(
        (answer.status, answer.json()["usage"]["completion_tokens"].as_u64()),
        (200, Some(10)),
        "{}",
        answer.text()
    );
    assert!(took >= Duration::from_millis(1300) && took < Duration::from_secs(6), "{took:?}");
}

#[test]
fn a_full_engine_refuses() {
    let worker = Worker::start(&["--model", "m", "--max-num-queued-reqs", "2"]);
    let two = r#"{"model":"m","prompt":["a","b"],"max_tokens":1}"#;
    let three = r#"{"model":"m","prompt":["a","b","c"],"max_tokens":1}"#;
    let ask = |body: &str| post(worker.address, "/v1/completions", body).status;
    assert_eq!((ask(two), ask(three)), (200, 503));
}

#[test]
fn faults_from_the_start() {
    let worker = Worker::start(&[
        "--model",
        "m",
        "--fault",
        "status:code=429,retry_after=3,first=1",
        "--fault",
        "delay:ms=1,path=/health",
    ]);
    let first = post(worker.address, "/v1/chat/completions", &chat("hi", ""));
    assert_eq!((first.status, first.header("retry-after")), (429, Some("3")));
    assert_eq!(post(worker.address, "/v1/chat/completions", &chat("hi", "")).status, 200);
    let faults = get(worker.address, "/simulated/faults").json();
    assert_eq!(faults["faults"].as_array().map(Vec::len), Some(2), "{faults}");
}

#[test]
fn it_may_refuse_at_first_and_comments_fill_silence() {
    let began = Instant::now();
    let flags = ["--model", "m", "--refuse-seconds", "1", "--sse-keep-alive-interval", "0.02", "--fault", "delay:ms=0"];
    let worker = Worker::start(&flags);
    let is_in = || std::net::TcpStream::connect(worker.address).is_ok();
    eventually("the worker to refuse", || (!is_in()).then_some(()));
    eventually("the worker to let someone in", || is_in().then_some(()));
    assert!(began.elapsed() >= Duration::from_secs(1), "{:?}", began.elapsed());
    worker.faults(r#"[{"kind":{"stall":{"after":2}}}]"#);
    let mut client = Connection::to(worker.address);
    client.post("/v1/chat/completions", &[], streamed("hi").as_bytes());
    // On a busy machine a comment may come before the first event, too.
    let comment = b": keep-alive\n\n";
    let before = client.until_times(b"data: ", 2).windows(comment.len()).filter(|window| window == comment).count();
    let text = String::from_utf8_lossy(&client.until_times(comment, before + 2)).into_owned();
    assert_eq!(text.matches("data: ").count(), 2, "{text}");
}
