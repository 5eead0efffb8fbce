//! Prompts for the rows of a trace: equal block hashes give equal tokens, and the number of tokens is the row's.
//!
//! With a tokenizer a prompt is text made of words that are one token each, wherever they stand; the whole is counted
//! before it is sent. Without one it is token ids, which vLLM, SGLang and TensorRT-LLM take at `/v1/completions`.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, ensure};
use forebay_simulator::{Row, Trace};
use forebay_tokens::{Special, Tokenizer};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;

/// Ids that prompts are made of: every vocabulary has them, and behind the control tokens and single bytes that stand
/// first in most they are ordinary pieces of words.
const IDS: std::ops::Range<u32> = 300..1000;
/// Enough words that two blocks do not come out equal by chance.
const WORDS_MIN: usize = 64;
const WORDS_MAX: usize = 1024;

/// What goes into a request's `prompt`.
#[derive(Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub(super) enum Prompt {
    Ids(Vec<u32>),
    Text(String),
}

/// The way prompts are made.
pub(super) enum Prompts {
    Ids,
    Words(Box<Words>),
}

pub(super) struct Words {
    tokenizer: Tokenizer,
    /// Each one token, at the start of a text and after a space.
    words: Vec<String>,
    /// Tokens that the tokenizer adds to every text.
    added: usize,
}

impl Prompts {
    /// Words of the tokenizer in this directory, else token ids.
    pub(super) fn new(tokenizer: Option<&Path>) -> anyhow::Result<Self> {
        let Some(directory) = tokenizer else { return Ok(Self::Ids) };
        let tokenizer = Tokenizer::from_dir(directory)
            .with_context(|| format!("cannot load the tokenizer in `{}`", directory.display()))?;
        let words = Words::new(tokenizer);
        words
            .map(|words| Self::Words(Box::new(words)))
            .with_context(|| format!("cannot use the tokenizer in `{}`", directory.display()))
    }

    /// As the report names it.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Ids => "token ids",
            Self::Words(_) => "text",
        }
    }

    /// The prompt of row `number`.
    pub(super) fn of(&self, trace: &Trace, number: usize, row: &Row) -> anyhow::Result<Prompt> {
        match self {
            Self::Ids => Ok(Prompt::Ids(draw(trace, number, row, IDS.len()).map(|at| IDS.start + at as u32).collect())),
            Self::Words(words) => words.text(trace, number, row).map(Prompt::Text),
        }
    }
}

/// One draw from so many things for each token of a row: each block's from its hash, the rest from the row's number.
fn draw<'a>(trace: &'a Trace, number: usize, row: &'a Row, of: usize) -> impl Iterator<Item = usize> + 'a {
    let size = trace.block_tokens.max(1) as usize;
    let all = row.prompt_tokens.max(1) as usize;
    let blocks = row.blocks.iter().copied().zip(std::iter::repeat(size));
    // No hash of a block: those are mixed.
    let rest = (!(number as u64), all.saturating_sub(row.blocks.len() * size));
    blocks.chain([rest]).take(all.div_ceil(size)).flat_map(move |(seed, count)| {
        let mut rng = StdRng::seed_from_u64(seed);
        (0..count).map(move |_| rng.random_range(0..of))
    })
}

impl Words {
    fn new(tokenizer: Tokenizer) -> anyhow::Result<Self> {
        let count = |text: &str, special| tokenizer.encode(text, special).map_or(0, |ids| ids.len());
        let ids = 0..u32::try_from(tokenizer.vocabulary_size()).unwrap_or(u32::MAX);
        let spelt = ids.filter_map(|id| tokenizer.token(id)).filter_map(|token| {
            let word = token.trim_start_matches(['Ġ', '▁']);
            let plain = (2..=10).contains(&word.len()) && word.bytes().all(|byte| byte.is_ascii_lowercase());
            plain.then(|| word.to_owned())
        });
        let alone = |word: &String| {
            count(word, Special::Omit) == 1 && count(&format!("{word} {word} {word}"), Special::Omit) == 3
        };
        let words: BTreeSet<String> = spelt.filter(alone).take(WORDS_MAX).collect();
        ensure!(words.len() >= WORDS_MIN, "only {} words of its vocabulary are one token each", words.len());
        let words: Vec<String> = words.into_iter().collect();
        let added = words.first().map_or(0, |word| count(word, Special::Add).saturating_sub(1));
        Ok(Self { words, added, tokenizer })
    }

    fn text(&self, trace: &Trace, number: usize, row: &Row) -> anyhow::Result<String> {
        // What the tokenizer adds stands in place of the first words, which are the same for equal blocks.
        let drawn = draw(trace, number, row, self.words.len()).skip(self.added);
        let words: Vec<&str> = drawn.filter_map(|at| self.words.get(at).map(String::as_str)).collect();
        let text = words.join(" ");
        let wanted = (row.prompt_tokens.max(1) as usize).max(self.added);
        let counted = self.tokenizer.encode(&text, Special::Add)?.len();
        ensure!(counted == wanted, "row {number} was to have {wanted} tokens, its words are {counted}");
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use forebay_scheduler::Class;

    use super::*;

    fn trace(rows: &[(u32, &[u64])]) -> Trace {
        let row = |(tokens, ids): &(u32, &[u64])| Row {
            at: Duration::ZERO,
            prompt_tokens: *tokens,
            output_tokens: 1,
            blocks: ids.iter().copied().map(Trace::block_hash).collect::<Arc<[u64]>>(),
            tenant: 0,
            class: Class::Default,
        };
        Trace { block_tokens: 16, rows: rows.iter().map(row).collect() }
    }

    fn prompts(prompts: &Prompts, trace: &Trace) -> Vec<Prompt> {
        trace.rows.iter().enumerate().map(|(number, row)| prompts.of(trace, number, row).unwrap()).collect()
    }

    const ROWS: [(u32, &[u64]); 5] = [(40, &[0, 1]), (50, &[0, 1, 2]), (40, &[3, 4]), (40, &[]), (0, &[])];

    #[test]
    fn equal_blocks_are_equal_tokens_and_nothing_else_is() {
        let trace = trace(&ROWS);
        let made = prompts(&Prompts::Ids, &trace);
        assert_eq!(made, prompts(&Prompts::Ids, &trace), "the same every time");
        let ids = |at: usize| match &made[at] {
            Prompt::Ids(ids) => ids.as_slice(),
            Prompt::Text(text) => panic!("{text}"),
        };
        assert_eq!([0, 1, 2, 3, 4].map(|at| ids(at).len()), [40, 50, 40, 40, 1]);
        assert_eq!(ids(0)[..32], ids(1)[..32]);
        assert!((0..4).all(|at| ids(at).iter().all(|id| IDS.contains(id))));
        let common = |a: usize, b: usize| ids(a).iter().zip(ids(b)).take_while(|(a, b)| a == b).count();
        for (a, b) in [(0, 2), (0, 3), (2, 3), (1, 2)] {
            assert!(common(a, b) < 4, "rows {a} and {b}");
        }
        assert!(common(0, 1) < 36, "the last block of row 0 is not full, and its own");
    }

    #[test]
    fn text_has_as_many_tokens_as_the_row_says() {
        let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("backends/simulated-engine/model");
        let shared = std::env::var_os("FOREBAY_SHARED_DIR")
            .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"), std::path::PathBuf::from);
        let families = ["deepseek-v3", "gpt2", "mistral-v3-spm", "qwen3", "smollm2", "minilm"];
        let trace = trace(&ROWS);
        for directory in std::iter::once(own).chain(families.map(|name| shared.join("tokenizers").join(name))) {
            if !directory.join("tokenizer.json").is_file() {
                println!("skipped: {} not found", directory.display());
                continue;
            }
            // `text` counts for itself, and `of` fails where it is wrong.
            let made = prompts(&Prompts::new(Some(&directory)).unwrap(), &trace);
            let text = |at: usize| match &made[at] {
                Prompt::Text(text) => text.as_str(),
                Prompt::Ids(ids) => panic!("{ids:?}"),
            };
            let common =
                |a: usize, b: usize| text(a).split(' ').zip(text(b).split(' ')).take_while(|(a, b)| a == b).count();
            assert!((29..36).contains(&common(0, 1)), "{}: {}", directory.display(), common(0, 1));
            assert!(common(0, 2) < 4 && common(0, 3) < 4, "{}", directory.display());
        }
        let error = Prompts::new(Some(Path::new("/nonexistent"))).err().map(|error| format!("{error:#}"));
        assert!(error.as_ref().is_some_and(|error| error.contains("cannot load the tokenizer")), "{error:?}");
    }
}
