//! LoRA adapters that workers are given when they are asked for.

use proptest::prelude::*;

use super::world::{POOL, Stage, World, request};
use crate::*;

const PLACES: u32 = 2;
const GIB: u64 = 1 << 30;

fn spec() -> WorkerSpec {
    WorkerSpec { adapters_max: PLACES, ..WorkerSpec::default() }
}

fn adapter(id: u32) -> Adapter {
    Adapter { id: AdapterId(id), loadable: true, memory_bytes: 0 }
}

fn ask(world: &mut World, id: u64, of: u32) -> Vec<Action> {
    world.arrive(Request { adapter: Some(adapter(of)), ..request(id, 160) })
}

fn load(worker: u32, of: u32) -> Action {
    Action::LoadAdapter { worker: WorkerId(worker), adapter: AdapterId(of) }
}

fn unload(worker: u32, of: u32) -> Action {
    Action::UnloadAdapter { worker: WorkerId(worker), adapter: AdapterId(of) }
}

fn turned(world: &mut World, worker: u32, of: u32, end: AdapterEnd) -> Vec<Action> {
    world.event(Event::AdapterTurned { worker: WorkerId(worker), adapter: AdapterId(of), end })
}

fn seen(world: &mut World, worker: u32, adapters: &[Adapter]) -> Vec<Action> {
    seen_stale(world, worker, adapters, &[])
}

fn seen_stale(world: &mut World, worker: u32, adapters: &[Adapter], stale: &[u32]) -> Vec<Action> {
    let stale = stale.iter().map(|of| AdapterId(*of)).collect();
    world.event(Event::AdaptersSeen { worker: WorkerId(worker), adapters: adapters.to_vec(), stale })
}

fn changed(world: &mut World, of: u32, change: AdapterChange) -> Vec<Action> {
    world.event(Event::AdapterChanged { pool: POOL, adapter: AdapterId(of), change })
}

/// Of these actions, such as load or unload.
fn turns(actions: &[Action]) -> Vec<Action> {
    let turns = actions.iter().filter(|a| matches!(a, Action::LoadAdapter { .. } | Action::UnloadAdapter { .. }));
    turns.cloned().collect()
}

fn term(world: &World, id: u64, worker: u32) -> f64 {
    let at = term_names().iter().position(|name| *name == "adapter_load").unwrap();
    let decision = world.core.explain(RequestId(id)).last().unwrap();
    decision.candidates.iter().find(|candidate| candidate.worker == WorkerId(worker)).unwrap().terms[at]
}

#[test]
fn an_adapter_is_loaded_once_for_all_who_wait_and_keeps_its_worker() {
    let mut world = World::with_workers(2, &spec());
    let first = turns(&ask(&mut world, 1, 7));
    let [Action::LoadAdapter { worker: WorkerId(w), .. }] = first[..] else { panic!("{first:?}") };
    assert_eq!(term(&world, 1, w), 1.25, "a load is taken to last a second, and costs others a quarter");
    assert_eq!(ask(&mut world, 8, 7), [], "whoever comes at the same moment goes there, too");
    world.wait(400);
    for id in 2..=4 {
        assert_eq!(ask(&mut world, id, 7), [], "it is not told again, and nobody else is");
    }
    assert_eq!((term(&world, 2, w), term(&world, 2, 1 - w)), (0.6, 1.25));
    // whoever needs no adapter does not wait for one
    world.arrive(request(9, 16));
    assert!(world.sent_to(9).is_some());
    turned(&mut world, w, 7, AdapterEnd::Done);
    assert_eq!([1, 2, 3, 4].map(|id| world.sent_to(id)), [Some(w); 4]);
    assert_eq!(turns(&ask(&mut world, 5, 8)), [load(1 - w, 8)], "the other has nothing to do");
    assert_eq!(term(&world, 5, 1 - w), 0.5, "as long as it took the other");
    turned(&mut world, 1 - w, 8, AdapterEnd::Done);
    for id in 1..=5 {
        world.finish(id);
    }
    for id in 10..30 {
        ask(&mut world, id, 7 + (id % 2) as u32);
        assert_eq!(world.sent_to(id), Some(if id % 2 == 0 { w } else { 1 - w }));
        world.finish(id);
    }
}

#[test]
fn the_adapter_unused_for_longest_makes_room_and_none_in_use() {
    let mut world = World::with_workers(1, &spec());
    for (id, of) in [(1, 1), (2, 2)] {
        assert_eq!(turns(&ask(&mut world, id, of)), [load(0, of)]);
        turned(&mut world, 0, of, AdapterEnd::Done);
        world.wait(10);
    }
    world.finish(2);
    assert_eq!(turns(&ask(&mut world, 3, 3)), [unload(0, 2)], "the first is in use");
    assert_eq!(turns(&turned(&mut world, 0, 2, AdapterEnd::Done)), [load(0, 3)]);
    turned(&mut world, 0, 3, AdapterEnd::Done);
    assert_eq!(world.sent_to(3), Some(0));
    // now both are in use: whoever had its place for a turn gets nothing more
    assert_eq!(turns(&ask(&mut world, 4, 4)), []);
    assert_eq!(turns(&world.wait(1900)), []);
    ask(&mut world, 5, 1);
    assert_eq!(world.sent_to(5), Some(0), "it still is that one's turn");
    assert_eq!(turns(&world.wait(700)), []);
    ask(&mut world, 6, 1);
    assert_eq!(world.sent_to(6), None);
    world.finish(1);
    assert_eq!(turns(&world.finish(5)), [unload(0, 1)]);
    assert_eq!(turns(&turned(&mut world, 0, 1, AdapterEnd::Done)), [load(0, 4)]);
    turned(&mut world, 0, 4, AdapterEnd::Done);
    assert_eq!(world.sent_to(4), Some(0));
    // whoever was turned away comes back in turn
    assert_eq!(turns(&world.finish(3)), [unload(0, 3)]);
    assert_eq!(turns(&turned(&mut world, 0, 3, AdapterEnd::Done)), [load(0, 1)]);
    turned(&mut world, 0, 1, AdapterEnd::Done);
    assert_eq!(world.sent_to(6), Some(0));
}

#[test]
fn what_a_worker_has_already_is_asked_there_and_what_it_does_not_list_is_gone() {
    let mut world = World::with_workers(2, &spec());
    let fixed = Adapter { loadable: false, ..adapter(1) };
    seen(&mut world, 1, &[fixed, adapter(2), adapter(3)]);
    world.arrive(Request { adapter: Some(fixed), ..request(1, 16) });
    assert_eq!(world.sent_to(1), Some(1));
    assert_eq!(turns(&ask(&mut world, 2, 3)), []);
    // its own places are two, what it began with beside
    world.finish(1);
    world.finish(2);
    world.fail(2, Failure::Reset);
    seen(&mut world, 1, &[adapter(3)]);
    world.arrive(Request { adapter: Some(fixed), ..request(3, 16) });
    assert_eq!(world.refusal(3), Some(Refusal::AdapterUnavailable));
    // an engine that lost it says so to a request
    ask(&mut world, 4, 3);
    assert_eq!(world.sent_to(4), Some(1));
    world.adapters.remove(&(WorkerId(1), AdapterId(3)));
    let again = turns(&world.fail(4, Failure::NoAdapter));
    assert!(matches!(again[..], [Action::LoadAdapter { .. }]), "{again:?}");
}

#[test]
fn a_load_that_fails_is_a_lease_and_a_refusal_of_all_is_the_clients() {
    let mut world = World::with_workers(2, &spec());
    ask(&mut world, 1, 1);
    let (w, of) = *world.turning.keys().next().unwrap();
    let other = 1 - w.0;
    let next = turns(&turned(&mut world, w.0, of.0, AdapterEnd::Failed));
    assert_eq!(next, [load(other, 1)], "the other is cheaper than to wait");
    let next = turns(&turned(&mut world, other, 1, AdapterEnd::Failed));
    assert_eq!(next, [], "both are left alone for now");
    assert_eq!(turns(&world.wait(5600)), [load(w.0, 1)]);
    assert_eq!(turns(&turned(&mut world, w.0, 1, AdapterEnd::Refused)), [load(other, 1)]);
    turned(&mut world, other, 1, AdapterEnd::Refused);
    assert_eq!(world.refusal(1), Some(Refusal::AdapterUnavailable));
    ask(&mut world, 2, 1);
    assert_eq!(world.refusal(2), Some(Refusal::AdapterUnavailable), "nobody is asked again so soon");
    world.wait(60_000);
    assert!(!turns(&ask(&mut world, 3, 1)).is_empty());
}

#[test]
fn a_load_that_hangs_keeps_nobody_from_another_worker() {
    let mut world = World::with_workers(2, &spec());
    let first = turns(&ask(&mut world, 1, 7));
    let [Action::LoadAdapter { worker: WorkerId(w), .. }] = first[..] else { panic!("{first:?}") };
    (2..=12).for_each(|id| drop(ask(&mut world, id, 7)));
    assert_eq!(turns(&world.wait(1000)), [], "it may come at any moment");
    assert_eq!(turns(&world.wait(2500)), [load(1 - w, 7)], "who waited waits no longer");
    turned(&mut world, 1 - w, 7, AdapterEnd::Done);
    let others: Vec<_> = (1..=12).map(|id| world.sent_to(id)).collect();
    assert_eq!(others, [Some(1 - w); 12]);
    ask(&mut world, 13, 7);
    assert_eq!(world.sent_to(13), Some(1 - w));
    assert_eq!(turns(&world.wait(600_000)), [], "and nobody is told again");
}

#[test]
fn a_pool_that_may_come_to_have_it_is_waited_for() {
    let mut world = World::with_workers(0, &spec());
    world.join(0, WorkerSpec::default());
    ask(&mut world, 1, 1);
    assert_eq!(world.waiting(), [RequestId(1)], "what the worker can is not known yet");
    world.join(0, spec());
    assert_eq!(turns(&world.probed(0, true)), [load(0, 1)]);
    let mut world = World::with_workers(1, &WorkerSpec::default());
    ask(&mut world, 1, 1);
    assert_eq!(world.refusal(1), Some(Refusal::AdapterUnavailable));
}

#[test]
fn memory_that_somebody_has_prevents_a_load() {
    let mut world = World::with_workers(1, &WorkerSpec { gpus: vec![GpuId(0)], ..spec() });
    let says = |world: &mut World, used: f64| {
        let report = GpuReport { memory: Some(used), memory_bytes: Some(80 * GIB), ..GpuReport::default() };
        world.event(Event::Gpu { gpu: GpuId(0), report })
    };
    says(&mut world, 0.99);
    let large = Adapter { memory_bytes: 2 * GIB, ..adapter(1) };
    assert_eq!(turns(&world.arrive(Request { adapter: Some(large), ..request(1, 16) })), []);
    says(&mut world, 0.5);
    assert_eq!(turns(&world.wait(5600)), [load(0, 1)]);
}

/// A world whose workers share a GPU of 80 GiB, and take more adapters than fit.
fn on_one_gpu(workers: u32) -> World {
    World::with_workers(workers, &WorkerSpec { gpus: vec![GpuId(0)], adapters_max: 9, ..WorkerSpec::default() })
}

fn has_free(world: &mut World, gib: u64) -> Vec<Action> {
    let used = (80 - gib) as f64 / 80.0;
    let report = GpuReport { memory: Some(used), memory_bytes: Some(80 * GIB), ..GpuReport::default() };
    let mut actions = world.wait(1000);
    actions.extend(world.event(Event::Gpu { gpu: GpuId(0), report }));
    actions
}

fn ask_large(world: &mut World, id: u64, of: u32) -> Vec<Action> {
    world.arrive(Request { adapter: Some(Adapter { memory_bytes: 4 * GIB, ..adapter(of) }), ..request(id, 160) })
}

#[test]
fn where_memory_lacks_another_adapter_leaves_and_the_gpu_has_the_last_word() {
    let mut world = on_one_gpu(1);
    has_free(&mut world, 6);
    assert_eq!(turns(&ask_large(&mut world, 1, 1)), [load(0, 1)]);
    assert_eq!(turns(&ask_large(&mut world, 2, 2)), [], "the first one's memory counts before it has it");
    turned(&mut world, 0, 1, AdapterEnd::Done);
    assert_eq!(turns(&has_free(&mut world, 2)), [], "the first is in use");
    assert_eq!(turns(&world.finish(1)), [unload(0, 1)]);
    assert_eq!(turns(&turned(&mut world, 0, 1, AdapterEnd::Done)), [], "what the GPU said was before");
    assert_eq!(turns(&has_free(&mut world, 6)), [load(0, 2)]);
    turned(&mut world, 0, 2, AdapterEnd::Done);
    assert_eq!(world.sent_to(2), Some(0));
    // one in use had its turn; what is freed, somebody else takes: nobody can make room any more
    has_free(&mut world, 2);
    world.wait(2000);
    has_free(&mut world, 2);
    assert_eq!(turns(&ask_large(&mut world, 3, 3)), []);
    (0..3).for_each(|_| assert_eq!(turns(&has_free(&mut world, 2)), []));
    assert_eq!(turns(&world.finish(2)), [unload(0, 2)]);
    turned(&mut world, 0, 2, AdapterEnd::Done);
    assert_eq!(turns(&has_free(&mut world, 2)), []);
    assert_eq!(world.waiting(), [RequestId(3)], "it is not refused: the memory may come back");
    (0..4).for_each(|_| assert_eq!(turns(&has_free(&mut world, 6)), [], "it is left alone for a while"));
    assert_eq!(turns(&has_free(&mut world, 6)), [load(0, 3)]);
}

#[test]
fn a_worker_whose_gpu_has_no_memory_costs_more() {
    let mut world = World::with_workers(0, &spec());
    for worker in 0..2 {
        world.join(worker, WorkerSpec { gpus: vec![GpuId(worker)], ..spec() });
        world.probed(worker, true);
    }
    has_free(&mut world, 2);
    assert_eq!(turns(&ask_large(&mut world, 1, 1)), [load(1, 1)]);
    assert_eq!(term(&world, 1, 1), 1.25);
    assert_eq!(term(&world, 1, 0), 1.25 + 5.0 + 2.0, "nobody there can make room");
}

#[test]
fn what_is_configured_no_more_is_unloaded_once_nobody_asks_for_it() {
    let mut world = World::with_workers(1, &WorkerSpec { sequences_max: 1, ..spec() });
    ask(&mut world, 1, 1);
    turned(&mut world, 0, 1, AdapterEnd::Done);
    ask(&mut world, 2, 1);
    assert_eq!((world.sent_to(1), world.sent_to(2)), (Some(0), None), "one at a time");
    assert_eq!(changed(&mut world, 1, AdapterChange::Gone), []);
    world.finish(1);
    assert_eq!(world.sent_to(2), Some(0), "it asked before");
    assert_eq!(turns(&world.finish(2)), [unload(0, 1)]);
    // one that fails is tried again, though nobody asks for anything
    turned(&mut world, 0, 1, AdapterEnd::Failed);
    assert_eq!(turns(&world.wait(4900)), []);
    assert_eq!(turns(&world.wait(200)), [unload(0, 1)]);
    turned(&mut world, 0, 1, AdapterEnd::Refused);
    assert_eq!(turns(&world.wait(59_900)), [], "a refusal stands for a minute");
    assert_eq!(turns(&world.wait(200)), [unload(0, 1)]);
    turned(&mut world, 0, 1, AdapterEnd::Done);
    assert_eq!(world.core.worker_views(world.now).next().unwrap().adapters, []);
    // a server that has it when it returns forgets it, too; and none once it is configured again
    assert_eq!(turns(&seen(&mut world, 0, &[adapter(1)])), [unload(0, 1)]);
    turned(&mut world, 0, 1, AdapterEnd::Done);
    changed(&mut world, 1, AdapterChange::Back);
    assert_eq!(turns(&seen(&mut world, 0, &[adapter(1)])), []);
    // what a worker began with is not ours to unload
    seen(&mut world, 0, &[Adapter { loadable: false, ..adapter(2) }]);
    assert_eq!(turns(&changed(&mut world, 2, AdapterChange::Gone)), []);
}

#[test]
fn a_worker_that_takes_no_adapters_keeps_those_that_it_has() {
    let mut world = World::with_workers(1, &WorkerSpec::default());
    seen(&mut world, 0, &[adapter(1)]);
    for change in [AdapterChange::Gone, AdapterChange::Moved] {
        assert_eq!(turns(&changed(&mut world, 1, change)), []);
    }
    ask(&mut world, 1, 1);
    assert_eq!(world.sent_to(1), Some(0));
}

#[test]
fn an_adapter_whose_files_moved_is_loaded_anew_once_its_requests_ended() {
    let mut world = World::with_workers(1, &spec());
    ask(&mut world, 1, 1);
    turned(&mut world, 0, 1, AdapterEnd::Done);
    assert_eq!(world.sent_to(1), Some(0));
    assert_eq!(turns(&changed(&mut world, 1, AdapterChange::Moved)), [], "it is in use");
    assert_eq!(turns(&ask(&mut world, 2, 1)), []);
    assert_eq!(world.sent_to(2), None, "nothing more is asked of the old files");
    assert_eq!(turns(&world.finish(1)), [unload(0, 1)]);
    turned(&mut world, 0, 1, AdapterEnd::Failed);
    assert_eq!(turns(&world.wait(5600)), [unload(0, 1)]);
    assert_eq!(turns(&turned(&mut world, 0, 1, AdapterEnd::Done)), [load(0, 1)]);
    // files that move while they are loaded may be the old ones
    assert_eq!(turns(&changed(&mut world, 1, AdapterChange::Moved)), []);
    assert_eq!(turns(&turned(&mut world, 0, 1, AdapterEnd::Done)), [unload(0, 1)]);
    assert_eq!(turns(&turned(&mut world, 0, 1, AdapterEnd::Done)), [load(0, 1)]);
    turned(&mut world, 0, 1, AdapterEnd::Done);
    assert_eq!(world.sent_to(2), Some(0));
    world.finish(2);
    // what nobody asks for is not loaded again; and where the engine does not unload, the old files serve
    assert_eq!(turns(&changed(&mut world, 1, AdapterChange::Moved)), [unload(0, 1)]);
    ask(&mut world, 3, 1);
    turned(&mut world, 0, 1, AdapterEnd::Refused);
    assert_eq!(world.sent_to(3), Some(0));
    // a refusal was of the old files
    ask(&mut world, 4, 2);
    turned(&mut world, 0, 2, AdapterEnd::Refused);
    assert_eq!(world.refusal(4), Some(Refusal::AdapterUnavailable));
    changed(&mut world, 2, AdapterChange::Moved);
    assert_eq!(turns(&ask(&mut world, 5, 2)), [load(0, 2)]);
}

#[test]
fn an_adapter_that_a_worker_comes_with_from_other_files_is_loaded_anew() {
    let mut world = World::with_workers(1, &spec());
    assert_eq!(turns(&seen_stale(&mut world, 0, &[adapter(1), adapter(2)], &[1])), [unload(0, 1)]);
    assert_eq!(turns(&ask(&mut world, 1, 1)), []);
    assert_eq!(world.sent_to(1), None);
    assert_eq!(turns(&turned(&mut world, 0, 1, AdapterEnd::Done)), [load(0, 1)]);
    turned(&mut world, 0, 1, AdapterEnd::Done);
    assert_eq!(world.sent_to(1), Some(0));
    world.finish(1);
    // whatever its engine calls the files that we had it load, they are those
    assert_eq!(turns(&seen_stale(&mut world, 0, &[adapter(1), adapter(2)], &[1])), []);
    ask(&mut world, 2, 1);
    assert_eq!(world.sent_to(2), Some(0));
    world.finish(2);
    // where the engine keeps the old ones, they serve; also where it takes none
    seen(&mut world, 0, &[]);
    assert_eq!(turns(&seen_stale(&mut world, 0, &[adapter(1)], &[1])), [unload(0, 1)]);
    turned(&mut world, 0, 1, AdapterEnd::Refused);
    assert_eq!(turns(&seen_stale(&mut world, 0, &[adapter(1)], &[1])), []);
    ask(&mut world, 3, 1);
    assert_eq!(world.sent_to(3), Some(0));
    world.join(0, WorkerSpec { adapters_max: 0, ..spec() });
    assert_eq!(turns(&seen_stale(&mut world, 0, &[adapter(1), adapter(3)], &[3])), []);
    ask(&mut world, 4, 3);
    assert_eq!(world.sent_to(4), Some(0));
}

#[derive(Debug, Clone)]
enum Step {
    Ask(u32),
    Plain,
    Finish(usize),
    Fail(usize),
    Turn(usize, AdapterEnd),
    Seen(u32, Vec<u32>, Vec<u32>),
    Changed(u32, AdapterChange),
    Probed(u32, bool),
    Cancel(usize),
    Places(u32, u32),
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let end = prop_oneof![4 => Just(AdapterEnd::Done), 1 => Just(AdapterEnd::Failed), 1 => Just(AdapterEnd::Refused)];
    let change = prop_oneof![Just(AdapterChange::Gone), Just(AdapterChange::Back), Just(AdapterChange::Moved)];
    prop_oneof![
        6 => (0..5_u32).prop_map(Step::Ask),
        1 => Just(Step::Plain),
        4 => any::<usize>().prop_map(Step::Finish),
        1 => any::<usize>().prop_map(Step::Fail),
        6 => (any::<usize>(), end).prop_map(|(at, end)| Step::Turn(at, end)),
        1 => (0..3_u32, prop::collection::vec(0..5_u32, 0..3), prop::collection::vec(0..4_u32, 0..2))
            .prop_map(|(worker, has, stale)| Step::Seen(worker, has, stale)),
        1 => (0..4_u32, change).prop_map(|(of, change)| Step::Changed(of, change)),
        1 => (0..3_u32, any::<bool>()).prop_map(|(worker, healthy)| Step::Probed(worker, healthy)),
        1 => any::<usize>().prop_map(Step::Cancel),
        1 => (0..3_u32, 0..3_u32).prop_map(|(worker, places)| Step::Places(worker, places)),
        2 => (1..3000_u64).prop_map(Step::Wait),
    ]
}

fn pick<T: Clone>(of: &[T], at: usize) -> Option<T> {
    of.get(at.checked_rem(of.len())?).cloned()
}

fn play(world: &mut World, step: Step) {
    // the fourth is nowhere but where it was from the start
    let adapter = |id| Adapter { loadable: id != 4, ..adapter(id) };
    match step {
        Step::Ask(of) => {
            world.next += 1;
            world.arrive(Request { adapter: Some(adapter(of)), ..request(world.next, 3000) });
        }
        Step::Plain => {
            world.next += 1;
            world.arrive(request(world.next, 3000));
        }
        Step::Finish(at) => drop(pick(&world.sent(), at).map(|id| world.finish(id.0))),
        Step::Fail(at) => {
            if let Some(id) = pick(&world.sent(), at) {
                let asked = world.core.request(id).and_then(|request| request.adapter);
                let failure = if asked.is_some() { Failure::NoAdapter } else { Failure::Status5xx };
                if let (Some(adapter), Some(worker)) = (asked, world.sent_to(id.0)) {
                    world.adapters.remove(&(WorkerId(worker), adapter.id));
                }
                world.fail(id.0, failure);
            }
        }
        Step::Turn(at, end) => {
            let turning: Vec<_> = world.turning.keys().copied().collect();
            if let Some((worker, adapter)) = pick(&turning, at) {
                turned(world, worker.0, adapter.0, end);
            }
        }
        Step::Seen(worker, has, stale) => {
            drop(seen_stale(world, worker, &has.into_iter().map(adapter).collect::<Vec<_>>(), &stale));
        }
        Step::Changed(of, change) => drop(changed(world, of, change)),
        Step::Probed(worker, healthy) => drop(world.probed(worker, healthy)),
        Step::Cancel(at) => {
            if let Some(request) = pick(&world.waiting(), at) {
                world.event(Event::Cancelled { request });
            }
        }
        Step::Places(worker, adapters_max) => drop(world.join(worker, WorkerSpec { adapters_max, ..spec() })),
        Step::Wait(millis) => drop(world.wait(millis)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 4096, ..ProptestConfig::with_cases(400) })]

    /// The world asserts at each step: nothing is sent where its adapter is not or has old files, nothing in use is unloaded,
    /// nobody is told twice. In the end, none is left that is configured no more.
    #[test]
    fn whatever_comes_everybody_has_an_outcome(steps in prop::collection::vec(step(), 1..120)) {
        let mut world = World::with_workers(3, &spec());
        for step in steps {
            play(&mut world, step);
        }
        for worker in 0..3 {
            world.join(worker, spec());
        }
        changed(&mut world, 0, AdapterChange::Gone);
        changed(&mut world, 4, AdapterChange::Gone);
        for _ in 0..300 {
            let probed: Vec<_> = world.wait(1000).into_iter().filter_map(|action| match action {
                Action::Probe { worker } => Some(worker),
                _ => None,
            }).collect();
            for worker in probed {
                world.event(Event::Probed { worker, healthy: true });
            }
            while let Some(((worker, adapter), _)) = world.turning.first_key_value() {
                let (worker, adapter) = (worker.0, adapter.0);
                turned(&mut world, worker, adapter, AdapterEnd::Done);
            }
            for id in world.sent() {
                world.finish(id.0);
            }
            let leaves = |key: &(WorkerId, AdapterId)| key.1 == AdapterId(0);
            if world.waiting().is_empty() && world.sent().is_empty() && !world.adapters.iter().any(leaves) {
                break;
            }
        }
        prop_assert!(!world.adapters.iter().any(|(_, adapter)| *adapter == AdapterId(0)), "{:?}", world.adapters);
        prop_assert!(world.waiting().is_empty(), "{:?}", world.waiting());
        let timed_out = |stage: &Stage| matches!(stage, Stage::Refused(Refusal::TimedOut));
        prop_assert!(world.now > Tick(60_000_000) || !world.stages.values().any(timed_out));
        prop_assert_eq!(world.core.pool_view(POOL).unwrap().queued_requests, [0; 3]);
    }

    /// Few places, many adapters, everything is answered at once: each gets its turn well before the time-out.
    #[test]
    fn nobody_waits_long_for_a_place(asked in prop::collection::vec((0..6_u32, 0..300_u64), 1..80)) {
        let mut world = World::with_workers(2, &spec());
        for (of, millis) in asked {
            world.next += 1;
            let id = world.next;
            ask(&mut world, id, of);
            pass(&mut world, millis);
        }
        for _ in 0..300 {
            pass(&mut world, 100);
        }
        prop_assert_eq!(world.waiting(), []);
        prop_assert_eq!(world.in_stage(|stage| matches!(stage, Stage::Refused(_))), []);
        for view in world.core.worker_views(world.now) {
            prop_assert!(view.adapters.len() <= PLACES as usize, "{:?}", view.adapters);
        }
    }
}

/// What the GPU has free beside these adapters and 67 GiB that are no adapter's.
fn free_gib(world: &World) -> u64 {
    13_u64.saturating_sub(4 * (world.adapters.len() + world.turning.len()) as u64)
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 4096, ..ProptestConfig::with_cases(200) })]

    /// Three adapters fit on the GPU of two workers.
    #[test]
    fn what_is_loaded_fits_and_everybody_gets_it(
        steps in prop::collection::vec((0..4_u8, 0..5_u32, any::<usize>()), 1..80),
    ) {
        let mut world = on_one_gpu(2);
        has_free(&mut world, 13);
        let step = |world: &mut World, (kind, of, at): (u8, u32, usize)| -> Result<(), TestCaseError> {
            let turning: Vec<_> = world.turning.keys().copied().collect();
            match kind {
                0 => {
                    world.next += 1;
                    let id = world.next;
                    ask_large(world, id, of);
                }
                1 => drop(pick(&turning, at).map(|(worker, of)| turned(world, worker.0, of.0, AdapterEnd::Done))),
                2 => drop(pick(&world.sent(), at).map(|id| world.finish(id.0))),
                _ => {
                    let free = free_gib(world);
                    has_free(world, free);
                }
            }
            prop_assert!(world.adapters.len() + world.turning.len() <= 3, "{:?} {:?}", world.adapters, world.turning);
            Ok(())
        };
        for (at, this) in steps.into_iter().enumerate() {
            step(&mut world, this)?;
            if at % 8 == 0 {
                step(&mut world, (3, 0, 0))?;
            }
        }
        for _ in 0..200 {
            (0..4).try_for_each(|at| step(&mut world, (1, 0, at)))?;
            (0..80).try_for_each(|at| step(&mut world, (2, 0, at)))?;
            step(&mut world, (3, 0, 0))?;
        }
        prop_assert_eq!(world.waiting(), []);
    }
}

/// Loads and answers take 50 ms.
fn pass(world: &mut World, millis: u64) {
    let (turning, sent): (Vec<_>, Vec<_>) = (world.turning.keys().copied().collect(), world.sent());
    world.wait(50.min(millis));
    for (worker, adapter) in turning {
        turned(world, worker.0, adapter.0, AdapterEnd::Done);
    }
    for id in sent {
        world.finish(id.0);
    }
    world.wait(millis.saturating_sub(50));
}
