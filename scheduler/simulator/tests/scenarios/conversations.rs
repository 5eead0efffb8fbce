//! Many conversations that begin with one system prompt, in front of more workers than are weighed one by one.

use std::sync::Arc;

use forebay_simulator::{Offered, Policy, Row, Settings, Trace, What};

use crate::load::{BLOCK_TOKENS, Chance, row, trace};

const CONVERSATIONS: u64 = 300;
const TURNS: u32 = 8;
/// Blocks of the system prompt.
const SHARED: u64 = 32;
/// Tokens that a turn adds, and that are generated.
const ADDED: (u32, u32) = (300, 900);
const OUTPUT: (u32, u32) = (75, 225);
/// Seconds within which they begin, and of thought between an answer and the next turn, at rate 1.
const BEGIN_SECONDS: f64 = 60.0;
const THOUGHT_SECONDS: f64 = 20.0;
const TOKEN_SECONDS: f64 = 0.015;

fn conversations(seed: u64) -> Trace {
    let mut chance = Chance(seed);
    let mut rows = Vec::new();
    for conversation in 1..=CONVERSATIONS {
        let mut at = chance.unit() * BEGIN_SECONDS;
        let mut prompt = SHARED as u32 * BLOCK_TOKENS;
        for _ in 0..TURNS {
            prompt += chance.between(ADDED);
            let output = chance.between(OUTPUT);
            let id = |block| if block < SHARED { block } else { conversation * 1_000_000 + block };
            let blocks: Arc<[u64]> =
                (0..u64::from(prompt / BLOCK_TOKENS)).map(|block| Trace::block_hash(id(block))).collect();
            rows.push(Row { blocks, ..row(at, prompt, output) });
            at += chance.exponential(THOUGHT_SECONDS) + f64::from(output) * TOKEN_SECONDS;
        }
    }
    trace(rows)
}

/// Mean and 99th percentile of the time to the first token, mean time for an output token, all in ms, and the requests of
/// the busiest worker over the mean.
struct Figures {
    ttft: (f64, f64),
    tpot: f64,
    busiest: f64,
}

fn figures(trace: &Trace, settings: &Settings, policy: &str, seed: u64) -> Figures {
    let outcome = forebay_simulator::run(trace, settings, Policy::by_name(policy).unwrap(), seed);
    let mut sent = vec![0_u32; settings.workers as usize];
    for entry in &outcome.log {
        if let What::Sent { worker } = entry.what {
            sent[worker as usize] += 1;
        }
    }
    let busiest = f64::from(*sent.iter().max().unwrap()) * sent.len() as f64 / f64::from(sent.iter().sum::<u32>());
    let ttft = outcome.cell.ttft_ms.unwrap();
    Figures { ttft: (ttft.mean, ttft.p99), tpot: outcome.cell.tpot_ms.unwrap().mean, busiest }
}

/// All is over within seconds to a minute: the more workers, the less is known of them by then.
#[test]
fn a_common_system_prompt_draws_a_large_pool_not_to_those_who_hold_it() {
    for workers in [24, 40, 64, 128] {
        for load in [0.5, 0.75] {
            let (mut ours, mut theirs) = ([0.0; 3], [0.0; 3]);
            for seed in 0..2 {
                let trace = conversations(seed);
                let settings = Settings { workers, ..Settings::default() };
                let rate = Offered::of(&trace, &settings).rate_for(&settings, load);
                let settings = Settings { rate, ..settings };
                for (policy, sums) in [("forebay", &mut ours), ("linear-cost", &mut theirs)] {
                    let Figures { ttft, tpot, busiest } = figures(&trace, &settings, policy, seed);
                    println!(
                        "{workers} workers, load {load}, seed {seed}: {policy:<11} TTFT {:.0} ms, p99 {:.0}; {tpot:.1} ms a \
                         token; busiest {busiest:.2}",
                        ttft.0, ttft.1
                    );
                    sums.iter_mut().zip([ttft.0, ttft.1, tpot]).for_each(|(sum, figure)| *sum += figure);
                    assert!(busiest <= 2.0, "{workers} workers, load {load}, seed {seed}: {busiest:.2} times the mean");
                }
            }
            for (what, at, most) in [("mean TTFT", 0, 1.05), ("TTFT p99", 1, 1.15), ("time for a token", 2, 1.05)] {
                let ratio = ours[at] / theirs[at];
                println!("{workers} workers, load {load}: {what} {ratio:.2} of linear-cost's");
                assert!(ratio <= most, "{workers} workers, load {load}: {what} {ratio:.2} of linear-cost's");
            }
        }
    }
}
