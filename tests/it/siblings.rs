//! Requests with one long prefix that come together, at a simulated SGLang, which reuses only what it has computed.

use serde_json::json;

use super::support::client::{Answer, Connection};
use super::support::process::{Gateway, Worker};

const SIBLINGS: u64 = 6;
/// Tokens that they have in common: two seconds of work at the speed that the worker has here.
const SHARED: u64 = 3200;

fn sibling(number: u64) -> String {
    let own = (0..64).map(|at| 3000 + number * 100 + at);
    let prompt: Vec<u64> = (0..SHARED).map(|at| at * 7 % 2900).chain(own).collect();
    json!({"model": "m", "prompt": prompt, "max_tokens": 2, "stream": true, "ignore_eos": true}).to_string()
}

#[test]
fn their_prefix_is_computed_once() {
    let worker = Worker::start(&["--model", "m", "--engine", "sglang", "--speed", "0.2"]);
    let gateway = Gateway::before(&[worker.address]);
    let mut clients: Vec<_> = (0..SIBLINGS).map(|_| Connection::to(gateway.client)).collect();
    for (number, client) in (0..).zip(&mut clients) {
        let name = format!("x-request-id: sibling-{number}");
        client.post("/v1/completions", &[&name], sibling(number).as_bytes());
    }
    let answers: Vec<Answer> = clients.iter_mut().map(Connection::answer).collect();
    assert!(answers.iter().all(|answer| answer.status == 200), "{}", answers[0].text());
    let computed: u64 = (0..SIBLINGS)
        .map(|number| {
            let row = gateway.row(&format!("sibling-{number}"));
            row["prompt_tokens"].as_u64().expect("a count") - row["cached_tokens"].as_u64().expect("a count")
        })
        .sum();
    assert!((SHARED..SHARED + SIBLINGS * 80 + 16).contains(&computed), "{computed} tokens were computed");
    let held = |number| {
        let explained = gateway.admin(&format!("decisions/sibling-{number}")).json();
        explained["decisions"].as_array().expect("decisions").iter().any(|decision| decision["cause"] == "held")
    };
    assert_eq!(
        (0..SIBLINGS).filter(|number| held(*number)).count() as u64,
        SIBLINGS - 1,
        "and explain says who waited"
    );
}
