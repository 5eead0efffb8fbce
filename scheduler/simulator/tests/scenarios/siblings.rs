//! Requests with one long prefix that come together, as best-of-n and groups of agents do.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use forebay_scheduler::Config;
use forebay_simulator::{EngineConfig, Offered, Outcome, Row, Settings, Trace, What};

use crate::load::{BLOCK_TOKENS, Chance, row, run, trace};

const GROUPS: u64 = 60;
/// Within so many seconds the siblings of a group come.
const TOGETHER: f64 = 0.02;
/// Siblings, and tokens that they have in common.
const SIZES: [(u32, u32); 3] = [(4, 3000), (8, 8000), (16, 24_000)];

fn groups(seed: u64, (siblings, shared): (u32, u32)) -> Trace {
    let mut chance = Chance(seed);
    let mut rows = Vec::new();
    let mut at = 0.0;
    for group in 1..=GROUPS {
        at += chance.exponential(1.0);
        let blocks = chance.between((shared / 2, shared * 3 / 2)) / BLOCK_TOKENS;
        for sibling in 0..u64::from(siblings) {
            let tokens = blocks * BLOCK_TOKENS + chance.between((20, 200));
            let id = |block| group << 32 | if block < u64::from(blocks) { block } else { (sibling + 1) << 20 | block };
            let hashes: Arc<[u64]> =
                (0..u64::from(tokens / BLOCK_TOKENS)).map(|block| Trace::block_hash(id(block))).collect();
            let came = at + chance.unit() * TOGETHER;
            rows.push(Row { blocks: hashes, ..row(came, tokens, chance.between((50, 200))) });
        }
    }
    trace(rows)
}

/// Share of the prompt tokens computed that the same worker had computed, or was about to compute, for a sibling.
fn computed_twice(trace: &Trace, outcome: &Outcome) -> f64 {
    let (mut computed, mut twice) = (0.0, 0.0);
    let mut known = BTreeSet::new();
    for entry in &outcome.log {
        if let What::FirstToken { worker, cached_tokens } = entry.what {
            let row = &trace.rows[entry.request as usize];
            let there = row.blocks.iter().take_while(|block| known.contains(&(worker, **block))).count() as u32;
            let there = there.min((row.prompt_tokens - 1) / BLOCK_TOKENS) * BLOCK_TOKENS;
            computed += f64::from(row.prompt_tokens - cached_tokens);
            twice += f64::from(there.saturating_sub(cached_tokens));
            known.extend(row.blocks.iter().map(|block| (worker, *block)));
        }
    }
    twice / computed
}

/// Mean time to the first token in ms, and the share computed twice, over a few seeds.
fn figures(size: (u32, u32), load: f64, engine: &EngineConfig, scheduler: &Config) -> (f64, f64) {
    const SEEDS: u64 = 2;
    let (mut ttft, mut twice) = (0.0, 0.0);
    for seed in 0..SEEDS {
        let trace = groups(seed, size);
        let settings =
            Settings { workers: 4, engine: engine.clone(), scheduler: scheduler.clone(), ..Settings::default() };
        let rate = Offered::of(&trace, &settings).rate_for(&settings, load);
        let outcome = run(&trace, &Settings { rate, ..settings }, seed);
        ttft += outcome.cell.ttft_ms.unwrap().mean / SEEDS as f64;
        twice += computed_twice(&trace, &outcome) / SEEDS as f64;
    }
    (ttft, twice)
}

/// Such an engine lets no second sequence in before the first has used up its step, and by then the prefix counts as
/// cached: to hold siblings back could save nothing.
#[test]
fn an_engine_that_shares_what_is_being_computed_computes_it_once() {
    for size in SIZES {
        for load in [0.3, 0.6, 0.85] {
            let (ttft, twice) = figures(size, load, &EngineConfig::default(), &Config::default());
            println!("{size:?} at {load}: {twice:.3} twice, {ttft:.0} ms");
            assert!(twice <= 0.001, "{size:?} at load {load}: {twice:.3} is computed twice");
        }
    }
}

#[test]
fn where_an_engine_does_not_siblings_wait_for_the_first_and_all_gain() {
    let engine = EngineConfig { caches_late: true, ..EngineConfig::default() };
    let hasty = Config { sibling_wait_max: Duration::ZERO, ..Config::default() };
    for size in SIZES {
        for load in [0.3, 0.6, 0.85] {
            let (held, twice) = figures(size, load, &engine, &Config::default());
            let (sent, before) = figures(size, load, &engine, &hasty);
            println!(
                "{size:?} at {load}: {held:.0} ms and {twice:.3} twice, {sent:.0} and {before:.3} if sent at once"
            );
            assert!(twice <= 0.02, "{size:?} at load {load}: {twice:.3} is computed twice");
            assert!(held <= sent * 0.95, "{size:?} at load {load}: {held:.0} ms, {sent:.0} if sent at once");
        }
    }
}
