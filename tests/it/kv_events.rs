//! KV-cache events from engine to decision: what engines have in their caches by traffic that never passed this gateway
//! decides where its own requests go.

use std::net::SocketAddr;

use serde_json::{Value, json};

use super::support::client::{self, Answer};
use super::support::eventually;
use super::support::process::{Gateway, Worker, model, tokenizer};

const COMPLETIONS: &str = "/v1/completions";
const EVENTS: [&str; 4] = ["--kv-events", "tcp://127.0.0.1:0", "--kv-events-replay", "tcp://127.0.0.1:0"];
/// Tokens of every prompt here: 100 blocks of 16 and a rest.
const TOKENS: u64 = 1604;

fn worker(more: &[&str]) -> Worker {
    Worker::start(&[&["--model", "m"], more].concat())
}

/// A prompt that has no block in common with one of another number.
fn prompt(number: u64) -> Value {
    json!((0..TOKENS).map(|at| (number * 131 + at) % 5000).collect::<Vec<_>>())
}

fn request(prompt: &Value, salt: Option<&str>) -> String {
    json!({"model": "m", "prompt": prompt, "max_tokens": 1, "cache_salt": salt}).to_string()
}

/// Runs a prompt at an engine behind the gateway's back.
fn directly(worker: SocketAddr, prompt: &Value, salt: Option<&str>) {
    let answer = client::post(worker, COMPLETIONS, &request(prompt, salt));
    assert_eq!(answer.status, 200, "{}", answer.text());
}

/// What became of a request through the gateway: worker, tokens expected in its cache, tokens that were there.
fn through(gateway: &Gateway, prompt: &Value, salt: Option<&str>) -> (String, u64, u64) {
    let answer: Answer = gateway.post(COMPLETIONS, &request(prompt, salt));
    assert_eq!(answer.status, 200, "{}", answer.text());
    let row = gateway.row_of(&answer);
    let worker = answer.header("x-forebay-worker").expect("a worker").to_owned();
    (worker, row["matched_tokens"].as_u64().expect("a count"), row["cached_tokens"].as_u64().expect("a count"))
}

/// Waits until the gateway relies on a worker's events so far: 1 in part, 2 wholly.
fn until_standing(gateway: &Gateway, worker: &str, standing: f64) {
    let series = format!("forebay_worker_kv_events{{worker=\"{worker}\"}}");
    eventually(&format!("{worker} to stand at {standing}"), || (gateway.metric(&series) == standing).then_some(()));
}

fn until_indexed(gateway: &Gateway, blocks: f64) {
    let series = "forebay_prefix_index_blocks{model=\"m\"}";
    eventually(&format!("{blocks} blocks to be known"), || (gateway.metric(series) >= blocks).then_some(()));
}

fn breaks(gateway: &Gateway, worker: &str, kind: &str) -> f64 {
    gateway.metric(&format!("forebay_kv_event_breaks_total{{worker=\"{worker}\",kind=\"{kind}\"}}"))
}

fn change(worker: &Worker, json: &str) {
    let answer = client::post(worker.address, "/simulated/kv_events", json);
    assert_eq!(answer.status, 200, "{}", answer.text());
}

fn attracts(flags: &[&str]) {
    let flags = [&EVENTS[..], flags].concat();
    let workers = [worker(&flags), worker(&flags)];
    // What one of them holds from before the gateway began is told by its replay.
    directly(workers[1].address, &prompt(0), None);
    let gateway = Gateway::before(&workers.each_ref().map(|worker| worker.address));
    for name in ["w0", "w1"] {
        until_standing(&gateway, name, 2.0);
    }
    until_indexed(&gateway, 100.0);
    assert_eq!(through(&gateway, &prompt(0), None), ("w1".to_owned(), 1600, 1600));
    for number in 1..8 {
        let at = (number % 2) as usize;
        directly(workers[at].address, &prompt(number), None);
        until_indexed(&gateway, 100.0 * (number + 1) as f64);
        assert_eq!(through(&gateway, &prompt(number), None), (format!("w{at}"), 1600, 1600));
    }
    // A salt of the client's own is another cache.
    directly(workers[0].address, &prompt(8), Some("a"));
    until_indexed(&gateway, 900.0);
    let (_, matched, cached) = through(&gateway, &prompt(8), Some("b"));
    assert_eq!((matched, cached), (0, 0));
    assert_eq!(through(&gateway, &prompt(8), Some("a")), ("w0".to_owned(), 1600, 1600));
    // Emptied caches attract nobody; that takes the gateway's own guesses with it.
    for worker in &workers {
        change(worker, r#"{"clear":true}"#);
    }
    let events = |name: &str| gateway.metric(&format!("forebay_kv_events_total{{worker=\"{name}\"}}"));
    let (seen, told) = ((events("w0"), events("w1")), || (events("w0"), events("w1")));
    directly(workers[0].address, &json!([vec![1; 20]]), None);
    directly(workers[1].address, &json!([vec![1; 20]]), None);
    eventually("the events", || (told().0 > seen.0 && told().1 > seen.1).then_some(()));
    for number in 0..8 {
        let (_, matched, cached) = through(&gateway, &prompt(number), None);
        assert_eq!((matched, cached), (0, 0), "{number}");
    }
    for kind in ["filled", "gap", "restarted", "unproven", "unreadable"] {
        assert_eq!((breaks(&gateway, "w0", kind), breaks(&gateway, "w1", kind)), (0.0, 0.0), "{kind}");
    }
}

#[test]
fn a_prefix_cached_by_others_attracts_requests() {
    attracts(&[]);
}

#[test]
fn so_it_does_in_the_older_form() {
    attracts(&["--kv-events-arrays"]);
}

#[test]
fn a_gap_is_filled_by_a_replay() {
    let workers = [worker(&EVENTS), worker(&EVENTS)];
    let gateway = Gateway::before(&workers.each_ref().map(|worker| worker.address));
    until_standing(&gateway, "w1", 2.0);
    change(&workers[1], r#"{"drop_next":1}"#);
    directly(workers[1].address, &prompt(0), None);
    directly(workers[1].address, &prompt(1), None);
    until_indexed(&gateway, 200.0);
    eventually("a gap that was filled", || (breaks(&gateway, "w1", "filled") == 1.0).then_some(()));
    for number in 0..2 {
        assert_eq!(through(&gateway, &prompt(number), None), ("w1".to_owned(), 1600, 1600));
    }
    until_standing(&gateway, "w1", 2.0);
}

/// Configured by hand, without a socket for replays: what was known is given up, and what is told goes on.
#[test]
fn a_gap_that_nobody_fills_costs_what_was_known() {
    let workers = [worker(&EVENTS[..2]), worker(&[])];
    let sources = client::get(workers[0].address, "/kv_event_sources").json();
    let address = sources["0"]["endpoint"].as_str().expect("an address").replace('*', "127.0.0.1");
    let text = model("m", &[workers[1].address, workers[0].address], &format!("tokenizer = {:?}\n", tokenizer()));
    let gateway = Gateway::start(&format!("{text}kv_events = {address:?}\n"));
    // Nothing says whether there was something before the first message.
    until_standing(&gateway, "w1", 1.0);
    directly(workers[0].address, &prompt(0), None);
    until_standing(&gateway, "w1", 2.0);
    assert_eq!(through(&gateway, &prompt(0), None), ("w1".to_owned(), 1600, 1600));
    change(&workers[0], r#"{"drop_next":1}"#);
    directly(workers[0].address, &prompt(1), None);
    directly(workers[0].address, &prompt(2), None);
    until_standing(&gateway, "w1", 1.0);
    assert_eq!(breaks(&gateway, "w1", "gap"), 1.0);
    until_indexed(&gateway, 200.0);
    assert_eq!(through(&gateway, &prompt(2), None), ("w1".to_owned(), 1600, 1600));
    assert_eq!(through(&gateway, &prompt(1), None).1, 0, "what was lost is not known");
    // The engine says that its cache is empty: nothing is unknown any more.
    change(&workers[0], r#"{"clear":true}"#);
    until_standing(&gateway, "w1", 2.0);
    assert_eq!(gateway.metric("forebay_worker_kv_events{worker=\"w0\"}"), 0.0, "one without events");
}

#[test]
fn an_engine_that_begins_anew_has_an_empty_cache() {
    let before = worker(&EVENTS);
    let address = before.address;
    let gateway = Gateway::before(&[address]);
    until_standing(&gateway, "w0", 2.0);
    directly(address, &prompt(0), None);
    until_indexed(&gateway, 100.0);
    // The connection breaks and nothing else: the replay proves that nothing was missed.
    change(&before, r#"{"disconnect":true}"#);
    directly(address, &prompt(1), None);
    until_indexed(&gateway, 200.0);
    assert_eq!(through(&gateway, &prompt(0), None), ("w0".to_owned(), 1600, 1600));
    // The same address, but a publisher that counts from 0.
    change(&before, r#"{"restart":true}"#);
    eventually("the restart to be seen", || (breaks(&gateway, "w0", "restarted") == 1.0).then_some(()));
    until_standing(&gateway, "w0", 2.0);
    assert_eq!(through(&gateway, &prompt(0), None).1, 0);
    // Another process, which publishes at another port.
    drop(before);
    until_standing(&gateway, "w0", 0.0);
    let flags = [&["--model", "m"], &EVENTS[..]].concat();
    let _after = Worker::start_at(address.port(), &flags);
    until_standing(&gateway, "w0", 2.0);
    gateway.until_ready();
    assert_eq!(through(&gateway, &prompt(0), None).1, 0);
    directly(address, &prompt(3), None);
    until_indexed(&gateway, 300.0);
    assert_eq!(through(&gateway, &prompt(3), None), ("w0".to_owned(), 1600, 1600));
}
