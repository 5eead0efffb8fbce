//! Cost of one request in the core: arrival (decision and send), first token, end.
//!
//! The prefix index is warm: conversations of 2000 tokens that share their first half with others of their group.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use forebay_scheduler::{
    Action, Class, Config, Core, End, Event, KvEvent, PoolId, PoolLimits, Request, RequestId, RouteId, TenantId, Tick,
    WorkerId, WorkerSpec,
};

const POOL: PoolId = PoolId(1);
const BLOCKS: u64 = 125;
const GROUPS: u64 = 64;

fn hash(a: u64, b: u64) -> u64 {
    (a << 32 | b).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29).wrapping_mul(0xBF58_476D_1CE4_E5B9)
}

/// The blocks of the conversation `id`: its first half is its group's.
fn conversation(id: u64, blocks: u64) -> Arc<[u64]> {
    (0..blocks).map(|at| if at < blocks / 2 { hash(1 + id % GROUPS, at) } else { hash(1000 + id, at) }).collect()
}

fn core(workers: u32, kv_events: bool) -> Core {
    let mut core = Core::new(Config::default(), 1);
    let mut out = Vec::new();
    core.handle(Tick(0), Event::PoolJoined { pool: POOL, limits: PoolLimits::default() }, &mut out);
    for worker in (0..workers).map(WorkerId) {
        let spec = WorkerSpec { kv_tokens: Some(1_000_000), kv_events, ..WorkerSpec::default() };
        core.handle(Tick(0), Event::WorkerJoined { worker, pool: POOL, spec }, &mut out);
        core.handle(Tick(0), Event::Probed { worker, healthy: true }, &mut out);
    }
    core
}

struct Load {
    core: Core,
    now: Tick,
    next: u64,
    out: Vec<Action>,
    prompts: Vec<Arc<[u64]>>,
}

impl Load {
    fn new(workers: u32) -> Self {
        let prompts = (0..4096).map(|id| conversation(id, BLOCKS)).collect();
        let mut load = Self { core: core(workers, false), now: Tick(0), next: 0, out: Vec::new(), prompts };
        for _ in 0..20_000 {
            load.cycle();
        }
        load
    }

    /// One request arrives, and the one that arrived 64 before it ends.
    fn cycle(&mut self) {
        self.now = self.now.after(Duration::from_micros(500));
        self.out.clear();
        let id = self.next;
        self.next += 1;
        let blocks = self.prompts.get((id * 7 % 4096) as usize).cloned().unwrap_or_default();
        let request = Request {
            id: RequestId(id),
            pool: POOL,
            tenant: TenantId((id % 10) as u32),
            class: Class::Default,
            deadline: None,
            prompt_tokens: 2000,
            blocks,
            route: RouteId(0),
            max_output: Some(200),
            sequences: 1,
            body_bytes: 8000,
            streamed: true,
        };
        self.core.handle(self.now, Event::Arrived(request), &mut self.out);
        if let Some(first) = id.checked_sub(8).map(RequestId) {
            self.core.handle(self.now, Event::FirstToken { request: first }, &mut self.out);
        }
        if let Some(last) = id.checked_sub(64).map(RequestId) {
            let end = End::Finished { prompt_tokens: 2000, cached_tokens: None, output_tokens: 200 };
            self.core.handle(self.now, Event::Ended { request: last, end }, &mut self.out);
        }
    }
}

fn decision(c: &mut Criterion) {
    for workers in [10, 100, 1000, 10_000] {
        let mut load = Load::new(workers);
        c.bench_function(&format!("cycle/{workers}_workers"), |b| b.iter(|| load.cycle()));
    }
}

fn prefix(c: &mut Criterion) {
    let mut core = core(10, true);
    let mut out = Vec::new();
    for id in 0..400 {
        let worker = WorkerId((id % 10) as u32);
        let change = KvEvent::Stored { blocks: conversation(id, 500).to_vec() };
        core.handle(Tick(0), Event::Kv { worker, change }, &mut out);
    }
    let prompts: Vec<_> = (0..400).map(|id| conversation(id, 500)).collect();
    let mut next = prompts.iter().cycle();
    c.bench_function("prefix_lookup/500_blocks", |b| {
        b.iter(|| next.next().map(|blocks| core.matched_tokens(Tick(1), POOL, black_box(blocks))));
    });
}

criterion_group!(benches, decision, prefix);
criterion_main!(benches);
