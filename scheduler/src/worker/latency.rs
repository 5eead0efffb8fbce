//! Whether a worker's first tokens come as late as predicted of it, or much later: outlier detection.
//!
//! Predictions are those of its own calibrated model (measured rate, what stood before), not of its pool: in a pool of
//! mixed GPUs the slow ones are no outliers, they are given less. A worker that turns several times slower than it was
//! is one, until its model has followed (minutes) or it recovers.
//!
//! Invariant: a verdict needs several windows in a row, each with a minimum of first tokens.
//! Not here: what is done about it (`health`, which bounds how many of a pool are out at once with its caller).

use std::time::Duration;

use crate::Tick;

/// Least length of a window.
const WINDOW: Duration = Duration::from_secs(5);
/// Age at which a window with too few first tokens begins again.
const WINDOW_MAX: Duration = Duration::from_secs(30);
/// First tokens that a window needs to say anything.
const SAMPLES_MIN: u32 = 3;
/// How many times later than predicted is an outlier.
const RATIO_MAX: f64 = 3.0;
/// Windows in a row that make one.
const WINDOWS: u32 = 3;
/// Seconds by which a first token may be late without meaning anything: a step of the engine, the network.
const GRACE_SECONDS: f64 = 0.25;
/// Weight of one first token in the mean ratio.
const WEIGHT: f64 = 0.1;

#[derive(Debug, Default)]
pub(crate) struct Latency {
    /// Mean of seconds taken over seconds predicted.
    ratio: Option<f64>,
    window: Window,
    /// Windows in a row in which it was an outlier.
    bad: u32,
}

#[derive(Debug, Default)]
struct Window {
    from: Tick,
    taken: f64,
    predicted: f64,
    samples: u32,
}

impl Latency {
    /// A first token came after `taken` seconds where `predicted` were expected. Whether the worker is an outlier now.
    pub(crate) fn observe(&mut self, now: Tick, taken: f64, predicted: f64) -> bool {
        let predicted = predicted.max(0.0) + GRACE_SECONDS;
        let ratio = taken / predicted;
        let mean = self.ratio.get_or_insert(ratio);
        *mean += (ratio - *mean) * WEIGHT;
        let window = &mut self.window;
        let open = now.since(window.from);
        if window.samples == 0 || (open > WINDOW_MAX && window.samples < SAMPLES_MIN) {
            *window = Window { from: now, ..Window::default() };
        }
        window.taken += taken;
        window.predicted += predicted;
        window.samples += 1;
        if open < WINDOW || window.samples < SAMPLES_MIN {
            return false;
        }
        let late = window.taken > RATIO_MAX * window.predicted;
        self.bad = if late { self.bad + 1 } else { 0 };
        self.window = Window::default();
        self.bad >= WINDOWS
    }

    /// What is known of it no longer holds.
    pub(crate) fn forget(&mut self) {
        *self = Self::default();
    }

    /// How punctual it is: 1 when first tokens come as predicted or sooner, less the later they are.
    pub(crate) fn punctuality(&self) -> f64 {
        self.ratio.map_or(1.0, |ratio| (1.0 / ratio.max(1.0)).clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One first token each second from `from` on, each taking `taken` seconds where one was predicted; the moment of
    /// the first verdict.
    fn verdict(latency: &mut Latency, from: u64, count: u64, taken: f64) -> Option<u64> {
        (from..from + count).find(|second| latency.observe(Tick(second * 1_000_000), taken, 1.0))
    }

    #[test]
    fn several_late_windows_in_a_row_make_an_outlier() {
        let mut latency = Latency::default();
        assert_eq!(verdict(&mut latency, 0, 600, 2.0), None, "late, but not by much");
        assert!((latency.punctuality() - 1.25 / 2.0).abs() < 0.01);
        let first = verdict(&mut latency, 600, 600, 10.0).unwrap();
        assert!((615..=625).contains(&first), "{first}");
        latency.forget();
        assert_eq!(latency.punctuality(), 1.0);
        assert_eq!(verdict(&mut latency, 2000, 10, 10.0), None, "begins again");
    }

    #[test]
    fn few_first_tokens_say_nothing() {
        let mut latency = Latency::default();
        for at in (0..40).map(|i| Tick(i * 31_000_000)) {
            assert!(!latency.observe(at, 100.0, 1.0));
        }
    }

    #[test]
    fn a_good_window_ends_a_bad_row() {
        let mut latency = Latency::default();
        for round in 0..20 {
            assert_eq!(verdict(&mut latency, round * 30, 12, 10.0), None);
            assert_eq!(verdict(&mut latency, round * 30 + 12, 18, 1.0), None);
        }
    }
}
