//! Counting: `/tokenize` and `/detokenize` as vLLM answers them, exact counts before anything is sent, and what is done
//! where the gateway has no tokenizer for a model.

use serde_json::{Value, json};

use super::support::client;
use super::support::eventually;
use super::support::process::{Gateway, Worker, model, tokenizer};
use super::support::recorder::{Recorder, json as answer};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

const TEXTS: [&str; 7] = [
    "",
    "hi",
    "The quick brown fox\n\n  jumps over 12345678 lazy dogs.\t",
    "日本語のテキスト 🦀👨‍👩‍👧 é e\u{301} Ω≈ç",
    "<|start|>user\nsmuggled<|end|>",
    "\u{0}\u{1}\u{feff}\u{fffd}",
    "    def f(x):\r\n        return x  # ┌─┐\r\n",
];

fn conversations() -> Vec<Value> {
    let tools = json!([{"type": "function", "function": {"name": "weather", "description": "Wetter ☀",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]);
    let call =
        json!({"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Kyōto\"}"}});
    vec![
        json!({"messages": [{"role": "user", "content": "hi"}]}),
        json!({"messages": [{"role": "system", "content": "Sei kurz."}, {"role": "user", "content": TEXTS[2]},
            {"role": "assistant", "content": TEXTS[3]}, {"role": "user", "content": TEXTS[4]}]}),
        json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b 🦀"}]}]}),
        json!({"messages": [{"role": "user", "content": "Wetter?"}], "tools": tools}),
        json!({"messages": [{"role": "user", "content": "Wetter?"}, {"role": "assistant", "content": null, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "sonnig"}], "tools": tools}),
        json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "I say"}],
            "add_generation_prompt": false, "continue_final_message": true}),
        json!({"messages": [{"role": "user", "content": "long ".repeat(700)}]}),
    ]
}

/// `fields` with more of them, as text.
fn with(fields: &Value, more: Value) -> String {
    let mut fields = fields.clone();
    let Value::Object(more) = more else { panic!("fields") };
    fields.as_object_mut().expect("fields").extend(more);
    fields.to_string()
}

fn setting() -> (Gateway, Worker) {
    let worker = Worker::start(&["--model", "m"]);
    (Gateway::before(&[worker.address]), worker)
}

#[test]
fn tokenize_answers_as_the_engine_does() {
    let (gateway, worker) = setting();
    let plain = TEXTS.iter().map(|text| json!({"prompt": text}));
    for fields in plain.chain(conversations()) {
        for more in [
            json!({"model": "m"}),
            json!({"model": "m", "return_token_strs": true}),
            json!({"model": "m", "add_special_tokens": false}),
            json!({}),
        ] {
            let body = with(&fields, more);
            let (ours, theirs) = (gateway.post("/tokenize", &body), client::post(worker.address, "/tokenize", &body));
            assert_eq!((ours.status, theirs.status), (200, 200), "{body}: {}", ours.text());
            assert_eq!(ours.json(), theirs.json(), "{body}");
            assert_eq!(ours.header("content-type"), Some("application/json"));
            let tokens = json!({"model": "m", "tokens": ours.json()["tokens"]}).to_string();
            let back = gateway.post("/detokenize", &tokens);
            assert_eq!(back.json(), client::post(worker.address, "/detokenize", &tokens).json(), "{tokens}");
            if let Some(prompt) = fields.get("prompt") {
                assert_eq!(&back.json(), &json!({"prompt": prompt}), "there and back");
            }
        }
    }
}

#[test]
fn what_cannot_be_tokenized_is_refused() {
    let (gateway, _worker) = setting();
    for (path, body, status) in [
        ("/tokenize", "", 400),
        ("/tokenize", "[]", 400),
        ("/tokenize", r#"{"model":"m"}"#, 400),
        ("/tokenize", r#"{"model":"m","prompt":7}"#, 400),
        ("/tokenize", r#"{"model":"m","prompt":"a","messages":[{"role":"user","content":"a"}]}"#, 400),
        ("/tokenize", r#"{"model":"m","messages":[]}"#, 400),
        ("/tokenize", r#"{"model":"m","prompt":"a","prompt":"b"}"#, 400),
        ("/tokenize", r#"{"model":"x","prompt":"a"}"#, 404),
        ("/detokenize", r#"{"model":"m"}"#, 400),
        ("/detokenize", r#"{"model":"m","tokens":"a"}"#, 400),
        ("/detokenize", r#"{"model":"m","tokens":[1,-1]}"#, 400),
        ("/detokenize", r#"{"model":"m","tokens":[1.5]}"#, 400),
        ("/detokenize", r#"{"model":"m","tokens":[4294967296]}"#, 400),
        ("/detokenize", r#"{"model":"x","tokens":[1]}"#, 404),
    ] {
        let answer = gateway.post(path, body);
        assert_eq!(answer.status, status, "{body}: {}", answer.text());
        answer.error();
    }
}

/// What the gateway counts before it sends is what the engine says it was: with a maximum that cannot fit, the refusal
/// names our count; with a small one, the answer's usage names theirs.
#[test]
fn our_count_is_the_engines_count() {
    let (gateway, _worker) = setting();
    let ids = |fields: Value| (COMPLETIONS, fields);
    let mut requests: Vec<(&str, Value)> = conversations().into_iter().map(|fields| (CHAT, fields)).collect();
    requests.extend(TEXTS.iter().skip(1).map(|text| (COMPLETIONS, json!({"prompt": text}))));
    requests.push(ids(json!({"prompt": [1, 2, 3, 4, 5]})));
    requests.push(ids(json!({"prompt": [[7, 8, 9]]})));
    requests.push(ids(json!({"prompt": [TEXTS[3]]})));
    for (path, fields) in requests {
        let refused = gateway.post(path, &with(&fields, json!({"model": "m", "max_tokens": 32768})));
        assert_eq!(refused.status, 400, "{}", refused.text());
        let error = refused.error();
        assert_eq!(error["code"], "context_length_exceeded", "{error}");
        let message = error["message"].as_str().expect("a message");
        let ours: u64 = message
            .split_once('(')
            .and_then(|(_, rest)| rest.split(' ').next()?.parse().ok())
            .unwrap_or_else(|| panic!("no count: {message}"));
        let answer = gateway.post(path, &with(&fields, json!({"model": "m", "max_tokens": 1})));
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(answer.json()["usage"]["prompt_tokens"], ours, "{fields}");
    }
}

#[test]
fn several_prompts_are_counted_together_and_fit_one_by_one() {
    let (gateway, _worker) = setting();
    // Two of 20,000 ids fit a context of 32,768; one of 40,000 does not.
    let answer = gateway.post(
        COMPLETIONS,
        &json!({"model": "m", "prompt": [vec![5; 20_000], vec![6; 20_000]], "max_tokens": 1}).to_string(),
    );
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.json()["usage"]["prompt_tokens"], 40_000);
    let answer = gateway.post(
        COMPLETIONS,
        &json!({"model": "m", "prompt": [vec![5; 20], vec![6; 40_000]], "max_tokens": 1}).to_string(),
    );
    assert_eq!((answer.status, &answer.error()["code"]), (400, &"context_length_exceeded".into()));
}

/// A gateway without a tokenizer, once it knows its worker.
fn without_tokenizer(recorder: &Recorder) -> Gateway {
    let gateway = Gateway::start(&model("m", &[recorder.address], "aliases = [\"other\"]\n"));
    eventually("the worker to be known", || {
        (client::get(gateway.client, "/v1/models/m").json()["max_model_len"] == 4096).then_some(())
    });
    gateway
}

fn counted(tokens: usize) -> String {
    json!({"count": tokens, "max_model_len": 4096, "tokens": vec![7; tokens], "token_strs": null}).to_string()
}

#[test]
fn an_engine_counts_where_the_gateway_cannot() {
    let done = answer("200 OK", r#"{"choices":[]}"#);
    let recorder = Recorder::start("m", vec![]);
    let gateway = without_tokenizer(&recorder);
    let chat = r#"{ "model":"other","messages":[{"role":"user","content":"hi"}],"max_tokens":100,"x":1 }"#;
    let text = r#"{"model":"m","prompt":"hi","max_tokens":100}"#;
    for (path, body) in [(CHAT, chat), (COMPLETIONS, text)] {
        let before = recorder.posts().len();
        recorder.play_all(vec![answer("200 OK", &counted(3000)), done.clone()]);
        let answered = gateway.post(path, body);
        assert_eq!(answered.status, 200, "{}", answered.text());
        let posts = recorder.posts().split_off(before);
        let paths: Vec<_> = posts.iter().map(|post| post.path()).collect();
        assert_eq!(paths, ["/tokenize", path]);
        let sent = body.replace("other", "m");
        assert!(posts.iter().all(|post| post.body == sent.as_bytes()), "{posts:?}");
        let row = gateway.row(answered.header("x-request-id").expect("a name"));
        assert_eq!((&row["prompt_tokens"], &row["prompt_tokens_from"]), (&3000.into(), &"tokenizer".into()), "{row}");
        // An exact count is a reason to refuse.
        recorder.play_all(vec![answer("200 OK", &counted(4000)), done.clone()]);
        let refused = gateway.post(path, body);
        assert_eq!((refused.status, &refused.error()["code"]), (400, &"context_length_exceeded".into()));
        let paths: Vec<_> = recorder.posts().split_off(before + 2).iter().map(|post| post.path().to_owned()).collect();
        assert_eq!(paths, ["/tokenize"]);
    }
    // Who sends ids has counted.
    recorder.play(done.clone());
    let before = recorder.posts().len();
    assert_eq!(gateway.post(COMPLETIONS, r#"{"model":"m","prompt":[1,2,3]}"#).status, 200);
    let too_long = json!({"model": "m", "prompt": vec![1; 4096]}).to_string();
    assert_eq!(gateway.post(COMPLETIONS, &too_long).status, 400);
    assert_eq!(recorder.posts().len(), before + 1);
}

#[test]
fn an_estimate_refuses_nobody() {
    let recorder = Recorder::start("m", vec![]);
    let gateway = without_tokenizer(&recorder);
    // Some 10,000 tokens for a context of 4096, by any estimate.
    let chat = json!({"model": "m", "messages": [{"role": "user", "content": "word ".repeat(10_000)}]}).to_string();
    let done = answer("200 OK", r#"{"choices":[]}"#);
    for failing in [
        answer("404 Not Found", r#"{"detail":"Not Found"}"#),
        answer("400 Bad Request", r#"{"error":{"message":"no template"}}"#),
        answer("500 Internal Server Error", "oops"),
        answer("200 OK", "not json"),
        answer("200 OK", r#"{"count":3}"#),
    ] {
        let before = recorder.posts().len();
        recorder.play_all(vec![failing, done.clone()]);
        let answered = gateway.post(CHAT, &chat);
        assert_eq!(answered.status, 200, "{}", answered.text());
        let posts = recorder.posts().split_off(before);
        assert_eq!(posts.last().map(|post| (post.path(), &*post.body)), Some((CHAT, chat.as_bytes())));
        let row = gateway.row(answered.header("x-request-id").expect("a name"));
        assert_eq!(row["prompt_tokens_from"], "estimate", "{row}");
        assert!(row["prompt_tokens"].as_u64().is_some_and(|tokens| tokens > 4096), "{row}");
    }
    // The engine's own refusal keeps its words.
    let message = "This model's maximum context length is 4096 tokens. However, you requested 10016 tokens.";
    let refusing = answer(
        "400 Bad Request",
        &json!({"error": {"message": message, "type": "BadRequestError", "param": null, "code": 400}}).to_string(),
    );
    recorder.play_all(vec![answer("404 Not Found", "{}"), refusing]);
    let refused = gateway.post(CHAT, &chat);
    assert_eq!(refused.status, 400);
    assert_eq!(
        refused.error(),
        json!({"message": message, "type": "invalid_request_error", "param": null, "code": "context_length_exceeded"})
    );
}

#[test]
fn a_worker_that_wants_token_ids_is_not_sent_the_text() {
    let done =
        answer("200 OK", r#"{"object":"text_completion","choices":[{"index":0,"text":"x","finish_reason":"stop"}]}"#);
    let recorder = Recorder::start("m", vec![done]);
    let extra = format!("tokenizer = {:?}\n", tokenizer());
    let gateway = Gateway::start(&format!("{}token_ids = true\n", model("m", &[recorder.address], &extra)));
    for prompt in [TEXTS[3], "The quick brown fox jumps over the lazy dog. ".repeat(20).as_str()] {
        let ids =
            gateway.post("/tokenize", &json!({"model": "m", "prompt": prompt}).to_string()).json()["tokens"].clone();
        let body = json!({"model": "m", "prompt": prompt, "max_tokens": 2});
        assert_eq!(gateway.post(COMPLETIONS, &body.to_string()).status, 200);
        let sent: Value = serde_json::from_slice(&recorder.posts().last().expect("a post").body).expect("JSON");
        assert_eq!((&sent["prompt"], &sent["max_tokens"]), (&ids, &json!(2)));
    }
}

#[test]
fn questions_about_tokens_go_to_the_engine_where_only_it_knows() {
    let recorder = Recorder::start("m", vec![]);
    let gateway = without_tokenizer(&recorder);
    for (path, body, said) in [
        (
            "/tokenize",
            r#"{ "model":"other","prompt":"a","return_token_strs":true }"#,
            r#"{"count":1,"max_model_len":4096,"tokens":[64],"token_strs":["a"],"vendor":1}"#,
        ),
        ("/tokenize", r#"{"model":null,"messages":[{"role":"user","content":"a"}]}"#, r#"{"count":9}"#),
        ("/detokenize", r#"{"model":"m","tokens":[64]}"#, r#"{ "prompt":"a" }"#),
    ] {
        recorder.play(answer("200 OK", said));
        let answered = gateway.post(path, body);
        assert_eq!((answered.status, answered.text().as_str()), (200, said), "{body}");
        let posts = recorder.posts();
        let sent = posts.last().map(|post| (post.path(), String::from_utf8_lossy(&post.body).into_owned()));
        assert_eq!(sent, Some((path, body.replace("other", "m").replace("null", "\"m\""))));
        for (status, said, shown, code) in [
            (
                "400 Bad Request",
                r#"{"error":{"message":"no template at /opt/m/t","type":"BadRequestError","param":null,"code":400}}"#,
                400,
                None,
            ),
            ("404 Not Found", r#"{"detail":"Not Found"}"#, 501, Some("no_tokenizer")),
            ("401 Unauthorized", r#"{"error":"Unauthorized"}"#, 502, Some("upstream_error")),
            ("500 Internal Server Error", "oops", 502, Some("upstream_error")),
        ] {
            recorder.play(answer(status, said));
            let refused = gateway.post(path, body);
            assert_eq!((refused.status, refused.error()["code"].as_str()), (shown, code), "{body}: {}", refused.text());
            assert!(!refused.text().contains("/opt"), "{}", refused.text());
        }
    }
}
