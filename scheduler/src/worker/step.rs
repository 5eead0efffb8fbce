//! How long a worker takes for a token, and how much one more sequence slows the others: measured from what ended there.
//!
//! A straight line through (sequences in the batch, seconds per output token), fitted by least squares over decaying
//! sums, is what engines do between the extremes: reading the weights costs the same for every step, reading a sequence's
//! KV comes on top.
//!
//! Not here: the prefill (`rate`).

/// Weight that the past keeps at each new observation: the last 50 or so count.
const KEEP: f64 = 0.98;
/// Observations before the line is believed.
const TRUSTED_AFTER: f64 = 8.0;
/// Seconds per token until something ended: half to twice what current engines take.
pub(super) const ASSUMED_SECONDS: f64 = 0.02;
/// Seconds that one more sequence adds to every token until that is known: an 8-billion-parameter model on one
/// data-centre GPU. With 0 in its place, batches grow uneven until the first answers have ended.
const ASSUMED_SLOWDOWN: f64 = 0.0004;
/// Output tokens below which an answer says little about the pace.
const OUTPUT_MIN: u32 = 8;

#[derive(Debug, Default)]
pub(crate) struct Pace {
    weight: f64,
    sequences: f64,
    squares: f64,
    seconds: f64,
    products: f64,
    /// Seconds for one output token; asked far more often than it changes.
    token: Option<f64>,
}

impl Pace {
    /// A sequence generated `tokens` in `seconds` after its first, among `sequences`.
    pub(crate) fn observe(&mut self, tokens: u32, seconds: f64, sequences: f64) {
        if tokens < OUTPUT_MIN || !seconds.is_finite() {
            return;
        }
        let each = seconds / f64::from(tokens - 1);
        self.weight = self.weight * KEEP + 1.0;
        self.sequences = self.sequences * KEEP + sequences;
        self.squares = self.squares * KEEP + sequences * sequences;
        self.seconds = self.seconds * KEEP + each;
        self.products = self.products * KEEP + sequences * each;
        self.token = Some((self.seconds / self.weight).max(1e-6));
    }

    /// Seconds for one output token, of late.
    pub(crate) fn token_seconds(&self) -> f64 {
        self.token.unwrap_or(ASSUMED_SECONDS)
    }

    /// Seconds that one more sequence adds to every token of the others.
    pub(crate) fn slowdown_seconds(&self) -> f64 {
        if self.weight < TRUSTED_AFTER {
            return ASSUMED_SLOWDOWN;
        }
        let (mean, seconds) = (self.sequences / self.weight, self.seconds / self.weight);
        let covariance = self.products / self.weight - mean * seconds;
        let variance = self.squares / self.weight - mean * mean;
        // one sequence of variance is assumed, so that nothing is read into a batch that never changes
        (covariance / (variance.max(0.0) + 1.0)).clamp(0.0, seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_found() {
        let mut pace = Pace::default();
        assert_eq!((pace.token_seconds(), pace.slowdown_seconds()), (ASSUMED_SECONDS, ASSUMED_SLOWDOWN));
        for i in 0..200_u32 {
            let sequences = f64::from(i * 37 % 100);
            pace.observe(101, 100.0 * (0.0106 + 0.00042 * sequences), sequences);
        }
        assert!((pace.slowdown_seconds() / 0.00042 - 1.0).abs() < 0.02, "{}", pace.slowdown_seconds());
        assert!((pace.token_seconds() - 0.0314).abs() < 0.003, "{}", pace.token_seconds());
    }

    #[test]
    fn a_batch_that_never_changes_and_short_answers_teach_nothing() {
        let mut pace = Pace::default();
        for i in 0..100_u32 {
            pace.observe(100, 2.0 + 0.01 * f64::from(i % 3), 40.0);
            pace.observe(2, 50.0, f64::from(i));
            pace.observe(100, f64::NAN, 1.0);
        }
        assert!(pace.slowdown_seconds() < 1e-6);
        assert!((pace.token_seconds() - 0.02).abs() < 0.001);
    }
}
