//! How fast a worker prefills, measured from what it did.
//!
//! A busy period begins when a prompt is sent to a worker with nothing to prefill and ends when there is nothing again
//! (or after two seconds, so that a worker that is never idle is measured too). Tokens whose first token came, over
//! the time it took: one idle dispatch is the simplest such period. The count is of *predicted* uncached tokens, since
//! those are what the rate will divide. Periods that contain prompts whose prefill cannot be seen measure nothing.
//!
//! The mean is weighted by tokens (sums of tokens and of seconds, both decaying), and one measurement moves it by a
//! bounded factor: a prefix hit that nobody predicted reads as a wildly fast worker.

use std::time::Duration;

use crate::Tick;

/// Half-life of what was measured.
const HALF_LIFE: Duration = Duration::from_secs(120);
/// Measurements before a worker's own rate is used in place of its pool's.
pub(super) const TRUSTED_AFTER: u32 = 4;
/// Fewer tokens than this measure the network and one decode step.
const PERIOD_TOKENS_MIN: f64 = 64.0;
const PERIOD_MAX: Duration = Duration::from_secs(2);
/// A measurement counts as at most this much faster or slower than the mean.
const STEP_MAX: f64 = 4.0;
/// What can be believed of one engine, tokens/s.
pub(super) const RATE_BOUNDS: (f64, f64) = (1.0, 1e7);

#[derive(Debug, Default)]
pub(crate) struct Rate {
    tokens: f64,
    seconds: f64,
    at: Tick,
    measured: u32,
    /// Tokens/s, once something was measured.
    mean: Option<f64>,
    period: Option<Period>,
}

#[derive(Debug)]
struct Period {
    from: Tick,
    tokens: f64,
    clean: bool,
}

impl Rate {
    /// Tokens/s, once enough was measured.
    pub(crate) fn value(&self) -> Option<f64> {
        self.mean.filter(|_| self.measured >= TRUSTED_AFTER)
    }

    /// A prompt was sent to a worker that had others to prefill, or none: that begins a period. `visible` when its
    /// first token will be seen and nothing foreign is in its way.
    pub(crate) fn sent(&mut self, now: Tick, visible: bool, idle: bool) {
        if idle {
            self.period = Some(Period { from: now, tokens: 0.0, clean: true });
        }
        if let Some(period) = &mut self.period {
            period.clean &= visible;
        }
    }

    /// The first token of a prompt with `tokens` to prefill came; `idle` when nothing is left to prefill. `derate` is
    /// the speed the worker is known to run at now, against its usual one.
    pub(crate) fn started(&mut self, now: Tick, tokens: u32, idle: bool, derate: f64) {
        let Some(period) = &mut self.period else { return };
        period.tokens += f64::from(tokens);
        let (clean, tokens, from) = (period.clean, period.tokens, period.from);
        if !idle && now.since(from) < PERIOD_MAX {
            return;
        }
        self.period = (!idle).then_some(Period { from: now, tokens: 0.0, clean });
        if clean && tokens >= PERIOD_TOKENS_MIN {
            self.measure(now, tokens, now.seconds_since(from) * derate);
        }
    }

    /// A prompt left without being prefilled, so that this period's tokens are not those of its time.
    pub(crate) fn spoil(&mut self) {
        self.period = None;
    }

    fn measure(&mut self, now: Tick, tokens: f64, seconds: f64) {
        let mut rate = (tokens / seconds.max(1e-6)).clamp(RATE_BOUNDS.0, RATE_BOUNDS.1);
        if let Some(mean) = self.mean {
            rate = rate.clamp(mean / STEP_MAX, mean * STEP_MAX);
        }
        let keep = (-now.seconds_since(self.at) / HALF_LIFE.as_secs_f64()).exp2();
        self.tokens = self.tokens * keep + tokens;
        self.seconds = self.seconds * keep + tokens / rate;
        self.at = self.at.max(now);
        self.measured = self.measured.saturating_add(1);
        self.mean = Some(self.tokens / self.seconds);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: f64) -> Tick {
        Tick((seconds * 1e6) as u64)
    }

    /// `count` prompts of `tokens`, each sent when the one before was done, at `speed` tokens/s from `from` on.
    fn dispatches(rate: &mut Rate, from: f64, count: u32, tokens: u32, speed: f64) -> f64 {
        let mut now = from;
        for _ in 0..count {
            rate.sent(at(now), true, true);
            now += f64::from(tokens) / speed;
            rate.started(at(now), tokens, true, 1.0);
        }
        now
    }

    #[test]
    fn idle_dispatches_measure_the_rate() {
        let mut rate = Rate::default();
        dispatches(&mut rate, 0.0, TRUSTED_AFTER - 1, 1000, 8000.0);
        assert_eq!(rate.value(), None, "too few to be trusted");
        dispatches(&mut rate, 1.0, 1, 1000, 8000.0);
        assert!((rate.value().unwrap() - 8000.0).abs() < 10.0);
    }

    #[test]
    fn a_busy_worker_is_measured_over_the_period() {
        let mut rate = Rate::default();
        for i in 0..30 {
            rate.sent(at(0.0), true, i == 0);
        }
        for i in 1..=30_u32 {
            rate.started(at(f64::from(i) * 0.5), 2000, i == 30, 1.0);
        }
        let value = rate.value().unwrap();
        assert!((value - 4000.0).abs() < 40.0, "{value}");
    }

    #[test]
    fn one_measurement_moves_it_by_a_bounded_factor() {
        let mut rate = Rate::default();
        let now = dispatches(&mut rate, 0.0, 4, 1000, 8000.0);
        dispatches(&mut rate, now, 1, 1000, 8_000_000.0);
        let value = rate.value().unwrap();
        assert!(value > 8000.0 && value < 10_000.0, "{value}");
    }

    #[test]
    fn it_follows_a_change_and_forgets() {
        let mut rate = Rate::default();
        dispatches(&mut rate, 0.0, 50, 1000, 8000.0);
        dispatches(&mut rate, 1200.0, 50, 1000, 4000.0);
        let value = rate.value().unwrap();
        assert!((value - 4000.0).abs() < 100.0, "{value}");
    }

    #[test]
    fn what_cannot_be_seen_measures_nothing() {
        let mut rate = Rate::default();
        for i in 0..20 {
            rate.sent(at(f64::from(i)), i % 2 == 0, true);
            rate.sent(at(f64::from(i)), i % 2 == 1, false);
            rate.started(at(f64::from(i) + 0.5), 5000, true, 1.0);
        }
        assert_eq!(rate.value(), None);
    }

    #[test]
    fn a_throttled_gpu_does_not_look_slow_for_ever() {
        let mut rate = Rate::default();
        for i in 0..8 {
            rate.sent(at(f64::from(i)), true, true);
            rate.started(at(f64::from(i) + 0.25), 1000, true, 0.5);
        }
        assert!((rate.value().unwrap() - 8000.0).abs() < 10.0);
    }
}
