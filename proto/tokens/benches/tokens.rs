//! What counting tokens costs, on one core: encoding without and with the cache, rendering a chat, writing a stream.
//!
//! Needs the shared test data (`FOREBAY_SHARED_DIR`, default `../shared` beside the checkout) and prints one line
//! without it. `FOREBAY_BENCH_TEXT` names a file of prose to take prompts from; else words are made up.
//!
//! On Linux the figures are CPU time of the thread, so that they hold on a machine that is busy with something else.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "failing is what tests are for")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use forebay_tokens::{Cache, Chat, ChatTemplate, Parts, Special, SpecialTokens, Tokenizer};
use rand::RngExt as _;
use rand::rngs::StdRng;

use crate::common::text::seeded;

/// Nanoseconds that this thread was on a CPU; elsewhere than on Linux, nanoseconds of the clock.
struct CpuTime {
    since: Instant,
}

impl CpuTime {
    fn now(&self) -> u64 {
        let scheduled = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
        let on_cpu = scheduled.and_then(|fields| fields.split(' ').next()?.parse().ok());
        on_cpu.unwrap_or_else(|| u64::try_from(self.since.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }
}

impl Measurement for CpuTime {
    type Intermediate = u64;
    type Value = u64;

    fn start(&self) -> u64 {
        self.now()
    }

    fn end(&self, start: u64) -> u64 {
        self.now() - start
    }

    fn add(&self, one: &u64, other: &u64) -> u64 {
        one + other
    }

    fn zero(&self) -> u64 {
        0
    }

    fn to_f64(&self, value: &u64) -> f64 {
        *value as f64
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        WallTime.formatter()
    }
}

/// Prose without end: a book, or made-up words, frequent ones more often.
struct Prose {
    words: Vec<String>,
    random: StdRng,
    book: bool,
}

impl Prose {
    fn new() -> Self {
        let mut random = seeded(3);
        if let Some(path) = std::env::var_os("FOREBAY_BENCH_TEXT") {
            let text = common::read(path.as_ref());
            return Self { words: text.split(' ').map(str::to_owned).collect(), random, book: true };
        }
        const SYLLABLES: [&str; 24] = [
            "the", "in", "er", "re", "on", "at", "en", "and", "es", "or", "te", "ing", "ed", "is", "al", "an", "ion",
            "st", "to", "ve", "le", "con", "pro", "tion",
        ];
        let word = |random: &mut StdRng| -> String {
            (0..random.random_range(1..4)).map(|_| SYLLABLES[random.random_range(0..SYLLABLES.len())]).collect()
        };
        Self { words: (0..4_000).map(|_| word(&mut random)).collect(), random, book: false }
    }

    /// About so many tokens, four bytes each; different every time.
    fn tokens(&mut self, tokens: usize) -> String {
        let mut text = String::new();
        let mut at = self.random.random_range(0..self.words.len());
        while text.len() < tokens * 4 {
            at = if self.book && !self.random.random_ratio(1, 50) {
                at + 1
            } else {
                // the square of an even distribution favours the first words
                let even: f64 = self.random.random();
                (even * even * self.words.len() as f64) as usize
            };
            text.push_str(&self.words[at % self.words.len()]);
            text.push_str(if self.random.random_ratio(1, 12) { ".\n" } else { " " });
        }
        text
    }
}

fn encoding(criterion: &mut Criterion<CpuTime>) {
    let Some(shared) = common::shared("tokenizers") else { return };
    let mut prose = Prose::new();
    for name in ["smollm2", "qwen3", "mistral-v3-spm"] {
        let json = common::tokenizer_json(&shared, name);
        let load = || Tokenizer::from_parts(&Parts { tokenizer: &json, ..Parts::default() }).unwrap();
        let plain = load();
        let cached = load().with_cache(Arc::new(Cache::new(64 << 20)));
        let mut group = criterion.benchmark_group(format!("encode/{name}"));
        group.sample_size(20);
        for (label, tokens) in [("0.6k", 600), ("1k", 1_000), ("16k", 16_000), ("100k", 100_000)] {
            let mut compare = |way: &str, tokenizer: &Tokenizer| {
                group.bench_function(format!("{label} {way}"), |bencher| {
                    let text = |prose: &mut Prose| prose.tokens(tokens);
                    bencher.iter_batched(
                        || text(&mut prose),
                        |text| tokenizer.encode(black_box(&text), Special::Omit).unwrap().len(),
                        BatchSize::LargeInput,
                    );
                });
            };
            compare("new, no cache", &plain);
            compare("new, cache", &cached);
        }
        for (label, tokens) in [("0.6k", 600), ("1k", 1_000), ("16k", 16_000), ("100k", 100_000)] {
            let seen = prose.tokens(tokens * 95 / 100);
            cached.encode(&seen, Special::Omit).unwrap();
            group.bench_function(format!("{label}, 95 % seen"), |bencher| {
                bencher.iter_batched(
                    || seen.clone() + &prose.tokens(tokens * 5 / 100),
                    |text| cached.encode(black_box(&text), Special::Omit).unwrap().len(),
                    BatchSize::LargeInput,
                );
            });
            group.bench_function(format!("{label}, all seen"), |bencher| {
                bencher.iter(|| cached.encode(black_box(&seen), Special::Omit).unwrap().len());
            });
        }
        group.bench_function("load with cache", |bencher| {
            bencher.iter(|| load().with_cache(Arc::new(Cache::new(1 << 20))));
        });
    }
}

fn rendering(criterion: &mut Criterion<CpuTime>) {
    let Some(shared) = common::shared("chat-templates") else { return };
    let mut prose = Prose::new();
    let turn = |role: &str, text: String| serde_json::json!({"role": role, "content": text});
    let mut turns = |count: usize, tokens: usize| {
        let roles = ["user", "assistant"].into_iter().cycle().take(count);
        serde_json::to_vec(&roles.map(|role| turn(role, prose.tokens(tokens))).collect::<Vec<_>>()).unwrap()
    };
    let chats = [
        ("1 message", turns(1, 100)),
        ("101 messages, 10k tokens", turns(101, 100)),
        ("1 message, 100k tokens", turns(1, 100_000)),
    ];
    let mut group = criterion.benchmark_group("render");
    for name in ["chatml", "llama-3.1-8b-instruct", "qwen3-0.6b"] {
        let source = common::read(&shared.join(format!("{name}.jinja")));
        let template = ChatTemplate::new(&source, SpecialTokens::default()).unwrap();
        for (label, messages) in &chats {
            let chat = Chat::new(messages, SystemTime::UNIX_EPOCH);
            group.bench_function(format!("{name}, {label}"), |bencher| {
                bencher.iter(|| template.render(black_box(&chat)).unwrap().len());
            });
        }
    }
}

fn streaming(criterion: &mut Criterion<CpuTime>) {
    let Some(shared) = common::shared("tokenizers") else { return };
    let tokenizer = Arc::new(common::tokenizer(&shared, "smollm2"));
    let ids = tokenizer.encode(&Prose::new().tokens(1_000), Special::Omit).unwrap();
    let mut group = criterion.benchmark_group("detokenizer");
    group.throughput(criterion::Throughput::Elements(ids.len() as u64));
    group.bench_function("smollm2, per token", |bencher| {
        bencher.iter(|| {
            let mut detokenizer = tokenizer.detokenizer(&[], Special::Omit);
            ids.iter().map(|id| detokenizer.push(*id).unwrap().len()).sum::<usize>()
        });
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().with_measurement(CpuTime { since: Instant::now() });
    targets = encoding, rendering, streaming
}
criterion_main!(benches);
