//! What the gateway refuses because of what HTTP alone tells: sizes, framing, types, paths, methods, headers.

use std::io::Read;
use std::net::Shutdown;
use std::time::Duration;

use flate2::Compression;
use flate2::read::{GzEncoder, ZlibEncoder};
use ruzstd::encoding::{CompressionLevel, compress_to_vec};

use super::refusals::{CHAT, COMPLETIONS, EMBEDDINGS, GOOD, Setting, refused};
use super::support::client::{self, Answer, Connection};

#[test]
fn bodies_that_are_too_large() {
    let setting = Setting::new();
    let body = format!(r#"{{"model":"m","prompt":"a","x":"{}"}}"#, "y".repeat(65_536));
    let check = |answer: &Answer, what: &str| {
        refused(answer, 413, "request_too_large", "", what);
        assert_eq!(answer.header("connection"), Some("close"), "{what}: the rest of the body is not read");
    };
    // Announced: refused before a byte of it is there.
    let head = format!("POST {COMPLETIONS} HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\n");
    for length in [65_537_u64, 1 << 62] {
        let mut connection = Connection::to(setting.gateway.client);
        connection.send(format!("{head}content-length: {length}\r\n\r\n").as_bytes());
        check(&connection.answer(), &length.to_string());
    }
    // Not announced: refused where the bound is passed, also when it never ends.
    let mut connection = Connection::to(setting.gateway.client);
    connection.send(format!("{head}transfer-encoding: chunked\r\n\r\n").as_bytes());
    connection.send(format!("{:x}\r\n{body}\r\n", body.len()).as_bytes());
    check(&connection.answer(), "chunked");
    // The largest body that is taken is taken.
    let unknown = r#"{"model":"x","prompt":"a"}"#;
    let fitting = format!("{unknown}{}", " ".repeat(65_536 - unknown.len()));
    let answer = setting.gateway.post(COMPLETIONS, &fitting);
    refused(&answer, 404, "model_not_found", "model", "65536 bytes");
    check(&setting.gateway.post(COMPLETIONS, &format!("{fitting} ")), "65537 bytes");
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
        "content-type: application/json\r\ncontent-encoding: br\r\n",
        "content-encoding: \r\n",
        "content-encoding: gzip, gzip\r\n",
        "content-encoding: identity, gzip\r\n",
        "content-encoding: gzip\r\ncontent-encoding: identity\r\n",
    ] {
        refused(&send(headers), 415, "", "", headers);
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
            refused(&answer, 404, "", "", path);
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
        refused(&answer, 405, "", "", &format!("{method} {path}"));
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
        refused(&answer, 400, "invalid_value", param, line);
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
fn bodies_that_do_not_come_whole() {
    let setting = Setting::new();
    let head = format!("POST {COMPLETIONS} HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\n");
    let longer = format!("content-length: {}", GOOD.len() + 1);
    let chunk = format!("{:x}\r\n{GOOD}\r\n", GOOD.len());
    for (framing, part) in [
        (&*longer, r#"{"model":"m","prompt":"h"#),
        (&*longer, GOOD),
        ("transfer-encoding: chunked", &*chunk),
        ("transfer-encoding: chunked", &chunk[..chunk.len() - 9]),
        ("transfer-encoding: chunked", &chunk.replacen('b', "z", 1)),
    ] {
        let mut connection = Connection::to(setting.gateway.client);
        connection.send(format!("{head}{framing}\r\n\r\n{part}").as_bytes());
        // The client says that nothing more will come, and still listens.
        connection.socket.shutdown(Shutdown::Write).expect("a socket");
        let answer = connection.answer();
        refused(&answer, 400, "", "", part);
        assert_eq!(answer.header("connection"), Some("close"));
    }
    // Framing in two ways is how requests are smuggled: the body is what both mean, or nothing.
    let mut connection = Connection::to(setting.gateway.client);
    connection.send(format!("{head}content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n").as_bytes());
    refused(&connection.answer(), 400, "invalid_json", "", "two framings");
    setting.nothing_was_sent();
}

#[test]
fn a_client_that_asks_first_is_told_before_it_sends() {
    let setting = Setting::new();
    let head =
        format!("POST {COMPLETIONS} HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\nexpect: 100-continue\r\n");
    let mut connection = Connection::to(setting.gateway.client);
    connection.send(format!("{head}content-length: 70000\r\n\r\n").as_bytes());
    let first = connection.until(b"\r\n\r\n");
    assert!(first.starts_with(b"HTTP/1.1 413 "), "{}", String::from_utf8_lossy(&first));
    let mut connection = Connection::to(setting.gateway.client);
    connection.send(format!("{head}content-length: {}\r\n\r\n", GOOD.len()).as_bytes());
    let first = connection.until(b"\r\n\r\n");
    assert!(first.starts_with(b"HTTP/1.1 100 "), "{}", String::from_utf8_lossy(&first));
    connection.send(b"[]");
    connection.send(" ".repeat(GOOD.len() - 2).as_bytes());
    refused(&connection.answer(), 400, "invalid_json", "", "after 100");
    setting.nothing_was_sent();
}

/// The HTTP library refuses these before any of our code sees them.
#[test]
fn requests_that_cannot_be_read() {
    let setting = Setting::new();
    let many = format!("POST {COMPLETIONS} HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(200));
    for (status, bytes) in [
        (400, "hello there\r\n\r\n"),
        (400, "\u{16}\u{3}\u{1} TLS?\r\n\r\n"),
        (400, "POST /v1/completions HTTP/9.9\r\nhost: t\r\n\r\n"),
        (400, "POST /v1/completions HTTP/1.1\r\nhost t\r\n\r\n"),
        (400, "POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: many\r\n\r\n"),
        (400, "POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n"),
        (400, "POST /v1/completions HTTP/1.1\r\nhost: t\r\ntransfer-encoding: gzip\r\n\r\n"),
        (431, &*many),
    ] {
        for address in [setting.gateway.client, setting.gateway.ops] {
            let mut connection = Connection::to(address);
            connection.send(bytes.as_bytes());
            let answer = connection.answer();
            refused(&answer, status, "", "", bytes);
            assert_eq!(answer.header("connection"), Some("close"), "{bytes}");
            assert!(answer.header("date").is_some(), "{bytes}");
            assert!(connection.closes_within(Duration::from_secs(20)), "{bytes}");
        }
    }
    setting.nothing_was_sent();
}

#[test]
fn compressed_bodies_are_read_within_the_same_bounds() {
    let setting = Setting::new();
    let send = |coding: &str, body: &[u8]| {
        let head = format!(
            "POST {COMPLETIONS} HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\ncontent-encoding: {coding}\r\n\
             content-length: {}\r\n\r\n",
            body.len()
        );
        client::request(setting.gateway.client, &[head.as_bytes(), body].concat())
    };
    let encode = |coding: &str, plain: &[u8]| {
        let mut encoded = Vec::new();
        match coding {
            "gzip" => GzEncoder::new(plain, Compression::best()).read_to_end(&mut encoded).expect("a buffer"),
            "deflate" => ZlibEncoder::new(plain, Compression::best()).read_to_end(&mut encoded).expect("a buffer"),
            _ => return compress_to_vec(plain, CompressionLevel::Fastest),
        };
        encoded
    };
    for (count, coding) in ["gzip", "deflate", "zstd"].into_iter().enumerate() {
        let bomb = encode(coding, &[b' '; 8 << 20]);
        assert!(bomb.len() < 65_536, "{coding}: {}", bomb.len());
        refused(&send(coding, &bomb), 413, "request_too_large", "", coding);
        let whole = encode(coding, GOOD.as_bytes());
        refused(&send(coding, &whole[..whole.len() - 1]), 400, "", "", coding);
        refused(&send(coding, GOOD.as_bytes()), 400, "", "", coding);
        assert_eq!(setting.recorder.posts().len(), count, "nothing of these was sent");
        assert_eq!(send(coding, &whole).status, 200, "{coding}");
        let post = setting.recorder.posts().pop().expect("a request");
        assert_eq!((post.body.as_slice(), post.header("content-encoding")), (GOOD.as_bytes(), None), "{coding}");
    }
    let answer = send("br", b"?");
    refused(&answer, 415, "", "", "br");
    assert_eq!(answer.header("accept-encoding"), Some("gzip, deflate, zstd"));
}
