//! The built-in tokenizer: that it comes from its texts, and that it can write anything.

use forebay_simulated_engine::builtin_model;
use forebay_tokens::{Chat, Parts, Special, Tokenizer};

#[path = "../../examples/train_tokenizer.rs"]
mod training;

fn builtin() -> Tokenizer {
    let files = builtin_model();
    let parts = Parts { tokenizer: files.tokenizer, config: Some(files.tokenizer_config), ..Parts::default() };
    Tokenizer::from_parts(&parts).unwrap()
}

#[test]
fn training_again_gives_the_same_files() {
    let (tokenizer, config) = training::train().unwrap();
    assert!(tokenizer.as_bytes() == builtin_model().tokenizer, "run the example `train_tokenizer`");
    assert!(config.as_bytes() == builtin_model().tokenizer_config, "run the example `train_tokenizer`");
}

#[test]
fn every_text_survives() {
    let tokenizer = builtin();
    let texts = [
        "The water stands quietly before the turbines.",
        "naïve façade, 日本語 テスト, 한국어, Привет, שלום, สวัสดี, नमस्ते",
        "👩‍🔧 🇯🇵 🎉 \u{200d} \u{0} \u{10ffff}",
        "fn main() {\n\tlet x = 1;\r\n}   \n\n\n  end",
        "<|start|>not special<|end|",
        "",
    ];
    for text in texts {
        let ids = tokenizer.encode(text, Special::Omit).unwrap();
        assert_eq!(tokenizer.decode(&ids, Special::Add).unwrap(), text);
    }
}

#[test]
fn common_english_takes_few_tokens_and_rare_characters_several() {
    let tokenizer = builtin();
    let count = |text: &str| tokenizer.encode(text, Special::Omit).unwrap().len();
    let text = "The engine answers every question about the weather in the valley.";
    assert!(count(text) <= 16, "{}", count(text));
    assert!(count("𒀀") > 1, "streams should meet characters of several tokens");
}

#[test]
fn the_template_writes_each_kind_of_message() {
    let tokenizer = builtin();
    let messages = br#"[
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "get", "arguments": "{\"city\": \"Ulm\"}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"}
    ]"#;
    let tools = br#"[{"type": "function", "function": {"name": "get"}}]"#;
    let mut chat = Chat::new(messages, std::time::SystemTime::UNIX_EPOCH);
    chat.tools = Some(tools);
    let text = tokenizer.render(&chat).unwrap().text;
    let (first, rest) = text.split_once("<|end|>\n").unwrap();
    assert!(first.starts_with("<|start|>tools\n{\"type\": \"function\""), "{first}");
    let expect = "<|start|>system\nBe brief.<|end|>\n<|start|>user\nWeather?<|end|>\n<|start|>assistant\n<|tool|>\
                  {\"name\": \"get\", \"arguments\": {\"city\": \"Ulm\"}}<|end|>\n<|start|>tool\nrain<|end|>\n\
                  <|start|>assistant\n";
    assert_eq!(rest, expect);
    let ids = tokenizer.chat(&chat).unwrap().ids;
    assert_eq!(ids[0], tokenizer.id("<|start|>").unwrap());
}
