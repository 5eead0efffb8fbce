//! `report.json`. Times are in milliseconds but where the name says otherwise; what was not measured is null.

use forebay_simulator::{Cell, EngineConfig, Offered, Settings, Spread};
use serde::Serialize;

#[derive(Serialize)]
struct Report<'a> {
    trace: &'a str,
    workers: u32,
    engine: Engine,
    speeds: &'a [f64],
    slo_ttft_ms: f64,
    jitter_ms: f64,
    shed: bool,
    offered: Work,
    cells: Vec<Row<'a>>,
}

#[derive(Serialize)]
struct Engine {
    prefill_tokens_per_s: f64,
    step_ms: f64,
    step_ms_per_seq: f64,
    kv_blocks: u32,
    block_tokens: u32,
    max_batch: u32,
    step_token_budget: u32,
}

/// The trace's work, as `--help` defines it.
#[derive(Serialize)]
struct Work {
    engine_seconds: f64,
    uncached_tokens: u64,
    prompt_tokens: u64,
    output_tokens: u64,
    batch: f64,
    span_seconds: f64,
}

#[derive(Serialize)]
struct Row<'a> {
    policy: &'a str,
    rate: f64,
    load: Option<f64>,
    seed: u64,
    requests: u32,
    completed: u32,
    shed: u32,
    timed_out: u32,
    refused: u32,
    failed: u32,
    ttft_ms: Option<Percentiles>,
    tpot_ms: Option<Percentiles>,
    e2e_ms: Option<Percentiles>,
    within_slo: f64,
    goodput_rps: f64,
    hit_ratio_tokens: Option<f64>,
    preemptions: u32,
    load_max_over_mean: Option<f64>,
    jain_tenants: Option<f64>,
    decision_us: Option<Decision>,
    virtual_seconds: f64,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(in crate::cli) struct Percentiles {
    pub(in crate::cli) mean: f64,
    pub(in crate::cli) p50: f64,
    pub(in crate::cli) p90: f64,
    pub(in crate::cli) p99: f64,
}

impl From<Spread> for Percentiles {
    fn from(Spread { mean, p50, p90, p99 }: Spread) -> Self {
        Self { mean, p50, p90, p99 }
    }
}

#[derive(Serialize)]
struct Decision {
    p50: f64,
    p99: f64,
}

/// The report as JSON text.
pub(super) fn render<'a>(
    trace: &str,
    settings: &Settings,
    offered: &Offered,
    cells: impl Iterator<Item = &'a Cell>,
) -> anyhow::Result<String> {
    let report = Report {
        trace,
        workers: settings.workers,
        engine: engine(&settings.engine),
        speeds: &settings.speeds,
        slo_ttft_ms: settings.slo_ttft.as_secs_f64() * 1e3,
        jitter_ms: settings.jitter.as_secs_f64() * 1e3,
        shed: settings.shed,
        offered: Work {
            engine_seconds: offered.engine_seconds,
            uncached_tokens: offered.uncached_tokens,
            prompt_tokens: offered.prompt_tokens,
            output_tokens: offered.output_tokens,
            batch: offered.batch,
            span_seconds: offered.span_seconds,
        },
        cells: cells.map(row).collect(),
    };
    Ok(serde_json::to_string_pretty(&report)? + "\n")
}

fn engine(config: &EngineConfig) -> Engine {
    let EngineConfig {
        prefill_tokens_per_s,
        step_ms,
        step_ms_per_seq,
        kv_blocks,
        block_tokens,
        max_batch,
        step_token_budget,
    } = *config;
    Engine { prefill_tokens_per_s, step_ms, step_ms_per_seq, kv_blocks, block_tokens, max_batch, step_token_budget }
}

fn row(cell: &Cell) -> Row<'_> {
    let percentiles = |spread: Option<Spread>| spread.map(Percentiles::from);
    Row {
        policy: cell.policy,
        rate: cell.rate,
        load: cell.load,
        seed: cell.seed,
        requests: cell.requests,
        completed: cell.completed,
        shed: cell.shed,
        timed_out: cell.timed_out,
        refused: cell.refused,
        failed: cell.failed,
        ttft_ms: percentiles(cell.ttft_ms),
        tpot_ms: percentiles(cell.tpot_ms),
        e2e_ms: percentiles(cell.e2e_ms),
        within_slo: cell.within_slo,
        goodput_rps: cell.goodput_rps,
        hit_ratio_tokens: cell.hit_ratio_tokens,
        preemptions: cell.preemptions,
        load_max_over_mean: cell.load_max_over_mean,
        jain_tenants: cell.jain_tenants,
        decision_us: cell.decision_us.map(|(p50, p99)| Decision { p50, p99 }),
        virtual_seconds: cell.virtual_seconds,
    }
}
