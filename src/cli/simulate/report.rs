//! `report.json`. Times are in milliseconds but where the name says otherwise; what was not measured is null.

use forebay_simulator::{Cell, EngineConfig, Offered, Settings};
use serde::Serialize;

use crate::cli::figures::Figures;

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
    load: Option<f64>,
    #[serde(flatten)]
    figures: Figures,
    preemptions: u32,
    decision_us: Option<Decision>,
    virtual_seconds: f64,
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
        caches_late: _,
    } = *config;
    Engine { prefill_tokens_per_s, step_ms, step_ms_per_seq, kv_blocks, block_tokens, max_batch, step_token_budget }
}

fn row(cell: &Cell) -> Row<'_> {
    Row {
        policy: cell.policy,
        load: cell.load,
        figures: Figures::of(cell),
        preemptions: cell.preemptions,
        decision_us: cell.decision_us.map(|(p50, p99)| Decision { p50, p99 }),
        virtual_seconds: cell.virtual_seconds,
    }
}
