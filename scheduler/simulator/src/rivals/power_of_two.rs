//! Two workers at random, of which the one with fewer requests outstanding (Mitzenmacher, 2001).

use super::{Ask, Router, Setup};
use crate::rng::Rng;
use crate::run::Node;

pub(crate) struct PowerOfTwo;

impl PowerOfTwo {
    pub(crate) fn new(_: &Setup) -> Self {
        Self
    }
}

impl Router for PowerOfTwo {
    fn route(&mut self, _: &Ask<'_>, up: &[&Node], rng: &mut Rng) -> usize {
        let one = rng.below(up.len());
        // Another than the first, where there is one.
        let other = (one + 1 + rng.below(up.len().saturating_sub(1))) % up.len().max(1);
        let requests = |at: usize| up.get(at).map_or(usize::MAX, |node| node.requests());
        if requests(other) < requests(one) { other } else { one }
    }
}
