//! Where a request goes: filter, candidates, score, winner.
//!
//! The score is a sum of terms in seconds (a table, one file each), so that nothing has to be normalised or weighted
//! against another unit. Ties within 1% are broken at random: breaking them by position sends everything to the first.
//!
//! Not here: when it is sent (`core::settle`), and what waits before it in a lane (`lane`).

mod candidates;
mod policy;
mod terms;

use smallvec::SmallVec;

use crate::config::Config;
use crate::lane::{InTurn, Work};
use crate::outputs::Plan;
use crate::pool::Pool;
use crate::prefix::Matches;
use crate::rng::Rng;
use crate::worker::load::Said;
use crate::worker::{Slot, Speed, Worker, Workers};
use crate::{Policy, Request, Tick, WorkerId};

pub(crate) use terms::TERMS;

/// Scores this close, as a share of the best, are the same.
const TIE_SHARE: f64 = 0.01;
/// Scores this close in seconds are the same.
const TIE_SECONDS: f64 = 1e-4;
/// Moving to another lane for less than this many seconds is noise.
const MOVE_SECONDS_MIN: f64 = 0.01;

/// Names of the score's terms, in the order of [`crate::Candidate::terms`].
#[must_use]
pub fn term_names() -> [&'static str; TERMS.len()] {
    TERMS.map(|(name, _)| name)
}

/// What a decision may look at.
#[derive(Clone, Copy)]
pub(crate) struct Scene<'a> {
    pub(crate) now: Tick,
    pub(crate) config: &'a Config,
    pub(crate) pool: &'a Pool,
    pub(crate) workers: &'a Workers,
}

/// A request, and what is the same of it at every worker.
pub(crate) struct Asked<'a> {
    pub(crate) request: &'a Request,
    plan: &'a Plan,
    /// How a newcomer of its kind stands to others in a lane.
    in_turn: Option<InTurn>,
    /// Prefill speed in tokens/s of a worker whose own is not known.
    fleet_rate: f64,
    overlap_gain: f64,
    adapter_load_seconds: f64,
    /// Seconds that each sequence adds to a token of every other, at the fleet's speed.
    slowdown_seconds: f64,
}

/// One request at one worker: what the terms are computed from.
pub(crate) struct Prospect<'a> {
    pub(crate) now: Tick,
    pub(crate) config: &'a Config,
    pub(crate) request: &'a Request,
    pub(crate) plan: &'a Plan,
    pub(crate) worker: &'a Worker,
    /// Prompt tokens the worker is believed to hold.
    pub(crate) matched_tokens: u32,
    /// Workers that hold as many.
    pub(crate) copies: usize,
    /// Prompt tokens to be computed before those of the request.
    pub(crate) ahead_tokens: f64,
    /// Sequences that stand before the request or run, foreign ones too.
    pub(crate) ahead_sequences: f64,
    /// Prefill speed in tokens/s.
    pub(crate) speed: f64,
    /// The same if its GPUs were all its own and ran as they usually do.
    pub(crate) usual_speed: f64,
    /// Share of their usual speed at which its GPUs run.
    pub(crate) derate: f64,
    /// Share of its GPUs' time that others leave it.
    pub(crate) gpu_share: f64,
    /// What its engine said of its KV cache, see [`Said`].
    pub(crate) reported_kv: Option<(f64, f64)>,
    pub(crate) overlap_gain: f64,
    /// Seconds that a worker takes to load an adapter.
    pub(crate) adapter_load_seconds: f64,
    /// Seconds that each sequence there adds to a token of every other.
    pub(crate) slowdown_seconds: f64,
}

impl Prospect<'_> {
    /// Prompt tokens to be computed for the request.
    pub(crate) fn uncached_tokens(&self) -> u32 {
        self.request.prompt_tokens.saturating_sub(self.matched_tokens)
    }

    /// Seconds of work until the prompt is computed, at the usual speed.
    pub(crate) fn work_seconds(&self) -> f64 {
        (self.ahead_tokens + f64::from(self.uncached_tokens())) / self.usual_speed
    }
}

/// Who stands before a request at a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ahead {
    /// What was sent, and the lane up to its own class: it would be bound there.
    Lane,
    /// Only what was sent: it is the lane's head, or would be sent at once.
    Sent,
}

/// What a worker is believed to hold of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Match {
    pub(crate) tokens: u32,
    /// Workers that hold as many, itself included.
    pub(crate) copies: usize,
}

/// One candidate, scored.
#[derive(Debug, Clone)]
pub(crate) struct Scored {
    pub(crate) slot: Slot,
    pub(crate) matched_tokens: u32,
    pub(crate) uncached_tokens: u32,
    pub(crate) terms: [f64; TERMS.len()],
    pub(crate) seconds: f64,
    pub(crate) first_token_seconds: f64,
    /// Of these, until the worker has prefilled what stands before.
    pub(crate) drain_seconds: f64,
    /// There is work before it.
    pub(crate) waits: bool,
    /// It was measured, so that its prediction may be held against a deadline.
    pub(crate) measured: bool,
}

/// What became of a decision. The winner is an index into the scored candidates.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    Winner(usize),
    /// By measured rates, nobody gives the first token before the deadline.
    Infeasible,
    Nobody,
}

impl<'a> Scene<'a> {
    /// Until when everyone who may take a request asked to be left alone, `first` asked first.
    pub(crate) fn busy_until(&self, first: Slot, failed_on: &[WorkerId]) -> Option<Tick> {
        let now = self.now;
        let busy = |worker: &Worker| Some(worker.busy_until).filter(|until| *until > now);
        busy(self.workers.get(first)?)?;
        let all = self.pool.workers.iter().filter_map(|slot| self.workers.get(*slot));
        let able = all.filter(|worker| worker.is_eligible() && !failed_on.contains(&worker.id));
        able.map(busy).min()?
    }

    /// Whether a second try of the request may go there beside the first: there is room, and nobody waits for it.
    pub(crate) fn is_spare(&self, to: &Scored, asked: (&Request, &Plan)) -> bool {
        self.pool.queue.requests.iter().all(|waiting| *waiting == 0)
            && self
                .workers
                .get(to.slot)
                .is_some_and(|worker| worker.has_room(self.now, asked, to.uncached_tokens, self.pool, self.config))
    }

    /// Weighs the candidates for a request, into `scored`. `at_head`: it is the head of this worker's lane, and was
    /// believed to match so many tokens there when it was bound (by now the index holds what *it* will bring, too).
    pub(crate) fn choose(
        &self,
        (request, plan): (&Request, &Plan),
        failed_on: &[WorkerId],
        at_head: Option<(Slot, u32)>,
        rng: &mut Rng,
        scored: &mut Vec<Scored>,
    ) -> Choice {
        scored.clear();
        if self.pool.limits.policy != Policy::Forebay {
            let picked = policy::pick(self, request, failed_on, self.pool.placed, rng);
            scored.extend(picked.and_then(|slot| {
                let tokens = self.matched_tokens(request, self.pool.index.held_by(self.now, slot, &request.blocks));
                self.score(&self.asked(request, plan), slot, Match { tokens, copies: 1 }, Ahead::Lane)
            }));
            return if scored.is_empty() { Choice::Nobody } else { Choice::Winner(0) };
        }
        let matches = self.pool.index.lookup(self.now, &request.blocks);
        let bound = at_head.map(|(slot, _)| slot);
        let asked = self.asked(request, plan);
        for slot in candidates::gather(self, request, failed_on, bound, &matches, rng) {
            let (tokens, ahead) = match at_head {
                Some((bound, matched)) if bound == slot => (matched, Ahead::Sent),
                _ => (self.matched_tokens(request, held(&matches, slot)), Ahead::Lane),
            };
            let blocks = tokens / self.pool.limits.block_tokens.max(1);
            let copies = if blocks > 0 { matches.iter().filter(|(_, held)| *held >= blocks).count() } else { 0 };
            scored.extend(self.score(&asked, slot, Match { tokens, copies }, ahead));
        }
        let left = request.deadline.map(|deadline| deadline.seconds_since(self.now));
        let in_time = |scored: &Scored| left.is_none_or(|left| scored.first_token_seconds <= left);
        if scored.iter().any(in_time) {
            scored.retain(in_time);
        } else if scored.iter().all(|scored| scored.measured) && !scored.is_empty() {
            return Choice::Infeasible;
        }
        winner(scored, rng)
    }

    /// Whether the worker is there for the request: eligible, large enough, and has not failed it.
    pub(crate) fn may_take(&self, request: &Request, failed_on: &[WorkerId], slot: Slot) -> bool {
        self.workers.get(slot).is_some_and(|worker| {
            worker.is_eligible()
                && worker.holds(request.prompt_tokens)
                && !failed_on.contains(&worker.id)
                && worker.may_have(self.now, request.adapter)
        })
    }

    /// What is the same of a request at every worker.
    pub(crate) fn asked(&self, request: &'a Request, plan: &'a Plan) -> Asked<'a> {
        let fleet_rate = self.pool.fleet_rate();
        Asked {
            request,
            plan,
            in_turn: self.pool.in_turn((request.class, request.tenant)),
            fleet_rate,
            overlap_gain: self.pool.overlap_gain(self.config),
            adapter_load_seconds: self.pool.adapter_seconds(self.config),
            slowdown_seconds: self.pool.pace.slowdown_seconds(),
        }
    }

    /// One request at one worker that holds so much of it.
    pub(crate) fn score(&self, asked: &Asked<'_>, slot: Slot, matched: Match, ahead: Ahead) -> Option<Scored> {
        let prospect = self.prospect(asked, slot, matched, ahead)?;
        let terms = TERMS.map(|(_, seconds)| seconds(&prospect));
        Some(Scored {
            slot,
            matched_tokens: prospect.matched_tokens,
            uncached_tokens: prospect.uncached_tokens(),
            terms,
            seconds: terms.iter().sum(),
            first_token_seconds: terms.iter().take(terms::TO_FIRST_TOKEN).sum(),
            drain_seconds: terms.first().copied().unwrap_or_default(),
            waits: prospect.ahead_tokens > 0.0,
            measured: prospect.worker.measured_rate().is_some(),
        })
    }

    /// Prompt tokens in `held` blocks. The last token is always computed, since an engine needs its logits, and with it
    /// all of its block (vLLM 0.32, `KVCacheManager.get_computed_blocks`).
    pub(crate) fn matched_tokens(&self, request: &Request, held: u32) -> u32 {
        let block = self.pool.limits.block_tokens.max(1);
        held.min(request.prompt_tokens.saturating_sub(1) / block).saturating_mul(block)
    }

    /// So many prompt tokens at a worker that is believed to hold them.
    pub(crate) fn matching(&self, request: &Request, tokens: u32) -> Match {
        let blocks = tokens / self.pool.limits.block_tokens.max(1);
        Match { tokens, copies: self.pool.index.copies(self.now, &request.blocks, blocks) }
    }

    /// Prompt tokens at a worker of this speed before those of a newcomer: ours (of a lane so many), and foreign ones that
    /// wait in the engine.
    pub(crate) fn ahead_tokens(&self, worker: &Worker, said: &Said, speed: f64, lane_tokens: u64) -> f64 {
        let foreign = said.foreign.map_or(0.0, |foreign| {
            (f64::from(foreign.waiting) * self.pool.uncached_mean - foreign.age * speed).max(0.0)
        });
        let ours = worker.backlog_tokens(self.now, speed) + lane_tokens as f64;
        (ours + foreign) * said.margin
    }

    fn prospect<'b>(&'b self, asked: &Asked<'b>, slot: Slot, matched: Match, ahead: Ahead) -> Option<Prospect<'b>> {
        let worker = self.workers.get(slot)?;
        let said = worker.reported.said(self.now, self.config.report_ttl);
        let lane = match ahead {
            Ahead::Lane => worker.lane.before(asked.request.class, asked.in_turn),
            Ahead::Sent => Work::default(),
        };
        let Speed { now: speed, usual: usual_speed, derate, gpu_share } =
            worker.speeds(self.now, asked.fleet_rate, &said);
        Some(Prospect {
            now: self.now,
            config: self.config,
            request: asked.request,
            plan: asked.plan,
            worker,
            matched_tokens: matched.tokens,
            copies: matched.copies,
            ahead_tokens: self.ahead_tokens(worker, &said, speed, lane.tokens),
            ahead_sequences: worker.held.sequences() as f64
                + f64::from(said.foreign.map_or(0, |foreign| foreign.running))
                + lane.sequences as f64,
            speed,
            usual_speed,
            derate,
            gpu_share,
            reported_kv: said.kv,
            overlap_gain: asked.overlap_gain,
            adapter_load_seconds: asked.adapter_load_seconds,
            slowdown_seconds: asked.slowdown_seconds * asked.fleet_rate / speed,
        })
    }
}

/// Whether to move from a lane with score `stay` to one with score `go`.
pub(crate) fn pays(config: &Config, stay: f64, go: f64) -> bool {
    stay - go > (config.move_gain * go.abs()).max(MOVE_SECONDS_MIN)
}

/// Blocks that a worker holds, by a lookup's result.
fn held(matches: &Matches, slot: Slot) -> u32 {
    let at = matches.binary_search_by_key(&slot, |(slot, _)| *slot);
    at.ok().and_then(|at| matches.get(at)).map_or(0, |(_, held)| *held)
}

/// The lowest score, or one of those as good.
fn winner(scored: &[Scored], rng: &mut Rng) -> Choice {
    let Some(best) = scored.iter().map(|scored| scored.seconds).min_by(f64::total_cmp) else {
        return Choice::Nobody;
    };
    let limit = best + (best.abs() * TIE_SHARE).max(TIE_SECONDS);
    let ties: SmallVec<[usize; 32]> =
        scored.iter().enumerate().filter(|(_, scored)| scored.seconds <= limit).map(|(at, _)| at).collect();
    match ties.get(if ties.len() > 1 { rng.below(ties.len()) } else { 0 }) {
        Some(at) => Choice::Winner(*at),
        None => Choice::Nobody,
    }
}
