//! What an autoscaler is told.

use std::time::Duration;

use super::world::{POOL, World, request};
use crate::*;

fn scale(world: &World) -> ScaleView {
    world.core.scale_view(world.now, POOL).unwrap()
}

#[test]
fn what_runs_and_waits_says_how_many_workers_are_needed() {
    let spec = WorkerSpec { sequences_max: 10, window_tokens: 1 << 20, ..WorkerSpec::default() };
    let mut world = World::with_workers(2, &spec);
    world.wait(3000);
    assert_eq!(scale(&world), ScaleView { desired_workers: 0, drain: Duration::ZERO, idle: Duration::from_secs(3) });
    world.arrive(request(1, 16));
    assert_eq!((scale(&world).desired_workers, scale(&world).idle), (1, Duration::ZERO));
    // Seven of ten slots are as much as a worker should have.
    (2..=14).for_each(|id| drop(world.arrive(request(id, 16))));
    (1..=14).for_each(|id| drop(world.first_token(id)));
    assert_eq!(scale(&world).desired_workers, 2);
    world.arrive(request(15, 16));
    world.first_token(15);
    assert_eq!(scale(&world).desired_workers, 3);
    (1..=15).for_each(|id| drop(world.finish(id)));
    world.wait(2000);
    assert_eq!((scale(&world).desired_workers, scale(&world).idle), (0, Duration::from_secs(2)));
}

#[test]
fn a_pool_without_workers_needs_some_for_what_waits() {
    let mut world = World::new(1, PoolLimits { worker_grace: Duration::from_secs(60), ..PoolLimits::default() });
    world.join(0, WorkerSpec::default());
    world.probed(0, false);
    // 2000 tokens/s are assumed: 140,000 tokens take a worker seventy seconds, and twenty of them five at 0.7.
    (1..=14).for_each(|id| drop(world.arrive(request(id, 10_000))));
    assert_eq!(scale(&world), ScaleView { desired_workers: 20, drain: Duration::from_secs(70), idle: Duration::ZERO });
    assert_eq!(world.core.scale_view(world.now, PoolId(99)), None);
}

/// None that is refused would otherwise ever bring a first worker.
#[test]
fn a_pool_that_none_serves_wants_a_worker_for_a_while_after_a_request() {
    for down in [false, true] {
        let mut world = World::new(1, PoolLimits::default());
        if down {
            world.join(0, WorkerSpec::default());
            world.probed(0, false);
        }
        world.wait(1000);
        assert_eq!(scale(&world).desired_workers, 0, "nobody asked");
        world.arrive(request(1, 16));
        assert_eq!(scale(&world).desired_workers, 1);
        world.wait(119_999);
        assert_eq!(world.refusal(1), Some(Refusal::NoWorker));
        assert_eq!((scale(&world).desired_workers, scale(&world).idle), (1, Duration::from_millis(119_999)));
        world.wait(1);
        assert_eq!(scale(&world).desired_workers, 0);
        world.arrive(request(2, 16));
        world.wait(10_000);
        assert_eq!(scale(&world).desired_workers, 1);
        world.join(0, WorkerSpec::default());
        world.probed(0, true);
        assert_eq!(scale(&world).desired_workers, 0, "it is there");
    }
}
