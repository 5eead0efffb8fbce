//! One worker for the prompt and one for the output.

use super::world::{POOL, World, chain, request};
use crate::*;

const PREFILL: u32 = 0;
const PREFILL_TOO: u32 = 1;
const DECODE: u32 = 2;
const DECODE_TOO: u32 = 3;

fn spec(role: Role) -> WorkerSpec {
    WorkerSpec { role, kv_tokens: Some(100_000), ..WorkerSpec::default() }
}

/// Workers of these roles that are up.
fn world_of(workers: &[(u32, WorkerSpec)]) -> World {
    let mut world = World::new(7, PoolLimits::default());
    for (worker, spec) in workers {
        world.join(*worker, spec.clone());
        world.probed(*worker, true);
    }
    world
}

/// Two for prompts, two for what follows.
fn pairs() -> World {
    let roles = [Role::Prefill, Role::Prefill, Role::Decode, Role::Decode];
    world_of(&(0..).zip(roles.map(spec)).collect::<Vec<_>>())
}

fn pair() -> World {
    world_of(&[(PREFILL, spec(Role::Prefill)), (DECODE, spec(Role::Decode))])
}

fn long(id: u64) -> Request {
    Request { splits: true, ..request(id, 4000) }
}

fn sends(actions: &[Action]) -> Vec<(u32, Leg)> {
    let send = |action: &Action| match action {
        Action::Send { worker, leg, .. } => Some((worker.0, *leg)),
        _ => None,
    };
    actions.iter().filter_map(send).collect()
}

/// Requests at a worker, KV tokens held for them, and prompt tokens not computed yet.
fn held(world: &World, worker: u32) -> (u32, u64, u64) {
    let view = world.core.worker_view(world.now, WorkerId(worker)).unwrap();
    (view.sent_requests, view.reserved_tokens, view.promised_tokens)
}

const NOTHING: (u32, u64, u64) = (0, 0, 0);

#[test]
fn both_parts_are_promised_at_once_and_given_back_one_after_the_other() {
    let mut world = pair();
    assert_eq!(sends(&world.arrive(long(1))), [(PREFILL, Leg::Prefill)]);
    assert_eq!(held(&world, PREFILL), (1, 4000, 4000), "the prompt, and no output");
    assert_eq!(held(&world, DECODE), (1, 4112, 0), "prompt and output, and nothing to compute");
    world.wait(500);
    assert_eq!(sends(&world.prefilled(1, Some(20_000))), [(DECODE, Leg::Decode)]);
    assert_eq!((held(&world, PREFILL), held(&world, DECODE)), (NOTHING, (1, 4112, 0)));
    world.first_token(1);
    world.finish(1);
    assert_eq!((held(&world, PREFILL), held(&world, DECODE)), (NOTHING, NOTHING));
}

#[test]
fn both_are_explained_with_their_scores() {
    let mut world = pairs();
    let sent = sends(&world.arrive(long(1)));
    let decisions: Vec<_> = world.core.explain(RequestId(1)).collect();
    let won: Vec<_> = decisions[0].candidates.iter().filter(|one| one.won).map(|one| (one.worker.0, one.leg)).collect();
    assert_eq!((won[0], won[1].1, won.len()), (sent[0], Leg::Decode, 2), "{decisions:?}");
    let weighed = |leg| decisions[0].candidates.iter().filter(|one| one.leg == leg).count();
    assert_eq!([Leg::Prefill, Leg::Decode, Leg::Whole].map(weighed), [2, 2, 0]);
    let then = sends(&world.prefilled(1, Some(1000)));
    assert_eq!(then, [won[1]], "who was chosen at first");
}

#[test]
fn what_gains_nothing_from_two_goes_to_one() {
    for (why, request) in [
        ("short", Request { splits: true, ..request(1, 500) }),
        ("not to be divided", request(1, 4000)),
        ("a second attempt", Request { beside: Some((WorkerId(DECODE_TOO), 1)), ..long(1) }),
    ] {
        assert_eq!(sends(&pairs().arrive(request))[0].1, Leg::Whole, "{why}");
    }
    let mut world = world_of(&[(DECODE, spec(Role::Decode))]);
    assert_eq!(sends(&world.arrive(long(1))), [(DECODE, Leg::Whole)], "nobody for prompts");
    let mut world = pair();
    world.probed(PREFILL, false);
    world.event(Event::WorkerDraining { worker: WorkerId(PREFILL), draining: true });
    assert_eq!(sends(&world.arrive(long(1))), [(DECODE, Leg::Whole)], "nobody for prompts is well");
}

#[test]
fn a_worker_for_prompts_answers_nobody() {
    let mut world = world_of(&[(PREFILL, spec(Role::Prefill))]);
    world.arrive(long(1));
    world.wait(3000);
    assert_eq!(world.refusal(1), Some(Refusal::NoWorker));
    let mut world = pair();
    world.event(Event::WorkerDraining { worker: WorkerId(DECODE), draining: true });
    world.arrive(long(1));
    world.wait(3000);
    assert_eq!(world.refusal(1), Some(Refusal::NoWorker));
}

#[test]
fn each_part_goes_where_its_own_cache_is() {
    let mut world = pairs();
    let conversation = chain(5, 1000);
    let of = |id, tokens: u32| Request {
        blocks: conversation[..tokens as usize / 16].into(),
        prompt_tokens: tokens,
        ..long(id)
    };
    let first = sends(&world.arrive(of(1, 3000)))[0];
    world.wait(1500);
    let then = sends(&world.prefilled(1, Some(1000)))[0];
    world.finish(1);
    for id in 2..8 {
        let sent = sends(&world.arrive(of(id, 2000 + 1000 * id as u32)));
        assert_eq!(sent, [first], "its beginning is there");
        world.wait(500);
        assert_eq!(sends(&world.prefilled(id, Some(1000))), [then], "and there");
        world.finish(id);
    }
    let sent = sends(&world.arrive(of(9, 9010)));
    assert_eq!(sent, [(then.0, Leg::Whole)], "all but a little of it is where it would be fetched to");
}

#[test]
fn a_prompt_waits_until_somebody_can_go_on() {
    let one_slot = WorkerSpec { sequences_max: 1, ..spec(Role::Decode) };
    let mut world = world_of(&[(PREFILL, spec(Role::Prefill)), (DECODE, one_slot)]);
    assert_eq!(sends(&world.arrive(long(1))), [(PREFILL, Leg::Prefill)]);
    assert_eq!(sends(&world.arrive(long(2))), [], "no place to go on");
    assert_eq!(sends(&world.prefilled(1, Some(1000))), [(DECODE, Leg::Decode)]);
    assert_eq!(sends(&world.finish(1)), [(PREFILL, Leg::Prefill)], "as soon as there is one");
    world.event(Event::Cancelled { request: RequestId(2) });
    assert_eq!((held(&world, PREFILL), held(&world, DECODE)), (NOTHING, NOTHING), "who leaves gives both back");
}

#[test]
fn a_prompt_does_not_wait_for_somebody_who_is_gone() {
    let one_slot = WorkerSpec { sequences_max: 1, ..spec(Role::Decode) };
    let mut world = world_of(&[(PREFILL, spec(Role::Prefill)), (DECODE, one_slot)]);
    world.arrive(long(1));
    world.arrive(long(2));
    world.event(Event::WorkerDraining { worker: WorkerId(DECODE), draining: true });
    world.wait(3000);
    assert_eq!(world.refusal(2), Some(Refusal::NoWorker), "after the time that one may take to come");
}

#[test]
fn a_prompt_that_fails_is_computed_elsewhere() {
    let mut world = pairs();
    let first = sends(&world.arrive(long(1)))[0];
    let again = sends(&world.fail(1, Failure::Status5xx));
    assert_eq!(again, [(PREFILL + PREFILL_TOO - first.0, Leg::Prefill)]);
    assert_eq!(held(&world, first.0), NOTHING);
    assert_eq!(held(&world, DECODE).0 + held(&world, DECODE_TOO).0, 1, "one place for the rest");
    let whole = sends(&world.fail(1, Failure::Status5xx));
    assert_eq!(whole[0].1, Leg::Whole, "nobody is left for prompts");
}

#[test]
fn what_could_not_be_begun_is_begun_elsewhere_with_the_same_cache() {
    let failures = [
        (Failure::Connect, Leg::Decode),
        (Failure::Overloaded { retry_after: None }, Leg::Decode),
        (Failure::Reset, Leg::Prefill),
        (Failure::Timeout, Leg::Prefill),
        (Failure::Status5xx, Leg::Whole),
        (Failure::Unavailable { retry_after: None }, Leg::Prefill),
    ];
    for (failure, leg) in failures {
        let mut world = pairs();
        world.arrive(long(1));
        let then = sends(&world.prefilled(1, Some(20_000)))[0];
        let again = sends(&world.fail(1, failure));
        assert_eq!(again.iter().map(|(_, leg)| *leg).collect::<Vec<_>>(), [leg], "{failure}");
        if leg == Leg::Decode {
            assert_eq!(again[0].0, DECODE + DECODE_TOO - then.0, "{failure}");
        }
    }
    let mut world = pairs();
    world.arrive(long(1));
    world.prefilled(1, Some(1000));
    world.wait(1001);
    assert_eq!(sends(&world.fail(1, Failure::Connect))[0].1, Leg::Prefill, "it is kept no more");
}

#[test]
fn a_prompt_that_cannot_be_fetched_is_computed_once_more_and_no_third_time() {
    for gone in [None, Some(0)] {
        let mut world = pairs();
        world.arrive(long(1));
        let whole = sends(&world.prefilled(1, gone));
        assert_eq!(whole[0].1, Leg::Whole, "{gone:?}");
        assert_eq!(held(&world, whole[0].0), (1, 4112, 4000));
        let other = if whole[0].0 == DECODE { DECODE_TOO } else { DECODE };
        assert_eq!(held(&world, other), NOTHING);
        assert_eq!(sends(&world.fail(1, Failure::Reset)), [(other, Leg::Whole)]);
    }
}

#[test]
fn who_was_to_go_on_may_leave_or_fall_ill() {
    let mut world = pairs();
    world.arrive(long(1));
    let (gone, stays) = if held(&world, DECODE).0 == 1 { (DECODE, DECODE_TOO) } else { (DECODE_TOO, DECODE) };
    world.event(Event::WorkerLeft { worker: WorkerId(gone) });
    assert_eq!(sends(&world.prefilled(1, Some(1000))), [(stays, Leg::Decode)]);
    world.finish(1);
    assert_eq!(held(&world, stays), NOTHING);
}

#[test]
fn a_place_that_waits_for_its_prompt_hides_no_load() {
    let mut world = pair();
    world.arrive(long(1));
    let report = LoadReport { running: 0, waiting: 0, kv_usage: Some(0.0) };
    world.event(Event::Load { worker: WorkerId(DECODE), report });
    let view = world.core.worker_view(world.now, WorkerId(DECODE)).unwrap();
    assert!(view.kv_usage.unwrap() >= 0.04, "what is not there yet will come: {view:?}");
}

#[test]
fn a_waiting_rest_does_not_outlast_its_cache() {
    let one_slot = WorkerSpec { sequences_max: 1, ..spec(Role::Decode) };
    let mut world = world_of(&[(PREFILL, spec(Role::Prefill)), (DECODE, one_slot.clone()), (DECODE_TOO, one_slot)]);
    world.arrive(long(1));
    world.arrive(long(2));
    world.prefilled(1, Some(20_000));
    world.prefilled(2, Some(1000));
    assert_eq!(sends(&world.fail(2, Failure::Connect)), [], "the other has no room");
    world.wait(2000);
    assert_eq!(sends(&world.finish(1))[0].1, Leg::Whole);
    assert_eq!(world.core.pool_view(POOL).unwrap().queued_requests, [0; 3]);
}
