//! Random schedules: whatever happens, in whatever order, the promises hold.

use std::time::Duration;

use proptest::prelude::*;

use super::world::{POOL, Stage, World, chain};
use crate::core::Place;
use crate::placement::{Ahead, Scene, pays};
use crate::*;

#[derive(Debug, Clone)]
enum Step {
    Arrive(Arrival),
    Cancel(usize),
    First(usize),
    Progress(usize, u32),
    Fail(usize, Failure),
    Prefilled(usize, Option<u64>),
    End(usize, End),
    Join(u32, Option<u64>, u32, bool, Role),
    Drain(u32, bool),
    Leave(u32),
    Probed(u32, bool),
    Load(u32, LoadReport),
    LoadLost(u32),
    Gpu(u32, f64, bool),
    Kv(u32, u8, u64, u32),
    Weight(u32, f64),
    Pool(bool),
    Wait(u64),
}

#[derive(Debug, Clone)]
struct Arrival {
    tenant: u32,
    class: usize,
    prompt: u32,
    seed: u64,
    deadline_ms: Option<u64>,
    sequences: u32,
    streamed: bool,
    same_id: bool,
    splits: bool,
    beside: Option<u32>,
}

const WORKERS: u32 = 5;

fn failure() -> impl Strategy<Value = Failure> {
    prop_oneof![
        1 => Just(Failure::Connect),
        1 => Just(Failure::Reset),
        1 => Just(Failure::Timeout),
        3 => Just(Failure::Status5xx),
        1 => Just(Failure::Malformed),
        1 => (0..20_000_u64).prop_map(|ms| Failure::Overloaded { retry_after: Some(Duration::from_millis(ms)) }),
        1 => Just(Failure::Overloaded { retry_after: None }),
        1 => Just(Failure::Unavailable { retry_after: None }),
    ]
}

fn arrival() -> impl Strategy<Value = Step> {
    let prompt = prop_oneof![0..200_u32, 200..4000_u32, 4000..60_000_u32];
    (
        0..3_u32,
        0..3_usize,
        prompt,
        0..6_u64,
        prop::option::weighted(0.2, 0..5000_u64),
        1..4_u32,
        any::<bool>(),
        prop::bool::weighted(0.05),
        any::<bool>(),
        prop::option::weighted(0.1, 0..WORKERS),
    )
        .prop_map(|(tenant, class, prompt, seed, deadline_ms, sequences, streamed, same_id, splits, beside)| {
            let sequences = if splits { 1 } else { sequences };
            Step::Arrive(Arrival {
                tenant,
                class,
                prompt,
                seed,
                deadline_ms,
                sequences,
                streamed,
                same_id,
                splits,
                beside,
            })
        })
}

fn role() -> impl Strategy<Value = Role> {
    prop_oneof![2 => Just(Role::Both), 1 => Just(Role::Prefill), 1 => Just(Role::Decode)]
}

fn end() -> impl Strategy<Value = End> {
    prop_oneof![
        4 => (0..5000_u32, prop::option::of(0..5000_u32), 0..2000_u32).prop_map(
            |(prompt_tokens, cached_tokens, output_tokens)| End::Finished { prompt_tokens, cached_tokens, output_tokens }
        ),
        1 => failure().prop_map(End::Failed),
        1 => Just(End::Cancelled),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let worker = || 0..WORKERS;
    let kv_usage = prop::option::of(prop_oneof![0.0..1.2_f64, Just(f64::NAN)]);
    prop_oneof![
        12 => arrival(),
        1 => any::<usize>().prop_map(Step::Cancel),
        6 => any::<usize>().prop_map(Step::First),
        2 => (any::<usize>(), 0..3000_u32).prop_map(|(at, tokens)| Step::Progress(at, tokens)),
        2 => (any::<usize>(), failure()).prop_map(|(at, failure)| Step::Fail(at, failure)),
        6 => (any::<usize>(), end()).prop_map(|(at, end)| Step::End(at, end)),
        3 => (any::<usize>(), prop::option::weighted(0.8, 0..3000_u64)).prop_map(|(at, kept)| Step::Prefilled(at, kept)),
        2 => (worker(), prop::option::of(100..100_000_u64), 1..6_u32, any::<bool>(), role())
            .prop_map(|(w, kv, sequences, events, role)| Step::Join(w, kv, sequences, events, role)),
        1 => (worker(), prop::bool::weighted(0.7)).prop_map(|(w, draining)| Step::Drain(w, draining)),
        1 => worker().prop_map(Step::Leave),
        5 => (worker(), prop::bool::weighted(0.8)).prop_map(|(w, healthy)| Step::Probed(w, healthy)),
        2 => (worker(), 0..9_u32, 0..9_u32, kv_usage).prop_map(|(w, running, waiting, kv_usage)| {
            Step::Load(w, LoadReport { running, waiting, kv_usage })
        }),
        1 => worker().prop_map(Step::LoadLost),
        1 => (worker(), prop_oneof![0.0..2.0_f64, Just(f64::NAN)], prop::bool::weighted(0.1)).prop_map(|(w, d, f)| Step::Gpu(w, d, f)),
        2 => (worker(), 0..3_u8, 0..6_u64, 0..200_u32).prop_map(|(w, kind, seed, len)| Step::Kv(w, kind, seed, len)),
        1 => (0..3_u32, prop_oneof![0.1..10.0_f64, Just(0.0), Just(f64::NAN)]).prop_map(|(t, w)| Step::Weight(t, w)),
        1 => prop::bool::weighted(0.1).prop_map(Step::Pool),
        6 => prop_oneof![8 => 0..300_u64, 3 => 0..5000_u64, 1 => 0..90_000_u64].prop_map(Step::Wait),
    ]
}

fn limits() -> PoolLimits {
    PoolLimits { queue_requests_max: 20, queue_bytes_max: 30_000, queue_tokens_max: 100_000, ..PoolLimits::default() }
}

fn pick<T: Copy>(from: &[T], at: usize) -> Option<T> {
    if from.is_empty() { None } else { from.get(at % from.len()).copied() }
}

fn run(world: &mut World, step: &Step) {
    let event = match step.clone() {
        Step::Arrive(arrival) => {
            world.next += u64::from(!arrival.same_id);
            let id = world.next;
            if arrival.same_id
                && world
                    .stages
                    .get(&RequestId(id))
                    .is_none_or(|stage| !matches!(stage, Stage::Waiting | Stage::Sent(_)))
            {
                return;
            }
            Event::Arrived(Request {
                tenant: TenantId(arrival.tenant),
                class: Class::ALL[arrival.class],
                deadline: arrival.deadline_ms.map(|ms| world.now.after(Duration::from_millis(ms))),
                blocks: chain(arrival.seed, arrival.prompt / 16),
                sequences: arrival.sequences,
                streamed: arrival.streamed,
                splits: arrival.splits,
                beside: arrival.beside.map(|worker| (WorkerId(worker), 1)),
                ..super::world::request(id, arrival.prompt)
            })
        }
        Step::Cancel(at) => {
            let live = world.in_stage(|stage| matches!(stage, Stage::Waiting | Stage::Sent(_)));
            let Some(request) = pick(&live, at) else { return };
            Event::Cancelled { request }
        }
        Step::First(at) => {
            let Some(request) = pick(&world.sent(), at) else { return };
            Event::FirstToken { request }
        }
        Step::Progress(at, output_tokens) => {
            let Some(request) = pick(&world.sent(), at) else { return };
            Event::Progress { request, output_tokens }
        }
        Step::Fail(at, failure) => {
            let Some(request) = pick(&world.sent(), at) else { return };
            Event::AttemptFailed { request, failure }
        }
        Step::Prefilled(at, kept) => {
            if let Some(request) = pick(&world.prefilling(), at) {
                world.prefilled(request.0, kept);
            }
            return;
        }
        Step::End(at, end) => {
            let Some(request) = pick(&world.sent(), at) else { return };
            Event::Ended { request, end }
        }
        Step::Join(worker, kv_tokens, sequences_max, kv_events, role) => {
            let gpus = vec![GpuId(worker / 2), GpuId(7)];
            world.join(
                worker,
                WorkerSpec {
                    role,
                    kv_tokens,
                    sequences_max,
                    kv_events,
                    gpus,
                    caches_late: kv_events,
                    ..WorkerSpec::default()
                },
            );
            return;
        }
        Step::Drain(worker, draining) => Event::WorkerDraining { worker: WorkerId(worker), draining },
        Step::Leave(worker) => Event::WorkerLeft { worker: WorkerId(worker) },
        Step::Probed(worker, healthy) => Event::Probed { worker: WorkerId(worker), healthy },
        Step::Load(worker, report) => Event::Load { worker: WorkerId(worker), report },
        Step::LoadLost(worker) => Event::LoadLost { worker: WorkerId(worker) },
        Step::Gpu(worker, derate, fault) => {
            let (utilization, memory) = (Some(derate), Some(1.0 - derate));
            let report = GpuReport { derate, fault, utilization, memory, ..GpuReport::default() };
            Event::Gpu { gpu: GpuId(worker / 2), report }
        }
        Step::Kv(worker, kind, seed, len) => {
            let blocks = chain(seed, len).to_vec();
            let change = match kind {
                0 => KvEvent::Stored { blocks },
                1 => KvEvent::Removed { blocks },
                _ => KvEvent::Cleared,
            };
            Event::Kv { worker: WorkerId(worker), change }
        }
        Step::Weight(tenant, weight) => Event::TenantWeight { tenant: TenantId(tenant), weight },
        Step::Pool(true) => {
            world.event(Event::PoolLeft { pool: POOL });
            world.health.clear();
            Event::PoolJoined { pool: POOL, limits: limits() }
        }
        Step::Pool(false) => {
            Event::PoolJoined { pool: POOL, limits: PoolLimits { queue_requests_max: 3, attempts_max: 2, ..limits() } }
        }
        Step::Wait(ms) => {
            world.wait(ms);
            return;
        }
    };
    if !world.health.is_empty()
        || matches!(event, Event::PoolJoined { .. } | Event::Arrived(_))
        || worker_of(&event).is_none()
    {
        world.event(event);
    }
}

fn worker_of(event: &Event) -> Option<WorkerId> {
    match event {
        Event::WorkerDraining { worker, .. } | Event::WorkerLeft { worker } | Event::Probed { worker, .. } => {
            Some(*worker)
        }
        _ => None,
    }
}

fn play(seed: u64, steps: &[Step]) -> World {
    let mut world = World::new(seed, limits());
    for worker in 0..3 {
        let role = match (seed % 2, worker) {
            (0, _) => Role::Both,
            (_, 0) => Role::Prefill,
            _ => Role::Decode,
        };
        world.join(worker, WorkerSpec { role, kv_tokens: Some(50_000), sequences_max: 4, ..WorkerSpec::default() });
        world.probed(worker, true);
    }
    for step in steps {
        run(&mut world, step);
    }
    world
}

/// No head of a lane would do better, by the rule for moving, at a worker that has room.
fn assert_conserving(core: &mut Core) {
    // room that came with time alone since the last look; and who is a head depends on what others were sent meanwhile, so
    // that one look may make another worth while
    let slots: Vec<_> = core.workers.iter().map(|(slot, _)| slot).collect();
    loop {
        let mut sent = Vec::new();
        slots.iter().for_each(|slot| core.touch(*slot));
        core.settle(&mut sent);
        if sent.is_empty() {
            break;
        }
    }
    let mut prefills = Vec::new();
    for (pool_id, pool) in &core.pools {
        let scene = Scene { now: core.now, config: &core.config, pool, workers: &core.workers };
        assert!(pool.unbound.is_empty() || pool.by_ready.is_empty() || !any_may(core, pool), "{pool_id}");
        for victim in &pool.laden {
            let head = core.workers.get(*victim).and_then(|worker| worker.lane.head(&pool.shares, &pool.fairness));
            // all others wait for more than room
            let Some(id) = head else { continue };
            let entry = &core.requests[&id];
            let Place::Lane(at, standing) = entry.place else { panic!("{id} is in no lane") };
            let worker = core.workers.get(at).unwrap();
            if entry.plan.leg == Leg::Prefill {
                prefills.push(*victim);
                continue;
            }
            assert!(!worker.has_room(core.now, (&entry.request, &entry.plan), standing.uncached, pool, &core.config));
            let asked = scene.asked(&entry.request, &entry.plan);
            let matching = |tokens| scene.matching(&entry.request, tokens);
            let stay = scene.score(&asked, at, matching(entry.matched_tokens()), Ahead::Sent).unwrap().seconds;
            for (_, slot) in &pool.by_ready {
                let held = pool.index.held_by(core.now, *slot, &entry.request.blocks);
                let matched = scene.matched_tokens(&entry.request, held);
                let here = scene.score(&asked, *slot, matching(matched), Ahead::Sent).unwrap();
                let worker = core.workers.get(*slot).unwrap();
                if worker.lane.is_empty()
                    && entry.plan.leg.fits(worker.spec.role)
                    && worker.holds(entry.request.prompt_tokens)
                    && !entry.failed_on.contains(&worker.id)
                    && worker.has_room(
                        core.now,
                        (&entry.request, &entry.plan),
                        here.uncached_tokens,
                        pool,
                        &core.config,
                    )
                {
                    assert!(!pays(&core.config, stay, here.seconds), "{id} waits while {} is free", worker.id);
                }
            }
        }
    }
    // a prompt waits for room at its worker, or at one that goes on
    for slot in prefills {
        let worker = core.workers.get(slot).unwrap();
        let pool = &core.pools[&worker.pool];
        let id = worker.lane.head(&pool.shares, &pool.fairness).unwrap();
        let entry = &core.requests[&id];
        let Place::Lane(_, standing) = entry.place else { panic!("{id} is in no lane") };
        let room = worker.has_room(core.now, (&entry.request, &entry.plan), standing.uncached, pool, &core.config);
        assert!(!room || core.second(id, None).is_none(), "{id} waits while two are free");
    }
}

/// Whether one of those that wait without a worker could have one.
fn any_may(core: &Core, pool: &crate::pool::Pool) -> bool {
    pool.unbound.ids().any(|id| {
        let entry = &core.requests[&id];
        pool.by_ready.iter().any(|(_, slot)| {
            let worker = core.workers.get(*slot).unwrap();
            let fits = Leg::Whole.fits(worker.spec.role) && worker.holds(entry.request.prompt_tokens);
            fits && !entry.failed_on.contains(&worker.id)
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 4096, ..ProptestConfig::with_cases(500) })]

    #[test]
    fn every_request_has_one_outcome_and_everything_is_given_back(
        seed in any::<u64>(),
        steps in prop::collection::vec(step(), 1..150),
    ) {
        let mut world = play(seed, &steps);
        // the world ends: whatever was sent ends, whatever waits runs out of time
        for _ in 0..200 {
            for id in world.prefilling() {
                world.prefilled(id.0, Some(1000));
            }
            for id in world.sent() {
                world.finish(id.0);
            }
            world.wait(1000);
            if world.waiting().is_empty() && world.sent().is_empty() {
                break;
            }
        }
        prop_assert!(world.waiting().is_empty(), "{:?}", world.waiting());
        prop_assert!(world.core.requests.is_empty());
        for view in world.core.worker_views(world.now) {
            prop_assert_eq!((view.sent_requests, view.sent_sequences, view.lane_requests), (0, 0, 0));
            prop_assert_eq!((view.reserved_tokens, view.promised_tokens), (0, 0));
        }
        let view = world.core.pool_view(POOL).unwrap();
        prop_assert_eq!((view.queued_requests, view.queued_tokens, view.queued_bytes), ([0; 3], [0; 3], 0));
    }

    #[test]
    fn negative_marks_end_when_their_cause_does(
        seed in any::<u64>(),
        steps in prop::collection::vec(step(), 1..100),
    ) {
        let mut world = play(seed, &steps);
        // from now on every probe is answered well and every request ends well
        for _ in 0..70 {
            let probed: Vec<u32> = world.wait(1000).iter().filter_map(|action| match action {
                Action::Probe { worker } => Some(worker.0),
                _ => None,
            }).collect();
            for worker in probed {
                world.probed(worker, true);
            }
            for id in world.sent() {
                world.first_token(id.0);
                world.finish(id.0);
            }
        }
        for view in world.core.worker_views(world.now) {
            prop_assert!(view.draining || matches!(view.health, HealthState::Up | HealthState::HalfOpen), "{:?}", view);
            prop_assert_eq!(view.busy, Duration::ZERO);
        }
        // and the pool serves, if there is anyone in it
        if world.core.worker_views(world.now).any(|view| view.role != Role::Prefill && !view.draining) {
            for _ in 0..20 {
                world.next += 1;
                let id = world.next;
                world.arrive(super::world::request(id, 10));
                prop_assert!(world.sent_to(id).is_some());
                world.finish(id);
            }
            prop_assert!(world.core.worker_views(world.now).any(|view| view.health == HealthState::Up));
        }
    }

    #[test]
    fn equal_seeds_and_events_give_equal_actions(
        seed in any::<u64>(),
        steps in prop::collection::vec(step(), 1..100),
    ) {
        prop_assert_eq!(play(seed, &steps).log, play(seed, &steps).log);
    }

    #[test]
    fn nobody_waits_while_another_worker_would_be_better(
        seed in any::<u64>(),
        steps in prop::collection::vec(step(), 1..100),
    ) {
        let mut world = play(seed, &steps);
        world.wait(600);
        for _ in 0..4 {
            if let Some(id) = pick(&world.sent(), 0) {
                world.finish(id.0);
            }
            world.wait(250);
            for worker in world.core.workers.iter().map(|(_, worker)| worker).filter(|worker| !worker.lane.is_empty()) {
                prop_assert!(world.now.since(worker.rescored) <= world.core.config.rescore_every);
            }
        }
        assert_conserving(&mut world.core);
    }
}
