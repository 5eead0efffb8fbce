//! Fewest tokens outstanding: prompts of all requests that have not ended, and what they have generated so far.

use super::{Ask, Router, Setup, least};
use crate::rng::Rng;
use crate::run::Node;

pub(crate) struct LeastTokens;

impl LeastTokens {
    pub(crate) fn new(_: &Setup) -> Self {
        Self
    }
}

impl Router for LeastTokens {
    fn route(&mut self, _: &Ask<'_>, up: &[&Node], rng: &mut Rng) -> usize {
        least(up.iter().map(|node| node.outstanding_tokens() as f64), rng)
    }
}
