//! Time to compute what the worker does not hold of this prompt, at its usual speed.

use crate::placement::Prospect;

pub(super) fn seconds(prospect: &Prospect<'_>) -> f64 {
    f64::from(prospect.uncached_tokens()) / prospect.usual_speed
}
