use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::peek::tests::any_json;

fn delta(data: &str) -> Delta {
    match read(data.as_bytes()) {
        Chunk::Delta(delta) => delta,
        other => panic!("{data}: {other:?}"),
    }
}

fn choices(data: &str) -> Vec<(u32, bool)> {
    delta(data).choices.iter().map(|choice| (choice.index, choice.finished)).collect()
}

#[test]
fn done() {
    assert_eq!(read(b"[DONE]"), Chunk::Done);
    assert_eq!(read(b" [DONE] "), Chunk::Done);
    assert_eq!(read(b"[DONE"), Chunk::Malformed);
}

#[test]
fn choices_and_finish() {
    let cases: [(&str, &[(u32, bool)]); 9] = [
        (r#"{"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}"#, &[(0, false)]),
        (r#"{"choices":[{"index":3,"delta":{},"finish_reason":"stop"}]}"#, &[(3, true)]),
        (
            r#"{"choices":[{"finish_reason":"","index":1},{"index":2.0,"finish_reason":{"type":"stop"}}]}"#,
            &[(1, false), (2, true)],
        ),
        (r#"{"choices":[{"delta":null,"index":null,"finish_reason":"length"}]}"#, &[(0, true)]),
        (r#"{"ch\u006fices":[{"ind\u0065x":1,"text":"a"}]}"#, &[(1, false)]),
        (r#"{"choices":[{"index":-7}]}"#, &[(0, false)]),
        (r#"{"choices":null}"#, &[]),
        (r#"{"choices":[]}"#, &[]),
        (r#"{"id":"x","error":null}"#, &[]),
    ];
    for (data, expect) in cases {
        assert_eq!(choices(data), expect, "{data}");
    }
}

#[test]
fn content_is_output_of_any_kind_and_nothing_else() {
    let chunk = |delta: &str| format!(r#"{{"choices":[{{"index":0,"delta":{delta}}}]}}"#);
    for output in [
        r#"{"content":"a"}"#,
        r#"{"reasoning":"a"}"#,
        r#"{"reasoning_content":"a"}"#,
        r#"{"refusal":"a"}"#,
        r#"{"tool_calls":[{"index":0}]}"#,
        r#"{"function_call":{"name":"f"}}"#,
        r#"{"audio":{"id":"a"}}"#,
        r#"{"content":[{"type":"text","text":"a"}]}"#,
    ] {
        assert!(delta(&chunk(output)).has_content, "{output}");
    }
    for none in [
        "{}",
        "null",
        r#"{"role":"assistant","content":""}"#,
        r#"{"role":"assistant","content":null,"refusal":null}"#,
        r#"{"tool_calls":[],"content":""}"#,
    ] {
        assert!(!delta(&chunk(none)).has_content, "{none}");
    }
    assert!(delta(r#"{"choices":[{"index":0,"text":" a"}]}"#).has_content);
    assert!(!delta(r#"{"choices":[{"index":0,"text":"","logprobs":{"content":"x"}}]}"#).has_content);
    assert!(!delta(r#"{"content":"at the top it means nothing","choices":[]}"#).has_content);
}

#[test]
fn usage_and_where_it_stands() {
    let cases = [
        // with, without, usage only
        (r#"{"id":"a","choices":[],"usage":{"prompt_tokens":1}}"#, r#"{"id":"a","choices":[]}"#, true),
        (r#"{"usage" : null , "choices":[{"index":0}]}"#, r#"{ "choices":[{"index":0}]}"#, false),
        (r#"{"a":1 , "us\u0061ge": null,"choices":[]}"#, r#"{"a":1 ,"choices":[]}"#, false),
        (r#"{ "usage":null }"#, "{  }", false),
        (
            r#"{"choices":[{"index":0}],"usage":{"prompt_tokens":1,"x":{"usage":null}},"y":2}"#,
            r#"{"choices":[{"index":0}],"y":2}"#,
            false,
        ),
    ];
    for (data, without, only) in cases {
        let got = delta(data);
        let mut cut = data.to_owned();
        cut.replace_range(got.usage_member.unwrap(), "");
        // White space around the member may stay.
        assert_eq!(cut.replace(' ', ""), without.replace(' ', ""), "{data}");
        assert_eq!(got.usage_only, only, "{data}");
    }
    assert_eq!(delta(r#"{"choices":[]}"#).usage_member, None);
    assert!(!delta(r#"{"choices":[]}"#).usage_only);
}

#[test]
fn usage_counts() {
    let read = |text: &str| Usage::read(text.as_bytes());
    let full = r#"{"prompt_tokens":37,"total_tokens":45,"completion_tokens":8,"prompt_tokens_details":{"cached_tokens":16},
        "completion_tokens_details":{"reasoning_tokens":5,"audio_tokens":0}}"#;
    assert_eq!(
        read(full),
        Some(Usage { prompt_tokens: 37, completion_tokens: 8, cached_tokens: Some(16), reasoning_tokens: Some(5) })
    );
    let bare = r#"{"prompt_tokens":3.0,"prompt_tokens_details":null,"completion_tokens":null}"#;
    assert_eq!(read(bare), Some(Usage { prompt_tokens: 3, ..Usage::default() }));
    assert_eq!(read(r#"{"prompt_tokens":-3}"#), Some(Usage::default()));
    assert_eq!([read("null"), read("[]"), read("7"), read("{")], [None; 4]);
}

#[test]
fn what_the_engine_gave_up_is_an_error() {
    for given_up in [
        r#"{"choices":[{"index":0,"delta":{},"finish_reason":"abort"}]}"#,
        r#"{"choices":[{"finish_reason":"stop","text":"a"},{"text":"b","finish_reason" : "abort"}],"usage":{}}"#,
    ] {
        assert!(matches!(read(given_up.as_bytes()), Chunk::Error { status: Some(503), .. }), "{given_up}");
        assert!(is_given_up(given_up.as_bytes()), "{given_up}");
    }
    for said in [
        r#"{"choices":[{"finish_reason":"stop","stop_reason":"abort","text":"abort"}]}"#,
        r#"{"choices":[{"finish_reason":"aborted","text":"\"finish_reason\":\"abort\""}]}"#,
    ] {
        assert_eq!(choices(said), [(0, true)], "{said}");
        assert!(!is_given_up(said.as_bytes()), "{said}");
    }
}

#[test]
fn errors_of_every_engine() {
    let cases = [
        (
            r#"{"error": {"message": "EngineCore died", "type": "InternalServerError", "param": null, "code": 500}}"#,
            "EngineCore died",
            Some(500),
        ),
        (r#"{"error":{"message":"too long","http_status_code":422}}"#, "too long", Some(422)),
        (r#"{"error":"no room","error_type":"overloaded"}"#, "no room", None),
        (r#"{"object":"error","message":"aborted","type":"x","param":null,"code":503}"#, "aborted", Some(503)),
        (r#"{"error":{"code":500,"message":"ggml"},"choices":[]}"#, "ggml", Some(500)),
        (r#"{"error":{"message":"m","code":200}}"#, "m", None),
    ];
    for (data, message, status) in cases {
        let Chunk::Error { error, status: got } = read(data.as_bytes()) else { panic!("{data}") };
        assert_eq!((error.message.as_str(), got), (message, status), "{data}");
    }
    for odd in [r#"{"error":true}"#, r#"{"error":[1]}"#, r#"{"error":{"a":1}}"#, r#"{"error":5}"#] {
        assert!(matches!(read(odd.as_bytes()), Chunk::Error { .. }), "{odd}");
    }
    for none in [
        r#"{"error":null}"#,
        r#"{"error":""}"#,
        r#"{"error":{}}"#,
        r#"{"error":false,"object":"chat.completion.chunk"}"#,
    ] {
        assert!(matches!(read(none.as_bytes()), Chunk::Delta(_)), "{none}");
    }
}

#[test]
fn malformed() {
    for data in [
        "",
        "null",
        "[]",
        "{",
        "{}x",
        "data",
        r#"{"choices":{}}"#,
        r#"{"choices":[1]}"#,
        r#"{"choices":[{"delta":"x"}]}"#,
    ] {
        assert_eq!(read(data.as_bytes()), Chunk::Malformed, "{data}");
    }
    assert_eq!(read(b"{\"choices\":[{\"text\":\"\xff\"}]}"), Chunk::Malformed);
    assert_eq!(read("[".repeat(100_000).as_bytes()), Chunk::Malformed);
    let deep = format!(r#"{{"x":{}{},"error":"e"}}"#, "[".repeat(100_000), "]".repeat(100_000));
    assert!(matches!(read(deep.as_bytes()), Chunk::Error { .. }));
}

#[test]
fn complete_when_every_choice_has_finished() {
    let finish = |index: u32| delta(&format!(r#"{{"choices":[{{"index":{index},"finish_reason":"stop"}}]}}"#));
    for expected in [1, 2, 64, 65, 200] {
        let mut answer = Completeness::new(expected);
        answer.observe(&finish(expected));
        answer.observe(&finish(u32::MAX));
        answer.observe(&delta(r#"{"choices":[{"index":0,"finish_reason":null}]}"#));
        for index in (0..expected).rev() {
            assert!(!answer.complete(), "{index} of {expected} is open");
            answer.observe(&finish(index));
            answer.observe(&finish(index));
        }
        assert!(answer.complete());
    }
}

proptest! {
    #[test]
    fn no_bytes_panic(data in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = read(&data);
    }

    /// A usage member can be cut out of any chunk.
    #[test]
    fn without_usage_the_rest_is_the_same(
        extra in prop::collection::btree_map("x\\PC{0,4}", any_json(), 0..4),
        usage in prop_oneof![Just(Value::Null), Just(json!({"prompt_tokens": 5, "completion_tokens": 7}))],
        at in 0..5_usize,
        pretty in any::<bool>(),
    ) {
        let mut members: Vec<(String, Value)> = extra.into_iter().collect();
        members.insert(at.min(members.len()), ("usage".into(), usage.clone()));
        let mut value = Value::Object(members.into_iter().collect());
        let mut data = if pretty { serde_json::to_string_pretty(&value).unwrap() } else { value.to_string() };
        let got = delta(&data);
        prop_assert_eq!(got.usage.is_some(), !usage.is_null());
        data.replace_range(got.usage_member.unwrap(), "");
        value.as_object_mut().unwrap().shift_remove("usage");
        prop_assert_eq!(serde_json::from_str::<Value>(&data).unwrap(), value);
    }
}

#[test]
fn the_model_that_answers() {
    for (json, named) in [
        (&br#"{"id":"1","model":"a/b","choices":[]}"#[..], Some("a/b")),
        (br#"{"choices":[{"model":"inner"}],"mod\u0065l":"\u00e9"}"#, Some("\u{e9}")),
        (br#"{"model":"known","choices":[{"brok"#, Some("known")),
        (br#"{"model":null}"#, None),
        (br#"{"model":7}"#, None),
        (br#"{"id":"{\"model\":\"quoted\"}"}"#, None),
        (br#"["model","a"]"#, None),
        (b"", None),
    ] {
        assert_eq!(model(json).as_deref(), named, "{}", String::from_utf8_lossy(json));
    }
}

#[test]
fn a_plain_name_is_seen_without_reading() {
    for (json, seen) in [
        (r#"{"id":"x","model":"m/a"}"#, true),
        (r#"{ "model" : "m/a" , "x": 1}"#, true),
        (r#"{"model":"m/ab"}"#, false),
        (r#"{"model":"m/"}"#, false),
        (r#"{"model":"m\/a"}"#, false),
        (r#"{"model":null}"#, false),
        (r#"{"text":"\"model\":\"m/a\""}"#, false),
        (r#"{"object":"model","model":"m/a"}"#, false),
        (r#"{"model":"m/a"#, false),
        ("", false),
    ] {
        assert_eq!(names(json.as_bytes(), "m/a"), seen, "{json}");
    }
}
