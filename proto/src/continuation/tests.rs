use proptest::prelude::*;

use super::*;
use crate::stream::read;

fn chunk(chat: bool, id: &str, text: &str, finish: Option<&str>) -> Vec<u8> {
    let choice = if chat {
        json!({"index": 0, "delta": {"content": text}, "logprobs": null, "finish_reason": finish})
    } else {
        json!({"index": 0, "text": text, "logprobs": null, "finish_reason": finish, "stop_reason": null})
    };
    let object = if chat { "chat.completion.chunk" } else { "text_completion" };
    json!({"id": id, "object": object, "created": 7, "model": "m", "choices": [choice]}).to_string().into_bytes()
}

fn value(data: &[u8]) -> Value {
    serde_json::from_slice(data).unwrap()
}

/// What a chunk says as the client reads it.
fn content(chat: bool, chunk: &Value) -> String {
    let choice = &chunk["choices"][0];
    let text = if chat { &choice["delta"]["content"] } else { &choice["text"] };
    text.as_str().unwrap_or_default().to_owned()
}

#[test]
fn what_the_rest_can_be_asked_for_with() {
    let read = |more: &str| Asking::read(format!(r#"{{"model":"m","messages":[]{more}}}"#).as_bytes(), true);
    for fine in [
        "",
        r#","temperature":0.7,"top_p":0.9,"top_k":-1,"min_p":0.1,"seed":5,"logit_bias":{"5":1},"user":"u","priority":-3"#,
        r#","n":1,"best_of":1.0,"stop":[],"tools":null,"tool_choice":"auto","echo":false,"logprobs":false,"top_logprobs":0"#,
        r#","presence_penalty":0,"repetition_penalty":1.0,"response_format":{"type":"text"},"parallel_tool_calls":true"#,
        r#","skip_special_tokens":true,"metadata":{"a":"b"},"chat_template_kwargs":{"x":1},"stop_token_ids":[5]"#,
        r#","stop":"","made_up":null,"min_tokens":3,"max_completion_tokens":9,"ignore_eos":true"#,
    ] {
        assert!(read(fine).is_some(), "{fine}");
    }
    for not in [
        r#","stop":"x""#,
        r#","stop":["x"]"#,
        r#","tools":[{}]"#,
        r#","tool_choice":"required""#,
        r#","functions":[{}]"#,
        r#","n":2"#,
        r#","logprobs":true"#,
        r#","logprobs":1"#,
        r#","presence_penalty":0.5"#,
        r#","repetition_penalty":1.1"#,
        r#","response_format":{"type":"json_object"}"#,
        r#","structured_outputs":{"regex":"a"}"#,
        r#","guided_json":{"type":"object"}"#,
        r#","bad_words":["x"]"#,
        r#","skip_special_tokens":false"#,
        r#","truncate_prompt_tokens":5"#,
        r#","return_token_ids":true"#,
        r#","made_up":7"#,
        r#","made_up":false"#,
        r#","made_up":"""#,
        r#","include_reasoning":false"#,
        r#","thinking_budget":0"#,
        r#","separate_reasoning":false"#,
        r#","logprobs":0"#,
        r#","max_tokens":-1"#,
        r#","min_tokens":"a""#,
    ] {
        assert_eq!(read(not), None, "{not}");
    }
    assert_eq!([&b"[]"[..], b"{", b""].map(|body| Asking::read(body, true)), [None, None, None]);
}

#[test]
fn the_rest_is_asked_for_with_what_is_left() {
    let rest = |body: &str, chat, said, room| {
        let body = Asking::read(body.as_bytes(), chat)?.rest(&[1, 2, 3], said, room)?;
        Some(String::from_utf8(body).unwrap())
    };
    let chat = r#"{"messages":[{"role":"user","content":"x"}],"model":"m","temperature":0.5,"min_tokens":4,
        "stream":true,"max_completion_tokens":10}"#;
    assert_eq!(
        rest(chat, true, 3, None).as_deref(),
        Some(r#"{"model":"m","temperature":0.5,"stream":true,"prompt":[1,2,3],"max_tokens":7,"min_tokens":1}"#)
    );
    assert_eq!((rest(chat, true, 10, None), rest(chat, true, 11, Some(99))), (None, None));
    let endless = r#"{"model":"m","messages":[]}"#;
    assert_eq!(rest(endless, true, 3, Some(5)).as_deref(), Some(r#"{"model":"m","prompt":[1,2,3],"max_tokens":2}"#));
    assert_eq!(
        (rest(endless, true, 3, None), rest(endless, true, 5, Some(5))),
        (None, None),
        "no room is known, or left"
    );
    let completion = r#"{"model":"m","prompt":"x"}"#;
    assert_eq!(rest(completion, false, 6, None).as_deref(), Some(r#"{"model":"m","prompt":[1,2,3],"max_tokens":10}"#));
    let asking = Asking::read(completion.as_bytes(), false).unwrap();
    assert_eq!([15, 16, 17].map(|said| asking.is_all(said, Some(99))), [false, true, true]);
    let asking = Asking::read(endless.as_bytes(), true).unwrap();
    assert_eq!([4, 5, 6].map(|said| asking.is_all(said, Some(5))), [false, true, true], "the context is full");
    assert!(!asking.is_all(5, None));
}

#[test]
fn what_is_no_text_is_not_gone_on_with() {
    for other in [
        r#"{"choices":[{"index":0,"delta":{"reasoning":"hm"}}]}"#,
        r#"{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0}]}}]}"#,
        r#"{"choices":[{"index":0,"delta":{"content":[{"type":"text"}]}}]}"#,
        r#"{"choices":[{"index":1,"delta":{"content":"a"}}]}"#,
        r#"{"choices":[{"index":0,"delta":{"content":"a"},"logprobs":{"content":[]}}]}"#,
        r#"{"choices":[7]}"#,
    ] {
        let mut said = Said::new(true);
        assert_eq!(said.hear(&chunk(true, "a", "text", None)), None);
        assert_eq!(said.text(), Some("text"));
        assert_eq!(said.hear(other.as_bytes()), None);
        said.hear(&chunk(true, "a", "more", None));
        assert_eq!(said.text(), None, "{other}");
    }
    let mut said = Said::new(true);
    assert_eq!(said.text(), None, "nothing was heard yet");
    for harmless in [
        r#"{"choices":[{"delta":{"role":"assistant","content":null,"refusal":null,"tool_calls":[]},"finish_reason":null}]}"#,
        r#"{"choices":[],"usage":{"prompt_tokens":4}}"#,
        r#"{"choices":[{"index":0,"delta":null}]}"#,
        // What no client gets.
        "garbage",
        r#"{"choices":[{"index":0,"delta":{"content":"\ud83d"}}]}"#,
    ] {
        said.hear(harmless.as_bytes());
        assert_eq!(said.text(), Some(""), "{harmless}");
    }
    let long = "a".repeat(TEXT_BYTES_MAX / 2 + 1);
    said.hear(&chunk(true, "a", &long, None));
    assert!(said.text().is_some());
    said.hear(&chunk(true, "a", &long, None));
    assert_eq!((said.text(), said.text.capacity()), (None, 0), "bounded");
}

#[test]
fn what_ends_for_want_of_tokens_is_ended_here() {
    for chat in [true, false] {
        let mut said = Said::new(chat);
        said.hear(&chunk(chat, "first", "all of it", None));
        let [finish, usage, done] = said.ending(9, 4);
        let (Chunk::Delta(finish_read), Chunk::Delta(usage_read)) = (read(&finish), read(&usage)) else { panic!() };
        assert!(finish_read.choices[0].finished && !finish_read.has_content && usage_read.usage_only);
        assert_eq!((value(&finish)["id"].as_str(), read(&done)), (Some("first"), Chunk::Done));
        assert_eq!(value(&finish)["choices"][0]["finish_reason"], "length");
        let counts = json!({"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13});
        assert_eq!(value(&usage)["usage"], counts);
    }
}

#[test]
fn an_answer_of_which_nothing_was_said_begins_anew() {
    let role =
        |id: &str| format!(r#"{{"id":"{id}","choices":[{{"index":0,"delta":{{"role":"assistant","content":""}}}}]}}"#);
    let mut said = Said::new(true);
    said.hear(role("a").as_bytes());
    said.goes_on(None, json!({"continued": 1}));
    let told = said.hear(role("b").as_bytes()).unwrap();
    let once = json!({"id": "a", "choices": [{"index": 0, "delta": {"content": ""}}], MARK: {"continued": 1}});
    assert_eq!(value(&told), once, "the role is told once");
    let told = value(&said.hear(&chunk(true, "b", "hello", None)).unwrap());
    assert_eq!((content(true, &told).as_str(), &told["id"]), ("hello", &json!("a")));
    let usage = json!({"prompt_tokens": 5, "completion_tokens": 1});
    let told = said.hear(json!({"id": "b", "choices": [], "usage": usage}).to_string().as_bytes()).unwrap();
    assert_eq!((&value(&told)["usage"], said.before(), said.text()), (&usage, 0, Some("hello")));
}

proptest! {
    /// Wherever it breaks, and however often, the client reads one answer: each character once, one id, one sum.
    #[test]
    fn an_answer_in_parts_is_one(
        chat in any::<bool>(),
        pieces in prop::collection::vec("\\PC{0,6}", 1..12),
        mut breaks in prop::collection::vec(0..12_usize, 1..4),
    ) {
        breaks.iter_mut().for_each(|at| *at %= pieces.len());
        breaks.sort_unstable();
        let mut said = Said::new(chat);
        let head = if chat { r#"{"role":"assistant","content":""}"# } else { "" };
        if chat {
            let first = format!(r#"{{"id":"a0","object":"chat.completion.chunk","created":7,"model":"m","choices":[{{"index":0,"delta":{head}}}]}}"#);
            prop_assert_eq!(said.hear(first.as_bytes()), None);
        } else {
            prop_assert_eq!(said.hear(&chunk(false, "a0", "", None)), None);
        }
        let mut read = String::new();
        let mut told_tokens = 0;
        for (number, piece) in pieces.iter().enumerate() {
            while breaks.first() == Some(&number) {
                breaks.remove(0);
                prop_assert_eq!(said.text(), Some(&*read));
                told_tokens = u32::try_from(read.chars().count()).unwrap();
                said.goes_on(Some([5, told_tokens]), json!({"continued": 1}));
            }
            let is_rest = said.seam.is_some();
            let event = chunk(chat && !is_rest, if is_rest { "b9" } else { "a0" }, piece, None);
            let told = said.hear(&event);
            prop_assert_eq!(told.is_some(), is_rest);
            let told = value(told.as_deref().unwrap_or(&event));
            prop_assert_eq!(&told["id"], "a0");
            prop_assert_eq!(&told["object"], if chat { "chat.completion.chunk" } else { "text_completion" });
            prop_assert_eq!(&told["choices"][0].get("text").is_some(), &!chat);
            prop_assert_eq!(!told[MARK].is_null(), is_rest);
            read += &content(chat, &told);
        }
        prop_assert_eq!(&read, &pieces.concat());
        if said.seam.is_some() {
            let usage = br#"{"id":"b9","choices":[],"usage":{"prompt_tokens":90,"completion_tokens":3,"total_tokens":93,"prompt_tokens_details":{"cached_tokens":64}}}"#;
            let told = value(&said.hear(usage).unwrap());
            prop_assert_eq!(&told["usage"], &json!({"prompt_tokens": 5, "completion_tokens": told_tokens + 3,
                "total_tokens": told_tokens + 8, "prompt_tokens_details": {"cached_tokens": 5}}));
            prop_assert_eq!(&told["id"], "a0");
        }
    }

    #[test]
    fn no_bytes_panic(chat in any::<bool>(), data in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut said = Said::new(chat);
        said.hear(&data);
        said.goes_on(Some([1, 1]), Value::Null);
        said.hear(&data);
        let _ = Asking::read(&data, chat);
    }
}
