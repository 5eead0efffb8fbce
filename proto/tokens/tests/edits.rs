//! Random edits of long prompts: the same ids with the cache and without it.
//!
//! 10 000 edits in all, over the shared tokenizers and some trained here; `FOREBAY_EDITS` sets another number.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "failing is what tests are for")]

mod common;

use std::sync::Arc;

use forebay_tokens::{Cache, Parts, Special, Tokenizer};
use rand::RngExt as _;
use rand::rngs::StdRng;

use crate::common::text::{TextSource, seeded};
use crate::common::trained::{families, train};

const PROMPT_BYTES: std::ops::Range<usize> = 4_000..10_000;

fn edits_each(tokenizers: usize) -> usize {
    let total = std::env::var("FOREBAY_EDITS").ok().and_then(|edits| edits.parse().ok()).unwrap_or(10_000);
    usize::div_ceil(total, tokenizers)
}

/// Replaces a random span, often an empty one, by a few random fragments, often none.
fn edit(text: &mut String, source: &TextSource, random: &mut StdRng) {
    let boundary = |text: &str, at: usize| (at..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap();
    let start = boundary(text, random.random_range(0..=text.len()));
    let longest = *[0, 3, 30, 300].get(random.random_range(0..4)).unwrap();
    let end = boundary(text, (start + random.random_range(0..=longest)).min(text.len()));
    let new: String = (0..random.random_range(0..4)).map(|_| source.fragment(random)).collect();
    text.replace_range(start..end, &new);
}

fn check(name: &str, json: &[u8], edits: usize) {
    let load = || Tokenizer::from_parts(&Parts { tokenizer: json, ..Parts::default() }).unwrap();
    // small enough that entries are dropped all the time
    let cache = Arc::new(Cache::new(1 << 20));
    let (plain, cached) = (load(), load().with_cache(Arc::clone(&cache)));
    let source = TextSource::new(json);
    let mut random = seeded(42);
    let mut text = String::new();
    for round in 0..edits {
        if !PROMPT_BYTES.contains(&text.len()) || round % 200 == 0 {
            let bytes = random.random_range(PROMPT_BYTES);
            text = source.text(&mut random, bytes);
        }
        edit(&mut text, &source, &mut random);
        let special = if random.random() { Special::Add } else { Special::Omit };
        let expect = plain.encode(&text, special).unwrap();
        assert_eq!(cached.encode(&text, special).unwrap(), expect, "{name}, edit {round}: {text:?}");
    }
    let stats = cache.stats();
    assert!(stats.hits > 0 && stats.bytes <= 1 << 20, "{name}: {stats:?}");
}

#[test]
fn ids_are_equal_with_the_cache_and_without() {
    let mut tokenizers: Vec<(&str, Vec<u8>)> = families()
        .into_iter()
        .map(|(name, pre_tokenizer, normalizer, _)| (name, train(pre_tokenizer, normalizer)))
        .collect();
    if let Some(shared) = common::shared("tokenizers") {
        tokenizers.extend(common::TOKENIZERS.map(|name| (name, common::tokenizer_json(&shared, name))));
    }
    let edits = edits_each(tokenizers.len());
    for (name, json) in &tokenizers {
        check(name, json, edits);
    }
    println!("{edits} edits on each of {} tokenizers", tokenizers.len());
}
