//! What sharing a GPU costs: the time that the work up to this prompt takes longer because others compute there, be they
//! workers beside this one or processes that are none of ours.

use crate::placement::Prospect;

pub(super) fn seconds(prospect: &Prospect<'_>) -> f64 {
    if prospect.gpu_share == 1.0 {
        return 0.0;
    }
    prospect.work_seconds() / prospect.derate * (1.0 / prospect.gpu_share - 1.0)
}
