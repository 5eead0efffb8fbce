//! Where requests go, and what draws or repels them.

use std::time::Duration;

use super::world::{POOL, World, calibrate, chain, request};
use crate::*;

#[test]
fn siblings_follow_the_first_and_leave_when_waiting_costs_more() {
    let mut world = World::with_workers(4, &WorkerSpec::default());
    let shared = chain(5, 250);
    for id in 1..=3 {
        world.arrive(Request { blocks: shared.clone(), ..request(id, 4016) });
    }
    assert_eq!(world.sent_to(2), world.sent_to(1), "nothing was stored yet, and it is expected");
    assert_eq!(world.sent_to(3), world.sent_to(1));
    for id in 4..=40 {
        world.arrive(Request { blocks: chain(5, 20), ..request(id, 4016) });
    }
    let used: std::collections::BTreeSet<_> = (1..=40).filter_map(|id| world.sent_to(id)).collect();
    assert_eq!(used.len(), 4, "a short shared prefix does not send all to one");
}

#[test]
fn the_engines_word_on_its_cache_is_believed_until_it_takes_it_back() {
    let mut world = World::with_workers(8, &WorkerSpec { kv_events: true, ..WorkerSpec::default() });
    let blocks = chain(5, 200);
    let kv = |change| Event::Kv { worker: WorkerId(6), change };
    world.event(kv(KvEvent::Stored { blocks: blocks.to_vec() }));
    world.wait(600_000);
    let sent = world.arrive(Request { blocks: blocks.clone(), ..request(1, 3200) });
    assert!(matches!(sent[..], [Action::Send { worker: WorkerId(6), matched_tokens: 3184, .. }]), "{sent:?}");
    world.finish(1);
    world.wait(6000);
    world.event(kv(KvEvent::Removed { blocks: blocks[100..].to_vec() }));
    let sent = world.arrive(Request { blocks: blocks.clone(), ..request(2, 3200) });
    assert!(matches!(sent[..], [Action::Send { worker: WorkerId(6), matched_tokens: 1600, .. }]), "{sent:?}");
    world.finish(2);
    world.event(kv(KvEvent::Cleared));
    let sent = world.arrive(Request { blocks, ..request(3, 3200) });
    assert!(matches!(sent[..], [Action::Send { matched_tokens: 0, .. }]), "{sent:?}");
}

#[test]
fn equals_share_by_chance() {
    let mut world = World::with_workers(10, &WorkerSpec::default());
    let mut counts = [0; 10];
    for id in 0..1000 {
        world.arrive(request(id, 100));
        counts[world.sent_to(id).unwrap() as usize] += 1;
        world.first_token(id);
        world.finish(id);
    }
    assert!(counts.iter().all(|count| (60..150).contains(count)), "{counts:?}");
}

#[test]
fn load_is_counted_in_tokens() {
    let mut world = World::with_workers(2, &WorkerSpec::default());
    world.arrive(request(1, 15_000));
    let big = world.sent_to(1).unwrap();
    for id in 2..=30 {
        world.arrive(request(id, 100));
        assert_eq!(world.sent_to(id), Some(1 - big));
    }
}

#[test]
fn measured_rates_shift_the_load() {
    let mut world = World::with_workers(2, &WorkerSpec { kv_events: true, ..WorkerSpec::default() });
    calibrate(&mut world, 1, 0, 8000);
    calibrate(&mut world, 101, 1, 2000);
    let rate = |worker| world.core.worker_view(world.now, WorkerId(worker)).unwrap().prefill_rate;
    assert!((rate(0) / 8000.0 - 1.0).abs() < 0.02 && (rate(1) / 2000.0 - 1.0).abs() < 0.02, "{} {}", rate(0), rate(1));
    let mut counts = [0, 0];
    for id in 1000..1010 {
        world.arrive(request(id, 1500));
        counts[world.sent_to(id).unwrap() as usize] += 1;
    }
    assert_eq!(counts, [8, 2]);
}

#[test]
fn what_came_past_us_repels_until_it_is_drained_or_stale() {
    let mut world = World::with_workers(2, &WorkerSpec::default());
    world.event(Event::Load {
        worker: WorkerId(0),
        report: LoadReport { running: 8, waiting: 10, kv_usage: Some(0.1) },
    });
    for id in 1..=5 {
        world.arrive(request(id, 100));
        assert_eq!(world.sent_to(id), Some(1));
    }
    let wait = world.core.predicted_wait(world.now, POOL, Class::Default, TenantId(0)).unwrap();
    assert!(wait > Duration::from_millis(200) && wait < Duration::from_millis(300), "{wait:?}");
}

#[test]
fn a_decision_can_be_explained() {
    let mut world = World::with_workers(3, &WorkerSpec::default());
    let blocks = chain(5, 200);
    world.event(Event::Kv { worker: WorkerId(1), change: KvEvent::Stored { blocks: blocks.to_vec() } });
    world.arrive(Request { blocks, ..request(1, 4000) });
    let decision = world.core.explain(RequestId(1)).next().unwrap();
    assert_eq!((decision.winner, decision.cause, decision.candidates.len()), (Some(WorkerId(1)), Cause::Arrival, 3));
    let of = |worker| decision.candidates.iter().find(|candidate| candidate.worker == WorkerId(worker)).unwrap();
    let term = |worker, name| {
        let at = term_names().iter().position(|term| *term == name).unwrap();
        of(worker).terms[at]
    };
    assert_eq!((of(1).matched_tokens, of(0).matched_tokens), (3200, 0));
    assert_eq!((term(1, "prefill"), term(0, "prefill")), (0.4, 2.0));
    let worth = (Config::default().overlap_gain_calm - 1.0) * 1.6;
    assert!((term(1, "overlap_credit") + worth).abs() < 1e-9);
    assert_eq!(term(0, "overlap_credit"), 0.0);
    assert!(of(1).seconds() < of(2).seconds());
    assert_eq!(world.core.explain(RequestId(2)).count(), 0);
}

#[test]
fn what_many_hold_is_worth_less_to_keep() {
    for holders in [1, 2, 4] {
        let mut world = World::with_workers(5, &WorkerSpec::default());
        let blocks = chain(5, 200);
        for worker in (0..holders).map(WorkerId) {
            world.event(Event::Kv { worker, change: KvEvent::Stored { blocks: blocks.to_vec() } });
        }
        world.arrive(Request { blocks, ..request(1, 4000) });
        let decision = world.core.explain(RequestId(1)).next().unwrap();
        let at = term_names().iter().position(|term| *term == "overlap_credit").unwrap();
        let worth = (Config::default().overlap_gain_calm - 1.0) * 1.6 / f64::from(holders);
        for candidate in &decision.candidates {
            let expect = if candidate.worker.0 < holders { -worth } else { 0.0 };
            assert!((candidate.terms[at] - expect).abs() < 1e-9, "{holders} holders: {candidate:?}");
        }
    }
}

#[test]
fn a_large_pool_finds_the_holder_of_a_prefix_and_spreads_the_rest() {
    let mut world = World::with_workers(300, &WorkerSpec::default());
    let blocks = chain(5, 200);
    world.event(Event::Kv { worker: WorkerId(271), change: KvEvent::Stored { blocks: blocks.to_vec() } });
    world.arrive(Request { blocks, ..request(1, 4000) });
    assert_eq!(world.sent_to(1), Some(271));
    for id in 2..=200 {
        world.arrive(request(id, 4000));
    }
    let most = world.core.worker_views(world.now).map(|view| view.sent_requests).max();
    assert_eq!(most, Some(1));
}

#[test]
fn a_new_worker_inherits_no_prefixes() {
    let mut world = World::with_workers(2, &WorkerSpec::default());
    let blocks = chain(5, 200);
    world.event(Event::Kv { worker: WorkerId(1), change: KvEvent::Stored { blocks: blocks.to_vec() } });
    assert_eq!(world.core.matched_tokens(world.now, POOL, &blocks), 3200);
    world.event(Event::WorkerLeft { worker: WorkerId(1) });
    assert_eq!(world.core.matched_tokens(world.now, POOL, &blocks), 0);
    world.join(2, WorkerSpec::default());
    world.probed(2, true);
    assert_eq!(world.core.matched_tokens(world.now, POOL, &blocks), 0);
}

#[test]
fn prefixes_of_a_worker_that_died_do_not_draw() {
    let mut world = World::with_workers(2, &WorkerSpec::default());
    let blocks = chain(5, 200);
    world.arrive(Request { blocks: blocks.clone(), ..request(1, 4000) });
    let first = world.sent_to(1).unwrap();
    world.fail(1, Failure::Connect);
    world.finish(1);
    world.probed(first, true);
    world.event(Event::WorkerLeft { worker: WorkerId(1 - first) });
    let sent = world.arrive(Request { blocks, ..request(2, 4000) });
    assert!(matches!(sent[..], [Action::Send { matched_tokens: 0, .. }]), "{sent:?}");
}
