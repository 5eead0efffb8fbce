//! Consistent hashing of the prompt's beginning with bounded loads (Mirrokni, Thorup, Zadimoghaddam, SODA 2018), as in
//! KubeAI: the first 256 tokens, no worker above 1.25 times the mean load. A margin of 10 requests on top, as others have
//! it, makes it weaker on every trace that was tried.
//!
//! The 256 tokens are counted from where prompts begin to differ, as an operator with a common system prompt sets it.

use super::{Ask, Router, Setup};
use crate::rng::{Rng, mix};
use crate::run::Node;

const PREFIX_TOKENS: u32 = 256;
const LOAD_FACTOR: f64 = 1.25;
/// Points of one worker on the ring (KubeAI's default).
const REPLICAS: u64 = 256;

pub(crate) struct BoundedHash {
    /// Points on the ring and whose they are.
    ring: Vec<(u64, u32)>,
    prefix_blocks: usize,
}

impl BoundedHash {
    pub(crate) fn new(setup: &Setup) -> Self {
        let points = |worker: u64| (0..REPLICAS).map(move |point| (mix(mix(worker) ^ point), worker as u32));
        let mut ring: Vec<_> = (0..setup.workers as u64).flat_map(points).collect();
        ring.sort_unstable();
        let prefix_blocks = setup.common_blocks + PREFIX_TOKENS.div_ceil(setup.block_tokens.max(1)) as usize;
        Self { ring, prefix_blocks }
    }
}

impl Router for BoundedHash {
    fn route(&mut self, ask: &Ask<'_>, up: &[&Node], _: &mut Rng) -> usize {
        let last = ask.blocks.get(self.prefix_blocks - 1).or(ask.blocks.last());
        // Hashes are chained, so that one stands for all before it.
        let key = mix(last.copied().unwrap_or(ask.number));
        let total: usize = up.iter().map(|node| node.requests()).sum();
        let mean = (total + 1) as f64 / up.len().max(1) as f64;
        let most = (mean * LOAD_FACTOR).ceil() as usize;
        let from = self.ring.partition_point(|(point, _)| *point < key);
        let around = self.ring.iter().cycle().skip(from).take(self.ring.len());
        let places = around.filter_map(|(_, worker)| up.iter().position(|node| node.number() == *worker));
        let mut free = places.filter(|at| up.get(*at).is_some_and(|node| node.requests() < most));
        free.next().unwrap_or(0)
    }
}
