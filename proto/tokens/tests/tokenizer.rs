//! The public face of a tokenizer, on one trained here, so that nothing is needed but the crate.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "failing is what tests are for")]

mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use forebay_tokens::{Chat, Error, LoadError, Parts, Special, Tokenizer};
use proptest::prelude::*;

use crate::common::text::{TextSource, seeded};
use crate::common::trained::{families, train};

fn json() -> Vec<u8> {
    let (_, pre_tokenizer, normalizer, _) = families().swap_remove(0);
    train(pre_tokenizer, normalizer)
}

fn load(config: &str) -> Tokenizer {
    let parts = Parts { tokenizer: &json(), config: Some(config.as_bytes()), ..Parts::default() };
    Tokenizer::from_parts(&parts).unwrap()
}

fn chat(messages: &str) -> Chat<'_> {
    Chat::new(messages.as_bytes(), SystemTime::UNIX_EPOCH)
}

const NAMED: &str = r#"{"bos_token": "<|im_start|>", "chat_template": [
    {"name": "default", "template": "{{ bos_token }}plain {{ messages[0].content }}"},
    {"name": "tool_use", "template": "tools {{ tools|length }}"},
    {"name": "rag", "template": "documents {{ documents|length }}"}]}"#;

#[test]
fn a_conversation_is_rendered_by_the_template_that_it_calls_for() {
    let tokenizer = load(NAMED);
    let messages = r#"[{"role": "user", "content": "hi"}]"#;
    let text = |chat: Chat<'_>| tokenizer.render(&chat).unwrap().text;
    assert_eq!(text(chat(messages)), "<|im_start|>plain hi");
    assert_eq!(text(Chat { tools: Some(b" null "), ..chat(messages) }), "<|im_start|>plain hi");
    assert_eq!(text(Chat { tools: Some(b"[]"), ..chat(messages) }), "tools 0");
    assert_eq!(text(Chat { chat_template: Some("rag"), documents: Some(b"[{}]"), ..chat(messages) }), "documents 1");
    assert_eq!(text(Chat { chat_template: Some("own {{ bos_token }}"), ..chat(messages) }), "own <|im_start|>");
    let broken = tokenizer.render(&Chat { chat_template: Some("{{"), ..chat(messages) });
    assert!(matches!(broken, Err(Error::Render(_))), "{broken:?}");
}

#[test]
fn a_prompt_is_the_rendered_text_in_which_special_tokens_are_tokens() {
    let tokenizer = load(NAMED);
    let start = tokenizer.id("<|im_start|>").unwrap();
    let prompt = tokenizer.chat(&chat(r#"[{"role": "user", "content": "a<|im_start|>"}]"#)).unwrap();
    assert!(prompt.exact);
    assert_eq!(prompt.ids.iter().filter(|id| **id == start).count(), 2);
    assert_eq!(tokenizer.decode(&prompt.ids, Special::Add).unwrap(), "<|im_start|>plain a<|im_start|>");
    assert_eq!(tokenizer.decode(&prompt.ids, Special::Omit).unwrap(), "plain a");
    let image =
        tokenizer.chat(&chat(r#"[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]"#)).unwrap();
    assert!(!image.exact);
}

#[test]
fn a_model_without_a_template_encodes_but_does_not_chat() {
    let tokenizer = load("{}");
    assert!(!tokenizer.has_template());
    assert_eq!(tokenizer.chat(&chat("[]")), Err(Error::NoTemplate));
    assert_eq!(tokenizer.encode("", Special::Add).unwrap(), [0; 0]);
    assert_eq!(tokenizer.vocabulary_size(), 1_500);
    assert_eq!((tokenizer.id("no such token"), tokenizer.token(u32::MAX)), (None, None));
    assert_eq!(tokenizer.token(tokenizer.id("<|im_end|>").unwrap()).as_deref(), Some("<|im_end|>"));
}

#[test]
fn a_directory_is_loaded_with_the_files_it_has_and_faults_name_the_file() {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("tokenizer");
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    let fault = |dir: &PathBuf| Tokenizer::from_dir(dir).unwrap_err();
    assert!(matches!(fault(&dir), LoadError::Read { path, .. } if path.ends_with("tokenizer.json")));
    std::fs::write(dir.join("tokenizer.json"), "{}").unwrap();
    assert!(matches!(fault(&dir), LoadError::Invalid { file: "tokenizer.json", .. }));
    std::fs::write(dir.join("tokenizer.json"), json()).unwrap();
    std::fs::write(dir.join("chat_template.jinja"), "{{ eos_token }}file").unwrap();
    std::fs::write(dir.join("special_tokens_map.json"), r#"{"eos_token": {"content": "<|im_end|>"}}"#).unwrap();
    std::fs::write(dir.join("tokenizer_config.json"), r#"{"chat_template": "configuration"}"#).unwrap();
    assert_eq!(Tokenizer::from_dir(&dir).unwrap().render(&chat("[]")).unwrap().text, "<|im_end|>file");
    std::fs::write(dir.join("chat_template.jinja"), "{% if %}").unwrap();
    assert!(matches!(fault(&dir), LoadError::Template { name, .. } if name == "default"));
    std::fs::write(dir.join("chat_template.jinja"), [0xff]).unwrap();
    assert!(matches!(fault(&dir), LoadError::Invalid { file: "chat_template.jinja", .. }));
    std::fs::remove_file(dir.join("chat_template.jinja")).unwrap();
    std::fs::write(dir.join("tokenizer_config.json"), "[").unwrap();
    assert!(matches!(fault(&dir), LoadError::Invalid { file: "tokenizer_config.json", .. }));
}

/// Text of a stream of ids, put together again.
fn streamed(tokenizer: &Arc<Tokenizer>, prompt: &[u32], ids: &[u32], special: Special) -> String {
    let mut detokenizer = tokenizer.detokenizer(prompt, special);
    let mut text: String = ids.iter().map(|id| detokenizer.push(*id).unwrap()).collect();
    text.push_str(&detokenizer.finish().unwrap());
    text
}

#[test]
fn a_stream_of_ids_is_the_text_of_the_whole() {
    let mut tokenizers = vec![("trained", Arc::new(load("{}")))];
    if let Some(shared) = common::shared("tokenizers") {
        let all = ["gpt2", "smollm2", "qwen3", "deepseek-v3", "mistral-v3-spm"];
        tokenizers.extend(all.map(|name| (name, Arc::new(common::tokenizer(&shared, name)))));
    }
    let source = TextSource::default();
    for (name, tokenizer) in tokenizers {
        let mut random = seeded(5);
        for round in 0..60 {
            let text = source.text(&mut random, 200);
            let ids = tokenizer.encode(&text, Special::Omit).unwrap();
            let whole = tokenizer.decode(&ids, Special::Omit).unwrap();
            assert_eq!(streamed(&tokenizer, &[], &ids, Special::Omit), whole, "{name}, round {round}");
            // as the continuation of a prompt, down to the space between them
            let at = round % ids.len();
            let (prompt, answer) = ids.split_at(at);
            let before = tokenizer.decode(prompt, Special::Omit).unwrap();
            if !before.ends_with('\u{fffd}') && !before.is_empty() {
                let expect = whole.strip_prefix(&before).unwrap();
                assert_eq!(streamed(&tokenizer, prompt, answer, Special::Omit), expect, "{name}, round {round}");
            }
        }
    }
}

#[test]
fn a_character_comes_out_once_it_is_whole() {
    let tokenizer = Arc::new(load("{}"));
    let ids = tokenizer.encode("𓀀", Special::Omit).unwrap();
    assert!(ids.len() > 2, "not one token");
    let mut detokenizer = tokenizer.detokenizer(&[], Special::Omit);
    let texts: Vec<String> = ids.iter().map(|id| detokenizer.push(*id).unwrap()).collect();
    assert_eq!(texts.concat(), "𓀀");
    assert!(texts.iter().all(|text| !text.contains('\u{fffd}')), "{texts:?}");
    assert_eq!(detokenizer.finish().unwrap(), "");
}

#[test]
fn broken_bytes_and_silent_ids_neither_wait_for_ever_nor_pile_up() {
    let tokenizer = Arc::new(load("{}"));
    let byte = tokenizer.id("Ã").unwrap(); // 0xC3, the first byte of two
    let end = tokenizer.id("<|im_end|>").unwrap();
    let mut detokenizer = tokenizer.detokenizer(&[], Special::Omit);
    let mut out = String::new();
    for _ in 0..1_000 {
        out.push_str(&detokenizer.push(byte).unwrap());
        out.push_str(&detokenizer.push(end).unwrap());
        out.push_str(&detokenizer.push(u32::MAX).unwrap());
    }
    assert!(out.chars().count() > 980, "all but the last few came out");
    assert_eq!(out + &detokenizer.finish().unwrap(), "\u{fffd}".repeat(1_000));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_ids_decode_and_stream_alike(ids in proptest::collection::vec(0_u32..1_600, 0..60), keep: bool) {
        static TOKENIZER: std::sync::LazyLock<Arc<Tokenizer>> = std::sync::LazyLock::new(|| Arc::new(load("{}")));
        let special = if keep { Special::Add } else { Special::Omit };
        let whole = TOKENIZER.decode(&ids, special).unwrap();
        prop_assert_eq!(streamed(&TOKENIZER, &[], &ids, special), whole);
    }
}
