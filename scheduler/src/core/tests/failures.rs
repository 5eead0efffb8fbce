//! Workers that fail, are overloaded, drain or leave, and what becomes of their requests.

use std::time::Duration;

use super::world::{POOL, World, chain, one_slot, request, retry_after};
use crate::*;

#[test]
fn an_overloaded_worker_is_left_alone_for_a_lease_and_is_not_ill() {
    let mut world = World::with_workers(1, &WorkerSpec::default());
    world.arrive(request(1, 100));
    world.fail(1, Failure::Overloaded { retry_after: None });
    world.arrive(request(2, 100));
    assert_eq!(world.waiting().len(), 2);
    world.wait(999);
    assert_eq!(world.waiting().len(), 2);
    world.wait(251); // a little longer, by chance
    assert_eq!(world.sent().len(), 2);
    for _ in 0..2 {
        world.fail(1, Failure::Overloaded { retry_after: Some(Duration::from_secs(2)) });
        world.wait(2000);
    }
    let last = Failure::Overloaded { retry_after: Some(Duration::from_secs(2)) };
    assert_eq!(world.refusal(1), Some(Refusal::AttemptsExhausted { last }), "three sends");
    assert_eq!(world.health[&WorkerId(0)], HealthState::Up);
}

#[test]
fn who_is_overloaded_again_and_again_is_left_alone_for_longer() {
    let limits = PoolLimits { attempts_max: 16, queue_timeout: Duration::from_secs(3600), ..PoolLimits::default() };
    let mut world = World::new(7, limits);
    world.join(0, WorkerSpec::default());
    world.probed(0, true);
    world.arrive(request(1, 100));
    world.arrive(request(2, 100));
    let mut waits = Vec::new();
    for _ in 0..6 {
        let began = world.now;
        // said to both at once, it counts once
        world.fail(1, Failure::Overloaded { retry_after: None });
        world.fail(2, Failure::Unavailable { retry_after: None });
        while !world.waiting().is_empty() {
            world.wait(10);
        }
        waits.push(world.now.seconds_since(began));
    }
    for (wait, least) in waits.iter().zip([1.0, 2.0, 4.0, 4.0, 4.0, 4.0]) {
        assert!((least..least * 1.25 + 0.02).contains(wait), "{waits:?}");
    }
    assert!(waits[2..].iter().any(|wait| (wait - waits[2]).abs() > 0.02), "by chance: {waits:?}");
    world.first_token(1);
    let began = world.now;
    world.fail(2, Failure::Overloaded { retry_after: None });
    while !world.waiting().is_empty() {
        world.wait(10);
    }
    assert!(world.now.seconds_since(began) < 1.3, "once something worked it begins anew");
}

/// Where the time that a worker asked for is more than a request may wait, it is told so at once.
#[test]
fn a_worker_is_never_asked_sooner_than_it_said() {
    let mut world = World::with_workers(2, &WorkerSpec::default());
    let long = Failure::Overloaded { retry_after: Some(Duration::from_secs(90)) };
    world.arrive(request(1, 100));
    world.fail(1, long);
    assert!(world.sent_to(1).is_some(), "the other one is asked");
    let actions = world.fail(1, long);
    let wait = Duration::from_secs(90);
    assert_eq!(world.refusal(1), Some(Refusal::Busy { wait }));
    assert_eq!(retry_after(&actions), wait);
    world.wait(20_000);
    world.arrive(request(2, 100));
    assert_eq!(world.refusal(2), Some(Refusal::Busy { wait: Duration::from_secs(70) }), "nobody waits in vain");
    world.wait(20_000);
    world.arrive(request(3, 100));
    world.wait(49_999);
    assert_eq!(world.waiting().len(), 1, "50 s can be waited for");
    world.wait(1);
    assert!(world.sent_to(3).is_some());
}

#[test]
fn an_error_is_tried_once_more_at_the_same_worker_where_there_is_no_other() {
    let mut world = World::with_workers(1, &WorkerSpec::default());
    world.arrive(request(1, 100));
    world.fail(1, Failure::Status5xx);
    assert_eq!(world.sent_to(1), Some(0));
    world.fail(1, Failure::Status5xx);
    assert_eq!(world.refusal(1), Some(Refusal::AttemptsExhausted { last: Failure::Status5xx }));
    for failure in [Failure::Timeout, Failure::Reset, Failure::Malformed] {
        let mut world = World::with_workers(1, &WorkerSpec::default());
        world.arrive(request(1, 100));
        world.fail(1, failure);
        assert_eq!(world.refusal(1), Some(Refusal::AttemptsExhausted { last: failure }), "not after these");
    }
}

/// A second try beside a first one: at once and where there is room, or not at all.
#[test]
fn a_second_try_goes_elsewhere_at_once_or_nowhere() {
    let mut world = World::with_workers(2, &one_slot());
    world.arrive(request(1, 100));
    let first = world.sent_to(1).unwrap();
    let beside = |id| Request { beside: Some((WorkerId(first), 1)), ..request(id, 100) };
    world.arrive(beside(2));
    assert_eq!(world.sent_to(2), Some(1 - first));
    world.arrive(beside(3));
    assert_eq!(world.refusal(3), Some(Refusal::NoWorker), "no room: it does not wait");
    world.event(Event::Cancelled { request: RequestId(2) });
    world.arrive(beside(4));
    assert_eq!(world.sent_to(4), Some(1 - first), "the place was given back");
    world.fail(4, Failure::Reset);
    assert_eq!(world.refusal(4), Some(Refusal::AttemptsExhausted { last: Failure::Reset }), "never beside itself");

    let mut world = World::with_workers(1, &WorkerSpec::default());
    world.arrive(Request { beside: Some((WorkerId(0), 1)), ..request(1, 100) });
    assert_eq!(world.refusal(1), Some(Refusal::NoWorker));
}

#[test]
fn an_overloaded_worker_is_passed_by() {
    let mut world = World::with_workers(2, &WorkerSpec::default());
    world.arrive(request(1, 100));
    let first = world.sent_to(1).unwrap();
    world.fail(1, Failure::Overloaded { retry_after: None });
    assert_eq!(world.sent_to(1), Some(1 - first));
    // whatever it holds in its cache
    let request = Request { blocks: chain(5, 1000), ..request(2, 16_016) };
    world.event(Event::Kv { worker: WorkerId(first), change: KvEvent::Stored { blocks: chain(5, 1000).to_vec() } });
    world.wait(1250);
    world.arrive(request);
    assert_eq!(world.sent_to(2), Some(first));
    world.fail(2, Failure::Overloaded { retry_after: None });
    assert_eq!(world.sent_to(2), Some(1 - first));
}

#[test]
fn a_refused_connection_takes_the_worker_out_and_its_lane_elsewhere() {
    let mut world = World::with_workers(2, &one_slot());
    for id in 1..=6 {
        world.arrive(request(id, 1000));
    }
    let lane = |world: &World, worker| world.core.worker_view(world.now, WorkerId(worker)).unwrap().lane_requests;
    assert_eq!((lane(&world, 0), lane(&world, 1)), (2, 2));
    let on_zero = *world.sent().iter().find(|id| world.sent_to(id.0) == Some(0)).unwrap();
    let actions = world.fail(on_zero.0, Failure::Connect);
    let (from, to) = (HealthState::Up, HealthState::Down);
    assert_eq!(actions, [Action::Health { worker: WorkerId(0), from, to }]);
    assert_eq!((lane(&world, 0), lane(&world, 1)), (0, 5));
    assert_eq!(world.wait(500), [Action::Probe { worker: WorkerId(0) }]);
    world.probed(0, true);
    world.wait(5000);
    assert_eq!(world.sent().len(), 2, "what is back takes its share");
    assert_ne!(world.sent_to(on_zero.0), Some(0), "but not what it failed");
}

#[test]
fn a_request_is_tried_elsewhere_and_the_last_failure_is_told() {
    let mut world = World::with_workers(2, &WorkerSpec::default());
    world.arrive(request(1, 100));
    let first = world.sent_to(1).unwrap();
    world.fail(1, Failure::Timeout);
    assert_eq!(world.sent_to(1), Some(1 - first));
    world.fail(1, Failure::Status5xx);
    assert_eq!(world.sent_to(1), Some(1 - first), "never again at the silent one");
    world.fail(1, Failure::Status5xx);
    assert_eq!(world.refusal(1), Some(Refusal::AttemptsExhausted { last: Failure::Status5xx }));

    let mut world = World::with_workers(9, &WorkerSpec::default());
    world.arrive(request(1, 100));
    for _ in 0..5 {
        // the wrong kind of engine: neither an attempt nor a mark
        let worker = world.sent_to(1).unwrap();
        world.fail(1, Failure::Unsupported);
        assert_ne!(world.sent_to(1), Some(worker));
    }
    for _ in 0..3 {
        assert!(world.sent_to(1).is_some());
        world.fail(1, Failure::Reset);
    }
    assert_eq!(world.refusal(1), Some(Refusal::AttemptsExhausted { last: Failure::Reset }), "three at most");
}

#[test]
fn the_breaker_opens_and_one_request_at_a_time_tries_it() {
    let mut world = World::with_workers(1, &WorkerSpec::default());
    for id in 1..=5 {
        world.arrive(request(id, 100));
        world.fail(id, Failure::Reset);
    }
    assert_eq!(world.health[&WorkerId(0)], HealthState::Open);
    world.wait(4000);
    world.arrive(request(10, 100));
    world.arrive(request(11, 100));
    world.wait(1000);
    assert_eq!((world.health[&WorkerId(0)], world.sent().len()), (HealthState::HalfOpen, 1));
    let trial = world.sent()[0];
    world.end(trial.0, End::Cancelled);
    assert_eq!(world.sent().len(), 1, "no verdict: the next one tries");
    let trial = world.sent()[0];
    world.arrive(request(12, 100));
    assert_eq!(world.waiting(), [RequestId(12)]);
    world.first_token(trial.0);
    assert_eq!((world.health[&WorkerId(0)], world.sent().len()), (HealthState::Up, 2));
}

#[test]
fn a_worker_that_nobody_tries_is_well_once_a_probe_says_so() {
    let opened = || {
        let mut world = World::with_workers(1, &WorkerSpec::default());
        for id in 1..=5 {
            world.arrive(request(id, 100));
            world.fail(id, Failure::Reset);
        }
        world.wait(5000);
        assert_eq!(world.health[&WorkerId(0)], HealthState::HalfOpen);
        world
    };
    let mut world = opened();
    world.wait(29_999);
    world.probed(0, true);
    assert_eq!(world.health[&WorkerId(0)], HealthState::HalfOpen, "a request may still try it");
    assert_eq!(world.wait(1), [Action::Probe { worker: WorkerId(0) }]);
    world.probed(0, true);
    assert_eq!(world.health[&WorkerId(0)], HealthState::Up);

    let mut world = opened();
    world.arrive(request(10, 100));
    assert_eq!(world.wait(30_000), [Action::Probe { worker: WorkerId(0) }]);
    world.probed(0, true);
    assert_eq!(world.health[&WorkerId(0)], HealthState::HalfOpen, "one tries it, and has no answer yet");
    world.end(10, End::Cancelled);
    assert_eq!(world.wait(30_000), [Action::Probe { worker: WorkerId(0) }]);
    world.probed(0, false);
    assert_eq!(world.health[&WorkerId(0)], HealthState::Down);
}

#[test]
fn a_draining_worker_gets_nothing_and_finishes_what_it_has() {
    let mut world = World::with_workers(2, &one_slot());
    for id in 1..=6 {
        world.arrive(request(id, 1000));
    }
    world.event(Event::WorkerDraining { worker: WorkerId(0), draining: true });
    let kept = *world.sent().iter().find(|id| world.sent_to(id.0) == Some(0)).unwrap();
    assert_eq!(world.core.worker_view(world.now, WorkerId(0)).unwrap().lane_requests, 0);
    world.finish(kept.0);
    assert_eq!(world.core.worker_view(world.now, WorkerId(0)).unwrap().sent_requests, 0);
    assert_eq!(world.waiting().len(), 4);
}

#[test]
fn joining_again_changes_the_spec_and_keeps_the_rest() {
    let mut world = World::with_workers(1, &one_slot());
    world.arrive(request(1, 1000));
    world.arrive(request(2, 1000));
    world.event(Event::WorkerDraining { worker: WorkerId(0), draining: true });
    assert_eq!(world.waiting(), [RequestId(2)]);
    let joined = world.join(0, WorkerSpec { kv_tokens: Some(5000), ..WorkerSpec::default() });
    assert!(joined.is_empty(), "it drains all the same: {joined:?}");
    let resumed = world.event(Event::WorkerDraining { worker: WorkerId(0), draining: false });
    assert!(matches!(resumed[..], [Action::Send { request: RequestId(2), .. }]), "{resumed:?}");
    let view = world.core.worker_view(world.now, WorkerId(0)).unwrap();
    assert_eq!((view.sent_requests, view.health, view.kv_tokens), (2, HealthState::Up, Some(5000)));
}

#[test]
fn a_request_outlives_its_worker() {
    let mut world = World::with_workers(2, &one_slot());
    world.arrive(request(1, 1000));
    world.arrive(request(2, 1000));
    world.arrive(request(3, 1000));
    for worker in 0..2 {
        world.event(Event::WorkerLeft { worker: WorkerId(worker) });
    }
    assert_eq!((world.sent().len(), world.core.worker_views(world.now).count()), (2, 0));
    world.finish(1);
    world.join(2, one_slot());
    world.probed(2, true);
    assert_eq!(world.sent_to(3), Some(2), "what waited is served by who comes");
    world.fail(2, Failure::Reset);
    assert_eq!(world.waiting(), [RequestId(2)], "the failed one waits for it too");
}

#[test]
fn lost_metrics_ask_for_a_probe_and_mistrust_our_counters() {
    let mut world = World::with_workers(1, &WorkerSpec::default());
    let report = LoadReport { running: 0, waiting: 0, kv_usage: Some(0.0) };
    world.event(Event::Load { worker: WorkerId(0), report });
    world.arrive(request(1, 10_000));
    let wait = |world: &World| world.core.predicted_wait(world.now, POOL, Class::Default, TenantId(0)).unwrap();
    assert_eq!(wait(&world), Duration::from_secs(5));
    assert_eq!(world.event(Event::LoadLost { worker: WorkerId(0) }), [Action::Probe { worker: WorkerId(0) }]);
    assert_eq!(wait(&world), Duration::from_millis(6500));
}
