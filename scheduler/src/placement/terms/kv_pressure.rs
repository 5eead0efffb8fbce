//! What a fuller KV cache costs: a barrier `k/(1-k)` that grows steep before the engine preempts and computes again. Of an
//! engine that says nothing of its cache, the memory that it took of its GPU since it took least tells it.

use crate::placement::Prospect;

/// Keeps the barrier finite.
const PRESSURE_MAX: f64 = 0.98;

pub(super) fn seconds(prospect: &Prospect<'_>) -> f64 {
    let need = prospect.worker.need(prospect.plan);
    let known = prospect.worker.kv_pressure(prospect.now, need, prospect.reported_kv, prospect.config);
    let pressure = known.or_else(|| prospect.worker.beneath.memory(prospect.now)).unwrap_or(0.0).min(PRESSURE_MAX);
    prospect.config.kv_pressure_seconds * pressure / (1.0 - pressure)
}
