//! One worker as the core sees it: what we promised it, what it says, how fast and how well it is.
//!
//! Invariants: `reserved` and `sequences` are the sums over `sent`; both change only in [`Worker::hold`] and
//! [`Worker::release`].
//! Not here: which request gets which worker (`placement`), and the order of the lane (`lane`).

pub(crate) mod backlog;
pub(crate) mod health;
pub(crate) mod latency;
mod load;
mod rate;

use std::collections::{BTreeMap, BTreeSet};

use crate::config::Config;
use crate::lane::Lane;
use crate::outputs::Plan;
use crate::{GpuReport, HealthState, LoadReport, PoolId, Request, RequestId, Tick, WorkerId, WorkerSpec};
use backlog::{Backlog, SendNumber};
use health::Health;
use latency::Latency;
use load::Reported;
use rate::Rate;

/// Weight of one request in the mean time that requests stay at a worker.
const STAY_WEIGHT: f64 = 0.05;
/// Most KV tokens reserved for one request where the capacity is not known; keeps sums in range.
const NEED_MAX: u64 = 1 << 32;

/// Largest variance kept of one request; keeps sums in range.
const VARIANCE_MAX: u64 = 1 << 42;

/// KV tokens promised to one request or to several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Reserved {
    /// Prompt and expected output.
    pub(crate) tokens: u64,
    /// Of these, the expected output.
    pub(crate) output_tokens: u64,
    /// Variance of the output.
    pub(crate) variance: u64,
}

impl Reserved {
    pub(crate) fn plus(self, more: Self) -> Self {
        Self {
            tokens: self.tokens + more.tokens,
            output_tokens: self.output_tokens + more.output_tokens,
            variance: self.variance + more.variance,
        }
    }

    fn minus(self, less: Self) -> Self {
        Self {
            tokens: self.tokens.saturating_sub(less.tokens),
            output_tokens: self.output_tokens.saturating_sub(less.output_tokens),
            variance: self.variance.saturating_sub(less.variance),
        }
    }
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
    /// The request by which a half-open worker is tried.
    pub(crate) trial: Option<RequestId>,
    pub(crate) lane: Lane,
    pub(crate) sent: BTreeSet<RequestId>,
    pub(crate) sequences: u64,
    /// What was promised to what was sent.
    pub(crate) reserved: Reserved,
    pub(crate) reported: Reported,
    backlog: Backlog,
    rate: Rate,
    derate: Option<(Tick, f64)>,
    /// Mean seconds that a request stays.
    stay_seconds: Option<f64>,
    pub(crate) rescored: Tick,
    /// Key under which it stands in its pool's order of workers.
    pub(crate) ready_key: Option<Tick>,
    /// Its moment in the timers.
    pub(crate) timer: Option<Tick>,
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
            trial: None,
            lane: Lane::default(),
            sent: BTreeSet::new(),
            sequences: 0,
            reserved: Reserved::default(),
            reported: Reported::default(),
            backlog: Backlog::default(),
            rate: Rate::default(),
            derate: None,
            stay_seconds: None,
            rescored: now,
            ready_key: None,
            timer: None,
            touched: false,
        }
    }

    /// Whether requests may be bound to it. A lane on trial takes one.
    pub(crate) fn is_eligible(&self) -> bool {
        self.may_send() && (self.health.state() == HealthState::Up || self.lane.is_empty())
    }

    /// Whether what is bound to it may be sent, as far as its health goes.
    pub(crate) fn may_send(&self) -> bool {
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

    /// Whether the prompt and one token of output fit in its KV cache at all.
    pub(crate) fn holds(&self, prompt_tokens: u32) -> bool {
        self.spec.kv_tokens.is_none_or(|capacity| u64::from(prompt_tokens) < capacity)
    }

    /// What to reserve for a request: prompt and expected output in whole blocks, at most what there is.
    pub(crate) fn need(&self, plan: &Plan) -> Reserved {
        let block = u64::from(self.spec.block_tokens.max(1));
        let most = self.spec.kv_tokens.unwrap_or(NEED_MAX);
        let tokens = (u64::from(plan.prompt_tokens) + plan.output_tokens).next_multiple_of(block).min(most);
        Reserved { tokens, output_tokens: plan.output_tokens.min(tokens), variance: plan.variance.min(VARIANCE_MAX) }
    }

    /// Whether the request may be sent now. A worker that has nothing always takes one.
    pub(crate) fn has_room(&self, now: Tick, plan: &Plan, uncached: u32, fleet_rate: f64, config: &Config) -> bool {
        if !self.may_send() || self.busy_until > now {
            return false;
        }
        if self.sent.is_empty() {
            return true;
        }
        let foreign = self.reported.foreign(now, config.report_ttl);
        let sequences = self.sequences + u64::from(foreign.map_or(0, |foreign| foreign.running));
        let backlog = self.backlog_tokens(now, fleet_rate, config);
        sequences + u64::from(plan.sequences) <= u64::from(self.spec.sequences_max)
            && (backlog <= 0.0 || backlog + f64::from(uncached) <= f64::from(self.spec.window_tokens))
            && self.kv_pressure(now, self.need(plan), config).is_none_or(|pressure| pressure <= 1.0)
    }

    /// Share of the KV cache that will be in use with `more`: by the engine's account and what we know to come, where
    /// it reports (prompts that share blocks take less than their sum), else by our own.
    pub(crate) fn kv_pressure(&self, now: Tick, more: Reserved, config: &Config) -> Option<f64> {
        let with = self.reserved.plus(more);
        let spread = config.kv_deviations * (with.variance as f64).sqrt();
        match (self.spec.kv_tokens, self.reported.kv_usage(now, config.report_ttl)) {
            (Some(capacity), used) => {
                let capacity = capacity.max(1) as f64;
                let ours = with.tokens as f64 / capacity;
                let engines = used.map(|used| {
                    let since = with.tokens as f64 - used.reserved as f64;
                    used.share + (used.to_come as f64 + since) / capacity
                });
                Some((engines.unwrap_or(ours) + spread / capacity).max(0.0))
            }
            (None, used) => used.map(|used| used.share),
        }
    }

    /// Prefill speed in tokens/s; `fleet_rate` where its own was not measured yet.
    pub(crate) fn speed(&self, now: Tick, fleet_rate: f64, config: &Config) -> f64 {
        let rate = self.rate.value().or(self.spec.rate_hint).filter(|rate| *rate > 0.0).unwrap_or(fleet_rate);
        (rate * self.derate(now, config)).max(1.0)
    }

    /// Its own measured prefill speed in tokens/s, throttling apart.
    pub(crate) fn measured_rate(&self) -> Option<f64> {
        self.rate.value()
    }

    /// Prompt tokens sent to it and not prefilled.
    pub(crate) fn backlog_tokens(&self, now: Tick, fleet_rate: f64, config: &Config) -> f64 {
        self.backlog.tokens(now, self.speed(now, fleet_rate, config))
    }

    /// Mean seconds that a request stays, once one has ended.
    pub(crate) fn stay_seconds(&self) -> Option<f64> {
        self.stay_seconds
    }

    pub(crate) fn derate_by(&mut self, now: Tick, report: GpuReport) {
        if report.derate.is_finite() {
            self.derate = Some((now, report.derate.clamp(0.05, 1.0)));
        }
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
    ) -> (Reserved, SendNumber) {
        let need = self.need(plan);
        self.reserved = self.reserved.plus(need);
        self.sequences += u64::from(request.sequences.max(1));
        self.sent.insert(request.id);
        if self.health.state() == HealthState::HalfOpen {
            self.trial = Some(request.id);
        }
        let speed = self.speed(now, fleet_rate, config);
        let number = self.backlog.send(now, speed, uncached, request.streamed);
        let alone = self.reported.foreign(now, config.report_ttl).is_none_or(|foreign| foreign.waiting == 0);
        self.rate.sent(now, request.streamed && alone, self.backlog.is_single());
        (need, number)
    }

    /// The request's first token came; `uncached` of its tokens had to be computed, as was predicted.
    pub(crate) fn started(&mut self, now: Tick, number: SendNumber, uncached: u32, fleet_rate: f64, config: &Config) {
        let speed = self.speed(now, fleet_rate, config);
        self.backlog.started(now, speed, number);
        let derate = self.derate(now, config);
        self.rate.started(now, uncached, self.backlog.is_empty(), derate);
    }

    /// Gives the request's place back. `started`: its first token had come.
    pub(crate) fn release(
        &mut self,
        now: Tick,
        request: &Request,
        (reserved, number): (Reserved, SendNumber),
        started: bool,
        (fleet_rate, config): (f64, &Config),
    ) {
        if !self.sent.remove(&request.id) {
            return;
        }
        self.reserved = self.reserved.minus(reserved);
        self.sequences = self.sequences.saturating_sub(u64::from(request.sequences.max(1)));
        if self.trial == Some(request.id) {
            self.trial = None;
        }
        if !started {
            let speed = self.speed(now, fleet_rate, config);
            self.backlog.remove(now, speed, number);
            self.rate.spoil();
        }
    }

    /// Its engine's metrics were read.
    pub(crate) fn observe(&mut self, now: Tick, report: LoadReport, fleet_rate: f64, config: &Config) {
        let backlog = self.backlog_tokens(now, fleet_rate, config) as u64;
        self.reported.observe(
            now,
            report,
            self.sequences,
            (self.reserved.tokens, backlog + self.reserved.output_tokens),
        );
    }

    /// A request ended well after `seconds` here.
    pub(crate) fn stayed(&mut self, seconds: f64) {
        let mean = self.stay_seconds.get_or_insert(seconds);
        *mean += (seconds - *mean) * STAY_WEIGHT;
    }

    fn derate(&self, now: Tick, config: &Config) -> f64 {
        self.derate.filter(|(at, _)| now.since(*at) < config.derate_lease).map_or(1.0, |(_, derate)| derate)
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
