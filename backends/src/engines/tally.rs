//! Adding up what the ranks of one server report.

/// The samples of one metric: how many there were, and their sum. What is negative or not a number is passed over.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    sum: f64,
    samples: u32,
}

impl Tally {
    pub(super) fn add(&mut self, value: f64) {
        if value.is_finite() && value >= 0.0 {
            self.sum += value;
            self.samples += 1;
        }
    }

    /// `None` without a sample.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "such casts saturate; never negative")]
    pub(super) fn total(self) -> Option<u64> {
        (self.samples > 0).then_some(self.sum.round() as u64)
    }

    pub(super) fn count(self) -> Option<u32> {
        self.total().map(|total| u32::try_from(total).unwrap_or(u32::MAX))
    }

    /// Mean over the samples of a share between 0 and 1.
    pub(super) fn share(self) -> Option<f64> {
        (self.samples > 0).then(|| (self.sum / f64::from(self.samples)).min(1.0))
    }
}
