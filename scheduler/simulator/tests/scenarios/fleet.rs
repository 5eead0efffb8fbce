//! Where requests go: engines of different speed, and prompts that all begin alike.

use forebay_simulator::{Policy, Row, Settings, Trace, What};

use crate::load::{BLOCK_TOKENS, Chance, poisson, row, run, trace};

#[test]
fn a_mixed_fleet_needs_no_tuning() {
    for seed in 0..4 {
        let trace = trace(poisson(&mut Chance(seed), 14.0, 240.0, |chance, at| {
            row(at, chance.between((300, 4000)), chance.between((30, 200)))
        }));
        let settings = Settings { workers: 6, speeds: vec![1.5, 0.5], ..Settings::default() };
        let cell = |policy: &Policy| forebay_simulator::run(&trace, &settings, *policy, seed).cell.ttft_ms.unwrap();
        let all: Vec<_> = Policy::all().iter().map(|policy| (policy.name(), cell(policy))).collect();
        let (_, ours) = all[0];
        let best = |figure: fn(&forebay_simulator::Spread) -> f64| {
            all[1..].iter().map(|(name, spread)| (figure(spread), *name)).min_by(|a, b| a.0.total_cmp(&b.0)).unwrap()
        };
        let (mean, p99) = (best(|spread| spread.mean), best(|spread| spread.p99));
        println!("seed {seed}: mean {:.0} ms, {mean:?}; p99 {:.0} ms, {p99:?}", ours.mean, ours.p99);
        assert!(ours.mean <= 1.02 * mean.0, "seed {seed}: mean {:.0} ms, best rival {mean:?}", ours.mean);
        assert!(ours.p99 <= 1.05 * p99.0, "seed {seed}: p99 {:.0} ms, best rival {p99:?}", ours.p99);
    }
}

/// Requests that share their first block, and nothing else.
fn alike(seed: u64) -> Trace {
    let mut number = 0;
    trace(poisson(&mut Chance(seed), 10.0, 120.0, |chance, at| {
        number += 1;
        let prompt = chance.between((500, 3000));
        let own = (1..u64::from(prompt / BLOCK_TOKENS)).map(|block| Trace::block_hash(number * 100_000 + block));
        let blocks = std::iter::once(Trace::block_hash(0)).chain(own).collect();
        Row { blocks, ..row(at, prompt, chance.between((30, 200))) }
    }))
}

#[test]
fn a_block_that_all_share_draws_them_not_to_one_engine() {
    for seed in 0..4 {
        let trace = alike(seed);
        let outcome = run(&trace, &Settings { workers: 8, ..Settings::default() }, seed);
        let mut sent = [0_u32; 8];
        for entry in &outcome.log {
            if let What::Sent { worker } = entry.what {
                sent[worker as usize] += 1;
            }
        }
        let most = f64::from(*sent.iter().max().unwrap()) / f64::from(sent.iter().sum::<u32>());
        println!("seed {seed}: {sent:?}, at most {:.1} %", most * 100.0);
        assert!(most <= 0.25, "seed {seed}: {sent:?}");
    }
}
