//! The policies that the scheduler is compared with, as strong as their documentation allows.
//!
//! Each is one file with the parameters its authors publish. All of them send at once, to the engine's own first-come
//! queue; they see every engine's true state without delay, a crash included, where the real ones poll; matched tokens
//! are those truly in the engine's cache or in a prompt that is on its way there; ties are broken at random.
//!
//! Not here: what a rival's own admission, retry or disaggregation would do.

pub(crate) mod bounded_hash;
pub(crate) mod least_requests;
pub(crate) mod least_tokens;
pub(crate) mod linear_cost;
pub(crate) mod power_of_two;
pub(crate) mod radix_threshold;
pub(crate) mod round_robin;
pub(crate) mod weighted_223;

use forebay_scheduler::Tick;

use crate::Row;
use crate::rng::Rng;
use crate::run::Node;

/// What is known before the first request.
pub(crate) struct Setup {
    pub(crate) workers: usize,
    pub(crate) block_tokens: u32,
    /// Leading blocks that every prompt shares, as an operator would know of a common system prompt.
    pub(crate) common_blocks: usize,
}

/// A request as a router sees it.
pub(crate) struct Ask<'a> {
    pub(crate) now: Tick,
    pub(crate) prompt_tokens: u32,
    /// As in [`Row::blocks`], those that a cache can serve.
    pub(crate) blocks: &'a [u64],
    /// Unlike that of any other request.
    pub(crate) number: u64,
}

impl<'a> Ask<'a> {
    pub(crate) fn new(now: Tick, number: u32, row: &'a Row, block_tokens: u32) -> Self {
        let reusable = row.reusable_blocks(block_tokens).min(row.blocks.len());
        let blocks = row.blocks.get(..reusable).unwrap_or_default();
        Self { now, prompt_tokens: row.prompt_tokens, blocks, number: u64::from(number) }
    }
}

/// Chooses a worker at once.
pub(crate) trait Router {
    /// Which of `up` gets the request. `up` is not empty.
    fn route(&mut self, ask: &Ask<'_>, up: &[&Node], rng: &mut Rng) -> usize;
}

/// Index of the least value, at random among equals; 0 when there is none.
fn least(values: impl Iterator<Item = f64>, rng: &mut Rng) -> usize {
    let (mut best, mut at, mut equal) = (f64::INFINITY, 0, 0);
    for (index, value) in values.enumerate() {
        match value.total_cmp(&best) {
            std::cmp::Ordering::Less => (best, at, equal) = (value, index, 1),
            std::cmp::Ordering::Equal => {
                equal += 1;
                if rng.below(equal) == 0 {
                    at = index;
                }
            }
            std::cmp::Ordering::Greater => {}
        }
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_wins_and_ties_are_spread() {
        let mut rng = Rng::new(7, 0);
        assert_eq!(least([3.0, 1.0, 2.0].into_iter(), &mut rng), 1);
        assert_eq!(least(std::iter::empty(), &mut rng), 0);
        let mut counts = [0; 3];
        for _ in 0..3000 {
            counts[least([1.0, 1.0, 1.0].into_iter(), &mut rng)] += 1;
        }
        assert!(counts.iter().all(|count| (850..1150).contains(count)), "{counts:?}");
    }
}
