//! Time as the core sees it: a number that its caller passes in.
//!
//! All arithmetic saturates; a clock that jumps back is treated as one that stood still.

use std::time::Duration;

/// Microseconds since the core was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Tick(pub u64);

impl Tick {
    /// The moment the core was made.
    pub const ZERO: Self = Self(0);

    /// The moment `wait` after this one.
    #[must_use]
    pub fn after(self, wait: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(wait.as_micros()).unwrap_or(u64::MAX)))
    }

    /// How long after `earlier` this is; zero when it is not after it.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }

    /// [`Tick::since`] in seconds.
    #[must_use]
    pub fn seconds_since(self, earlier: Self) -> f64 {
        self.0.saturating_sub(earlier.0) as f64 / 1e6
    }
}

/// Seconds as a duration; what is negative, not a number or beyond a day becomes zero or a day.
pub(crate) fn duration(seconds: f64) -> Duration {
    const DAY: f64 = 86_400.0;
    // as the core counts: whole microseconds; not a number becomes 0
    Duration::from_micros((seconds.clamp(0.0, DAY) * 1e6) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_saturates() {
        assert_eq!(Tick(5).after(Duration::from_micros(7)), Tick(12));
        assert_eq!(Tick(u64::MAX - 1).after(Duration::MAX), Tick(u64::MAX));
        assert_eq!(Tick(5).since(Tick(7)), Duration::ZERO);
        assert_eq!(Tick(2_500_000).seconds_since(Tick(500_000)), 2.0);
    }

    #[test]
    fn seconds_become_bounded_durations() {
        for (seconds, expect) in [
            (-1.0, Duration::ZERO),
            (f64::NAN, Duration::ZERO),
            (0.25, Duration::from_millis(250)),
            (f64::INFINITY, Duration::from_secs(86_400)),
        ] {
            assert_eq!(duration(seconds), expect, "{seconds}");
        }
    }
}
