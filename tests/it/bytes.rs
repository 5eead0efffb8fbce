//! A request reaches the engine as the client wrote it, byte for byte, except for the spans that the gateway must
//! change; headers reach it only where they should; a successful answer comes back unread.

use std::collections::BTreeSet;

use super::support::client::{self, Connection};
use super::support::process::{Gateway, model, tokenizer};
use super::support::recorder::{Recorder, Step, chunk, json, json_with, stream, stream_end};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const EMBEDDINGS: &str = "/v1/embeddings";

const EVENTS: [&[u8]; 2] = [
    b"data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"hi\"},\"finish_reason\":\"stop\"}]}\n\n",
    b"data: [DONE]\n\n",
];

/// Bodies of which nothing may change; the model is `m` here and there.
const UNTOUCHED: &[(&str, &str)] = &[
    (CHAT, r#"{"model":"m","messages":[{"role":"user","content":"hi"}]}"#),
    // White space of all kinds, around and within; keys in any order.
    (CHAT, "\r\n\t { \"messages\" :\t[ {\"content\"\n:\"hi\" ,\"role\":\r\n\"user\"} ]\n,  \"model\"\t: \"m\" }\n\n "),
    // Escapes, in keys and values that are acted on and in others.
    (
        CHAT,
        r#"{"mod\u0065l":"\u006d","m\u0065ssages":[{"r\u006fle":"us\u0065r","content":"\ud83e\udd80 \/ \u00E9 \u0000"}]}"#,
    ),
    (CHAT, r#"{"model":"m","messages":[{"role":"user","content":"日本語 🦀 é"}],"ключ":"значение"}"#),
    // Fields that nobody here knows, at the top and inside messages.
    (
        CHAT,
        concat!(
            r#"{"x-vendor":{"a":[1,{"b":null}]},"messages":["#,
            r#"{"role":"user","content":[{"type":"text","text":"hi","cache_control":{"type":"x"}}],"x":{"y":[[]]}},"#,
            r#"{"role":"assistant","content":null,"reasoning_content":"hm","tool_calls":[{"id":"c1","type":"function","#,
            r#""function":{"name":"f","arguments":"{\"a\" : 1}"},"extra":true}]},"#,
            r#"{"role":"tool","tool_call_id":"c1","content":"2"}],"#,
            r#""model":"m","chat_template_kwargs":{"enable_thinking":false}}"#,
        ),
    ),
    // Numbers as only their author writes them.
    (
        CHAT,
        concat!(
            r#"{"model":"m","seed":12345678901234567890123456789012345678901234567890,"temperature":1.00E+0,"#,
            r#""top_p":1e-400,"min_p":-0.0,"x":[1E400,-0,0.1000000000000000055511151231257827],"#,
            r#""messages":[{"role":"user","content":"hi"}],"max_tokens":1.6e1}"#,
        ),
    ),
    // Keys that are not acted on may stand twice.
    (
        CHAT,
        r#"{"seed":1,"model":"m","seed":2,"messages":[{"role":"user","name":"a","name":"b","content":"hi"}],"seed":3}"#,
    ),
    // `null` counts as absent, and stays.
    (
        CHAT,
        r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":null,"stream_options":null,"max_tokens":null,"n":null,"tools":null,"user":null}"#,
    ),
    (
        CHAT,
        concat!(
            r#"{"model":"m","priority":7,"tools":[{"type":"function","function":{"name":"f","parameters":{}}}],"#,
            r#""tool_choice":"auto","response_format":{"type":"json_schema","json_schema":{"name":"s","schema":{}}},"#,
            r#""logprobs":true,"top_logprobs":2,"n":3,"messages":[{"role":"user","content":"hi"}]}"#,
        ),
    ),
    (COMPLETIONS, r#"{"prompt":"say","model":"m","best_of":4,"echo":false,"suffix":"!"}"#),
    (COMPLETIONS, r#"{ "model":"m", "prompt":[ 1,2 , 3.0 ], "max_tokens":4, "return_token_ids":true }"#),
    (COMPLETIONS, r#"{"model":"m","prompt":[[1,2],[3]],"n":2}"#),
    (COMPLETIONS, r#"{"model":"m","prompt":["a","b"],"stream":false}"#),
    (EMBEDDINGS, r#"{"input":"text","model":"m","encoding_format":"base64","dimensions":8}"#),
    (EMBEDDINGS, r#"{"model":"m","input":["a","b"],"task":"query"}"#),
    (EMBEDDINGS, r#"{"model":"m","input":[[1,2],[3]],"encoding_format":"float"}"#),
    (EMBEDDINGS, r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"unknown":[]}"#),
];

#[test]
fn a_body_arrives_as_it_was_written() {
    let recorder = Recorder::start("m", vec![json("200 OK", "{}")]);
    let gateway = Gateway::before(&[recorder.address]);
    for (index, (path, body)) in UNTOUCHED.iter().enumerate() {
        let answer = gateway.post(path, body);
        assert_eq!(answer.status, 200, "{body}: {}", answer.text());
        let posts = recorder.posts();
        assert_eq!(posts.len(), index + 1);
        assert_eq!(String::from_utf8_lossy(&posts[index].body), *body);
        assert_eq!(posts[index].path(), *path);
        assert_eq!(posts[index].header("content-type"), Some("application/json"));
    }
}

/// What the client wrote, and what must arrive at an engine that calls the model otherwise.
#[test]
fn only_the_spans_that_must_change_do() {
    let recorder = Recorder::start("org/Real-1", vec![stream(&EVENTS)]);
    let extra = format!("aliases = [\"gpt-4o\"]\ntokenizer = {:?}\n", tokenizer());
    let worker = format!(
        "[[model]]\nname = \"m\"\n{extra}[[model.worker]]\nurl = \"http://{}\"\nmodel = \"org/Real-1\"\n",
        recorder.address
    );
    let gateway = Gateway::start(&worker);
    let streaming = |options: &str| {
        format!(r#"{{"model":"m" ,"stream":true{options},"messages":[{{"role":"user","content":"m \"m\""}}],"x":"m"}}"#)
    };
    let renamed = |options: &str| streaming(options).replacen(r#""m""#, r#""org/Real-1""#, 1);
    let inserted = |options: &str| renamed(options).replacen('{', r#"{"stream_options":{"include_usage":true},"#, 1);
    let mut cases: Vec<(&str, String, String)> = vec![
        // The name alone, however it and its key are written.
        (
            CHAT,
            r#"{"messages":[{"role":"user","content":"gpt-4o"}], "mod\u0065l" :  "gpt\u002d4o" ,"model_name":"gpt-4o"}"#.to_owned(),
            r#"{"messages":[{"role":"user","content":"gpt-4o"}], "mod\u0065l" :  "org/Real-1" ,"model_name":"gpt-4o"}"#.to_owned(),
        ),
        (COMPLETIONS, r#"{"prompt":[1],"model":"m"}"#.to_owned(), r#"{"prompt":[1],"model":"org/Real-1"}"#.to_owned()),
        (
            EMBEDDINGS,
            "{\"input\":\"m\",\n\"model\":\"gpt-4o\"\n}\n".to_owned(),
            "{\"input\":\"m\",\n\"model\":\"org/Real-1\"\n}\n".to_owned(),
        ),
        // No options at all, also behind white space and in completions.
        (CHAT, streaming(""), inserted("")),
        (
            COMPLETIONS,
            " { \n\"stream\":true,\"prompt\":\"a\",\"model\":\"org/Real-1\"}".replace("org/Real-1", "gpt-4o"),
            " {\"stream_options\":{\"include_usage\":true}, \n\"stream\":true,\"prompt\":\"a\",\"model\":\"org/Real-1\"}".to_owned(),
        ),
    ];
    // Each way to write the options: what is there, what it becomes.
    for (written, sent) in [
        (r#","stream_options":null"#, r#","stream_options":{"include_usage":true}"#),
        (r#","stream_options" : { }"#, r#","stream_options" : {"include_usage":true }"#),
        (r#","stream_options":{}"#, r#","stream_options":{"include_usage":true}"#),
        (
            r#","stream_options":{ "continuous_usage_stats":false}"#,
            r#","stream_options":{"include_usage":true, "continuous_usage_stats":false}"#,
        ),
        (r#","stream_options":{"include_usage":false}"#, r#","stream_options":{"include_usage":true}"#),
        (
            r#","stream_options":{"a":[],"include_usage" : null ,"b":{}}"#,
            r#","stream_options":{"a":[],"include_usage" : true ,"b":{}}"#,
        ),
        (
            r#","stre\u0061m_options":{"includ\u0065_usage":false}"#,
            r#","stre\u0061m_options":{"includ\u0065_usage":true}"#,
        ),
        // Deeper down it is somebody else's.
        (
            r#","stream_options":{"x":{"include_usage":true}}"#,
            r#","stream_options":{"include_usage":true,"x":{"include_usage":true}}"#,
        ),
        // Asked for already.
        (r#","stream_options":{"include_usage":true}"#, r#","stream_options":{"include_usage":true}"#),
        (
            r#","stream_options":{"include\u005fusage": true, "x":1}"#,
            r#","stream_options":{"include\u005fusage": true, "x":1}"#,
        ),
    ] {
        cases.push((CHAT, streaming(written), renamed(sent)));
    }
    for (index, (path, body, expected)) in cases.iter().enumerate() {
        let streamed = body.contains("\"stream\":true");
        recorder.play(if streamed { stream(&EVENTS) } else { json("200 OK", "{}") });
        let answer = gateway.post(path, body);
        assert_eq!((answer.status, answer.whole), (200, true), "{body}: {}", answer.text());
        let posts = recorder.posts();
        assert_eq!(posts.len(), index + 1);
        assert_eq!(String::from_utf8_lossy(&posts[index].body), *expected, "written: {body}");
    }
}

#[test]
fn a_workers_own_name_for_its_only_model_is_found_out() {
    let recorder = Recorder::start("org/Only-One", vec![json("200 OK", "{}")]);
    let gateway = Gateway::before(&[recorder.address]);
    let answer = gateway.post(COMPLETIONS, r#"{"prompt":"m","model":"m"}"#);
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(recorder.posts()[0].body, br#"{"prompt":"m","model":"org/Only-One"}"#);
}

#[test]
fn only_harmless_headers_travel_on() {
    let recorder = Recorder::start("m", vec![json("200 OK", "{}")]);
    let models = model("m", &[recorder.address], &format!("tokenizer = {:?}\n", tokenizer()))
        + "api_key = { env = \"WORKER_KEY\" }\n";
    let gateway = Gateway::start_unready("", &models, &[("WORKER_KEY", "the-workers-own-key")]);
    gateway.until_ready();
    let headers = [
        "Authorization: Bearer sk-client-secret",
        "Cookie: session=client-secret",
        "X-Api-Key: client-secret",
        "Api-Key: client-secret",
        "Proxy-Authorization: Basic client-secret",
        "OpenAI-Organization: org-client-secret",
        "X-Forwarded-For: 10.1.2.3",
        "Forwarded: for=10.1.2.3",
        "User-Agent: client-secret",
        "Accept-Encoding: gzip",
        "Connection: keep-alive, x-hop",
        "X-Hop: client-secret",
        "X-Forebay-Priority: interactive",
        "X-Forebay-Deadline-Ms: 20000",
        "X-Forebay-Session: client-secret",
        "X-Request-Id: of-the-client",
        "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "tracestate: vendor=1",
    ];
    let body = r#"{"model":"m","messages":[{"role":"user","content":"hi"}]}"#;
    for _ in 0..2 {
        let answer = client::post_with(gateway.client, CHAT, &headers, body);
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(answer.header("x-request-id"), Some("of-the-client"));
    }
    let posts = recorder.posts();
    for post in &posts {
        assert!(!post.head.contains("client"), "{}", post.head);
        let names: BTreeSet<String> = post
            .head
            .lines()
            .skip(1)
            .filter_map(|line| line.split_once(':').map(|(name, _)| name.to_ascii_lowercase()))
            .collect();
        let expected =
            ["authorization", "content-length", "content-type", "host", "traceparent", "tracestate", "x-request-id"];
        assert_eq!(names, BTreeSet::from(expected.map(str::to_owned)));
        assert_eq!(post.header("authorization"), Some("Bearer the-workers-own-key"));
        assert_eq!(post.header("host"), Some(&*recorder.address.to_string()));
        assert_eq!(post.header("tracestate"), Some("vendor=1"));
        assert!(post.header("traceparent").is_some_and(|value| value.contains("0af7651916cd43dd8448eb211c80319c")));
    }
    assert_ne!(posts[0].header("x-request-id"), posts[1].header("x-request-id"), "a name of its own each time");
}

#[test]
fn every_attempt_has_a_name_of_its_own() {
    let bad = Recorder::start("m", vec![json("500 Internal Server Error", "{}")]);
    let well = Recorder::start("m", vec![json("200 OK", "{}")]);
    let gateway = Gateway::before(&[bad.address, well.address]);
    while bad.posts().is_empty() {
        assert!(well.posts().len() < 50, "the first worker never gets a request");
        assert_eq!(gateway.post(COMPLETIONS, r#"{"model":"m","prompt":"a"}"#).status, 200);
    }
    let posts = [bad.posts(), well.posts()].concat();
    let names: BTreeSet<_> = posts.iter().map(|post| post.header("x-request-id").expect("a name")).collect();
    assert_eq!(names.len(), posts.len(), "{names:?}");
}

#[test]
fn whole_answers_come_back_unread() {
    let recorder = Recorder::start("m", vec![json("200 OK", "{}")]);
    let gateway = Gateway::before(&[recorder.address]);
    let chat = r#"{"model":"m","messages":[{"role":"user","content":"hi"}]}"#;
    let answers = [
        // Vendor extras, odd spacing, numbers, doubled keys, the model's name with a tag.
        (
            CHAT,
            chat,
            concat!(
                "\n{ \"id\" :\"x\",\"choices\":[{\"message\":{\"content\":\"\\u00e9 é 🦀\",\"vendor\":[1.0]}}],",
                "\"x\":1E400,\"x\":2,\"model\":\"m:tag\",\"kv_transfer_params\":null,",
                "\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":1.0,\"extra\":{}}}\r\n ",
            )
            .to_owned(),
        ),
        (
            COMPLETIONS,
            r#"{"model":"m","prompt":[1,2]}"#,
            r#"{"choices":[{"text":"a","prompt_token_ids":[1,2],"stop_reason":null}]}"#.to_owned(),
        ),
        (
            EMBEDDINGS,
            r#"{"model":"m","input":"a","encoding_format":"base64"}"#,
            concat!(
                r#"{"object":"list","data":[{"object":"embedding","index":0,"embedding":"AACAPwAAAMA="}],"#,
                r#""usage":{"prompt_tokens":1,"total_tokens":1}}"#,
            )
            .to_owned(),
        ),
        // What is no JSON, or is longer than what is held back for a retry, passes as well.
        (CHAT, chat, "not json at all".to_owned()),
        (CHAT, chat, String::new()),
        (
            CHAT,
            chat,
            format!(r#"{{"choices":[{{"message":{{"content":"{}"}}}}]}}"#, "0123456789abcdef".repeat(200_000)),
        ),
    ];
    for (path, body, text) in &answers {
        let headers = "content-type: application/json; charset=UTF-8\r\nserver: secret-engine\r\nset-cookie: a=b\r\n";
        let sized = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n{headers}\r\n{text}", text.len());
        let until_closed = format!("HTTP/1.1 200 OK\r\nconnection: close\r\n{headers}\r\n{text}");
        let mut chunked =
            vec![Step::Write(format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n{headers}\r\n").into_bytes())];
        chunked.extend(text.as_bytes().chunks(text.len() / 3 + 1).map(chunk));
        chunked.push(stream_end());
        for script in [vec![Step::Write(sized.into_bytes())], vec![Step::Write(until_closed.into_bytes())], chunked] {
            recorder.play(script);
            let answer = gateway.post(path, body);
            assert_eq!((answer.status, answer.whole), (200, true));
            assert!(answer.body == text.as_bytes(), "{}", String::from_utf8_lossy(&answer.body));
            assert_eq!(answer.header("content-type"), Some("application/json; charset=UTF-8"));
            assert_eq!(answer.header("x-forebay-worker"), Some("w0"));
            assert_eq!(answer.header("x-forebay-model"), Some("m"));
            for name in ["x-request-id", "x-forebay-queue-ms", "x-forebay-predicted-wait-ms"] {
                assert!(answer.header(name).is_some(), "{name}");
            }
            for name in ["server", "set-cookie"] {
                assert_eq!(answer.header(name), None, "{name}");
            }
        }
    }
}

#[test]
fn a_body_of_many_megabytes_arrives_too() {
    let recorder = Recorder::start("m", vec![json("200 OK", "{}")]);
    let gateway = Gateway::before(&[recorder.address]);
    let image: String = ('a'..='z').cycle().take(20 << 20).collect();
    let body = format!(
        r#"{{"messages":[{{"role":"user","content":[{{"type":"image_url","image_url":"{image}"}}]}}],"model":"m"}}"#
    );
    let answer = gateway.post(CHAT, &body);
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(recorder.posts()[0].body == body.as_bytes());
}

/// Two requests and two answers on one connection: each body ends where it says.
#[test]
fn a_connection_carries_one_request_after_the_other() {
    let recorder = Recorder::start("m", vec![json_with("200 OK", "x-a: b\r\n", "{\"a\":1}")]);
    let gateway = Gateway::before(&[recorder.address]);
    let mut connection = Connection::to(gateway.client);
    let long = format!(r#"{{"model":"m","prompt":"a","x":"{}"}}"#, "y".repeat(300_000));
    for body in [long.as_str(), r#"{"model":"m","prompt":"b"}"#, long.as_str()] {
        connection.post(COMPLETIONS, &[], body.as_bytes());
        assert_eq!(connection.answer().text(), "{\"a\":1}");
        assert!(recorder.posts().last().is_some_and(|post| post.body == body.as_bytes()));
    }
    // The client's own framing is not the engine's.
    let head = format!("POST {COMPLETIONS} HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n");
    connection.send(head.as_bytes());
    connection.send(b"e\r\n{\"model\":\"m\",\"\r\nc\r\nprompt\":\"c\"}\r\n0\r\n\r\n");
    assert_eq!(connection.answer().status, 200);
    let posts = recorder.posts();
    assert_eq!(posts.last().map(|post| &*post.body), Some(&br#"{"model":"m","prompt":"c"}"#[..]));
    assert_eq!(posts.last().and_then(|post| post.header("content-length")), Some("26"));
}

/// What an engine gives is what the client gets, also where it is not what was asked for.
#[test]
fn a_document_in_place_of_a_stream_and_the_other_way_round() {
    let recorder = Recorder::start("m", vec![json("200 OK", r#"{"choices":[]}"#)]);
    let gateway = Gateway::before(&[recorder.address]);
    let answer = gateway.post(COMPLETIONS, r#"{"model":"m","prompt":"a","stream":true}"#);
    assert_eq!((answer.status, answer.text().as_str()), (200, r#"{"choices":[]}"#));
    assert_eq!(answer.header("content-type"), Some("application/json"));
    recorder.play(stream(&EVENTS));
    let answer = gateway.post(COMPLETIONS, r#"{"model":"m","prompt":"a"}"#);
    assert_eq!((answer.status, answer.body), (200, EVENTS.concat()));
}

#[test]
fn requests_that_wait_on_one_connection_are_answered_in_order() {
    let recorder = Recorder::start("m", (0..3).map(|n| json("200 OK", &format!("{{\"n\":{n}}}"))).collect());
    let gateway = Gateway::before(&[recorder.address]);
    let mut connection = Connection::to(gateway.client);
    let body = |n: u32| format!(r#"{{"model":"m","prompt":"{n}"}}"#);
    (0..3).for_each(|n| connection.post(COMPLETIONS, &[], body(n).as_bytes()));
    for n in 0..3 {
        assert_eq!(connection.answer().text(), format!("{{\"n\":{n}}}"));
        assert_eq!(recorder.posts()[n as usize].body, body(n).as_bytes());
    }
}
