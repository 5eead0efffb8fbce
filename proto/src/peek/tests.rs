use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::splice::Edits;

fn chat(body: &str) -> Chat {
    Chat::peek(body.as_bytes()).unwrap()
}

/// Code and param of the refusal.
fn refused<T: std::fmt::Debug>(result: Result<T, Refusal>) -> (&'static str, Option<String>, String) {
    let refusal = result.unwrap_err();
    (refusal.code, refusal.param, refusal.message)
}

const MESSAGES: &str = r#""messages":[{"role":"user","content":"Hi"}]"#;

fn with(fields: &str) -> String {
    format!(r#"{{"model":"m",{MESSAGES}{fields}}}"#)
}

#[test]
fn certain_is_what_leaves_nothing_to_chance() {
    for (fields, certain) in [
        (r#""temperature":0"#, true),
        (r#""temperature":0.0e5"#, true),
        (r#""temperature":1,"seed":-7"#, true),
        (r#""temperature":0.5"#, false),
        (r#""temperature":"0","seed":"7""#, false),
        (r#""temperature":null,"seed":null"#, false),
        (r#""n":1"#, false),
        (r#""temperature":0,"temperature":1"#, false),
        (r#""temperature":0,"seed":1,"seed":2"#, false),
    ] {
        let chat = format!(r#"{{"model":"m","messages":[{{"role":"user","content":"x"}}],{fields}}}"#);
        assert_eq!(Chat::peek(chat.as_bytes()).unwrap().deterministic, certain, "{fields}");
        let completion = format!(r#"{{"model":"m","prompt":"x",{fields}}}"#);
        assert_eq!(Completion::peek(completion.as_bytes()).unwrap().deterministic, certain, "{fields}");
    }
}

#[test]
fn the_least_chat_request() {
    let body = with("");
    let got = chat(&body);
    assert_eq!(got.model, Model { name: "m".into(), at: Place::Value(9..12) });
    assert_eq!(&body[got.messages.clone()], r#"[{"role":"user","content":"Hi"}]"#);
    assert_eq!((got.n, got.max_tokens, got.streaming.stream), (1, None, false));
    assert_eq!((got.tools, got.tool_choice, got.user, got.cache_salt), (None, None, None, None));
    assert_eq!(got.cache_salt_at, Place::Free(1));
    assert_eq!((got.template, got.truncation), (TemplateFields::default(), Truncation::default()));
}

#[test]
fn a_model_may_be_named_later() {
    let free = format!("{{{MESSAGES}}}");
    let null = format!(r#"{{"model":null,{MESSAGES}}}"#);
    assert_eq!(chat(&free).model, Model { name: String::new(), at: Place::Free(1) });
    assert_eq!(chat(&null).model, Model { name: String::new(), at: Place::Value(9..13) });
    for body in [free, null] {
        let mut edits = Edits::new();
        edits.model(&chat(&body).model, "a \"b\"");
        let named = edits.apply(&body.into());
        assert_eq!(serde_json::from_slice::<Value>(&named).unwrap()["model"], "a \"b\"");
    }
}

#[test]
fn a_full_chat_request() {
    let body = format!(
        "\n {{ \"model\" : \"org/m\\u00e9\" , {MESSAGES}, \"stream\":true, \"stream_options\": {{\"include_usage\" : true}},
        \"tools\":[ {{}} ], \"tool_choice\":\"auto\", \"max_completion_tokens\":16.0, \"max_tokens\":16, \"n\":128,
        \"add_generation_prompt\":false, \"continue_final_message\":true, \"add_special_tokens\":true,
        \"chat_template\":\"x\", \"chat_template_kwargs\":{{\"a\":1}}, \"documents\":[1], \"reasoning_effort\":\"low\",
        \"truncate_prompt_tokens\":-1, \"truncation_side\":\"left\", \"cache_salt\":\"s\", \"user\":\"u\",
        \"temperature\":\"hot\", \"temperature\":2 }} \n"
    );
    let got = chat(&body);
    let text = |span: &Option<Span>| span.clone().map(|span| body[span].to_owned());
    assert_eq!(got.model.name, "org/mé");
    let Place::Value(span) = &got.model.at else { panic!("{:?}", got.model) };
    assert_eq!(&body[span.clone()], "\"org/m\\u00e9\"");
    assert!(got.streaming.stream && got.streaming.include_usage);
    assert_eq!(text(&got.streaming.options).unwrap(), "{\"include_usage\" : true}");
    assert_eq!(text(&got.tools).unwrap(), "[ {} ]");
    assert_eq!(text(&got.tool_choice).unwrap(), "\"auto\"");
    assert_eq!((got.max_tokens, got.n), (Some(16), 128));
    assert_eq!(got.template.add_generation_prompt, Some(false));
    assert_eq!(got.template.continue_final_message, Some(true));
    assert_eq!(got.template.add_special_tokens, Some(true));
    assert_eq!(text(&got.template.chat_template).unwrap(), "\"x\"");
    assert_eq!(text(&got.template.chat_template_kwargs).unwrap(), "{\"a\":1}");
    assert_eq!(text(&got.template.documents).unwrap(), "[1]");
    assert_eq!(text(&got.template.reasoning_effort).unwrap(), "\"low\"");
    assert_eq!(got.truncation, Truncation { tokens: Some(-1), side: Some(Side::Left) });
    assert_eq!((got.cache_salt.as_deref(), got.user.as_deref()), (Some("s"), Some("u")));
    let Place::Value(salt) = got.cache_salt_at else { panic!("no place") };
    assert_eq!(&body[salt], "\"s\"");
}

#[test]
fn null_is_absent_where_the_field_is_optional() {
    let fields = ",\"stream\":null,\"stream_options\":null,\"tools\":null,\"tool_choice\":null,\"max_tokens\":null,\
        \"max_completion_tokens\":null,\"n\":null,\"user\":null,\"cache_salt\":null,\"chat_template\":null,\
        \"truncate_prompt_tokens\":null,\"truncation_side\":null,\"add_generation_prompt\":null";
    let got = chat(&with(fields));
    let least = chat(&with(""));
    assert_eq!((got.n, got.max_tokens, got.tools, got.user), (1, None, None, None));
    assert_eq!((got.template, got.truncation), (least.template, least.truncation));
    assert!(!got.streaming.stream && got.streaming.options.is_none());
}

#[test]
fn bodies_that_are_not_one_json_object() {
    let bodies: [&[u8]; 16] = [
        b"",
        b"  ",
        b"null",
        b"[]",
        b"\"model\"",
        b"{",
        b"{\"model\"}",
        b"{\"model\":\"m\",}",
        b"{'model':'m'}",
        b"{\"model\":\"m\"} x",
        b"{\"model\":\"m\"}{}",
        b"{\"model\":NaN}",
        b"{\"x\":\"\xff\"}",
        b"\xef\xbb\xbf{\"model\":\"m\"}",
        b"{\"model\":\"m\",\"x\":\"\x01\"}",
        b"{\"\\ud800\":1}",
    ];
    for body in bodies {
        let (code, param, message) = refused(Chat::peek(body));
        assert_eq!((code, param), ("invalid_json", None), "{body:?}");
        assert!(message.starts_with("We could not parse the JSON body of your request: "), "{message}");
    }
    let (_, _, message) = refused(Chat::peek(b"{\"model\":\n x}"));
    assert_eq!(message, "We could not parse the JSON body of your request: expected value at line 2 column 2.");
}

#[test]
fn keys_are_read_as_json_reads_them() {
    let got = chat(&format!(r#"{{"mod\u0065l":"m",{MESSAGES}}}"#));
    assert_eq!(got.model.name, "m");
    let doubled = format!(r#"{{"model":"m","mod\u0065l":"other",{MESSAGES}}}"#);
    let (code, param, message) = refused(Chat::peek(doubled.as_bytes()));
    assert_eq!((code, param.as_deref()), ("duplicate_parameter", Some("model")));
    assert_eq!(message, "Duplicate parameter: 'model' is given more than once.");
}

#[test]
fn every_key_we_act_on_may_stand_once_only() {
    let once = [
        ("stream", "true"),
        ("stream", "null"),
        ("max_tokens", "1"),
        ("n", "1"),
        ("tools", "[]"),
        ("user", "\"u\""),
        ("cache_salt", "\"s\""),
        ("chat_template", "\"t\""),
        ("reasoning_effort", "\"low\""),
        ("messages", "1"),
    ];
    for (key, value) in once {
        let body = with(&format!(",\"{key}\":{value},\"{key}\":{value}"));
        let (code, param, _) = refused(Chat::peek(body.as_bytes()));
        assert_eq!((code, param.as_deref()), ("duplicate_parameter", Some(key)));
    }
    // What we do not act on may repeat, and so may our keys where they mean something else.
    chat(&with(",\"seed\":1,\"seed\":2,\"metadata\":{\"model\":\"a\",\"model\":\"b\"}"));
    let body = with(",\"stream\":true,\"stream_options\":{\"include_usage\":true,\"include_us\\u0061ge\":false}");
    let (code, param, _) = refused(Chat::peek(body.as_bytes()));
    assert_eq!((code, param.as_deref()), ("duplicate_parameter", Some("stream_options.include_usage")));
}

#[test]
fn chat_refusals() {
    let cases = [
        (
            r#"{"model":7}"#,
            "invalid_type",
            "model",
            "Invalid type for 'model': expected a string, but got an integer instead.",
        ),
        (
            r#"{"model":["m"]}"#,
            "invalid_type",
            "model",
            "Invalid type for 'model': expected a string, but got an array instead.",
        ),
        (r#"{"model":"\ud83d"}"#, "invalid_json", "model", ""),
        (r#"{"model":"m"}"#, "missing_required_parameter", "messages", "Missing required parameter: 'messages'."),
        (r#"{"model":"m","messages":null}"#, "missing_required_parameter", "messages", ""),
        (
            r#"{"model":"m","messages":"hi"}"#,
            "invalid_type",
            "messages",
            "Invalid type for 'messages': expected an array of objects, but got a string instead.",
        ),
        (r#"{"model":"m","messages":[ ]}"#, "invalid_value", "messages", ""),
        (r#"{"model":"m","messages":["hi"]}"#, "invalid_type", "messages[0]", ""),
        (r#"{"model":"m","messages":[{"role":"user"},null]}"#, "invalid_type", "messages[1]", ""),
        (r#"{"model":"m","messages":[{"role":"user"},[]]}"#, "invalid_type", "messages[1]", ""),
        (
            r#"{"model":"m","messages":[{"role":"user"},{"content":"x"}]}"#,
            "missing_required_parameter",
            "messages[1].role",
            "Missing required parameter: 'messages[1].role'.",
        ),
        (r#"{"model":"m","messages":[{"role":1}]}"#, "invalid_type", "messages[0].role", ""),
        (r#"{"model":"m","messages":[{"role":"user","role":null}]}"#, "invalid_type", "messages[0].role", ""),
    ];
    for (body, code, param, message) in cases {
        let got = refused(Chat::peek(body.as_bytes()));
        assert_eq!((got.0, got.1.as_deref()), (code, Some(param)), "{body}");
        assert!(message.is_empty() || got.2 == message, "{}", got.2);
    }
}

#[test]
fn refusals_by_field() {
    let cases = [
        (
            "\"stream\":\"true\"",
            "invalid_type",
            "stream",
            "Invalid type for 'stream': expected a boolean, but got a string instead.",
        ),
        ("\"stream\":1", "invalid_type", "stream", ""),
        ("\"stream\":true,\"stream_options\":[]", "invalid_type", "stream_options", ""),
        (
            "\"stream\":true,\"stream_options\":{\"include_usage\":1}",
            "invalid_type",
            "stream_options.include_usage",
            "",
        ),
        (
            "\"stream_options\":{}",
            "invalid_value",
            "stream_options",
            "Invalid 'stream_options': only allowed when 'stream' is true.",
        ),
        ("\"stream\":false,\"stream_options\":{\"include_usage\":true}", "invalid_value", "stream_options", ""),
        (
            "\"max_tokens\":\"16\"",
            "invalid_type",
            "max_tokens",
            "Invalid type for 'max_tokens': expected an integer, but got a string instead.",
        ),
        (
            "\"max_tokens\":1.5",
            "invalid_type",
            "max_tokens",
            "Invalid type for 'max_tokens': expected an integer, but got a decimal number instead.",
        ),
        (
            "\"max_tokens\":0",
            "invalid_value",
            "max_tokens",
            "Invalid 'max_tokens': integer below minimum value. Expected a value >= 1, but got 0 instead.",
        ),
        ("\"max_tokens\":-5", "invalid_value", "max_tokens", ""),
        ("\"max_completion_tokens\":0", "invalid_value", "max_completion_tokens", ""),
        ("\"max_tokens\":4294967296", "invalid_value", "max_tokens", ""),
        ("\"max_tokens\":1e400", "invalid_value", "max_tokens", ""),
        ("\"max_tokens\":-1e400", "invalid_value", "max_tokens", ""),
        ("\"max_tokens\":99999999999999999999999999999999999999", "invalid_value", "max_tokens", ""),
        ("\"max_tokens\":5,\"max_completion_tokens\":6", "invalid_value", "max_tokens", ""),
        ("\"n\":0", "invalid_value", "n", ""),
        (
            "\"n\":129",
            "invalid_value",
            "n",
            "Invalid 'n': integer above maximum value. Expected a value <= 128, but got 129 instead.",
        ),
        ("\"n\":true", "invalid_type", "n", ""),
        ("\"tools\":{}", "invalid_type", "tools", ""),
        ("\"user\":5", "invalid_type", "user", ""),
        ("\"cache_salt\":{}", "invalid_type", "cache_salt", ""),
        ("\"add_generation_prompt\":0", "invalid_type", "add_generation_prompt", ""),
        ("\"truncate_prompt_tokens\":-2", "invalid_value", "truncate_prompt_tokens", ""),
        ("\"truncation_side\":\"middle\"", "invalid_value", "truncation_side", ""),
    ];
    for (field, code, param, message) in cases {
        let got = refused(Chat::peek(with(&format!(",{field}")).as_bytes()));
        assert_eq!((got.0, got.1.as_deref()), (code, Some(param)), "{field}");
        assert!(message.is_empty() || got.2 == message, "{}", got.2);
        assert!(got.2.len() < 200, "the client's value is not echoed at length");
    }
}

#[test]
fn integers_may_be_written_as_floats() {
    for (written, value) in [("16.0", 16), ("1.6e1", 16), ("1", 1), ("4294967295", u32::MAX)] {
        assert_eq!(chat(&with(&format!(",\"max_tokens\":{written}"))).max_tokens, Some(value));
    }
    assert_eq!(chat(&with(",\"max_completion_tokens\":7")).max_tokens, Some(7));
}

#[test]
fn completion_prompts() {
    let cases = [
        (r#""Once""#, Some(Input::Text("Once".into()))),
        (r#""""#, Some(Input::Text(String::new()))),
        (r#""\u00e9\ud83d\ude00""#, Some(Input::Text("é😀".into()))),
        (r#"["a", "b"]"#, Some(Input::Texts(vec!["a".into(), "b".into()]))),
        ("[ 1 , 2.0, 4294967295]", Some(Input::Ids(vec![1, 2, u32::MAX]))),
        ("[ [1,2] , [3] ]", Some(Input::IdLists(vec![vec![1, 2], vec![3]]))),
        ("[]", None),
        ("[ ]", None),
        ("[[]]", None),
        ("[[1],[]]", None),
        ("[1,\"a\"]", None),
        ("[\"a\",1]", None),
        ("[\"a\",null]", None),
        ("[null]", None),
        ("[-1]", None),
        ("[1.5]", None),
        ("[4294967296]", None),
        ("[true]", None),
        ("[[[1]]]", None),
        ("[[1],2]", None),
        ("{}", None),
        ("7", None),
        ("null", None),
        ("[\"\\ud800\"]", None),
    ];
    for (prompt, expect) in cases {
        let got = Completion::peek(format!(r#"{{"model":"m","prompt":{prompt}}}"#).as_bytes());
        match expect {
            Some(expect) => assert_eq!(got.unwrap().prompt, expect),
            None => {
                let param = refused(got).1.unwrap();
                assert!(param.starts_with("prompt"), "{prompt}: {param}");
            }
        }
    }
}

#[test]
fn completion_fields() {
    let body =
        r#"{"model":"m","prompt":["a","b"],"max_tokens":3,"n":2,"echo":true,"add_special_tokens":false,"user":"u"}"#;
    let got = Completion::peek(body.as_bytes()).unwrap();
    assert_eq!((got.prompt.count(), got.max_tokens, got.n, got.echo), (2, Some(3), 2, true));
    assert_eq!((got.add_special_tokens, got.user.as_deref()), (Some(false), Some("u")));
    assert_eq!(&body[got.prompt_at], r#"["a","b"]"#);
    // Scoring a prompt: nothing is generated, which makes sense with `echo` only.
    let scored = Completion::peek(br#"{"model":"m","prompt":"a","max_tokens":0,"echo":true}"#).unwrap();
    assert_eq!(scored.max_tokens, Some(0));
    let plain = Completion::peek(br#"{"model":"m","prompt":"a","max_tokens":0}"#);
    assert_eq!(refused(plain).1.as_deref(), Some("max_tokens"));
}

#[test]
fn embedding_inputs_are_bounded() {
    let body = |count: usize| format!(r#"{{"model":"m","input":[{}]}}"#, vec!["\"a\""; count].join(","));
    assert_eq!(
        Embedding::peek(body(INPUTS_MAX).as_bytes()).unwrap().input,
        Source::Plain(Input::Texts(vec!["a".into(); INPUTS_MAX]))
    );
    for count in [INPUTS_MAX + 1, INPUTS_MAX + 2, 3 * INPUTS_MAX] {
        let (code, param, _) = refused(Embedding::peek(body(count).as_bytes()));
        assert_eq!((code, param.as_deref()), ("invalid_value", Some("input")));
    }
    // Token ids are one input, however many.
    let ids = format!(r#"{{"model":"m","input":{:?}}}"#, vec![1; 5000]);
    assert!(
        matches!(Embedding::peek(ids.as_bytes()).unwrap().input, Source::Plain(Input::Ids(ids)) if ids.len() == 5000)
    );
}

#[test]
fn embeddings_and_tokenize_take_a_plain_input_or_messages() {
    let messages = format!(r#"{{"model":"m",{MESSAGES}}}"#);
    assert!(matches!(Embedding::peek(messages.as_bytes()).unwrap().input, Source::Messages(_)));
    assert!(matches!(Tokenize::peek(messages.as_bytes()).unwrap().prompt, Source::Messages(_)));
    let both = format!(r#"{{"model":"m","prompt":"a","input":"a",{MESSAGES}}}"#);
    assert_eq!(refused(Embedding::peek(both.as_bytes())).0, "invalid_value");
    assert_eq!(refused(Tokenize::peek(both.as_bytes())).0, "invalid_value");
    assert_eq!(refused(Embedding::peek(br#"{"model":"m"}"#)).1.as_deref(), Some("input"));
    assert_eq!(refused(Tokenize::peek(br#"{"model":"m"}"#)).1.as_deref(), Some("prompt"));
    assert_eq!(refused(Tokenize::peek(br#"{"prompt":["a"]}"#)).0, "invalid_type");
    let got = Tokenize::peek(br#"{"prompt":"a b","add_special_tokens":false,"return_token_strs":true}"#).unwrap();
    assert_eq!((&*got.model.name, got.prompt, got.return_token_strs), ("", Source::Plain("a b".into()), true));
    assert_eq!(got.template.add_special_tokens, Some(false));
}

#[test]
fn detokenize() {
    let got = Detokenize::peek(br#"{"model":"m","tokens":[1,2]}"#).unwrap();
    assert_eq!((got.model.name.as_str(), got.tokens), ("m", vec![1, 2]));
    assert!(Detokenize::peek(br#"{"tokens":[]}"#).unwrap().tokens.is_empty());
    for body in [r#"{"tokens":"a"}"#, r#"{"tokens":[-1]}"#, r#"{"tokens":[[1]]}"#, "{}", r#"{"tokens":null}"#] {
        assert_eq!(refused(Detokenize::peek(body.as_bytes())).1.as_deref(), Some("tokens"), "{body}");
    }
}

#[test]
fn deep_nesting_costs_no_stack() {
    for bomb in ["[".repeat(100_000), "{\"a\":".repeat(100_000)] {
        for key in ["messages", "prompt", "input", "tools", "tokens", "stream_options", "model", "other"] {
            let body = format!("{{\"{key}\":{bomb}");
            assert!(Chat::peek(body.as_bytes()).is_err());
            assert!(Completion::peek(body.as_bytes()).is_err());
            assert!(Embedding::peek(body.as_bytes()).is_err());
            assert!(Tokenize::peek(body.as_bytes()).is_err());
            assert!(Detokenize::peek(body.as_bytes()).is_err());
        }
    }
    let closed = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    chat(&with(&format!(",\"other\":{closed},\"tool_choice\":{closed}")));
    assert!(Completion::peek(format!(r#"{{"model":"m","prompt":{closed}}}"#).as_bytes()).is_err());
}

/// JSON as clients write it: any order of keys, white space and escapes.
pub(crate) fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "\\PC{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("\\PC{0,6}", inner, 0..4).prop_map(|map| json!(map)),
        ]
    })
}

proptest! {
    #[test]
    fn no_bytes_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Chat::peek(&body);
        let _ = Completion::peek(&body);
        let _ = Embedding::peek(&body);
        let _ = Tokenize::peek(&body);
        let _ = Detokenize::peek(&body);
    }

    /// Whatever stands in the fields: a refusal, or what serde_json reads there.
    #[test]
    fn agrees_with_a_whole_parse(
        values in prop::collection::vec((prop::sample::select(vec![
            "model", "messages", "stream", "stream_options", "max_tokens", "n", "tools", "prompt", "input", "tokens",
            "cache_salt", "user", "other", "echo",
        ]), any_json()), 0..8),
        pretty in any::<bool>(),
    ) {
        let mut object: serde_json::Map<String, Value> = values.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        object.entry("model").or_insert(json!("m"));
        object.entry("messages").or_insert(json!([{"role": "user"}]));
        let whole = Value::Object(object);
        let body = if pretty { serde_json::to_string_pretty(&whole).unwrap() } else { whole.to_string() };
        let _ = Completion::peek(body.as_bytes());
        let _ = Embedding::peek(body.as_bytes());
        let _ = Tokenize::peek(body.as_bytes());
        let _ = Detokenize::peek(body.as_bytes());
        if let Ok(got) = Chat::peek(body.as_bytes()) {
            let at = |span: Span| serde_json::from_str::<Value>(&body[span]).unwrap();
            prop_assert_eq!(whole.get("model").and_then(Value::as_str).unwrap_or_default(), got.model.name);
            if let Place::Value(span) = got.model.at {
                prop_assert_eq!(at(span), whole["model"].clone());
            }
            prop_assert_eq!(at(got.messages), whole["messages"].clone());
            prop_assert_eq!(got.tools.map(at).unwrap_or(Value::Null), whole.get("tools").cloned().unwrap_or(Value::Null));
            prop_assert_eq!(got.user.as_deref(), whole.get("user").and_then(Value::as_str));
            prop_assert_eq!(got.streaming.stream, whole.get("stream") == Some(&json!(true)));
        }
    }
}

#[test]
fn rankings() {
    let read = Ranking::rerank(br#"{"model":"m","query":"cat","documents":["a","b"],"top_n":1}"#).expect("a request");
    assert_eq!((read.model.name.as_str(), read.text_bytes), ("m", 5 + 9));
    let read = Ranking::score(br#"{"model":"m","text_1":"cat","text_2":["a"]}"#).expect("a request");
    assert_eq!(read.text_bytes, 5 + 5);
    for (body, param) in [
        (r#"{"model":"m","documents":[]}"#, "query"),
        (r#"{"model":"m","query":"q"}"#, "documents"),
        (r#"{"model":"m","query":"q","documents":"d"}"#, "documents"),
        (r#"{"model":"m","query":"q","query":"r","documents":[]}"#, "query"),
    ] {
        assert_eq!(Ranking::rerank(body.as_bytes()).expect_err(body).param.as_deref(), Some(param));
    }
}
