//! One worker as the core sees it: what we promised it, what it says, how fast and how well it is.
//!
//! Invariant: `held` is the sum over `sent`; both change only in [`Worker::hold`], [`Worker::reserve`], [`Worker::started`]
//! and [`Worker::release`].
//! Not here: which request gets which worker (`placement`), and the order of the lane (`lane`).

pub(crate) mod adapters;
pub(crate) mod backlog;
pub(crate) mod beneath;
pub(crate) mod health;
pub(crate) mod kv;
pub(crate) mod latency;
pub(crate) mod load;
mod rate;
pub(crate) mod sleep;
pub(crate) mod step;
pub(crate) mod whole;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::config::Config;
use crate::lane::{Gate, Lane};
use crate::outputs::Plan;
use crate::pool::Pool;
use crate::{Adapter, AdapterId, HealthState, Leg, LoadReport, PoolId, Request, RequestId, Tick, WorkerId, WorkerSpec};
use adapters::Adapters;
use backlog::{Backlog, SendNumber};
use beneath::{Beneath, Reports};
use health::Health;
use kv::Held;
use latency::Latency;
use load::{Reported, Said};
use rate::Rate;
use sleep::{Sleep, SleepState};
use step::Pace;
use whole::{Answer, Before, Whole};

/// Weight of one request in the mean time that requests stay at a worker.
const STAY_WEIGHT: f64 = 0.05;

/// Workers whose measured speeds are no further than this from the pool's median count as equally fast: such differences
/// are noise, and following them sends too much to whoever looked fast of late.
const ALIKE: f64 = 0.2;
/// Share of the time that a busy worker is left alone that is random, so that gateways do not come back together.
const BUSY_JITTER: f64 = 0.25;
/// What others at a worker lose while it loads an adapter, as a share of the time that takes.
const LOAD_BURDEN: f64 = 0.25;
/// Time until a GPU tells what memory was freed: agents read once a second.
const READING_SECONDS: f64 = 1.0;
/// Part of a window below which it counts as empty, so that the next prompt is sent whatever its size.
const EMPTY: f64 = 0.1;

/// How fast it prefills.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Speed {
    /// Tokens/s now.
    pub(crate) now: f64,
    /// The same if its GPUs were all its own and ran as they usually do.
    pub(crate) usual: f64,
    /// Share of their usual speed at which its GPUs run.
    pub(crate) derate: f64,
    /// Share of its GPUs' time that others leave it.
    pub(crate) gpu_share: f64,
}

#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) id: WorkerId,
    pub(crate) pool: PoolId,
    pub(crate) spec: WorkerSpec,
    pub(crate) health: Health,
    pub(crate) latency: Latency,
    pub(crate) draining: bool,
    /// Overloaded by its own account until then.
    pub(crate) busy_until: Tick,
    /// How often in a row it said so without naming a time.
    pub(crate) said_busy: u32,
    /// The request by which a half-open worker is tried.
    pub(crate) trial: Option<RequestId>,
    pub(crate) lane: Lane,
    pub(crate) sent: BTreeSet<RequestId>,
    /// Those that have no first token yet, of what was sent and of what waits in the lane for nobody's prefill.
    pub(crate) unstarted: BTreeSet<RequestId>,
    /// The sum over what was sent.
    pub(crate) held: Held,
    /// Prompt tokens of these that are still computed elsewhere.
    pub(crate) awaited_tokens: u64,
    pub(crate) reported: Reported,
    backlog: Backlog,
    rate: Rate,
    whole: Whole,
    /// Prompt tokens to compute that were ever sent to it (wraps).
    sent_tokens: u64,
    pub(crate) pace: Pace,
    pub(crate) beneath: Beneath,
    pub(crate) sleep: Sleep,
    pub(crate) adapters: Adapters,
    /// Mean seconds that a request stays.
    stay_seconds: Option<f64>,
    /// When its window was empty last and began to be filled.
    filling: Tick,
    pub(crate) rescored: Tick,
    /// Key under which it stands in its pool's order of workers.
    pub(crate) ready_key: Option<Tick>,
    /// Its moment in the timers.
    pub(crate) timer: Option<Tick>,
    /// It may have become able to take more since it was settled last.
    pub(crate) may_take: bool,
    /// It is to be settled.
    pub(crate) touched: bool,
}

impl Worker {
    pub(crate) fn new(now: Tick, id: WorkerId, pool: PoolId, spec: WorkerSpec, config: &Config) -> Self {
        Self {
            id,
            pool,
            spec,
            health: Health::new(now, config),
            latency: Latency::default(),
            draining: false,
            busy_until: Tick::ZERO,
            said_busy: 0,
            trial: None,
            lane: Lane::default(),
            sent: BTreeSet::new(),
            unstarted: BTreeSet::new(),
            held: Held::default(),
            awaited_tokens: 0,
            reported: Reported::default(),
            backlog: Backlog::default(),
            rate: Rate::default(),
            whole: Whole::default(),
            sent_tokens: 0,
            pace: Pace::default(),
            beneath: Beneath::default(),
            sleep: Sleep::new(now, config),
            adapters: Adapters::default(),
            stay_seconds: None,
            filling: now,
            rescored: now,
            ready_key: None,
            timer: None,
            may_take: false,
            touched: false,
        }
    }

    /// Whether requests may be bound to it. A lane on trial takes one.
    pub(crate) fn is_eligible(&self) -> bool {
        self.serves() && (self.health.state() == HealthState::Up || self.lane.is_empty())
    }

    /// Whether what is bound to it may be sent: it serves, and is awake.
    pub(crate) fn may_send(&self) -> bool {
        self.serves() && self.sleep.state() == SleepState::Awake
    }

    /// Seconds until it is awake.
    pub(crate) fn wake_seconds(&self, now: Tick, config: &Config) -> f64 {
        if self.spec.sleep.is_some() { self.sleep.wait_seconds(now, config) } else { 0.0 }
    }

    /// Whether it has the adapter, or may be given it.
    pub(crate) fn may_have(&self, now: Tick, adapter: Option<Adapter>) -> bool {
        adapter.is_none_or(|adapter| self.adapters.may_have(now, adapter, self.spec.adapters_max))
    }

    /// Seconds until it has the adapter, where a load takes so long, another may have to leave first, and memory to be free;
    /// and what others lose by a load that has not begun, so that who comes together is gathered at one worker.
    pub(crate) fn adapter_seconds(&self, now: Tick, adapter: Option<Adapter>, load: f64, config: &Config) -> f64 {
        let Some(adapter) = adapter else { return 0.0 };
        let seconds = self.adapters.wait_seconds(now, adapter.id, load);
        if self.adapters.is_coming(adapter.id) {
            return seconds;
        }
        let lacks = self.beneath.free_bytes(now).map_or(0, |free| adapter.memory_bytes.saturating_sub(free));
        let memory = match lacks {
            0 => 0.0,
            lacks if lacks <= self.adapters.memory_bytes() => READING_SECONDS,
            _ => config.wake_retry.as_secs_f64(),
        };
        let is_full = (lacks > 0 || self.adapters.places_taken() >= self.spec.adapters_max)
            && self.spare_adapter(now, lacks > 0).is_none();
        let turn = || self.stay_seconds.unwrap_or(config.adapter_turn.as_secs_f64());
        seconds + load * LOAD_BURDEN + memory + if is_full { turn() } else { 0.0 }
    }

    /// The adapter that was used longest ago, of those that nothing is asked of here, for its place or for its memory.
    pub(crate) fn spare_adapter(&self, now: Tick, for_memory: bool) -> Option<AdapterId> {
        self.adapters.spare(now, for_memory, |adapter| self.lane.asks_for(adapter) == 0)
    }

    /// Whether requests may be sent to it, now or once it is awake, as far as its health goes.
    pub(crate) fn serves(&self) -> bool {
        !self.draining
            && match self.health.state() {
                HealthState::Up => true,
                HealthState::HalfOpen => self.trial.is_none(),
                HealthState::Unknown | HealthState::Down | HealthState::Open => false,
            }
    }

    /// Whether it is likely to be eligible soon, so that waiting for it is better than giving up.
    pub(crate) fn is_hopeful(&self) -> bool {
        !self.draining && matches!(self.health.state(), HealthState::Unknown | HealthState::HalfOpen)
    }

    /// It cannot take more now. `chance` is in 0..1.
    pub(crate) fn leave_alone(&mut self, now: Tick, asked: Option<Duration>, chance: f64, config: &Config) {
        let lease = match asked {
            Some(asked) => asked,
            // said once, to several requests
            None if self.busy_until > now => return,
            None => {
                let doubled = config.busy_lease.saturating_mul(1 << self.said_busy.min(16));
                self.said_busy = self.said_busy.saturating_add(1);
                doubled.min(config.busy_lease_max).mul_f64(1.0 + BUSY_JITTER * chance)
            }
        };
        self.busy_until = self.busy_until.max(now.after(lease));
    }

    /// Whether the prompt and one token of output fit in its KV cache at all.
    pub(crate) fn holds(&self, prompt_tokens: u32) -> bool {
        self.spec.kv_tokens.is_none_or(|capacity| u64::from(prompt_tokens) < capacity)
    }

    /// What a request will take here.
    pub(crate) fn need(&self, plan: &Plan) -> Held {
        Held::new(plan, self.spec.block_tokens, self.spec.kv_tokens)
    }

    /// Whether the request may be sent now. A worker that has nothing always takes one.
    pub(crate) fn has_room(
        &self,
        now: Tick,
        (request, plan): (&Request, &Plan),
        uncached: u32,
        pool: &Pool,
        config: &Config,
    ) -> bool {
        if !self.may_send() || self.busy_until > now || !self.adapters.has(request.adapter) {
            return false;
        }
        if self.sent.is_empty() {
            return true;
        }
        let said = self.reported.said(now, config.report_ttl);
        let sequences = self.held.sequences() + u64::from(said.foreign.map_or(0, |foreign| foreign.running));
        sequences + u64::from(plan.sequences) <= u64::from(self.spec.sequences_max)
            && self.prefill_has_room(now, request, uncached, pool, config)
            && self.kv_pressure(now, self.need(plan), said.kv, config).is_none_or(|pressure| pressure <= 1.0)
    }

    /// Whether a request may have room at all: the cheap question, before many are asked about.
    pub(crate) fn may_have_room(&self, now: Tick, fleet_rate: f64, config: &Config) -> bool {
        let window = || {
            let speed = self.speed(now, fleet_rate, config);
            self.backlog_tokens(now, speed)
                <= self.full(speed, config.window.max(config.window_busy).max(config.window_yielding))
        };
        self.may_send() && self.busy_until <= now && (self.sent.is_empty() || window())
    }

    /// Tokens to prefill that fill so long a window.
    fn full(&self, speed: f64, window: Duration) -> f64 {
        (window.as_secs_f64() * speed).min(f64::from(self.spec.window_tokens))
    }

    /// Whether so many more tokens may be sent that are not yet prefilled: so few that what comes next is still ours to
    /// decide, and enough for the engine's steps.
    ///
    /// Usually the window is kept full, so that the engine never waits. Work that may have to let others pass (batch,
    /// and a tenant that floods a pool of several) gets a smaller one, which is filled when it is empty and then left
    /// alone: engines that are filled at different times leave one that is nearly ready for whoever comes with a right
    /// to go first. That costs such work some throughput, since the engine's steps are smaller.
    fn prefill_has_room(&self, now: Tick, request: &Request, uncached: u32, pool: &Pool, config: &Config) -> bool {
        let speed = self.speed(now, pool.fleet_rate(), config);
        let yields = pool.yields(now, request);
        let full = self.full(speed, if yields { config.window_yielding } else { pool.window(config) });
        let backlog = self.backlog_tokens(now, speed);
        if yields {
            backlog <= full * EMPTY || (self.filling == now && backlog + f64::from(uncached) <= full)
        } else {
            backlog <= full * EMPTY || backlog + f64::from(uncached) <= full
        }
    }

    /// Share of the KV cache that will be in use at most with `more`: by our own account, corrected by what the engine
    /// said last (prompts that share blocks take less than their sum, what came past us takes more).
    pub(crate) fn kv_pressure(
        &self,
        now: Tick,
        more: Held,
        reported: Option<(f64, f64)>,
        config: &Config,
    ) -> Option<f64> {
        let Some(capacity) = self.spec.kv_tokens else { return reported.map(|(share, _)| share) };
        let beyond = reported.map_or(0.0, |(_, beyond)| beyond);
        let peak = self.held.plus(more).peak(now, self.pace.token_seconds(), beyond, config.kv_deviations);
        Some(peak / capacity.max(1) as f64)
    }

    /// Prefill speed in tokens/s now.
    pub(crate) fn speed(&self, now: Tick, fleet_rate: f64, config: &Config) -> f64 {
        self.speeds(now, fleet_rate, &self.reported.said(now, config.report_ttl)).now
    }

    pub(crate) fn speeds(&self, now: Tick, fleet_rate: f64, said: &Said) -> Speed {
        let (usual, derate, gpu_share) =
            (self.usual_speed(fleet_rate), self.beneath.derate(now), self.gpu_share(now, said));
        Speed { now: (usual * (derate * gpu_share)).max(1.0), usual, derate, gpu_share }
    }

    /// What its GPUs leave of its usual speed now.
    fn derate(&self, now: Tick, config: &Config) -> f64 {
        self.beneath.derate(now) * self.gpu_share(now, &self.reported.said(now, config.report_ttl))
    }

    /// Prefill speed in tokens/s with GPUs of its own that are well; `fleet_rate` where its own was not measured yet.
    pub(crate) fn usual_speed(&self, fleet_rate: f64) -> f64 {
        let own = self.measured_rate().or(self.spec.rate_hint).filter(|rate| *rate > 0.0).unwrap_or(fleet_rate);
        let rate = if (own - fleet_rate).abs() < ALIKE * fleet_rate { fleet_rate } else { own };
        rate.max(1.0)
    }

    /// Share of its GPUs' time that others leave it.
    pub(crate) fn gpu_share(&self, now: Tick, said: &Said) -> f64 {
        if self.beneath.is_alone(now) {
            return 1.0;
        }
        let reports = match (said.fresh, said.foreign) {
            (false, _) => Reports::Nothing,
            (true, None) => Reports::OnlyOurs,
            (true, Some(_)) => Reports::Foreign,
        };
        self.beneath.share(now, reports)
    }

    /// Its own measured prefill speed in tokens/s, throttling apart.
    pub(crate) fn measured_rate(&self) -> Option<f64> {
        self.rate.value().or_else(|| self.whole.value())
    }

    /// Prompt tokens sent to it and not prefilled, at its speed.
    pub(crate) fn backlog_tokens(&self, now: Tick, speed: f64) -> f64 {
        self.backlog.tokens(now, speed)
    }

    /// Mean seconds that a request stays, once one has ended.
    pub(crate) fn stay_seconds(&self) -> Option<f64> {
        self.stay_seconds
    }

    /// How well it is, 1 to 0: few failures, punctual first tokens.
    pub(crate) fn health_score(&self, now: Tick, config: &Config) -> f64 {
        self.health.score(now, config) * self.latency.punctuality()
    }

    /// Takes a request in. Returns its place in the backlog.
    pub(crate) fn hold(
        &mut self,
        now: Tick,
        (request, plan): (&Request, &Plan),
        uncached: u32,
        fleet_rate: f64,
        config: &Config,
    ) -> (Held, SendNumber) {
        let need = self.take(now, request.id, plan);
        self.unstarted.insert(request.id);
        self.adapters.sent(now, request.adapter);
        self.sent_tokens = self.sent_tokens.wrapping_add(u64::from(uncached));
        let speed = self.speed(now, fleet_rate, config);
        if self.backlog.tokens(now, speed) <= config.window_yielding.as_secs_f64() * speed * EMPTY {
            self.filling = now;
        }
        let visible = request.streamed || plan.leg == Leg::Prefill;
        let number = self.backlog.send(now, speed, uncached, visible);
        let alone = self.reported.said(now, config.report_ttl).foreign.is_none_or(|foreign| foreign.waiting == 0);
        self.rate.sent(now, visible && alone, self.backlog.is_single());
        (need, number)
    }

    /// Takes in what comes after a prompt that another worker is to compute first: there will be nothing to prefill.
    pub(crate) fn reserve(&mut self, now: Tick, id: RequestId, plan: &Plan) -> Held {
        self.awaited_tokens += u64::from(plan.prompt_tokens);
        self.take(now, id, plan)
    }

    /// The prompt of one that was reserved is computed, or will not come.
    pub(crate) fn awaited(&mut self, plan: &Plan) {
        self.awaited_tokens = self.awaited_tokens.saturating_sub(u64::from(plan.prompt_tokens));
    }

    /// The same where the prompt is computed already.
    pub(crate) fn take(&mut self, now: Tick, id: RequestId, plan: &Plan) -> Held {
        let need = self.need(plan);
        self.held = self.held.plus(need);
        self.sent.insert(id);
        self.sleep.used = now;
        if self.health.state() == HealthState::HalfOpen {
            self.trial = Some(id);
        }
        need
    }

    /// The request's first token came; `uncached` of its tokens had to be computed, as was predicted. What it holds from
    /// now on.
    pub(crate) fn started(
        &mut self,
        now: Tick,
        (held, number): (Held, Option<SendNumber>),
        uncached: u32,
        fleet_rate: f64,
        config: &Config,
    ) -> Held {
        let generating = held.started(now);
        self.held = self.held.minus(held).plus(generating);
        let Some(number) = number else { return generating };
        let speed = self.speed(now, fleet_rate, config);
        self.backlog.started(now, speed, number);
        let derate = self.derate(now, config);
        self.rate.started(now, uncached, self.backlog.is_empty(), derate);
        generating
    }

    /// A request's prompt is computed, or will not be here: whoever waited for that need not.
    pub(crate) fn prefilled(&mut self, request: RequestId) {
        self.unstarted.remove(&request);
        self.lane.open(Gate::Prefill(request));
    }

    /// Gives the request's place back. `started`: its first token had come.
    pub(crate) fn release(
        &mut self,
        now: Tick,
        request: &Request,
        (held, number): (Held, Option<SendNumber>),
        started: bool,
        (fleet_rate, config): (f64, &Config),
    ) {
        if !self.sent.remove(&request.id) {
            return;
        }
        self.prefilled(request.id);
        self.held = self.held.minus(held);
        self.sleep.used = now;
        self.adapters.ended(now, request.adapter);
        if self.trial == Some(request.id) {
            self.trial = None;
        }
        if let Some(number) = number.filter(|_| !started) {
            let speed = self.speed(now, fleet_rate, config);
            self.backlog.remove(now, speed, number);
            self.rate.spoil();
        }
    }

    /// Its engine's metrics were read.
    pub(crate) fn observe(&mut self, now: Tick, report: LoadReport, fleet_rate: f64, config: &Config) {
        let backlog = self.backlog_tokens(now, self.speed(now, fleet_rate, config));
        let prefilled = self.held.now(now, self.pace.token_seconds()) - backlog - self.awaited_tokens as f64;
        self.reported.observe(now, report, self.held.sequences(), (prefilled, self.spec.kv_tokens));
    }

    /// A request ended well after `seconds` here, with `output_each` tokens a sequence in the `generating` seconds after
    /// its first, where that was seen.
    pub(crate) fn stayed(&mut self, seconds: f64, output_each: u32, generating: Option<f64>) {
        let mean = self.stay_seconds.get_or_insert(seconds);
        *mean += (seconds - *mean) * STAY_WEIGHT;
        if let Some(generating) = generating {
            self.pace.observe(output_each, generating, self.held.sequences() as f64);
        }
    }

    /// What was sent to it until now.
    pub(crate) fn before(&self) -> Before {
        Before { tokens: self.sent_tokens, sequences: self.held.sequences() }
    }

    /// An answer came whole, with `output_tokens` a sequence, `seconds` after it was sent with `own_tokens` of its prompt
    /// to compute. Each sequence beside it adds about `slowdown` seconds to a token.
    pub(crate) fn answered(
        &mut self,
        now: Tick,
        (before, own_tokens): (Before, u32),
        (output_tokens, seconds): (u32, f64),
        (slowdown, config): (f64, &Config),
    ) {
        let prompt_tokens = self.sent_tokens.wrapping_sub(before.tokens);
        let others = before.sequences.midpoint(self.held.sequences());
        let alone = self.reported.said(now, config.report_ttl).foreign.is_none_or(|foreign| foreign.waiting == 0);
        if alone && others < u64::from(self.spec.sequences_max) {
            let seconds = (seconds - slowdown * others as f64 * f64::from(output_tokens)) * self.derate(now, config);
            self.whole.observe(Answer { own_tokens, prompt_tokens, output_tokens, seconds });
        }
        if let Some(rate) = self.measured_rate() {
            let generating = (seconds - prompt_tokens as f64 / rate).max(0.0);
            self.pace.observe(output_tokens, generating, others as f64);
        }
    }
}

/// Where a worker stands in [`Workers`]; used again after it left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Slot(pub(crate) u32);

/// All workers of all pools.
#[derive(Debug, Default)]
pub(crate) struct Workers {
    slots: Vec<Option<Worker>>,
    free: Vec<Slot>,
    names: BTreeMap<WorkerId, Slot>,
}

impl Workers {
    pub(crate) fn insert(&mut self, worker: Worker) -> Slot {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            Slot(u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX))
        });
        self.names.insert(worker.id, slot);
        if let Some(place) = self.slots.get_mut(slot.0 as usize) {
            *place = Some(worker);
        }
        slot
    }

    pub(crate) fn remove(&mut self, slot: Slot) -> Option<Worker> {
        let worker = self.slots.get_mut(slot.0 as usize)?.take()?;
        self.names.remove(&worker.id);
        self.free.push(slot);
        Some(worker)
    }

    pub(crate) fn slot(&self, id: WorkerId) -> Option<Slot> {
        self.names.get(&id).copied()
    }

    pub(crate) fn get(&self, slot: Slot) -> Option<&Worker> {
        self.slots.get(slot.0 as usize)?.as_ref()
    }

    pub(crate) fn get_mut(&mut self, slot: Slot) -> Option<&mut Worker> {
        self.slots.get_mut(slot.0 as usize)?.as_mut()
    }

    /// By name, so that the order is the same whatever came and went.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Slot, &Worker)> {
        self.names.values().filter_map(|slot| Some((*slot, self.get(*slot)?)))
    }
}
