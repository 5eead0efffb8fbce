//! What decoding among the sequences that are there costs: each of the output's tokens takes longer by what every one of
//! them adds to a step.

use crate::placement::Prospect;

pub(super) fn seconds(prospect: &Prospect<'_>) -> f64 {
    let slots = f64::from(prospect.worker.spec.sequences_max.max(1));
    let slower = prospect.slowdown_seconds * prospect.ahead_sequences.min(slots);
    prospect.config.decode_weight * slower * prospect.plan.output_each
}
