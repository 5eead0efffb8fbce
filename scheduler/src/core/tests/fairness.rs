//! Who goes first, and who is shed when a queue is full.

use std::time::Duration;

use super::world::{POOL, Stage, World, one_slot, request, retry_after};
use crate::*;

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
