#![expect(clippy::needless_pass_by_value, reason = "literals read better without borrows")]

use serde_json::json;

use super::*;

fn normalized(format: ContentFormat, messages: &Value) -> Result<(Vec<Value>, bool), Error> {
    let messages = messages.to_string();
    let mut parsed = Parsed::new(&Chat::new(messages.as_bytes(), SystemTime::UNIX_EPOCH))?;
    let exact = parsed.normalize(format)?;
    Ok((parsed.messages, exact))
}

#[track_caller]
fn check(format: ContentFormat, message: Value, expect: Value) {
    let (messages, exact) = normalized(format, &json!([message])).unwrap();
    // as text, since the order of fields shows in templates
    assert_eq!(messages[0].to_string(), expect.to_string());
    assert!(exact);
}

#[track_caller]
fn check_inexact(format: ContentFormat, content: Value, expect: Value) {
    let (messages, exact) = normalized(format, &json!([{"role": "user", "content": content}])).unwrap();
    assert_eq!(messages[0]["content"], expect);
    assert!(!exact);
}

use ContentFormat::{Parts, Text};

#[test]
fn contents_take_the_shape_that_the_template_wants() {
    let text = |text: &str| json!({"type": "text", "text": text});
    for (content, as_text, as_parts) in [
        (json!("a"), json!("a"), json!([text("a")])),
        (json!(""), json!(""), json!([text("")])),
        (json!(null), json!(""), json!([])),
        (json!([]), json!(""), json!([])),
        (json!([text("a"), text("b")]), json!("a\nb"), json!([text("a"), text("b")])),
        (json!([text("a"), text(""), text("b")]), json!("a\nb"), json!([text("a"), text(""), text("b")])),
        (json!(["a", {"type": "refusal", "refusal": "no"}]), json!("a\nno"), json!([text("a"), text("no")])),
        (
            json!([{"type": "text", "text": null}, {"type": "thinking", "thinking": "t"}]),
            json!("t"),
            json!([text("t")]),
        ),
        (json!([{"type": "input_text", "text": "i", "cache_control": 1}]), json!("i"), json!([text("i")])),
    ] {
        let message = json!({"role": "user", "content": content});
        check(Text, message.clone(), json!({"role": "user", "content": as_text}));
        check(Parts, message, json!({"role": "user", "content": as_parts}));
    }
    check(Text, json!({"role": "user"}), json!({"role": "user", "content": ""}));
    let tool = json!({"role": "tool", "content": [text("a"), text(""), text("b")], "tool_call_id": "1"});
    check(Parts, tool, json!({"role": "tool", "content": "a\n\nb", "tool_call_id": "1"}));
}

#[test]
fn what_is_not_text_makes_the_count_an_estimate() {
    let image = json!({"type": "image_url", "image_url": {"url": "data:,"}});
    check_inexact(Text, json!([image, {"type": "text", "text": "a"}]), json!("a"));
    check_inexact(Parts, json!([image]), json!([{"type": "image"}]));
    check_inexact(
        Parts,
        json!([{"image_url": "x"}, {"type": "input_audio"}]),
        json!([{"type": "image"}, {"type": "audio"}]),
    );
    check_inexact(Text, json!([{"type": "unheard_of"}, {}, 3, {"type": "text", "text": 3}]), json!(""));
}

#[test]
fn messages_keep_the_fields_that_vllm_knows() {
    check(Text, json!({"role": "developer", "content": "a", "tools": []}), json!({"role": "system", "content": "a"}));
    check(
        Text,
        json!({"content": "a", "role": "user", "name": "bob", "x": 1}),
        json!({"role": "user", "content": "a", "name": "bob"}),
    );
    check(
        Text,
        json!({"role": "user", "content": "a", "name": 3, "tool_calls": [1], "reasoning": "r"}),
        json!({"role": "user", "content": "a"}),
    );
    let both = json!({"role": "assistant", "content": "a", "reasoning": "r", "reasoning_content": "r"});
    check(Text, json!({"role": "assistant", "content": "a", "reasoning_content": "r"}), both.clone());
    check(Text, json!({"role": "assistant", "content": "a", "reasoning": "r", "reasoning_content": null}), both);
}

#[test]
fn arguments_of_tool_calls_become_objects() {
    let called = |arguments: Value| {
        json!({"role": "assistant", "content": null, "tool_calls":
            [{"type": "function", "index": 0, "function": {"name": "f", "arguments": arguments}, "id": "1"}]})
    };
    for (sent, expect) in [
        (json!("{\"b\": 1, \"a\": [2.0]}"), json!({"b": 1, "a": [2.0]})),
        (json!({"a": 1}), json!({"a": 1})),
        (json!("[1]"), json!([1])),
        (json!(""), json!({})),
        (json!("no json"), json!({})),
        (json!(null), json!({})),
        (json!(3), json!({})),
    ] {
        let call = json!({"id": "1", "function": {"arguments": expect, "name": "f"}, "type": "function"});
        check(Text, called(sent), json!({"role": "assistant", "content": "", "tool_calls": [call]}));
    }
    let none = json!({"role": "assistant", "content": "a"});
    check(Text, json!({"role": "assistant", "content": "a", "tool_calls": []}), none.clone());
    check(Text, json!({"role": "assistant", "content": "a", "tool_calls": null}), none);
}

#[test]
fn tools_are_written_in_vllms_order_with_absent_fields_as_null() {
    let tools = br#"[{"x": 1, "function": {"strict": true, "parameters": {"b": 1, "a": 2}, "name": "f"}}]"#;
    let mut parsed = Parsed::new(&Chat { tools: Some(tools), ..Chat::new(b"[]", SystemTime::UNIX_EPOCH) }).unwrap();
    assert!(parsed.normalize(Text).unwrap());
    let expect = r#"[{"type":"function","function":{"name":"f","description":null,"parameters":{"b":1,"a":2},"strict":true},"x":1}]"#;
    assert_eq!(Value::from(parsed.tools.unwrap()).to_string(), expect);
}

#[test]
fn what_is_no_chat_is_refused_by_field() {
    let field = |chat: Chat<'_>| match Parsed::new(&chat).and_then(|mut parsed| parsed.normalize(Text)) {
        Err(Error::Field { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    let messages = |json: &'static str| Chat::new(json.as_bytes(), SystemTime::UNIX_EPOCH);
    for json in ["", "{}", "null", "[1", "\"a\"", "[] 1"] {
        assert_eq!(field(messages(json)), "messages", "{json}");
    }
    assert_eq!(field(messages("[{\"role\": \"user\"}, 3]")), "messages[1]");
    for role in ["", "\"role\": 3", "\"role\": null"] {
        let json = format!("[{{{role}}}]");
        assert_eq!(field(Chat::new(json.as_bytes(), SystemTime::UNIX_EPOCH)), "messages[0].role");
    }
    assert_eq!(field(messages("[{\"role\": \"user\", \"content\": 3}]")), "messages[0].content");
    let deep = "[".repeat(100_000);
    assert_eq!(field(Chat::new(deep.as_bytes(), SystemTime::UNIX_EPOCH)), "messages");
    assert_eq!(field(Chat { tools: Some(b"{}"), ..messages("[]") }), "tools");
    assert_eq!(field(Chat { tools: Some(b"[1]"), ..messages("[]") }), "tools[0]");
    assert_eq!(field(Chat { documents: Some(b"[null]"), ..messages("[]") }), "documents[0]");
    assert_eq!(field(Chat { kwargs: Some(b"[]"), ..messages("[]") }), "chat_template_kwargs");
    assert!(Parsed::new(&Chat { tools: Some(b"null"), ..messages("[]") }).unwrap().tools.is_none());
}
