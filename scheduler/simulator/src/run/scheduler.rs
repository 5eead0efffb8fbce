//! The real scheduler in a run: told what the gateway's shell would tell it, and nothing more.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use forebay_scheduler::{
    Action, Core, Event, KvEvent, LoadReport, PoolId, PoolLimits, Request, RequestId, RouteId, TenantId, Tick,
    WorkerId, WorkerSpec,
};

use crate::{BlockEvent, Load, Row, Settings, Trace};

/// The only pool.
const POOL: PoolId = PoolId(0);
/// Bytes of a body for each token of its prompt: about what English text has.
const BYTES_PER_TOKEN: u32 = 4;
/// Longer than any run.
const FOREVER: Duration = Duration::from_secs(10 * 365 * 86_400);

/// The core with its queue of actions.
pub(super) struct Scheduler {
    core: Core,
    fresh: Vec<Action>,
    actions: VecDeque<Action>,
    stopwatch: Option<fn() -> Duration>,
    streamed: bool,
    /// Time of each decision about an arrival, when timed.
    pub(super) decisions: Vec<Duration>,
}

impl Scheduler {
    /// A core with one pool, into which the workers have joined.
    pub(super) fn new(trace: &Trace, settings: &Settings, seed: u64) -> Self {
        let mut scheduler = Self {
            core: Core::new(settings.scheduler.clone(), seed),
            fresh: Vec::new(),
            actions: VecDeque::new(),
            stopwatch: settings.stopwatch,
            streamed: !settings.whole_answers,
            decisions: Vec::new(),
        };
        scheduler.tell(Tick::ZERO, Event::PoolJoined { pool: POOL, limits: limits(trace, settings) });
        for worker in 0..settings.workers {
            let engine = &settings.engine;
            let spec = WorkerSpec {
                kv_tokens: Some(u64::from(engine.kv_blocks) * u64::from(engine.block_tokens)),
                block_tokens: engine.block_tokens,
                kv_events: true,
                caches_late: engine.caches_late,
                ..WorkerSpec::default()
            };
            scheduler.tell(Tick::ZERO, Event::WorkerJoined { worker: WorkerId(worker), pool: POOL, spec });
        }
        for (tenant, weight) in &settings.tenant_weights {
            scheduler.tell(Tick::ZERO, Event::TenantWeight { tenant: TenantId(*tenant), weight: *weight });
        }
        scheduler
    }

    pub(super) fn tell(&mut self, now: Tick, event: Event) {
        self.core.handle(now, event, &mut self.fresh);
        self.actions.extend(self.fresh.drain(..));
    }

    pub(super) fn tick(&mut self, now: Tick) {
        self.core.tick(now, &mut self.fresh);
        self.actions.extend(self.fresh.drain(..));
    }

    pub(super) fn next_deadline(&self) -> Option<Tick> {
        self.core.next_deadline()
    }

    /// What is to be done next.
    pub(super) fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Announces a row. Its output length stays here.
    pub(super) fn arrived(&mut self, now: Tick, number: u32, row: &Row) {
        let request = Request {
            id: RequestId(u64::from(number)),
            pool: POOL,
            tenant: TenantId(row.tenant),
            class: row.class,
            deadline: None,
            prompt_tokens: row.prompt_tokens,
            blocks: Arc::clone(&row.blocks),
            route: RouteId(0),
            max_output: None,
            sequences: 1,
            body_bytes: row.prompt_tokens.saturating_mul(BYTES_PER_TOKEN),
            adapter: None,
            splits: false,
            beside: None,
            streamed: self.streamed,
        };
        let began = self.stopwatch.map(|stopwatch| stopwatch());
        self.tell(now, Event::Arrived(request));
        if let (Some(stopwatch), Some(began)) = (self.stopwatch, began) {
            self.decisions.push(stopwatch().saturating_sub(began));
        }
    }

    /// The worker that a request was bound to last.
    pub(super) fn placed(&self, number: u32) -> Option<u32> {
        let decisions = self.core.explain(RequestId(u64::from(number)));
        decisions.last()?.winner.map(|worker| worker.0)
    }

    /// The prefill speed that it measured of each worker.
    pub(super) fn rates(&self, now: Tick) -> Vec<Option<f64>> {
        self.core.worker_views(now).map(|view| view.rate_measured.then_some(view.prefill_rate)).collect()
    }

    /// Passes an engine's own gauges on.
    pub(super) fn polled(&mut self, now: Tick, worker: u32, load: &Load) {
        let report = LoadReport { running: load.running, waiting: load.waiting, kv_usage: Some(load.kv_usage) };
        self.tell(now, Event::Load { worker: WorkerId(worker), report });
    }

    /// Passes the changes of an engine's cache on, in order, in as few events as that allows.
    pub(super) fn cache_changed(&mut self, now: Tick, worker: u32, events: &[BlockEvent]) {
        let stored = |event: &BlockEvent| matches!(event, BlockEvent::Stored(_));
        for run in events.chunk_by(|a, b| stored(a) == stored(b)) {
            let blocks = run.iter().map(|event| match event {
                BlockEvent::Stored(hash) | BlockEvent::Removed(hash) => *hash,
            });
            let blocks: Vec<u64> = blocks.collect();
            let change = match run.first() {
                Some(BlockEvent::Stored(_)) => KvEvent::Stored { blocks },
                _ => KvEvent::Removed { blocks },
            };
            self.tell(now, Event::Kv { worker: WorkerId(worker), change });
        }
    }
}

fn limits(trace: &Trace, settings: &Settings) -> PoolLimits {
    let usual = PoolLimits { block_tokens: trace.block_tokens, ..PoolLimits::default() };
    if settings.shed {
        return usual;
    }
    PoolLimits {
        queue_requests_max: u32::MAX,
        queue_bytes_max: u64::MAX,
        queue_tokens_max: u64::MAX,
        queue_timeout: FOREVER,
        ..usual
    }
}
