//! The workers of one model, what waits for them, and what is known of their caches.
//!
//! Invariant: the queue's sums are those of every request that waits in the pool, in a lane or in none; the order for
//! shedding holds exactly these.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::config::Config;
use crate::fairness::Fairness;
use crate::lane::{InTurn, Lane};
use crate::outputs::Outputs;
use crate::prefix::PrefixIndex;
use crate::shares::Shares;
use crate::worker::step::Pace;
use crate::worker::{Slot, Workers};
use crate::{AdapterId, Class, PoolLimits, Request, RequestId, Role, TenantId, Tick, WorkerSpec};

/// Weight of one decision in the running means of a pool.
const MEAN_WEIGHT: f64 = 0.02;
/// Weight of one load of an adapter in the mean time that they take.
const LOAD_WEIGHT: f64 = 0.2;
/// Prompt tokens of a foreign request before any of ours was seen.
const PROMPT_TOKENS_ASSUMED: f64 = 1024.0;
/// How often the fleet's median rate is computed again.
const MEDIAN_EVERY: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(crate) struct Pool {
    pub(crate) limits: PoolLimits,
    pub(crate) workers: BTreeSet<Slot>,
    /// Of these, those for prompts alone.
    pub(crate) prefillers: BTreeSet<Slot>,
    /// Eligible workers, by the moment at which they will have prefilled all they were promised.
    pub(crate) by_ready: BTreeSet<(Tick, Slot)>,
    /// All others, as of when they were settled last.
    pub(crate) unfit: BTreeSet<Slot>,
    /// Workers whose lane is not empty.
    pub(crate) laden: BTreeSet<Slot>,
    /// Workers that have an adapter, or are about to.
    pub(crate) adapters: BTreeSet<(AdapterId, Slot)>,
    /// Those that are configured no more, as many as the configuration's reader remembers.
    pub(crate) adapters_gone: BTreeSet<AdapterId>,
    /// Mean seconds that it takes to load an adapter, once one was.
    adapter_seconds: Option<f64>,
    /// Requests that no worker can be bound to.
    pub(crate) unbound: Lane,
    pub(crate) queue: Queue,
    pub(crate) shares: Shares,
    pub(crate) fairness: Fairness,
    pub(crate) mixed: Mixed,
    pub(crate) index: PrefixIndex,
    pub(crate) outputs: Outputs,
    /// Of all its workers together: a slope needs more variety than one of them shows.
    pub(crate) pace: Pace,
    /// Share of candidates that had work to do when a request came: how busy the pool is, 0 to 1.
    pub(crate) busy: f64,
    /// Mean of the prompt tokens to compute of our own requests.
    pub(crate) uncached_mean: f64,
    /// The most seconds of prefill that stood before a request of late, and when that was renewed.
    longest_drain: (Tick, f64),
    /// When a request came or ended last; none before the first.
    pub(crate) used: Option<Tick>,
    /// Requests placed so far.
    pub(crate) placed: u64,
    median: Option<(Tick, f64)>,
    rate_cold: f64,
}

/// Whether more than one kind of traffic came of late.
#[derive(Debug, Default)]
pub(crate) struct Mixed {
    last: Option<(Class, TenantId)>,
    changed: Option<Tick>,
}

impl Mixed {
    /// How long one change of class or tenant is remembered.
    const MEMORY: Duration = Duration::from_secs(60);

    pub(crate) fn sent(&mut self, now: Tick, who: (Class, TenantId)) {
        if self.last.replace(who).is_some_and(|last| last != who) {
            self.changed = Some(now);
        }
    }

    pub(crate) fn is(&self, now: Tick) -> bool {
        self.changed.is_some_and(|changed| now.since(changed) < Self::MEMORY)
    }
}

/// Sums over all that waits.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    pub(crate) requests: [u32; Class::COUNT],
    /// Prompt tokens, by class.
    pub(crate) tokens: [u64; Class::COUNT],
    pub(crate) bytes: u64,
    /// All of them, by whose they are and when they came.
    all: BTreeSet<(Class, TenantId, Tick, RequestId)>,
    /// What each tenant has waiting.
    tenants: BTreeMap<(Class, TenantId), Waiting>,
    /// By [`Waiting::weighed`]; the last is the first to be shed.
    heaviest: BTreeSet<(Class, u64, TenantId)>,
}

#[derive(Debug, Clone, Copy)]
struct Waiting {
    /// Prompt tokens.
    tokens: u64,
    /// Its weight against others.
    weight: f64,
}

impl Waiting {
    /// In 1/256 tokens: a tenant of twice the weight may have twice as much.
    fn weighed(&self) -> u64 {
        (self.tokens as f64 * 256.0 / self.weight) as u64
    }
}

impl Pool {
    pub(crate) fn new(limits: PoolLimits, config: &Config) -> Self {
        Self {
            index: PrefixIndex::new(config.index_bytes_max, limits.block_tokens),
            limits,
            workers: BTreeSet::new(),
            prefillers: BTreeSet::new(),
            by_ready: BTreeSet::new(),
            unfit: BTreeSet::new(),
            adapters: BTreeSet::new(),
            adapters_gone: BTreeSet::new(),
            adapter_seconds: None,
            laden: BTreeSet::new(),
            unbound: Lane::default(),
            queue: Queue::default(),
            shares: Shares::default(),
            fairness: Fairness::default(),
            mixed: Mixed::default(),
            outputs: Outputs::default(),
            pace: Pace::default(),
            busy: 0.0,
            uncached_mean: PROMPT_TOKENS_ASSUMED,
            longest_drain: (Tick::ZERO, 0.0),
            used: None,
            placed: 0,
            median: None,
            rate_cold: config.rate_cold,
        }
    }

    /// A worker of it has this role now.
    pub(crate) fn has_role(&mut self, slot: Slot, role: Role) {
        if role == Role::Prefill {
            self.prefillers.insert(slot);
        } else {
            self.prefillers.remove(&slot);
        }
    }

    /// Blocks of prompts that a worker's cache holds, where known.
    pub(crate) fn cache_blocks(&self, spec: &WorkerSpec) -> Option<u64> {
        spec.kv_tokens.map(|tokens| tokens / u64::from(self.limits.block_tokens.max(1)))
    }

    /// The tenant of which alone more waits in a class than the workers prefill in a second.
    fn flooded_by(&self, class: Class) -> Option<TenantId> {
        self.queue.flooded_by(class, self.by_ready.len() as f64 * self.fleet_rate())
    }

    /// Whether a request is of the kind that lets others pass: batch work, or of a tenant that floods a pool of several.
    pub(crate) fn yields(&self, now: Tick, request: &Request) -> bool {
        self.mixed.is(now) && (request.class == Class::Batch || self.flooded_by(request.class) == Some(request.tenant))
    }

    /// How a newcomer stands in lanes: in turn with a tenant that floods the pool, else behind all.
    pub(crate) fn in_turn(&self, (class, tenant): (Class, TenantId)) -> Option<InTurn> {
        let flooded = self.flooded_by(class).is_some_and(|other| other != tenant);
        flooded.then_some((tenant, self.uncached_mean as u64))
    }

    /// Prefill speed in tokens/s for a worker whose own is not known: the median of those measured.
    pub(crate) fn fleet_rate(&self) -> f64 {
        self.median.map_or(self.rate_cold, |(_, rate)| rate)
    }

    /// Seconds that a worker takes to load an adapter: of all workers together, so that whoever was never asked looks no
    /// slower than others.
    pub(crate) fn adapter_seconds(&self, config: &Config) -> f64 {
        self.adapter_seconds.unwrap_or(config.adapter_load_assumed.as_secs_f64())
    }

    /// A worker took so long to load an adapter.
    pub(crate) fn adapter_loaded(&mut self, seconds: f64) {
        let mean = self.adapter_seconds.get_or_insert(seconds);
        *mean += (seconds - *mean) * LOAD_WEIGHT;
    }

    /// A worker measured its rate; computes the median again, if that was not done just now.
    pub(crate) fn observe_rates(&mut self, now: Tick, workers: &Workers) {
        if self.median.is_some_and(|(at, _)| now.since(at) < MEDIAN_EVERY) {
            return;
        }
        let mut rates: Vec<f64> = self.workers.iter().filter_map(|slot| workers.get(*slot)?.measured_rate()).collect();
        let middle = rates.len() / 2;
        if middle < rates.len() {
            let (_, median, _) = rates.select_nth_unstable_by(middle, f64::total_cmp);
            self.median = Some((now, *median));
        }
    }

    pub(crate) fn observe_decision(&mut self, busy: f64, uncached: u32) {
        self.placed += 1;
        self.busy += (busy - self.busy) * MEAN_WEIGHT;
        self.uncached_mean += (f64::from(uncached) - self.uncached_mean) * MEAN_WEIGHT;
    }

    /// A request was placed where so many seconds of prefill stand before it.
    pub(crate) fn observe_drain(&mut self, now: Tick, seconds: f64, config: &Config) {
        self.longest_drain = (now, self.longest_drain(now, config).max(seconds));
    }

    fn longest_drain(&self, now: Tick, config: &Config) -> f64 {
        let (at, seconds) = self.longest_drain;
        seconds * (-now.seconds_since(at) / config.patience_half_life.as_secs_f64().max(1e-3)).exp2()
    }

    /// Seconds for which a long prompt gives way to shorter ones at most.
    pub(crate) fn patience(&self, now: Tick, config: &Config) -> f64 {
        (config.patience_share * self.longest_drain(now, config)).max(config.patience_min.as_secs_f64())
    }

    /// What a cached token is worth now: more when a lost cache costs others too.
    pub(crate) fn overlap_gain(&self, config: &Config) -> f64 {
        const CALM: f64 = 0.60;
        const BUSY: f64 = 0.85;
        let share = ((self.busy - CALM) / (BUSY - CALM)).clamp(0.0, 1.0);
        config.overlap_gain_calm + share * (config.overlap_gain_busy - config.overlap_gain_calm)
    }

    /// How much prefill to have at a worker at most: engines with full steps serve most, and what waits here can still be
    /// moved.
    pub(crate) fn window(&self, config: &Config) -> Duration {
        let waiting = self.queue.tokens.iter().sum::<u64>() as f64;
        let busy = config.window_busy_from.as_secs_f64() * self.fleet_rate() * self.workers.len().max(1) as f64;
        let more = config.window_busy.saturating_sub(config.window);
        config.window + more.mul_f64((waiting / busy.max(1.0)).min(1.0))
    }
}

impl Queue {
    pub(crate) fn add(&mut self, request: &Request, arrived: Tick, weight: f64) {
        self.all.insert((request.class, request.tenant, arrived, request.id));
        self.weigh(request, Some(weight), |tokens| tokens + u64::from(request.prompt_tokens));
        self.bytes += u64::from(request.body_bytes);
        if let Some((requests, tokens)) = self.share(request.class) {
            *requests += 1;
            *tokens += u64::from(request.prompt_tokens);
        }
    }

    pub(crate) fn take(&mut self, request: &Request, arrived: Tick) {
        if !self.all.remove(&(request.class, request.tenant, arrived, request.id)) {
            return;
        }
        self.weigh(request, None, |tokens| tokens - u64::from(request.prompt_tokens));
        self.bytes -= u64::from(request.body_bytes);
        if let Some((requests, tokens)) = self.share(request.class) {
            *requests -= 1;
            *tokens -= u64::from(request.prompt_tokens);
        }
    }

    pub(crate) fn is_over(&self, limits: &PoolLimits) -> bool {
        self.all.len() > limits.queue_requests_max as usize
            || self.tokens.iter().sum::<u64>() > limits.queue_tokens_max
            || self.bytes > limits.queue_bytes_max
    }

    pub(crate) fn len(&self) -> usize {
        self.all.len()
    }

    pub(crate) fn contains(&self, request: &Request, arrived: Tick) -> bool {
        self.all.contains(&(request.class, request.tenant, arrived, request.id))
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = RequestId> {
        self.all.iter().map(|(_, _, _, id)| *id)
    }

    /// The tenant that has at least so many tokens waiting in a class, and hardly any other has.
    fn flooded_by(&self, class: Class, tokens_min: f64) -> Option<TenantId> {
        const SHARE: f64 = 0.8;
        let all = self.tokens.get(class as usize).copied().unwrap_or_default();
        let mut by_weight = self.heaviest.range((class, 0, TenantId(0))..=(class, u64::MAX, TenantId(u32::MAX)));
        let &(_, _, tenant) = by_weight.next_back()?;
        let own = self.tenants.get(&(class, tenant))?.tokens;
        (own as f64 >= (all as f64 * SHARE).max(tokens_min)).then_some(tenant)
    }

    /// The first to be shed: of the lowest class the newest request of the tenant that has most waiting for its weight, so
    /// that a flood pushes out itself.
    pub(crate) fn sheddable(&self) -> Option<RequestId> {
        let &(class, _, tenant) = self.heaviest.last()?;
        let newest = (class, tenant, Tick(u64::MAX), RequestId(u64::MAX));
        self.all.range(..=newest).next_back().map(|(_, _, _, id)| *id)
    }

    /// Prompt tokens that are served before those of a newcomer: those of the classes before its own, and of its own
    /// class all, or its tenant's over the tenant's share of the turns if that is less. `weight` gives tenants' weights.
    pub(crate) fn tokens_before(&self, class: Class, tenant: TenantId, weight: impl Fn(TenantId) -> f64) -> f64 {
        let above: u64 = self.tokens.iter().take(class as usize).sum();
        let all = self.tokens.get(class as usize).copied().unwrap_or_default() as f64;
        let waiting = self.tenants.range((class, TenantId(0))..=(class, TenantId(u32::MAX)));
        let others: f64 = waiting.map(|((_, other), _)| *other).filter(|other| *other != tenant).map(&weight).sum();
        let own = self.tenants.get(&(class, tenant)).map_or(0, |waiting| waiting.tokens) as f64;
        let share = weight(tenant) / (weight(tenant) + others);
        above as f64 + all.min(own / share)
    }

    /// Changes what a tenant has waiting, and its weight if that is given; one that has nothing is forgotten.
    fn weigh(&mut self, request: &Request, weight: Option<f64>, change: impl FnOnce(u64) -> u64) {
        let (class, tenant) = (request.class, request.tenant);
        let before = self.tenants.remove(&(class, tenant));
        if let Some(before) = before {
            self.heaviest.remove(&(class, before.weighed(), tenant));
        }
        let before = before.unwrap_or(Waiting { tokens: 0, weight: 1.0 });
        let after = Waiting { tokens: change(before.tokens), weight: weight.unwrap_or(before.weight) };
        let newest = (class, tenant, Tick(u64::MAX), RequestId(u64::MAX));
        let oldest = (class, tenant, Tick::ZERO, RequestId(0));
        if self.all.range(oldest..=newest).next().is_some() {
            self.tenants.insert((class, tenant), after);
            self.heaviest.insert((class, after.weighed(), tenant));
        }
    }

    fn share(&mut self, class: Class) -> Option<(&mut u32, &mut u64)> {
        Some((self.requests.get_mut(class as usize)?, self.tokens.get_mut(class as usize)?))
    }
}
