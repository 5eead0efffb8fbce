//! The figures of one run, of a simulation or of a replay, as their reports have them. Times are in milliseconds but where
//! the name says otherwise; what was not measured is null.

use forebay_simulator::{Cell, Spread};
use serde::Serialize;

#[derive(Serialize)]
pub(super) struct Figures {
    pub(super) rate: f64,
    pub(super) seed: u64,
    pub(super) requests: u32,
    pub(super) completed: u32,
    pub(super) shed: u32,
    pub(super) timed_out: u32,
    pub(super) refused: u32,
    pub(super) failed: u32,
    pub(super) ttft_ms: Option<Percentiles>,
    pub(super) tpot_ms: Option<Percentiles>,
    pub(super) e2e_ms: Option<Percentiles>,
    pub(super) within_slo: f64,
    pub(super) goodput_rps: f64,
    pub(super) hit_ratio_tokens: Option<f64>,
    pub(super) load_max_over_mean: Option<f64>,
    pub(super) jain_tenants: Option<f64>,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Percentiles {
    pub(super) mean: f64,
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
}

impl Figures {
    pub(super) fn of(cell: &Cell) -> Self {
        let percentiles =
            |spread: Option<Spread>| spread.map(|Spread { mean, p50, p90, p99 }| Percentiles { mean, p50, p90, p99 });
        Self {
            rate: cell.rate,
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
            load_max_over_mean: cell.load_max_over_mean,
            jain_tenants: cell.jain_tenants,
        }
    }
}
