//! The terms of the score: one file and one line each.
//!
//! A term is seconds that the request, or others because of it, will lose at a worker; a gain is negative. It must be
//! finite for any worker and any request.

mod adapter_load;
mod decode_slowdown;
mod drain_time;
mod gpu_share;
mod gpu_throttle;
mod kv_pressure;
mod overlap_credit;
mod prefill;
mod slot_wait;
mod slow_start;
mod wake;

use super::Prospect;

type Seconds = fn(&Prospect<'_>) -> f64;

/// The table; its order is that of explanations. The first is the time until the worker begins, the first
/// [`TO_FIRST_TOKEN`] the time to the first token, as far as we can tell.
pub(crate) const TERMS: [(&str, Seconds); 11] = [
    ("drain_time", drain_time::seconds),
    ("prefill", prefill::seconds),
    ("wake", wake::seconds),
    ("adapter_load", adapter_load::seconds),
    ("gpu_throttle", gpu_throttle::seconds),
    ("gpu_share", gpu_share::seconds),
    ("slot_wait", slot_wait::seconds),
    ("slow_start", slow_start::seconds),
    ("decode_slowdown", decode_slowdown::seconds),
    ("kv_pressure", kv_pressure::seconds),
    ("overlap_credit", overlap_credit::seconds),
];

pub(super) const TO_FIRST_TOKEN: usize = 7;

#[cfg(test)]
mod tests;
