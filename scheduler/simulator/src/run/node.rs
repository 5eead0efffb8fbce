//! One engine of the fleet with what was sent to it, and its state as a rival may read it.

use std::collections::BTreeMap;

use foldhash::HashMap;
use forebay_scheduler::Tick;

use crate::rivals::Ask;
use crate::{Engine, EngineConfig, Load, Row, Sequence, SequenceId, Step};

/// An engine, its step under way, and the requests in it.
pub(crate) struct Node {
    number: u32,
    engine: Engine,
    up: bool,
    /// Speed against the model, faults apart.
    speed: f64,
    /// A fault makes every step so many times as long; 1 when there is none.
    pub(super) slowdown: f64,
    step: Option<Running>,
    /// Counts lives of the engine, so that the end of a step of an earlier life is known.
    life: u32,
    /// Requests sent here and not ended, by number.
    held: BTreeMap<u32, Held>,
    /// Blocks of the prompts of these, with the number of holders.
    promised: HashMap<u64, u32>,
    /// Sum of these numbers.
    holdings: usize,
}

struct Running {
    step: Step,
    from: Tick,
    until: Tick,
}

/// A request at the engine.
pub(super) struct Held {
    /// Prompt tokens that were not in the cache, nor on their way there, when it was sent.
    uncached: u32,
    /// Its first token has come.
    pub(super) started: bool,
    /// Prompt tokens found in the cache, once known.
    pub(super) cached_tokens: u32,
    /// Tokens generated, as far as steps have ended.
    pub(super) generated: u32,
    /// The same, when the scheduler was told last.
    pub(super) told: u32,
}

impl Node {
    pub(super) fn new(number: u32, engine: EngineConfig, speed: f64) -> Self {
        Self {
            number,
            engine: Engine::new(engine),
            up: true,
            speed,
            slowdown: 1.0,
            step: None,
            life: 0,
            held: BTreeMap::new(),
            promised: HashMap::default(),
            holdings: 0,
        }
    }

    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    pub(super) fn is_up(&self) -> bool {
        self.up
    }

    pub(super) fn life(&self) -> u32 {
        self.life
    }

    /// Requests sent and not ended.
    pub(crate) fn requests(&self) -> usize {
        self.held.len()
    }

    /// The engine's own gauges.
    pub(crate) fn load(&self) -> Load {
        self.engine.load()
    }

    /// Tokens of the prompt that are in the engine's cache, or in a prompt that was sent to it.
    pub(crate) fn matched_tokens(&self, ask: &Ask<'_>) -> u32 {
        let held = self.engine.cached_tokens(ask.blocks);
        let block_tokens = self.engine.config().block_tokens;
        let blocks = ask.blocks.iter().skip((held / block_tokens) as usize);
        let promised = blocks.take_while(|block| {
            self.promised.contains_key(*block) || self.engine.cached_tokens(std::slice::from_ref(*block)) > 0
        });
        held + u32::try_from(promised.count()).unwrap_or(u32::MAX).saturating_mul(block_tokens)
    }

    /// Prompt tokens still to compute for the requests here; of the step under way its share that is still to come.
    pub(crate) fn prefill_tokens(&self, now: Tick) -> f64 {
        let inside: u64 = self.engine.sequences().map(|sequence| u64::from(self.to_prefill(&sequence))).sum();
        let under_way = self.step.as_ref().map_or(0.0, |running| {
            let left = running.until.seconds_since(now) / running.until.seconds_since(running.from).max(1e-6);
            f64::from(running.step.prefill_tokens) * left.min(1.0)
        });
        inside as f64 + under_way
    }

    fn to_prefill(&self, sequence: &crate::Standing) -> u32 {
        if sequence.running {
            let known = sequence.prompt_tokens + sequence.generated_tokens;
            return if sequence.generated_tokens == 0 { known - sequence.computed_tokens } else { 0 };
        }
        let number = u32::try_from(sequence.id.0).unwrap_or(u32::MAX);
        self.held.get(&number).map_or(sequence.prompt_tokens, |held| held.uncached)
    }

    /// Prompt tokens of the requests here, and what they have generated.
    pub(crate) fn outstanding_tokens(&self) -> u64 {
        let tokens = |s: crate::Standing| u64::from(s.prompt_tokens) + u64::from(s.generated_tokens);
        self.engine.sequences().map(tokens).sum()
    }

    /// The same, with blocks that several requests share counted once.
    pub(crate) fn context_tokens(&self) -> u64 {
        let shared = (self.holdings - self.promised.len()) as u64;
        self.outstanding_tokens().saturating_sub(shared * u64::from(self.engine.config().block_tokens))
    }

    /// Tokens of the prompt in blocks that requests here hold.
    pub(crate) fn shared_tokens(&self, ask: &Ask<'_>) -> u32 {
        let shared = ask.blocks.iter().take_while(|block| self.promised.contains_key(*block)).count();
        u32::try_from(shared).unwrap_or(u32::MAX).saturating_mul(self.engine.config().block_tokens)
    }

    pub(super) fn cached_tokens(&self, request: u32) -> u32 {
        self.held.get(&request).map_or(0, |held| held.cached_tokens)
    }

    pub(super) fn held(&mut self) -> impl Iterator<Item = (u32, &mut Held)> {
        self.held.iter_mut().map(|(number, held)| (*number, held))
    }

    pub(super) fn held_mut(&mut self, request: u32) -> Option<&mut Held> {
        self.held.get_mut(&request)
    }

    /// Takes a request in. The engine begins with it at its next step.
    pub(super) fn submit(&mut self, now: Tick, number: u32, row: &Row) {
        let ask = Ask::new(now, number, row, self.engine.config().block_tokens);
        let uncached = row.prompt_tokens.saturating_sub(self.matched_tokens(&ask));
        let sequence = Sequence {
            id: SequenceId(u64::from(number)),
            blocks: row.blocks.to_vec(),
            prompt_tokens: row.prompt_tokens,
            output_tokens: row.output_tokens,
        };
        // Rows that fit no engine were refused on arrival.
        if self.engine.submit(sequence).is_err() {
            return;
        }
        for block in &*row.blocks {
            *self.promised.entry(*block).or_default() += 1;
            self.holdings += 1;
        }
        self.held.insert(number, Held { uncached, started: false, cached_tokens: 0, generated: 0, told: 0 });
    }

    /// Forgets a request that ended.
    pub(super) fn forget(&mut self, number: u32, row: &Row) {
        if self.held.remove(&number).is_none() {
            return;
        }
        for block in &*row.blocks {
            if let Some(holders) = self.promised.get_mut(block) {
                *holders -= 1;
                self.holdings -= 1;
                if *holders == 0 {
                    self.promised.remove(block);
                }
            }
        }
    }

    /// Begins the next step, unless one is under way or there is nothing to do. Returns when it ends.
    pub(super) fn begin(&mut self, now: Tick) -> Option<Tick> {
        if self.step.is_some() || !self.up {
            return None;
        }
        let step = self.engine.step()?;
        let until = now.after(step.duration.mul_f64(self.slowdown / self.speed));
        self.step = Some(Running { step, from: now, until });
        Some(until)
    }

    /// The results of the step that ends now.
    pub(super) fn end(&mut self) -> Option<Step> {
        self.step.take().map(|running| running.step)
    }

    /// The process dies. Gives back the requests that were there, with whether their first token had come.
    pub(super) fn crash(&mut self) -> Vec<(u32, bool)> {
        self.up = false;
        self.life += 1;
        self.step = None;
        self.engine = Engine::new(self.engine.config().clone());
        self.promised.clear();
        self.holdings = 0;
        std::mem::take(&mut self.held).into_iter().map(|(number, held)| (number, held.started)).collect()
    }

    pub(super) fn restart(&mut self) {
        self.up = true;
    }
}
