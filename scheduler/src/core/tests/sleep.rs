//! Models that take turns in the memory of a GPU.

use std::time::Duration;

use proptest::prelude::*;

use super::world::{Stage, World, request};
use crate::*;

const GIB: u64 = 1 << 30;
const RESIDENCY: Duration = Duration::from_secs(30);

/// Models of so many GiB on one GPU of 80, each with a pool and a worker of its number; all sleep but the first `awake`.
fn world(models: &[u64], awake: u32) -> World {
    let mut world = World::with_workers(0, &WorkerSpec::default());
    for (model, gib) in (0..).zip(models) {
        join(&mut world, model, model, &[0], *gib);
        world.event(Event::SleepSeen { worker: WorkerId(model), asleep: model >= awake });
    }
    world
}

fn join(world: &mut World, model: u32, worker: u32, gpus: &[u32], gib: u64) {
    let spec = WorkerSpec {
        gpus: gpus.iter().map(|gpu| GpuId(*gpu)).collect(),
        memory_bytes: Some(gib * GIB),
        gpu_bytes: Some(80 * GIB),
        sleep: Some(SleepSpec { residency: RESIDENCY }),
        ..WorkerSpec::default()
    };
    let worker = WorkerId(worker);
    world.health.insert(worker, HealthState::Unknown);
    world.event(Event::PoolJoined { pool: PoolId(model), limits: PoolLimits::default() });
    world.event(Event::WorkerJoined { worker, pool: PoolId(model), spec });
    world.event(Event::Probed { worker, healthy: true });
}

fn ask(world: &mut World, id: u64, model: u32) -> Vec<Action> {
    world.arrive(Request { pool: PoolId(model), ..request(id, 100) })
}

fn done(world: &mut World, worker: u32, worked: bool) -> Vec<Action> {
    world.event(Event::SleepDone { worker: WorkerId(worker), worked })
}

fn state(world: &World, worker: u32) -> SleepState {
    world.core.worker_view(world.now, WorkerId(worker)).unwrap().sleep.unwrap()
}

fn wake(worker: u32) -> Action {
    Action::Wake { worker: WorkerId(worker) }
}

fn sleep(worker: u32) -> Action {
    Action::Sleep { worker: WorkerId(worker) }
}

/// Of these actions, such as wake or put to sleep.
fn turns(actions: &[Action]) -> Vec<Action> {
    actions.iter().filter(|action| matches!(action, Action::Wake { .. } | Action::Sleep { .. })).cloned().collect()
}

/// What one process takes that is nobody's, as the GPU says now.
fn taken(world: &mut World, gib: u64) -> Vec<Action> {
    let memory = Some(gib as f64 / 80.0);
    let report = GpuReport { memory, memory_bytes: Some(80 * GIB), ..GpuReport::default() };
    world.event(Event::Gpu { gpu: GpuId(0), report })
}

#[test]
fn what_is_cold_is_gathered_and_woken_once() {
    let mut world = world(&[30, 30, 30], 0);
    assert_eq!(turns(&ask(&mut world, 1, 0)), [wake(0)]);
    for id in 2..=5 {
        assert_eq!(ask(&mut world, id, 0), []);
        world.wait(600);
    }
    let decision = world.core.explain(RequestId(1)).next().unwrap();
    let term = term_names().iter().position(|name| *name == "wake").unwrap();
    assert_eq!((decision.winner, decision.candidates[0].terms[term]), (Some(WorkerId(0)), 5.0));
    assert_eq!(world.waiting().len(), 5);
    done(&mut world, 0, true);
    assert_eq!(world.sent().len(), 5);
    // As long as that took is what the next is expected to take.
    world.event(Event::SleepSeen { worker: WorkerId(0), asleep: false });
    world.wait(10_000);
    world.event(Event::SleepSeen { worker: WorkerId(0), asleep: true });
    assert_eq!(world.core.worker_view(world.now, WorkerId(0)).unwrap().wake, Duration::from_millis(2400));
}

#[test]
fn whoever_has_had_nothing_to_do_makes_room() {
    let mut world = world(&[35, 35, 35], 2);
    ask(&mut world, 1, 0);
    world.finish(1);
    world.wait(3000);
    ask(&mut world, 2, 1);
    world.finish(2);
    assert_eq!(turns(&ask(&mut world, 3, 2)), [], "half of a turn is taken to last three and a half seconds");
    assert_eq!(turns(&world.wait(499)), []);
    assert_eq!(turns(&world.wait(1)), [sleep(0)], "the one unused for longer");
    assert_eq!(turns(&done(&mut world, 0, true)), [wake(2)]);
    done(&mut world, 2, true);
    assert_eq!(world.sent_to(3), Some(2));
    assert_eq!([0, 1].map(|worker| state(&world, worker)), [SleepState::Asleep, SleepState::Awake]);
}

#[test]
fn whoever_is_busy_finishes_first_and_comes_back_in_turn() {
    let mut world = world(&[50, 50], 1);
    ask(&mut world, 1, 0);
    ask(&mut world, 2, 1);
    assert_eq!(turns(&world.wait(29_999)), []);
    world.wait(1);
    assert_eq!(state(&world, 0), SleepState::Leaving);
    ask(&mut world, 3, 0);
    assert_eq!(world.sent(), [RequestId(1)], "it gets nothing more");
    assert_eq!(turns(&world.finish(1)), [sleep(0)]);
    assert_eq!(turns(&done(&mut world, 0, true)), [wake(1)]);
    done(&mut world, 1, true);
    assert_eq!(world.sent(), [RequestId(2)]);
    world.finish(2);
    assert_eq!(turns(&world.wait(500)), []);
    assert_eq!(turns(&world.wait(500)), [sleep(1)]);
    assert_eq!(turns(&done(&mut world, 1, true)), [wake(0)]);
    done(&mut world, 0, true);
    assert_eq!(world.sent_to(3), Some(0));
}

#[test]
fn nobody_leaves_for_one_that_is_wanted_no_more() {
    let mut world = world(&[50, 50], 1);
    ask(&mut world, 1, 0);
    world.wait(30_000);
    ask(&mut world, 2, 1);
    world.wait(4_999);
    assert_eq!(state(&world, 0), SleepState::Awake, "what is cold is gathered for a while");
    world.wait(1);
    assert_eq!(state(&world, 0), SleepState::Leaving);
    world.event(Event::Cancelled { request: RequestId(2) });
    assert_eq!(state(&world, 0), SleepState::Awake);
    ask(&mut world, 3, 0);
    assert_eq!(world.sent_to(3), Some(0));
    // It did not become younger by that.
    ask(&mut world, 4, 1);
    world.wait(5_000);
    assert_eq!(state(&world, 0), SleepState::Leaving);
}

#[test]
fn a_wake_that_fails_is_tried_again_later_and_keeps_nobody_out() {
    let mut world = world(&[60, 20], 0);
    ask(&mut world, 1, 0);
    for (id, seconds) in (10..).zip([5, 10, 20, 40, 60, 60]) {
        done(&mut world, 0, false);
        ask(&mut world, id, 0);
        assert_eq!(turns(&world.wait(seconds * 1000 - 1)), []);
        ask(&mut world, 10 * id, 0);
        assert_eq!(turns(&world.wait(500)), [wake(0)], "after {seconds} s");
    }
    done(&mut world, 0, false);
    assert_eq!(turns(&ask(&mut world, 2, 1)), [wake(1)]);
    done(&mut world, 1, true);
    assert_eq!(world.sent_to(2), Some(1));
    assert_eq!(world.health[&WorkerId(0)], HealthState::Up);
}

#[test]
fn memory_of_nobodys_prevents_a_wake() {
    let mut world = world(&[35, 35, 35], 1);
    world.wait(40_000);
    taken(&mut world, 35 + 30);
    assert_eq!(turns(&ask(&mut world, 1, 1)), [sleep(0)], "15 GiB are free, 35 more can be");
    assert_eq!(turns(&done(&mut world, 0, true)), [], "what was read before says nothing");
    world.wait(1000);
    assert_eq!(turns(&taken(&mut world, 60)), []);
    // 20 are free, and nobody could make more.
    assert_eq!(turns(&world.wait(3000)), []);
    taken(&mut world, 30);
    assert_eq!(turns(&world.wait(500)), [wake(1)]);
    done(&mut world, 1, true);
    assert_eq!(world.sent_to(1), Some(1));
    // What a GPU said holds for a while; then the account counts.
    world.wait(1000);
    taken(&mut world, 35 + 20);
    assert_eq!(turns(&ask(&mut world, 2, 2)), []);
    assert_eq!(turns(&world.wait(4000)), []);
    assert_eq!(turns(&world.wait(1500)), [wake(2)]);
}

#[test]
fn nobody_is_put_to_sleep_in_vain() {
    let mut world = world(&[35, 35], 1);
    world.wait(40_000);
    taken(&mut world, 35 + 44);
    // 1 GiB is free and 35 more could be.
    assert_eq!(turns(&ask(&mut world, 1, 1)), [sleep(0)]);
    let mut world = self::world(&[20, 35], 1);
    world.wait(40_000);
    taken(&mut world, 20 + 50);
    assert_eq!(turns(&ask(&mut world, 1, 1)), []);
    assert_eq!(turns(&world.wait(4000)), []);
    assert_eq!((state(&world, 0), state(&world, 1)), (SleepState::Awake, SleepState::Asleep));
}

#[test]
fn what_says_nothing_of_its_size_is_alone() {
    let mut world = World::with_workers(0, &WorkerSpec::default());
    for model in 0..2 {
        join(&mut world, model, model, &[0], 1);
        let spec = WorkerSpec {
            gpus: vec![GpuId(0)],
            sleep: Some(SleepSpec { residency: RESIDENCY }),
            ..WorkerSpec::default()
        };
        world.event(Event::WorkerJoined { worker: WorkerId(model), pool: PoolId(model), spec });
        world.event(Event::SleepSeen { worker: WorkerId(model), asleep: true });
    }
    assert_eq!(turns(&ask(&mut world, 1, 0)), [wake(0)]);
    assert_eq!(turns(&ask(&mut world, 2, 1)), []);
    done(&mut world, 0, true);
    world.finish(1);
    assert_eq!(turns(&world.wait(30_000)), [sleep(0)]);
}

#[test]
fn a_worker_that_is_awake_goes_first_until_a_wake_is_cheaper() {
    let mut world = world(&[20], 1);
    join(&mut world, 0, 9, &[1], 20);
    world.event(Event::SleepSeen { worker: WorkerId(9), asleep: true });
    // 2000 tokens/s assumed, and a wake of 5 s: ten thousand tokens and more are worth it
    let big = |id| Request { pool: PoolId(0), ..request(id, 4000) };
    let waken = (1..=6).map(|id| turns(&world.arrive(big(id)))).position(|turns| turns == [wake(9)]);
    assert_eq!(waken, Some(3));
    assert!((1..=3).all(|id| world.sent_to(id) == Some(0)));
}

#[test]
fn what_others_do_to_an_engine_is_taken_in() {
    let mut world = world(&[50, 50], 1);
    world.event(Event::SleepSeen { worker: WorkerId(0), asleep: true });
    assert_eq!(turns(&ask(&mut world, 1, 1)), [wake(1)]);
    // A poll from before it woke.
    done(&mut world, 1, true);
    world.wait(1000);
    let lag = Event::SleepSeen { worker: WorkerId(1), asleep: true };
    world.core.handle(world.now, lag, &mut Vec::new());
    assert_eq!(state(&world, 1), SleepState::Awake);
}

#[test]
fn one_that_gives_no_answer_is_given_up() {
    let mut world = world(&[50, 50], 0);
    ask(&mut world, 1, 0);
    world.told.clear();
    let asked_again = turns(&world.wait(606_000));
    assert_eq!(asked_again, [], "the request gave up before");
    assert_eq!((world.refusal(1), state(&world, 0)), (Some(Refusal::TimedOut), SleepState::Asleep));
}

/// What is done next, with a worker or a model of that number.
#[derive(Debug, Clone)]
enum Step {
    Ask(u32),
    Finish(usize),
    Cancel(usize),
    Answer(u32, bool),
    Wait(u64),
    Taken(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0_u32..4).prop_map(Step::Ask),
        4 => any::<usize>().prop_map(Step::Finish),
        1 => any::<usize>().prop_map(Step::Cancel),
        5 => ((0_u32..4), prop::bool::weighted(0.9)).prop_map(|(worker, worked)| Step::Answer(worker, worked)),
        4 => (1_u64..12_000).prop_map(Step::Wait),
        1 => (0_u64..60).prop_map(Step::Taken),
    ]
}

proptest! {
    /// Whatever happens: by account all that is awake fits, each is told once at a time ([`World`] sees to that), and
    /// once all goes well every request that waits is served.
    #[test]
    fn what_is_awake_fits_and_nobody_is_forgotten(steps in prop::collection::vec(step(), 1..120)) {
        let sizes = [30, 30, 45, 60];
        let mut world = world(&sizes, 0);
        let mut next = 0;
        for step in steps {
            match step {
                Step::Ask(model) => {
                    next += 1;
                    ask(&mut world, next, model);
                }
                Step::Finish(at) => {
                    let sent = world.sent();
                    if let Some(id) = sent.get(at % sent.len().max(1)) {
                        world.finish(id.0);
                    }
                }
                Step::Cancel(at) => {
                    let waiting = world.waiting();
                    if let Some(request) = waiting.get(at % waiting.len().max(1)).copied() {
                        world.event(Event::Cancelled { request });
                    }
                }
                Step::Answer(worker, worked) if world.told.contains(&WorkerId(worker)) => {
                    done(&mut world, worker, worked);
                }
                Step::Answer(..) => {}
                Step::Wait(millis) => drop(world.wait(millis)),
                Step::Taken(gib) => drop(taken(&mut world, gib)),
            }
            let awake = (0..).zip(sizes).filter(|(worker, _)| {
                let worker = WorkerId(*worker);
                !world.asleep.contains(&worker) || world.told.contains(&worker)
            });
            let gib: u64 = awake.map(|(_, gib)| gib).sum();
            prop_assert!(gib <= 80, "{gib} GiB are awake");
        }
        let waiting = world.waiting();
        for _ in 0..2000 {
            (0..4).filter(|worker| world.told.contains(&WorkerId(*worker))).collect::<Vec<_>>().into_iter()
                .for_each(|worker| drop(done(&mut world, worker, true)));
            world.sent().into_iter().for_each(|id| drop(world.finish(id.0)));
            world.wait(100);
        }
        for id in waiting {
            let stage = world.stages[&id];
            prop_assert!(matches!(stage, Stage::Over | Stage::Refused(Refusal::TimedOut)), "{id} is {stage:?}");
        }
        prop_assert!(world.told.is_empty() && world.waiting().is_empty());
    }
}
