//! Exactly one row for each request, however it ends, and the same rows in the access log.

use std::time::SystemTime;

use serde_json::Value;

use crate::support::body::{chat, streamed};
use crate::support::client::{Connection, post_with};
use crate::support::eventually;
use crate::support::process::{Gateway, Worker, model, run, tokenizer};
use crate::support::recorder::{Recorder, json};

/// Names that every row has, and those that it has where they apply.
const ALWAYS: [&str; 13] = [
    "time",
    "request",
    "api",
    "stream",
    "status",
    "outcome",
    "attempts",
    "prompt_tokens",
    "prompt_tokens_from",
    "output_tokens",
    "output_tokens_from",
    "queue_ms",
    "total_ms",
];
const SOMETIMES: [&str; 5] = ["model", "worker", "cached_tokens", "matched_tokens", "ttft_ms"];

fn sole_row(gateway: &Gateway, request: &str) -> Value {
    let row = gateway.row(request);
    let of_it = gateway.rows().iter().filter(|row| row["request"] == request).count();
    assert_eq!(of_it, 1, "{row}");
    row
}

fn milliseconds(row: &Value, name: &str) -> f64 {
    row[name].as_f64().unwrap_or_else(|| panic!("no `{name}`: {row}"))
}

fn assert_plausible(row: &Value) {
    let object = row.as_object().expect("an object");
    for name in ALWAYS {
        assert!(object.contains_key(name), "no `{name}`: {row}");
    }
    for name in object.keys() {
        assert!(ALWAYS.contains(&name.as_str()) || SOMETIMES.contains(&name.as_str()), "`{name}`: {row}");
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a clock").as_secs_f64();
    assert!((now - 300.0..=now).contains(&row["time"].as_f64().expect("a time")), "{row}");
    let total = milliseconds(row, "total_ms");
    assert!(total >= milliseconds(row, "queue_ms") && total < 60_000.0, "{row}");
    if !row["ttft_ms"].is_null() {
        assert!((0.0..=total).contains(&milliseconds(row, "ttft_ms")), "{row}");
    }
    assert_eq!(row["attempts"] == 0, row["worker"].is_null(), "{row}");
}

#[test]
fn every_kind_of_end_is_one_row() {
    let worker = Worker::start(&["--model", "m", "--speed", "5"]);
    let refusing = Recorder::start("strict", vec![json("422 Unprocessable Entity", r#"{"detail":"no"}"#)]);
    let tokenizer = format!("tokenizer = {:?}\n", tokenizer());
    let strict = format!(
        "[[model]]\nname = \"strict\"\n{tokenizer}[[model.worker]]\nname = \"strict\"\nurl = \"http://{}\"\n",
        refusing.address
    );
    let gateway = Gateway::start(&(model("m", &[worker.address], &tokenizer) + &strict));
    eventually("both workers", || (gateway.metric("forebay_worker_up{worker=\"strict\"}") == 1.0).then_some(()));
    let expect = |request: &str, status: u16, outcome: &str, attempts: u32| {
        let row = sole_row(&gateway, request);
        assert_eq!(
            (&row["status"], &row["outcome"], &row["attempts"]),
            (&status.into(), &outcome.into(), &attempts.into()),
            "{row}"
        );
        assert_plausible(&row);
        row
    };
    let ask = |name: &str, path: &str, body: &str| {
        let answer = post_with(gateway.client, path, &[&format!("x-request-id: {name}")], body);
        assert_eq!(answer.header("x-request-id"), Some(name));
        answer
    };

    let answer = ask("whole", "/v1/chat/completions", &chat("hello", r#","max_tokens":5"#));
    let usage = &answer.json()["usage"];
    let row = expect("whole", 200, "completed", 1);
    assert_eq!((&row["api"], &row["model"], &row["worker"]), (&"chat".into(), &"m".into(), &"w0".into()));
    assert_eq!((&row["prompt_tokens"], &row["output_tokens"]), (&usage["prompt_tokens"], &usage["completion_tokens"]));
    assert_eq!((&row["prompt_tokens_from"], &row["output_tokens_from"]), (&"engine".into(), &"engine".into()));
    assert!(row["output_tokens"] == 5 && row["prompt_tokens"].as_u64() > Some(0) && row["stream"] == false, "{row}");

    // The client asked for no usage and saw none; it is known all the same.
    let answer = ask("stream", "/v1/chat/completions", &chat("hello", r#","max_tokens":5,"stream":true"#));
    assert_eq!(answer.stream_end(), Ok(()));
    assert!(!answer.text().contains("usage"), "{}", answer.text());
    let row = expect("stream", 200, "completed", 1);
    assert_eq!((&row["output_tokens"], &row["output_tokens_from"]), (&5.into(), &"engine".into()), "{row}");
    assert!(milliseconds(&row, "ttft_ms") < milliseconds(&row, "total_ms"), "{row}");

    ask("completion", "/v1/completions", r#"{"model":"m","prompt":"one two","max_tokens":3}"#);
    assert_eq!(expect("completion", 200, "completed", 1)["api"], "completions");
    ask("embedding", "/v1/embeddings", r#"{"model":"m","input":"one two"}"#);
    let row = expect("embedding", 200, "completed", 1);
    assert_eq!((&row["api"], &row["output_tokens"]), (&"embeddings".into(), &0.into()), "{row}");
    ask("tokenize", "/tokenize", r#"{"model":"m","prompt":"one two"}"#);
    assert_eq!(expect("tokenize", 200, "completed", 0)["api"], "tokenize");
    ask("detokenize", "/detokenize", r#"{"model":"m","tokens":[1,2]}"#);
    assert_eq!(expect("detokenize", 200, "completed", 0)["api"], "detokenize");

    ask("unread", "/v1/chat/completions", "{");
    assert!(expect("unread", 400, "refused", 0)["model"].is_null());
    ask("unknown", "/v1/chat/completions", r#"{"model":"none","messages":[{"role":"user","content":"x"}]}"#);
    assert!(expect("unknown", 404, "refused", 0)["model"].is_null());
    ask("long", "/v1/chat/completions", &chat("hello", r#","max_tokens":99999999"#));
    let row = expect("long", 400, "refused", 0);
    assert_eq!(
        (&row["model"], &row["output_tokens"], &row["output_tokens_from"]),
        (&"m".into(), &0.into(), &"none".into())
    );
    ask("strict", "/v1/chat/completions", &chat("hello", "").replace(r#""m""#, r#""strict""#));
    let row = expect("strict", 422, "engine_refused", 1);
    assert_eq!((&row["worker"], &row["output_tokens"]), (&"strict".into(), &0.into()), "{row}");

    worker.faults(r#"[{"kind":{"status":{"code":500}}}]"#);
    ask("failed", "/v1/chat/completions", &chat("hello", ""));
    let row = expect("failed", 502, "failed", 2);
    assert_eq!((&row["worker"], &row["output_tokens"]), (&"w0".into(), &0.into()), "{row}");

    worker.faults(r#"[{"kind":{"cut":{"after":4}}}]"#);
    let answer = ask("cut", "/v1/chat/completions", &streamed("hello"));
    let produced = answer.events().iter().filter(|event| event.contains(r#""delta":{"content":""#)).count();
    let row = expect("cut", 200, "cut", 1);
    assert_eq!(row["output_tokens_from"], "events");
    assert!(row["output_tokens"].as_u64().is_some_and(|tokens| (1..=produced as u64).contains(&tokens)), "{row}");
    assert_eq!(row["prompt_tokens_from"], "tokenizer");

    // Some tokens, then silence: what was read is what is counted.
    worker.faults(r#"[{"kind":{"stall":{"after":4}}}]"#);
    let mut client = Connection::to(gateway.client);
    client.post("/v1/chat/completions", &["x-request-id: left"], streamed("hello").as_bytes());
    client.until(b"\"delta\":{\"content\":\"");
    let events = || worker.metric("vllm:generation_tokens_total");
    eventually("more tokens at the worker than were sent", || (events() > 0.0).then_some(()));
    drop(client);
    let row = expect("left", 200, "client_gone", 1);
    assert_eq!(row["output_tokens_from"], "events", "{row}");
    assert!(row["output_tokens"].as_u64().is_some_and(|tokens| (1..=4).contains(&tokens)), "{row}");

    // A client that leaves in the middle of its own request.
    let mut client = Connection::to(gateway.client);
    client
        .send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\nx-request-id: torn\r\ncontent-length: 99\r\n\r\n{");
    drop(client);
    let row = expect("torn", 499, "client_gone", 0);
    assert!(row["model"].is_null() && row["queue_ms"] == 0.0, "{row}");

    assert_eq!(gateway.rows().len(), 14, "no request has two rows, and none is missing");
    same_in_the_access_log(gateway);
}

/// Standard output has the journal's rows, each as a line, the last ones too.
fn same_in_the_access_log(mut gateway: Gateway) {
    gateway.process.signal("TERM");
    assert_eq!(gateway.process.wait().code(), Some(0));
    let rows = gateway.rows();
    let out = gateway.process.out();
    let logged: Vec<Value> =
        out.lines().filter(|line| line.starts_with('{')).map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(logged, rows);
}

#[test]
fn the_access_log_can_be_turned_off_and_the_journal_goes_on() {
    let worker = Worker::start(&["--model", "m"]);
    let mut gateway = Gateway::start_unready("access_log = false\n", &model("m", &[worker.address], ""), &[]);
    gateway.until_ready();
    assert_eq!(gateway.post("/v1/chat/completions", &chat("hello", "")).status, 200);
    gateway.process.signal("TERM");
    assert_eq!(gateway.process.wait().code(), Some(0));
    assert_eq!(gateway.rows().len(), 1);
    assert!(!gateway.process.out().lines().any(|line| line.starts_with('{')), "{}", gateway.process.out());
}

#[test]
fn many_at_once_have_a_row_each() {
    let worker = Worker::start(&["--model", "m"]);
    let gateway = Gateway::before(&[worker.address]);
    let mut clients: Vec<Connection> = (0..100).map(|_| Connection::to(gateway.client)).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        let body = chat(&format!("question {number}"), r#","max_tokens":4,"stream":true"#);
        client.post("/v1/chat/completions", &[&format!("x-request-id: r{number}")], body.as_bytes());
    }
    for client in &mut clients {
        assert_eq!(client.answer().stream_end(), Ok(()));
    }
    let rows = eventually("all rows", || Some(gateway.rows()).filter(|rows| rows.len() >= 100));
    let mut names: Vec<&str> = rows.iter().map(|row| row["request"].as_str().expect("a name")).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!((rows.len(), names.len()), (100, 100));
    rows.iter().for_each(assert_plausible);
}

/// A start on the same directory begins a new file and leaves the old one as it was.
#[test]
fn rows_survive_a_restart() {
    let recorder = Recorder::start("m", vec![json("200 OK", crate::support::body::ANSWER)]);
    let directory = tempfile::tempdir().expect("a directory");
    let models = model("m", &[recorder.address], "");
    for starts in 1..=2 {
        let variable = ("FOREBAY_DATA_DIR", directory.path().to_str().expect("UTF-8"));
        let mut gateway = Gateway::start_unready("", &models, &[variable]);
        gateway.until_ready();
        assert_eq!(gateway.post("/v1/chat/completions", &chat("hello", "")).status, 200);
        gateway.process.signal("TERM");
        assert_eq!(gateway.process.wait().code(), Some(0));
        let files = std::fs::read_dir(directory.path().join("journal")).expect("the journal").count();
        assert_eq!(files, starts);
    }
}

#[test]
fn a_journal_that_cannot_be_written_stops_the_start() {
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::create_dir(directory.path().join("data")).expect("a directory");
    std::fs::write(directory.path().join("data/journal"), "a file is in the way").expect("a file");
    let text = "[server]\nlisten = \"127.0.0.1:0\"\nops_listen = \"127.0.0.1:0\"\ndata_dir = \"data\"\n\
                [[model]]\nname = \"m\"\n[[model.worker]]\nurl = \"http://127.0.0.1:1\"\n";
    std::fs::write(directory.path().join("forebay.toml"), text).expect("a file");
    let (code, out, err) = run(&["serve"], directory.path(), &[]);
    assert_eq!(code, 1, "{out}{err}");
    assert!(err.contains("cannot write the usage journal in data/journal"), "{err}");
    assert!(!out.contains("http://"), "it never served: {out}");
}
