//! Workers that join, drain and leave at the owner's word.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use super::support::client::{self, Answer, error_object};
use super::support::eventually;
use super::support::process::{Gateway, Process, Worker, model, run};

const CHAT: &str = "/v1/chat/completions";
const ASK: &str =
    r#"{"model":"m","max_tokens":8,"ignore_eos":true,"stream":true,"messages":[{"role":"user","content":"a"}]}"#;

fn gateway(workers: &[&Worker]) -> Gateway {
    let addresses: Vec<SocketAddr> = workers.iter().map(|worker| worker.address).collect();
    Gateway::start(&model("m", &addresses, "aliases = [\"other\"]\n"))
}

/// A call that lets this address join.
fn joining(name: &str, url: &str) -> String {
    json!({"model": "m", "worker": {"name": name, "url": url}}).to_string()
}

fn url(worker: &Worker) -> String {
    format!("http://{}", worker.address)
}

/// What the gateway says of the worker of this name.
fn said(answer: &Answer, name: &str) -> Option<Value> {
    let json = answer.json();
    json["workers"].as_array().expect("an array").iter().find(|worker| worker["name"] == name).cloned()
}

fn until_up(gateway: &Gateway, name: &str) {
    eventually("the worker to be up", || (said(&gateway.admin("workers"), name)?["health"] == "up").then_some(()));
}

fn until_gone(gateway: &Gateway, name: &str) {
    eventually("the worker to leave", || said(&gateway.admin("workers"), name).is_none().then_some(()));
}

fn refused(answer: &Answer, status: u16) -> String {
    assert_eq!(answer.status, status, "{}", answer.text());
    error_object(&answer.body)["message"].as_str().expect("a text").to_owned()
}

#[test]
fn workers_join_drain_and_leave_under_load_without_a_lost_request() {
    let [first, second] = [Worker::start(&["--model", "m"]), Worker::start(&["--model", "m"])];
    let gateway = gateway(&[&first]);
    let (over, at) = (AtomicBool::new(false), gateway.client);
    std::thread::scope(|scope| {
        let client = || {
            while !over.load(Ordering::SeqCst) {
                let answer = client::post(at, CHAT, ASK);
                assert_eq!((answer.status, answer.stream_end()), (200, Ok(())), "{}", answer.text());
            }
        };
        let clients: Vec<_> = (0..4).map(|_| scope.spawn(client)).collect();
        // So that a failure here ends the clients, too.
        let changes = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let more = |worker: &Worker| {
                let before = worker.finished();
                eventually("the worker to get more", || (worker.finished() > before + 4).then_some(()));
            };
            let answer = gateway.order("POST", "workers", &joining("w/1", &url(&second)));
            assert_eq!(answer.status, 201, "{}", answer.text());
            assert_eq!(said(&answer, "w/1").expect("it is there")["url"], url(&second));
            more(&second);

            let answer = gateway.order("POST", "workers/w0/drain", "");
            assert_eq!((answer.status, &said(&answer, "w0").unwrap()["draining"]), (200, &Value::from(true)));
            let sent = || said(&gateway.admin("workers"), "w0").unwrap()["sent_requests"].as_u64();
            eventually("what runs there to end", || (sent() == Some(0)).then_some(()));
            let until_then = first.finished();
            more(&second);
            assert_eq!(first.finished(), until_then, "it drains");
            assert_eq!(gateway.order("POST", "workers/w0/resume", "").status, 200);
            more(&first);

            // A name may hold a slash.
            let answer = gateway.order("DELETE", "workers/w%2F1", "");
            assert_eq!(answer.status, 202, "{}", answer.text());
            until_gone(&gateway, "w/1");
            more(&first);
        }));
        over.store(true, Ordering::SeqCst);
        clients.into_iter().for_each(|client| client.join().expect("no request is lost"));
        changes.expect("the workers change");
    });
    assert!(!client::get(gateway.ops, "/metrics").text().contains("worker=\"w/1\""), "its series are gone with it");
}

#[test]
fn an_answer_under_way_goes_on_while_its_worker_leaves() {
    let [first, slow] = [Worker::start(&["--model", "m"]), Worker::start(&["--model", "m", "--speed", "0.05"])];
    let gateway = gateway(&[&first]);
    gateway.order("POST", "workers", &joining("slow", &url(&slow)));
    until_up(&gateway, "slow");
    assert_eq!(gateway.order("POST", "workers/w0/drain", "").status, 200);
    let mut leaving = client::Connection::to(gateway.client);
    leaving.post(CHAT, &[], ASK.replace("\"max_tokens\":8", "\"max_tokens\":40").as_bytes());
    leaving.until(b"data:");
    assert_eq!(gateway.order("POST", "workers/w0/resume", "").status, 200);
    let answer = gateway.order("DELETE", "workers/slow", "");
    assert_eq!(said(&answer, "slow").expect("it has something to do")["sent_requests"], 1);
    let message = refused(&gateway.order("POST", "workers/slow/resume", ""), 409);
    assert!(message.contains("about to leave"), "{message}");
    assert_eq!(gateway.order("DELETE", "workers/slow", "").status, 202, "asked twice");
    let message = refused(&gateway.order("POST", "workers", &joining("slow", "http://127.0.0.1:1")), 409);
    assert!(message.contains("`slow` is taken"), "{message}");
    assert_eq!(gateway.post(CHAT, ASK).header("x-forebay-worker"), Some("w0"));
    slow.speed(1000.0);
    leaving.until(b"data: [DONE]");
    until_gone(&gateway, "slow");
    assert_eq!(gateway.order("POST", "workers", &joining("slow", &url(&slow))).status, 201);
    until_up(&gateway, "slow");
    assert_eq!(said(&gateway.admin("workers"), "slow").unwrap()["draining"], false);
}

#[test]
fn who_joined_is_kept_over_a_crash_and_who_left_is_not() {
    let workers = [Worker::start(&["--model", "m"]), Worker::start(&["--model", "m"])];
    let mut gateway = gateway(&[&workers[0]]);
    let answer = gateway.order("POST", "workers", &joining("kept", &url(&workers[1])));
    assert_eq!(answer.status, 201, "{}", answer.text());
    gateway.process.signal("KILL");
    gateway.process.wait();
    let file = gateway.directory.path().join("forebay.toml");
    let restart = |environment: &[(&str, &str)]| {
        let arguments = ["serve", "--config", file.to_str().expect("UTF-8")];
        let mut process = Process::start(&arguments, gateway.directory.path(), environment);
        let ops: SocketAddr = process.line(|line| line.split("operators: http://").nth(1)?.trim().parse().ok());
        (process, ops)
    };
    let key = gateway.owner_key();
    let (process, ops) = restart(&[]);
    let answer = client::order(ops, &key, "GET", "workers", "");
    assert_eq!(said(&answer, "kept").expect("it was kept")["url"], url(&workers[1]));
    assert_eq!(client::order(ops, &key, "DELETE", "workers/kept", "").status, 202);
    process.signal("KILL");
    drop(process);
    let (process, ops) = restart(&[]);
    assert!(said(&client::order(ops, &key, "GET", "workers", ""), "kept").is_none(), "it had left");
    drop(process);

    // What cannot be read is not taken for nobody.
    let kept = gateway.directory.path().join("data/workers.json");
    std::fs::write(&kept, "[{\"model\":\"m\"").expect("written");
    let (code, _, err) = run(&["serve"], gateway.directory.path(), &[]);
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("workers.json` does not hold the workers that joined: mend or remove it"), "{err}");
    assert_eq!(std::fs::read_to_string(&kept).expect("there"), "[{\"model\":\"m\"");
    // A worker that the rules do not allow any more does not keep the others from being served.
    std::fs::write(
        &kept,
        r#"[{"model":"m","worker":{"url":"nowhere","name":"bad"}},{"model":"gone","worker":{"url":"http://a"}}]"#,
    )
    .expect("written");
    let (process, ops) = restart(&[]);
    eventually("the bad ones to be named", || {
        process.err().contains("a worker that joined by call is left out").then_some(())
    });
    assert!(process.err().contains("a worker that joined by call has no model"), "{}", process.err());
    assert_eq!(client::order(ops, &key, "DELETE", "workers/bad", "").status, 202);
    assert!(!std::fs::read_to_string(&kept).expect("there").contains("bad"));
    // Nor does one that was given no name and whose key is gone, and it has a name to be removed by.
    drop(process);
    let (process, ops) = restart(&[("KEY", "secret")]);
    let unnamed = r#"{"model":"m","worker":{"url":"http://127.0.0.1:1","api_key":{"env":"KEY"}}}"#;
    assert_eq!(client::order(ops, &key, "POST", "workers", unnamed).status, 201);
    drop(process);
    let (process, ops) = restart(&[]);
    assert!(said(&client::order(ops, &key, "GET", "workers", ""), "127.0.0.1:1").is_none());
    assert_eq!(client::order(ops, &key, "DELETE", "workers/127.0.0.1:1", "").status, 202);
    assert!(!std::fs::read_to_string(&kept).expect("there").contains("127.0.0.1:1"));
    drop(process);

    // What could not be read again is not written.
    let secret = "x".repeat((16 << 20) - 100);
    let large = json!([{"model": "m", "worker": {"name": "large", "url": "http://127.0.0.1:1", "api_key": secret}}]);
    std::fs::write(&kept, large.to_string()).expect("written");
    let (process, ops) = restart(&[]);
    let answer = client::order(ops, &key, "POST", "workers", &joining("more", "http://127.0.0.1:1"));
    assert!(refused(&answer, 409).contains("say more than can be kept"), "{}", answer.text());
    assert!(!std::fs::read_to_string(&kept).expect("there").contains("more"));
    assert_eq!(client::order(ops, &key, "DELETE", "workers/large", "").status, 202);
    drop(process);

    // There is a bound.
    let many: Vec<Value> =
        (0..1024).map(|n| json!({"model": "m", "worker": {"url": format!("nowhere-{n}")}})).collect();
    std::fs::write(&kept, Value::from(many).to_string()).expect("written");
    let (process, ops) = restart(&[]);
    let answer = client::order(ops, &key, "POST", "workers", &joining("more", "http://127.0.0.1:1"));
    assert!(refused(&answer, 409).contains("1024 workers have joined, which is the most"), "{}", answer.text());
    drop(process);
}

#[test]
fn a_configured_worker_stays_when_a_call_of_its_name_is_removed() {
    let [first, second] = [Worker::start(&["--model", "m"]), Worker::start(&["--model", "m"])];
    let gateway = gateway(&[&first]);
    assert_eq!(gateway.order("POST", "workers", &joining("w1", &url(&second))).status, 201);
    gateway.configure("", &model("m", &[second.address, first.address], ""));
    let at = |gateway: &Gateway| said(&gateway.admin("workers"), "w1").map(|worker| worker["url"].clone());
    eventually("the configuration to have the name", || (at(&gateway)? == url(&first)).then_some(()));
    until_up(&gateway, "w1");
    assert_eq!(gateway.order("POST", "workers/w1/drain", "").status, 200);
    let answer = gateway.order("DELETE", "workers/w1", "");
    assert_eq!((answer.status, &answer.json()["workers"]), (202, &json!([])), "{}", answer.text());
    let file = gateway.directory.path().join("data/workers.json");
    assert_eq!(std::fs::read_to_string(file).expect("kept"), "[]");
    assert_eq!(said(&gateway.admin("workers"), "w1").unwrap()["draining"], true, "as it was told itself");
    assert_eq!(gateway.order("POST", "workers/w1/resume", "").status, 200, "it does not leave");
    let message = refused(&gateway.order("DELETE", "workers/w1", ""), 409);
    assert!(message.contains("`w1` is not a worker that joined by call"), "{message}");
}

#[test]
fn what_is_no_worker_or_stands_already_is_refused() {
    let worker = Worker::start(&["--model", "m"]);
    let gateway = gateway(&[&worker]);
    let ranks = json!({"model": "other", "worker": {"name": "r", "url": "http://127.0.0.1:1", "data_parallel": 2, "engine": "vllm"}});
    let answer = gateway.order("POST", "workers", &ranks.to_string());
    assert_eq!(answer.status, 201, "an alias names the model: {}", answer.text());
    assert!(said(&answer, "r/0").is_some() && said(&answer, "r/1").is_some(), "{}", answer.text());
    let here = url(&worker);
    for (status, body, expect) in [
        (400, "{", "The body must be"),
        (400, "[]", "The body must be"),
        (400, r#"{"model":"m"}"#, "missing field `worker`"),
        (400, r#"{"model":"m","worker":{"url":"http://a"},"x":1}"#, "unknown field `x`"),
        (400, r#"{"model":"m","worker":{}}"#, "url is missing: write the worker's address"),
        (400, r#"{"model":"m","worker":{"url":"gpu-a:8000"}}"#, "must begin with http://"),
        (400, r#"{"model":"m","worker":{"url":"http://a","engin":"vllm"}}"#, "did you mean `engine`?"),
        (400, r#"{"model":"m","worker":{"url":"http://a","gpus":["gpu-a/0"]}}"#, "gpus[0] is"),
        (404, r#"{"model":"n","worker":{"url":"http://a"}}"#, "`n` is no configured model; there are `m`"),
        (409, &joining("w0", "http://127.0.0.1:2"), "The name `w0` is taken"),
        (409, &joining("r/1", "http://127.0.0.1:2"), "The name `r/1` is taken"),
        (409, &joining("again", &here), "serves `m` already"),
        (413, &joining(&"x".repeat(64 << 10), &here), "larger than the 65536 bytes"),
    ] {
        let message = refused(&gateway.order("POST", "workers", body), status);
        assert!(message.contains(expect), "{body}: {message}");
    }
    for (status, method, path, expect) in [
        (404, "POST", "workers/nobody/drain", "There is no worker `nobody`."),
        (404, "POST", "workers/nobody/resume", "There is no worker `nobody`."),
        (404, "DELETE", "workers/nobody", "There is no worker `nobody`."),
        (409, "DELETE", "workers/w0", "`w0` is not a worker that joined by call"),
        (409, "DELETE", "workers/r%2F0", "`r/0` is not a worker that joined by call"),
        (405, "PUT", "workers", "not for this method"),
        (400, "DELETE", "workers/%FF", "UTF-8"),
        (400, "GET", "decisions/%FF", "UTF-8"),
    ] {
        let message = refused(&gateway.order(method, path, ""), status);
        assert!(message.contains(expect), "{method} {path}: {message}");
    }
    // One rank may drain by itself.
    let answer = gateway.order("POST", "workers/r%2F1/drain", "");
    assert!(said(&answer, "r/0").is_none() && said(&answer, "r/1").unwrap()["draining"] == true, "{}", answer.text());
    assert_eq!(said(&gateway.admin("workers"), "r/0").unwrap()["draining"], false);
    gateway.order("POST", "workers/r/drain", "");
    let answer = gateway.order("POST", "workers/r%2F0/resume", "");
    assert_eq!(said(&answer, "r/0").unwrap()["draining"], false, "{}", answer.text());
    let file = gateway.directory.path().join("data/workers.json");
    let kept: Value = serde_json::from_str(&std::fs::read_to_string(file).expect("kept")).expect("JSON");
    assert_eq!(kept.as_array().map(Vec::len), Some(1), "what is refused is not kept: {kept}");
}

#[test]
fn workers_that_come_and_go_leave_no_series() {
    let worker = Worker::start(&["--model", "m"]);
    let gateway = gateway(&[&worker]);
    let series = || client::get(gateway.ops, "/metrics").text().lines().filter(|line| line.contains("worker=")).count();
    let alone = series();
    assert!(alone > 0);
    for round in 0..20 {
        let name = format!("passing-{round}");
        assert_eq!(gateway.order("POST", "workers", &joining(&name, "http://127.0.0.1:1")).status, 201);
        assert_eq!(series(), 2 * alone);
        let answer = gateway.order("DELETE", &format!("workers/{name}"), "");
        let drains = said(&answer, &name).is_some_and(|worker| worker["draining"] == true);
        assert!(answer.status == 202 && drains, "idle, it is told of all the same: {}", answer.text());
        until_gone(&gateway, &name);
    }
    assert_eq!(series(), alone);
}

#[test]
fn the_command_line_changes_workers() {
    let [first, second] = [Worker::start(&["--model", "m"]), Worker::start(&["--model", "m"])];
    let gateway = gateway(&[&first]);
    let at = format!("http://{}", gateway.ops);
    let forebay = |arguments: &[&str]| {
        let all = [&["workers", "--url", &at, "--data-dir", "data"], arguments].concat();
        run(&all, gateway.directory.path(), &[])
    };
    let (code, out, err) = forebay(&["add", "m", &url(&second), "--name", "more", "engine=vllm", "token_ids=true"]);
    assert_eq!((code, out.contains("more")), (0, true), "{out}{err}");
    until_up(&gateway, "more");
    let (code, out, err) = forebay(&["drain", "more", "--json"]);
    let json: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!((code, &json["workers"][0]["draining"]), (0, &Value::from(true)), "{out}{err}");
    let (_, out, _) = forebay(&[]);
    assert!(out.lines().any(|line| line.contains("more") && line.contains("draining")), "{out}");
    assert_eq!(forebay(&["resume", "more"]).0, 0);
    let (code, out, err) = forebay(&["remove", "more"]);
    assert_eq!((code, &*out), (0, "more leaves as soon as it has nothing any more\n"), "{err}");
    until_gone(&gateway, "more");
    let (code, _, err) = forebay(&["remove", "w0"]);
    assert!(code == 1 && err.contains("`w0` is not a worker that joined by call"), "{code}: {err}");
    let (code, _, err) = forebay(&["add", "m", "nowhere"]);
    assert!(code == 1 && err.contains("must begin with http://"), "{code}: {err}");
    let (code, _, err) = forebay(&["add", "m", "http://a", "engine"]);
    assert!(code == 2 && err.contains("a key, `=` and a value are wanted"), "{code}: {err}");
    for twice in [&["name=foo", "--name", "bar"][..], &["url=http://b"], &["engine=vllm", "engine=tgi"]] {
        let (code, _, err) = forebay(&[&["add", "m", "http://a"], twice].concat());
        assert!(code == 2 && err.contains("is given twice"), "{code}: {err}");
    }
    for showing in [&["--watch"][..], &["--decision", "x"]] {
        let (code, _, err) = forebay(&[showing, &["drain", "w0"]].concat());
        assert!(code == 2 && err.contains("--watch and --decision show"), "{code}: {err}");
    }
    assert_eq!(said(&gateway.admin("workers"), "w0").unwrap()["draining"], false);
}
