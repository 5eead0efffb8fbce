//! A client that leaves: its request leaves the queue or the engine within moments, whatever stage it was in.

use std::time::{Duration, Instant};

use crate::support::body::{chat, delta, endless_stream, held, long, streamed, wide};
use crate::support::client::Connection;
use crate::support::eventually;
use crate::support::process::{Gateway, Worker};
use crate::support::recorder::{Recorder, Step, chunk, stream_head};

/// What is promised is 100 ms; a busy machine gets more, so that only a lost cancellation fails.
const LIMIT: Duration = Duration::from_millis(500);

fn row_of_the_one_who_left(gateway: &Gateway) -> serde_json::Value {
    eventually("the row of a client that left", || {
        gateway.rows().into_iter().find(|row| row["outcome"] == "client_gone")
    })
}

/// Nothing is promised to the worker any more, and the next request goes there at once.
fn assert_place_is_free(gateway: &Gateway, recorder: &Recorder) {
    assert_eq!(gateway.metric("forebay_worker_promised_tokens{worker=\"w0\"}"), 0.0);
    assert_eq!(gateway.metric("forebay_worker_up{worker=\"w0\"}"), 1.0, "leaving is no failure of the worker");
    let before = recorder.posts().len();
    recorder.play(held().split_off(1));
    let answer = gateway.post("/v1/completions", &wide("next"));
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(recorder.posts().len(), before + 1);
    assert_eq!(gateway.row_of(&answer)["attempts"], 1);
}

/// Leaves a request that the worker plays this script for, once `seen` came, or as soon as the worker has the request.
fn leaves(name: &str, script: Vec<Step>, body: &str, seen: Option<&[u8]>) -> serde_json::Value {
    let recorder = Recorder::start("m", vec![script]);
    let gateway = Gateway::before(&[recorder.address]);
    let mut client = Connection::to(gateway.client);
    client.post("/v1/chat/completions", &[], body.as_bytes());
    recorder.await_posts(1);
    if let Some(seen) = seen {
        client.until(seen);
    }
    let left = Instant::now();
    drop(client);
    let took = recorder.closed(0).saturating_duration_since(left);
    println!("{name}: the worker's connection was closed {took:?} after the client left");
    assert!(took < LIMIT, "{name}: {took:?}");
    let row = row_of_the_one_who_left(&gateway);
    assert_eq!(gateway.rows().len(), 1);
    assert_place_is_free(&gateway, &recorder);
    row
}

#[test]
fn before_the_first_byte_of_a_whole_answer() {
    let row = leaves("silent, whole", vec![Step::AwaitClose], &chat("hello", r#","n":128"#), None);
    assert_eq!((&row["status"], &row["stream"]), (&499.into(), &false.into()), "{row}");
    assert!(row["ttft_ms"].is_null() && row["prompt_tokens"].as_u64() > Some(0), "{row}");
}

#[test]
fn before_the_first_event_of_a_stream() {
    let row = leaves("silent, streamed", vec![Step::AwaitClose], &streamed("hello"), None);
    assert_eq!((&row["status"], &row["stream"]), (&499.into(), &true.into()), "{row}");
    // The engine's head is out, as vLLM sends it before it has a token.
    let row = leaves("head only, streamed", vec![stream_head(), Step::AwaitClose], &streamed("hello"), None);
    assert!(row["ttft_ms"].is_null(), "{row}");
}

#[test]
fn in_the_middle_of_a_stream() {
    let row = leaves("mid-stream", endless_stream(), &streamed("hello"), Some(b"first"));
    assert!(row["ttft_ms"].as_f64() > Some(0.0), "{row}");
    assert_eq!((&row["output_tokens"], &row["output_tokens_from"]), (&1.into(), &"events".into()), "{row}");
}

#[test]
fn in_the_middle_of_a_whole_answer() {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9000000\r\n\r\n{\"a\":\"first";
    let script = vec![Step::Write(head.into()), Step::Write(vec![b'x'; 2 << 20]), Step::AwaitClose];
    leaves("mid-body", script, &chat("hello", ""), Some(b"first"));
}

#[test]
fn while_it_waits_in_the_queue() {
    let recorder = Recorder::start("m", vec![held()]);
    let gateway = Gateway::before(&[recorder.address]);
    let mut first = Connection::to(gateway.client);
    first.post("/v1/completions", &[], wide("first").as_bytes());
    recorder.await_posts(1);
    let mut waiting = Connection::to(gateway.client);
    waiting.post("/v1/chat/completions", &[], chat("waiting", "").as_bytes());
    gateway.until_queued(1);

    let left = Instant::now();
    drop(waiting);
    gateway.until_queued(0);
    println!("queued: withdrawn {:?} after the client left", left.elapsed());
    let row = row_of_the_one_who_left(&gateway);
    assert_eq!((&row["status"], &row["attempts"]), (&499.into(), &0.into()), "{row}");
    assert!(row["worker"].is_null() && row["queue_ms"].as_f64() > Some(0.0), "{row}");

    recorder.go_on();
    assert_eq!(first.answer().status, 200);
    assert_place_is_free(&gateway, &recorder);
    let asked = recorder.posts();
    assert!(
        asked.iter().all(|post| !post.body.windows(7).any(|bytes| bytes == b"waiting")),
        "it never reached the worker"
    );
}

/// The engine itself stops: what a closed connection means to it.
#[test]
fn the_engine_stops_generating() {
    let worker = Worker::start(&["--model", "m", "--speed", "1"]);
    let gateway = Gateway::before(&[worker.address]);
    for (stream, aborted) in [(true, 1), (false, 2)] {
        let body = chat(&long("tell"), &format!(r#","max_tokens":20000,"ignore_eos":true,"stream":{stream}"#));
        let mut client = Connection::to(gateway.client);
        client.post("/v1/chat/completions", &[], body.as_bytes());
        eventually("the engine to run", || (worker.metric("vllm:num_requests_running") > 0.0).then_some(()));
        if stream {
            client.until(b"content");
        }
        let left = Instant::now();
        drop(client);
        eventually("the engine to stop", || (worker.metric("vllm:num_requests_running") == 0.0).then_some(()));
        let took = left.elapsed();
        println!("simulated engine, stream {stream}: nothing runs {took:?} after the client left");
        assert!(took < LIMIT, "{took:?}");
        assert_eq!(worker.log()["sequences"]["aborted"], aborted);
    }
    assert_eq!(worker.finished(), 0);
    eventually("both rows", || (gateway.rows().len() == 2).then_some(()));
    assert!(gateway.rows().iter().all(|row| row["outcome"] == "client_gone"), "{:?}", gateway.rows());
}

/// A request that is being tried for the second time is withdrawn like any other.
#[test]
fn between_two_attempts() {
    let script = |status: &str| {
        vec![Step::Write(format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nretry-after: 30\r\n\r\n").into())]
    };
    let recorder = Recorder::start("m", vec![script("429 Too Many Requests")]);
    let gateway = Gateway::before(&[recorder.address]);
    let mut client = Connection::to(gateway.client);
    client.post("/v1/chat/completions", &[], chat("hello", "").as_bytes());
    recorder.await_posts(1);
    gateway.until_queued(1);
    drop(client);
    gateway.until_queued(0);
    assert_eq!(row_of_the_one_who_left(&gateway)["status"], 499);
    assert_eq!(recorder.posts().len(), 1);
}

/// Many at once: no promise is left behind.
#[test]
fn a_crowd_that_leaves() {
    let script = vec![stream_head(), chunk(&delta("first")), Step::AwaitClose];
    let recorder = Recorder::start("m", vec![script]);
    let gateway = Gateway::before(&[recorder.address]);
    let mut clients: Vec<Connection> = (0..50).map(|_| Connection::to(gateway.client)).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        client.post("/v1/chat/completions", &[], streamed(&format!("client {number}")).as_bytes());
    }
    recorder.await_posts(50);
    for client in clients.iter_mut().step_by(2) {
        client.until(b"first");
    }
    drop(clients);
    let closed = eventually("all of the worker's connections to be closed", || {
        let posts = recorder.posts();
        posts.iter().all(|post| post.closed.is_some()).then_some(posts.len())
    });
    assert_eq!(closed, 50);
    eventually("all rows", || (gateway.rows().len() == 50).then_some(()));
    assert_place_is_free(&gateway, &recorder);
}
