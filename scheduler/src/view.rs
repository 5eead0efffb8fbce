//! What can be seen of the core from outside: for metrics, listings and `explain`. Copies; nothing is derived from them
//! inside.

use std::time::Duration;

use crate::core::Core;
use crate::placement::Scene;
use crate::worker::Worker;
use crate::worker::kv::Held;
use crate::{
    AdapterId, AdapterState, Class, Decision, HealthState, LoadReport, PoolId, Request, RequestId, SleepState,
    TenantId, Tick, WorkerId,
};

/// How long a pool that none serves wants a worker after its last request: until then whoever scrapes that every half
/// minute, and scales by what is scraped, has seen it, although the request itself was refused within seconds.
const ASKED_FOR: Duration = Duration::from_secs(120);

/// One worker now.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkerView {
    /// Its name.
    pub worker: WorkerId,
    /// Where it serves.
    pub pool: PoolId,
    /// Its standing.
    pub health: HealthState,
    /// How well it is, from 1 to 0: the share of recent attempts that worked, times how punctual its first tokens are
    /// (seconds predicted for their uncached tokens over seconds taken). 0 while it gets nothing.
    pub health_score: f64,
    /// Gets nothing new because it is to leave.
    pub draining: bool,
    /// Time for which it asked to be left alone.
    pub busy: Duration,
    /// Requests sent to it and not ended.
    pub sent_requests: u32,
    /// Sequences of these.
    pub sent_sequences: u64,
    /// Requests bound to it and not sent.
    pub lane_requests: u32,
    /// Prompt tokens promised to it and not prefilled, sent or not.
    pub promised_tokens: u64,
    /// KV tokens reserved for what was sent.
    pub reserved_tokens: u64,
    /// KV tokens it can hold, where known.
    pub kv_tokens: Option<u64>,
    /// Share of its KV cache in use: the greater of our account and the engine's; none where neither is known.
    pub kv_usage: Option<f64>,
    /// Prefill speed in tokens/s that decisions use.
    pub prefill_rate: f64,
    /// Whether that was measured at this worker.
    pub rate_measured: bool,
    /// Share of their usual speed at which its GPUs run, as far as they say.
    pub gpu_derate: f64,
    /// Share of its GPUs' time that others leave it.
    pub gpu_share: f64,
    /// A fault of a GPU is why it gets nothing.
    pub gpu_fault: bool,
    /// Where it is between waking and sleeping; none of a worker that never sleeps.
    pub sleep: Option<SleepState>,
    /// Time until it is awake, as far as that can be told.
    pub wake: Duration,
    /// Times that it was woken.
    pub wakes: u64,
    /// LoRA adapters that it has, or was told to load.
    pub adapters: Vec<(AdapterId, AdapterState)>,
    /// What its engine said last, and how long ago; none when too old to use.
    pub reported: Option<(Duration, LoadReport)>,
}

/// One pool now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolView {
    /// Its name.
    pub pool: PoolId,
    /// Workers in it.
    pub workers: u32,
    /// Of these, such that get requests.
    pub workers_eligible: u32,
    /// Requests that wait, by [`Class`].
    pub queued_requests: [u32; Class::COUNT],
    /// Their prompt tokens, by [`Class`].
    pub queued_tokens: [u64; Class::COUNT],
    /// Bytes of their bodies.
    pub queued_bytes: u64,
    /// Blocks in the prefix index.
    pub index_blocks: usize,
    /// Bytes accounted for the prefix index.
    pub index_bytes: usize,
}

/// How many workers one pool needs now, and how long its work lasts: what an autoscaler goes by. Of the moment; whoever
/// scales smooths it over the time that a worker takes to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScaleView {
    /// Workers that would be busy for [`Config::scale_full`] of what they can do with what runs, and would prefill what
    /// waits within [`Config::scale_drain`]. 0 only when nothing runs or waits; and of a pool that none serves, only when
    /// for two minutes nothing came.
    ///
    /// [`Config::scale_full`]: crate::Config::scale_full
    /// [`Config::scale_drain`]: crate::Config::scale_drain
    pub desired_workers: u32,
    /// Time until the workers that serve now have prefilled all that waits or was sent; of a pool without any, the time
    /// that one worker would take.
    pub drain: Duration,
    /// Time since it had any request.
    pub idle: Duration,
}

impl Core {
    /// What a pool needs.
    #[must_use]
    pub fn scale_view(&self, now: Tick, pool: PoolId) -> Option<ScaleView> {
        let state = self.pools.get(&pool)?;
        let fleet_rate = state.fleet_rate();
        let (mut busy, mut rate, mut promised, mut runs) = (0.0, 0.0, 0.0, false);
        for worker in state.workers.iter().filter_map(|slot| self.workers.get(*slot)) {
            let speed = worker.speed(now, fleet_rate, &self.config);
            let backlog = worker.backlog_tokens(now, speed);
            busy += self.busy(now, worker, backlog / speed);
            rate += if worker.serves() { speed } else { 0.0 };
            promised += backlog;
            runs |= !worker.sent.is_empty();
        }
        let waiting = state.queue.tokens.iter().sum::<u64>() as f64;
        let present = runs || state.queue.len() > 0;
        let idle = if present { Duration::ZERO } else { now.since(state.used.unwrap_or_default()) };
        let missed = rate == 0.0 && state.used.is_some() && idle < ASKED_FOR;
        let needed = busy + waiting / (fleet_rate * self.config.scale_drain.as_secs_f64().max(1e-3));
        let desired = (needed / self.config.scale_full).ceil().max(f64::from(u8::from(present || missed)));
        Some(ScaleView {
            desired_workers: desired.min(f64::from(u32::MAX)) as u32,
            drain: crate::time::duration((waiting + promised) / if rate > 0.0 { rate } else { fleet_rate }),
            idle,
        })
    }

    /// Share of what a worker can do that it does, by whichever of its limits is nearest, 0 to 1.
    fn busy(&self, now: Tick, worker: &Worker, backlog_seconds: f64) -> f64 {
        let said = worker.reported.said(now, self.config.report_ttl);
        let kv = worker.kv_pressure(now, Held::default(), said.kv, &self.config).unwrap_or(0.0);
        let slots = worker.held.sequences() as f64 / f64::from(worker.spec.sequences_max.max(1));
        let window = backlog_seconds / self.config.window.as_secs_f64().max(1e-3);
        kv.max(slots).max(window).clamp(0.0, 1.0)
    }

    /// All workers, by name.
    pub fn worker_views(&self, now: Tick) -> impl Iterator<Item = WorkerView> {
        self.workers.iter().filter_map(move |(_, worker)| self.view(now, worker))
    }

    /// One worker.
    #[must_use]
    pub fn worker_view(&self, now: Tick, worker: WorkerId) -> Option<WorkerView> {
        self.view(now, self.workers.get(self.workers.slot(worker)?)?)
    }

    /// One pool.
    #[must_use]
    pub fn pool_view(&self, pool: PoolId) -> Option<PoolView> {
        let state = self.pools.get(&pool)?;
        Some(PoolView {
            pool,
            workers: u32::try_from(state.workers.len()).unwrap_or(u32::MAX),
            workers_eligible: u32::try_from(state.by_ready.len()).unwrap_or(u32::MAX),
            queued_requests: state.queue.requests,
            queued_tokens: state.queue.tokens,
            queued_bytes: state.queue.bytes,
            index_blocks: state.index.len(),
            index_bytes: state.index.bytes(),
        })
    }

    /// Time until the prefill of a newcomer of this class and tenant would begin at the worker that is ready first; none
    /// when no worker may take it.
    #[must_use]
    pub fn predicted_wait(&self, now: Tick, pool: PoolId, class: Class, tenant: TenantId) -> Option<Duration> {
        let state = self.pools.get(&pool)?;
        let scene = Scene { now, config: &self.config, pool: state, workers: &self.workers };
        let in_turn = state.in_turn((class, tenant));
        let waits =
            state.workers.iter().filter_map(|slot| self.workers.get(*slot)).filter(|worker| worker.is_eligible());
        let seconds = waits.map(|worker| {
            let said = worker.reported.said(now, self.config.report_ttl);
            let speed = worker.speeds(now, state.fleet_rate(), &said).now;
            let ahead = scene.ahead_tokens(worker, &said, speed, worker.lane.before(class, in_turn).tokens);
            (ahead / speed + worker.wake_seconds(now, &self.config)).max(worker.busy_until.seconds_since(now))
        });
        seconds.min_by(f64::total_cmp).map(crate::time::duration)
    }

    /// Tokens of a prompt, given by its blocks as in [`Request::blocks`], that some worker of the pool is believed to
    /// hold: what would be lost by serving it elsewhere.
    #[must_use]
    pub fn matched_tokens(&self, now: Tick, pool: PoolId, blocks: &[u64]) -> u32 {
        let Some(state) = self.pools.get(&pool) else { return 0 };
        let longest = state.index.lookup(now, blocks).iter().map(|(_, held)| *held).max().unwrap_or(0);
        longest.saturating_mul(state.limits.block_tokens)
    }

    /// The latest decisions about a request, oldest first, as far as they are kept.
    pub fn explain(&self, request: RequestId) -> impl Iterator<Item = Decision> {
        self.decisions.of(request)
    }

    /// A request that has not ended yet.
    #[must_use]
    pub fn request(&self, request: RequestId) -> Option<&Request> {
        self.requests.get(&request).map(|entry| &entry.request)
    }

    fn view(&self, now: Tick, worker: &Worker) -> Option<WorkerView> {
        let pool = self.pools.get(&worker.pool)?;
        let said = worker.reported.said(now, self.config.report_ttl);
        let speeds = worker.speeds(now, pool.fleet_rate(), &said);
        Some(WorkerView {
            worker: worker.id,
            pool: worker.pool,
            health: worker.health.state(),
            health_score: worker.health_score(now, &self.config),
            draining: worker.draining,
            busy: worker.busy_until.since(now),
            sent_requests: u32::try_from(worker.sent.len()).unwrap_or(u32::MAX),
            sent_sequences: worker.held.sequences(),
            lane_requests: worker.lane.requests(),
            promised_tokens: worker.backlog_tokens(now, speeds.now) as u64 + worker.lane.work().tokens,
            reserved_tokens: worker.held.tokens(),
            kv_tokens: worker.spec.kv_tokens,
            kv_usage: worker.kv_pressure(now, Held::default(), said.kv, &self.config),
            prefill_rate: speeds.now,
            rate_measured: worker.measured_rate().is_some(),
            gpu_derate: worker.beneath.derate(now),
            gpu_share: speeds.gpu_share,
            gpu_fault: worker.beneath.fault && worker.health.state() != HealthState::Up,
            sleep: worker.spec.sleep.map(|_| worker.sleep.state()),
            wake: crate::time::duration(worker.wake_seconds(now, &self.config)),
            wakes: worker.sleep.wakes,
            adapters: worker.adapters.states().collect(),
            reported: worker.reported.fresh(now, self.config.report_ttl).map(|(at, load)| (now.since(at), load)),
        })
    }
}
