//! What the core does in situations that have a name.

use std::time::Duration;

use super::world::{POOL, Stage, World, chain, request};
use crate::*;

fn one_slot() -> WorkerSpec {
    WorkerSpec { sequences_max: 1, ..WorkerSpec::default() }
}

fn retry_after(actions: &[Action]) -> Duration {
    let after = actions.iter().find_map(|action| match action {
        Action::Refuse { retry_after, .. } => *retry_after,
        _ => None,
    });
    after.expect("a refusal that says when to come back")
}

/// `count` prompts served in turn by each worker at `speed`, so that its rate is measured.
fn calibrate(world: &mut World, first_id: u64, worker: u32, speed: u32) {
    let others: Vec<u32> = world.health.keys().map(|other| other.0).filter(|other| *other != worker).collect();
    others.iter().for_each(|other| drop(world.probed(*other, false)));
    for id in first_id..first_id + 8 {
        world.arrive(request(id, 2000));
        assert_eq!(world.sent_to(id), Some(worker));
        world.wait(2000 * 1000 / u64::from(speed));
        world.first_token(id);
        world.finish(id);
    }
    others.iter().for_each(|other| drop(world.probed(*other, true)));
    world.wait(20_000); // until they have their full share again
}

#[test]
fn a_request_waits_for_a_worker_that_was_not_heard_of_yet() {
    let mut world = World::new(1, PoolLimits::default());
    let joined = world.join(0, WorkerSpec::default());
    assert_eq!(joined, [Action::Probe { worker: WorkerId(0) }]);
    world.arrive(request(1, 100));
    world.wait(10_000);
    assert_eq!(world.waiting(), [RequestId(1)]);
    world.probed(0, true);
    assert_eq!(world.sent_to(1), Some(0));
}

#[test]
fn it_gives_up_after_the_queues_time_out() {
    let mut world = World::new(1, PoolLimits::default());
    world.join(0, WorkerSpec::default());
    world.arrive(request(1, 100));
    world.arrive(Request { deadline: Some(Tick(3_000_000)), ..request(2, 100) });
    world.wait(3000);
    assert_eq!((world.refusal(1), world.refusal(2)), (None, Some(Refusal::DeadlinePassed)));
    world.wait(57_000);
    assert_eq!(world.refusal(1), Some(Refusal::NoWorker));
}

#[test]
fn the_time_at_a_worker_that_failed_is_not_time_in_the_queue() {
    let limits = PoolLimits { queue_timeout: Duration::from_secs(60), ..PoolLimits::default() };
    for deadline in [None, Some(Tick(100_000_000))] {
        let mut world = World::new(1, limits.clone());
        for worker in 0..2 {
            world.join(worker, one_slot());
            world.probed(worker, true);
        }
        world.arrive(request(1, 100));
        world.arrive(request(2, 100));
        world.arrive(Request { deadline, ..request(3, 100) });
        world.wait(40_000);
        world.finish(1);
        let worker = world.sent_to(3).unwrap();
        world.arrive(request(4, 100));
        world.wait(50_000);
        world.fail(3, Failure::Timeout);
        assert_eq!(world.waiting(), [RequestId(3)], "40 s of 60 are used up");
        assert!(world.sent_to(2) != Some(worker));
        world.wait(9_000);
        assert_eq!(world.refusal(3), None);
        world.wait(2_000);
        assert_eq!(world.refusal(3), deadline.map(|_| Refusal::DeadlinePassed));
        world.wait(10_000);
        assert_eq!(world.refusal(3), Some(deadline.map_or(Refusal::TimedOut, |_| Refusal::DeadlinePassed)));
    }
}

#[test]
fn what_can_never_be_served_is_refused_on_arrival() {
    let mut world = World::with_workers(1, &WorkerSpec::default());
    world.event(Event::WorkerDraining { worker: WorkerId(0), draining: true });
    world.arrive(request(1, 100));
    assert_eq!(world.refusal(1), None, "who is there is about to leave, and another may come");
    world.wait(2_000);
    assert_eq!(world.refusal(1), Some(Refusal::NoWorker));
    world.event(Event::WorkerLeft { worker: WorkerId(0) });
    world.arrive(Request { pool: PoolId(9), ..request(2, 100) });
    assert_eq!(world.refusal(2), Some(Refusal::PoolUnknown));
    world.join(0, WorkerSpec { kv_tokens: Some(1000), ..WorkerSpec::default() });
    world.probed(0, true);
    world.arrive(request(3, 1000));
    assert_eq!(world.refusal(3), Some(Refusal::TooLarge));
    world.arrive(Request { deadline: Some(world.now), ..request(4, 10) });
    assert_eq!(world.refusal(4), Some(Refusal::DeadlinePassed));
    assert_eq!(world.core.explain(RequestId(4)).map(|decision| decision.cause).collect::<Vec<_>>(), [Cause::Expiry]);
    world.arrive(request(5, 999));
    assert_eq!(world.sent_to(5), Some(0));
    world.join(1, WorkerSpec::default());
    world.arrive(request(6, 1000));
    assert_eq!(world.refusal(6), None, "a worker that does not say what it holds may hold it");
}

#[test]
fn a_pool_without_members_is_reported_after_a_grace() {
    let mut world = World::new(1, PoolLimits::default());
    world.arrive(request(1, 100));
    world.arrive(Request { deadline: Some(world.now), ..request(2, 100) });
    assert_eq!((world.refusal(1), world.refusal(2)), (None, Some(Refusal::DeadlinePassed)));
    world.wait(1999);
    assert_eq!(world.refusal(1), None);
    world.wait(1);
    assert_eq!(world.refusal(1), Some(Refusal::NoWorker));
    world.arrive(request(3, 100));
    world.wait(1000);
    world.join(0, WorkerSpec::default());
    world.probed(0, true);
    assert_eq!(world.sent_to(3), Some(0), "it came in time");
}

#[test]
fn a_dead_fleet_is_reported_after_a_grace() {
    let mut world = World::with_workers(1, &WorkerSpec::default());
    world.probed(0, false);
    world.arrive(request(1, 100));
    world.wait(1999);
    assert_eq!(world.refusal(1), None);
    world.wait(1);
    assert_eq!(world.refusal(1), Some(Refusal::NoWorker));
    world.arrive(request(2, 100));
    world.wait(1000);
    world.probed(0, true);
    assert_eq!(world.sent_to(2), Some(0), "it came back in time");
}

#[test]
fn prompts_beyond_the_window_wait_in_the_lane() {
    let mut world = World::with_workers(1, &WorkerSpec::default());
    for id in 1..=4 {
        world.arrive(request(id, 8000));
    }
    assert_eq!(world.sent(), [RequestId(1), RequestId(2)], "16384 tokens are two steps");
    world.first_token(1);
    assert_eq!(world.sent_to(3), Some(0));
    world.end(2, End::Cancelled);
    assert_eq!(world.sent_to(4), Some(0));
    let view = world.core.worker_view(world.now, WorkerId(0)).unwrap();
    assert_eq!((view.sent_requests, view.lane_requests, view.promised_tokens), (3, 0, 16_000));
}

#[test]
fn the_kv_cache_bounds_what_is_sent() {
    let spec = WorkerSpec { kv_tokens: Some(10_000), ..WorkerSpec::default() };
    let mut world = World::with_workers(1, &spec);
    // 2900 + 100 expected, in blocks of 16: 3008
    for id in 1..=4 {
        world.arrive(request(id, 2900));
        world.first_token(id);
    }
    assert_eq!(world.waiting(), [RequestId(4)]);
    let view = world.core.worker_view(world.now, WorkerId(0)).unwrap();
    assert_eq!((view.reserved_tokens, view.sent_requests), (3 * 3008, 3));
    world.finish(2);
    assert_eq!(world.sent_to(4), Some(0));
    // the engine's account counts too, and only as long as it is fresh
    world.finish(1);
    world.event(Event::Load {
        worker: WorkerId(0),
        report: LoadReport { running: 2, waiting: 0, kv_usage: Some(0.95) },
    });
    world.arrive(request(5, 2900));
    assert_eq!(world.waiting(), [RequestId(5)]);
    world.wait(15_100);
    assert_eq!(world.sent_to(5), Some(0));
}

#[test]
fn a_request_larger_than_its_plan_runs_alone() {
    let spec = WorkerSpec { kv_tokens: Some(1000), ..WorkerSpec::default() };
    let mut world = World::with_workers(1, &spec);
    world.arrive(Request { max_output: Some(5000), ..request(1, 950) });
    world.arrive(request(2, 100));
    assert_eq!((world.sent_to(1), world.sent_to(2)), (Some(0), None));
    world.finish(1);
    assert_eq!(world.sent_to(2), Some(0));
}

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
fn a_smaller_queue_sheds_what_is_too_much() {
    let mut world = World::with_workers(1, &one_slot());
    for id in 1..=6 {
        world.arrive(request(id, 100));
        world.wait(1);
    }
    let limits = PoolLimits { queue_requests_max: 2, ..PoolLimits::default() };
    world.event(Event::PoolJoined { pool: POOL, limits });
    assert_eq!(world.waiting(), [RequestId(2), RequestId(3)]);
    assert_eq!(world.refusal(6), Some(Refusal::QueueFull));
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
fn an_idle_worker_takes_from_a_lane_that_waits() {
    let mut world = World::with_workers(1, &one_slot());
    for id in 1..=3 {
        world.arrive(request(id, 4000));
    }
    world.join(1, one_slot());
    world.probed(1, true);
    assert_eq!(world.sent().len(), 2);
    let by_one = world.sent().into_iter().find(|id| world.sent_to(id.0) == Some(1)).unwrap();
    world.first_token(by_one.0);
    world.finish(by_one.0);
    assert!(world.waiting().is_empty());
}

#[test]
fn the_head_of_a_lane_that_does_not_move_goes_elsewhere() {
    let mut world = World::with_workers(2, &one_slot());
    world.arrive(request(1, 1000));
    let busy = world.sent_to(1).unwrap();
    world.fail(1, Failure::Overloaded { retry_after: Some(Duration::from_secs(10)) });
    assert_eq!(world.sent_to(1), Some(1 - busy));
    world.arrive(request(2, 1000));
    let lane = |world: &World, worker| world.core.worker_view(world.now, WorkerId(worker)).unwrap().lane_requests;
    assert_eq!((lane(&world, busy), lane(&world, 1 - busy)), (0, 1), "ten seconds are longer than a stay");
    world.wait(7000);
    assert_eq!((lane(&world, busy), lane(&world, 1 - busy)), (0, 1));
    world.wait(3000);
    assert_eq!(world.sent_to(2), Some(busy), "nothing happened but time");
    let causes: Vec<_> = world.core.explain(RequestId(2)).map(|decision| decision.cause).collect();
    assert_eq!(causes, [Cause::Arrival, Cause::Rescore]);
}

#[test]
fn a_full_queue_sheds_the_lowest_class_and_its_newest_first() {
    let limits = PoolLimits { queue_requests_max: 3, ..PoolLimits::default() };
    let mut world = World::new(1, limits);
    world.join(0, one_slot());
    world.probed(0, true);
    let mut arrive = |id: u64, class| {
        world.wait(1);
        let actions = world.arrive(Request { class, ..request(id, 4000) });
        let refused = (0..9).filter(|id| world.refusal(*id) == Some(Refusal::QueueFull)).collect::<Vec<_>>();
        (actions, refused)
    };
    for (id, class, expect) in [
        (0, Class::Batch, vec![]),
        (1, Class::Batch, vec![]),
        (2, Class::Default, vec![]),
        (3, Class::Batch, vec![]),
        (4, Class::Default, vec![3]),
        (5, Class::Interactive, vec![1, 3]),
        (6, Class::Default, vec![1, 3, 6]),
    ] {
        assert_eq!(arrive(id, class).1, expect, "{id}");
    }
    let (actions, _) = arrive(7, Class::Batch);
    // 12000 tokens wait, at 2000 a second
    let after = retry_after(&actions);
    assert!(after >= Duration::from_secs(6) && after <= Duration::from_secs(8), "{after:?}");
}

#[test]
fn a_tenant_of_more_weight_may_have_more_waiting_before_it_is_shed() {
    let mut world = World::new(1, PoolLimits { queue_requests_max: 5, ..PoolLimits::default() });
    world.event(Event::TenantWeight { tenant: TenantId(1), weight: 2.0 });
    world.join(0, one_slot());
    world.probed(0, true);
    world.arrive(request(0, 1000));
    for (id, tenant) in [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 1)] {
        world.arrive(Request { tenant: TenantId(tenant), ..request(id, 1000) });
    }
    assert_eq!(world.refusal(6), None);
    assert_eq!(world.refusal(5), Some(Refusal::QueueFull), "2000 tokens are more than 4000 of twice the weight");
    world.event(Event::TenantWeight { tenant: TenantId(1), weight: 0.5 });
    world.arrive(Request { tenant: TenantId(2), ..request(7, 10) });
    assert_eq!(world.refusal(6), Some(Refusal::QueueFull));
}

#[test]
fn queues_are_bounded_in_bytes_and_tokens_too() {
    for limits in [
        PoolLimits { queue_bytes_max: 2500, ..PoolLimits::default() },
        PoolLimits { queue_tokens_max: 250, ..PoolLimits::default() },
    ] {
        let mut world = World::new(1, limits);
        world.join(0, one_slot());
        world.probed(0, true);
        for id in 1..=4 {
            world.arrive(request(id, 100));
        }
        assert_eq!((world.sent().len(), world.waiting().len()), (1, 2));
        assert_eq!(world.refusal(4), Some(Refusal::QueueFull));
    }
}

#[test]
fn a_client_that_leaves_frees_its_place() {
    let mut world = World::with_workers(1, &one_slot());
    for id in 1..=3 {
        world.arrive(request(id, 100));
    }
    world.event(Event::Cancelled { request: RequestId(2) });
    assert_eq!(world.core.pool_view(POOL).unwrap().queued_requests, [0, 1, 0]);
    world.event(Event::Cancelled { request: RequestId(1) });
    assert_eq!(world.sent_to(3), Some(0));
    assert!(world.finish(1).is_empty(), "the end that comes late changes nothing");
    assert_eq!(world.core.worker_view(world.now, WorkerId(0)).unwrap().sent_requests, 1);
}

#[test]
fn a_deadline_is_held_against_measured_rates_only() {
    let mut world = World::with_workers(1, &WorkerSpec { kv_events: true, ..WorkerSpec::default() });
    let soon = |world: &World| Some(world.now.after(Duration::from_millis(500)));
    world.arrive(Request { deadline: soon(&world), ..request(500, 8000) });
    assert_eq!(world.sent_to(500), Some(0), "2000 tokens/s is only a guess");
    world.finish(500);
    calibrate(&mut world, 1, 0, 8000);
    world.arrive(Request { deadline: soon(&world), ..request(600, 8000) });
    assert_eq!(world.refusal(600), Some(Refusal::DeadlineTooShort));
    world.arrive(Request { deadline: soon(&world), ..request(601, 3000) });
    assert_eq!(world.sent_to(601), Some(0));
    let actions = world.arrive(Request { deadline: soon(&world), ..request(602, 3000) });
    assert_eq!(world.refusal(602), Some(Refusal::DeadlineInfeasible), "it would be in time alone");
    assert!(retry_after(&actions) >= Duration::from_secs(1));
}

#[test]
fn backlogged_tenants_share_by_weight_and_a_light_one_does_not_wait_for_a_flood() {
    let mut world = World::with_workers(2, &one_slot());
    world.event(Event::TenantWeight { tenant: TenantId(3), weight: 2.0 });
    for id in 0..600 {
        let tenant = TenantId(1 + (id % 3) as u32);
        world.arrive(Request { tenant, ..request(id, 500) });
    }
    let mut served = [0_u64; 4];
    for round in 0..120 {
        if round == 60 {
            world.arrive(Request { tenant: TenantId(9), ..request(10_000, 500) });
        }
        for id in world.sent() {
            world.first_token(id.0);
            world.wait(100);
            world.finish(id.0);
            if id.0 < 600 {
                served[1 + (id.0 % 3) as usize] += 1;
            } else {
                assert!(round < 64, "the light tenant waited until round {round}");
            }
        }
    }
    assert_eq!(world.stages[&RequestId(10_000)], Stage::Over);
    let [_, a, b, c] = served.map(|count| count as f64);
    assert!((a / b - 1.0).abs() < 0.05 && (c / (a + b) - 1.0).abs() < 0.05, "{served:?}");
}

#[test]
fn a_tenant_that_was_idle_does_not_catch_up() {
    let mut world = World::with_workers(1, &one_slot());
    for id in 0..100 {
        world.arrive(Request { tenant: TenantId(1), ..request(id, 500) });
    }
    let serve = |world: &mut World, rounds: u32| {
        let mut late = 0;
        for _ in 0..rounds {
            let id = world.sent()[0];
            late += u32::from(id.0 >= 1000);
            world.finish(id.0);
        }
        late
    };
    serve(&mut world, 50);
    for id in 1000..1040 {
        world.arrive(Request { tenant: TenantId(2), ..request(id, 500) });
    }
    let late = serve(&mut world, 20);
    assert!((9..=11).contains(&late), "{late} of 20, from the moment it came");
}

#[test]
fn a_worker_that_has_nothing_takes_whatever_it_can_hold() {
    let mut world = World::with_workers(1, &WorkerSpec { kv_tokens: Some(50_000), ..WorkerSpec::default() });
    let full = LoadReport { running: 300, waiting: 9, kv_usage: Some(1.0) };
    world.event(Event::Load { worker: WorkerId(0), report: full });
    world.arrive(Request { sequences: 300, ..request(1, 40_000) });
    world.arrive(request(2, 10));
    assert_eq!((world.sent_to(1), world.sent_to(2)), (Some(0), None));
}

#[test]
fn classes_are_served_in_order() {
    let mut world = World::with_workers(1, &one_slot());
    let order = [(1, Class::Batch), (2, Class::Batch), (3, Class::Default), (4, Class::Interactive)];
    for (id, class) in order {
        world.arrive(Request { class, ..request(id, 100) });
    }
    let mut served = Vec::new();
    while let Some(id) = world.sent().first().copied() {
        served.push(id.0);
        world.finish(id.0);
    }
    assert_eq!(served, [1, 4, 3, 2]);
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
