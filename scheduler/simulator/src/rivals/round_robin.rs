//! One after the other.

use super::{Ask, Router, Setup};
use crate::rng::Rng;
use crate::run::Node;

pub(crate) struct RoundRobin {
    next: usize,
}

impl RoundRobin {
    pub(crate) fn new(_: &Setup) -> Self {
        Self { next: 0 }
    }
}

impl Router for RoundRobin {
    fn route(&mut self, _: &Ask<'_>, up: &[&Node], _: &mut Rng) -> usize {
        self.next = self.next.wrapping_add(1);
        self.next % up.len().max(1)
    }
}
