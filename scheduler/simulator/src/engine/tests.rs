//! Examples with figures, and properties over random loads.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

fn config() -> EngineConfig {
    EngineConfig { kv_blocks: 100, block_tokens: 4, max_batch: 8, step_token_budget: 32, ..EngineConfig::default() }
}

/// A sequence whose blocks hash as `group`, so that sequences of one group share their prefix.
fn sequence(id: u64, group: u64, prompt_tokens: u32, output_tokens: u32) -> Sequence {
    let blocks = (0..u64::from(prompt_tokens / 4)).map(|at| group * 1000 + at).collect();
    Sequence { id: SequenceId(id), blocks, prompt_tokens, output_tokens }
}

fn run_to_end(engine: &mut Engine) -> Vec<Step> {
    std::iter::from_fn(|| engine.step()).take(100_000).collect()
}

fn emitted(steps: &[Step], id: u64) -> u32 {
    steps.iter().flat_map(|step| &step.emitted).filter(|e| e.id == SequenceId(id)).map(|e| e.tokens).sum()
}

#[test]
fn step_times_follow_the_formula() {
    let mut engine = Engine::new(EngineConfig::default());
    engine.submit(sequence(1, 1, 8000, 3)).unwrap();
    let steps = run_to_end(&mut engine);
    let ms: Vec<f64> = steps.iter().map(|s| (s.duration.as_secs_f64() * 1e5).round() / 100.0).collect();
    // 8000 tokens at 8000 a second plus the step itself, then one sequence that decodes.
    assert_eq!(ms, [1010.6, 11.02, 11.02]);
    assert_eq!(emitted(&steps, 1), 3);
}

#[test]
fn a_rate_of_zero_costs_no_panic() {
    let mut engine = Engine::new(EngineConfig { prefill_tokens_per_s: 0.0, ..config() });
    engine.submit(sequence(1, 1, 4, 1)).unwrap();
    assert_eq!(engine.step().unwrap().duration, Duration::ZERO);
}

#[test]
fn prefill_is_chunked_and_shares_the_budget_with_decode() {
    let mut engine = Engine::new(config());
    engine.submit(sequence(1, 1, 4, 10)).unwrap();
    engine.submit(sequence(2, 2, 60, 1)).unwrap();
    let first = engine.step().unwrap();
    assert_eq!((first.prefill_tokens, first.decode_tokens), (32, 0));
    assert_eq!(first.emitted.len(), 1, "the long prompt is not done yet");
    let second = engine.step().unwrap();
    assert_eq!((second.prefill_tokens, second.decode_tokens), (31, 1));
    let third = engine.step().unwrap();
    assert_eq!((third.prefill_tokens, third.decode_tokens), (1, 1));
    assert!(third.emitted.iter().any(|e| e.id == SequenceId(2) && e.finished && e.first_cached_tokens == Some(0)));
}

#[test]
fn a_cached_prefix_is_not_computed_again() {
    let mut engine = Engine::new(config());
    engine.submit(sequence(1, 7, 22, 1)).unwrap();
    run_to_end(&mut engine);
    engine.submit(sequence(2, 7, 22, 1)).unwrap();
    let step = engine.step().unwrap();
    assert_eq!(step.prefill_tokens, 2, "five blocks of four are cached");
    assert_eq!(step.emitted[0].first_cached_tokens, Some(20));
    let load = engine.load();
    assert_eq!((load.prefix_queries_tokens, load.prefix_hits_tokens, load.prompt_tokens), (44, 20, 44));
}

#[test]
fn a_wholly_cached_prompt_still_computes_its_last_block() {
    let mut engine = Engine::new(config());
    for id in 1..=2 {
        engine.submit(sequence(id, 7, 16, 1)).unwrap();
        let steps = run_to_end(&mut engine);
        assert_eq!(steps[0].prefill_tokens, if id == 1 { 16 } else { 4 });
    }
}

#[test]
fn output_blocks_are_reused_by_the_next_turn() {
    let mut engine = Engine::new(config());
    let turn = Sequence { id: SequenceId(1), blocks: vec![1, 2, 3, 4], prompt_tokens: 8, output_tokens: 9 };
    engine.submit(turn).unwrap();
    run_to_end(&mut engine);
    let next = Sequence { id: SequenceId(2), blocks: vec![1, 2, 3, 4, 5], prompt_tokens: 20, output_tokens: 1 };
    engine.submit(next).unwrap();
    assert_eq!(engine.step().unwrap().prefill_tokens, 4);
}

#[test]
fn idle_blocks_are_evicted_least_recently_used_first_and_reported() {
    let mut engine = Engine::new(EngineConfig { kv_blocks: 5, ..config() });
    let mut events = Vec::new();
    for (id, group) in [(1, 1), (2, 2), (3, 3)] {
        engine.submit(sequence(id, group, 8, 1)).unwrap();
        events.extend(run_to_end(&mut engine).into_iter().flat_map(|step| step.events));
    }
    // Of group 1 the second block goes first, as the prefix is worth more than what extends it.
    use BlockEvent::{Removed, Stored};
    let expect = [1000, 1001, 2000, 2001].map(Stored).into_iter().chain([Removed(1001), Stored(3000), Stored(3001)]);
    assert_eq!(events, expect.collect::<Vec<_>>());
    assert_eq!(engine.load().kv_usage, 0.0, "idle blocks count as free");
}

#[test]
fn out_of_blocks_preempts_the_last_and_recomputes_it() {
    let mut engine = Engine::new(EngineConfig { kv_blocks: 6, ..config() });
    engine.submit(sequence(1, 1, 8, 14)).unwrap();
    engine.submit(sequence(2, 2, 8, 14)).unwrap();
    let steps = run_to_end(&mut engine);
    let preempted: Vec<_> = steps.iter().flat_map(|s| s.preempted.clone()).collect();
    assert_eq!(preempted, [SequenceId(2)]);
    assert_eq!((emitted(&steps, 1), emitted(&steps, 2)), (14, 14));
    assert_eq!(engine.load().preemptions, 1);
    assert_eq!(engine.load().generation_tokens, 28);
    let ends: Vec<_> = steps.iter().flat_map(|s| &s.emitted).filter(|e| e.finished).map(|e| e.id.0).collect();
    assert_eq!(ends, [1, 2]);
}

#[test]
fn a_sequence_over_the_whole_memory_is_refused() {
    let mut engine = Engine::new(EngineConfig { kv_blocks: 5, ..config() });
    assert_eq!(engine.submit(sequence(1, 1, 19, 2)), Err(TooLarge { blocks_needed: 6, kv_blocks: 5 }));
    let huge = Sequence { prompt_tokens: u32::MAX, output_tokens: u32::MAX, ..sequence(1, 1, 4, 1) };
    assert_eq!(engine.submit(huge).unwrap_err().kv_blocks, 5);
    assert!(engine.step().is_none());
    engine.submit(sequence(2, 1, 19, 1)).unwrap();
    assert_eq!(emitted(&run_to_end(&mut engine), 2), 1);
}

#[test]
fn a_pooling_request_ends_with_its_prefill_and_generates_nothing() {
    let mut engine = Engine::new(config());
    engine.submit(sequence(1, 1, 40, 0)).unwrap();
    let steps = run_to_end(&mut engine);
    assert_eq!(steps.len(), 2);
    assert_eq!(
        steps[1].emitted,
        [Emission { id: SequenceId(1), tokens: 0, first_cached_tokens: Some(0), finished: true }]
    );
    assert_eq!(engine.load().generation_tokens, 0);
}

#[test]
fn abort_frees_at_once_in_any_state() {
    let mut engine = Engine::new(EngineConfig { max_batch: 1, ..config() });
    engine.submit(sequence(1, 1, 8, 50)).unwrap();
    engine.submit(sequence(2, 2, 8, 50)).unwrap();
    engine.step().unwrap();
    assert_eq!((engine.load().running, engine.load().waiting), (1, 1));
    assert!(engine.abort(SequenceId(2)));
    assert!(engine.abort(SequenceId(1)));
    assert!(!engine.abort(SequenceId(1)));
    assert_eq!(engine.load(), Load { running: 0, waiting: 0, kv_usage: 0.0, ..engine.load() });
    assert!(engine.step().is_none());
}

#[test]
fn a_finished_sequence_holds_its_place_until_the_step_has_passed() {
    let mut engine = Engine::new(config());
    engine.submit(sequence(1, 1, 8, 1)).unwrap();
    assert!(engine.step().unwrap().emitted[0].finished);
    assert_eq!(engine.load().running, 1);
    assert!(engine.step().is_none());
    assert_eq!((engine.load().running, engine.load().kv_usage), (0, 0.0));
}

/// What a random caller does between two steps.
#[derive(Clone, Debug)]
enum Act {
    Submit { group: u64, prompt: u32, output: u32 },
    Abort { pick: usize },
    Step,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        3 => (0u64..4, 1u32..90, 0u32..30).prop_map(|(group, prompt, output)| Act::Submit { group, prompt, output }),
        1 => any::<usize>().prop_map(|pick| Act::Abort { pick }),
        4 => Just(Act::Step),
    ];
    prop::collection::vec(act, 1..120)
}

proptest! {
    #[test]
    fn every_sequence_ends_and_every_block_comes_back(
        acts in acts(), kv_blocks in 24u32..60, block_tokens in 1u32..9, budget in 1u32..50, max_batch in 1u32..9,
    ) {
        let config = EngineConfig {
            kv_blocks, block_tokens, max_batch, step_token_budget: budget, ..EngineConfig::default()
        };
        let mut engine = Engine::new(config);
        let mut open: BTreeMap<SequenceId, u32> = BTreeMap::new();
        let mut cached = BTreeSet::new();
        let mut preemptions = 0;
        let mut generated = 0;
        let ends = std::iter::repeat_n(Act::Step, 100_000);
        for (number, act) in acts.into_iter().chain(ends).enumerate() {
            match act {
                Act::Submit { group, prompt, output } => {
                    let id = SequenceId(number as u64);
                    let blocks = (0..u64::from(prompt / block_tokens)).map(|at| group * 1000 + at).collect();
                    let fits = (prompt + output).div_ceil(block_tokens) <= kv_blocks;
                    let sequence = Sequence { id, blocks, prompt_tokens: prompt, output_tokens: output };
                    prop_assert_eq!(engine.submit(sequence).is_ok(), fits);
                    if fits {
                        open.insert(id, output);
                    }
                }
                Act::Abort { pick } => {
                    let id = open.keys().nth(pick % open.len().max(1)).copied();
                    if let Some(id) = id {
                        prop_assert!(engine.abort(id));
                        open.remove(&id);
                    }
                }
                Act::Step => {
                    let Some(step) = engine.step() else {
                        prop_assert!(open.is_empty(), "idle with {open:?} open");
                        if number > 120 { break }
                        continue;
                    };
                    prop_assert!(step.prefill_tokens + step.decode_tokens <= budget);
                    prop_assert!(step.duration > Duration::ZERO);
                    for emission in &step.emitted {
                        let left = open.get_mut(&emission.id);
                        prop_assert!(left.is_some(), "{:?} is not open", emission.id);
                        let left = left.unwrap();
                        prop_assert!(*left >= emission.tokens);
                        *left -= emission.tokens;
                        generated += u64::from(emission.tokens);
                        prop_assert_eq!(emission.finished, *left == 0);
                        if emission.finished {
                            open.remove(&emission.id);
                        }
                    }
                    preemptions += step.preempted.len() as u64;
                    for event in step.events {
                        match event {
                            BlockEvent::Stored(hash) => prop_assert!(cached.insert(hash)),
                            BlockEvent::Removed(hash) => prop_assert!(cached.remove(&hash)),
                        }
                    }
                }
            }
            let load = engine.load();
            prop_assert!((0.0..=1.0).contains(&load.kv_usage));
            prop_assert!(load.running <= max_batch);
            prop_assert!(load.prefix_hits_tokens <= load.prefix_queries_tokens);
            prop_assert!(cached.len() <= kv_blocks as usize);
        }
        prop_assert!(open.is_empty());
        let load = engine.load();
        prop_assert_eq!((load.running, load.waiting, load.kv_usage), (0, 0, 0.0));
        prop_assert_eq!((load.preemptions, load.generation_tokens), (preemptions, generated));
    }

    #[test]
    fn equal_calls_give_equal_steps(prompts in prop::collection::vec((0u64..3, 1u32..60, 1u32..20), 1..20)) {
        let run = || {
            let mut engine = Engine::new(EngineConfig { kv_blocks: 30, ..config() });
            for (id, (group, prompt, output)) in prompts.iter().enumerate() {
                engine.submit(sequence(id as u64, *group, *prompt, *output)).unwrap();
            }
            format!("{:?}", run_to_end(&mut engine))
        };
        prop_assert_eq!(run(), run());
    }
}
