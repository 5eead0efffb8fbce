use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::peek::Chat;
use crate::peek::tests::any_json;

const MESSAGES: &str = r#""messages":[{"role":"user","content":"Hi"}]"#;

fn edited(body: &str, edit: impl FnOnce(&mut Edits, &Chat)) -> String {
    let peek = Chat::peek(body.as_bytes()).unwrap();
    let mut edits = Edits::new();
    edit(&mut edits, &peek);
    String::from_utf8(edits.apply(&Bytes::copy_from_slice(body.as_bytes())).to_vec()).unwrap()
}

#[test]
fn usage_is_asked_for_however_the_client_wrote_it() {
    let cases = [
        (r#"{"stream":true,"#, r#"{"stream_options":{"include_usage":true},"stream":true,"#),
        ("{ \"stream\" : true ,", "{\"stream_options\":{\"include_usage\":true}, \"stream\" : true ,"),
        (r#"{"stream":true,"stream_options":null,"#, r#"{"stream":true,"stream_options":{"include_usage":true},"#),
        (r#"{"stream_options": {} ,"stream":true,"#, r#"{"stream_options": {"include_usage":true} ,"stream":true,"#),
        (r#"{"stream_options":{ },"stream":true,"#, r#"{"stream_options":{"include_usage":true },"stream":true,"#),
        (
            r#"{"stream":true,"stream_options":{"include_usage":false,"x":[1, 2]},"#,
            r#"{"stream":true,"stream_options":{"include_usage":true,"x":[1, 2]},"#,
        ),
        (
            r#"{"stream":true,"stream_options":{"include_us\u0061ge": null },"#,
            r#"{"stream":true,"stream_options":{"include_us\u0061ge": true },"#,
        ),
        (
            r#"{"stream":true,"stream_options":{ "continuous_usage_stats":true},"#,
            r#"{"stream":true,"stream_options":{"include_usage":true, "continuous_usage_stats":true},"#,
        ),
        (
            r#"{"stream":true,"stream_options":{"include_usage":true},"#,
            r#"{"stream":true,"stream_options":{"include_usage":true},"#,
        ),
        (r#"{"stream":false,"#, r#"{"stream":false,"#),
        ("{", "{"),
    ];
    let rest = format!(r#""model":"m", {MESSAGES}}}  "#);
    for (before, after) in cases {
        let got = edited(&format!("{before}{rest}"), |edits, chat| edits.usage(&chat.streaming));
        assert_eq!(got, format!("{after}{rest}"));
    }
}

#[test]
fn model_and_salt() {
    let body = format!("{{ \"model\":\"alias\",{MESSAGES},\"x\": 1.50 }}");
    let got = edited(&body, |edits, chat| {
        edits.model(&chat.model, "org/\"new\"\n");
        edits.cache_salt(&chat.cache_salt_at, "s");
    });
    assert_eq!(got, format!("{{\"cache_salt\":\"s\", \"model\":\"org/\\\"new\\\"\\n\",{MESSAGES},\"x\": 1.50 }}"));
    for salt in ["null", "\"mine\""] {
        let body = format!("{{\"model\":\"m\",\"cache_salt\":{salt},{MESSAGES}}}");
        let got = edited(&body, |edits, chat| edits.cache_salt(&chat.cache_salt_at, "s"));
        assert_eq!(got, format!("{{\"model\":\"m\",\"cache_salt\":\"s\",{MESSAGES}}}"));
    }
}

#[test]
fn without_edits_the_bytes_are_the_same_ones() {
    let body = Bytes::from(format!("{{\"model\":\"m\",{MESSAGES}}}"));
    let chat = Chat::peek(&body).unwrap();
    let mut edits = Edits::new();
    edits.model(&chat.model, "m");
    edits.usage(&chat.streaming);
    assert!(edits.is_empty());
    assert_eq!(edits.apply(&body).as_ptr(), body.as_ptr());
}

#[test]
fn order_and_overlap() {
    let body = Bytes::from_static(b"0123456789");
    let apply = |list: &[(Span, &'static str)]| {
        let mut edits = Edits::new();
        for (span, bytes) in list {
            edits.replace(span.clone(), *bytes);
        }
        String::from_utf8(edits.apply(&body).to_vec()).unwrap()
    };
    assert_eq!(apply(&[(7..9, "B"), (1..3, "A")]), "0A3456B9");
    assert_eq!(apply(&[(1..1, "a"), (1..1, "b"), (1..2, "C")]), "0abC23456789");
    assert_eq!(apply(&[(1..2, "C"), (1..1, "a"), (2..2, "d")]), "0aCd23456789");
    assert_eq!(apply(&[(2..4, "x"), (3..5, "y")]), "012y56789", "the later one stands");
    assert_eq!(apply(&[(2..4, "x"), (2..4, "y")]), "01y456789");
    assert_eq!(apply(&[(8..20, "x")]), "01234567x", "a span beyond the body ends with it");
}

proptest! {
    /// The result is the edit of the parsed value, and all bytes outside the edited places are the client's.
    #[test]
    fn equals_the_edit_of_the_value(
        extra in prop::collection::btree_map("x\\PC{0,6}", any_json(), 0..4),
        options in prop_oneof![
            Just(None),
            Just(Some(Value::Null)),
            Just(Some(json!({}))),
            any::<bool>().prop_map(|on| Some(json!({"a": [1], "include_usage": on}))),
            Just(Some(json!({"include_usage": null, "b": "c"}))),
            Just(Some(json!({"continuous_usage_stats": false}))),
        ],
        salt in prop_oneof![Just(None), Just(Some(Value::Null)), "\\PC{0,4}".prop_map(|s| Some(json!(s)))],
        name in "\\PC{1,12}",
        new_name in "\\PC{1,12}",
        pretty in any::<bool>(),
        shift in 0..8_usize,
    ) {
        let mut members: Vec<(String, Value)> = extra.into_iter().collect();
        members.push(("model".into(), json!(name)));
        members.push(("messages".into(), json!([{"role": "user", "content": "é"}])));
        members.push(("stream".into(), json!(true)));
        members.extend(options.map(|options| ("stream_options".into(), options)));
        members.extend(salt.map(|salt| ("cache_salt".into(), salt)));
        let shift = shift % members.len();
        members.rotate_left(shift);
        let mut value = Value::Object(members.into_iter().collect());
        let body = Bytes::from(if pretty { serde_json::to_string_pretty(&value).unwrap() } else { value.to_string() });

        let chat = Chat::peek(&body).unwrap();
        let mut edits = Edits::new();
        edits.model(&chat.model, &new_name);
        edits.usage(&chat.streaming);
        edits.cache_salt(&chat.cache_salt_at, "salt");
        let got = edits.apply(&body);

        value["model"] = json!(new_name);
        value["cache_salt"] = json!("salt");
        if value["stream_options"].is_null() {
            value["stream_options"] = json!({});
        }
        value["stream_options"]["include_usage"] = json!(true);
        prop_assert_eq!(serde_json::from_slice::<Value>(&got).unwrap(), value);

        let (mut from_body, mut from_got) = (0, 0);
        for (span, bytes) in &edits.0 {
            let kept = span.start - from_body;
            prop_assert_eq!(&body[from_body..span.start], &got[from_got..from_got + kept]);
            prop_assert_eq!(&got[from_got + kept..from_got + kept + bytes.len()], &bytes[..]);
            (from_body, from_got) = (span.end, from_got + kept + bytes.len());
        }
        prop_assert_eq!(&body[from_body..], &got[from_got..]);
    }
}
