//! Small byte-level tokenizers, trained on the spot with the pre-tokenizers of well-known families.

use serde_json::{Value, json};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

use super::text::{TextSource, seeded};

const SPECIAL: [&str; 4] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"];

/// The pre-tokenizer, the normalizer, and whether text may be cut elsewhere than before added tokens.
pub(crate) fn families() -> Vec<(&'static str, Value, Value, bool)> {
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let split = |pattern: &str| {
        let split = json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        json!({"type": "Sequence", "pretokenizers": [split, bytes(false)]})
    };
    let llama3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let qwen = llama3.replace(r"\p{N}{1,3}", r"\p{N}");
    let marks = llama3.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+");
    // as GPT-4o: punctuation takes slashes, too, so the cuts of its relatives would be wrong
    let o200k = llama3.replace(r"[\r\n]*|\s*", r"[\r\n/]*|\s*");
    vec![
        ("gpt2", bytes(true), Value::Null, true),
        ("llama3", split(llama3), Value::Null, true),
        ("qwen", split(&qwen), json!({"type": "NFC"}), true),
        ("letters with marks", split(&marks), Value::Null, true),
        ("unknown pattern", split(&o200k), Value::Null, false),
        ("lower-casing", split(llama3), json!({"type": "Lowercase"}), false),
        (
            "metaspace",
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true}),
            Value::Null,
            false,
        ),
    ]
}

/// The `tokenizer.json` of a byte-level BPE with these parts, trained on random text.
pub(crate) fn train(pre_tokenizer: Value, normalizer: Value) -> Vec<u8> {
    let mut tokenizer = Tokenizer::new(BPE::default());
    let pre_tokenizer: tokenizers::PreTokenizerWrapper = serde_json::from_value(pre_tokenizer).unwrap();
    let normalizer: Option<tokenizers::NormalizerWrapper> = serde_json::from_value(normalizer).unwrap();
    tokenizer.with_pre_tokenizer(Some(pre_tokenizer)).with_decoder(Some(ByteLevel::default()));
    tokenizer.with_normalizer(normalizer).unwrap();
    let trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(1_500)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(SPECIAL.iter().map(|token| AddedToken::from(*token, true)).collect())
        .build();
    let source = TextSource::default();
    let mut random = seeded(1);
    let corpus: Vec<String> = (0..200).map(|_| source.text(&mut random, 400)).collect();
    tokenizer.train(&mut TrainerWrapper::BpeTrainer(trainer), corpus.into_iter()).unwrap();
    tokenizer.to_string(false).unwrap().into_bytes()
}
