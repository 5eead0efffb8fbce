//! The owner's key, the admin API behind it, and `forebay workers` in front of it.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use crate::support::body::{ANSWER, chat, held, long, wide};
use crate::support::client::{self, Answer, Connection, error_object, get, get_with, post, post_with};
use crate::support::eventually;
use crate::support::process::{Gateway, Process, Worker, model, run, tokenizer};
use crate::support::recorder::{Recorder, json};

fn refused(answer: &Answer, status: u16) -> String {
    assert_eq!(answer.status, status, "{}", answer.text());
    assert_eq!(answer.header("content-type"), Some("application/json"));
    error_object(&answer.body)["code"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn the_owners_key_is_made_once_and_asked_for() {
    let recorder = Recorder::start("m", vec![json("200 OK", ANSWER)]);
    let mut gateway = Gateway::before(&[recorder.address]);
    let file = gateway.directory.path().join("data/owner.key");
    assert_eq!(std::fs::metadata(&file).expect("the key").permissions().mode() & 0o777, 0o600);
    let key = gateway.owner_key();
    assert!(key.len() >= 64, "{key}");
    assert_eq!(gateway.process.out().matches(&key).count(), 1, "{}", gateway.process.out());

    for path in ["/metrics", "/livez", "/readyz", "/health"] {
        assert_eq!(get(gateway.ops, path).status, 200, "{path}");
    }
    let last = if key.ends_with('0') { '1' } else { '0' };
    let near = format!("{}{last}", &key[..key.len() - 1]);
    let wrong = [
        vec![],
        vec!["authorization: Bearer".to_owned()],
        vec!["authorization: Bearer fbo_".to_owned()],
        vec![format!("authorization: Bearer {near}")],
        vec![format!("authorization: Bearer {key}x")],
        vec![format!("authorization: Basic {key}")],
        vec![format!("x-api-key: {key}")],
    ];
    for path in ["/admin/v1/workers", "/admin/v1/decisions/x", "/admin/v1/nothing"] {
        for headers in &wrong {
            let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
            let answer = get_with(gateway.ops, path, &headers);
            assert_eq!(refused(&answer, 401), "invalid_api_key", "{path}: {headers:?}");
            assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
            assert_eq!(post_with(gateway.ops, path, &headers, "{}").status, 401);
            let message = error_object(&answer.body)["message"].to_string();
            assert!(message.contains("owner") && !message.contains(&key), "{message}");
        }
    }
    assert_eq!(gateway.admin("workers").status, 200);
    assert_eq!(refused(&gateway.admin("nothing"), 404), "not_found");
    let owner = format!("authorization: Bearer {key}");
    assert_eq!(post_with(gateway.ops, "/admin/v1/decisions/x", &[&owner], "{}").status, 405);
    // It is for the ops listener only.
    assert_eq!(get_with(gateway.client, "/admin/v1/workers", &[&owner]).status, 404);

    // A second start in the same place finds it and does not show it again.
    gateway.process.signal("TERM");
    assert!(gateway.process.wait().success());
    let file = gateway.directory.path().join("forebay.toml");
    let arguments = ["serve", "--config", file.to_str().expect("UTF-8")];
    let mut second = Process::start(&arguments, gateway.directory.path(), &[("FOREBAY_LOG", "trace")]);
    let ops = second.line(|line| line.split("operators: http://").nth(1)?.trim().parse().ok());
    assert_eq!(get_with(ops, "/admin/v1/workers", &[&owner]).status, 200);
    second.signal("TERM");
    second.wait();
    assert!(!second.out().contains(&key) && !second.err().contains(&key), "the key was logged");
}

#[test]
fn a_spoilt_key_is_said_and_not_replaced() {
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::create_dir(directory.path().join("data")).expect("a directory");
    std::fs::write(directory.path().join("data/owner.key"), "oops\n").expect("a file");
    let text = "[server]\nlisten = \"127.0.0.1:0\"\nops_listen = \"127.0.0.1:0\"\ndata_dir = \"data\"\n\
                [[model]]\nname = \"m\"\n[[model.worker]]\nurl = \"http://127.0.0.1:1\"\n";
    std::fs::write(directory.path().join("forebay.toml"), text).expect("a file");
    let (code, _, err) = run(&["serve"], directory.path(), &[]);
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("`data/owner.key` holds no key") && !err.contains("oops"), "{err}");
}

#[test]
fn workers_are_listed_as_they_are() {
    let engine = Worker::start(&["--model", "inside", "--api-key", "worker-secret"]);
    let text = format!(
        "[[model]]\nname = \"m\"\ntokenizer = {:?}\n[[model.worker]]\nname = \"there\"\nurl = \"http://{}\"\n\
         model = \"inside\"\napi_key = {{ env = \"KEY\" }}\n[[model.worker]]\nname = \"nobody\"\n\
         url = \"http://127.0.0.1:1\"\n",
        tokenizer(),
        engine.address
    );
    let gateway = Gateway::start_unready("", &text, &[("KEY", "worker-secret")]);
    gateway.until_ready();
    assert_eq!(gateway.post("/v1/chat/completions", &chat(&long("warm"), r#","max_tokens":2"#)).status, 200);
    let answer = eventually("the engine's own report and the end of the other worker's probe", || {
        let answer = gateway.admin("workers");
        let json = answer.json();
        let ready = json["workers"][0]["reported"].is_object() && json["workers"][1]["health"] == "down";
        ready.then_some(answer)
    });
    assert!(!answer.text().contains("worker-secret"), "{}", answer.text());
    let json = answer.json();
    let (there, nobody) = (&json["workers"][0], &json["workers"][1]);
    for (key, expect) in [
        ("name", "there".into()),
        ("model", "m".into()),
        ("engine", "vllm".into()),
        ("engine_model", "inside".into()),
        ("url", format!("http://{}", engine.address).into()),
        ("health", "up".into()),
        ("takes_requests", true.into()),
        ("health_score", serde_json::Value::from(1.0)),
        ("draining", false.into()),
        ("kv_tokens", 1_000_000.into()),
        ("lane_requests", 0.into()),
    ] {
        assert_eq!(there[key], expect, "{key} of {there}");
    }
    assert_eq!((&nobody["health"], &nobody["takes_requests"]), (&"down".into(), &false.into()), "{nobody}");
    assert_eq!((&nobody["engine"], &nobody["reported"]), (&().into(), &().into()), "{nobody}");
    assert_eq!(nobody["health_score"], 0.0);

    let said = workers(&gateway, &[]);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[0], "m");
    assert!(lines[1].starts_with("  WORKER  ENGINE  HEALTH  SCORE  SENT"), "{said}");
    assert!(lines[2].starts_with("  there   vllm    up       1.00     0     0 "), "{said}");
    assert!(lines[3].starts_with("  nobody  -       down     0.00     0     0 "), "{said}");
    assert!(lines.iter().all(|line| line.len() <= 80), "{said}");
    // The age of a report goes on by itself.
    let still = |text: &str| {
        let mut json: serde_json::Value = serde_json::from_str(text).expect("JSON");
        json["workers"][0]["reported"]["ago_seconds"] = 0.into();
        json
    };
    assert_eq!(still(&workers(&gateway, &["--json"])), still(&gateway.admin("workers").text()));
}

/// What `forebay workers` says to the owner.
fn workers(gateway: &Gateway, more: &[&str]) -> String {
    let (code, out, err) = ask(gateway, &gateway.owner_key(), more);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    out
}

fn ask(gateway: &Gateway, key: &str, more: &[&str]) -> (i32, String, String) {
    let url = format!("http://{}", gateway.ops);
    let arguments = [&["workers", "--url", &url], more].concat();
    run(&arguments, gateway.directory.path(), &[("FOREBAY_ADMIN_KEY", key)])
}

#[test]
fn a_decision_is_explained_by_the_name_the_client_saw() {
    let engines = [(); 2].map(|()| Worker::start(&["--model", "m"]));
    let gateway = Gateway::before(&[engines[0].address, engines[1].address]);
    eventually("both workers", || {
        let up = |worker: &str| gateway.metric(&format!("forebay_worker_up{{worker=\"{worker}\"}}"));
        (up("w0") + up("w1") == 2.0).then_some(())
    });
    let body = chat(&long("asked twice"), r#","max_tokens":2"#);
    let first = post(gateway.client, "/v1/chat/completions", &body);
    let own = post_with(gateway.client, "/v1/chat/completions", &["x-request-id: my-own.id:7"], &body);
    assert_eq!((first.status, own.status), (200, 200));
    assert_eq!(own.header("x-request-id"), Some("my-own.id:7"));

    let given = first.header("x-request-id").expect("a name");
    let explained = gateway.admin(&format!("decisions/{given}")).json();
    assert_eq!((&explained["request"], &explained["state"]), (&given.into(), &"ended".into()), "{explained}");
    let explained = gateway.admin("decisions/my-own.id:7").json();
    let worker = own.header("x-forebay-worker").expect("a worker");
    assert_eq!(explained["sent"], serde_json::json!([worker]), "{explained}");
    assert_eq!((&explained["model"], &explained["class"]), (&"m".into(), &"default".into()), "{explained}");
    assert_eq!(explained["refusal"], serde_json::Value::Null);
    let decision = &explained["decisions"][0];
    assert_eq!((&decision["cause"], &decision["winner"]), (&"arrival".into(), &worker.into()), "{explained}");
    let candidates = decision["candidates"].as_array().expect("a list");
    assert_eq!(candidates.len(), 2, "{explained}");
    for candidate in candidates {
        let terms = candidate["terms"].as_object().expect("terms");
        let sum: f64 = terms.values().map(|seconds| seconds.as_f64().expect("seconds")).sum();
        let score = candidate["seconds"].as_f64().expect("seconds");
        assert!((sum - score).abs() < 1e-5, "{candidate}");
        assert_eq!(candidate["health"], "up");
        let holds = candidate["worker"] == worker;
        assert_eq!(candidate["winner"], holds, "{explained}");
        assert_eq!(candidate["matched_tokens"].as_u64() > Some(1000), holds, "{explained}");
        assert_eq!(terms["overlap_credit"].as_f64() < Some(0.0), holds, "{explained}");
    }
    assert_eq!(candidates[0]["winner"], true, "the best comes first");

    let said = workers(&gateway, &["--decision", "my-own.id:7"]);
    assert!(said.starts_with("my-own.id:7\n"), "{said}");
    assert!(said.contains(&format!("sent to {worker}, 0.0")), "{said}");
    assert_eq!(said.lines().filter(|line| line.starts_with(&format!("* {worker} "))).count(), 1, "{said}");
    for word in ["decision 1: arrival", "prefill", "overlap", "SCORE"] {
        assert!(said.contains(word), "no {word} in\n{said}");
    }
    assert!(!said.contains("adapter"), "what is nothing everywhere is left out: {said}");
    assert!(said.lines().all(|line| line.len() <= 120), "{said}");

    // A name that is used again means the latest request.
    let again =
        post_with(gateway.client, "/v1/embeddings", &["x-request-id: my-own.id:7"], r#"{"model":"m","input":"a"}"#);
    assert_eq!(again.status, 200, "{}", again.text());
    assert!(gateway.admin("decisions/my-own.id:7").json()["prompt_tokens"].as_u64() < Some(10));
}

#[test]
fn what_was_refused_is_explained_too() {
    let recorder = Recorder::start("m", vec![held()]);
    let extra = format!("tokenizer = {:?}\nqueue_requests_max = 1\n", tokenizer());
    let gateway = Gateway::start(&model("m", &[recorder.address], &extra));
    let mut first = Connection::to(gateway.client);
    first.post("/v1/completions", &[], wide("first").as_bytes());
    recorder.await_posts(1);
    let mut waiting = Connection::to(gateway.client);
    waiting.post("/v1/completions", &["x-request-id: waiting"], wide("waiting").as_bytes());
    gateway.until_queued(1);
    let too_many = post_with(gateway.client, "/v1/chat/completions", &["x-request-id: too-many"], &chat("hi", ""));
    assert_eq!(too_many.refusal(503), "server_is_overloaded");
    let explained = gateway.admin("decisions/too-many").json();
    assert_eq!(explained["state"], "refused", "{explained}");
    assert_eq!(explained["refusal"]["reason"], "queue_full", "{explained}");
    assert_eq!(
        explained["refusal"]["retry_after_seconds"].as_f64().map(|wait| wait.to_string()).as_deref(),
        too_many.header("retry-after"),
        "{explained}"
    );
    assert_eq!((explained["sent"].as_array().map(Vec::len), explained["decisions"].is_array()), (Some(0), true));
    assert_eq!(gateway.admin("decisions/waiting").json()["state"], "under_way");
    let said = workers(&gateway, &["--decision", "too-many"]);
    assert!(said.contains("refused: the queue is full (told to come again in "), "{said}");

    recorder.play(json("200 OK", ANSWER));
    recorder.go_on();
    assert_eq!((first.answer().status, waiting.answer().status), (200, 200));
    let explained = gateway.admin("decisions/waiting").json();
    assert!(explained["queued_seconds"].as_f64() > Some(0.0), "{explained}");

    // One that never came to be placed is not known here.
    let unknown = post_with(gateway.client, "/v1/chat/completions", &["x-request-id: lost"], "{}");
    assert_eq!(unknown.status, 400);
    for path in ["decisions/lost", "decisions/never-heard", "decisions/%2e%2e%2fworkers"] {
        let answer = gateway.admin(path);
        assert_eq!(refused(&answer, 404), "request_not_kept", "{path}");
        assert!(answer.text().contains("the last 1024 requests"), "{}", answer.text());
    }
    let (code, out, err) = ask(&gateway, &gateway.owner_key(), &["--decision", "never-heard"]);
    assert_eq!((code, out.as_str()), (1, ""), "{err}");
    assert!(err.contains("`never-heard` is not one of the last 1024 requests"), "{err}");
}

#[test]
fn the_terminal_says_who_cannot_be_reached_and_who_is_not_let_in() {
    let recorder = Recorder::start("m", vec![json("200 OK", ANSWER)]);
    let gateway = Gateway::before(&[recorder.address]);
    let (code, out, err) = ask(&gateway, "fbo_wrong", &[]);
    assert_eq!((code, out.as_str()), (1, ""), "{err}");
    assert!(err.contains("401 Unauthorized: This is not the owner key"), "{err}");

    // The key in the data directory does as well as the one in the environment.
    let url = format!("http://{}", gateway.ops);
    let here = gateway.directory.path();
    for (arguments, environment) in [
        (vec!["workers", "--url", &url, "--data-dir", "data"], &[][..]),
        (vec!["workers", "--url", &url], &[("FOREBAY_DATA_DIR", "data")][..]),
    ] {
        let (code, out, err) = run(&arguments, here, environment);
        assert_eq!((code, err.as_str()), (0, ""), "{arguments:?}: {out}");
        assert!(out.contains("w0"), "{out}");
    }
    let (code, _, err) = run(&["workers", "--url", &url, "--data-dir", "elsewhere"], here, &[]);
    assert_eq!(code, 2, "{err}");
    assert!(err.contains("elsewhere/owner.key") && err.contains("FOREBAY_ADMIN_KEY"), "{err}");
    let (code, _, err) = run(&["workers", "--url", "http://127.0.0.1:1", "--data-dir", "data"], here, &[]);
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("no gateway answers at http://127.0.0.1:1: Connection refused"), "{err}");
    // Something else listens there.
    let worker = format!("http://{}", recorder.address);
    let (code, _, err) = run(&["workers", "--url", &worker, "--data-dir", "data"], here, &[]);
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("not a gateway's ops listener"), "{err}");
}

#[test]
fn watching_goes_on_until_interrupted() {
    let recorder = Recorder::start("m", vec![json("200 OK", ANSWER)]);
    let gateway = Gateway::before(&[recorder.address]);
    let url = format!("http://{}", gateway.ops);
    let key = gateway.owner_key();
    let arguments = ["workers", "--url", &url, "--watch"];
    let began = Instant::now();
    let mut watching = Process::start(&arguments, gateway.directory.path(), &[("FOREBAY_ADMIN_KEY", &key)]);
    for _ in 0..3 {
        watching.line(|line| line.contains("w0").then_some(()));
    }
    assert!(began.elapsed() >= Duration::from_secs(2), "{:?}", began.elapsed());
    assert!(!watching.out().contains('\x1b'), "only a terminal is cleared");
    // A gateway that goes away is waited for.
    drop(gateway);
    watching.line(|line| line.contains("no gateway answers").then_some(()));
    watching.signal("INT");
    assert_eq!(watching.wait().code(), Some(0));
    assert_eq!(client::get(recorder.address, "/health").status, 200);
}
