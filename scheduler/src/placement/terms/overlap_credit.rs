//! What keeping a prefix in one place is worth to the requests that will share it, beyond the prefill it saves this one
//! (which `prefill` already counts): `(gain - 1)` times that, shared among those who hold as much. What many hold, such as
//! a common system prompt, loses nothing by one copy more; what one holds, such as a conversation, would be in two halves.

use crate::Leg;
use crate::placement::Prospect;

pub(super) fn seconds(prospect: &Prospect<'_>) -> f64 {
    if prospect.plan.leg == Leg::Decode {
        return 0.0; // it is worth that where the prompt is computed
    }
    let worth = (prospect.overlap_gain - 1.0) * f64::from(prospect.matched_tokens) / prospect.copies.max(1) as f64;
    -worth / prospect.speed
}
