//! Weighted scores, the default of llm-d's inference scheduler: 2 for a short queue (waiting requests, scaled between the
//! fleet's least and most), 2 for free KV memory, 3 for the matched share of the prompt; the highest sum wins.

use super::{Ask, Router, Setup, least};
use crate::rng::Rng;
use crate::run::Node;

const QUEUE: f64 = 2.0;
const KV: f64 = 2.0;
const PREFIX: f64 = 3.0;

pub(crate) struct Weighted223;

impl Weighted223 {
    pub(crate) fn new(_: &Setup) -> Self {
        Self
    }
}

impl Router for Weighted223 {
    fn route(&mut self, ask: &Ask<'_>, up: &[&Node], rng: &mut Rng) -> usize {
        let loads: Vec<_> = up.iter().map(|node| node.load()).collect();
        let least_waiting = loads.iter().map(|load| load.waiting).min().unwrap_or(0);
        let most_waiting = loads.iter().map(|load| load.waiting).max().unwrap_or(0);
        let range = f64::from(most_waiting - least_waiting);
        let scores = up.iter().zip(&loads).map(|(node, load)| {
            let queue = if range > 0.0 { f64::from(most_waiting - load.waiting) / range } else { 1.0 };
            let prefix = f64::from(node.matched_tokens(ask)) / f64::from(ask.prompt_tokens.max(1));
            -(QUEUE * queue + KV * (1.0 - load.kv_usage) + PREFIX * prefix)
        });
        least(scores, rng)
    }
}
