//! Engines asked over a socket: what they are, how they are, what they count.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use forebay_backends::{
    Error,
    discovery::local::probe_local,
    engines::{by_name, detect, probe},
    signals::{Pace, Signal, Signals, Traffic},
    tokenize::tokenize,
    transport::{Timeouts, Transport},
};
use forebay_scheduler::Failure;
use tokio::{net::TcpListener, time::timeout};
use tokio_util::task::TaskTracker;

use crate::support::{PATIENCE, Server, channel, millis, recorded};

const VLLM_MODELS: &str = r#"{"object":"list","data":[
    {"id":"lora","owned_by":"vllm","root":"/loras/a","parent":"base"},
    {"id":"base","owned_by":"vllm","root":"/models/base","parent":null,"max_model_len":4096}]}"#;
const METRICS: &str = "vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n";
const BUSY_METRICS: &str = "vllm:num_requests_running 3\nvllm:num_requests_waiting 1\n";

#[tokio::test]
async fn engines_are_recognised() {
    let llamacpp = r#"{"object":"list","data":[{"id":"x","owned_by":"llamacpp","meta":{"n_ctx":512}}]}"#;
    let other = r#"{"object":"list","data":[{"id":"x","object":"model","owned_by":"library"}]}"#;
    for (models, version, engine, expected_version, hint) in [
        (VLLM_MODELS, Some(r#"{"version":"0.33.0"}"#), "vllm", Some("0.33.0"), Some("/models/base")),
        (VLLM_MODELS, Some("<html>"), "vllm", None, Some("/models/base")),
        (VLLM_MODELS, None, "vllm", None, Some("/models/base")),
        (llamacpp, None, "llamacpp", None, None),
        (other, Some(r#"{"version":"0.33.0"}"#), "openai", None, None),
    ] {
        let version_status = if version.is_some() { 200 } else { 404 };
        let paths = [("/v1/models", 200, models), ("/version", version_status, version.unwrap_or("{}"))];
        let server = Server::of_paths(paths).await;
        let detected = detect(&server.channel(Timeouts::default()), None).await.expect("an engine");
        assert_eq!(detected.engine.name(), engine);
        assert_eq!(detected.version.as_deref(), expected_version);
        assert_eq!(detected.tokenizer_hint(), hint);
    }
}

/// Those that do not put their name into the list of models, or have no list.
#[tokio::test]
async fn engines_are_recognised_by_what_is_theirs_alone() {
    let list = |owner: &str| format!(r#"{{"object":"list","data":[{{"id":"m","owned_by":"{owner}","root":"m"}}]}}"#);
    let info = r#"{"model_id":"org/m","max_total_tokens":4096,"max_input_tokens":4095,"version":"3.3.7"}"#;
    let ps = r#"{"models":[{"name":"m","context_length":2048}]}"#;
    let version = r#"{"version":"0.33.0"}"#;
    for (owner, paths, engine, length, hint, routes) in [
        ("sglang", vec![("/model_info", r#"{"tokenizer_path":"/models/m"}"#)], "sglang", None, Some("/models/m"), true),
        ("tensorrt_llm", vec![], "trtllm", None, Some("m"), true),
        ("org/m", vec![("/info", info)], "tgi", Some(4096), Some("org/m"), true),
        ("", vec![("/info", info)], "tgi", Some(4096), Some("org/m"), false),
        ("library", vec![("/api/version", version), ("/api/ps", ps)], "ollama", Some(2048), Some("m"), true),
        ("library", vec![("/info", "{}"), ("/api/version", "[]")], "openai", None, Some("m"), true),
    ] {
        let models = list(owner);
        let at = |place: usize| paths.get(place).map_or(("/none", 404, ""), |(path, body)| (*path, 200, *body));
        let listed = if owner.is_empty() { ("/none", 404, "") } else { ("/v1/models", 200, models.as_str()) };
        let server = Server::of_paths([listed, at(0), at(1)]).await;
        let detected = detect(&server.channel(Timeouts::default()), None).await.expect("an engine");
        assert_eq!((detected.engine.name(), detected.openai_routes), (engine, routes));
        assert_eq!((detected.models[0].max_model_len, detected.tokenizer_hint()), (length, hint), "{engine}");
        let known = detect(&server.channel(Timeouts::default()), by_name(engine)).await.expect("an engine");
        assert_eq!((known.models, known.openai_routes), (detected.models, routes), "{engine}");
    }
}

#[tokio::test]
async fn real_engines_are_recognised() {
    let Some(models) = recorded("vllm/models") else { return };
    let version = recorded("vllm/version").expect("a sample");
    let server = Server::of_paths([("/v1/models", 200, &models), ("/version", 200, &version)]).await;
    let detected = detect(&server.channel(Timeouts::default()), None).await.expect("an engine");
    assert_eq!((detected.engine.name(), detected.version.as_deref()), ("vllm", Some("0.32.0")));
    assert_eq!((detected.models[0].id.as_str(), detected.models[0].max_model_len), ("smollm2", Some(2048)));
    assert_eq!(detected.tokenizer_hint(), Some("models/smollm2"));

    let models = recorded("llamacpp/models").expect("a sample");
    let server = Server::of_paths([("/v1/models", 200, &models)]).await;
    let detected = detect(&server.channel(Timeouts::default()), None).await.expect("an engine");
    assert_eq!((detected.engine.name(), detected.tokenizer_hint()), ("llamacpp", None));
    assert_eq!((detected.models[0].id.as_str(), detected.models[0].max_model_len), ("smollm2", Some(2048)));
}

#[tokio::test]
async fn what_is_no_engine() {
    for (status, body, expected) in [
        (200, "<html>It works!</html>", Failure::Malformed),
        (200, r#"{"object":"list","data":[]}"#, Failure::Malformed),
        (200, r#"{"object":"list","data":null}"#, Failure::Malformed),
        (401, r#"{"error":"Unauthorized"}"#, Failure::Malformed),
        (404, "", Failure::Malformed),
        (429, "", Failure::Overloaded { retry_after: None }),
        (503, VLLM_MODELS, Failure::Status5xx),
    ] {
        let server = Server::of_paths([("/v1/models", status, body)]).await;
        let error = detect(&server.channel(Timeouts::default()), None).await.expect_err("no engine");
        assert_eq!(error.failure(), expected, "{status} {body}: {error:?}");
    }
}

#[tokio::test]
async fn health() {
    for (status, healthy) in [(200, true), (204, true), (301, false), (404, false), (500, false), (503, false)] {
        let server = Server::of_paths([("/health", status, ""), ("/v1/models", 200, VLLM_MODELS)]).await;
        let channel = server.channel(Timeouts::default());
        let outcome = probe(&channel, by_name("vllm").expect("known")).await;
        assert_eq!(outcome.is_ok(), healthy, "{status}: {outcome:?}");
        probe(&channel, by_name("openai").expect("known")).await.expect("the list is there");
    }
    let error = probe(&channel("http://127.0.0.1:1", Timeouts::default()), by_name("vllm").expect("known")).await;
    assert_eq!(error.expect_err("nothing listens").failure(), Failure::Connect);
}

#[tokio::test]
async fn only_engines_are_discovered_and_never_oneself() {
    let engine = Server::of_paths([("/v1/models", 200, VLLM_MODELS), ("/version", 200, "{}")]).await;
    let other_engine = Server::of_paths([("/v1/models", 200, r#"{"data":[{"id":"x"}]}"#)]).await;
    let web_site = Server::of_paths([("/v1/models", 200, "<html>")]).await;
    let oneself = Server::of_paths([("/v1/models", 200, VLLM_MODELS)]).await;
    let nobody = TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("an address");

    let transport = Transport::new(TaskTracker::new());
    let servers = [&web_site, &engine, &oneself, &other_engine];
    let mut ports = servers.map(|server| server.address.port()).to_vec();
    ports.push(nobody.port());
    let found = probe_local(&transport, &ports, &[oneself.address.port()]).await;
    let names: Vec<_> = found.iter().map(|found| (found.url.port(), found.detected.engine.name())).collect();
    let expected = [(Some(engine.address.port()), "vllm"), (Some(other_engine.address.port()), "openai")];
    assert_eq!(names, expected);
    assert_eq!(oneself.seen.connections(), 0);
}

#[tokio::test]
async fn counting() {
    let recorded = recorded("vllm/tokenize-prompt");
    let answer = recorded.as_deref().unwrap_or(r#"{"count":7,"tokens":[19556,256,34,32,34,36,905]}"#);
    let server = Server::of_paths([("/tokenize", 200, answer)]).await;
    let body = Bytes::from_static(br#"{"model":"smollm2","prompt":"Hello  2024 world"}"#);
    let tokens = tokenize(&server.channel(Timeouts::default()), body.clone()).await.expect("tokens");
    assert_eq!(tokens, [19556, 256, 34, 32, 34, 36, 905]);
    let seen = server.seen.requests.lock();
    assert!(seen[0].head.starts_with("POST /tokenize HTTP/1.1\r\n"), "{}", seen[0].head);
    assert_eq!(seen[0].body, body);
}

#[tokio::test]
async fn counting_refused() {
    for (status, answer) in
        [(400, "{}"), (200, "{}"), (200, r#"{"tokens":[-1]}"#), (200, r#"{"tokens":"x"}"#), (200, "")]
    {
        let server = Server::of_paths([("/tokenize", status, answer)]).await;
        let error = tokenize(&server.channel(Timeouts::default()), Bytes::from_static(b"{}")).await;
        match error.expect_err("a refusal") {
            Error::Status { status: seen } => assert_eq!((status, seen.as_u16()), (400, 400)),
            error => assert!(status == 200 && matches!(error, Error::Unreadable), "{error:?}"),
        }
    }
}

/// A server whose `/metrics` answers the status that the test last set, and busy figures with 201.
async fn metrics_server() -> (Server, Arc<AtomicU16>) {
    let status = Arc::new(AtomicU16::new(200));
    let shown = status.clone();
    let server = Server::start(move |mut served| {
        let shown = shown.clone();
        async move {
            while served.request().await.is_some() {
                let status = shown.load(Ordering::SeqCst);
                served.answer(status, if status == 201 { BUSY_METRICS } else { METRICS }).await;
            }
        }
    })
    .await;
    (server, status)
}

fn signals(server: &Server, busy: Duration, idle: Duration) -> (Signals, Traffic) {
    let traffic = Traffic::default();
    let channel = server.channel(Timeouts::default());
    let pace = Pace { busy, idle };
    (Signals::new(channel, by_name("vllm").expect("known"), traffic.clone(), pace).expect("it has metrics"), traffic)
}

async fn next(signals: &mut Signals) -> Signal {
    timeout(PATIENCE, signals.next()).await.expect("a signal")
}

#[tokio::test]
async fn an_idle_worker_is_left_alone_until_traffic_comes() {
    let (server, _) = metrics_server().await;
    let (mut signals, traffic) = signals(&server, millis(10), PATIENCE * 10);
    assert!(matches!(next(&mut signals).await, Signal::Load(load) if load.running == 0), "the first at once");
    // Cutting the wait short, as a select would, changes nothing.
    assert!(timeout(millis(100), signals.next()).await.is_err(), "nothing to ask for");
    assert_eq!(server.seen.requests(), 1);
    for expected in 2..5 {
        traffic.note();
        assert!(matches!(next(&mut signals).await, Signal::Load(_)));
        assert_eq!(server.seen.requests(), expected);
    }
}

#[tokio::test]
async fn a_busy_worker_is_asked_again_soon() {
    let (server, status) = metrics_server().await;
    status.store(201, Ordering::SeqCst);
    let (mut signals, _) = signals(&server, millis(5), PATIENCE * 10);
    for _ in 0..5 {
        assert!(matches!(next(&mut signals).await, Signal::Load(load) if (load.running, load.waiting) == (3, 1)));
    }
    assert_eq!((server.seen.requests(), server.seen.connections()), (5, 1));
}

#[tokio::test]
async fn losing_the_signal_is_told_once() {
    let (server, status) = metrics_server().await;
    let (mut signals, _) = signals(&server, millis(5), millis(5));
    assert!(matches!(next(&mut signals).await, Signal::Load(_)));
    for _ in 0..2 {
        status.store(500, Ordering::SeqCst);
        while next(&mut signals).await != Signal::Lost {}
        let asked = server.seen.requests();
        assert!(timeout(millis(100), signals.next()).await.is_err(), "told once");
        assert!(server.seen.requests() > asked, "and asked on");
        status.store(200, Ordering::SeqCst);
        assert!(matches!(next(&mut signals).await, Signal::Load(_)));
    }
}

#[tokio::test]
async fn signals_that_cannot_be() {
    let nowhere = channel("http://127.0.0.1:1", Timeouts::default());
    let pace = Pace::default();
    assert!(Signals::new(nowhere.clone(), by_name("openai").expect("known"), Traffic::default(), pace).is_none());
    let signals = Signals::new(nowhere, by_name("vllm").expect("known"), Traffic::default(), pace);
    assert_eq!(next(&mut signals.expect("it has metrics")).await, Signal::Lost);
    // Metrics without those of the engine, as with `--disable-log-stats`.
    let server = Server::of_paths([("/metrics", 200, "process_open_fds 54.0\n")]).await;
    let (mut signals, _) = self::signals(&server, millis(5), millis(5));
    assert_eq!(next(&mut signals).await, Signal::Lost);
}
