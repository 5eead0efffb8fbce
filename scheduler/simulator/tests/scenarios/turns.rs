//! Three models on a GPU that fits two.

use std::time::Duration;

use forebay_scheduler::{Class, Config};
use forebay_simulator::{EngineConfig, Row, Trace, Turned, Turns, Waker, take_turns};

const MEMORY: u64 = 80;
const WAKE: Duration = Duration::from_secs(3);
const SLEEP: Duration = Duration::from_secs(1);
const RESIDENCY: Duration = Duration::from_secs(30);

/// Twenty minutes in which two of three models are hot for two minutes each, another pair every time, with two requests a
/// second each, and the third is asked now and then.
fn trace(seed: u64) -> Trace {
    const PHASE_SECONDS: f64 = 120.0;
    let mut chance = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut unit = || {
        chance ^= chance << 13;
        chance ^= chance >> 7;
        chance ^= chance << 17;
        (chance >> 11) as f64 / (1_u64 << 53) as f64
    };
    let mut rows = Vec::new();
    for model in 0..3_u32 {
        let mut at = 0.0;
        while at < 1200.0 {
            let cold = (at / PHASE_SECONDS) as u32 % 3 == model;
            at += -(1.0 - unit()).ln() * if cold { 40.0 } else { 0.5 };
            rows.push(Row {
                at: Duration::from_secs_f64(at),
                prompt_tokens: 200 + (unit() * 800.0) as u32,
                output_tokens: 20 + (unit() * 100.0) as u32,
                blocks: [].into(),
                tenant: model,
                class: Class::Default,
            });
        }
    }
    rows.sort_by_key(|row| row.at);
    Trace { block_tokens: 16, rows }
}

fn turns(trace: &Trace, waker: Waker, seed: u64) -> Turned {
    let turns = Turns {
        sizes: vec![30; 3],
        memory: MEMORY,
        wake: WAKE,
        sleep: SLEEP,
        residency: RESIDENCY,
        engine: EngineConfig::default(),
        scheduler: Config::default(),
    };
    take_turns(trace, &turns, waker, seed)
}

/// No request is lost, and the mean wait is shorter by a third with fewer wakes. The longest wait is longer: a busy model is
/// not put to sleep for one request as soon as it comes.
#[test]
fn three_models_on_a_gpu_that_fits_two() {
    for seed in 1..=3 {
        let trace = trace(seed);
        let ours = turns(&trace, Waker::Forebay, seed);
        let theirs = turns(&trace, Waker::RoundRobin, seed);
        for (name, turned) in [("forebay", &ours), ("round-robin", &theirs)] {
            println!(
                "seed {seed}, {name}: {} answered, {} lost, {} wakes, {:.2} s mean, {:.2} s p99, {:.2} s max",
                turned.answered,
                turned.lost,
                turned.wakes,
                turned.mean(),
                turned.waits[turned.waits.len() * 99 / 100],
                turned.waits.last().unwrap(),
            );
        }
        assert_eq!((ours.answered, ours.lost), (trace.rows.len(), 0), "seed {seed}");
        assert!(ours.memory_max <= MEMORY && theirs.memory_max <= MEMORY, "seed {seed}");
        assert!(1.3 * ours.mean() < theirs.mean(), "seed {seed}: {} {}", ours.mean(), theirs.mean());
        assert!(ours.wakes < theirs.wakes, "seed {seed}: {} {}", ours.wakes, theirs.wakes);
        // Whoever was just woken stays for its residency if it is busy; then a turn, and the work itself.
        let longest = (RESIDENCY + WAKE + SLEEP + Duration::from_secs(5)).as_secs_f64();
        assert!(ours.waits.iter().all(|wait| *wait < longest), "seed {seed}: {:?}", ours.waits.last());
    }
}
