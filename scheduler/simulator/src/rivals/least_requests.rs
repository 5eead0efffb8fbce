//! Join the shortest queue: fewest requests outstanding, in the engine's queue or running.

use super::{Ask, Router, Setup, least};
use crate::rng::Rng;
use crate::run::Node;

pub(crate) struct LeastRequests;

impl LeastRequests {
    pub(crate) fn new(_: &Setup) -> Self {
        Self
    }
}

impl Router for LeastRequests {
    fn route(&mut self, _: &Ask<'_>, up: &[&Node], rng: &mut Rng) -> usize {
        least(up.iter().map(|node| node.requests() as f64), rng)
    }
}
