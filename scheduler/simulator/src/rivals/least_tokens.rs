//! Fewest tokens promised: of the prompts there, those still to be computed; among equals, fewest tokens of all requests
//! there. To count whole prompts until their requests end, as some do, makes it weaker on every trace that was tried.

use super::{Ask, Router, Setup, least};
use crate::rng::Rng;
use crate::run::Node;

/// Weight of a token that is not to be computed: it decides between equals only.
const TIE: f64 = 1e-9;

pub(crate) struct LeastTokens;

impl LeastTokens {
    pub(crate) fn new(_: &Setup) -> Self {
        Self
    }
}

impl Router for LeastTokens {
    fn route(&mut self, ask: &Ask<'_>, up: &[&Node], rng: &mut Rng) -> usize {
        let promised = |node: &&Node| node.prefill_tokens(ask.now) + TIE * node.outstanding_tokens() as f64;
        least(up.iter().map(promised), rng)
    }
}
