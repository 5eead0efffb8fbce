//! What the gateway refuses because of what a body says: the right status, OpenAI's error shape, and not one byte to a
//! worker. What HTTP alone tells is in `http_refusals`.

use super::support::client::{Answer, Connection};
use super::support::process::{Gateway, model, tokenizer};
use super::support::recorder::{Recorder, json};

pub(super) const CHAT: &str = "/v1/chat/completions";
pub(super) const COMPLETIONS: &str = "/v1/completions";
pub(super) const EMBEDDINGS: &str = "/v1/embeddings";
pub(super) const GOOD: &str = r#"{"model":"m","prompt":"hi"}"#;

/// A gateway that takes bodies of 64 KiB, before a worker that would answer anything.
pub(super) struct Setting {
    pub(super) gateway: Gateway,
    pub(super) recorder: Recorder,
}

impl Setting {
    pub(super) fn new() -> Self {
        let recorder = Recorder::start("m", vec![json("200 OK", "{}")]);
        let extra = format!("aliases = [\"alias\"]\nmax_model_len = 4096\ntokenizer = {:?}\n", tokenizer());
        let gateway = Gateway::start_unready("body_bytes_max = 65536", &model("m", &[recorder.address], &extra), &[]);
        gateway.until_ready();
        Self { gateway, recorder }
    }

    /// Ends a test: no refused request had reached the worker when a good one does.
    pub(super) fn nothing_was_sent(&self) {
        assert_eq!(self.gateway.post(COMPLETIONS, GOOD).status, 200);
        let posts = self.recorder.posts();
        let bodies: Vec<_> = posts.iter().map(|post| String::from_utf8_lossy(&post.body)).collect();
        assert_eq!(bodies, [GOOD]);
    }
}

/// Asserts a refusal with this status, code and parameter (empty for null), of which no worker is named.
pub(super) fn refused(answer: &Answer, status: u16, code: &str, param: &str, what: &str) {
    assert_eq!(answer.status, status, "{what}: {}", answer.text());
    let error = answer.error();
    assert_eq!(error["type"], "invalid_request_error", "{what}: {error}");
    assert_eq!(error["code"].as_str().unwrap_or_default(), code, "{what}: {error}");
    assert_eq!(error["param"].as_str().unwrap_or_default(), param, "{what}: {error}");
    assert_eq!(answer.header("x-forebay-worker"), None, "{what}");
}

/// A chat body with more members.
fn chat(members: &str) -> String {
    format!(r#"{{"model":"m","messages":[{{"role":"user","content":"hi"}}]{members}}}"#)
}

#[test]
fn bodies_that_are_not_a_json_object() {
    let setting = Setting::new();
    let deep = format!(r#"{{"model":"m","prompt":"a","x":{}"#, "[".repeat(60_000));
    let bodies: &[&[u8]] = &[
        b"",
        b" \n",
        b"null",
        b"7",
        b"\"model\"",
        b"[]",
        b"[{\"model\":\"m\",\"prompt\":\"a\"}]",
        b"{",
        b"{\"model\":\"m\",\"prompt\":\"a\"",
        b"{\"model\":\"m\",\"prompt\":\"a\"}}",
        b"{\"model\":\"m\",\"prompt\":\"a\"} x",
        b"{\"model\":\"m\",\"prompt\":\"a\"}{\"model\":\"m\",\"prompt\":\"a\"}",
        b"{\"model\":\"m\",\"prompt\":\"a\",}",
        b"{'model':'m','prompt':'a'}",
        b"{model:\"m\",prompt:\"a\"}",
        b"{\"model\":\"m\",\"prompt\":\"a\",\"temperature\":NaN}",
        b"{\"model\":\"m\",\"prompt\":\"a\",\"temperature\":01}",
        b"{\"model\":\"m\",\"prompt\":\"a\" /* b */}",
        b"{\"model\":\"m\",\"prompt\":\"a\tb\"}",
        b"{\"model\":\"m\",\"prompt\":\"\xff\"}",
        b"{\"model\":\"m\",\"prompt\":\"\xed\xa0\x80\"}",
        b"\xef\xbb\xbf{\"model\":\"m\",\"prompt\":\"a\"}",
        b"{\"model\":\"m\",\"prompt\":\"a\"}\0",
        b"\xfe\xff\0{\0}",
        b"--boundary\r\ncontent-disposition: form-data\r\n\r\na",
        deep.as_bytes(),
    ];
    for path in [CHAT, COMPLETIONS, EMBEDDINGS, "/tokenize", "/detokenize"] {
        for body in bodies {
            let mut connection = Connection::to(setting.gateway.client);
            connection.post(path, &[], body);
            let shown = String::from_utf8_lossy(&body[..body.len().min(60)]).into_owned();
            refused(&connection.answer(), 400, "invalid_json", "", &format!("{path}: {shown}"));
        }
    }
    // Half a surrogate pair is JSON by its shape, and no text.
    let answer = setting.gateway.post(COMPLETIONS, r#"{"model":"m","prompt":"\ud800"}"#);
    refused(&answer, 400, "invalid_json", "prompt", "half a surrogate pair");
    setting.nothing_was_sent();
}

#[test]
fn values_of_the_wrong_type_or_range() {
    let setting = Setting::new();
    let field = |name: &str, values: &[&str]| -> Vec<(&'static str, String, String)> {
        values.iter().map(|value| (CHAT, chat(&format!(",\"{name}\":{value}")), name.to_owned())).collect()
    };
    let mut cases = Vec::new();
    let not_boolean = ["1", "0", "\"true\"", "[]", "{}"];
    let not_count = ["0", "-1", "1.5", "\"1\"", "true", "[1]", "{}", "1e300", "99999999999999999999"];
    cases.extend(field("stream", &not_boolean));
    cases.extend(field("n", &not_count));
    cases.extend(field("n", &["129"]));
    cases.extend(field("max_tokens", &not_count));
    cases.extend(field("max_completion_tokens", &not_count));
    cases.extend(field("max_completion_tokens", &["4294967296"]));
    cases.extend(field("tools", &["{}", "\"a\"", "1", "true"]));
    cases.extend(field("user", &["1", "[]", "{}", "false"]));
    cases.extend(field("cache_salt", &["1", "[]"]));
    cases.extend(field("add_generation_prompt", &not_boolean));
    cases.extend(field("continue_final_message", &not_boolean));
    cases.extend(field("truncate_prompt_tokens", &["-2", "\"1\"", "1.5"]));
    cases.extend(field("truncation_side", &["\"up\"", "1"]));
    for (members, param) in [
        (r#","stream":true,"stream_options":[]"#, "stream_options"),
        (r#","stream":true,"stream_options":true"#, "stream_options"),
        (r#","stream":true,"stream_options":{"include_usage":1}"#, "stream_options.include_usage"),
        (r#","stream":true,"stream_options":{"include_usage":"true"}"#, "stream_options.include_usage"),
        (r#","stream_options":{"include_usage":true}"#, "stream_options"),
        (r#","stream":false,"stream_options":{}"#, "stream_options"),
        (r#","max_tokens":1,"max_completion_tokens":2"#, "max_tokens"),
    ] {
        cases.push((CHAT, chat(members), param.to_owned()));
    }
    for (body, param) in [
        (r#"{"model":7,"messages":[{"role":"user","content":"a"}]}"#, "model"),
        (r#"{"model":["m"],"messages":[{"role":"user","content":"a"}]}"#, "model"),
        (r#"{"model":"m","messages":[]}"#, "messages"),
        (r#"{"model":"m","messages":{}}"#, "messages"),
        (r#"{"model":"m","messages":"a"}"#, "messages"),
        (r#"{"model":"m","messages":["a"]}"#, "messages[0]"),
        (r#"{"model":"m","messages":[{"role":"user","content":"a"},null]}"#, "messages[1]"),
        (r#"{"model":"m","messages":[{"role":7,"content":"a"}]}"#, "messages[0].role"),
    ] {
        cases.push((CHAT, body.to_owned(), param.to_owned()));
    }
    for (value, param) in [
        ("7", "prompt"),
        ("{}", "prompt"),
        ("true", "prompt"),
        ("[]", "prompt"),
        ("[[]]", "prompt[0]"),
        ("[{}]", "prompt[0]"),
        ("[1,\"a\"]", "prompt"),
        ("[1,-1]", "prompt"),
        ("[1.5]", "prompt"),
        ("[[1],2]", "prompt"),
        ("[\"a\",null]", "prompt"),
    ] {
        cases.push((COMPLETIONS, format!(r#"{{"model":"m","prompt":{value}}}"#), param.to_owned()));
        cases.push((EMBEDDINGS, format!(r#"{{"model":"m","input":{value}}}"#), param.replace("prompt", "input")));
    }
    for (path, body, param) in &cases {
        let answer = setting.gateway.post(path, body);
        assert_eq!(answer.status, 400, "{body}: {}", answer.text());
        let error = answer.error();
        assert_eq!(
            (&error["type"], error["param"].as_str()),
            (&"invalid_request_error".into(), Some(param.as_str())),
            "{body}: {error}"
        );
        assert!(matches!(error["code"].as_str(), Some("invalid_type" | "invalid_value")), "{body}: {error}");
        assert!(error["message"].as_str().is_some_and(|message| message.contains(param.as_str())), "{body}: {error}");
    }
    println!("{} bodies", cases.len());
    setting.nothing_was_sent();
}

#[test]
fn missing_and_doubled_fields() {
    let setting = Setting::new();
    for (path, body, param) in [
        (CHAT, r#"{"messages":[{"role":"user","content":"a"}]}"#, "model"),
        (CHAT, r#"{"model":null,"messages":[{"role":"user","content":"a"}]}"#, "model"),
        (CHAT, r#"{"model":"","messages":[{"role":"user","content":"a"}]}"#, "model"),
        (CHAT, r#"{"Model":"m","messages":[{"role":"user","content":"a"}]}"#, "model"),
        (CHAT, r#"{"model":"m"}"#, "messages"),
        (CHAT, r#"{"model":"m","prompt":"a"}"#, "messages"),
        (CHAT, r#"{"model":"m","messages":null}"#, "messages"),
        (CHAT, r#"{"model":"m","messages":[{"content":"a"}]}"#, "messages[0].role"),
        (CHAT, "{}", "messages"),
        (COMPLETIONS, r#"{"model":"m"}"#, "prompt"),
        (COMPLETIONS, r#"{"model":"m","prompt":null}"#, "prompt"),
        (EMBEDDINGS, r#"{"model":"m"}"#, "input"),
        (EMBEDDINGS, r#"{"input":"a"}"#, "model"),
    ] {
        refused(&setting.gateway.post(path, body), 400, "missing_required_parameter", param, body);
    }
    for (path, body, param) in [
        (CHAT, r#"{"model":"m","model":"m","messages":[{"role":"user","content":"a"}]}"#, "model"),
        (CHAT, r#"{"model":"m","messages":[{"role":"user","content":"a"}],"mod\u0065l":"other"}"#, "model"),
        (CHAT, r#"{"\u006dodel":"m","messages":[{"role":"user","content":"a"}],"\u006Dodel":null}"#, "model"),
        (CHAT, r#"{"model":"m","messages":[{"role":"user","content":"a"}],"messages":[]}"#, "messages"),
        (CHAT, r#"{"model":"m","messages":[{"role":"user","content":"a"}],"stream":false,"stream":true}"#, "stream"),
        (CHAT, r#"{"model":"m","messages":[{"role":"user","content":"a"}],"n":1,"\u006e":2}"#, "n"),
        (
            CHAT,
            r#"{"model":"m","messages":[{"role":"user","content":"a"}],"stream":true,"stream_options":{"include_usage":true,"include_usag\u0065":false}}"#,
            "stream_options.include_usage",
        ),
        (COMPLETIONS, r#"{"model":"m","prompt":"a","prompt":"b"}"#, "prompt"),
        (COMPLETIONS, r#"{"model":"m","prompt":"a","max_tokens":1,"max_tokens":1}"#, "max_tokens"),
        (EMBEDDINGS, r#"{"model":"m","input":"a","inpu\u0074":"b"}"#, "input"),
        ("/tokenize", r#"{"model":"m","model":"x","prompt":"a"}"#, "model"),
    ] {
        refused(&setting.gateway.post(path, body), 400, "duplicate_parameter", param, body);
    }
    setting.nothing_was_sent();
}

#[test]
fn models_that_nobody_serves() {
    let setting = Setting::new();
    for name in ["x", "M", " m", "m ", "m\\u0000", "org/m", "alia", "../m", "日本"] {
        for (path, rest) in [
            (CHAT, r#""messages":[{"role":"user","content":"a"}]"#),
            (COMPLETIONS, r#""prompt":"a""#),
            (EMBEDDINGS, r#""input":"a""#),
            ("/tokenize", r#""prompt":"a""#),
        ] {
            let answer = setting.gateway.post(path, &format!("{{\"model\":\"{name}\",{rest}}}"));
            refused(&answer, 404, "model_not_found", "model", name);
        }
    }
    // A name as long as the body may be is not said back.
    let answer = setting.gateway.post(COMPLETIONS, &format!(r#"{{"model":"{}","prompt":"a"}}"#, "x".repeat(60_000)));
    refused(&answer, 404, "model_not_found", "model", "a long name");
    assert!(answer.body.len() < 1000);
    setting.nothing_was_sent();
}

#[test]
fn prompts_that_do_not_fit_the_context() {
    let setting = Setting::new();
    let words = "word ".repeat(6000);
    let ids = |count: usize| format!("{:?}", vec![5; count]);
    let cases = [
        (CHAT, format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{words}"}}]}}"#)),
        (
            CHAT,
            format!(
                r#"{{"model":"alias","messages":[{{"role":"user","content":"{words}"}}],"max_tokens":1,"stream":true}}"#
            ),
        ),
        (CHAT, chat(r#","max_tokens":4096"#)),
        (CHAT, chat(r#","max_completion_tokens":4294967295"#)),
        (COMPLETIONS, format!(r#"{{"model":"m","prompt":"{words}"}}"#)),
        (COMPLETIONS, format!(r#"{{"model":"m","prompt":["hi","{words}"]}}"#)),
        (COMPLETIONS, r#"{"model":"m","prompt":"hi","max_tokens":4096}"#.to_owned()),
        (COMPLETIONS, format!(r#"{{"model":"m","prompt":{}}}"#, ids(4096))),
        (COMPLETIONS, format!(r#"{{"model":"m","prompt":{},"max_tokens":97}}"#, ids(4000))),
        (COMPLETIONS, format!(r#"{{"model":"m","prompt":[[1],{}]}}"#, ids(5000))),
        (EMBEDDINGS, format!(r#"{{"model":"m","input":"{words}"}}"#)),
        (EMBEDDINGS, format!(r#"{{"model":"m","input":{}}}"#, ids(4097))),
    ];
    for (path, body) in &cases {
        let answer = setting.gateway.post(path, body);
        let param = if *path == CHAT {
            "messages"
        } else if *path == COMPLETIONS {
            "prompt"
        } else {
            "input"
        };
        refused(&answer, 400, "context_length_exceeded", param, &body[body.len().saturating_sub(80)..]);
        let error = answer.error();
        assert!(
            error["message"].as_str().is_some_and(|message| message.contains("maximum context length is 4096 tokens")),
            "{error}"
        );
    }
    // To the token: what just fits goes through.
    setting.nothing_was_sent();
    for (path, body) in [
        (COMPLETIONS, format!(r#"{{"model":"m","prompt":{},"max_tokens":96}}"#, ids(4000))),
        (COMPLETIONS, format!(r#"{{"model":"m","prompt":{}}}"#, ids(4095))),
        (COMPLETIONS, format!(r#"{{"model":"m","prompt":{},"truncate_prompt_tokens":100}}"#, ids(5000))),
        (EMBEDDINGS, format!(r#"{{"model":"m","input":{}}}"#, ids(4096))),
    ] {
        let answer = setting.gateway.post(path, &body);
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
}

#[test]
fn every_refusal_of_a_call_has_a_row() {
    let setting = Setting::new();
    for (path, body, status) in
        [(CHAT, "", 400), (COMPLETIONS, r#"{"model":"x","prompt":"a"}"#, 404), (EMBEDDINGS, "[]", 400)]
    {
        let answer = setting.gateway.post(path, body);
        let row = setting.gateway.row(answer.header("x-request-id").expect("a name"));
        assert_eq!(
            (&row["status"], &row["outcome"], &row["attempts"]),
            (&status.into(), &"refused".into(), &0.into()),
            "{row}"
        );
        assert!(row.get("worker").is_none(), "{row}");
    }
    setting.nothing_was_sent();
}
