//! What throttling costs: the time that the work up to this prompt takes longer on GPUs that run below their usual speed.

use crate::placement::Prospect;

pub(super) fn seconds(prospect: &Prospect<'_>) -> f64 {
    if prospect.derate == 1.0 {
        return 0.0;
    }
    prospect.work_seconds() * (1.0 / prospect.derate - 1.0)
}
