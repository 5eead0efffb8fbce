//! Random text made of what tokenizers treat differently.

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

pub(crate) fn seeded(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

const FRAGMENTS: &[&str] = &[
    "the river rose over the lower meadow",
    " Once upon a time",
    ", and then ",
    ". ",
    "! ",
    "? \"",
    "word",
    " word",
    "I'll",
    "don't",
    "'RE",
    "'s",
    "\n",
    "\n\n",
    "\r\n",
    " \n",
    "\n ",
    "\t",
    "  ",
    "    ",
    "\u{a0}",
    "\u{2003}",
    "\u{3000}",
    "\u{2028}",
    "\u{85}",
    "\u{b}",
    " \t\n ",
    "0",
    " 1984",
    "12345678901234567890",
    "3.14",
    "x2",
    "1,000",
    "²",
    "٣",
    "fn main() {\n    ",
    "}\n",
    "();",
    "->",
    "::",
    "//",
    "/* */",
    "\\n",
    "{{",
    "}}",
    "</",
    "<|",
    "|>",
    "```",
    "***",
    "日本語の文章",
    "。",
    "ですか？",
    "한국어 ",
    "각\u{11ab}",
    "привет",
    "żółć",
    "e\u{301}",
    "\u{301}",
    "l\u{308}",
    "\u{e9}",
    "ﬁ",
    "Ａ",
    "🙂",
    "🏳️\u{200d}🌈",
    "\u{200b}",
    "\u{feff}",
    "\u{fffd}",
    "\u{0}",
    "\u{7}",
    "\u{1c}",
    "\u{7f}",
    "▁",
    "Ġ",
    "<0x0A>",
    "ab",
    "-",
    "_",
    "#",
    "@",
    "\"",
    "'",
    "a",
    "Z",
    " a",
    " -",
    "a b",
    "b\na",
    "x\ny",
    ".\nz",
    "\n/",
    ".\n/",
];

/// Random text, with an added vocabulary's tokens, whole and in parts, among it.
#[derive(Default)]
pub(crate) struct TextSource {
    tokens: Vec<String>,
}

impl TextSource {
    pub(crate) fn new(tokenizer_json: &[u8]) -> Self {
        let json: serde_json::Value = serde_json::from_slice(tokenizer_json).unwrap();
        let content = |token: &serde_json::Value| token["content"].as_str().unwrap().to_owned();
        Self { tokens: json["added_tokens"].as_array().unwrap().iter().take(64).map(content).collect() }
    }

    /// One fragment.
    pub(crate) fn fragment(&self, random: &mut StdRng) -> String {
        if !self.tokens.is_empty() && random.random_ratio(1, 12) {
            let token = &self.tokens[random.random_range(0..self.tokens.len())];
            let parts: Vec<char> = token.chars().collect();
            let whole = random.random_ratio(2, 3);
            let end = if whole { parts.len() } else { random.random_range(0..=parts.len()) };
            return parts[..end].iter().collect();
        }
        if random.random_ratio(1, 40) {
            return char::from_u32(random.random_range(0..0x3_0000)).unwrap_or('x').to_string();
        }
        FRAGMENTS[random.random_range(0..FRAGMENTS.len())].to_owned()
    }

    /// About so many bytes.
    pub(crate) fn text(&self, random: &mut StdRng, bytes: usize) -> String {
        let mut text = String::new();
        while text.len() < bytes {
            text.push_str(&self.fragment(random));
        }
        text
    }
}
