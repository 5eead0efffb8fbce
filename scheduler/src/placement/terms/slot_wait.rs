//! Time until a batch slot is free, where all are taken: those that stand before, each leaving after the mean stay.
//!
//! Nothing until something has ended there: a stay that is not known cannot be predicted.

use crate::placement::Prospect;

pub(in crate::placement) fn seconds(prospect: &Prospect<'_>) -> f64 {
    let slots = f64::from(prospect.worker.spec.sequences_max.max(1));
    let wanted = prospect.ahead_sequences + f64::from(prospect.request.sequences.max(1));
    prospect.worker.stay_seconds().unwrap_or(0.0) * (wanted - slots).max(0.0) / slots
}
