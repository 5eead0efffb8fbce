//! What the gateway refuses by itself: the right status, OpenAI's error shape, and not one byte to a worker.

use super::support::client::{self, Answer, Connection};
use super::support::process::{Gateway, model, tokenizer};
use super::support::recorder::{Recorder, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const EMBEDDINGS: &str = "/v1/embeddings";
const GOOD: &str = r#"{"model":"m","prompt":"hi"}"#;

/// A gateway that takes bodies of 64 KiB, before a worker that would answer anything.
struct Setting {
    gateway: Gateway,
    recorder: Recorder,
}

impl Setting {
    fn new() -> Self {
        let recorder = Recorder::start("m", vec![json("200 OK", "{}")]);
        let extra = format!("aliases = [\"alias\"]\nmax_model_len = 4096\ntokenizer = {:?}\n", tokenizer());
        let gateway = Gateway::start_unready("body_bytes_max = 65536", &model("m", &[recorder.address], &extra), &[]);
        gateway.until_ready();
        Self { gateway, recorder }
    }

    /// Asserts this status, code and parameter (empty for null), and that there is a row for it.
    fn refused(&self, answer: &Answer, status: u16, code: &str, param: &str, what: &str) {
        assert_eq!(answer.status, status, "{what}: {}", answer.text());
        let error = answer.error();
        assert_eq!(error["type"], "invalid_request_error", "{what}: {error}");
        assert_eq!(error["code"].as_str().unwrap_or_default(), code, "{what}: {error}");
        assert_eq!(error["param"].as_str().unwrap_or_default(), param, "{what}: {error}");
        assert_eq!(answer.header("x-forebay-worker"), None, "{what}");
    }

    /// Ends a test: no refused request had reached the worker when a good one does.
    fn nothing_was_sent(&self) {
        assert_eq!(self.gateway.post(COMPLETIONS, GOOD).status, 200);
        let posts = self.recorder.posts();
        let bodies: Vec<_> = posts.iter().map(|post| String::from_utf8_lossy(&post.body)).collect();
        assert_eq!(bodies, [GOOD]);
    }
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
            setting.refused(&connection.answer(), 400, "invalid_json", "", &format!("{path}: {shown}"));
        }
    }
    // Half a surrogate pair is JSON by its shape, and no text.
    let answer = setting.gateway.post(COMPLETIONS, r#"{"model":"m","prompt":"\ud800"}"#);
    setting.refused(&answer, 400, "invalid_json", "prompt", "half a surrogate pair");
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
        (r#"{"model":"","messages":[{"role":"user","content":"a"}]}"#, "model"),
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
        (CHAT, r#"{"Model":"m","messages":[{"role":"user","content":"a"}]}"#, "model"),
        (CHAT, r#"{"model":"m"}"#, "messages"),
        (CHAT, r#"{"model":"m","prompt":"a"}"#, "messages"),
        (CHAT, r#"{"model":"m","messages":null}"#, "messages"),
        (CHAT, r#"{"model":"m","messages":[{"content":"a"}]}"#, "messages[0].role"),
        (CHAT, "{}", "model"),
        (COMPLETIONS, r#"{"model":"m"}"#, "prompt"),
        (COMPLETIONS, r#"{"model":"m","prompt":null}"#, "prompt"),
        (EMBEDDINGS, r#"{"model":"m"}"#, "input"),
        (EMBEDDINGS, r#"{"input":"a"}"#, "model"),
    ] {
        setting.refused(&setting.gateway.post(path, body), 400, "missing_required_parameter", param, body);
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
        setting.refused(&setting.gateway.post(path, body), 400, "duplicate_parameter", param, body);
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
            setting.refused(&answer, 404, "model_not_found", "model", name);
        }
    }
    // A name as long as the body may be is not said back.
    let answer = setting.gateway.post(COMPLETIONS, &format!(r#"{{"model":"{}","prompt":"a"}}"#, "x".repeat(60_000)));
    setting.refused(&answer, 404, "model_not_found", "model", "a long name");
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
        setting.refused(&answer, 400, "context_length_exceeded", param, &body[body.len().saturating_sub(80)..]);
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
fn bodies_that_are_too_large() {
    let setting = Setting::new();
    let body = format!(r#"{{"model":"m","prompt":"a","x":"{}"}}"#, "y".repeat(65_536));
    let check = |answer: &Answer, what: &str| {
        setting.refused(answer, 413, "request_too_large", "", what);
        assert_eq!(answer.header("connection"), Some("close"), "{what}: the rest of the body is not read");
    };
    // Announced: refused before a byte of it is there.
    let head = format!("POST {COMPLETIONS} HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\n");
    for length in [65_537_u64, 1 << 40, u64::MAX] {
        let mut connection = Connection::to(setting.gateway.client);
        connection.send(format!("{head}content-length: {length}\r\n\r\n").as_bytes());
        let answer = connection.answer();
        if length == u64::MAX && answer.status == 400 {
            continue; // no length that HTTP would let pass
        }
        check(&answer, &length.to_string());
    }
    // Not announced: refused where the bound is passed, also when it never ends.
    let mut connection = Connection::to(setting.gateway.client);
    connection.send(format!("{head}transfer-encoding: chunked\r\n\r\n").as_bytes());
    connection.send(format!("{:x}\r\n{body}\r\n", body.len()).as_bytes());
    check(&connection.answer(), "chunked");
    // The largest body that is taken is taken.
    let fitting = format!(r#"{{"model":"x","prompt":"a","y":"{}"}}"#, "z".repeat(65_536 - 35));
    assert_eq!(fitting.len(), 65_536 + fitting.len() - 65_536);
    let answer = setting.gateway.post(COMPLETIONS, &format!("{fitting}{}", " ".repeat(65_536 - fitting.len())));
    setting.refused(&answer, 404, "model_not_found", "model", "65536 bytes");
    let answer = setting.gateway.post(COMPLETIONS, &format!("{fitting}{}", " ".repeat(65_537 - fitting.len())));
    check(&answer, "65537 bytes");
    setting.nothing_was_sent();
}

#[test]
fn content_types_and_encodings_that_are_not_read() {
    let setting = Setting::new();
    let send = |headers: &str| {
        let head =
            format!("POST {COMPLETIONS} HTTP/1.1\r\nhost: t\r\n{headers}content-length: {}\r\n\r\n{GOOD}", GOOD.len());
        client::request(setting.gateway.client, head.as_bytes())
    };
    for headers in [
        "content-type: text/plain\r\n",
        "content-type: application/x-www-form-urlencoded\r\n",
        "content-type: multipart/form-data; boundary=x\r\n",
        "content-type: application/jsonx\r\n",
        "content-type: \r\n",
        "content-type: application/json\r\ncontent-encoding: gzip\r\n",
        "content-encoding: zstd\r\n",
        "content-encoding: identity, gzip\r\n",
    ] {
        setting.refused(&send(headers), 415, "", "", headers);
    }
    assert!(setting.recorder.posts().is_empty());
    for (count, headers) in [
        "",
        "content-type: application/json; charset=utf-8\r\n",
        "content-type: APPLICATION/JSON\r\n",
        "content-type: application/vnd.openai+json\r\n",
        "content-encoding: identity\r\n",
    ]
    .iter()
    .enumerate()
    {
        assert_eq!(send(headers).status, 200, "{headers}");
        assert_eq!(setting.recorder.posts().len(), count + 1);
    }
}

#[test]
fn unknown_paths_and_wrong_methods() {
    let setting = Setting::new();
    let send = |method: &str, path: &str| {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{GOOD}",
            GOOD.len()
        );
        client::request(setting.gateway.client, head.as_bytes())
    };
    for path in [
        "/",
        "/v1",
        "/v1/",
        "/v2/completions",
        "/v1/chat",
        "/v1/chat/completions/",
        "/v1/completions/",
        "/v1//completions",
        "/v1/chat%2Fcompletions",
        "/V1/completions",
        "/v1/../sleep",
        "/completions",
        "/chat/completions",
        // What engines leave open.
        "/sleep",
        "/wake_up",
        "/is_sleeping",
        "/reset_prefix_cache",
        "/reset_mm_cache",
        "/collective_rpc",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/start_profile",
        "/stop_profile",
        "/update_weights",
        "/pause",
        "/resume",
        "/scale_elastic_ep",
        "/abort_requests",
        "/server_info",
        "/flush_cache",
        "/slots/0",
        "/props",
        "/load",
        "/version",
        "/ping",
        "/invocations",
        "/tokenizer_info",
        "/docs",
        "/openapi.json",
        "/api/generate",
        "/generate",
        // What is the other listener's.
        "/metrics",
        "/livez",
        "/readyz",
        "/admin/v1/keys",
        "/ui/",
        "/simulated/faults",
    ] {
        for method in ["POST", "GET", "PUT", "DELETE"] {
            let answer = send(method, path);
            setting.refused(&answer, 404, "", "", path);
            let expected = format!("Invalid URL ({method} {path})");
            assert_eq!(answer.error()["message"], expected.as_str());
        }
    }
    for (method, path) in [
        ("GET", CHAT),
        ("PUT", CHAT),
        ("DELETE", COMPLETIONS),
        ("PATCH", EMBEDDINGS),
        ("GET", "/tokenize"),
        ("OPTIONS", "/detokenize"),
        ("POST", "/v1/models"),
        ("DELETE", "/v1/models/m"),
        ("POST", "/health"),
    ] {
        let answer = send(method, path);
        setting.refused(&answer, 405, "", "", &format!("{method} {path}"));
        assert!(answer.header("allow").is_some(), "{method} {path}: {:?}", answer.headers);
    }
    assert_eq!(client::get(setting.gateway.client, "/health").status, 200);
    setting.nothing_was_sent();
}

#[test]
fn headers_that_cannot_be_meant() {
    let setting = Setting::new();
    for (line, param) in [
        ("x-forebay-priority: urgent", "x-forebay-priority"),
        ("x-forebay-priority: INTERACTIVE", "x-forebay-priority"),
        ("x-forebay-priority: ", "x-forebay-priority"),
        ("x-forebay-priority: 1", "x-forebay-priority"),
        ("x-forebay-deadline-ms: 0", "x-forebay-deadline-ms"),
        ("x-forebay-deadline-ms: -5", "x-forebay-deadline-ms"),
        ("x-forebay-deadline-ms: 1.5", "x-forebay-deadline-ms"),
        ("x-forebay-deadline-ms: soon", "x-forebay-deadline-ms"),
        ("x-forebay-deadline-ms: ", "x-forebay-deadline-ms"),
        ("x-forebay-deadline-ms: 99999999999999999999", "x-forebay-deadline-ms"),
    ] {
        let answer = client::post_with(setting.gateway.client, COMPLETIONS, &[line], GOOD);
        setting.refused(&answer, 400, "invalid_value", param, line);
    }
    setting.nothing_was_sent();
    for line in ["x-forebay-priority: batch", "x-forebay-priority: default", "x-forebay-deadline-ms: 4294967295"] {
        let answer = client::post_with(setting.gateway.client, COMPLETIONS, &[line], GOOD);
        assert_eq!(answer.status, 200, "{line}: {}", answer.text());
    }
}

#[test]
fn a_request_id_comes_back_where_it_is_harmless() {
    let setting = Setting::new();
    for (sent, kept) in
        [("abc-1.2:3_4", true), ("a b", false), ("a\"b", false), ("", false), (&*"x".repeat(129), false)]
    {
        let line = format!("x-request-id: {sent}");
        for path in [COMPLETIONS, "/nowhere"] {
            let answer = client::post_with(setting.gateway.client, path, &[&line], "{}");
            assert!(answer.status == 400 || answer.status == 404);
            assert_eq!(answer.header("x-request-id") == Some(sent), kept, "{sent:?}: {:?}", answer.headers);
        }
    }
    setting.nothing_was_sent();
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
