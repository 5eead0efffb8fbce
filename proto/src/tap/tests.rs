use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::peek::tests::any_json;

fn tapped<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Option<Usage> {
    let mut tap = Tap::new();
    for piece in pieces {
        tap.feed(piece);
    }
    tap.finish()
}

fn check(answer: &str, prompt_tokens: Option<u64>) {
    let expect = prompt_tokens.map(|prompt_tokens| Usage { prompt_tokens, ..Usage::default() });
    assert_eq!(tapped([answer.as_bytes()]), expect, "{answer}");
    assert_eq!(of_whole(answer.as_bytes()), expect, "{answer} as a whole");
    for at in 0..=answer.len() {
        assert_eq!(tapped([&answer.as_bytes()[..at], &answer.as_bytes()[at..]]), expect, "{answer} cut at {at}");
    }
    assert_eq!(tapped(answer.as_bytes().chunks(1)), expect, "{answer} byte by byte");
}

#[test]
fn only_the_outermost_usage_counts() {
    check(r#"{"usage":{"prompt_tokens":3}}"#, Some(3));
    check("\n{ \"a\" : [1, 2] , \"usage\" : { \"prompt_tokens\" : 3 } , \"b\" : 1 }\n", Some(3));
    check(
        r#"{"a":{"usage":{"prompt_tokens":9}},"usage":{"prompt_tokens":3},"b":{"usage":{"prompt_tokens":8}}}"#,
        Some(3),
    );
    check(r#"{"a":"\"usage\":{\"prompt_tokens\":9}","usage":{"prompt_tokens":3}}"#, Some(3));
    check(r#"{"a":"\\","usage":{"prompt_tokens":3,"x":"}\\\"]"}}"#, Some(3));
    check(
        r#"{"a":"usage","usagex":{"prompt_tokens":1},"usag":{"prompt_tokens":2},"xusage":{"prompt_tokens":4}}"#,
        None,
    );
    check(r#"{"usage":{"prompt_tokens":1},"usage":{"prompt_tokens":3}}"#, Some(3));
    check(r#"{"usage":{"prompt_tokens":3},"usage":null}"#, Some(3));
    check(r#"{"usage":null,"a":1}"#, None);
    check(r#"[{"usage":{"prompt_tokens":9}}]"#, None);
    check(r#"{"usage":{"prompt_tokens":3}"#, None);
    check(r#""usage""#, None);
    check("", None);
}

#[test]
fn a_value_that_is_too_long_is_passed_over() {
    let long = format!(r#"{{"usage":{{"prompt_tokens":3,"x":"{}"}},"b":1}}"#, "x".repeat(USAGE_BYTES_MAX));
    assert_eq!(tapped([long.as_bytes()]), None);
    assert_eq!(of_whole(long.as_bytes()), None);
    assert_eq!(tapped(long.as_bytes().chunks(7)), None);
}

proptest! {
    #[test]
    fn no_bytes_panic(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..20)) {
        tapped(pieces.iter().map(Vec::as_slice));
        let _ = of_whole(&[&pieces.concat()[..], br#""usage":"#, &pieces.concat()].concat());
    }

    #[test]
    fn equals_a_whole_parse(
        members in prop::collection::vec(("\\PC{0,6}", any_json()), 0..5),
        usage in prop_oneof![any_json(), (0..99_u32).prop_map(|tokens| json!({"prompt_tokens": tokens, "x": "}\\\""}))],
        at in 0..6_usize,
        cuts in prop::collection::vec(0..400_usize, 0..6),
        pretty in any::<bool>(),
    ) {
        let mut members = members;
        members.insert(at.min(members.len()), ("usage".into(), usage));
        let value = Value::Object(members.into_iter().collect());
        let answer = if pretty { serde_json::to_string_pretty(&value).unwrap() } else { value.to_string() };
        let mut cuts: Vec<usize> = cuts.into_iter().map(|at| at.min(answer.len())).collect();
        cuts.sort_unstable();
        cuts.push(answer.len());
        let mut from = 0;
        let pieces = cuts.iter().map(|at| &answer.as_bytes()[std::mem::replace(&mut from, *at)..*at]);
        prop_assert_eq!(of_whole(answer.as_bytes()), tapped([answer.as_bytes()]));
        prop_assert_eq!(tapped(pieces), Usage::read(value["usage"].to_string().as_bytes()));
    }
}
