//! One engine: which tokens the next step computes, for whom, and how long that takes.
//!
//! The scheduling rules are those of vLLM's V1 scheduler: running sequences are served first in the order of their
//! admission, each with one token to decode or a chunk of its prefill; what is left of the step's token budget admits
//! waiting sequences first come, first served. When no KV block is free the sequence admitted last is preempted: its
//! blocks are given back, it goes to the head of the queue, and computes its tokens again later.
//!
//! Time of a step: `step_ms` (weights are read once) + `step_ms_per_seq` for each sequence that decodes + the prefill
//! tokens at `prefill_tokens_per_s`. So prefill slows decode by sharing its step.
//!
//! Invariants: a step never computes more tokens than its budget; blocks in use never exceed `kv_blocks`; every sequence
//! that [`Engine::submit`] accepts finishes or is aborted, since it fits when it runs alone and the one admitted first is
//! never preempted for another.
//!
//! Not here: what the tokens are, sampling, priorities, speculative decoding, LoRA, the time that a transfer of KV
//! between engines takes.

mod blocks;
#[cfg(test)]
mod tests;

use std::{collections::VecDeque, time::Duration};

pub use self::blocks::BlockEvent;
use self::blocks::{Block, Pool};

/// Speed and size of an engine. The defaults are those of one 8-billion-parameter model on one data-centre GPU.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineConfig {
    /// Prompt tokens computed a second when nothing else runs.
    pub prefill_tokens_per_s: f64,
    /// Milliseconds that every step takes, whatever it computes.
    pub step_ms: f64,
    /// Milliseconds that each decoding sequence adds to its step.
    pub step_ms_per_seq: f64,
    /// KV memory, in blocks.
    pub kv_blocks: u32,
    /// Tokens in a KV block; 0 counts as 1.
    pub block_tokens: u32,
    /// Sequences that may run at once; 0 counts as 1.
    pub max_batch: u32,
    /// Tokens, prefill and decode together, that one step may compute; 0 counts as 1.
    pub step_token_budget: u32,
    /// Whether a block can be reused only from the step after the one that computes it. vLLM's can at once, SGLang's cannot.
    pub caches_late: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            prefill_tokens_per_s: 8000.0,
            step_ms: 10.6,
            step_ms_per_seq: 0.42,
            kv_blocks: 62_500,
            block_tokens: 16,
            max_batch: 256,
            step_token_budget: 8192,
            caches_late: false,
        }
    }
}

/// Names a sequence; the caller chooses it and must not reuse one that is still in the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// One generation to run.
#[derive(Clone, Debug)]
pub struct Sequence {
    pub id: SequenceId,
    /// Chained hashes of the full blocks of the prompt, first block first: equal hashes mean equal tokens from the start of
    /// the prompt to the end of that block. May go on with the blocks of the output, where the caller knows it already;
    /// these become reusable as they fill, as an engine caches what it generated.
    pub blocks: Vec<u64>,
    pub prompt_tokens: u32,
    /// Tokens to generate; 0 for a pooling request, which ends with its prefill.
    pub output_tokens: u32,
}

/// The refusal of a sequence that exceeds the whole KV memory, and so could never finish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLarge {
    pub blocks_needed: u32,
    pub kv_blocks: u32,
}

impl std::fmt::Display for TooLarge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sequence needs {} KV blocks, the engine has {}", self.blocks_needed, self.kv_blocks)
    }
}

impl std::error::Error for TooLarge {}

/// What one step did. Its results exist once `duration` has passed.
#[derive(Clone, Debug, Default)]
pub struct Step {
    pub duration: Duration,
    /// Sequences that got a token or ended, in the order of their admission.
    pub emitted: Vec<Emission>,
    /// Sequences that lost their place and wait again.
    pub preempted: Vec<SequenceId>,
    /// Changes of the prefix cache since the step before, in order.
    pub events: Vec<BlockEvent>,
    pub prefill_tokens: u32,
    pub decode_tokens: u32,
}

/// What one sequence got out of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Emission {
    pub id: SequenceId,
    /// New output tokens: 1, or 0 when a pooling request ends.
    pub tokens: u32,
    /// Set with the first emission of a sequence: prompt tokens that were found in the prefix cache.
    pub first_cached_tokens: Option<u32>,
    pub finished: bool,
}

/// Gauges and counters as an engine's metrics would show them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    pub running: u32,
    pub waiting: u32,
    /// Share of the KV blocks that live sequences hold, 0 to 1. Cached blocks that nobody holds count as free.
    pub kv_usage: f64,
    /// Tokens looked up in the prefix cache, once for each sequence.
    pub prefix_queries_tokens: u64,
    /// Tokens of those that were found.
    pub prefix_hits_tokens: u64,
    pub preemptions: u64,
    /// Prompt tokens of sequences whose prefill is done, cached ones included.
    pub prompt_tokens: u64,
    pub generation_tokens: u64,
}

/// Where one sequence stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    pub id: SequenceId,
    /// In the batch; otherwise it waits.
    pub running: bool,
    pub prompt_tokens: u32,
    /// Tokens whose KV is in memory.
    pub computed_tokens: u32,
    pub generated_tokens: u32,
}

/// The engine. Call [`step`](Self::step), let its duration pass, call it again, until it gives `None`; then call it after
/// the next [`submit`](Self::submit).
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    pool: Pool,
    /// In the order of admission.
    running: Vec<Live>,
    waiting: VecDeque<Live>,
    /// Counters only; `load` fills in the gauges.
    counters: Load,
}

/// A sequence inside the engine.
#[derive(Debug)]
struct Live {
    sequence: Sequence,
    /// Output tokens so far; survives preemption.
    emitted: u32,
    /// Tokens whose KV is in memory.
    computed: u32,
    held: Vec<Block>,
    /// Prompt tokens found in the cache at the first admission.
    cached: Option<u32>,
    finished: bool,
}

impl Live {
    /// Tokens whose values are known: the prompt and what was generated.
    fn known(&self) -> u32 {
        self.sequence.prompt_tokens.saturating_add(self.emitted)
    }

    /// Whether the next token to compute is the one generated last, so that the step decodes.
    fn decodes(&self) -> bool {
        self.emitted > 0 && self.known() - self.computed == 1
    }
}

impl Engine {
    #[must_use]
    pub fn new(mut config: EngineConfig) -> Self {
        config.block_tokens = config.block_tokens.max(1);
        config.max_batch = config.max_batch.max(1);
        config.step_token_budget = config.step_token_budget.max(1);
        let pool = Pool::new(config.kv_blocks);
        Self { config, pool, running: Vec::new(), waiting: VecDeque::new(), counters: Load::default() }
    }

    #[must_use]
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Queues a sequence. An empty prompt counts as one token.
    ///
    /// # Errors
    /// Refuses a sequence whose prompt and output exceed the whole KV memory.
    pub fn submit(&mut self, mut sequence: Sequence) -> Result<(), TooLarge> {
        sequence.prompt_tokens = sequence.prompt_tokens.max(1);
        let tokens = u64::from(sequence.prompt_tokens) + u64::from(sequence.output_tokens);
        let blocks = tokens.div_ceil(u64::from(self.config.block_tokens));
        if blocks > u64::from(self.config.kv_blocks) {
            let blocks_needed = u32::try_from(blocks).unwrap_or(u32::MAX);
            return Err(TooLarge { blocks_needed, kv_blocks: self.config.kv_blocks });
        }
        self.waiting.push_back(Live {
            sequence,
            emitted: 0,
            computed: 0,
            held: Vec::new(),
            cached: None,
            finished: false,
        });
        Ok(())
    }

    /// Takes a sequence out, whatever its state, and frees its blocks at once. Returns whether it was there.
    pub fn abort(&mut self, id: SequenceId) -> bool {
        if let Some(at) = self.running.iter().position(|live| live.sequence.id == id) {
            let live = self.running.remove(at);
            self.pool.release(live.held);
            return true;
        }
        match self.waiting.iter().position(|live| live.sequence.id == id) {
            Some(at) => self.waiting.remove(at).is_some(),
            None => false,
        }
    }

    /// Puts blocks that another engine computed into the prefix cache, as far as there is room.
    pub fn fill_cache(&mut self, blocks: &[u64]) {
        self.retire();
        self.pool.fill(blocks);
    }

    /// Empties the prefix cache; returns whether no sequence held a block of it, else nothing is changed.
    pub fn clear_cache(&mut self) -> bool {
        self.retire();
        self.pool.clear()
    }

    /// Computes the next step, or gives `None` when there is nothing to do.
    ///
    /// Sequences that finished in the step before leave the batch now, not earlier: until the step's duration has passed
    /// they still hold their place and their blocks.
    pub fn step(&mut self) -> Option<Step> {
        self.cache_computed();
        self.retire();
        let mut step = Step::default();
        let mut budget = self.config.step_token_budget;
        let mut decoding = 0;
        self.continue_running(&mut step, &mut budget, &mut decoding);
        if step.preempted.is_empty() {
            self.admit(&mut step, &mut budget);
        }
        self.pool.take_events(&mut step.events);
        if step.prefill_tokens + step.decode_tokens == 0 {
            return None;
        }
        step.duration = self.duration(step.prefill_tokens, decoding);
        Some(step)
    }

    #[must_use]
    pub fn load(&self) -> Load {
        let capacity = f64::from(self.config.kv_blocks.max(1));
        Load {
            running: u32::try_from(self.running.len()).unwrap_or(u32::MAX),
            waiting: u32::try_from(self.waiting.len()).unwrap_or(u32::MAX),
            kv_usage: f64::from(self.pool.used()) / capacity,
            ..self.counters
        }
    }

    /// Tokens of a prompt, given by the hashes of its blocks, that are in the prefix cache now.
    #[must_use]
    pub fn cached_tokens(&self, blocks: &[u64]) -> u32 {
        let blocks = blocks.iter().take_while(|hash| self.pool.is_cached(**hash)).count();
        u32::try_from(blocks).unwrap_or(u32::MAX).saturating_mul(self.config.block_tokens)
    }

    /// Sequences inside, running ones first, in the order in which they are served.
    pub fn sequences(&self) -> impl Iterator<Item = Standing> {
        let standing = |live: &Live, running| Standing {
            id: live.sequence.id,
            running,
            prompt_tokens: live.sequence.prompt_tokens,
            computed_tokens: live.computed,
            generated_tokens: live.emitted,
        };
        let running = self.running.iter().map(move |live| standing(live, true));
        running.chain(self.waiting.iter().map(move |live| standing(live, false)))
    }

    fn retire(&mut self) {
        let pool = &mut self.pool;
        self.running.retain_mut(|live| {
            if live.finished {
                pool.release(std::mem::take(&mut live.held));
            }
            !live.finished
        });
    }

    /// Caches what the step before computed, of an engine that does so only then.
    fn cache_computed(&mut self) {
        for live in self.running.iter_mut().filter(|_| self.config.caches_late) {
            let full = (live.computed / self.config.block_tokens) as usize;
            for (block, hash) in live.held.iter_mut().zip(&live.sequence.blocks).take(full) {
                self.pool.publish(block, *hash);
            }
        }
    }

    /// Gives each running sequence its token or its next chunk, preempting from the tail when blocks run out.
    fn continue_running(&mut self, step: &mut Step, budget: &mut u32, decoding: &mut u32) {
        let mut at = 0;
        while *budget > 0 && at < self.running.len() {
            let Some(live) = self.running.get_mut(at) else { break };
            let decodes = live.decodes();
            let tokens = (live.known() - live.computed).min(*budget);
            if !grow(&mut self.pool, live, tokens, &self.config) {
                // The last may be the one that asked; then the loop ends, as nothing stands behind it.
                self.preempt_last(step);
                continue;
            }
            *budget -= tokens;
            if decodes {
                step.decode_tokens += tokens;
                *decoding += 1;
            } else {
                step.prefill_tokens += tokens;
            }
            emit(live, &mut self.counters, step);
            at += 1;
        }
    }

    fn preempt_last(&mut self, step: &mut Step) {
        let Some(mut live) = self.running.pop() else { return };
        self.pool.release(std::mem::take(&mut live.held));
        live.computed = 0;
        self.counters.preemptions += 1;
        step.preempted.push(live.sequence.id);
        self.waiting.push_front(live);
    }

    /// Admits waiting sequences in order until the budget, the batch or the blocks are used up.
    fn admit(&mut self, step: &mut Step, budget: &mut u32) {
        while *budget > 0 && self.running.len() < self.config.max_batch as usize {
            let Some(mut live) = self.waiting.pop_front() else { break };
            // At least one token is always computed, since the engine needs its output.
            let reusable = (live.known() - 1) / self.config.block_tokens;
            let hashes = live.sequence.blocks.iter().take(reusable as usize).copied();
            self.pool.reuse(hashes, &mut live.held);
            let hits = u32::try_from(live.held.len()).unwrap_or(u32::MAX) * self.config.block_tokens;
            live.computed = hits;
            let tokens = (live.known() - live.computed).min(*budget);
            if !grow(&mut self.pool, &mut live, tokens, &self.config) {
                self.pool.release(std::mem::take(&mut live.held));
                live.computed = 0;
                self.waiting.push_front(live);
                break;
            }
            if live.cached.is_none() {
                live.cached = Some(hits);
                self.counters.prefix_queries_tokens += u64::from(live.sequence.prompt_tokens);
                self.counters.prefix_hits_tokens += u64::from(hits);
            }
            *budget -= tokens;
            step.prefill_tokens += tokens;
            emit(&mut live, &mut self.counters, step);
            self.running.push(live);
        }
    }

    fn duration(&self, prefill_tokens: u32, decoding: u32) -> Duration {
        let config = &self.config;
        let seconds = (config.step_ms + config.step_ms_per_seq * f64::from(decoding)) / 1000.0
            + f64::from(prefill_tokens) / config.prefill_tokens_per_s;
        // Out of range only for a configuration that makes no sense, such as a rate of zero.
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::ZERO)
    }
}

/// Computes `tokens` more of a sequence: takes the blocks they need and caches the full ones, unless the engine does so
/// later. Changes nothing and gives `false` when there are too few.
fn grow(pool: &mut Pool, live: &mut Live, tokens: u32, config: &EngineConfig) -> bool {
    let block_tokens = config.block_tokens;
    let computed = live.computed + tokens;
    let needed = computed.div_ceil(block_tokens) as usize;
    if !pool.allocate(needed.saturating_sub(live.held.len()), &mut live.held) {
        return false;
    }
    let full_before = (live.computed / block_tokens) as usize;
    let full_after = (computed / block_tokens) as usize;
    let hashes = live.sequence.blocks.iter();
    let at_once = if config.caches_late { full_before } else { full_after };
    for (block, hash) in live.held.iter_mut().zip(hashes).take(at_once).skip(full_before) {
        pool.publish(block, *hash);
    }
    live.computed = computed;
    true
}

/// Lets a sequence emit its next token when all it knows is computed.
fn emit(live: &mut Live, counters: &mut Load, step: &mut Step) {
    if live.computed < live.known() {
        return;
    }
    let first = live.emitted == 0;
    let tokens = u32::from(live.sequence.output_tokens > 0);
    live.emitted += tokens;
    live.finished = live.emitted >= live.sequence.output_tokens;
    counters.generation_tokens += u64::from(tokens);
    if first {
        counters.prompt_tokens += u64::from(live.sequence.prompt_tokens);
    }
    step.emitted.push(Emission {
        id: live.sequence.id,
        tokens,
        first_cached_tokens: live.cached.filter(|_| first),
        finished: live.finished,
    });
}
