//! Engines that die, return, or slow down.

use std::collections::BTreeMap;
use std::time::Duration;

use forebay_scheduler::Tick;
use forebay_simulator::{Fault, FaultKind, Outcome, Policy, Row, Settings, Trace, What};

use crate::load::{Chance, forebay, p99, poisson, row, run, trace, ttft};

fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

fn steady(seed: u64, per_second: f64, for_seconds: f64) -> Trace {
    trace(poisson(&mut Chance(seed), per_second, for_seconds, |chance, at| {
        row(at, chance.between((300, 3000)), chance.between((30, 200)))
    }))
}

/// Ends by request; a second end is an error.
fn ends(outcome: &Outcome) -> BTreeMap<u32, What> {
    let mut ends = BTreeMap::new();
    for entry in outcome.log.iter().filter(|entry| entry.what.is_end()) {
        assert_eq!(ends.insert(entry.request, entry.what), None, "request {} ends twice", entry.request);
    }
    ends
}

/// Requests sent to each worker within a time.
fn sent(outcome: &Outcome, workers: u32, within: std::ops::Range<f64>) -> Vec<u32> {
    let mut sent = vec![0; workers as usize];
    for entry in &outcome.log {
        if let What::Sent { worker } = entry.what
            && within.contains(&entry.at.seconds_since(Tick::ZERO))
        {
            sent[worker as usize] += 1;
        }
    }
    sent
}

#[test]
fn a_crash_costs_what_had_begun_and_the_engine_serves_again_after_it() {
    for seed in 0..4 {
        let trace = steady(seed, 8.0, 180.0);
        let crash = Fault { at: seconds(60.0), worker: 1, kind: FaultKind::Crash, lasts: Some(seconds(30.0)) };
        let outcome = run(&trace, &Settings { workers: 4, faults: vec![crash], ..Settings::default() }, seed);
        let ends = ends(&outcome);
        assert_eq!(ends.len(), trace.rows.len(), "seed {seed}");
        let at_crash = Tick(60_000_000);
        for (request, end) in &ends {
            let begun = outcome.log.iter().any(|entry| {
                entry.request == *request
                    && matches!(entry.what, What::FirstToken { worker: 1, .. })
                    && entry.at <= at_crash
            });
            match end {
                What::Finished { .. } => {}
                What::Failed if begun => {}
                other => panic!("seed {seed}: request {request} ends with {other:?}"),
            }
        }
        assert_eq!(sent(&outcome, 4, 62.0..89.0)[1], 0, "seed {seed}: sent to a dead engine");
        let after = sent(&outcome, 4, 130.0..180.0);
        println!("seed {seed}: {} failed; sent after the return {after:?}", outcome.cell.failed);
        assert!(after[1] * 2 > after[0].min(after[2]), "seed {seed}: after its return {after:?}");
    }
}

#[test]
fn while_an_engine_is_away_the_others_carry_on() {
    for seed in 0..4 {
        let trace = steady(seed, 8.0, 120.0);
        let settings = Settings { workers: 4, ..Settings::default() };
        let crash = Fault { at: seconds(30.0), worker: 0, kind: FaultKind::Crash, lasts: None };
        let wait = |settings: &Settings| p99(ttft(&trace, &run(&trace, settings, seed).log, |_| true));
        let (whole, less) = (wait(&settings), wait(&Settings { faults: vec![crash], ..settings.clone() }));
        let three = wait(&Settings { workers: 3, ..settings });
        println!("seed {seed}: p99 {whole:.2} s with 4, {three:.2} s with 3, {less:.2} s with a crash");
        assert!(less <= 1.5 * three.max(whole), "seed {seed}: {less:.2} s against {three:.2} s with three engines");
    }
}

#[test]
fn a_slow_engine_is_found_out_and_gets_less() {
    for seed in 0..4 {
        let trace = steady(seed, 12.0, 240.0);
        let slow = Fault { at: seconds(60.0), worker: 2, kind: FaultKind::Slow(3.0), lasts: None };
        let settings = Settings { workers: 4, faults: vec![slow], ..Settings::default() };
        let outcome = run(&trace, &settings, seed);
        let sent = sent(&outcome, 4, 120.0..240.0);
        let wait = |policy: Policy| {
            let outcome = forebay_simulator::run(&trace, &settings, policy, seed);
            outcome.cell.ttft_ms.unwrap().mean
        };
        let best = Policy::all().iter().skip(1).map(|policy| wait(*policy)).fold(f64::INFINITY, f64::min);
        let ours = wait(forebay());
        println!("seed {seed}: sent {sent:?}; mean {ours:.0} ms, best rival {best:.0} ms");
        assert!(sent[2] * 2 < sent[0].min(sent[1]).min(sent[3]), "seed {seed}: {sent:?}");
        assert!(ours <= 1.02 * best, "seed {seed}: mean {ours:.0} ms, best rival {best:.0} ms");
    }
}

#[test]
fn each_request_has_one_end_whatever_breaks() {
    for seed in 0..150 {
        let mut chance = Chance(seed);
        let rows = poisson(&mut chance, 20.0, 20.0, |chance, at| Row {
            tenant: chance.between((0, 4)),
            ..row(at, chance.between((1, 4000)), chance.between((0, 200)))
        });
        let trace = trace(rows);
        let fault = |chance: &mut Chance| Fault {
            at: seconds(chance.unit() * 20.0),
            worker: chance.between((0, 3)),
            kind: if chance.unit() < 0.7 { FaultKind::Crash } else { FaultKind::Slow(1.0 + chance.unit() * 20.0) },
            lasts: (chance.unit() < 0.8).then_some(seconds(0.05 + chance.unit() * 8.0)),
        };
        let faults = (0..chance.between((1, 9))).map(|_| fault(&mut chance)).collect();
        let settings = Settings { workers: 3, faults, shed: seed % 2 == 0, ..Settings::default() };
        let outcome = run(&trace, &settings, seed);
        assert_eq!(ends(&outcome).len(), trace.rows.len(), "seed {seed}");
        let firsts = outcome.log.iter().filter(|entry| matches!(entry.what, What::FirstToken { .. })).count();
        let mut started: Vec<u32> =
            outcome.log.iter().filter(|e| matches!(e.what, What::FirstToken { .. })).map(|e| e.request).collect();
        started.sort_unstable();
        started.dedup();
        assert_eq!(started.len(), firsts, "seed {seed}: a client saw two first tokens");
    }
}

/// Two hours in which something breaks every ten seconds or so, often several at once: nobody is forgotten, and once the
/// engines are whole again the pool is as quick as one that nothing ever happened to.
#[test]
fn two_hours_of_faults_leave_nothing_behind() {
    const HOURS: f64 = 7200.0;
    let trace = steady(7, 3.0, HOURS + 600.0);
    let mut chance = Chance(7);
    let mut faults = Vec::new();
    let mut at = 0.0;
    while at < HOURS {
        let kind = if chance.unit() < 0.6 { FaultKind::Crash } else { FaultKind::Slow(1.0 + chance.unit() * 20.0) };
        let lasts = Some(seconds((0.05 + chance.unit() * 30.0).min(HOURS - at)));
        faults.push(Fault { at: seconds(at), worker: chance.between((0, 4)), kind, lasts });
        at += 0.1 + chance.unit() * 20.0;
    }
    let count = faults.len();
    let settings = Settings { workers: 4, shed: true, ..Settings::default() };
    let outcome = run(&trace, &Settings { faults, ..settings.clone() }, 7);
    let ends = ends(&outcome);
    assert_eq!(ends.len(), trace.rows.len(), "each request ends once");
    let finished = ends.values().filter(|end| matches!(end, What::Finished { .. })).count();
    let late = |row: &Row| row.at > seconds(HOURS + 120.0);
    let after = p99(ttft(&trace, &outcome.log, late));
    let never = p99(ttft(&trace, &run(&trace, &settings, 7).log, late));
    println!(
        "{count} faults: {finished} of {} finished; p99 afterwards {after:.2} s, without {never:.2} s",
        ends.len()
    );
    assert!(finished * 10 > ends.len() * 8, "{finished} of {}", ends.len());
    assert!(after <= 1.5 * never, "{after:.2} s, without faults {never:.2} s");
}
