//! Requests with one long prefix that come together.

use std::sync::Arc;

use super::world::{World, chain, request};
use crate::*;

const SHARED: u32 = 200;

/// With a prefix of 3200 tokens that all of a group have, and 160 of its own.
fn sibling(id: u64, group: u64) -> Request {
    let blocks: Arc<[u64]> = chain(group, SHARED).iter().chain(chain(5000 + id, 10).iter()).copied().collect();
    Request { blocks, ..request(id, (SHARED + 10) * 16) }
}

fn world(caches_late: bool) -> World {
    World::with_workers(1, &WorkerSpec { caches_late, ..WorkerSpec::default() })
}

#[test]
fn siblings_wait_for_the_first_ones_first_token_and_others_do_not() {
    let mut world = world(true);
    for id in 1..=4 {
        world.arrive(sibling(id, 1));
    }
    world.arrive(request(9, 3200));
    assert_eq!([1, 2, 3, 4, 9].map(|id| world.sent_to(id)), [Some(0), None, None, None, Some(0)]);
    assert_eq!(world.core.explain(RequestId(2)).last().unwrap().cause, Cause::Held);
    world.wait(300);
    world.first_token(1);
    assert_eq!([2, 3, 4].map(|id| world.sent_to(id)), [Some(0); 3], "all of the prefix is there");
    world.arrive(sibling(5, 1));
    assert_eq!(world.sent_to(5), Some(0));
}

#[test]
fn an_engine_that_shares_at_once_is_sent_all() {
    let mut world = world(false);
    for id in 1..=4 {
        world.arrive(sibling(id, 1));
    }
    assert_eq!([1, 2, 3, 4].map(|id| world.sent_to(id)), [Some(0); 4]);
}

#[test]
fn a_short_prefix_is_nothing_to_wait_for() {
    let mut world = world(true);
    let short = |id| Request { blocks: chain(1, 5), ..request(id, 90) };
    world.arrive(short(1));
    world.arrive(short(2));
    assert_eq!([1, 2].map(|id| world.sent_to(id)), [Some(0); 2]);
}

#[test]
fn who_is_waited_for_and_never_begins_is_not_waited_for_long() {
    let mut world = world(true);
    world.arrive(sibling(1, 1));
    world.arrive(sibling(2, 1));
    // 3360 tokens at 2000 a second
    world.wait(3400);
    assert_eq!(world.sent_to(2), None);
    world.wait(20);
    assert_eq!(world.sent_to(2), Some(0));
}

#[test]
fn when_the_first_goes_the_next_is_the_first() {
    let mut world = world(true);
    for id in 1..=3 {
        world.arrive(sibling(id, 1));
    }
    world.event(Event::Cancelled { request: RequestId(2) });
    world.event(Event::Cancelled { request: RequestId(1) });
    assert!(world.sent_to(3).is_some());
    world.finish(3);
    assert_eq!(world.core.worker_view(world.now, WorkerId(0)).unwrap().lane_requests, 0);
}
