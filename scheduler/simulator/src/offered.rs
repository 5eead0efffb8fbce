//! How much work a trace is, and the arrival rate that makes it a given share of a fleet's capacity.
//!
//! The work of a request, in seconds of one engine:
//! `uncached_tokens / prefill_tokens_per_s + output_tokens * (step_ms_per_seq + step_ms / B) / 1000`.
//! Uncached tokens are those that one infinite cache, which sees the whole trace in order, would not hold: no placement
//! can need fewer. `B` is the batch that an engine can hold at the trace's mean context,
//! `min(max_batch, kv_tokens / mean(prompt + output))`, at least 1: a full batch shares the constant part of its steps.
//! So load 1.0 is the most that perfect placement and full batches could serve; real runs saturate below it.
//!
//! Load = sum of work / (engines, counted by their speed, * time between the first and the last arrival).

use foldhash::{HashSet, HashSetExt};

use crate::{Settings, Trace};

/// What a trace asks of an engine.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Offered {
    /// Seconds of one engine of speed 1.
    pub engine_seconds: f64,
    /// Prompt tokens that one infinite cache would not hold.
    pub uncached_tokens: u64,
    /// All prompt tokens.
    pub prompt_tokens: u64,
    /// All output tokens.
    pub output_tokens: u64,
    /// Sequences that share a step in this account.
    pub batch: f64,
    /// Seconds between the first and the last arrival at rate 1.
    pub span_seconds: f64,
}

impl Offered {
    /// Counts a trace against the engine of `settings`; its rate does not matter.
    #[must_use]
    pub fn of(trace: &Trace, settings: &Settings) -> Self {
        let engine = &settings.engine;
        let (mut seen, mut uncached, mut prompt, mut output) = (HashSet::new(), 0, 0, 0);
        for row in &trace.rows {
            let reusable = row.blocks.iter().take(row.reusable_blocks(trace.block_tokens));
            let matched = reusable.take_while(|block| seen.contains(*block)).count() as u64;
            uncached += u64::from(row.prompt_tokens).saturating_sub(matched * u64::from(trace.block_tokens));
            prompt += u64::from(row.prompt_tokens);
            output += u64::from(row.output_tokens);
            seen.extend(row.blocks.iter().copied());
        }
        let context = (prompt + output) as f64 / trace.rows.len().max(1) as f64;
        let kv_tokens = f64::from(engine.kv_blocks) * f64::from(engine.block_tokens);
        let batch = f64::from(engine.max_batch).min(kv_tokens / context.max(1.0)).max(1.0);
        let output_seconds = (engine.step_ms_per_seq + engine.step_ms / batch) / 1000.0;
        let engine_seconds = uncached as f64 / engine.prefill_tokens_per_s + output as f64 * output_seconds;
        Self {
            engine_seconds,
            uncached_tokens: uncached,
            prompt_tokens: prompt,
            output_tokens: output,
            batch,
            span_seconds: trace.span().as_secs_f64(),
        }
    }

    /// Share of the fleet's capacity that the trace asks for at `rate`; infinite when all arrives at once.
    #[must_use]
    pub fn load(&self, settings: &Settings, rate: f64) -> f64 {
        let fleet: f64 = (0..settings.workers).map(|worker| settings.speed(worker)).sum();
        self.engine_seconds * rate / (fleet * self.span_seconds)
    }

    /// The rate at which [`Offered::load`] is `load`; 0 when all arrives at once.
    #[must_use]
    pub fn rate_for(&self, settings: &Settings, load: f64) -> f64 {
        load / self.load(settings, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use forebay_scheduler::Class;

    use super::*;
    use crate::{EngineConfig, Row};

    fn row(seconds: u64, prompt_tokens: u32, blocks: &[u64]) -> Row {
        let at = Duration::from_secs(seconds);
        Row { at, prompt_tokens, output_tokens: 100, blocks: Arc::from(blocks), tenant: 0, class: Class::Default }
    }

    #[test]
    fn work_is_counted_against_one_infinite_cache() {
        let rows = vec![
            row(0, 40, &[1, 2]),
            row(1, 40, &[1, 2]),
            // Wholly seen before, and still its last block is computed.
            row(2, 32, &[1, 2]),
            // The leading run counts, not what comes after a gap.
            row(10, 40, &[9, 2]),
        ];
        let trace = Trace { block_tokens: 16, rows };
        let engine =
            EngineConfig { prefill_tokens_per_s: 8.0, step_ms: 10.0, step_ms_per_seq: 1.0, ..EngineConfig::default() };
        let settings = Settings { workers: 2, engine: EngineConfig { kv_blocks: 69, ..engine }, ..Settings::default() };
        let offered = Offered::of(&trace, &settings);
        assert_eq!(
            (offered.uncached_tokens, offered.prompt_tokens, offered.output_tokens),
            (40 + 8 + 16 + 40, 152, 400)
        );
        // 69 blocks of 16 hold 8 sequences of 38 + 100 tokens.
        assert_eq!(offered.batch, 8.0);
        assert!((offered.engine_seconds - (104.0 / 8.0 + 400.0 * (1.0 + 10.0 / 8.0) / 1000.0)).abs() < 1e-9);
        assert!((offered.load(&settings, 1.0) - offered.engine_seconds / 20.0).abs() < 1e-9);
        let rate = offered.rate_for(&settings, 0.75);
        assert!((offered.load(&settings, rate) - 0.75).abs() < 1e-9);
        let faster = Settings { speeds: vec![3.0, 1.0], ..settings };
        assert!((offered.load(&faster, rate) - 0.375).abs() < 1e-9);
    }
}
