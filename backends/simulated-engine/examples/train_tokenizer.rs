//! Trains the tokenizer that the simulated engine carries, from the texts in `model/`, and writes it beside them.
//!
//! The result depends on those texts alone; a test of the crate trains again and compares. Run it after changing them:
//! `cargo run -p forebay-simulated-engine --example train_tokenizer`

use std::path::Path;

use serde_json::json;
use tokenizers::{
    AddedToken, Model as _, SplitDelimiterBehavior, TokenizerBuilder,
    decoders::DecoderWrapper,
    models::{
        TrainerWrapper,
        bpe::{BPE, BpeTrainer},
    },
    normalizers::NormalizerWrapper,
    pre_tokenizers::{
        PreTokenizerWrapper,
        byte_level::ByteLevel,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
    processors::PostProcessorWrapper,
};

/// Small enough to be carried in the program, large enough that English words are mostly one token.
const VOCABULARY: usize = 6144;

/// Begins a message, ends it (and a generation), and begins a tool call. Their ids are 0, 1 and 2.
const SPECIAL: [&str; 3] = ["<|start|>", "<|end|>", "<|tool|>"];

/// Contractions, words with at most one leading sign, numbers of up to three digits, signs, spaces: the usual classes of
/// byte-level tokenizers.
const PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const CHAT_TEMPLATE: &str = r#"
{%- if tools %}
    {{- '<|start|>tools\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\n' }}
    {%- endfor %}
    {{- '<|end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start|>' + ('system' if message.role == 'developer' else message.role) + '\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- elif message.content %}
        {%- for part in message.content if part.type == 'text' %}
            {{- part.text }}
        {%- endfor %}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {%- set arguments = call.function.arguments %}
        {{- '<|tool|>{"name": ' + (call.function.name | tojson) + ', "arguments": ' }}
        {{- arguments if arguments is string else arguments | tojson }}
        {{- '}' }}
    {%- endfor %}
    {%- if not (loop.last and continue_final_message) %}
        {{- '<|end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\n' }}
{%- endif %}"#;

type Trained = (String, String);

/// Gives `tokenizer.json` and `tokenizer_config.json`.
pub(crate) fn train() -> tokenizers::Result<Trained> {
    let byte_level = ByteLevel::new(false, false, false);
    let split = Split::new(SplitPattern::Regex(PATTERN.into()), SplitDelimiterBehavior::Isolated, false)?;
    let pre_tokenizer = Sequence::new(vec![split.into(), byte_level.into()]);
    let mut tokenizer =
        TokenizerBuilder::<BPE, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>::new()
            .with_model(BPE::default())
            .with_pre_tokenizer(Some(pre_tokenizer.into()))
            .with_post_processor(Some(byte_level.into()))
            .with_decoder(Some(byte_level.into()))
            .build()?;
    let special = SPECIAL.map(|token| AddedToken::from(token, true)).to_vec();
    let mut trainer: TrainerWrapper = BpeTrainer::builder()
        .vocab_size(VOCABULARY)
        .min_frequency(0)
        .show_progress(false)
        .special_tokens(special)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build()
        .into();
    let texts = [include_str!("../model/prose.txt"), include_str!("../model/corpus.txt")];
    let lines = texts.iter().flat_map(|text| text.split_inclusive('\n'));
    let TrainerWrapper::BpeTrainer(trainer) = &mut trainer else { return Err("not a BPE trainer".into()) };
    tokenizer.train(trainer, lines)?;
    assert_eq!(tokenizer.get_model().get_vocab_size(), VOCABULARY, "the texts are too short for the vocabulary");
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": null,
        "eos_token": SPECIAL[1],
        "pad_token": SPECIAL[1],
        "add_bos_token": false,
        "add_eos_token": false,
        "clean_up_tokenization_spaces": false,
        "model_max_length": 32768,
        "chat_template": CHAT_TEMPLATE.trim_start(),
    });
    Ok((tokenizer.to_string(false)?, serde_json::to_string_pretty(&config)? + "\n"))
}

#[allow(dead_code, reason = "the test that trains again includes this file as a module")]
fn main() -> tokenizers::Result<()> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("model");
    let (tokenizer, config) = train()?;
    std::fs::write(directory.join("tokenizer.json"), tokenizer)?;
    std::fs::write(directory.join("tokenizer_config.json"), config)?;
    Ok(())
}
