//! Each fault does what it says, and nothing else.

use std::time::{Duration, Instant};

use forebay_simulated_engine::{Fault, Options};
use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::client::{Ended, Reply, Server, fast, until};

const CHAT: &str = "/v1/chat/completions";

fn ask(stream: bool) -> Value {
    json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 10, "ignore_eos": true, "stream": stream})
}

async fn faulty(faults: &[&str]) -> Server {
    let faults: Vec<Fault> = faults.iter().map(|text| text.parse().unwrap()).collect();
    Server::start(Options { faults, ..fast() }).await
}

fn data_events(reply: &Reply) -> usize {
    reply.text().matches("data: ").count()
}

#[tokio::test]
async fn statuses_come_with_bodies_and_retry_after() {
    let server = faulty(&["status:code=429,retry_after=3,first=1"]).await;
    let reply = server.post(CHAT, &ask(true)).await;
    assert_eq!((reply.status, reply.header("retry-after")), (429, Some("3")));
    assert_eq!(reply.json()["error"]["code"], 429);
    assert_eq!(server.post(CHAT, &ask(true)).await.status, 200, "only the first");
    server.set_faults(&["status:code=429"]).await;
    assert_eq!(server.post(CHAT, &ask(false)).await.header("retry-after"), None);
    server.set_faults(&["status:code=502,body=bad gateway,every=2"]).await;
    let mut statuses = Vec::new();
    for _ in 0..4 {
        statuses.push(server.post(CHAT, &ask(false)).await.status);
    }
    assert_eq!(statuses, [502, 200, 502, 200]);
}

#[tokio::test]
async fn a_hang_sends_nothing_and_sees_the_client_leave() {
    let server = faulty(&["hang"]).await;
    for (count, stream) in [(1, false), (2, true)] {
        let mut connection = server.open(CHAT, &ask(stream)).await;
        until("it has begun", || async { server.log().await["requests"]["begun"] == count }).await;
        assert_eq!(connection.until_silent().await.status, 0, "something came");
        drop(connection);
        until("it is aborted", || async { server.log().await["requests"]["aborted"] == count }).await;
    }
}

#[tokio::test]
async fn a_stall_keeps_the_connection_and_sends_no_more() {
    let server = faulty(&["stall:after=3"]).await;
    let mut stream = server.open(CHAT, &ask(true)).await;
    stream.events(3).await;
    let reply = stream.until_silent().await;
    assert_eq!((reply.status, data_events(&reply), reply.whole), (200, 3, false));
    let mut whole = server.open(CHAT, &ask(false)).await;
    whole.read().await.unwrap();
    let reply = whole.until_silent().await;
    assert!(reply.status == 200 && !reply.whole && !reply.body().is_empty());
}

#[tokio::test]
async fn a_cut_ends_the_connection_in_the_middle() {
    let server = faulty(&["cut:after=4"]).await;
    let reply = server.post(CHAT, &ask(true)).await;
    assert_eq!((reply.status, data_events(&reply), reply.whole, reply.ended), (200, 4, false, Ended::Closed));
    let reply = server.post(CHAT, &ask(false)).await;
    assert!(reply.status == 200 && !reply.whole && !reply.body().is_empty(), "{reply:?}");
    let declared: usize = reply.header("content-length").unwrap().parse().unwrap();
    assert_eq!(reply.body().len(), declared / 2);
    server.set_faults(&["cut:reset"]).await;
    assert_eq!(server.post(CHAT, &ask(true)).await.ended, Ended::Reset);
    until("the sequences are gone", || async { server.metric("vllm:num_requests_running").await == 0.0 }).await;
}

#[tokio::test]
async fn garbage_is_neither_json_nor_text() {
    let server = faulty(&["garbage:after=2"]).await;
    let reply = server.post(CHAT, &ask(true)).await;
    assert!(reply.whole && reply.is_done(), "the rest follows it");
    assert!(std::str::from_utf8(&reply.chunks[2]).is_err());
    assert!(std::str::from_utf8(&reply.chunks[1]).is_ok() && std::str::from_utf8(&reply.chunks[3]).is_ok());
    let reply = server.post(CHAT, &ask(false)).await;
    assert_eq!(reply.status, 200);
    assert!(reply.whole && serde_json::from_slice::<Value>(&reply.body()).is_err());
}

#[tokio::test]
async fn an_error_ends_a_stream_as_the_engine_does_when_it_dies() {
    let server = faulty(&["error:after=3"]).await;
    let reply = server.post(CHAT, &ask(true)).await;
    assert!(reply.whole && reply.is_done() && reply.status == 200);
    let events = reply.events();
    assert_eq!(events.len(), 4);
    assert_eq!(events[3]["error"]["code"], 500);
    assert!(reply.text().contains(r#"data: {"error": {"message": "EngineCore"#), "{}", reply.text());
    let reply = server.post(CHAT, &ask(false)).await;
    assert_eq!((reply.status, &reply.json()["error"]["type"]), (500, &json!("InternalServerError")));
}

#[tokio::test]
async fn delays_hit_the_path_they_name() {
    let server = faulty(&["delay:ms=80,path=/health"]).await;
    let begin = Instant::now();
    assert_eq!(server.get("/health").await.status, 200);
    assert!(begin.elapsed() >= Duration::from_millis(80));
    server.set_faults(&["status:code=503,path=/health", "status:code=500,path=/metrics"]).await;
    assert_eq!(server.get("/health").await.status, 503);
    assert_eq!(server.get("/metrics").await.status, 500);
    assert_eq!(server.get("/v1/models").await.status, 200);
}

#[tokio::test]
async fn silence_is_filled_with_comments() {
    let faults = vec!["stall:after=2".parse().unwrap()];
    let keep_alive = Some(Duration::from_millis(5));
    let server = Server::start(Options { faults, stream_keep_alive: keep_alive, ..fast() }).await;
    let mut connection = server.open(CHAT, &ask(true)).await;
    connection.events(2).await;
    for _ in 0..5 {
        assert!(connection.read().await.unwrap().is_some());
    }
    drop(connection);
    // An engine that is slow to begin sends them before its first event.
    let server = Server::start(Options { stream_keep_alive: keep_alive, ..crate::client::slow() }).await;
    let reply = server.post(CHAT, &ask(true)).await;
    assert!(reply.text().starts_with(": keep-alive\n\n"), "{}", reply.text());
    assert_eq!(reply.chunks[0], b": keep-alive\n\n");
    assert!(reply.is_done());
}

#[tokio::test]
async fn an_outage_refuses_and_cuts_and_ends() {
    let server = Server::start(crate::client::slow()).await;
    let body = json!({"prompt": "x", "max_tokens": 10_000, "ignore_eos": true, "stream": true});
    let mut stream = server.open("/v1/completions", &body).await;
    stream.events(2).await;
    let reply = server.post("/simulated/faults", &json!({"refuse_ms": 300})).await;
    assert_eq!(reply.status, 200);
    let cut = stream.reply().await;
    assert!(!cut.whole && !cut.is_done());
    let refused = TcpStream::connect(server.address).await;
    assert_eq!(refused.unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
    until("it is back", || async { TcpStream::connect(server.address).await.is_ok() }).await;
    assert_eq!(server.get("/health").await.status, 200);
    assert_eq!(server.metric("vllm:num_requests_running").await, 0.0);
}

#[tokio::test]
async fn an_engine_may_be_late_to_start() {
    let server = Server::start(Options { refuse_at_start: Some(Duration::from_millis(100)), ..fast() }).await;
    until("it refuses", || async { TcpStream::connect(server.address).await.is_err() }).await;
    until("it serves", || async { TcpStream::connect(server.address).await.is_ok() }).await;
    assert_eq!(server.post(CHAT, &ask(false)).await.status, 200);
}

#[tokio::test]
async fn control_refuses_what_it_does_not_know() {
    let server = faulty(&["hang:first=0"]).await;
    let faults = server.get("/simulated/faults").await.json();
    assert_eq!(faults["faults"][0]["kind"], json!({"hang": {}}));
    for bad in [json!({"faults": [{"kind": "explode"}]}), json!({"fault": []}), json!({"speed": 0}), json!(5)] {
        assert_eq!(server.post("/simulated/faults", &bad).await.status, 400, "{bad}");
    }
    assert_eq!(server.get("/simulated/faults").await.json(), faults, "a refused change changes nothing");
    assert_eq!(server.get("/simulated/other").await.status, 404);
}

#[tokio::test]
async fn the_log_counts_requests_and_bytes() {
    let server = Server::start(fast()).await;
    let before = server.log().await;
    assert_eq!(before["requests"], json!({"begun": 0, "finished": 0, "aborted": 0}));
    server.post(CHAT, &ask(true)).await;
    server.post(CHAT, &json!({"messages": []})).await;
    let after = server.log().await;
    assert_eq!(after["requests"], json!({"begun": 2, "finished": 2, "aborted": 0}));
    assert!(after["bytes_received"].as_u64() > before["bytes_received"].as_u64());
    assert_eq!(after["sequences"]["finished"], 1);
}
