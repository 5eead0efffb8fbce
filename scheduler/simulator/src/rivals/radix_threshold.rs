//! Radix tree with thresholds: the `cache_aware` policy of SGLang's router and of vLLM's, with the values of its command
//! line: imbalance of 64 requests and 1.5 times, prefix match of 0.3.
//!
//! When the queues are out of balance by both measures: fewest requests. Otherwise the worker with the longest match, if it
//! is more than the threshold of the prompt, else the worker with the fewest requests.

use super::{Ask, Router, Setup, least};
use crate::rng::Rng;
use crate::run::Node;

const IMBALANCE_REQUESTS: usize = 64;
const IMBALANCE_FACTOR: f64 = 1.5;
const MATCH_MIN: f64 = 0.3;

pub(crate) struct RadixThreshold;

impl RadixThreshold {
    pub(crate) fn new(_: &Setup) -> Self {
        Self
    }
}

impl Router for RadixThreshold {
    fn route(&mut self, ask: &Ask<'_>, up: &[&Node], rng: &mut Rng) -> usize {
        let requests = || up.iter().map(|node| node.requests());
        let (low, high) = (requests().min().unwrap_or(0), requests().max().unwrap_or(0));
        let out_of_balance = high - low > IMBALANCE_REQUESTS && high as f64 > IMBALANCE_FACTOR * low as f64;
        let matched: Vec<u32> = up.iter().map(|node| node.matched_tokens(ask)).collect();
        let longest = matched.iter().copied().max().unwrap_or(0);
        let hit = f64::from(longest) > MATCH_MIN * f64::from(ask.prompt_tokens);
        if hit && !out_of_balance {
            return least(matched.iter().map(|tokens| -f64::from(*tokens)), rng);
        }
        least(requests().map(|count| count as f64), rng)
    }
}
