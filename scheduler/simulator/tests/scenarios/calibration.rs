//! What the scheduler learns of engines from answers that come whole.

use forebay_simulator::{EngineConfig, Settings};

use crate::load::{Chance, poisson, row, run, trace};

/// Output tokens, and how far a measured speed may be off. Where output takes most of the time its noise hides the prompt's.
const KINDS: [(&str, (u32, u32), f64); 3] =
    [("chat", (30, 200), 0.4), ("classification", (1, 4), 0.3), ("embeddings", (0, 0), 0.15)];

#[test]
fn engines_of_mixed_speed_are_measured_by_whole_answers_alone() {
    let speeds = vec![1.5, 0.5];
    for (kind, output, off) in KINDS {
        for seed in 0..3 {
            let trace = trace(poisson(&mut Chance(seed), 8.0, 180.0, |chance, at| {
                row(at, chance.between((300, 4000)), chance.between(output))
            }));
            let settings = Settings { workers: 6, speeds: speeds.clone(), whole_answers: true, ..Settings::default() };
            let outcome = run(&trace, &settings, seed);
            println!("{kind}, seed {seed}: {:?}", outcome.rates);
            for (at, rate) in outcome.rates.iter().enumerate() {
                let truth = EngineConfig::default().prefill_tokens_per_s * speeds[at % 2];
                let rate = rate.unwrap_or_else(|| panic!("{kind}, seed {seed}: worker {at} was not measured"));
                assert!((rate / truth - 1.0).abs() < off, "{kind}, seed {seed}, worker {at}: {rate:.0} of {truth:.0}");
            }
        }
    }
}
