#[path = "../../tests/common/mod.rs"]
mod common;

use self::common::text::{TextSource, seeded};
use self::common::trained::{families, train};
use super::*;

fn load(json: &[u8]) -> Tokenizer {
    let mut tokenizer = Tokenizer::from_bytes(json).unwrap();
    tokenizer.with_padding(None).with_truncation(None).unwrap();
    tokenizer
}

/// Cuts random texts everywhere they may be cut, and compares with the whole. Returns the number of cuts.
fn check_every_cut(name: &str, json: &[u8], texts: usize, cuts_text: bool) -> usize {
    let tokenizer = load(json);
    let cuts = Cuts::of(&tokenizer).unwrap_or_else(|| panic!("{name} fits no rule"));
    assert_eq!(cuts.rule != Rule::AddedTokensOnly, cuts_text, "{name}: {:?}", cuts.rule);
    let source = TextSource::new(json);
    let mut random = seeded(7);
    let mut total = 0;
    for round in 0..texts {
        let text = source.text(&mut random, 300);
        let pieces = cuts.pieces(&text, 1);
        assert_eq!(pieces.iter().map(|piece| piece.text).collect::<String>(), text);
        let ids: Vec<u32> = pieces.iter().flat_map(|piece| cuts.encode(&tokenizer, *piece).unwrap()).collect();
        let whole = tokenizer.encode_fast(text.as_str(), false).unwrap();
        assert_eq!(ids, whole.get_ids(), "{name}, round {round}: {text:?}");
        total += pieces.len().saturating_sub(1);
    }
    total
}

#[test]
fn every_cut_is_safe_in_tokenizers_of_each_family() {
    for (name, pre_tokenizer, normalizer, cuts_text) in families() {
        let cuts = check_every_cut(name, &train(pre_tokenizer, normalizer), 150, cuts_text);
        assert!(cuts > if cuts_text { 2_000 } else { 300 }, "{name}: only {cuts} cuts");
    }
}

#[test]
fn every_cut_is_safe_in_the_shared_tokenizers() {
    let Some(shared) = common::shared("tokenizers") else { return };
    for name in common::TOKENIZERS {
        let cuts = check_every_cut(name, &common::tokenizer_json(&shared, name), 150, name != "minilm");
        assert!(cuts > 300, "{name}: only {cuts} cuts");
    }
}

/// The same parts but for one that makes the cuts of the family wrong.
#[test]
fn a_tokenizer_that_meets_not_every_condition_is_cut_before_added_tokens_only() {
    let (_, pre_tokenizer, normalizer, _) = families().swap_remove(0);
    let json: Value = serde_json::from_slice(&train(pre_tokenizer, normalizer)).unwrap();
    let rule_after = |change: &dyn Fn(&mut Value)| {
        let mut json = json.clone();
        change(&mut json);
        Cuts::of(&load(&serde_json::to_vec(&json).unwrap())).map(|cuts| cuts.rule)
    };
    let set = |pointer: &'static str, value: Value| {
        move |json: &mut Value| *json.pointer_mut(pointer).unwrap() = value.clone()
    };
    assert_eq!(rule_after(&|_| ()), Some(Rule::Gpt2));
    for change in [
        set("/model/dropout", serde_json::json!(0.5)),
        set("/pre_tokenizer/add_prefix_space", true.into()),
        set("/added_tokens/0/rstrip", true.into()),
        set("/added_tokens/0/content", "<|end of text|>".into()),
    ] {
        let rule = rule_after(&change);
        assert!(matches!(rule, None | Some(Rule::AddedTokensOnly)), "{rule:?}");
    }
}

#[test]
fn sentencepiece_conditions_are_on_the_vocabulary() {
    let Some(shared) = common::shared("tokenizers") else { return };
    let json: Value = serde_json::from_slice(&common::tokenizer_json(&shared, "mistral-v3-spm")).unwrap();
    let rule_after = |change: &dyn Fn(&mut Value)| {
        let mut json = json.clone();
        change(&mut json);
        Cuts::of(&load(&serde_json::to_vec(&json).unwrap())).map(|cuts| cuts.rule)
    };
    assert_eq!(rule_after(&|_| ()), Some(Rule::Sentencepiece));
    let joining = |entry: &'static str| {
        move |json: &mut Value| {
            json["model"]["vocab"].as_object_mut().unwrap().insert(entry.to_owned(), 999_999.into());
        }
    };
    for entry in ["a▁", "▁a▁b", ".\n"] {
        assert_eq!(rule_after(&joining(entry)), Some(Rule::AddedTokensOnly), "{entry:?}");
    }
    assert_eq!(rule_after(&joining("▁▁a.▁")), Some(Rule::Sentencepiece));
    let no_fallback = rule_after(&|json| json["model"]["byte_fallback"] = false.into());
    assert_eq!(no_fallback, Some(Rule::AddedTokensOnly));
}

#[test]
fn pieces_cover_the_text_and_are_cut_at_the_first_safe_place() {
    let (_, pre_tokenizer, normalizer, _) = families().swap_remove(0);
    let cuts = Cuts::of(&load(&train(pre_tokenizer, normalizer))).unwrap();
    let pieces = |text, bytes| cuts.pieces(text, bytes).iter().map(|piece| piece.text).collect::<Vec<_>>();
    assert_eq!(pieces("", 4), [""; 0]);
    assert_eq!(pieces("ab cd ef", 1), ["ab", " cd", " ef"]);
    assert_eq!(pieces("ab cd ef", 4), ["ab cd", " ef"]);
    assert_eq!(pieces("ab  cd", 3), ["ab  cd"], "within white space is no cut");
    assert_eq!(pieces("é x", 1), ["é x"], "nor behind what is not ASCII");
    assert_eq!(pieces("x<|im_end|><|im_start|>", 1), ["x", "<|im_end|>", "<|im_start|>"]);
    assert_eq!(pieces("x<|im_e<|im_end", 1), ["x<|im_e<|im_end"], "parts of a token are text");
}
