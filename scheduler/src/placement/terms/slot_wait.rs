//! Time until a batch slot is free, where all are taken: those that stand before, each leaving after the mean stay.
//!
//! Until something has ended there, the stay is that of the expected output at 20 ms a token (half to twice what current
//! engines take with a full batch).

use crate::placement::Prospect;

const TOKEN_SECONDS_ASSUMED: f64 = 0.02;

pub(super) fn seconds(prospect: &Prospect<'_>) -> f64 {
    let slots = f64::from(prospect.worker.spec.sequences_max.max(1));
    let wanted = prospect.ahead_sequences + f64::from(prospect.plan.sequences);
    if wanted <= slots {
        return 0.0;
    }
    let assumed = || prospect.plan.output_each * TOKEN_SECONDS_ASSUMED;
    prospect.worker.stay_seconds().unwrap_or_else(assumed) * (wanted - slots) / slots
}
