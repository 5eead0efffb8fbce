use proptest::prelude::*;

use super::*;

fn error(message: &str, code: Option<&str>) -> ApiError {
    ApiError {
        message: message.into(),
        kind: "invalid_request_error".into(),
        param: None,
        code: code.map(str::to_owned),
    }
}

#[test]
fn what_clients_get() {
    let body = openai_body(&error("say \"hi\"\n", Some("model_not_found")));
    assert_eq!(
        body,
        r#"{"error":{"message":"say \"hi\"\n","type":"invalid_request_error","param":null,"code":"model_not_found"}}"#
    );
    let event = openai_event(&error("a\nb", None));
    assert_eq!(
        event,
        "data: {\"error\":{\"message\":\"a\\nb\",\"type\":\"invalid_request_error\",\"param\":null,\"code\":null}}\n\n"
    );
}

#[test]
fn engines() {
    // status, body; type, code, param, message
    let cases = [
        (
            400,
            r#"{"error":{"message":"max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)","type":"BadRequestError","param":"max_tokens","code":400}}"#,
            (
                "invalid_request_error",
                None,
                Some("max_tokens"),
                "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)",
            ),
        ),
        (
            400,
            r#"{"error":{"message":"This model's maximum context length is 2048 tokens. However, …","type":"BadRequestError","param":"input_tokens","code":400}}"#,
            (
                "invalid_request_error",
                Some("context_length_exceeded"),
                Some("input_tokens"),
                "This model's maximum context length is 2048 tokens. However, …",
            ),
        ),
        (
            400,
            r#"{"error":{"message":"x","type":"Bad Request","param":"body.messages","code":400}}"#,
            ("invalid_request_error", None, Some("messages"), "x"),
        ),
        (400, r#"{"error":{"message":"x","param":"body.34"}}"#, ("invalid_request_error", None, None, "x")),
        (400, r#"{"error":{"message":"x","param":"body"}}"#, ("invalid_request_error", None, None, "x")),
        (
            404,
            r#"{"error":{"message":"The model `nope` does not exist.","type":"NotFoundError","param":null,"code":404}}"#,
            ("invalid_request_error", Some("model_not_found"), None, "The model `nope` does not exist."),
        ),
        (404, r#"{"detail":"Not Found"}"#, ("invalid_request_error", None, None, "Not Found")),
        (401, r#"{"error":"Unauthorized"}"#, ("invalid_request_error", Some("invalid_api_key"), None, "Unauthorized")),
        (
            422,
            r#"{"detail":[{"type":"missing","loc":["body","input"],"msg":"Field required"},{"loc":["body",3],"msg":"bad"},7]}"#,
            ("invalid_request_error", None, None, "body.input: Field required; body: bad"),
        ),
        (
            422,
            r#"{"error":"Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 `inputs` tokens","error_type":"validation"}"#,
            (
                "invalid_request_error",
                Some("context_length_exceeded"),
                None,
                "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 `inputs` tokens",
            ),
        ),
        (
            429,
            r#"{"error":"Model is overloaded","error_type":"overloaded"}"#,
            ("rate_limit_error", Some("rate_limit_exceeded"), None, "Model is overloaded"),
        ),
        (
            424,
            r#"{"error":"Request failed","error_type":"generation"}"#,
            ("server_error", None, None, "Request failed"),
        ),
        (
            503,
            r#"{"object":"error","message":"The request queue is full.","type":"x","param":null,"code":503}"#,
            ("service_unavailable_error", Some("server_is_overloaded"), None, "The request queue is full."),
        ),
        (
            400,
            r#"{"error":{"code":400,"message":"request (3031 tokens) exceeds the available context size (2048 tokens), try increasing it","type":"exceed_context_size_error","n_prompt_tokens":3031,"n_ctx":2048}}"#,
            (
                "invalid_request_error",
                Some("context_length_exceeded"),
                None,
                "request (3031 tokens) exceeds the available context size (2048 tokens), try increasing it",
            ),
        ),
        (
            429,
            r#"{"error":{"message":"pay","type":"insufficient_quota","param":null,"code":"insufficient_quota"}}"#,
            ("insufficient_quota", Some("insufficient_quota"), None, "pay"),
        ),
        (
            500,
            r#"{"error":"llama runner process has terminated"}"#,
            ("server_error", None, None, "llama runner process has terminated"),
        ),
        (
            400,
            "Invalid HTTP request received.",
            ("invalid_request_error", None, None, "Invalid HTTP request received."),
        ),
    ];
    for (status, body, (kind, code, param, message)) in cases {
        let got = from_engine(status, body.as_bytes());
        assert_eq!(
            (got.kind.as_str(), got.code.as_deref(), got.param.as_deref(), got.message.as_str()),
            (kind, code, param, message),
            "{body}"
        );
    }
}

#[test]
fn bodies_that_say_nothing() {
    let bodies: [&[u8]; 10] = [
        b"",
        b"  ",
        b"<html><h1>502 Bad Gateway</h1></html>",
        b"\xff\xfe",
        b"null",
        b"{}",
        b"[]",
        b"{\"error\":{}}",
        b"{\"error\":\"",
        b"a\x07b",
    ];
    for body in bodies {
        let got = from_engine(502, body);
        assert_eq!(got.message, "The model server answered with status 502 and no readable message.", "{body:?}");
        assert_eq!((got.kind.as_str(), got.code.as_deref()), ("server_error", Some("upstream_error")));
    }
    assert!(!from_engine(502, "long page ".repeat(100).as_bytes()).message.contains("page"));
}

fn kept(message: &str) -> String {
    from_engine(500, serde_json::json!({ "error": message }).to_string().as_bytes()).message
}

#[test]
fn hosts_paths_and_keys_do_not_leave() {
    let cases = [
        ("cannot reach http://10.0.0.7:8000/v1?api_key=abc now", "cannot reach [url] now"),
        ("(see 'https://user:pw@host/x')", "(see '[url]')"),
        ("tcp://gpu-a:5557", "[url]"),
        ("connect 10.0.0.7:8000 failed", "connect [host] failed"),
        ("connect to 10.0.0.7.", "connect to [host]."),
        ("[::1]:8000 and fe80::1, refused", "[[host]]:8000 and [host], refused"),
        ("worker gpu-a:8000: refused", "worker [host]: refused"),
        ("at localhost, user@gpu-a.internal:80", "at [host], [host]"),
        ("File \"/usr/lib/python3/x.py\", line 12", "File \"[path]\", line 12"),
        ("open ~/.cache/hub or C:\\models\\a or /model.gguf", "open [path] or [path] or [path]"),
        ("Incorrect API key provided: sk-abcdef123456.", "Incorrect API key provided: [key]."),
        ("Authorization: Bearer abcdef", "Authorization: Bearer [key]"),
        ("{\"api_key\": \"abcdef\"}", "{\"api_key\": \"[key]\"}"),
        ("hf_abcdefghij and password=hunter2", "[key] and password=[key]"),
    ];
    for (message, expect) in cases {
        assert_eq!(kept(message), expect);
    }
}

#[test]
fn harmless_words_stay() {
    for message in [
        "The model `meta-llama/Llama-3.1-8B` does not exist.",
        "Invalid URL (POST /v1/chat/completions)",
        "parse error at line 1, column 64: syntax error - '{'; last read: '}'",
        "Field 'max_tokens': Value must be between -1 <= value <= 2147483647, but got -5",
        "ratio 1:2, and/or, qwen2.5:7b, time 12:30, sk-",
        "see /tokenize",
    ] {
        assert_eq!(kept(message), message);
    }
}

#[test]
fn length_is_bounded() {
    let message = kept(&"é ".repeat(100_000));
    assert_eq!(message.chars().count(), 1001);
    assert!(message.ends_with('…'));
}

proptest! {
    #[test]
    fn no_body_panics(status in 0..1000_u16, body in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(!from_engine(status, &body).message.is_empty());
    }

    #[test]
    fn no_message_panics_and_no_url_leaves(before in "\\PC{0,20}", after in "\\PC{0,20}") {
        let message = kept(&format!("{before} http://secret{after}"));
        prop_assert!(!message.contains("secret"), "{}", message);
    }
}
