//! A fleet under load in virtual time, and a clock around every call of the core.
//!
//! Requests come at random (exponential gaps): 2000 tokens in blocks of 16, of which the first half is that of their group
//! and the second their own; each fourth is a conversation that was there before. So many workers publish KV events as
//! make 5000 a second; all are polled, and they crash and return. Workers prefill first come, first served; what they
//! have in their caches is what the core thinks they have.
//!
//! Invariant: the same world makes the same calls, whatever they cost.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay_scheduler::{
    Action, Class, Config, Core, End, Event, Failure, KvEvent, LoadReport, PoolId, PoolLimits, Request, RequestId,
    RouteId, TenantId, Tick, WorkerId, WorkerSpec,
};

use crate::costs::{Call, Costs};

pub(crate) const POOL: PoolId = PoolId(1);
/// Blocks of a prompt.
const BLOCKS: u64 = 125;
const BLOCK_TOKENS: u32 = 16;
/// Conversations whose first halves are one.
const GROUPS: u64 = 256;
const TENANTS: u64 = 100;
/// How long ago a conversation that comes again was there, in requests.
const RETURNS_AFTER: (u64, u64) = (1000, 4000);
/// Tokens/s.
const PREFILL_RATE: f64 = 8000.0;
const TOKEN_SECONDS: f64 = 0.015;
const KV_EVENTS_EACH_SECOND: u64 = 5000;
/// Workers that publish them.
const PUBLISHERS: u32 = 15;
const POLL_EVERY: Duration = Duration::from_secs(1);
/// Prompts in the workers' caches that are not removed yet.
const STORED_MAX: usize = 2000;
/// Share of the workers that leave and return, within so many requests.
const CHURN: (f64, u64) = (0.2, 200_000);
const CHURN_MIN: f64 = 100.0;

/// The blocks of a conversation.
pub(crate) fn conversation(id: u64, blocks: u64) -> Arc<[u64]> {
    let hash = |a: u64, b: u64| {
        (a << 32 | b).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29).wrapping_mul(0xBF58_476D_1CE4_E5B9)
    };
    (0..blocks).map(|at| if at < blocks / 2 { hash(id % GROUPS, at) } else { hash(GROUPS + id, at) }).collect()
}

/// A request with the blocks of a prompt.
pub(crate) fn request(id: u64, blocks: Arc<[u64]>) -> Request {
    let class = match id % 10 {
        0 => Class::Batch,
        1..4 => Class::Interactive,
        _ => Class::Default,
    };
    Request {
        id: RequestId(id),
        pool: POOL,
        tenant: TenantId((id % TENANTS) as u32),
        class,
        deadline: None,
        prompt_tokens: blocks.len() as u32 * BLOCK_TOKENS,
        blocks,
        route: RouteId(0),
        max_output: Some(400),
        sequences: 1,
        body_bytes: 8000,
        adapter: None,
        beside: None,
        streamed: true,
    }
}

pub(crate) fn spec(worker: WorkerId) -> WorkerSpec {
    WorkerSpec { kv_tokens: Some(200_000), kv_events: worker.0 < PUBLISHERS, ..WorkerSpec::default() }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    Arrival,
    FirstToken(RequestId, u32),
    End(RequestId, u32),
    Probed(WorkerId),
    Polled(WorkerId),
    KvEvent,
}

#[derive(Debug, Default)]
struct Worker {
    away: bool,
    /// When it will have prefilled all it has.
    free_at: Tick,
    has: BTreeSet<RequestId>,
    generating: u32,
}

struct Sent {
    worker: WorkerId,
    /// What it computes and then has.
    new_blocks: Vec<u64>,
    attempt: u32,
    started: bool,
}

/// What a worker has of one prompt.
type Stored = (WorkerId, Vec<u64>);

pub(crate) struct World {
    pub(crate) core: Core,
    pub(crate) costs: Costs,
    arrivals_each_second: f64,
    now: Tick,
    due: BinaryHeap<Reverse<(Tick, u64, Due)>>,
    scheduled: u64,
    chance: u64,
    workers: Vec<Worker>,
    sent: BTreeMap<RequestId, Sent>,
    conversations: BTreeMap<RequestId, u64>,
    attempts: u32,
    arrived: u64,
    told: u64,
    gone: u32,
    /// Prompt tokens that were to be computed, and since when they are counted.
    computed: (u64, Tick),
    /// Prefilled, and not told yet.
    fresh: VecDeque<Stored>,
    stored: VecDeque<Stored>,
    removing: Option<Stored>,
    out: Vec<Action>,
}

impl World {
    /// So many workers, to each of which so many requests come in a second.
    pub(crate) fn new(workers: u32, arrivals_each: f64) -> Self {
        let mut world = Self {
            core: Core::new(Config::default(), 1),
            arrivals_each_second: arrivals_each * f64::from(workers),
            costs: Costs::default(),
            now: Tick::ZERO,
            due: BinaryHeap::new(),
            scheduled: 0,
            chance: 1,
            workers: (0..workers).map(|_| Worker::default()).collect(),
            sent: BTreeMap::new(),
            conversations: BTreeMap::new(),
            attempts: 0,
            arrived: 0,
            told: 0,
            gone: 0,
            computed: (0, Tick::ZERO),
            fresh: VecDeque::new(),
            stored: VecDeque::new(),
            removing: None,
            out: Vec::new(),
        };
        world.call(Call::Fleet, Event::PoolJoined { pool: POOL, limits: PoolLimits::default() });
        for worker in (0..workers).map(WorkerId) {
            world.call(Call::Fleet, Event::WorkerJoined { worker, pool: POOL, spec: spec(worker) });
            let first = POLL_EVERY.mul_f64(f64::from(worker.0) / f64::from(workers));
            world.schedule(first, Due::Polled(worker));
        }
        world.schedule(Duration::ZERO, Due::Arrival);
        world.schedule(Duration::ZERO, Due::KvEvent);
        world
    }

    /// Requests until caches, batches and rates are as they stay.
    pub(crate) fn warm_up(&mut self) {
        self.run((self.arrivals_each_second * 4.0).max(60_000.0) as u64);
        self.costs = Costs::default();
        self.computed = (0, self.now);
    }

    /// Lets so many requests come, with all that happens meanwhile.
    pub(crate) fn run(&mut self, arrivals: u64) {
        let until = self.arrived + arrivals;
        while self.arrived < until {
            let Some(Reverse((at, _, due))) = self.due.pop() else { return };
            while let Some(timer) = self.core.next_deadline().filter(|timer| *timer <= at) {
                self.now = self.now.max(timer);
                self.timed(Call::Tick, |core, now, out| core.tick(now, out));
            }
            self.now = at;
            self.happen(due);
        }
    }

    /// Polls of all workers.
    pub(crate) fn polls_each_second(&self) -> f64 {
        self.workers.len() as f64 / POLL_EVERY.as_secs_f64()
    }

    pub(crate) fn kv_events_each_second(&self) -> f64 {
        KV_EVENTS_EACH_SECOND as f64
    }

    /// Share of what the workers can prefill that they were sent.
    pub(crate) fn utilization(&self) -> f64 {
        let (tokens, since) = self.computed;
        tokens as f64 / (PREFILL_RATE * self.workers.len() as f64 * self.now.seconds_since(since))
    }

    fn happen(&mut self, due: Due) {
        match due {
            Due::Arrival => self.arrive(),
            Due::FirstToken(request, attempt) => self.first_token(request, attempt),
            Due::End(request, attempt) => self.end(request, attempt),
            Due::Probed(worker) => self.call(Call::Fleet, Event::Probed { worker, healthy: true }),
            Due::Polled(worker) => self.polled(worker),
            Due::KvEvent => self.kv_event(),
        }
    }

    fn arrive(&mut self) {
        let id = self.arrived;
        self.arrived += 1;
        let (after, within) = RETURNS_AFTER;
        let returns = id % 4 == 3 && id > after + within;
        let talk = if returns { id - after - self.random() % within } else { id };
        self.conversations.insert(RequestId(id), talk);
        self.call(Call::Arrived, Event::Arrived(request(id, conversation(talk, BLOCKS))));
        let unit = ((self.random() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
        self.schedule(Duration::from_secs_f64(-unit.ln() / self.arrivals_each_second), Due::Arrival);
        let changes = (self.workers.len() as f64 * CHURN.0).max(CHURN_MIN) as u64;
        if self.arrived.is_multiple_of(CHURN.1 / changes) {
            self.replace();
        }
    }

    /// The worker that left comes back, another crashes.
    fn replace(&mut self) {
        let back = WorkerId(self.gone);
        if self.workers.get(back.0 as usize).is_some_and(|worker| worker.away) {
            self.workers.get_mut(back.0 as usize).into_iter().for_each(|worker| worker.away = false);
            self.call(Call::Fleet, Event::WorkerJoined { worker: back, pool: POOL, spec: spec(back) });
        }
        self.gone = (self.gone + 1) % self.workers.len() as u32;
        let gone = WorkerId(self.gone);
        let Some(worker) = self.workers.get_mut(gone.0 as usize) else { return };
        let lost = std::mem::take(worker);
        worker.away = true;
        self.call(Call::Fleet, Event::WorkerLeft { worker: gone });
        for request in lost.has {
            let Some(sent) = self.sent.remove(&request) else { continue };
            if sent.started {
                self.conversations.remove(&request);
                self.call(Call::Ended, Event::Ended { request, end: End::Failed(Failure::Reset) });
            } else {
                self.call(Call::Failed, Event::AttemptFailed { request, failure: Failure::Reset });
            }
        }
    }

    fn first_token(&mut self, request: RequestId, attempt: u32) {
        let Some(sent) = self.sent.get_mut(&request).filter(|sent| sent.attempt == attempt) else { return };
        sent.started = true;
        let worker = sent.worker;
        self.workers.get_mut(worker.0 as usize).into_iter().for_each(|worker| worker.generating += 1);
        let new_blocks = std::mem::take(&mut sent.new_blocks);
        if worker.0 < PUBLISHERS && !new_blocks.is_empty() {
            self.fresh.push_back((worker, new_blocks));
        }
        let output = output_tokens(request);
        self.schedule(Duration::from_secs_f64(f64::from(output) * TOKEN_SECONDS), Due::End(request, attempt));
        self.call(Call::FirstToken, Event::FirstToken { request });
    }

    fn end(&mut self, request: RequestId, attempt: u32) {
        if self.sent.get(&request).is_none_or(|sent| sent.attempt != attempt) {
            return;
        }
        self.conversations.remove(&request);
        let worker = self.sent.remove(&request).and_then(|sent| self.workers.get_mut(sent.worker.0 as usize));
        if let Some(worker) = worker {
            worker.has.remove(&request);
            worker.generating -= 1;
        }
        let prompt_tokens = BLOCKS as u32 * BLOCK_TOKENS;
        let end = End::Finished { prompt_tokens, cached_tokens: None, output_tokens: output_tokens(request) };
        self.call(Call::Ended, Event::Ended { request, end });
    }

    fn polled(&mut self, worker: WorkerId) {
        self.schedule(POLL_EVERY, Due::Polled(worker));
        let Some(state) = self.workers.get(worker.0 as usize).filter(|state| !state.away) else { return };
        let (has, running) = (state.has.len() as u32, state.generating);
        let kv_usage = Some(f64::from(has) * 2200.0 / 200_000.0);
        let report = LoadReport { running, waiting: has - running, kv_usage };
        self.call(Call::Load, Event::Load { worker, report });
    }

    /// One of the events that engines publish: a prompt was stored as a whole, or one block of an old one is gone.
    fn kv_event(&mut self) {
        self.told += 1;
        let next = Tick(self.told * 1_000_000 / KV_EVENTS_EACH_SECOND);
        self.schedule(next.since(self.now), Due::KvEvent);
        let block = self.removing.as_mut().and_then(|(worker, blocks)| Some((*worker, blocks.pop()?)));
        if let Some((worker, block)) = block {
            return self.call(Call::Kv, Event::Kv { worker, change: KvEvent::Removed { blocks: vec![block] } });
        }
        // where too little was prefilled, what was stored before is stored again
        let Some((worker, blocks)) = self.fresh.pop_front().or_else(|| self.stored.back().cloned()) else { return };
        self.stored.push_back((worker, blocks.clone()));
        if self.stored.len() > STORED_MAX {
            self.removing = self.stored.pop_front();
        }
        self.call(Call::Kv, Event::Kv { worker, change: KvEvent::Stored { blocks } });
    }

    fn call(&mut self, call: Call, event: Event) {
        self.timed(call, |core, now, out| core.handle(now, event, out));
    }

    fn timed(&mut self, call: Call, act: impl FnOnce(&mut Core, Tick, &mut Vec<Action>)) {
        let mut out = std::mem::take(&mut self.out);
        let from = Instant::now();
        act(black_box(&mut self.core), self.now, &mut out);
        self.costs.add(call, from.elapsed());
        for action in out.drain(..) {
            self.perform(&action);
        }
        self.out = out;
    }

    fn perform(&mut self, action: &Action) {
        match *action {
            Action::Send { request, worker, matched_tokens, .. } => {
                let Some(state) = self.workers.get_mut(worker.0 as usize) else { return };
                let uncached = BLOCKS as u32 * BLOCK_TOKENS - matched_tokens;
                self.computed.0 += u64::from(uncached);
                let talk = self.conversations.get(&request).copied().unwrap_or_default();
                let held = (matched_tokens / BLOCK_TOKENS) as usize;
                let new_blocks = conversation(talk, BLOCKS).get(held..).unwrap_or_default().to_vec();
                let prefill = Duration::from_secs_f64(f64::from(uncached) / PREFILL_RATE);
                state.free_at = state.free_at.max(self.now).after(prefill);
                state.has.insert(request);
                let wait = state.free_at.since(self.now);
                self.attempts += 1;
                self.sent.insert(request, Sent { worker, new_blocks, attempt: self.attempts, started: false });
                self.schedule(wait, Due::FirstToken(request, self.attempts));
            }
            Action::Refuse { request, .. } => {
                self.conversations.remove(&request);
                self.costs.refused += 1;
            }
            Action::Probe { worker } => self.schedule(Duration::from_millis(1), Due::Probed(worker)),
            Action::Health { .. }
            | Action::Wake { .. }
            | Action::Sleep { .. }
            | Action::LoadAdapter { .. }
            | Action::UnloadAdapter { .. } => {}
        }
    }

    fn schedule(&mut self, wait: Duration, due: Due) {
        self.scheduled += 1;
        self.due.push(Reverse((self.now.after(wait), self.scheduled, due)));
    }

    /// An xorshift generator (Marsaglia 2003).
    fn random(&mut self) -> u64 {
        self.chance ^= self.chance << 13;
        self.chance ^= self.chance >> 7;
        self.chance ^= self.chance << 17;
        self.chance
    }
}

/// 100 to 299, 200 on average.
fn output_tokens(request: RequestId) -> u32 {
    100 + (request.0 * 7919 % 200) as u32
}
