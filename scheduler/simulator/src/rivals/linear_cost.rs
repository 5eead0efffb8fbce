//! Linear cost, the KV router of NVIDIA Dynamo: blocks to prefill (of requests there and of this one, what is cached
//! deducted) plus blocks to decode (held by requests there and of this one); weight and credit 1, temperature 0.

use super::{Ask, Router, Setup, least};
use crate::rng::Rng;
use crate::run::Node;

pub(crate) struct LinearCost {
    block_tokens: f64,
}

impl LinearCost {
    pub(crate) fn new(setup: &Setup) -> Self {
        Self { block_tokens: f64::from(setup.block_tokens.max(1)) }
    }
}

impl Router for LinearCost {
    fn route(&mut self, ask: &Ask<'_>, up: &[&Node], rng: &mut Rng) -> usize {
        let costs = up.iter().map(|node| {
            let prefill = node.prefill_tokens(ask.now) + f64::from(ask.prompt_tokens - node.matched_tokens(ask));
            let decode = node.context_tokens() as f64 + f64::from(ask.prompt_tokens - node.shared_tokens(ask));
            (prefill + decode) / self.block_tokens
        });
        least(costs, rng)
    }
}
