//! Every engine's adapter over the whole table, and over the bytes of real engines.

use bytes::{Bytes, BytesMut};
use forebay_backends::engines::{Api, Asked, ENGINES, Engine, Form, Load, Mark, Totals, by_name, prepare};
use proptest::prelude::*;

use crate::support::recorded;

#[test]
fn the_table_is_consistent() {
    for (place, engine) in ENGINES.into_iter().enumerate() {
        let name = engine.name();
        assert_eq!(by_name(name).map(|found| found.name()), Some(name), "found by its own name, which is unique");
        let single = [engine.version_path(), engine.details_path(), engine.kv_sources_path()];
        let paths =
            engine.health_paths().iter().chain(engine.load_paths()).copied().chain(single.into_iter().flatten());
        for path in paths {
            assert!(path.starts_with('/') && path.parse::<http::uri::PathAndQuery>().is_ok(), "{name}: {path}");
        }
        assert!(!engine.health_paths().is_empty(), "{name}");
        assert_eq!(
            matches!(engine.mark(), Mark::Any),
            place + 1 == ENGINES.len(),
            "{name}: only the last takes what it does not know"
        );
        assert_eq!(engine.read_load(b""), None, "{name}");
        assert!(engine.serves(Api::ChatCompletions), "{name}");
    }
    assert!(by_name("VLLM").is_none() && by_name("").is_none());
}

proptest! {
    #[test]
    fn any_text_is_read(text in "([a-z:_]{1,40}(\\{[^\\n]{0,40}\\})? [0-9.eE+-]{1,12}\n){0,8}") {
        for engine in ENGINES {
            let _ = engine.read_load(text.as_bytes());
        }
    }
}

fn load_of(engine: &str, sample: &str) -> Option<Load> {
    let text = recorded(sample)?;
    let load = by_name(engine).expect("a known engine").read_load(text.as_bytes());
    Some(load.unwrap_or_else(|| panic!("{sample} tells a load")))
}

#[test]
fn a_busy_vllm() {
    let Some(load) = load_of("vllm", "vllm/metrics-busy") else { return };
    let expected = Load {
        running: 16,
        waiting: 4,
        kv_usage: Some(0.044_077_134_986_225_9),
        block_tokens: Some(128),
        kv_tokens: Some(46_592),
        sleeping: false,
        adapters_max: None,
        totals: Totals {
            prompt_tokens: Some(2391),
            generation_tokens: Some(1000),
            prefix_queries: Some(2387),
            prefix_hits: Some(128),
            preemptions: Some(0),
        },
    };
    assert_eq!(load, expected);
    assert_eq!((load.report().running, load.report().waiting, load.report().kv_usage), (16, 4, expected.kv_usage));
}

#[test]
fn an_idle_vllm() {
    for sample in ["vllm/metrics-before", "vllm/metrics-after", "vllm-embed/metrics"] {
        let Some(load) = load_of("vllm", sample) else { return };
        assert_eq!((load.running, load.waiting, load.kv_usage, load.sleeping), (0, 0, Some(0.0), false), "{sample}");
    }
}

#[test]
fn a_busy_llamacpp() {
    let Some(load) = load_of("llamacpp", "llamacpp/metrics-busy") else { return };
    assert_eq!((load.running, load.waiting, load.kv_usage), (4, 16, None));
    let expected = Totals {
        prompt_tokens: Some(2136 + 2779),
        generation_tokens: Some(4195),
        prefix_queries: Some(2136 + 2779),
        prefix_hits: Some(2779),
        preemptions: None,
    };
    assert_eq!(load.totals, expected);
}

#[test]
fn one_engine_does_not_read_the_other() {
    for (engine, sample) in [("llamacpp", "vllm/metrics-busy"), ("vllm", "llamacpp/metrics-busy")] {
        let Some(text) = recorded(sample) else { return };
        assert_eq!(by_name(engine).expect("a known engine").read_load(text.as_bytes()), None, "{engine}");
    }
}

#[test]
fn a_text_that_is_cut_short_is_never_misread() {
    let Some(text) = recorded("vllm/metrics-busy") else { return };
    let vllm = by_name("vllm").expect("a known engine");
    for end in (0..text.len()).step_by(101) {
        // A cut inside a number would make another number of it; cuts at line ends only lose what follows.
        let whole_lines = text[..end].rfind('\n').map_or(0, |at| at + 1);
        if let Some(load) = vllm.read_load(&text.as_bytes()[..whole_lines]) {
            assert_eq!((load.running, load.waiting), (16, 4));
            assert!(load.kv_tokens.is_none_or(|tokens| tokens == 46_592));
        }
        let _ = vllm.read_load(&text.as_bytes()[..end]);
    }
}

/// Engines of OpenAI's dialect leave a stream as it came, wherever it is cut, but for the words that they mend.
#[test]
fn recorded_streams_pass_the_adapters_cut_everywhere() {
    for sample in [
        "llamacpp/chat-stream",
        "llamacpp/chat-unicode-stream",
        "llamacpp/chat-tools-required-stream",
        "vllm/chat-unicode-stream",
    ] {
        let Some(text) = recorded(sample) else { return };
        let stream = Bytes::from(dechunked(text.as_bytes()));
        assert!(stream.ends_with(b"data: [DONE]\n\n"), "{sample}");
        // One recorded by a server whose parser for thoughts was off; here its answers are thoughts.
        let thinking = Bytes::from(String::from_utf8_lossy(&stream).replace("\"content\":", "\"reasoning_content\":"));
        let renamed = Bytes::from(String::from_utf8_lossy(&stream).replace("\"content\":", "\"reasoning\":"));
        for engine in ["llamacpp", "sglang", "trtllm"].map(|name| by_name(name).expect("a known engine")) {
            for cut in (0..=stream.len()).step_by(if stream.len() < 9000 { 1 } else { 7 }) {
                assert_eq!(translated(engine, &stream, cut), stream, "{engine:?} {sample} cut at {cut}");
            }
            for cut in (0..=thinking.len()).step_by(101) {
                assert_eq!(translated(engine, &thinking, cut), renamed, "{engine:?} {sample} cut at {cut}");
            }
        }
        // TGI's words are not in it either.
        assert_eq!(translated(by_name("tgi").expect("known"), &stream, 100), stream, "{sample}");
    }
}

fn translated(engine: &dyn Engine, stream: &Bytes, cut: usize) -> Bytes {
    let body = Bytes::from_static(br#"{"model":"m","messages":[],"stream":true}"#);
    let asked = Asked::new(Api::ChatCompletions, body, true);
    let mut translation = prepare(engine, asked).expect("it can").translation.expect("it translates");
    let mut out = BytesMut::new();
    for piece in [stream.slice(..cut), stream.slice(cut..)] {
        out.extend_from_slice(&translation.push(piece).expect("short events"));
    }
    out.extend_from_slice(&translation.finish(None));
    out.freeze()
}

/// A body with its HTTP chunks put together.
fn dechunked(mut body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    while let Some(end) = body.windows(2).position(|window| window == b"\r\n") {
        let size = std::str::from_utf8(&body[..end]).expect("a size");
        let size = usize::from_str_radix(size, 16).expect("a size");
        out.extend_from_slice(&body[end + 2..end + 2 + size]);
        body = &body[end + 4 + size..];
    }
    out
}

/// Only where the answer is the same.
#[test]
fn a_prompt_goes_as_token_ids_where_that_is_wanted_and_changes_nothing() {
    let sent = |engine: &str, api, body: &'static str, token_ids: bool| {
        let engine = by_name(engine).expect("a known engine");
        let mut asked = Asked::new(api, Bytes::from_static(body.as_bytes()), false);
        asked.server.token_ids = token_ids;
        let form = engine.form(api, &asked.server);
        asked.written.ids = (form == Form::Ids).then(|| vec![7, 8]);
        let prepared = prepare(engine, asked).expect("it can");
        serde_json::from_slice::<serde_json::Value>(&prepared.body).expect("JSON")["prompt"].clone()
    };
    let ids = serde_json::json!([7, 8]);
    for engine in ["vllm", "sglang", "trtllm"] {
        let body = r#"{"model":"m","prompt":"a b","max_tokens":3,"echo":false}"#;
        assert_eq!(sent(engine, Api::Completions, body, true), ids, "{engine}");
        assert_eq!(sent(engine, Api::Completions, body, false), "a b", "{engine}");
        assert_eq!(sent(engine, Api::ChatCompletions, body, true), "a b", "{engine}");
    }
    for body in [
        r#"{"prompt":"a","echo":true}"#,
        r#"{"prompt":"a","truncate_prompt_tokens":5}"#,
        r#"{"prompt":"a","suffix":"b"}"#,
    ] {
        assert_eq!(sent("vllm", Api::Completions, body, true), "a", "{body}");
    }
    let own = r#"{"prompt":[1,2,3]}"#;
    assert_eq!(sent("vllm", Api::Completions, own, true), serde_json::json!([1, 2, 3]), "the client's own");
    assert_eq!(sent("llamacpp", Api::Completions, r#"{"prompt":"a"}"#, true), "a", "its tokenizer is another");
}

/// vLLM's requests travel as they are; those of the others are read without harm, whatever they hold.
#[test]
fn any_request_is_adapted_or_refused() {
    let bodies = [
        r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"n":2}"#,
        r#"{"model":"m","prompt":[[1,2],[3]],"max_tokens":null,"stop":7,"response_format":[],"tool_choice":{}}"#,
        r#"{"model":7,"messages":{},"tools":"x","top_p":"1","stop":{},"logit_bias":9,"top_k":3,"stream":1}"#,
        "[]",
        "",
    ];
    for (body, engine) in bodies.iter().flat_map(|body| ENGINES.map(|engine| (*body, engine))) {
        for api in [Api::ChatCompletions, Api::Completions, Api::Embeddings] {
            let body = Bytes::from_static(body.as_bytes());
            for openai_routes in [true, false] {
                let mut asked = Asked::new(api, body.clone(), true);
                asked.server.openai_routes = openai_routes;
                match prepare(engine, asked) {
                    Ok(prepared) if engine.name() == "vllm" => assert_eq!(prepared.body.as_ptr(), body.as_ptr()),
                    Ok(prepared) => assert!(prepared.path.starts_with('/'), "{engine:?}"),
                    Err(refused) => assert!(!refused.message.is_empty(), "{engine:?}"),
                }
            }
        }
    }
}
