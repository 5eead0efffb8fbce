//! `/metrics`: the names and labels that dashboards rely on, and that nothing a client sends makes a series.

use std::collections::{BTreeMap, BTreeSet};

use crate::support::body::{chat, held_stream, long, streamed};
use crate::support::client::{self, Connection, post_with};
use crate::support::eventually;
use crate::support::process::{Gateway, Worker, model, tokenizer};
use crate::support::recorder::Recorder;

/// Each series without its value: name and sorted label pairs.
fn series(text: &str) -> BTreeSet<(String, BTreeMap<String, String>)> {
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            let (series, value) = line.rsplit_once(' ').expect("a value");
            assert!(value.parse::<f64>().is_ok(), "{line}");
            let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
            let labels = labels.trim_end_matches('}').split("\",").filter(|pair| !pair.is_empty());
            let pair = |pair: &str| {
                let (key, value) = pair.split_once("=\"").expect("a pair");
                (key.to_owned(), value.trim_end_matches('"').to_owned())
            };
            (name.to_owned(), labels.map(pair).collect())
        })
        .collect()
}

fn scrape(gateway: &Gateway) -> String {
    let answer = client::get(gateway.ops, "/metrics");
    assert_eq!(answer.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    answer.text()
}

#[test]
fn names_and_labels_are_those_that_dashboards_know() {
    let workers = [(); 2].map(|()| Worker::start(&["--model", "m"]));
    let extra = format!("tokenizer = {:?}\n", tokenizer());
    let gateway = Gateway::start(&model("m", &[workers[0].address, workers[1].address], &extra));
    let text = long("the same twice");
    for stream in [true, false, true] {
        let body = chat(&text, &format!(r#","max_tokens":4,"stream":{stream}"#));
        assert_eq!(gateway.post("/v1/chat/completions", &body).status, 200);
    }
    workers[0].faults(r#"[{"kind":{"status":{"code":500}}}]"#);
    workers[1].faults(r#"[{"kind":{"status":{"code":500}}}]"#);
    assert_eq!(gateway.post("/v1/chat/completions", &chat("hi", "")).status, 502);

    let rows = eventually("all rows", || Some(gateway.rows()).filter(|rows| rows.len() == 4));
    let text = scrape(&gateway);
    let found = series(&text);
    for (name, labels) in [
        ("forebay_requests_total", &["api", "code", "model"][..]),
        ("forebay_request_seconds_bucket", &["api", "le", "model"]),
        ("forebay_ttft_seconds_bucket", &["le", "model"]),
        ("forebay_tpot_seconds_bucket", &["le", "model"]),
        ("forebay_queue_wait_seconds_bucket", &["class", "le"]),
        ("forebay_queue_depth", &["class", "model"]),
        ("forebay_tokens_total", &["kind", "model"]),
        ("forebay_prefix_hit_tokens_total", &["model"]),
        ("forebay_decision_seconds_bucket", &["le"]),
        ("forebay_worker_running", &["worker"]),
        ("forebay_worker_waiting", &["worker"]),
        ("forebay_worker_kv_usage_ratio", &["worker"]),
        ("forebay_worker_promised_tokens", &["worker"]),
        ("forebay_worker_up", &["worker"]),
        ("forebay_worker_health_score", &["worker"]),
        ("forebay_breaker_open", &["worker"]),
        ("forebay_retries_total", &["reason"]),
        ("forebay_tasks", &[]),
        ("forebay_retries_denied_total", &[]),
        ("forebay_failovers_total", &["reason"]),
        ("forebay_handovers_total", &["given"]),
    ] {
        let of_it: Vec<_> = found.iter().filter(|(known, _)| known == name).collect();
        assert!(!of_it.is_empty(), "no `{name}` in\n{text}");
        for (_, found) in of_it {
            assert_eq!(found.keys().map(String::as_str).collect::<Vec<_>>(), labels, "{name}");
        }
        let family = name.trim_end_matches("_bucket");
        assert!(text.contains(&format!("# HELP {family} ")), "no help for `{family}`");
        assert!(text.contains(&format!("# TYPE {family} ")), "no type for `{family}`");
    }
    assert!(found.iter().all(|(name, _)| name.starts_with("forebay_")), "{found:?}");

    let value = |start: &str| crate::support::process::metric(&text, start);
    assert_eq!(value("forebay_requests_total{model=\"m\",api=\"chat\",code=\"200\"}"), 3.0);
    assert_eq!(value("forebay_requests_total{model=\"m\",api=\"chat\",code=\"502\"}"), 1.0);
    assert_eq!(value("forebay_request_seconds_count{model=\"m\",api=\"chat\"}"), 4.0);
    assert_eq!(value("forebay_ttft_seconds_count{model=\"m\"}"), 2.0);
    assert_eq!(value("forebay_tpot_seconds_count{model=\"m\"}"), 2.0);
    assert_eq!(value("forebay_tokens_total{model=\"m\",kind=\"output\"}"), 12.0);
    let sum = |name: &str| -> f64 {
        rows.iter().filter(|row| row["outcome"] == "completed").filter_map(|row| row[name].as_f64()).sum()
    };
    assert_eq!(
        value("forebay_tokens_total{model=\"m\",kind=\"prompt\"}"),
        sum("prompt_tokens"),
        "what failed is not counted"
    );
    assert_eq!(value("forebay_tokens_total{model=\"m\",kind=\"cached\"}"), sum("cached_tokens"));
    assert!(sum("cached_tokens") > 1000.0 && value("forebay_prefix_hit_tokens_total{model=\"m\"}") > 1000.0);
    assert_eq!(value("forebay_retries_total{reason=\"status\"}"), 2.0, "the third failure was not tried again");
    // Three answers, and one request that was sent three times.
    assert_eq!(value("forebay_queue_wait_seconds_count{class=\"default\"}"), 6.0);
    assert!(value("forebay_decision_seconds_count") > 10.0);
}

#[test]
fn nothing_that_a_client_sends_makes_a_series() {
    let worker = Worker::start(&["--model", "m"]);
    let gateway = Gateway::before(&[worker.address]);
    let ask = |name: &str| {
        let body = chat("hi", r#","max_tokens":1"#).replace(r#""m""#, &format!("{name:?}"));
        post_with(gateway.client, "/v1/chat/completions", &[&format!("x-request-id: {name}")], &body).status
    };
    assert_eq!((ask("m"), ask("unheard-of")), (200, 404));
    eventually("both rows", || (gateway.rows().len() == 2).then_some(()));
    let before = series(&scrape(&gateway));
    for number in 0..20 {
        assert_eq!(ask(&format!("unheard-of-{number}")), 404);
        let path = format!("/v1/path-{number}");
        assert_eq!(gateway.post(&path, "{}").status, 404);
        assert_eq!(
            post_with(gateway.client, "/v1/chat/completions", &[&format!("x-forebay-priority: p{number}")], "{}")
                .status,
            400
        );
    }
    let text = scrape(&gateway);
    assert!(!text.contains("unheard-of") && !text.contains("path-"), "{text}");
    assert_eq!(
        crate::support::process::metric(&text, "forebay_requests_total{model=\"other\",api=\"chat\",code=\"404\"}"),
        21.0
    );
    let new: Vec<_> = series(&text).difference(&before).cloned().collect();
    // Only the code 400, which had not occurred before.
    assert!(new.len() == 1 && new[0].1.get("code").is_some_and(|code| code == "400"), "{new:?}");
}

#[test]
fn the_series_of_a_model_are_there_as_long_as_the_model() {
    let workers = [(); 2].map(|()| Worker::start(&["--model", "m"]));
    let tokenizer = format!("tokenizer = {:?}\n", tokenizer());
    let first = model("m", &[workers[0].address], &tokenizer);
    let second = model("n", &[workers[1].address], &tokenizer).replace("\"w0\"", "\"w1\"");
    let gateway = Gateway::start(&format!("{first}{second}"));
    let up = |worker: &str| gateway.metric(&format!("forebay_worker_up{{worker=\"{worker}\"}}")) == 1.0;
    let ask = |name: &str| {
        let body = streamed("hello").replace(r#""m""#, &format!("{name:?}"));
        gateway.post("/v1/chat/completions", &body).status
    };
    let of = |text: &str, name: &str| -> BTreeSet<_> {
        series(text).into_iter().filter(|(_, labels)| labels.get("model").is_some_and(|model| model == name)).collect()
    };
    eventually("both workers", || (up("w0") && up("w1")).then_some(()));
    assert_eq!((ask("m"), ask("n"), ask("n"), ask("x")), (200, 200, 200, 404));
    eventually("all rows", || (gateway.rows().len() == 4).then_some(()));
    let before = scrape(&gateway);
    assert!(of(&before, "n").len() > 50, "{before}");
    let answered = "forebay_requests_total{model=\"n\",api=\"chat\",code=\"200\"}";
    assert_eq!(crate::support::process::metric(&before, answered), 2.0);

    gateway.configure("", &first);
    gateway.process.signal("HUP");
    let after = eventually("the model's series to go", || {
        Some(scrape(&gateway)).filter(|text| of(text, "n").is_empty() && !text.contains("\"w1\""))
    });
    assert_eq!((of(&after, "m"), of(&after, "other")), (of(&before, "m"), of(&before, "other")), "the rest stays");
    for family in series(&after).into_iter().map(|(name, _)| name) {
        let name =
            ["_bucket", "_sum", "_count"].into_iter().find_map(|end| family.strip_suffix(end)).unwrap_or(&family);
        let kinds = after.lines().filter(|line| line.starts_with(&format!("# TYPE {name} "))).count();
        assert_eq!(kinds, 1, "{family}");
    }

    gateway.configure("", &format!("{first}{second}"));
    gateway.process.signal("HUP");
    eventually("the worker to be back", || up("w1").then_some(()));
    assert_eq!(ask("n"), 200);
    eventually("the answer to be counted", || (gateway.metric(answered) == 1.0).then_some(()));
}

#[test]
fn gauges_follow_the_workers() {
    let worker = Worker::start(&["--model", "m", "--speed", "1"]);
    let recorder = Recorder::start("m", vec![held_stream()]);
    let tokenizer = format!("tokenizer = {:?}\n", tokenizer());
    let second = model("n", &[recorder.address], &tokenizer).replace("\"w0\"", "\"recorder\"");
    let gateway = Gateway::start(&(model("m", &[worker.address], &tokenizer) + &second));
    let gauge = |name: &str, worker: &str| gateway.metric(&format!("forebay_{name}{{worker=\"{worker}\"}}"));
    eventually("both workers", || (gauge("worker_up", "w0") + gauge("worker_up", "recorder") == 2.0).then_some(()));
    assert_eq!(gauge("worker_running", "w0"), 0.0);

    let mut client = Connection::to(gateway.client);
    let body = chat(&long("running"), r#","max_tokens":20000,"ignore_eos":true,"stream":true"#);
    client.post("/v1/chat/completions", &[], body.as_bytes());
    eventually("the poll to see it run", || (gauge("worker_running", "w0") == 1.0).then_some(()));
    eventually("its share of the cache", || (gauge("worker_kv_usage_ratio", "w0") > 0.0).then_some(()));
    let scale = |name: &str, model: &str| gateway.metric(&format!("forebay_model_{name}{{model=\"{model}\"}}"));
    assert_eq!((scale("desired_workers", "m"), scale("idle_seconds", "m")), (1.0, 0.0));
    assert_eq!(scale("desired_workers", "n"), 0.0);
    drop(client);
    eventually("the poll to see it end", || (gauge("worker_running", "w0") == 0.0).then_some(()));
    assert_eq!(scale("desired_workers", "m"), 0.0);
    assert!(scale("idle_seconds", "m") > 0.0);

    // Promised until the first event; of a prompt that should be prefilled by now one token stays.
    recorder.play(crate::support::body::held());
    let mut client = Connection::to(gateway.client);
    client.post("/v1/chat/completions", &[], streamed(&long("promised")).replace(r#""m""#, r#""n""#).as_bytes());
    recorder.await_posts(1);
    let promised = gauge("worker_promised_tokens", "recorder");
    assert!(promised >= 1.0, "{promised}");
    assert!(scale("drain_seconds", "n") > 0.0 && scale("drain_seconds", "m") == 0.0);
    recorder.go_on();
    assert_eq!(client.answer().status, 200);
    eventually("nothing to be promised", || (gauge("worker_promised_tokens", "recorder") == 0.0).then_some(()));

    recorder.set_healthy(false);
    drop(worker);
    eventually("the dead worker to be noticed", || (gauge("worker_up", "w0") == 0.0).then_some(()));
    eventually("the sick worker to be noticed", || (gauge("worker_up", "recorder") == 0.0).then_some(()));
    assert_eq!(client::get(gateway.ops, "/readyz").status, 503);
}
