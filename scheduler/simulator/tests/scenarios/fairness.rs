//! Tenants beside each other.

use forebay_scheduler::{Class, Tick};
use forebay_simulator::{Entry, Row, Settings, Trace, What};

use crate::load::{Chance, p99, poisson, row, run, service, trace, ttft};

const SEEDS: std::ops::Range<u64> = 0..4;

/// Two tenants whose requests all come in the first second, those of the first before those of the second.
fn two_backlogs(
    chance: &mut Chance,
    first: (u32, (u32, u32), (u32, u32)),
    second: (u32, (u32, u32), (u32, u32)),
) -> Trace {
    let mut rows = Vec::new();
    for (tenant, (count, prompts, outputs)) in [(0, first), (1, second)] {
        for number in 0..count {
            let at = f64::from(tenant) * 0.5 + f64::from(number) * 0.5 / f64::from(count);
            rows.push(Row { tenant, ..row(at, chance.between(prompts), chance.between(outputs)) });
        }
    }
    trace(rows)
}

/// The last moment at which both tenants had requests that were not sent.
fn both_backlogged_until(trace: &Trace, log: &[Entry]) -> Tick {
    let last_sent = |tenant| {
        let sends = log
            .iter()
            .filter(|e| matches!(e.what, What::Sent { .. }) && trace.rows[e.request as usize].tenant == tenant);
        sends.map(|entry| entry.at).max().unwrap()
    };
    last_sent(0).min(last_sent(1))
}

/// Service of the two tenants while both were backlogged, in tokens as fairness weighs them: 1 for a prompt token that was
/// computed, 2 for one of output.
fn shares(trace: &Trace, settings: &Settings, seed: u64) -> [f64; 2] {
    let outcome = run(trace, settings, seed);
    assert_eq!(outcome.cell.completed as usize, trace.rows.len(), "seed {seed}");
    let until = both_backlogged_until(trace, &outcome.log);
    assert!(until > Tick(10_000_000), "seed {seed}: backlogged until {until:?} only");
    let mut shares = [0.0; 2];
    for (row, service) in trace.rows.iter().zip(service(trace, &outcome.log, until)) {
        shares[row.tenant as usize] += service.uncached + 2.0 * service.output;
    }
    shares
}

#[test]
fn two_backlogged_equal_tenants_get_equal_service() {
    for seed in SEEDS {
        let mut chance = Chance(seed);
        let small = (1600, (200, 600), (20, 60));
        let large = (300, (1500, 5000), (100, 300));
        for (first, second) in [(small, large), (large, small), (large, large)] {
            let trace = two_backlogs(&mut chance, first, second);
            let [a, b] = shares(&trace, &Settings { workers: 2, ..Settings::default() }, seed);
            let jain = (a + b).powi(2) / (2.0 * (a * a + b * b));
            println!("seed {seed}: {a:.0} and {b:.0} tokens, Jain {jain:.4}");
            assert!(jain >= 0.98, "seed {seed}: {a:.0} and {b:.0} tokens, Jain {jain:.4}");
        }
    }
}

#[test]
fn weights_are_respected() {
    for seed in SEEDS {
        let backlog = (400, (500, 3000), (50, 150));
        let trace = two_backlogs(&mut Chance(seed), backlog, backlog);
        let settings = Settings { workers: 2, tenant_weights: vec![(0, 2.0)], ..Settings::default() };
        let [a, b] = shares(&trace, &settings, seed);
        println!("seed {seed}: {a:.0} and {b:.0} tokens, {:.3}", a / b);
        assert!((1.8..=2.2).contains(&(a / b)), "seed {seed}: {a:.0} and {b:.0} tokens, {:.3} to 1", a / b);
    }
}

#[test]
fn a_flood_hardly_hurts_a_light_tenant() {
    for seed in 0..2 {
        let mut chance = Chance(seed);
        let light = poisson(&mut chance, 0.8, 1200.0, |chance, at| Row {
            tenant: 1,
            ..row(at, chance.between((1000, 6000)), chance.between((50, 250)))
        });
        // Three times what four engines can prefill.
        let flood = poisson(&mut chance, 96.0, 1200.0, |chance, at| Row {
            tenant: 0,
            ..row(at, chance.between((500, 1500)), chance.between((10, 50)))
        });
        let settings = Settings { workers: 4, ..Settings::default() };
        let of_light = |rows: Vec<Row>| {
            let trace = trace(rows);
            let outcome = run(&trace, &settings, seed);
            p99(ttft(&trace, &outcome.log, |row| row.tenant == 1))
        };
        let alone = of_light(light.clone());
        let beside = of_light([light, flood].concat());
        println!("seed {seed}: {alone:.3} s alone, {beside:.3} s beside the flood: {:.2}", beside / alone);
        assert!(beside <= 1.5 * alone, "seed {seed}: {alone:.3} s alone, {beside:.3} s beside the flood");
    }
}

#[test]
fn classes_go_first_come_what_may() {
    for seed in SEEDS {
        let mut chance = Chance(seed);
        let rows = poisson(&mut chance, 60.0, 120.0, |chance, at| {
            let class = if chance.unit() < 0.1 { Class::Interactive } else { Class::Default };
            Row { class, ..row(at, chance.between((300, 1200)), chance.between((20, 80))) }
        });
        let trace = trace(rows);
        let outcome = run(&trace, &Settings { workers: 2, ..Settings::default() }, seed);
        let of = |class| p99(ttft(&trace, &outcome.log, |row| row.class == class));
        let (interactive, default) = (of(Class::Interactive), of(Class::Default));
        println!("seed {seed}: interactive {interactive:.2} s, default {default:.2} s");
        assert!(interactive * 5.0 < default, "seed {seed}: interactive {interactive:.2} s, default {default:.2} s");
    }
}
