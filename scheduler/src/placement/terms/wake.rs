//! Time until a worker that sleeps is awake: what its wakes take, and until then others have made room for it.

use crate::placement::Prospect;

pub(super) fn seconds(prospect: &Prospect<'_>) -> f64 {
    prospect.worker.wake_seconds(prospect.now, prospect.config)
}
