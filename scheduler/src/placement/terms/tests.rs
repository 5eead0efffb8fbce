//! What every term of the table must keep, whatever it is about.

use std::time::Duration;

use crate::core::Core;
use crate::*;

const POOL: PoolId = PoolId(1);

fn request(id: u64, prompt_tokens: u32, sequences: u32) -> Request {
    Request {
        id: RequestId(id),
        pool: POOL,
        tenant: TenantId(0),
        class: Class::Default,
        deadline: None,
        prompt_tokens,
        blocks: (0..u64::from(prompt_tokens / 16)).collect(),
        route: RouteId(0),
        max_output: Some(u32::MAX),
        sequences,
        body_bytes: 0,
        adapter: None,
        beside: None,
        streamed: true,
    }
}

/// Every term, for requests of every size at workers of every kind.
#[test]
fn every_term_is_finite_and_named_once() {
    let specs = [
        WorkerSpec::default(),
        WorkerSpec { kv_tokens: Some(0), block_tokens: 0, sequences_max: 0, window_tokens: 0, ..WorkerSpec::default() },
        WorkerSpec { kv_tokens: Some(u64::MAX), rate_hint: Some(f64::NAN), ..WorkerSpec::default() },
        WorkerSpec { kv_tokens: Some(1000), rate_hint: Some(-5.0), ..WorkerSpec::default() },
        WorkerSpec { rate_hint: Some(f64::INFINITY), ..WorkerSpec::default() },
    ];
    let mut core = Core::new(Config::default(), 1);
    let mut out = Vec::new();
    core.handle(Tick(0), Event::PoolJoined { pool: POOL, limits: PoolLimits::default() }, &mut out);
    for (worker, spec) in (0..).zip(specs) {
        let worker = WorkerId(worker);
        let gpu = GpuId(worker.0 / 2);
        let sleep = (worker.0 % 2 == 1).then_some(SleepSpec { residency: Duration::MAX });
        let spec = WorkerSpec { gpus: vec![gpu], sleep, memory_bytes: Some(u64::MAX), ..spec };
        core.handle(Tick(0), Event::WorkerJoined { worker, pool: POOL, spec }, &mut out);
        core.handle(Tick(0), Event::Probed { worker, healthy: true }, &mut out);
        core.handle(Tick(0), Event::SleepSeen { worker, asleep: true }, &mut out);
        let report = LoadReport { running: u32::MAX, waiting: u32::MAX, kv_usage: Some(1e308) };
        core.handle(Tick(0), Event::Load { worker, report }, &mut out);
        let wild = GpuReport {
            derate: 0.0,
            fault: false,
            utilization: Some(1e9),
            foreign: Some(7.0),
            memory: Some(2.0),
            memory_bytes: Some(u64::MAX),
        };
        core.handle(Tick(0), Event::Gpu { gpu, report: wild }, &mut out);
    }
    let mut seen = 0;
    for (id, (prompt, sequences)) in
        (0..).zip([(0, 0), (1, 1), (16, 1), (999, 2), (100_000, 1), (u32::MAX / 2, u32::MAX)])
    {
        let at = Tick(1000 * id).after(Duration::from_secs(id));
        let blocks_bounded = Request { blocks: (0..64).collect(), ..request(id, 0, sequences) };
        core.handle(at, Event::Arrived(Request { prompt_tokens: prompt, ..blocks_bounded }), &mut out);
        for decision in core.explain(RequestId(id)) {
            for candidate in &decision.candidates {
                for (name, seconds) in term_names().iter().zip(candidate.terms) {
                    assert!(seconds.is_finite(), "{name} is {seconds} for {prompt} tokens at {}", candidate.worker);
                    seen += 1;
                }
            }
        }
    }
    assert!(seen > 50, "only {seen} terms were looked at");
    let mut names = term_names();
    names.sort_unstable();
    assert!(names.windows(2).all(|pair| pair[0] != pair[1]));
}
