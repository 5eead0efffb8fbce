//! A changed configuration, by SIGHUP and by the file itself: what is taken over, and what stays.

use std::net::SocketAddr;

use crate::support::body::{ANSWER, chat, held, held_stream, long, streamed};
use crate::support::client::{self, Connection};
use crate::support::eventually;
use crate::support::process::{Gateway, Worker, tokenizer};
use crate::support::recorder::{Recorder, json};

fn model(extra: &str, workers: &[(&str, SocketAddr)]) -> String {
    let tokenizer =
        if extra.contains("tokenizer") { String::new() } else { format!("tokenizer = {:?}\n", tokenizer()) };
    let mut text = format!("[[model]]\nname = \"m\"\n{tokenizer}{extra}\n");
    for (name, address) in workers {
        text += &format!("[[model.worker]]\nname = \"{name}\"\nurl = \"http://{address}\"\n");
    }
    text
}

fn recorder() -> Recorder {
    Recorder::start("m", vec![json("200 OK", ANSWER)])
}

fn until_up(gateway: &Gateway, worker: &str) {
    let up = format!("forebay_worker_up{{worker=\"{worker}\"}}");
    eventually("the worker to be up", || (gateway.metric(&up) == 1.0).then_some(()));
}

/// Asks until this worker answers.
fn until_served_by(gateway: &Gateway, worker: &str) {
    eventually("an answer from that worker", || {
        let answer = gateway.post("/v1/chat/completions", &chat("hello", ""));
        assert_eq!(answer.status, 200, "{}", answer.text());
        (answer.header("x-forebay-worker") == Some(worker)).then_some(())
    });
}

fn until_said(gateway: &Gateway, text: &str) {
    eventually("a line on standard error", || gateway.process.err().contains(text).then_some(()));
}

#[test]
fn workers_come_and_go() {
    let (old, new) = (recorder(), recorder());
    let gateway = Gateway::start(&model("", &[("old", old.address)]));
    until_served_by(&gateway, "old");

    gateway.configure("", &model("", &[("old", old.address), ("new", new.address)]));
    gateway.process.signal("HUP");
    until_up(&gateway, "new");
    until_served_by(&gateway, "new");
    until_served_by(&gateway, "old");

    // What the one that leaves is at, it finishes; nothing new goes there.
    old.play_all(vec![held_stream(), held()]);
    new.play_all(vec![held_stream(), held()]);
    let mut stream = Connection::to(gateway.client);
    stream.post("/v1/chat/completions", &[], streamed("hello").as_bytes());
    stream.until(b"first");
    let busy_is_old = old.posts().last().is_some_and(|post| post.body.windows(6).any(|bytes| bytes == b"stream"));
    let (gone, stays) = if busy_is_old { (("old", &old), ("new", &new)) } else { (("new", &new), ("old", &old)) };
    stays.1.play(json("200 OK", ANSWER));
    gateway.configure("", &model("", &[(stays.0, stays.1.address)]));
    gateway.process.signal("HUP");
    until_said(&gateway, "worker left");
    let asked = gone.1.posts().len();
    for _ in 0..10 {
        until_served_by(&gateway, stays.0);
    }
    assert_eq!(gone.1.posts().len(), asked);
    gone.1.go_on();
    let answer = stream.answer();
    assert_eq!((answer.stream_end(), answer.header("x-forebay-worker")), (Ok(()), Some(gone.0)));
    assert_eq!(gateway.row_of(&answer)["outcome"], "completed");
    let scraped = client::get(gateway.ops, "/metrics").text();
    assert!(!scraped.contains(&format!("forebay_worker_up{{worker=\"{}\"}} 1", gone.0)), "it is gone: {scraped}");
}

#[test]
fn aliases_and_models_change_without_a_signal() {
    let worker = recorder();
    let gateway = Gateway::start(&model("", &[("w", worker.address)]));
    let ask =
        |name: &str| gateway.post("/v1/chat/completions", &chat("hi", "").replace(r#""m""#, &format!("{name:?}")));
    assert_eq!(ask("nickname").refusal(404), "model_not_found");
    gateway.configure("", &model("aliases = [\"nickname\"]", &[("w", worker.address)]));
    eventually("the changed file to be noticed", || (ask("nickname").status == 200).then_some(()));
    let last = worker.posts().pop().expect("a request");
    assert!(String::from_utf8_lossy(&last.body).starts_with(r#"{"model":"m","#), "the alias is the gateway's own");
    assert_eq!(client::get(gateway.client, "/v1/models/nickname").status, 200);
    assert_eq!(worker.posts().len(), 1);

    let renamed = model("", &[("w", worker.address)]).replace("name = \"m\"", "name = \"n\"");
    gateway.configure("", &renamed);
    eventually("the model to be gone", || (ask("m").status == 404).then_some(()));
    eventually("the worker to be asked who it is", || (ask("n").status == 200).then_some(()));
    assert_eq!(ask("nickname").refusal(404), "model_not_found");
}

#[test]
fn a_bad_file_changes_nothing_and_says_why() {
    let (old, new) = (recorder(), recorder());
    let gateway = Gateway::start(&model("", &[("old", old.address)]));
    let bad = model("queue_requests_max = 0", &[("new", new.address)]);
    gateway.configure("", &bad);
    gateway.process.signal("HUP");
    let file = gateway.directory.path().join("forebay.toml");
    let line = std::fs::read_to_string(&file).expect("the file").lines().position(|l| l.starts_with("queue_requests"));
    let place = format!("{}:{}:22: model[0].queue_requests_max is 0", file.display(), line.expect("the line") + 1);
    until_said(&gateway, &place);
    until_said(&gateway, "the old one stays");
    assert_eq!(gateway.post("/v1/chat/completions", &chat("hi", "")).header("x-forebay-worker"), Some("old"));
    assert!(new.posts().is_empty());

    // A file that names a tokenizer which is not there is as bad as one that cannot be read.
    let empty = tempfile::tempdir().expect("a directory");
    std::fs::write(empty.path().join("tokenizer.json"), "{}").expect("a file");
    let bad = model(&format!("tokenizer = {:?}", empty.path()), &[("new", new.address)]);
    gateway.configure("", &bad);
    gateway.process.signal("HUP");
    until_said(&gateway, "cannot load the tokenizer");
    assert_eq!(gateway.post("/v1/chat/completions", &chat("hi", "")).header("x-forebay-worker"), Some("old"));

    gateway.configure("", &model("", &[("new", new.address)]));
    gateway.process.signal("HUP");
    until_up(&gateway, "new");
    until_served_by(&gateway, "new");
}

#[test]
fn a_policy_is_taken_over() {
    let engines = [(); 2].map(|()| Worker::start(&["--model", "m"]));
    let workers = [("first", engines[0].address), ("second", engines[1].address)];
    let gateway = Gateway::start(&model("policy = \"round-robin\"", &workers));
    until_up(&gateway, "first");
    until_up(&gateway, "second");
    let served = |prompt: &str, count: usize| -> Vec<String> {
        let body = chat(&long(prompt), r#","max_tokens":1"#);
        let ask = || gateway.post("/v1/chat/completions", &body);
        let name = |answer: &client::Answer| answer.header("x-forebay-worker").expect("a worker").to_owned();
        (0..count).map(|_| name(&ask())).collect()
    };
    let in_turn = served("one", 6);
    assert!(in_turn.windows(2).all(|pair| pair[0] != pair[1]), "{in_turn:?}");

    gateway.configure("", &model("policy = \"forebay\"", &workers));
    gateway.process.signal("HUP");
    until_said(&gateway, "configuration reloaded");
    let held = served("two", 6);
    assert!(held.windows(2).all(|pair| pair[0] == pair[1]), "it stays where the prompt is cached: {held:?}");

    // A policy that there is not changes nothing and says so.
    gateway.configure("", &model("policy = \"fastest\"", &workers));
    gateway.process.signal("HUP");
    until_said(&gateway, "must be one of forebay, round-robin, least-requests");
    assert_eq!(served("two", 1), held[..1]);
}

#[test]
fn what_only_a_start_can_set_stays() {
    let worker = recorder();
    let gateway = Gateway::start(&model("", &[("w", worker.address)]));
    let file = gateway.directory.path().join("forebay.toml");
    let text = std::fs::read_to_string(&file).expect("the file");
    let changed =
        text.replace("\nlisten = \"127.0.0.1:0\"", "\nlisten = \"127.0.0.1:1\"").replace("\"data\"", "\"other\"")
            + "\n[[model.worker]]\nname = \"second\"\nurl = \"http://127.0.0.1:1\"\n";
    std::fs::write(&file, changed).expect("the file is written");
    gateway.process.signal("HUP");
    until_said(&gateway, "server.listen stays 127.0.0.1:0: 127.0.0.1:1 needs a restart");
    until_said(&gateway, "server.data_dir stays");
    assert!(!gateway.directory.path().join("other").exists());
    // The rest of the file holds.
    eventually("the second worker", || {
        client::get(gateway.ops, "/metrics").text().contains("forebay_worker_up{worker=\"second\"}").then_some(())
    });
    assert_eq!(gateway.post("/v1/chat/completions", &chat("hi", "")).status, 200);
}
