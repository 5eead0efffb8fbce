//! Every policy over small fleets: who ends how, and that equal runs are equal.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use forebay_scheduler::Class;
use proptest::prelude::*;

use super::*;
use crate::{EngineConfig, Row};

const BLOCK: u32 = 16;

/// `count` requests, one each `gap_ms`, of which `groups` share their first 20 blocks.
fn trace(count: u32, gap_ms: u64, groups: u64) -> Trace {
    let row = |number: u32| {
        let group = u64::from(number) % groups;
        let prompt_tokens = 400 + number % 7 * 60;
        let blocks = (0..u64::from(prompt_tokens / BLOCK)).map(|at| {
            Trace::block_hash(if at < 20 { group * 1000 + at } else { (u64::from(number) + 1) * 1_000_000 + at })
        });
        Row {
            at: Duration::from_millis(u64::from(number) * gap_ms),
            prompt_tokens,
            output_tokens: number * 13 % 90,
            blocks: blocks.collect(),
            tenant: number % 3,
            class: Class::ALL[number as usize % 3],
        }
    };
    Trace { block_tokens: BLOCK, rows: (0..count).map(row).collect() }
}

fn settings(workers: u32) -> Settings {
    let engine = EngineConfig { kv_blocks: 300, max_batch: 16, step_token_budget: 1024, ..EngineConfig::default() };
    Settings { workers, engine, ..Settings::default() }
}

fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

/// Ends by request; a second end is an error.
fn ends(outcome: &Outcome) -> BTreeMap<u32, What> {
    let mut ends = BTreeMap::new();
    for entry in outcome.log.iter().filter(|entry| entry.what.is_end()) {
        assert_eq!(ends.insert(entry.request, entry.what), None, "request {} ends twice", entry.request);
    }
    ends
}

#[test]
fn every_policy_serves_everything_and_generates_what_the_trace_says() {
    let trace = trace(200, 20, 4);
    for policy in Policy::all() {
        let outcome = run(&trace, &settings(3), *policy, 1);
        assert_eq!(outcome.cell.completed, 200, "{policy:?}");
        for (number, end) in ends(&outcome) {
            let What::Finished { output_tokens, .. } = end else { panic!("{policy:?}: {number} ends with {end:?}") };
            assert_eq!(output_tokens, trace.rows[number as usize].output_tokens, "{policy:?}");
        }
        assert!(outcome.log.is_sorted_by_key(|entry| entry.at), "{policy:?}");
    }
}

#[test]
fn equal_arguments_give_equal_outcomes_and_another_seed_another() {
    let trace = trace(150, 30, 4);
    let settings = Settings {
        jitter: seconds(1.0),
        faults: vec![
            Fault { at: seconds(1.0), worker: 1, kind: FaultKind::Crash, lasts: Some(seconds(1.0)) },
            Fault { at: seconds(0.5), worker: 0, kind: FaultKind::Slow(3.0), lasts: None },
        ],
        ..settings(3)
    };
    for policy in Policy::all() {
        let outcome = |seed| format!("{:?}", run(&trace, &settings, *policy, seed));
        assert_eq!(outcome(5), outcome(5), "{policy:?}");
        assert_ne!(outcome(5), outcome(6), "{policy:?}");
    }
}

#[test]
fn what_fits_no_engine_is_refused_for_everyone_alike() {
    let mut trace = trace(6, 100, 1);
    trace.rows[3].output_tokens = 300 * BLOCK;
    for policy in Policy::all() {
        let outcome = run(&trace, &settings(2), *policy, 1);
        assert_eq!((outcome.cell.completed, outcome.cell.refused), (5, 1), "{policy:?}");
        assert_eq!(ends(&outcome)[&3], What::Refused, "{policy:?}");
    }
}

#[test]
fn a_pooling_request_ends_with_its_first_token() {
    let mut trace = trace(1, 0, 1);
    trace.rows[0].output_tokens = 0;
    let outcome = run(&trace, &settings(1), Policy::all()[0], 1);
    let at = |wanted: fn(&What) -> bool| outcome.log.iter().find(|entry| wanted(&entry.what)).map(|entry| entry.at);
    let first = at(|what| matches!(what, What::FirstToken { .. }));
    assert!(first.is_some());
    assert_eq!(first, at(|what| matches!(what, What::Finished { output_tokens: 0, .. })));
}

#[test]
fn one_request_alone_takes_the_time_of_its_steps() {
    let mut trace = trace(1, 0, 1);
    trace.rows[0].output_tokens = 3;
    for (speeds, expect) in [(vec![], [60_600, 11_020, 11_020]), (vec![2.0], [30_300, 5_510, 5_510])] {
        for policy in Policy::all() {
            let outcome = run(&trace, &Settings { speeds: speeds.clone(), ..settings(1) }, *policy, 1);
            let cell = outcome.cell;
            // 400 tokens at 8000 a second and the step itself; then one sequence that decodes.
            assert_eq!(cell.ttft_ms.unwrap().mean, f64::from(expect[0]) / 1e3, "{policy:?}");
            assert_eq!(cell.e2e_ms.unwrap().mean, f64::from(expect.iter().sum::<i32>()) / 1e3, "{policy:?}");
        }
    }
}

#[test]
fn a_crash_fails_what_had_begun_and_nothing_else() {
    let trace = trace(120, 25, 4);
    let crash = Fault { at: seconds(1.5), worker: 0, kind: FaultKind::Crash, lasts: Some(seconds(2.0)) };
    let settings = Settings { faults: vec![crash], ..settings(3) };
    for policy in Policy::all() {
        let outcome = run(&trace, &settings, *policy, 1);
        let ends = ends(&outcome);
        assert_eq!(ends.len(), 120, "{policy:?}");
        for (number, end) in ends {
            let mut course = outcome.log.iter().filter(|entry| entry.request == number);
            let begun = course
                .any(|entry| matches!(entry.what, What::FirstToken { worker: 0, .. }) && entry.at < Tick(1_500_000));
            match end {
                What::Failed => assert!(begun, "{policy:?}: {number} had no token yet and failed"),
                What::Finished { worker, .. } => {
                    let at = outcome.log.iter().find(|entry| entry.request == number && entry.what == end).unwrap().at;
                    let down = Tick(1_500_000)..Tick(3_500_000);
                    assert!(worker != 0 || !down.contains(&at), "{policy:?}: {number} finished at a dead engine");
                }
                other => panic!("{policy:?}: {number} ends with {other:?}"),
            }
        }
        assert!(outcome.cell.failed > 0, "{policy:?}: the crash hit nobody");
        let returns = outcome.log.iter().any(|e| matches!(e.what, What::Sent { worker: 0 }) && e.at > Tick(3_500_000));
        let late = trace.rows.iter().any(|row| row.at > seconds(4.5));
        assert!(returns || !late, "{policy:?}: the engine returned and got nothing");
    }
}

#[test]
fn without_any_engine_requests_fail_and_the_run_ends() {
    let trace = trace(10, 100, 1);
    let crash = |worker| Fault { at: Duration::ZERO, worker, kind: FaultKind::Crash, lasts: None };
    let settings = Settings { faults: vec![crash(0), crash(1)], ..settings(2) };
    for policy in Policy::all() {
        let outcome = run(&trace, &settings, *policy, 1);
        assert_eq!((outcome.cell.completed, outcome.cell.failed), (0, 10), "{policy:?}");
        assert_eq!(ends(&outcome).len(), 10, "{policy:?}");
    }
}

#[test]
fn a_full_queue_sheds_only_where_it_is_asked_to() {
    let mut trace = trace(6000, 0, 4);
    trace.rows.iter_mut().for_each(|row| row.output_tokens = 1);
    let bounded = run(&trace, &Settings { shed: true, ..settings(1) }, Policy::all()[0], 1).cell;
    assert!(bounded.shed > 0, "{bounded:?}");
    assert!(bounded.timed_out > 0, "{bounded:?}");
    assert_eq!(bounded.completed + bounded.shed + bounded.timed_out, 6000);
    let open = run(&trace, &settings(1), Policy::all()[0], 1).cell;
    assert_eq!(open.completed, 6000);
}

#[test]
fn a_slow_engine_gets_less() {
    let trace = trace(400, 15, 4);
    let slow = Fault { at: Duration::ZERO, worker: 0, kind: FaultKind::Slow(6.0), lasts: None };
    let settings = Settings { faults: vec![slow], ..settings(3) };
    for name in ["forebay", "least-requests", "least-tokens", "linear-cost"] {
        let outcome = run(&trace, &settings, Policy::by_name(name).unwrap(), 1);
        let mut served = [0; 3];
        for end in ends(&outcome).values() {
            if let What::Finished { worker, .. } = end {
                served[*worker as usize] += 1;
            }
        }
        assert!(served[0] * 4 < served[1].min(served[2]) * 3, "{name}: {served:?}");
    }
}

#[test]
fn who_looks_at_caches_finds_more_in_them() {
    // More prefixes than one engine's memory holds beside its requests.
    let trace = trace(600, 60, 23);
    let hit = |name| run(&trace, &settings(4), Policy::by_name(name).unwrap(), 1).cell.hit_ratio_tokens.unwrap();
    let blind = hit("round-robin");
    for name in ["forebay", "bounded-hash", "radix-threshold", "weighted-223", "linear-cost"] {
        assert!(hit(name) > blind * 1.3, "{name}: {} against {blind}", hit(name));
    }
}

#[test]
fn a_prefix_has_its_engine_on_the_ring_and_leaves_it_under_load() {
    let engines_of_one_prefix = |gap_ms| {
        let trace = trace(60, gap_ms, 2);
        let log = run(&trace, &settings(4), Policy::by_name("bounded-hash").unwrap(), 1).log;
        let even = log.iter().filter(|entry| entry.request % 2 == 0);
        let sent = even.filter_map(|entry| match entry.what {
            What::Sent { worker } => Some(worker),
            _ => None,
        });
        sent.collect::<BTreeSet<u32>>().len()
    };
    assert_eq!(engines_of_one_prefix(3000), 1, "one after the other");
    assert!(engines_of_one_prefix(1) > 1, "all at once");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn each_request_has_one_end_whatever_breaks(
        seed in any::<u64>(),
        workers in 1u32..5,
        gap_ms in 1u64..60,
        faults in prop::collection::vec((0u32..5, 0.0f64..4.0, prop::option::of(0.1f64..3.0), any::<bool>()), 0..6),
        shed in any::<bool>(),
    ) {
        let trace = trace(80, gap_ms, 3);
        let fault = |(worker, at, lasts, crash): (u32, f64, Option<f64>, bool)| Fault {
            at: seconds(at),
            worker: worker % workers,
            kind: if crash { FaultKind::Crash } else { FaultKind::Slow(5.0) },
            lasts: lasts.map(seconds),
        };
        let settings = Settings { faults: faults.into_iter().map(fault).collect(), shed, ..settings(workers) };
        for policy in Policy::all() {
            let outcome = run(&trace, &settings, *policy, seed);
            let ends = ends(&outcome);
            prop_assert_eq!(ends.len(), 80, "{:?}", policy);
            let cell = outcome.cell;
            let counted = cell.completed + cell.shed + cell.timed_out + cell.refused + cell.failed;
            prop_assert_eq!(counted, 80, "{:?}", policy);
        }
    }
}

#[test]
fn common_leading_blocks_are_found() {
    let mut some = trace(3, 1, 1);
    assert_eq!(setup(&some, &settings(1)).common_blocks, 20);
    some.rows[1].blocks = Arc::from([]);
    assert_eq!(setup(&some, &settings(1)).common_blocks, 0);
}
