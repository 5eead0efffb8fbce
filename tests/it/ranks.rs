//! Data-parallel ranks behind one address are workers of their own: their load, their caches, and vLLM's header.

use std::collections::BTreeSet;

use crate::support::client::post_with;
use crate::support::eventually;
use crate::support::process::{Gateway, model, tokenizer};
use crate::support::recorder::{Received, Recorder, json};

const PATH: &str = "/v1/completions";

const ANSWER: &str = r#"{"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":"x","logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":64,"total_tokens":65,"completion_tokens":1}}"#;

/// A prompt of 64 tokens that shares no block with one of another number.
fn prompt(number: u32) -> String {
    let ids: Vec<u32> = (0..64).map(|at| 10 + (number * 97 + at) % 900).collect();
    serde_json::json!({"model": "m", "prompt": ids, "max_tokens": 1}).to_string()
}

#[test]
fn each_rank_is_a_candidate_and_the_request_says_which() {
    let server = Recorder::start("m", vec![json("200 OK", ANSWER)]);
    let keys = format!("tokenizer = {:?}", tokenizer());
    let gateway = Gateway::start(&(model("m", &[server.address], &keys) + "data_parallel = 3\n"));
    let listed = || gateway.admin("workers").json()["workers"].as_array().cloned().unwrap_or_default();
    eventually("all ranks", || listed().iter().all(|worker| worker["takes_requests"] == true).then_some(()));
    assert_eq!(listed().iter().map(|worker| worker["name"].clone()).collect::<Vec<_>>(), ["w0/0", "w0/1", "w0/2"]);

    for number in 0..24 {
        let mut holders = BTreeSet::new();
        for time in 0..3 {
            let name = format!("{number}.{time}");
            // What a client writes there counts for nothing.
            let headers = ["x-data-parallel-rank: 7", &format!("x-request-id: {name}")];
            let answer = post_with(gateway.client, PATH, &headers, &prompt(number));
            assert_eq!(answer.status, 200, "{}", answer.text());
            let worker = answer.header("x-forebay-worker").expect("a worker").to_owned();
            assert_eq!(worker, format!("w0/{}", rank(server.posts().last().expect("a request"))));
            // A prefix is in its rank's cache and in no other's. Where it goes is another matter: a busy machine can make
            // a rank look slow.
            let explained = gateway.admin(&format!("decisions/{name}")).json();
            let candidates = explained["decisions"][0]["candidates"].as_array().cloned().unwrap_or_default();
            assert_eq!(candidates.len(), 3, "{explained}");
            for candidate in candidates {
                let own = candidate["worker"].as_str().expect("a name");
                assert_eq!(candidate["matched_tokens"].as_u64() > Some(0), holders.contains(own), "{explained}");
            }
            holders.insert(worker);
        }
    }

    // Each of them is brought what the others do not take.
    for left in 0..3 {
        let order = |what| {
            for other in (0..3).filter(|rank| *rank != left) {
                assert_eq!(gateway.order("POST", &format!("workers/w0%2F{other}/{what}"), "").status, 200);
            }
        };
        order("drain");
        assert_eq!(post_with(gateway.client, PATH, &[], &prompt(24 + left)).status, 200);
        assert_eq!(rank(server.posts().last().expect("a request")), left.to_string());
        order("resume");
    }
}

/// The rank that a request was brought to.
fn rank(post: &Received) -> String {
    post.header("x-data-parallel-rank").expect("a rank").to_owned()
}
