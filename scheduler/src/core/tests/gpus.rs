//! What the GPUs beneath do to those who run on them.

use super::world::{World, request};
use crate::*;

/// Each worker on a GPU of its own, with its number.
fn world(workers: u32) -> World {
    let mut world = World::with_workers(0, &WorkerSpec::default());
    for worker in 0..workers {
        join(&mut world, worker, &[worker]);
    }
    world
}

fn join(world: &mut World, worker: u32, gpus: &[u32]) {
    let gpus = gpus.iter().map(|gpu| GpuId(*gpu)).collect();
    world.join(worker, WorkerSpec { kv_events: true, gpus, ..WorkerSpec::default() });
    world.probed(worker, true);
}

fn says(world: &mut World, gpu: u32, report: GpuReport) {
    world.event(Event::Gpu { gpu: GpuId(gpu), report });
}

/// So many readings, one a second.
fn says_for(world: &mut World, gpu: u32, seconds: u32, report: GpuReport) {
    for _ in 0..seconds {
        says(world, gpu, report);
        world.wait(1000);
    }
    says(world, gpu, report);
}

fn view(world: &World, worker: u32) -> WorkerView {
    world.core.worker_view(world.now, WorkerId(worker)).unwrap()
}

fn used(utilization: f64) -> GpuReport {
    GpuReport { utilization: Some(utilization), ..GpuReport::default() }
}

/// The terms of the newest decision about a request at a worker, by name.
fn term(world: &World, id: u64, worker: u32, name: &str) -> f64 {
    let decision = world.core.explain(RequestId(id)).last().unwrap();
    let candidate = decision.candidates.iter().find(|candidate| candidate.worker == WorkerId(worker)).unwrap();
    candidate.terms[term_names().iter().position(|known| *known == name).unwrap()]
}

fn share_of(world: &mut World, worker: u32, ids: std::ops::RangeInclusive<u64>) -> f64 {
    let all = ids.clone().count();
    for id in ids.clone() {
        world.arrive(request(id, 100));
    }
    ids.filter(|id| world.sent_to(*id) == Some(worker)).count() as f64 / all as f64
}

#[test]
fn a_throttled_gpu_gets_its_part_of_the_load_and_all_of_it_after() {
    let mut world = world(2);
    says(&mut world, 0, GpuReport { derate: 0.25, ..GpuReport::default() });
    assert_eq!((view(&world, 0).prefill_rate, view(&world, 0).gpu_derate), (500.0, 0.25));
    let share = share_of(&mut world, 0, 1..=20);
    assert!((0.15..=0.25).contains(&share), "a fifth of the speed, {share} of the load");
    assert!(term(&world, 20, 0, "gpu_throttle") > 2.9 * term(&world, 20, 0, "prefill"));
    assert_eq!(term(&world, 20, 1, "gpu_throttle"), 0.0);
    (1..=20).for_each(|id| drop(world.finish(id)));
    says(&mut world, 0, GpuReport::default());
    let share = share_of(&mut world, 0, 21..=40);
    assert!((0.45..=0.55).contains(&share), "{share}");
}

#[test]
fn what_a_gpu_said_is_a_lease() {
    let mut world = world(1);
    let hot = GpuReport { derate: 0.5, memory: Some(0.5), ..used(1.0) };
    says_for(&mut world, 0, 12, hot);
    assert!(view(&world, 0).gpu_derate == 0.5 && view(&world, 0).gpu_share < 0.2);
    world.wait(5000);
    assert_eq!(
        (view(&world, 0).gpu_derate, view(&world, 0).gpu_share, view(&world, 0).prefill_rate),
        (1.0, 1.0, 2000.0)
    );
}

#[test]
fn a_fault_ejects_and_a_trial_brings_back() {
    let mut world = world(2);
    let fault = GpuReport { fault: true, ..GpuReport::default() };
    for _ in 0..3 {
        says(&mut world, 0, fault);
        assert_eq!(world.health[&WorkerId(0)], HealthState::Open);
        world.wait(1000);
        says(&mut world, 1, GpuReport::default());
        world.probed(0, true);
    }
    assert_eq!(share_of(&mut world, 0, 1..=10), 0.0);
    let decision = world.core.explain(RequestId(10)).last().unwrap();
    assert_eq!(decision.left_out.as_slice(), [LeftOut { worker: WorkerId(0), why: Unfit::Gpu }]);
    assert!(view(&world, 0).gpu_fault);
    (1..=10).for_each(|id| drop(world.finish(id)));
    world.wait(3999);
    assert_eq!(world.health[&WorkerId(0)], HealthState::Open, "five seconds from the last word of a fault");
    world.wait(1);
    assert_eq!(world.health[&WorkerId(0)], HealthState::HalfOpen);
    let tried = (11..=30).find(|id| {
        world.arrive(request(*id, 100));
        world.sent_to(*id) == Some(0)
    });
    world.first_token(tried.unwrap());
    assert_eq!(world.health[&WorkerId(0)], HealthState::Up);
    says(&mut world, 0, GpuReport::default());
    assert!(!view(&world, 0).gpu_fault);
}

#[test]
fn a_fault_reaches_all_who_run_there_and_nobody_else() {
    let mut world = world(0);
    join(&mut world, 0, &[0]);
    join(&mut world, 1, &[0, 1]);
    join(&mut world, 2, &[1]);
    says(&mut world, 0, GpuReport { fault: true, ..GpuReport::default() });
    let health = [0, 1, 2].map(|worker| view(&world, worker).health);
    assert_eq!(health, [HealthState::Open, HealthState::Open, HealthState::Up]);
    // One that is known no more is nobody's.
    world.event(Event::WorkerLeft { worker: WorkerId(2) });
    says(&mut world, 1, GpuReport { derate: 0.5, ..GpuReport::default() });
    assert_eq!((view(&world, 1).gpu_derate, view(&world, 0).gpu_derate), (0.5, 1.0));
}

#[test]
fn utilization_that_is_not_ours_is_load() {
    let mut world = world(2);
    for _ in 0..12 {
        says(&mut world, 0, used(0.8));
        says(&mut world, 1, used(0.05));
        world.wait(1000);
    }
    let (busy, free) = (view(&world, 0).gpu_share, view(&world, 1).gpu_share);
    assert!((busy - 0.2).abs() < 0.02 && free == 1.0, "{busy} {free}");
    let share = share_of(&mut world, 0, 1..=24);
    assert!((0.1..=0.25).contains(&share), "{share}");
    assert!(term(&world, 24, 0, "gpu_share") > 0.0 && term(&world, 24, 1, "gpu_share") == 0.0);
}

#[test]
fn our_own_work_is_nobody_elses() {
    let mut world = world(1);
    says(&mut world, 0, used(0.0));
    world.arrive(request(1, 100));
    for _ in 0..5 {
        world.wait(1000);
        says(&mut world, 0, used(1.0));
    }
    world.finish(1);
    world.wait(1000);
    says(&mut world, 0, used(1.0));
    assert_eq!(view(&world, 0).gpu_share, 1.0, "a sample reaches back");
    world.wait(1000);
    says(&mut world, 0, used(0.0));
    assert_eq!(view(&world, 0).gpu_share, 1.0);
    // What is measured for each process is known whatever we do there.
    world.arrive(request(2, 100));
    says_for(&mut world, 0, 8, GpuReport { foreign: Some(0.5), ..used(1.0) });
    assert!((view(&world, 0).gpu_share - 0.5).abs() < 0.01);
}

#[test]
fn what_came_past_us_to_an_engine_without_metrics_uses_its_own_process() {
    let mut world = world(1);
    says_for(&mut world, 0, 12, GpuReport { foreign: Some(0.0), ..used(0.8) });
    assert!((view(&world, 0).gpu_share - 0.2).abs() < 0.02);
    let report = LoadReport { running: 0, waiting: 0, kv_usage: None };
    world.event(Event::Load { worker: WorkerId(0), report });
    assert_eq!(view(&world, 0).gpu_share, 1.0, "an engine that says it is idle had the last word");
}

#[test]
fn what_the_engine_explains_is_counted_once() {
    let mut world = world(1);
    says_for(&mut world, 0, 12, used(0.9));
    assert!(view(&world, 0).gpu_share < 0.2);
    let report = LoadReport { running: 4, waiting: 0, kv_usage: None };
    world.event(Event::Load { worker: WorkerId(0), report });
    assert_eq!(view(&world, 0).gpu_share, 1.0);
}

#[test]
fn foreign_load_that_our_work_hides_is_forgotten_in_time() {
    let mut world = world(1);
    says_for(&mut world, 0, 12, used(0.9));
    world.arrive(request(1, 100));
    says_for(&mut world, 0, 12, used(1.0));
    assert!(view(&world, 0).gpu_share < 0.2);
    says_for(&mut world, 0, 10, used(1.0));
    assert_eq!(view(&world, 0).gpu_share, 1.0);
}

#[test]
fn samples_that_fall_on_our_work_or_beside_it_are_no_foreign_load() {
    // half of the time is ours, in turns of 200 ms; a sample sees either all or nothing of it
    let mut world = world(1);
    let mut share: f64 = 1.0;
    for (id, seen) in (1..).zip([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0]) {
        for turn in 0..5 {
            world.arrive(request(10 * id + turn, 100));
            world.wait(100);
            world.finish(10 * id + turn);
            world.wait(100);
        }
        says(&mut world, 0, used(seen));
        share = share.min(view(&world, 0).gpu_share);
    }
    assert!(share > 0.5, "{share}");
    // what is there beside it is seen
    for id in 1001..1009 {
        world.arrive(request(id, 100));
        world.wait(500);
        world.finish(id);
        world.wait(500);
        says(&mut world, 0, used(0.9));
    }
    assert!(view(&world, 0).gpu_share < 0.35, "{}", view(&world, 0).gpu_share);
}

#[test]
fn workers_on_one_gpu_share_it() {
    let mut world = world(0);
    join(&mut world, 0, &[0]);
    join(&mut world, 1, &[0]);
    join(&mut world, 2, &[2]);
    let share = share_of(&mut world, 2, 1..=40);
    assert!((0.4..=0.6).contains(&share), "half of the load for half of the GPUs: {share}");
    let shares = [0, 1, 2].map(|worker| view(&world, worker).gpu_share);
    assert_eq!(shares, [0.5, 0.5, 1.0]);
    for id in 1..=40 {
        if world.sent_to(id) == Some(1) {
            world.finish(id);
        }
    }
    assert_eq!(view(&world, 0).gpu_share, 1.0, "the other has nothing to do");
}

#[test]
fn models_of_one_server_do_not_take_its_gpu_from_one_another() {
    let mut world = World::with_workers(0, &WorkerSpec::default());
    for (worker, server) in [(0, Some(7)), (1, Some(7)), (2, Some(8))] {
        world.join(worker, WorkerSpec { gpus: vec![GpuId(0)], server, ..WorkerSpec::default() });
        world.probed(worker, true);
    }
    (1..=12).for_each(|id| drop(world.arrive(request(id, 100))));
    let shares = [0, 1, 2].map(|worker| view(&world, worker).gpu_share);
    assert_eq!(shares, [0.5, 0.5, 0.5]);
}

#[test]
fn memory_tells_the_pressure_where_the_engine_does_not() {
    let mut world = world(2);
    let holds = |memory| GpuReport { memory: Some(memory), ..GpuReport::default() };
    // one takes all it needs at its start, one as it goes
    for (first, second) in [(0.9, 0.2), (0.9, 0.2), (0.9, 0.84)] {
        says(&mut world, 0, holds(first));
        says(&mut world, 1, holds(second));
    }
    world.arrive(request(1, 100));
    assert_eq!(term(&world, 1, 0, "kv_pressure"), 0.0);
    assert!((term(&world, 1, 1, "kv_pressure") - 0.3 * 4.0).abs() < 1e-6);
    assert_eq!(world.sent_to(1), Some(0));
}
