//! What arrives: rows of a trace, spread inside coarse time steps and scaled to a rate.
//!
//! Not here: files and their format (the program that reads them), how much work a trace is (`offered`).

use std::sync::Arc;
use std::time::Duration;

use forebay_scheduler::Class;

use crate::rng::{Rng, mix};

/// One request of a trace.
#[derive(Debug, Clone)]
pub struct Row {
    /// Arrival, from the trace's beginning.
    pub at: Duration,
    /// Tokens of the prompt; 0 counts as 1.
    pub prompt_tokens: u32,
    /// Tokens that the engine will generate. Only engines know it before the end.
    pub output_tokens: u32,
    /// Chained hashes of the prompt's full blocks, [`Trace::block_tokens`] tokens each: equal hashes mean equal tokens up to
    /// that block's end. Empty where the trace says nothing of content; then nothing is ever shared.
    pub blocks: Arc<[u64]>,
    /// Whose request it is.
    pub tenant: u32,
    /// Its priority.
    pub class: Class,
}

/// Requests in the order of their arrival.
#[derive(Debug, Clone)]
pub struct Trace {
    /// Tokens in one of [`Row::blocks`].
    pub block_tokens: u32,
    /// By [`Row::at`]; a row's index is the request's number in every log.
    pub rows: Vec<Row>,
}

impl Trace {
    /// The hash that stands for a block id of a trace file. Ids are chained already, so that one id is one prefix.
    #[must_use]
    pub fn block_hash(id: u64) -> u64 {
        mix(id)
    }

    /// Time from the first possible arrival to the last one, before any scaling.
    #[must_use]
    pub fn span(&self) -> Duration {
        self.rows.iter().map(|row| row.at).max().unwrap_or_default()
    }

    /// Arrival times of all rows. Rows that share a time are first spread at random over the `jitter` that follows it
    /// (a recorder that works in steps hides when in its step a request came); then all times are divided by `rate`.
    #[must_use]
    pub fn arrivals(&self, rate: f64, jitter: Duration, seed: u64) -> Vec<Duration> {
        let mut rng = Rng::new(seed, 1);
        let mut times = Vec::with_capacity(self.rows.len());
        for step in self.rows.chunk_by(|a, b| a.at == b.at) {
            let mut offsets: Vec<f64> = step.iter().map(|_| jitter.as_secs_f64() * rng.unit()).collect();
            offsets.sort_by(f64::total_cmp);
            times.extend(step.iter().zip(offsets).map(|(row, offset)| (row.at.as_secs_f64() + offset) / rate));
        }
        times.into_iter().map(|seconds| Duration::try_from_secs_f64(seconds).unwrap_or_default()).collect()
    }
}

impl Row {
    /// Blocks of the prompt that a cache can serve: at least one token is always computed, since its output is needed.
    #[must_use]
    pub fn reusable_blocks(&self, block_tokens: u32) -> usize {
        (self.prompt_tokens.saturating_sub(1) / block_tokens.max(1)) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(times: &[u64]) -> Trace {
        let row = |at: &u64| Row {
            at: Duration::from_millis(*at),
            prompt_tokens: 1,
            output_tokens: 1,
            blocks: Arc::from([]),
            tenant: 0,
            class: Class::Default,
        };
        Trace { block_tokens: 16, rows: times.iter().map(row).collect() }
    }

    #[test]
    fn arrivals_are_scaled_and_spread_within_their_step() {
        let trace = rows(&[0, 0, 0, 3000, 6000, 6000]);
        let plain = trace.arrivals(2.0, Duration::ZERO, 1);
        assert_eq!(plain.iter().map(Duration::as_millis).collect::<Vec<_>>(), [0, 0, 0, 1500, 3000, 3000]);
        let spread = trace.arrivals(1.0, Duration::from_secs(3), 1);
        assert!(spread.is_sorted());
        for (row, at) in trace.rows.iter().zip(&spread) {
            assert!((row.at..row.at + Duration::from_secs(3)).contains(at), "{at:?}");
        }
        assert_eq!(spread, trace.arrivals(1.0, Duration::from_secs(3), 1));
        assert_ne!(spread, trace.arrivals(1.0, Duration::from_secs(3), 2));
    }

    #[test]
    fn the_last_token_is_never_served_by_a_cache() {
        for (prompt_tokens, expect) in [(0, 0), (1, 0), (16, 0), (17, 1), (32, 1), (33, 2)] {
            let row = Row { prompt_tokens, ..rows(&[0]).rows.remove(0) };
            assert_eq!(row.reusable_blocks(16), expect, "{prompt_tokens}");
        }
    }
}
