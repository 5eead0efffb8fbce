//! `forebay replay`: what it sends, what it measures, and what it says when something is wrong.

use std::path::Path;

use crate::support::body::{FINISH, delta};
use crate::support::process::{Gateway, Worker, run, tokenizer};
use crate::support::recorder::{Recorder, Step, json, stream};

/// Four rows; the first two share 32 tokens, the last has no ids.
const TRACE: &str = r#"{"t_ms":0,"in_tokens":40,"out_tokens":3,"hash_ids":[7,8,9],"class":"batch"}
{"t_ms":20,"in_tokens":50,"out_tokens":2,"hash_ids":[7,8,10,11]}
{"t_ms":20,"in_tokens":33,"out_tokens":0,"hash_ids":[12,13,14]}
{"t_ms":40,"in_tokens":17,"out_tokens":5}
"#;

struct Replay {
    directory: tempfile::TempDir,
}

impl Replay {
    fn new(trace: &str) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::write(directory.path().join("trace.jsonl"), trace).expect("a file");
        Self { directory }
    }

    fn run(&self, url: &str, more: &[&str]) -> (i32, String, String) {
        let arguments = [&["replay", "--trace", "trace.jsonl", "--model", "m", "--url", url], more].concat();
        run(&arguments, self.directory.path(), &[("OPENAI_API_KEY", "sk-replay")])
    }

    fn report(&self) -> serde_json::Value {
        let text = std::fs::read(self.directory.path().join("out/report.json")).expect("a report");
        serde_json::from_slice(&text).expect("JSON")
    }
}

fn answer() -> Vec<Step> {
    stream(&[&delta("word"), FINISH])
}

#[test]
fn what_is_sent_is_what_the_trace_says() {
    let recorder = Recorder::start("m", vec![answer()]);
    let replay = Replay::new(TRACE);
    let (code, out, err) = replay.run(&format!("http://{}/v1", recorder.address), &["--report", "out"]);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let mut posts = recorder.posts();
    let body = |post: &crate::support::recorder::Received| -> serde_json::Value {
        serde_json::from_slice(&post.body).expect("JSON")
    };
    // Rows that are due at one moment may overtake one another.
    posts.sort_by_key(|post| std::cmp::Reverse(body(post)["prompt"].as_array().map(Vec::len)));
    let sent: Vec<_> = posts.iter().map(body).collect();
    let lengths = |key: &str| -> Vec<_> { sent.iter().map(|body| body[key].clone()).collect() };
    assert_eq!(
        sent.iter().map(|body| body["prompt"].as_array().expect("ids").len()).collect::<Vec<_>>(),
        [50, 40, 33, 17]
    );
    assert_eq!(lengths("max_tokens"), [2, 3, 1, 5]);
    for (post, body) in posts.iter().zip(&sent) {
        assert_eq!((post.path(), post.header("authorization")), ("/v1/completions", Some("Bearer sk-replay")));
        assert_eq!((&body["model"], &body["ignore_eos"], &body["stream"]), (&"m".into(), &true.into(), &true.into()));
        assert_eq!(body["stream_options"]["include_usage"], true);
    }
    let classes: Vec<_> = posts.iter().map(|post| post.header("x-forebay-priority")).collect();
    assert_eq!(classes, [None, Some("batch"), None, None]);
    let ids = |at: usize| sent[at]["prompt"].as_array().expect("ids").as_slice();
    assert_eq!(ids(0)[..32], ids(1)[..32], "equal ids are equal tokens");
    assert_ne!(ids(0)[32..36], ids(1)[32..36]);
    assert_ne!(ids(0)[..4], ids(2)[..4]);

    let report = replay.report();
    assert_eq!((&report["prompts"], &report["held_back"]), (&"token ids".into(), &0.into()), "{report}");
    let cell = &report["cells"][0];
    assert_eq!(
        (&cell["requests"], &cell["completed"], &cell["within_slo"]),
        (&4.into(), &4.into(), &1.0.into()),
        "{cell}"
    );
    assert!(cell["e2e_ms"]["mean"].as_f64() >= cell["ttft_ms"]["mean"].as_f64(), "{cell}");
    assert!(out.contains("4 completed, 0 shed, 0 timed out, 0 refused, 0 failed"), "{out}");
}

#[test]
fn text_prompts_are_counted_as_the_trace_says_and_caches_are_told() {
    let worker = Worker::start(&["--model", "m"]);
    let gateway = Gateway::before(&[worker.address]);
    let replay = Replay::new(TRACE);
    let own = tokenizer();
    let url = format!("http://{}", gateway.client);
    let arguments = ["--tokenizer", own.to_str().expect("UTF-8"), "--report", "out", "--rate", "0.5"];
    let (code, out, err) = replay.run(&url, &arguments);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let report = replay.report();
    assert_eq!((&report["prompts"], &report["prompt_tokens_off"]), (&"text".into(), &0.into()), "{report}");
    assert_eq!(report["workers"], serde_json::json!({"w0": 4}));
    let hits = report["cells"][0]["hit_ratio_tokens"].as_f64().expect("cached tokens are told");
    assert!((hits - 32.0 / 140.0).abs() < 1e-9, "{hits}");
    assert!(out.contains("answers by worker: w0 4"), "{out}");
    let counted: Vec<_> = gateway.rows().iter().map(|row| row["prompt_tokens"].as_u64().expect("tokens")).collect();
    assert_eq!(counted.iter().sum::<u64>(), 140, "{counted:?}");

    // The same again, now all in the cache but what is in no full block.
    let (code, out, err) = replay.run(&url, &[&arguments[..], &["--rows", "2", "--json"]].concat());
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let report: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!((&report, report["cells"][0]["requests"].as_u64()), (&replay.report(), Some(2)));
    assert!(report["cells"][0]["hit_ratio_tokens"].as_f64() > Some(0.8), "{report}");
}

#[test]
fn what_goes_wrong_is_counted_and_said() {
    let error = r#"{"error":{"message":"no room","type":"server_error","param":null,"code":null}}"#;
    let scripts = vec![
        json("503 Service Unavailable", error),
        json("400 Bad Request", error),
        stream(&[&delta("half")]),
        answer(),
    ];
    let recorder = Recorder::start("m", scripts);
    let replay = Replay::new(&TRACE.replace("\"t_ms\":20,\"in_tokens\":33", "\"t_ms\":30,\"in_tokens\":33"));
    // One at a time, so that each row meets its own script.
    let url = format!("http://{}", recorder.address);
    let (code, out, err) = replay.run(&url, &["--concurrency", "1", "--rate", "0.2", "--report", "out"]);
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains("1 completed, 1 shed, 0 timed out, 1 refused, 1 failed"), "{out}");
    for words in
        ["first shed: 503 Service Unavailable: no room", "first failed: the stream broke off", "first refused: 400"]
    {
        assert!(out.contains(words), "no `{words}` in\n{out}");
    }
    assert_eq!(replay.report()["cells"][0]["within_slo"], 0.5, "against all that arrived");

    let held =
        Recorder::start("m", vec![[vec![Step::Pause(std::time::Duration::from_millis(200))], answer()].concat()]);
    let (code, out, err) = replay.run(&format!("http://{}", held.address), &["--concurrency", "1"]);
    assert_eq!(code, 0, "{out}{err}");
    assert!(err.contains("1 requests are under way, the next is held back"), "{err}");
    assert!(out.contains("note: 3 requests were held back") && out.contains(" ms late"), "{out}");

    let (code, out, err) = replay.run("http://127.0.0.1:1", &[]);
    assert_eq!(code, 1, "{out}");
    assert!(err.contains("no request was answered") && out.contains("4 failed"), "{out}{err}");
    assert!(out.contains("first failed: Connection refused"), "{out}");
}

#[test]
fn wrong_use_is_told_before_anything_is_sent() {
    let recorder = Recorder::start("m", vec![answer()]);
    let url = format!("http://{}", recorder.address);
    let replay = Replay::new(TRACE);
    for (more, code, says) in [
        (&["--rate", "0"][..], 2, "--rate"),
        (&["--rows", "0"], 2, "--rows"),
        (&["--concurrency", "0"], 2, "--concurrency"),
        (&["--tokenizer", "nowhere"], 1, "cannot load the tokenizer in `nowhere`"),
    ] {
        let (got, out, err) = replay.run(&url, more);
        assert_eq!(got, code, "{more:?}: {out}{err}");
        assert!(err.contains(says), "{more:?}: {err}");
    }
    let (code, _, err) = replay.run("ftp://here", &[]);
    assert_eq!(code, 2, "{err}");
    let unsorted =
        Replay::new("{\"t_ms\":5,\"in_tokens\":1,\"out_tokens\":1}\n{\"t_ms\":4,\"in_tokens\":1,\"out_tokens\":1}\n");
    let (code, _, err) = unsorted.run(&url, &[]);
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("trace.jsonl:2") && err.contains("sorted"), "{err}");
    assert!(recorder.posts().is_empty());
    assert!(!Path::new("out").exists());
}
