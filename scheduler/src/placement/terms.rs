//! The terms of the score: one file and one line each.
//!
//! A term is seconds that the request, or others because of it, will lose at a worker; a gain is negative. It must be
//! finite for any worker and any request.

mod decode_slowdown;
pub(super) mod drain_time;
pub(super) mod gpu_share;
pub(super) mod gpu_throttle;
mod kv_pressure;
mod overlap_credit;
pub(super) mod prefill;
pub(super) mod slot_wait;
mod slow_start;

use super::Prospect;

type Seconds = fn(&Prospect<'_>) -> f64;

/// The table; its order is that of explanations.
pub(crate) const TERMS: [(&str, Seconds); 9] = [
    ("drain_time", drain_time::seconds),
    ("prefill", prefill::seconds),
    ("gpu_throttle", gpu_throttle::seconds),
    ("gpu_share", gpu_share::seconds),
    ("slot_wait", slot_wait::seconds),
    ("slow_start", slow_start::seconds),
    ("decode_slowdown", decode_slowdown::seconds),
    ("kv_pressure", kv_pressure::seconds),
    ("overlap_credit", overlap_credit::seconds),
];

#[cfg(test)]
mod tests;
