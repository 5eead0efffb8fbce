//! Safe cuts: places where a text may be divided so that the ids of the pieces, side by side, are the ids of the whole.
//!
//! What may be cut depends on how a tokenizer splits text before its model sees it, so the family is told by the exact
//! pattern and normalizer of `tokenizer.json` ([`Rule`]). Why a cut is safe, per family:
//! - *added tokens* (`<|im_start|>`) are split off before anything else, in every tokenizer. A cut is made before one
//!   that takes no white space with it and that no other added token can overlap.
//! - *GPT-2's pattern*: no alternative runs from a printable character into white space, and none looks behind. Only
//!   `\s+(?!\S)` looks ahead, and only within a run of white space, which such a cut never divides.
//! - *cl100k-like patterns*: the same, but a run of punctuation takes the line breaks behind it, and white space takes
//!   line breaks; so before `\n` only behind a letter or digit, and behind `\n` only before something printable.
//! - *sentencepiece-like* (`▁` for a space, no pattern at all): BPE merges across the cut only into an entry of the
//!   vocabulary, so a cut is safe where no entry joins its two sides: before a line break that is no part of any entry,
//!   and at a space that no entry has behind a letter or digit. A piece would get a `▁` of its own at its head, which
//!   [`Piece`] accounts for.
//!
//! Invariants: a rule is used only after its conditions on the vocabulary hold and after a text with every kind of cut
//! came out equal at load; a tokenizer that fits no rule is cut before added tokens only, or not at all.

use std::collections::HashSet;

use serde_json::Value;
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::BPE;
use tokenizers::{AddedToken, Tokenizer};

/// Bytes after which the next safe cut is taken. Smaller pieces find more of a prompt that was edited, larger ones
/// take less upkeep; at this size looking up a prompt of 100k tokens takes a tenth of a millisecond.
pub(crate) const PIECE_BYTES: usize = 2048;
/// The same for the parts of a piece.
pub(crate) const PART_BYTES: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    AddedTokensOnly,
    Gpt2,
    Cl100k,
    Sentencepiece,
}

/// How a piece of text becomes ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Head {
    /// As it stands.
    Plain,
    /// The space at its head is left out: the `▁` that the tokenizer puts there stands for it.
    Space,
    /// The first id is dropped: it is a `▁` that the text does not have.
    Mark,
}

/// A piece of a text between two safe cuts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece<'t> {
    pub(crate) text: &'t str,
    pub(crate) head: Head,
}

/// The safe cuts of one tokenizer.
#[derive(Debug)]
pub(crate) struct Cuts {
    rule: Rule,
    /// Added tokens before which one may cut.
    tokens: Vec<String>,
    /// By byte, whether one of `tokens` begins with it.
    firsts: [bool; 256],
    /// The id of a lone `▁`, in the sentencepiece family.
    mark: Option<u32>,
}

/// The patterns of the cl100k family, as they stand in `tokenizer.json`: Qwen 2 and 3, Llama 3, and, with marks among the
/// letters, the simulated engine's. They and DeepSeek V3's below differ in how they group digits and scripts, which no
/// cut touches.
const CL100K_PATTERNS: [&str; 3] = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];
const DEEPSEEK_PATTERNS: [&str; 3] = [
    r"\p{N}{1,3}",
    "[一-龥\u{3040}-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
];

impl Cuts {
    /// Decides the rule of a tokenizer; `None` when no cut at all can be trusted.
    pub(crate) fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let added: Vec<AddedToken> = tokenizer.get_added_tokens_decoder().values().cloned().collect();
        let tokens = cut_tokens(&added);
        let mut firsts = [false; 256];
        for first in tokens.iter().filter_map(|token| token.bytes().next()) {
            if let Some(flag) = firsts.get_mut(usize::from(first)) {
                *flag = true;
            }
        }
        let mut cuts = Self {
            rule: rule(tokenizer, &added).unwrap_or(Rule::AddedTokensOnly),
            tokens,
            firsts,
            mark: tokenizer.token_to_id("▁"),
        };
        for rule in [cuts.rule, Rule::AddedTokensOnly] {
            cuts.rule = rule;
            if cuts.checks_out(tokenizer) {
                return Some(cuts);
            }
        }
        None
    }

    /// The pieces of a text, each ending at the first safe cut after `bytes` bytes.
    pub(crate) fn pieces<'t>(&self, text: &'t str, bytes: usize) -> Vec<Piece<'t>> {
        let mut pieces = Vec::with_capacity(text.len() / bytes.max(1) + 1);
        let (mut start, mut head) = (0, Head::Plain);
        while let Some((at, next)) = self.next_cut(text.as_bytes(), start + bytes.max(1)) {
            pieces.extend(text.get(start..at).map(|text| Piece { text, head }));
            (start, head) = (at, next);
        }
        pieces.extend(text.get(start..).filter(|rest| !rest.is_empty()).map(|text| Piece { text, head }));
        pieces
    }

    /// Smaller pieces, which are the piece side by side.
    pub(crate) fn parts<'t>(&self, piece: Piece<'t>) -> Vec<Piece<'t>> {
        let mut parts = self.pieces(piece.text, PART_BYTES);
        if let Some(first) = parts.first_mut() {
            first.head = piece.head;
        }
        parts
    }

    /// The ids of a piece as they stand in the ids of the whole text.
    ///
    /// `None` if the tokenizer fails or does not begin the piece as its rule says.
    pub(crate) fn encode(&self, tokenizer: &Tokenizer, piece: Piece<'_>) -> Option<Vec<u32>> {
        let text = match piece.head {
            Head::Space => piece.text.strip_prefix(' ')?,
            Head::Plain | Head::Mark => piece.text,
        };
        let encoding = tokenizer.encode_fast(text, false).ok()?;
        let ids = encoding.get_ids();
        match piece.head {
            Head::Mark if ids.first().copied() == self.mark => ids.get(1..).map(<[u32]>::to_vec),
            Head::Mark => None,
            Head::Plain | Head::Space => Some(ids.to_vec()),
        }
    }

    /// The first safe cut at `from` or later, before the end.
    fn next_cut(&self, text: &[u8], from: usize) -> Option<(usize, Head)> {
        let before = text.get(from.checked_sub(1)?..)?;
        before.array_windows().enumerate().find_map(|(offset, [left, right])| {
            let at = from + offset;
            let head = self.head_at(*left, *right, text.get(at + 1).copied());
            head.or_else(|| self.token_at(text, at, *right).then_some(Head::Plain)).map(|head| (at, head))
        })
    }

    fn head_at(&self, left: u8, right: u8, after: Option<u8>) -> Option<Head> {
        let safe = match (self.rule, right) {
            (Rule::Gpt2, b' ' | b'\n') | (Rule::Cl100k, b' ') => left.is_ascii_graphic(),
            (Rule::Cl100k, b'\n') => left.is_ascii_alphanumeric(),
            (Rule::Cl100k, right) => left == b'\n' && right.is_ascii_graphic(),
            (Rule::Sentencepiece, b'\n') => return left.is_ascii_alphanumeric().then_some(Head::Mark),
            (Rule::Sentencepiece, b' ') => {
                let between = left.is_ascii_alphanumeric() && after.is_some_and(|next| next.is_ascii_alphanumeric());
                return between.then_some(Head::Space);
            }
            _ => false,
        };
        safe.then_some(Head::Plain)
    }

    fn token_at(&self, text: &[u8], at: usize, first: u8) -> bool {
        self.firsts.get(usize::from(first)).copied().unwrap_or(false)
            && text.get(at..).is_some_and(|rest| self.tokens.iter().any(|token| rest.starts_with(token.as_bytes())))
    }

    /// Whether a text with cuts of every kind comes out equal, cut everywhere it may be cut.
    fn checks_out(&self, tokenizer: &Tokenizer) -> bool {
        let mut text = CHECK_TEXT.to_owned();
        for token in self.tokens.iter().take(8) {
            for before in ["", "x", ".\n", "  "] {
                text.push_str(before);
                text.push_str(token);
                text.push_str(" and\n");
            }
        }
        let Ok(whole) = tokenizer.encode_fast(text.as_str(), false) else { return false };
        let mut ids = Vec::new();
        for piece in self.pieces(&text, 1) {
            match self.encode(tokenizer, piece) {
                Some(more) => ids.extend(more),
                None => return false,
            }
        }
        ids == whole.get_ids()
    }
}

/// Prose, code, numbers, runs of all white space, scripts without spaces, accents in both forms, control characters.
const CHECK_TEXT: &str = "Once upon a time, in 1984's  \"story\": it's 12345 words long.\n\nfn main() {\n    let x = 3;\t\n\
    }\r\n\r\n  \n \n* item one\n* item 2 \n|a|b|\n a\u{a0}b \u{3000}c e\u{301}te\u{301} \u{e9}t\u{e9} 日本語の文。 次の 文\n\
    안녕 하세요 \u{1f642} \u{1f3f3}\u{fe0f}\u{200d}\u{1f308} ok\u{0}\u{7}x y\n\nEND.\n- l\u{308}a x\u{2028}y - 3.14 -- A_b C9 d\n9 x\n";

/// The family of a tokenizer by its parts, when its vocabulary also meets the family's conditions.
fn rule(tokenizer: &Tokenizer, added: &[AddedToken]) -> Option<Rule> {
    // a token that eats white space, or has some within, could lie across a cut
    let plain = |token: &AddedToken| is_plain(token) && !token.content.contains(char::is_whitespace);
    if !added.iter().all(plain) {
        return None;
    }
    let ModelWrapper::BPE(model) = tokenizer.get_model() else { return None };
    // dropout merges at random
    if model.dropout.is_some_and(|dropout| dropout > 0.0) {
        return None;
    }
    let normalizer = steps(tokenizer.get_normalizer(), "normalizers")?;
    let splitters = steps(tokenizer.get_pre_tokenizer(), "pretokenizers")?;
    match (normalizer.as_slice(), splitters.as_slice()) {
        ([], [bytes]) if is_byte_level(bytes, true) => Some(Rule::Gpt2),
        ([], [digits, bytes]) if kind(digits) == "Digits" && is_byte_level(bytes, true) => Some(Rule::Gpt2),
        ([] | [_], [split, bytes])
            if is_nfc_or_nothing(&normalizer)
                && CL100K_PATTERNS.iter().any(|pattern| is_split(split, pattern))
                && is_byte_level(bytes, false) =>
        {
            Some(Rule::Cl100k)
        }
        ([], [splits @ .., bytes])
            if splits.len() == DEEPSEEK_PATTERNS.len()
                && splits.iter().zip(DEEPSEEK_PATTERNS).all(|(split, pattern)| is_split(split, pattern))
                && is_byte_level(bytes, false) =>
        {
            Some(Rule::Cl100k)
        }
        ([prepend, replace], [])
            if kind(prepend) == "Prepend"
                && prepend.get("prepend").and_then(Value::as_str) == Some("▁")
                && kind(replace) == "Replace"
                && replace.pointer("/pattern/String").and_then(Value::as_str) == Some(" ")
                && replace.get("content").and_then(Value::as_str) == Some("▁") =>
        {
            sentencepiece_vocabulary(tokenizer, model, added).then_some(Rule::Sentencepiece)
        }
        _ => None,
    }
}

/// No entry joins what a cut divides, no character is unknown (unknown ones may be fused across a cut), the end of a
/// text is not marked, and no added token ends in a letter or digit (a `▁` behind it is real).
fn sentencepiece_vocabulary(tokenizer: &Tokenizer, model: &BPE, added: &[AddedToken]) -> bool {
    let vocabulary = tokenizer.get_vocab(false);
    let joins = |entry: &str| {
        let newline = entry.contains('\n') && entry != "\n";
        let mut before_marks = entry.split('▁').rev().skip(1);
        newline || before_marks.any(|left| left.ends_with(|c: char| c.is_ascii_alphanumeric()))
    };
    let marked = |mark: &Option<String>| mark.as_ref().is_some_and(|mark| !mark.is_empty());
    model.byte_fallback
        && !model.ignore_merges
        && !marked(&model.continuing_subword_prefix)
        && !marked(&model.end_of_word_suffix)
        && (0..=255_u8).all(|byte| vocabulary.contains_key(&format!("<0x{byte:02X}>")))
        && vocabulary.contains_key("▁")
        && !vocabulary.keys().any(|entry| joins(entry))
        && !added.iter().any(|token| token.content.ends_with(|c: char| c.is_ascii_alphanumeric()))
}

/// The added tokens before which any text may be cut: those that begin with a character which no added token has
/// further inside, so that nothing can lie across.
fn cut_tokens(added: &[AddedToken]) -> Vec<String> {
    // a word boundary is judged by the neighbouring text, which a cut takes away
    if added.iter().any(|token| token.single_word) {
        return Vec::new();
    }
    let inner: HashSet<char> = added.iter().flat_map(|token| token.content.chars().skip(1)).collect();
    let safe = |token: &&AddedToken| {
        is_plain(token) && !token.normalized && token.content.chars().next().is_some_and(|c| !inner.contains(&c))
    };
    let mut tokens: Vec<String> = added.iter().filter(safe).map(|token| token.content.clone()).collect();
    tokens.sort_unstable();
    tokens
}

fn is_plain(token: &AddedToken) -> bool {
    !(token.lstrip || token.rstrip || token.single_word)
}

/// The steps of a normalizer or pre-tokenizer as JSON, sequences flattened one deep; nothing is no steps.
fn steps<T: serde::Serialize>(part: Option<&T>, name: &str) -> Option<Vec<Value>> {
    let Some(part) = part else { return Some(Vec::new()) };
    let json = serde_json::to_value(part).ok()?;
    match json.get(name) {
        Some(Value::Array(steps)) => Some(steps.clone()),
        _ => Some(vec![json]),
    }
}

fn kind(step: &Value) -> &str {
    step.get("type").and_then(Value::as_str).unwrap_or_default()
}

fn is_nfc_or_nothing(normalizer: &[Value]) -> bool {
    normalizer.iter().all(|step| kind(step) == "NFC")
}

fn is_byte_level(step: &Value, use_regex: bool) -> bool {
    kind(step) == "ByteLevel"
        && step.get("add_prefix_space") == Some(&Value::Bool(false))
        && step.get("use_regex") == Some(&Value::Bool(use_regex))
}

fn is_split(step: &Value, pattern: &str) -> bool {
    kind(step) == "Split"
        && step.pointer("/pattern/Regex").and_then(Value::as_str) == Some(pattern)
        && step.get("behavior").and_then(Value::as_str) == Some("Isolated")
        && step.get("invert") == Some(&Value::Bool(false))
}

#[cfg(test)]
mod tests;
