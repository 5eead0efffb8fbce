use proptest::prelude::*;

use super::*;
use crate::peek::{Embedding, Ranking};

const fn share(items: u32, tokens: u32) -> Share {
    Share { items, tokens }
}

fn split_text(answer: &str, shares: &[Share]) -> Option<Vec<String>> {
    let Split { answers, .. } = split(&Bytes::copy_from_slice(answer.as_bytes()), shares)?;
    Some(answers.into_iter().map(|answer| String::from_utf8(answer.to_vec()).unwrap()).collect())
}

#[test]
fn inputs_of_several_requests_stand_in_one_list() {
    let check = |bodies: &[&str], expected: &str| {
        let requests = bodies.iter().map(|body| (body, Embedding::peek(body.as_bytes()).unwrap().items.unwrap()));
        let requests: Vec<_> = requests.collect();
        let inners = requests.iter().map(|(body, items)| &body.as_bytes()[items.inner.clone()]);
        let first = Bytes::copy_from_slice(bodies[0].as_bytes());
        assert_eq!(join(&first, &requests[0].1, inners), expected);
    };
    check(
        &[r#"{"input" : "a\"]", "model":"m"}"#, r#"{"input" : ["b", "c"], "model":"m"}"#],
        r#"{"input" : ["a\"]","b", "c"], "model":"m"}"#,
    );
    check(
        &[r#"{"model":"m","input":[[1],[2,3]]}"#, r#"{"model":"m","input":[4,5]}"#],
        r#"{"model":"m","input":[[1],[2,3],[4,5]]}"#,
    );
}

#[test]
fn what_cannot_stand_in_one_list_has_no_items() {
    for body in [
        r#"{"model":"m","messages":[{"role":"user","content":"x"}]}"#,
        r#"{"model":"m","input":"x","encoding_format":"bytes"}"#,
    ] {
        assert_eq!(Embedding::peek(body.as_bytes()).unwrap().items, None, "{body}");
    }
    for body in [
        r#"{"model":"m","query":"q","documents":["a"],"top_n":1}"#,
        r#"{"model":"m","query":"q","documents":[{"text":"a"}]}"#,
        r#"{"model":"m","query":"q","documents":[]}"#,
    ] {
        assert_eq!(Ranking::rerank(body.as_bytes()).unwrap().items, None, "{body}");
    }
    for body in [
        r#"{"model":"m","text_1":["a","b"],"text_2":["c","d"]}"#,
        r#"{"model":"m","text_1":"a","text_2":"b","documents":"c"}"#,
        r#"{"model":"m","query":"a","items":["b"]}"#,
    ] {
        assert_eq!(Ranking::score(body.as_bytes()).unwrap().items, None, "{body}");
    }
    let rerank = br#"{"model":"m","query":"q","documents":["a","b"],"top_n":null}"#;
    assert_eq!(Ranking::rerank(rerank).unwrap().items.map(|items| items.count), Some(2));
    for body in [r#"{"model":"m","text_1":"a","text_2":"b"}"#, r#"{"model":"m","queries":"a","documents":["b"]}"#] {
        assert_eq!(Ranking::score(body.as_bytes()).unwrap().items.map(|items| items.count), Some(1), "{body}");
    }
}

#[test]
fn each_gets_its_own_items_and_every_digit_stays() {
    let answer = r#"{"id":"e","data":[{"index":0,"embedding":[1.0,0.10000000149011612]},{"index":1,"embedding":[1e-7]},{"embedding":[-0.0],"index":2}],"x":{"data":1},"usage":{"prompt_tokens":10,"total_tokens":10,"prompt_tokens_details":null}}"#;
    assert_eq!(
        split_text(answer, &[share(1, 3), share(2, 7)]).unwrap(),
        [
            r#"{"id":"e","data":[{"index":0,"embedding":[1.0,0.10000000149011612]}],"x":{"data":1},"usage":{"prompt_tokens":3,"total_tokens":3,"prompt_tokens_details":null}}"#,
            r#"{"id":"e","data":[{"index":0,"embedding":[1e-7]},{"embedding":[-0.0],"index":1}],"x":{"data":1},"usage":{"prompt_tokens":7,"total_tokens":7,"prompt_tokens_details":null}}"#,
        ]
    );
}

#[test]
fn a_ranking_keeps_its_order() {
    let answer = r#"{"usage":{"total_tokens":9},"results":[{"index":2,"relevance_score":0.9},{"index":0,"relevance_score":0.8},{"index":1,"relevance_score":0.1}]}"#;
    assert_eq!(
        split_text(answer, &[share(2, 2), share(1, 1)]).unwrap(),
        [
            r#"{"usage":{"total_tokens":6},"results":[{"index":0,"relevance_score":0.8},{"index":1,"relevance_score":0.1}]}"#,
            r#"{"usage":{"total_tokens":3},"results":[{"index":0,"relevance_score":0.9}]}"#,
        ]
    );
}

#[test]
fn counts_that_are_not_known_are_told_apart() {
    let apportioned = |usage: &str| {
        let answer = format!(r#"{{"data":[{{"index":0}},{{"index":1}}],"usage":{usage}}}"#);
        split(&answer.into(), &[share(1, 3), share(1, 7)]).unwrap().apportioned
    };
    for known in ["null", "{}", r#"{"prompt_tokens":10,"total_tokens":10}"#, r#"{"total_tokens":10}"#] {
        assert!(!apportioned(known), "{known}");
    }
    for divided in [r#"{"prompt_tokens":11,"total_tokens":11}"#, r#"{"total_tokens":9}"#] {
        assert!(apportioned(divided), "{divided}");
    }
}

#[test]
fn what_does_not_answer_all_is_no_answer() {
    let two = [share(1, 1), share(1, 1)];
    for answer in [
        "",
        "[]",
        r#"{"usage":{}}"#,
        r#"{"data":3}"#,
        r#"{"data":[{"index":0}]}"#,
        r#"{"data":[{"index":0},{"index":0}]}"#,
        r#"{"data":[{"index":0},{"index":2}]}"#,
        r#"{"data":[{"index":0},{"index":-1}]}"#,
        r#"{"data":[{"index":0},{"index":"1"}]}"#,
        r#"{"data":[{"index":0},{}]}"#,
        r#"{"data":[{"index":0},{"index":1},{"index":2}]}"#,
        r#"{"data":[{"index":0},{"index":1}],"data":[]}"#,
        "{\"data\":[{\"index\":0},{\"index\":1}],\"x\":\"\u{0}\"}",
    ] {
        assert_eq!(split_text(answer, &two), None, "{answer}");
    }
    assert!(split_text(r#"{"data":[{"index":1},{"index":0}],"usage":null}"#, &two).is_some());
    assert!(split_text(r#"{"data":[{"index":1},{"index":0}],"usage":{"prompt_tokens":"many"}}"#, &two).is_some());
}

proptest! {
    /// Own counts where they are the engine's, and always its sum.
    #[test]
    fn portions_sum_to_the_whole(tokens in prop::collection::vec(0u32..5000, 1..40), total in 0u64..1 << 40) {
        let shares: Vec<Share> = tokens.iter().map(|tokens| share(1, *tokens)).collect();
        prop_assert_eq!(apportion(total, &shares).iter().sum::<u64>(), total);
        let own: u64 = tokens.iter().map(|tokens| u64::from(*tokens)).sum();
        if own > 0 {
            let expected: Vec<u64> = tokens.iter().map(|tokens| u64::from(*tokens)).collect();
            prop_assert_eq!(apportion(own, &shares), expected);
        }
    }

    /// What an engine says of each input alone is what each request reads of the answer to all.
    #[test]
    fn splitting_undoes_joining(counts in prop::collection::vec(1u32..5, 1..12), seed in any::<u64>(), reverse in any::<bool>()) {
        let item = |index: usize, at: usize| format!(r#"{{"index":{index},"embedding":[{}e-3,"]}}"]}}"#, seed ^ at as u64);
        let total: u32 = counts.iter().sum();
        let order = |mut items: Vec<String>| {
            if reverse {
                items.reverse();
            }
            items.join(",")
        };
        let answer = |items: Vec<String>, tokens: u32| {
            format!(r#"{{"object":"list","data":[{}],"usage":{{"prompt_tokens":{tokens},"total_tokens":{tokens}}}}}"#, order(items))
        };
        let whole = answer((0..total as usize).map(|at| item(at, at)).collect(), total);
        let shares: Vec<Share> = counts.iter().map(|count| share(*count, *count)).collect();
        let mut first = 0;
        let expected: Vec<String> = counts.iter().map(|count| {
            let own = (0..*count as usize).map(|index| item(index, first + index)).collect();
            first += *count as usize;
            answer(own, *count)
        }).collect();
        prop_assert_eq!(split_text(&whole, &shares), Some(expected));
    }

    #[test]
    fn no_bytes_make_it_panic(answer in prop::collection::vec(any::<u8>(), 0..200), items in 0u32..4) {
        let _ = split(&Bytes::from(answer), &[share(items, 1), share(1, 0)]);
    }
}
