//! What answers say: determinism, limits, stops, choices, tools, formats.

use serde_json::{Value, json};

use crate::client::{Reply, Server, fast};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn chat(more: Value) -> Value {
    merge(json!({"model": "sim", "messages": [{"role": "user", "content": "Tell me about the dam."}]}), more)
}

fn completion(more: Value) -> Value {
    merge(json!({"model": "sim", "prompt": "The river"}), more)
}

fn merge(mut base: Value, more: Value) -> Value {
    let Value::Object(more) = more else { panic!("{more} is no object") };
    base.as_object_mut().unwrap().extend(more);
    base
}

fn content(reply: &Reply) -> String {
    reply.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

/// All text that a stream of chat events gives one choice.
fn streamed(reply: &Reply, choice: u64) -> String {
    let events = reply.events();
    let choices = events.iter().filter_map(|event| event["choices"].get(0)).filter(|c| c["index"] == choice);
    choices.filter_map(|c| c["delta"]["content"].as_str().or_else(|| c["text"].as_str())).collect()
}

#[tokio::test]
async fn equal_requests_get_equal_answers_streamed_or_not() {
    let server = Server::start(fast()).await;
    let whole = content(&server.post(CHAT, &chat(json!({}))).await);
    assert!(whole.len() > 40, "{whole}");
    assert_eq!(content(&server.post(CHAT, &chat(json!({}))).await), whole);
    let stream = server.post(CHAT, &chat(json!({"stream": true}))).await;
    assert_eq!(streamed(&stream, 0), whole);
    assert!(stream.is_done());
    let other = server.post(CHAT, &chat(json!({"seed": 7}))).await;
    assert_ne!(content(&other), whole);
    let server = Server::start(fast()).await;
    assert_eq!(content(&server.post(CHAT, &chat(json!({}))).await), whole, "another server, the same options");
}

#[tokio::test]
async fn long_answers_have_characters_of_several_tokens_and_streams_keep_them_whole() {
    let server = Server::start(fast()).await;
    let body = chat(json!({"max_tokens": 3000, "ignore_eos": true}));
    let whole = content(&server.post(CHAT, &body).await);
    let stream = server.post(CHAT, &merge(body, json!({"stream": true}))).await;
    assert_eq!(streamed(&stream, 0), whole);
    assert!(!whole.contains('\u{fffd}'), "{whole}");
    assert!(whole.contains('水') || whole.contains('🐟') || whole.contains("물"), "{whole}");
    let usage = server.post(CHAT, &chat(json!({"max_tokens": 3000, "ignore_eos": true}))).await.json()["usage"].clone();
    assert_eq!(usage["completion_tokens"], 3000);
    // Fewer events than tokens: some tokens are only part of a character.
    assert!(stream.events().len() < 3000);
}

#[tokio::test]
async fn limits_end_answers() {
    let server = Server::start(fast()).await;
    let cases = [
        (json!({"max_tokens": 5}), 5, "length"),
        (json!({"max_completion_tokens": 6, "max_tokens": 5}), 6, "length"),
        (json!({"max_tokens": 200, "ignore_eos": true}), 200, "length"),
        (json!({"min_tokens": 300}), 301, "stop"),
    ];
    for (more, tokens, reason) in cases {
        let reply = server.post(CHAT, &chat(more.clone())).await.json();
        assert_eq!(reply["usage"]["completion_tokens"], tokens, "{more}");
        assert_eq!(reply["choices"][0]["finish_reason"], reason, "{more}");
    }
    let reply = server.post(CHAT, &chat(json!({}))).await.json();
    let natural = reply["usage"]["completion_tokens"].as_u64().unwrap();
    assert!((20..=120).contains(&natural), "{natural}");
    assert_eq!(reply["choices"][0]["finish_reason"], "stop");
    let reply = server.post(COMPLETIONS, &completion(json!({}))).await.json();
    assert_eq!(reply["usage"]["completion_tokens"], 16, "the default of completions");
}

#[tokio::test]
async fn a_stop_string_ends_the_text_before_it() {
    let server = Server::start(fast()).await;
    let whole = content(&server.post(CHAT, &chat(json!({}))).await);
    // A stop that spans two tokens, from the middle of the answer.
    let middle = whole.char_indices().map(|(at, _)| at).filter(|at| *at >= whole.len() / 2).nth(1).unwrap();
    let stop: String = whole[middle..].chars().take(7).collect();
    let expect = &whole[..whole.find(&stop).unwrap()];
    for stream in [false, true] {
        let body = chat(json!({"stop": [stop, "never seen"], "stream": stream}));
        let reply = server.post(CHAT, &body).await;
        let (text, choice) = match stream {
            false => (content(&reply), reply.json()["choices"][0].clone()),
            true => (streamed(&reply, 0), reply.events().last().unwrap()["choices"][0].clone()),
        };
        assert_eq!(text, expect);
        assert_eq!((choice["finish_reason"].as_str(), choice["stop_reason"].as_str()), (Some("stop"), Some(&*stop)));
    }
    let body = chat(json!({"stop": stop, "include_stop_str_in_output": true}));
    assert_eq!(content(&server.post(CHAT, &body).await), format!("{expect}{stop}"));
}

#[tokio::test]
async fn a_stop_token_ends_the_answer() {
    let server = Server::start(fast()).await;
    let body = completion(json!({"max_tokens": 20, "return_token_ids": true}));
    let ids = server.post(COMPLETIONS, &body).await.json()["choices"][0]["token_ids"].clone();
    let stop = ids[7].as_u64().unwrap();
    let first = ids.as_array().unwrap().iter().position(|id| id.as_u64() == Some(stop)).unwrap();
    let body = completion(json!({"max_tokens": 20, "stop_token_ids": [stop]}));
    let reply = server.post(COMPLETIONS, &body).await.json();
    assert_eq!(reply["usage"]["completion_tokens"], first + 1);
    assert_eq!(reply["choices"][0]["stop_reason"], stop);
}

#[tokio::test]
async fn choices_differ_and_are_interleaved() {
    let server = Server::start(fast()).await;
    let body = chat(json!({"n": 3, "max_tokens": 12, "ignore_eos": true}));
    let whole = server.post(CHAT, &body).await.json();
    let texts: Vec<&str> = (0..3).map(|at| whole["choices"][at]["message"]["content"].as_str().unwrap()).collect();
    assert!(texts[0] != texts[1] && texts[1] != texts[2]);
    assert_eq!(whole["usage"]["completion_tokens"], 36);
    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let stream = server.post(CHAT, &merge(body, options)).await;
    for (at, text) in texts.iter().enumerate() {
        assert_eq!(streamed(&stream, at as u64), *text);
    }
    let events = stream.events();
    let order: Vec<u64> = events.iter().filter_map(|event| event["choices"].get(0)?["index"].as_u64()).collect();
    assert_eq!(order[..6], [0, 1, 2, 0, 1, 2], "roles first, then each its token");
    let usage = events.last().unwrap();
    assert_eq!((&usage["choices"], &usage["usage"]["completion_tokens"]), (&json!([]), &json!(36)));
}

#[tokio::test]
async fn several_prompts_are_answered_prompt_by_prompt() {
    let server = Server::start(fast()).await;
    let ids = server.post("/tokenize", &json!({"prompt": "The river"})).await.json()["tokens"].clone();
    let one = server.post(COMPLETIONS, &completion(json!({"n": 2}))).await.json();
    for prompt in [json!(["The river", "Another"]), json!([ids, [5, 6, 7]])] {
        let reply = server.post(COMPLETIONS, &completion(json!({"prompt": prompt, "n": 2}))).await.json();
        let indices: Vec<u64> =
            reply["choices"].as_array().unwrap().iter().map(|c| c["index"].as_u64().unwrap()).collect();
        assert_eq!(indices, [0, 1, 2, 3]);
        assert_eq!(reply["choices"][1]["text"], one["choices"][1]["text"]);
        assert_ne!(reply["choices"][2]["text"], one["choices"][0]["text"]);
    }
    let reply = server.post(COMPLETIONS, &completion(json!({"prompt": ids}))).await.json();
    assert_eq!(reply["choices"][0]["text"], one["choices"][0]["text"], "ids and their text are the same prompt");
}

#[tokio::test]
async fn echo_logprobs_and_ids_agree_with_the_text() {
    let server = Server::start(fast()).await;
    let more = json!({"echo": true, "logprobs": 2, "return_token_ids": true, "max_tokens": 6, "ignore_eos": true});
    let choice = server.post(COMPLETIONS, &completion(more.clone())).await.json()["choices"][0].clone();
    let text = choice["text"].as_str().unwrap();
    assert!(text.starts_with("The river"), "{text}");
    let logprobs = &choice["logprobs"];
    let tokens: String = logprobs["tokens"].as_array().unwrap().iter().map(|token| token.as_str().unwrap()).collect();
    assert_eq!(tokens, text);
    assert_eq!(logprobs["token_logprobs"][0], Value::Null);
    assert_eq!(logprobs["top_logprobs"][1].as_object().unwrap().len(), 2);
    assert_eq!(
        choice["prompt_logprobs"].as_array().unwrap().len(),
        choice["prompt_token_ids"].as_array().unwrap().len()
    );
    assert_eq!(choice["token_ids"].as_array().unwrap().len(), 6);
    let stream = server.post(COMPLETIONS, &completion(merge(more, json!({"stream": true})))).await;
    assert_eq!(streamed(&stream, 0), text);
    let events = stream.events();
    let ids: Vec<Value> = events.iter().map(|event| event["choices"][0]["token_ids"][0].clone()).collect();
    assert_eq!(json!(ids), choice["token_ids"]);
    let offset = &events[1]["choices"][0]["logprobs"]["text_offset"][0];
    assert_eq!(
        offset,
        &logprobs["text_offset"][events[0]["choices"][0]["logprobs"]["tokens"].as_array().unwrap().len()]
    );
}

fn tools() -> Value {
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}});
    json!([
        {"type": "function", "function": {"name": "get_weather", "parameters": parameters}},
        {"type": "function", "function": {"name": "no_parameters"}},
    ])
}

#[tokio::test]
async fn tools_are_called_when_they_must_be() {
    let server = Server::start(fast()).await;
    let named = |name: &str| json!({"type": "function", "function": {"name": name}});
    let ask = json!([{"role": "user", "content": "Please call the tool."}]);
    let cases = [
        (json!({"tool_choice": "required"}), "get_weather", r#"{"city":"Paris","days":1}"#, "tool_calls"),
        (json!({"tool_choice": named("no_parameters")}), "no_parameters", "{}", "stop"),
        (json!({"tool_choice": "auto", "messages": ask}), "get_weather", r#"{"city":"Paris","days":1}"#, "tool_calls"),
    ];
    for (more, name, arguments, finish) in cases {
        let body = merge(chat(json!({"tools": tools()})), more);
        let choice = server.post(CHAT, &body).await.json()["choices"][0].clone();
        let call = &choice["message"]["tool_calls"][0];
        assert_eq!((&call["function"]["name"], &call["function"]["arguments"]), (&json!(name), &json!(arguments)));
        assert_eq!(choice["finish_reason"], finish);

        let events = server.post(CHAT, &merge(body, json!({"stream": true}))).await.events();
        let deltas = events.iter().filter_map(|event| event["choices"][0]["delta"]["tool_calls"].get(0));
        let calls: Vec<&Value> = deltas.collect();
        assert_eq!(calls[0]["function"], json!({"name": name}));
        let given: String = calls.iter().filter_map(|call| call["function"]["arguments"].as_str()).collect();
        assert_eq!(given, arguments);
        assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], finish);
    }
    for choice in [json!("none"), json!("auto"), Value::Null] {
        let reply = server.post(CHAT, &chat(json!({"tools": tools(), "tool_choice": choice}))).await.json();
        assert_eq!(reply["choices"][0]["message"].get("tool_calls"), None, "{choice}");
    }
    for more in [json!({"tool_choice": "required"}), json!({"tools": tools(), "tool_choice": named("other")})] {
        let reply = server.post(CHAT, &chat(more)).await;
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!("tool_choice")));
    }
}

#[tokio::test]
async fn formats_are_kept() {
    let server = Server::start(fast()).await;
    let schema = json!({"type": "object", "properties": {"a": {"enum": ["x"]}, "b": {"type": "array", "items": {"type": "integer"}}}});
    let format = json!({"type": "json_schema", "json_schema": {"name": "it", "schema": schema}});
    let reply = server.post(CHAT, &chat(json!({"response_format": format}))).await;
    assert_eq!(serde_json::from_str::<Value>(&content(&reply)).unwrap(), json!({"a": "x", "b": [1]}));
    let reply = server.post(CHAT, &chat(json!({"response_format": {"type": "json_object"}}))).await;
    assert!(serde_json::from_str::<Value>(&content(&reply)).unwrap().is_object());
    let reply = server.post(COMPLETIONS, &completion(json!({"structured_outputs": {"choice": ["yes", "no"]}}))).await;
    assert_eq!(reply.json()["choices"][0]["text"], "yes");
}

#[tokio::test]
async fn embeddings_are_alike_for_like_texts_and_equal_in_both_encodings() {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    let server = Server::start(fast()).await;
    let embed = async |more: Value| server.post("/v1/embeddings", &merge(json!({"model": "sim"}), more)).await.json();
    let texts = json!(["the water is cold today", "the water is cold tonight", "printf(\"%d\", 0x1F);"]);
    let reply = embed(json!({"input": texts})).await;
    let vector = |at: usize| -> Vec<f64> {
        reply["data"][at]["embedding"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let (one, two, three) = (vector(0), vector(1), vector(2));
    assert_eq!(one.len(), 32);
    assert!((dot(&one, &one) - 1.0).abs() < 1e-6);
    assert!(dot(&one, &two) > 0.5 && dot(&one, &two) > dot(&one, &three) + 0.2);

    let encoded = embed(json!({"input": texts[0], "encoding_format": "base64"})).await;
    let bytes = STANDARD.decode(encoded["data"][0]["embedding"].as_str().unwrap()).unwrap();
    let floats: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(floats, one.iter().map(|x| *x as f32).collect::<Vec<_>>());
    let short = embed(json!({"input": texts[0], "dimensions": 8})).await;
    assert_eq!(short["data"][0]["embedding"].as_array().unwrap().len(), 8);
    for bad in [0, 33] {
        assert_eq!(embed(json!({"input": "x", "dimensions": bad})).await["error"]["code"], 400);
    }
}

#[tokio::test]
async fn ids_of_answers_follow_the_caller() {
    let server = Server::start(fast()).await;
    let body = chat(json!({"request_id": "mine", "max_tokens": 1}));
    assert_eq!(server.post(CHAT, &body).await.json()["id"], "chatcmpl-mine");
    let reply = server.post_with(CHAT, &[("X-Request-Id", "header")], &body).await;
    assert_eq!(reply.json()["id"], "chatcmpl-header");
    let new = async || server.post(CHAT, &chat(json!({"max_tokens": 1}))).await.json()["id"].clone();
    assert_ne!(new().await, new().await);
}

#[tokio::test]
async fn keys_guard_v1_alone() {
    let server = Server::start(forebay_simulated_engine::Options { api_keys: vec!["k1".into()], ..fast() }).await;
    let body = chat(json!({"max_tokens": 1}));
    let refused = server.post(CHAT, &body).await;
    assert_eq!((refused.status, refused.text().as_str()), (401, r#"{"error":"Unauthorized"}"#));
    assert_eq!(server.post_with(CHAT, &[("Authorization", "Bearer k2")], &body).await.status, 401);
    assert_eq!(server.post_with(CHAT, &[("Authorization", "Bearer k1")], &body).await.status, 200);
    assert_eq!(server.get("/v1/models").await.status, 401);
    for open in ["/health", "/metrics", "/version"] {
        assert_eq!(server.get(open).await.status, 200, "{open}");
    }
}

#[tokio::test]
async fn what_cannot_be_done_is_refused() {
    let server = Server::start(forebay_simulated_engine::Options { max_model_len: 64, ..fast() }).await;
    let long = "water ".repeat(80);
    let cases = [
        (COMPLETIONS, json!({"prompt": long}), 400, "input_tokens"),
        (COMPLETIONS, json!({"prompt": "a b c", "max_tokens": 63}), 400, "input_tokens"),
        (COMPLETIONS, json!({"prompt": "a", "max_tokens": 65}), 400, "max_tokens"),
        (COMPLETIONS, json!({"prompt": []}), 400, "prompt"),
        (COMPLETIONS, json!({"prompt": [6144]}), 400, ""),
        (COMPLETIONS, json!({"prompt": "a", "n": 20_000}), 400, ""),
        (COMPLETIONS, json!({"prompt": "a", "stream": "maybe"}), 400, "body.stream"),
        (CHAT, json!({"messages": [{"content": "no role"}]}), 400, ""),
        (CHAT, json!({"messages": ["no object"]}), 400, ""),
        ("/v1/embeddings", json!({"input": long}), 400, "input_tokens"),
        ("/v1/embeddings", json!({"input": {"a": 1}}), 400, "body.input"),
        ("/tokenize", json!({}), 400, "body.prompt"),
        ("/detokenize", json!({"tokens": ["a"]}), 400, "body.tokens"),
        ("/detokenize", json!({"model": "other", "tokens": []}), 404, "model"),
    ];
    for (path, body, status, param) in cases {
        let reply = server.post(path, &body).await;
        let error = &reply.json()["error"];
        assert_eq!((reply.status, error["param"].as_str().unwrap_or_default()), (status, param), "{body}: {error}");
        assert_eq!(error["code"], status);
    }
    assert_eq!(server.get("/v1/models").await.json()["data"][0]["max_model_len"], 64);
}
