//! Requests that wait: for a worker, for room at one, and for how long.

use std::time::Duration;

use super::world::{POOL, World, calibrate, one_slot, request, retry_after};
use crate::*;

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
fn a_worker_that_has_nothing_takes_whatever_it_can_hold() {
    let mut world = World::with_workers(1, &WorkerSpec { kv_tokens: Some(50_000), ..WorkerSpec::default() });
    let full = LoadReport { running: 300, waiting: 9, kv_usage: Some(1.0) };
    world.event(Event::Load { worker: WorkerId(0), report: full });
    world.arrive(Request { sequences: 300, ..request(1, 40_000) });
    world.arrive(request(2, 10));
    assert_eq!((world.sent_to(1), world.sent_to(2)), (Some(0), None));
}
