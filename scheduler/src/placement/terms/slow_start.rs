//! What is held against a worker that just came back from an illness, so that it is not flooded at once: the time the
//! prompt would take if it ran at a part of its speed, beyond what it does take.

use crate::placement::Prospect;

pub(super) fn seconds(prospect: &Prospect<'_>) -> f64 {
    let ramp = prospect.worker.health.ramp(prospect.now, prospect.config);
    if ramp == 1.0 {
        return 0.0;
    }
    (1.0 / ramp - 1.0) * (prospect.ahead_tokens + f64::from(prospect.uncached_tokens())) / prospect.speed
}
