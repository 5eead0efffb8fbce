//! Time until the worker begins this prompt: what it was promised, at its usual speed, or the time it asked to be left alone.

use crate::placement::Prospect;

pub(super) fn seconds(prospect: &Prospect<'_>) -> f64 {
    let busy = prospect.worker.busy_until.seconds_since(prospect.now);
    (prospect.ahead_tokens / prospect.usual_speed).max(busy)
}
