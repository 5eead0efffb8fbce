//! When a request is sent, and where: bounds of the queue, deadlines, classes, spread and stickiness.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::support::body::{ANSWER, chat, held, long, wide};
use crate::support::client::{self, Answer, Connection, post_with};
use crate::support::eventually;
use crate::support::process::{Gateway, Worker, model, tokenizer};
use crate::support::recorder::{Recorder, Step, json};

/// A gateway whose only worker holds as much as is sent there, and the client that waits for it.
struct Full {
    recorder: Recorder,
    gateway: Gateway,
    first: Connection,
}

impl Full {
    fn start(extra: &str) -> Self {
        let recorder = Recorder::start("m", vec![held()]);
        let extra = format!("tokenizer = {:?}\n{extra}", tokenizer());
        let gateway = Gateway::start(&model("m", &[recorder.address], &extra));
        let mut first = Connection::to(gateway.client);
        first.post("/v1/completions", &[], wide("first").as_bytes());
        recorder.await_posts(1);
        Self { recorder, gateway, first }
    }

    fn ask(&self, headers: &[&str], body: &str) -> Connection {
        let mut connection = Connection::to(self.gateway.client);
        connection.post("/v1/completions", headers, body.as_bytes());
        connection
    }
}

#[test]
fn a_deadline_is_kept_in_the_queue_and_at_the_worker() {
    let full = Full::start("");
    let began = Instant::now();
    let answer =
        post_with(full.gateway.client, "/v1/chat/completions", &["x-forebay-deadline-ms: 300"], &chat("hi", ""));
    let took = began.elapsed();
    assert_eq!(answer.refusal(504), "deadline_exceeded");
    assert!(answer.text().contains("The request's deadline passed"), "{}", answer.text());
    assert_eq!(answer.header("x-should-retry"), Some("false"));
    assert!((300..3000).contains(&took.as_millis()), "{took:?}");
    assert_eq!(full.recorder.posts().len(), 1, "it never left the queue");
    let explained = full.gateway.admin(&format!("decisions/{}", answer.header("x-request-id").unwrap())).json();
    assert_eq!(explained["refusal"]["reason"], "deadline_passed", "{explained}");
    let row = full.gateway.row_of(&answer);
    assert_eq!((&row["status"], &row["outcome"]), (&504.into(), &"refused".into()), "{row}");
    assert!(row["queue_ms"].as_f64() >= Some(250.0), "{row}");

    let recorder = Recorder::start("m", vec![vec![Step::AwaitClose]]);
    let gateway = Gateway::before(&[recorder.address]);
    let began = Instant::now();
    let answer = post_with(gateway.client, "/v1/chat/completions", &["x-forebay-deadline-ms: 300"], &chat("hi", ""));
    let took = began.elapsed();
    assert_eq!(answer.refusal(504), "deadline_exceeded");
    assert!((300..3000).contains(&took.as_millis()), "{took:?}");
    recorder.closed(0);
    assert_eq!(recorder.posts().len(), 1, "it is not tried again");
}

#[test]
fn a_deadline_that_cannot_be_kept_is_refused_before_any_work() {
    let worker = Worker::start(&["--model", "m", "--speed", "1", "--prefill-tokens-per-s", "4000"]);
    let gateway = Gateway::before(&[worker.address]);
    // Its speed has to be measured first: a guess is no reason to refuse.
    let mut asked = 0;
    eventually("the worker's speed to be measured", || {
        asked += 1;
        let body = chat(&long(&format!("number {asked}")), r#","max_tokens":1,"stream":true"#);
        assert_eq!(gateway.post("/v1/chat/completions", &body).status, 200);
        (gateway.admin("workers").json()["workers"][0]["rate_measured"] == true).then_some(())
    });
    let finished = worker.finished();
    let headers = ["x-forebay-deadline-ms: 60", "x-request-id: hopeless"];
    let answer = post_with(gateway.client, "/v1/chat/completions", &headers, &chat(&long("hopeless"), ""));
    assert_eq!(answer.refusal(504), "deadline_exceeded");
    let explained = gateway.admin("decisions/hopeless").json();
    assert!(answer.text().contains("even if nothing waits before it"), "{}", answer.text());
    assert_eq!(answer.header("retry-after"), None, "later is no better");
    assert_eq!(explained["refusal"]["reason"], "deadline_too_short", "{explained}");
    assert_eq!(explained["sent"].as_array().map(Vec::len), Some(0), "{explained}");
    let decision = &explained["decisions"][0];
    assert_eq!((&decision["winner"], &decision["candidates"][0]["worker"]), (&().into(), &"w0".into()), "{explained}");
    assert_eq!(gateway.row_of(&answer)["attempts"], 0);
    assert_eq!((worker.finished(), worker.log()["sequences"]["aborted"].as_u64()), (finished, Some(0)));
    // One that can be kept is.
    let headers = ["x-forebay-deadline-ms: 15000"];
    let body = chat(&long("hopeful"), r#","max_tokens":1"#);
    assert_eq!(post_with(gateway.client, "/v1/chat/completions", &headers, &body).status, 200);
}

#[test]
fn a_deadline_that_passes_at_once_is_explained_too() {
    let full = Full::start("");
    let headers = ["x-forebay-deadline-ms: 1", "x-request-id: at-once"];
    let answer = post_with(full.gateway.client, "/v1/chat/completions", &headers, &chat(&long("at once"), ""));
    assert_eq!(answer.refusal(504), "deadline_exceeded");
    assert!(answer.text().contains("The request's deadline passed"), "{}", answer.text());
    let explained = full.gateway.admin("decisions/at-once").json();
    assert_eq!(explained["refusal"]["reason"], "deadline_passed", "{explained}");
}

#[test]
fn the_predicted_wait_counts_the_lane_and_the_measured_one_is_told_beside_it() {
    let full = Full::start("");
    let number = |answer: &Answer, name: &str| -> u64 {
        answer.header(name).and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("{name}: {answer:?}"))
    };
    let mut waiting = full.ask(&[], &wide(&long("waiting")));
    full.gateway.until_queued(1);
    // It is predicted by a guessed speed, 2000 tokens/s, and some 2 x 1200 tokens are before it.
    let mut second = full.ask(&[], &wide(&long("second")));
    full.gateway.until_queued(2);
    std::thread::sleep(Duration::from_millis(300));
    let Full { recorder, mut first, .. } = full;
    let mut answers = [&mut first, &mut waiting, &mut second].map(|connection| {
        recorder.go_on();
        connection.answer()
    });
    assert!(answers.iter().all(|answer| answer.status == 200), "{answers:?}");
    let [first, waiting, second] = &mut answers;
    let predicted = |answer: &Answer| number(answer, "x-forebay-predicted-wait-ms");
    let queued = |answer: &Answer| number(answer, "x-forebay-queue-ms");
    assert!(predicted(waiting) >= 500, "{waiting:?}");
    assert!(predicted(second) >= predicted(waiting) + 500, "{} {}", predicted(second), predicted(waiting));
    assert!(queued(first) < 250 && queued(waiting) >= 300 && queued(second) >= 300, "{answers:?}");
}

#[test]
fn a_full_queue_refuses_at_once() {
    let full = Full::start("queue_requests_max = 1\n");
    let mut waiting = full.ask(&[], &wide("waiting"));
    full.gateway.until_queued(1);
    let began = Instant::now();
    let answer = full.gateway.post("/v1/chat/completions", &chat("one too many", ""));
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert_eq!(answer.refusal(503), "server_is_overloaded");
    let wait = answer.header("retry-after").and_then(|value| value.parse::<u32>().ok());
    assert!(wait.is_some_and(|seconds| (1..=60).contains(&seconds)), "{:?}", answer.headers);
    assert_eq!(answer.header("x-should-retry"), None, "the client may come back");

    // Who matters more takes the place of who matters less.
    let mut urgent = full.ask(&["x-forebay-priority: interactive"], &wide("urgent"));
    assert_eq!(waiting.answer().refusal(503), "server_is_overloaded");
    let mut first = full.first;
    full.recorder.go_on();
    assert_eq!(first.answer().status, 200);
    full.recorder.go_on();
    assert_eq!(urgent.answer().status, 200);
    assert_eq!(full.recorder.posts().len(), 2);
}

#[test]
fn waiting_has_an_end() {
    let full = Full::start("queue_seconds_max = 1\n");
    let began = Instant::now();
    let answer = full.gateway.post("/v1/chat/completions", &chat("hi", ""));
    let took = began.elapsed();
    assert_eq!(answer.refusal(504), "deadline_exceeded");
    assert!(answer.text().contains("waited too long for a worker"), "{}", answer.text());
    assert!(answer.header("retry-after").is_some(), "{:?}", answer.headers);
    let explained = full.gateway.admin(&format!("decisions/{}", answer.header("x-request-id").unwrap())).json();
    assert_eq!(explained["refusal"]["reason"], "timed_out", "{explained}");
    let decisions = explained["decisions"].as_array().unwrap();
    assert_eq!(decisions.last().unwrap()["cause"], "expiry", "{explained}");
    assert!((1000..4000).contains(&took.as_millis()), "{took:?}");
    assert_eq!(full.recorder.posts().len(), 1);
}

#[test]
fn classes_go_in_order() {
    let full = Full::start("");
    let mut waiting = Vec::new();
    for class in ["batch", "default", "interactive"] {
        waiting.push(full.ask(&[&format!("x-forebay-priority: {class}")], &wide(class)));
        full.gateway.until_queued(waiting.len());
        assert_eq!(full.gateway.metric(&format!("forebay_queue_depth{{model=\"m\",class=\"{class}\"}}")), 1.0);
    }
    for sent in 2..=4 {
        full.recorder.go_on();
        full.recorder.await_posts(sent);
    }
    full.recorder.go_on();
    for mut connection in waiting {
        let answer = connection.answer();
        assert_eq!(answer.status, 200, "{}", answer.text());
        let waited: f64 = answer.header("x-forebay-queue-ms").and_then(|value| value.parse().ok()).expect("a number");
        let row = full.gateway.row_of(&answer);
        let counted = row["queue_ms"].as_f64().expect("a number");
        assert!((waited - counted).abs() <= 1.0, "{waited} {row}");
    }
    let order: Vec<String> = full.recorder.posts()[1..]
        .iter()
        .map(|post| serde_json::from_slice::<serde_json::Value>(&post.body).expect("JSON")["prompt"][0].to_string())
        .collect();
    assert_eq!(order, ["\"interactive\"", "\"default\"", "\"batch\""]);
}

#[test]
fn a_request_waits_for_a_worker_that_comes() {
    let recorder = Recorder::start("m", vec![held().split_off(1)]);
    recorder.set_healthy(false);
    let extra = format!("tokenizer = {:?}\n", tokenizer());
    let gateway = Gateway::start_unready("", &model("m", &[recorder.address], &extra), &[]);
    let mut early = Connection::to(gateway.client);
    early.post("/v1/chat/completions", &[], chat("hi", "").as_bytes());
    gateway.until_queued(1);
    assert_eq!(client::get(gateway.ops, "/readyz").status, 503);
    recorder.set_healthy(true);
    let answer = early.answer();
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(gateway.row_of(&answer)["queue_ms"].as_f64() > Some(0.0));
}

#[test]
fn without_a_worker_it_is_said_soon() {
    let recorder = Recorder::start("m", vec![held()]);
    recorder.set_healthy(false);
    let gateway = Gateway::start_unready("", &model("m", &[recorder.address], ""), &[]);
    let began = Instant::now();
    let answer = gateway.post("/v1/chat/completions", &chat("hi", ""));
    let took = began.elapsed();
    assert_eq!(answer.refusal(503), "no_worker");
    assert!(answer.header("retry-after").is_some(), "{:?}", answer.headers);
    assert!(took < Duration::from_secs(6), "{took:?}");
    assert!(recorder.posts().is_empty());
}

#[test]
fn what_was_waited_for_another_model_counts() {
    let answer = |name| json("200 OK", &ANSWER.replace("\"m\"", &format!("{name:?}")));
    let [ill, well] = ["m", "n"].map(|name| Recorder::start(name, vec![answer(name)]));
    ill.set_healthy(false);
    let fallback = "worker_grace_seconds = 1\n[[model.fallback]]\nto = \"n\"\n";
    let other = model("n", &[well.address], "").replace("\"w0\"", "\"n0\"");
    let gateway = Gateway::start_unready("", &(model("m", &[ill.address], fallback) + &other), &[]);
    eventually("the worker to be up", || (gateway.metric("forebay_worker_up{worker=\"n0\"}") == 1.0).then_some(()));
    let answer = gateway.post("/v1/chat/completions", &chat("hi", ""));
    assert_eq!((answer.status, answer.header("x-forebay-model")), (200, Some("n")), "{}", answer.text());
    let row = gateway.row_of(&answer);
    assert!(row["queue_ms"].as_f64() >= Some(900.0) && row["queue_ms"].as_f64() <= row["total_ms"].as_f64(), "{row}");
}

#[test]
fn equal_workers_share_different_work_and_equal_prefixes_stay_together() {
    let workers: Vec<Worker> = (0..2).map(|_| Worker::start(&["--model", "m", "--speed", "2"])).collect();
    let gateway = Gateway::before(&[workers[0].address, workers[1].address]);
    let up = |name| gateway.metric(&format!("forebay_worker_up{{worker=\"{name}\"}}")) == 1.0;
    crate::support::eventually("both workers", || (up("w0") && up("w1")).then_some(()));

    let mut asked: Vec<Connection> = (0..64).map(|_| Connection::to(gateway.client)).collect();
    for (number, connection) in asked.iter_mut().enumerate() {
        let body = chat(&format!("{number} is the gauge of the day, say why"), r#","max_tokens":16"#);
        connection.post("/v1/chat/completions", &[], body.as_bytes());
    }
    let mut spread = BTreeMap::<String, u32>::new();
    for mut connection in asked {
        let answer = connection.answer();
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert!(answer.header("x-forebay-predicted-wait-ms").is_some_and(|value| value.parse::<u64>().is_ok()));
        assert!(answer.header("x-forebay-queue-ms").is_some_and(|value| value.parse::<u64>().is_ok()));
        assert_eq!(answer.header("x-forebay-model"), Some("m"));
        *spread.entry(answer.header("x-forebay-worker").expect("a worker").to_owned()).or_default() += 1;
    }
    println!("64 different requests at once: {spread:?}");
    assert!(spread.values().all(|count| (20..=44).contains(count)) && spread.len() == 2, "{spread:?}");

    let prefix = long("one conversation");
    let placed: Vec<String> = (0..8)
        .map(|turn| {
            let answer = gateway.post("/v1/chat/completions", &chat(&format!("{prefix} {turn}"), r#","max_tokens":4"#));
            answer.header("x-forebay-worker").expect("a worker").to_owned()
        })
        .collect();
    assert!(placed.iter().all(|worker| *worker == placed[0]), "{placed:?}");
    assert!(gateway.metric("forebay_prefix_hit_tokens_total{model=\"m\"}") > 1000.0);
}
