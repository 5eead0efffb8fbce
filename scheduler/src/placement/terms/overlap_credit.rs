//! What keeping a prefix in one place is worth to the requests that will share it, beyond the prefill it saves this one
//! (which `prefill` already counts): `(gain - 1)` times that.

use crate::placement::Prospect;

pub(super) fn seconds(prospect: &Prospect<'_>) -> f64 {
    -(prospect.overlap_gain - 1.0) * f64::from(prospect.matched_tokens) / prospect.speed
}
