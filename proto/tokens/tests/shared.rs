//! The crate against known answers: tokenizers, chat templates, and what a real vLLM counted.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "failing is what tests are for")]

mod common;

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use forebay_tokens::{Chat, ChatTemplate, Error, Parts, Special, SpecialTokens, Tokenizer};
use serde_json::Value;

use crate::common::{lines, read, shared, tokenizer};

const TOKENIZERS_WITH_VECTORS: [&str; 4] = ["gpt2", "qwen3", "deepseek-v3", "mistral-v3-spm"];

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn every_vector_of_every_tokenizer_comes_out_equal() {
    let Some(shared) = shared("tokenizers") else { return };
    for name in TOKENIZERS_WITH_VECTORS {
        let tokenizer = tokenizer(&shared, name);
        let vectors = lines(&shared.join(name).join("vectors.jsonl"));
        assert_eq!(vectors.len(), 200);
        for vector in vectors {
            let text = vector["text"].as_str().unwrap();
            let bare = tokenizer.encode(text, Special::Omit).unwrap();
            assert_eq!(bare, ids(&vector["ids"]), "{name}: {text:?}");
            assert_eq!(
                tokenizer.encode(text, Special::Add).unwrap(),
                ids(&vector["ids_with_special"]),
                "{name}: {text:?}"
            );
            let decoded = tokenizer.decode(&bare, Special::Add).unwrap();
            assert_eq!(decoded, vector["decoded"].as_str().unwrap(), "{name}: {text:?}");
        }
    }
}

#[test]
fn prompts_have_the_tokens_that_vllm_counted() {
    let Some(shared) = shared("tokenizers") else { return };
    let tokenizer = tokenizer(&shared, "smollm2");
    let cases = lines(&shared.join("smollm2/chat_counts.jsonl"));
    assert_eq!(cases.len(), 60);
    for case in cases {
        let request = &case["request"];
        let messages = request["messages"].to_string();
        let tools = request.get("tools").map(Value::to_string);
        let chat = Chat {
            tools: tools.as_deref().map(str::as_bytes),
            add_generation_prompt: request["add_generation_prompt"].as_bool().unwrap_or(true),
            continue_final_message: request["continue_final_message"].as_bool().unwrap_or(false),
            ..Chat::new(messages.as_bytes(), SystemTime::UNIX_EPOCH)
        };
        let prompt = tokenizer.chat(&chat).unwrap();
        assert!(prompt.exact);
        assert_eq!(prompt.ids.len() as u64, case["prompt_tokens"].as_u64().unwrap(), "{case}");
    }
}

/// A token beside, with no truncation to 128 and no padding to 128, which this `tokenizer.json` asks for.
#[test]
fn an_embedding_models_text_is_counted_whole_and_unpadded() {
    let Some(shared) = shared("tokenizers") else { return };
    let tokenizer = tokenizer(&shared, "minilm");
    assert_eq!(tokenizer.encode("Hello world!", Special::Add).unwrap(), [101, 7592, 2088, 999, 102]);
    assert_eq!(tokenizer.encode(&"word ".repeat(1_000), Special::Add).unwrap().len(), 1_002);
    assert!(!tokenizer.has_template());
    assert_eq!(tokenizer.vocabulary_size(), 30_522);
    assert_eq!(tokenizer.token(7592).as_deref(), Some("hello"));
    assert_eq!(tokenizer.id("[SEP]"), Some(102));
}

/// 2025-06-15T12:00:00, the time of all template cases.
fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_749_988_800)
}

#[test]
fn every_template_case_renders_as_transformers_renders_it() {
    let Some(shared) = shared("chat-templates") else { return };
    let (mut equal, mut refused) = (0, 0);
    for case in lines(&shared.join("cases.jsonl")) {
        let name = format!("{} {}", case["template"], case["case"]);
        assert_eq!(case["now"], "2025-06-15T12:00:00", "{name}");
        let source = read(&shared.join(format!("{}.jinja", case["template"].as_str().unwrap())));
        let special = ["bos_token", "eos_token"].map(|role| (role.to_owned(), case[role].as_str().unwrap().to_owned()));
        let template = ChatTemplate::new(&source, SpecialTokens(BTreeMap::from(special))).unwrap();
        let [messages, tools, kwargs] = ["messages", "tools", "kwargs"].map(|field| case[field].to_string());
        let result = template.render(&Chat {
            tools: Some(tools.as_bytes()),
            kwargs: Some(kwargs.as_bytes()),
            add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap(),
            ..Chat::new(messages.as_bytes(), now())
        });
        match (case.get("expected").and_then(Value::as_str), case.get("error").and_then(Value::as_str)) {
            (Some(expected), None) => {
                assert_eq!(result.as_deref(), Ok(expected), "{name}");
                equal += 1;
            }
            (None, Some(error)) => {
                // any refusal is right for what Python itself refused; a template's own words must come through
                match error.strip_prefix("TemplateError: ") {
                    Some(words) => assert_eq!(result, Err(Error::Refused(words.to_owned())), "{name}"),
                    None => assert!(matches!(result, Err(Error::Render(_))), "{name}: {result:?}"),
                }
                refused += 1;
            }
            _ => panic!("{name} has neither an expected text nor an error"),
        }
    }
    assert_eq!((equal, refused), (340, 63));
}

/// What the engine normalizes is refused by no template of text models.
#[test]
fn parts_and_null_contents_render_after_vllms_reshaping() {
    let (Some(templates), Some(tokenizers)) = (shared("chat-templates"), shared("tokenizers")) else { return };
    let json = std::fs::read(tokenizers.join("smollm2/tokenizer.json")).unwrap();
    let messages = br#"[{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},
        {"role":"assistant","content":null},{"role":"user","content":"c"}]"#;
    for name in [
        "qwen2.5-7b-instruct",
        "qwen3-0.6b",
        "deepseek-v3.1",
        "phi-3.5-mini-instruct",
        "granite-3.3-2b-instruct",
        "chatml",
    ] {
        let template = read(&templates.join(format!("{name}.jinja")));
        let parts = Parts { tokenizer: &json, template: Some(&template), ..Parts::default() };
        let rendered = Tokenizer::from_parts(&parts).unwrap().render(&Chat::new(messages, now())).unwrap();
        assert!(rendered.exact && rendered.text.contains("a\nb"), "{name}: {}", rendered.text);
    }
}
