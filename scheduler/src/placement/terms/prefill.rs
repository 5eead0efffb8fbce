//! Time to compute what the worker does not hold of this prompt, at its usual speed; or to fetch it, where another has
//! computed it.

use crate::Leg;
use crate::placement::Prospect;

/// How much faster a prompt's cache is fetched than computed: some 100 Gbit/s against 8000 tokens/s of a model with 128 KiB
/// a token.
const FETCH_SPEEDUP: f64 = 10.0;

pub(super) fn seconds(prospect: &Prospect<'_>) -> f64 {
    let missing = f64::from(prospect.plan.prompt_tokens.saturating_sub(prospect.matched_tokens));
    let speedup = if prospect.plan.leg == Leg::Decode { FETCH_SPEEDUP } else { 1.0 };
    missing / (prospect.usual_speed * speedup)
}
