//! How often requests may be sent a second time: a share of the traffic, so that engines in trouble are not asked all the
//! more for it. Retries and hedges share one, going on with streams has its own. Time is an argument.

use tokio::time::Instant;

/// Second tries that each request allows.
const SHARE: f64 = 0.1;
/// As many are always allowed after a while, so that a quiet gateway can retry at all.
pub(super) const RETRIES_FLOOR: f64 = 20.0;
/// The same for streams that broke off: a worker that dies breaks all it had under way at once. Twice the sequences that
/// an engine usually runs.
pub(super) const CONTINUATIONS_FLOOR: f64 = 512.0;
/// Seconds until one of these is allowed again.
const FLOOR_SECONDS: f64 = 1.0;
/// More are not saved up: a few seconds of a busy gateway's traffic.
const SAVED_MAX: f64 = 1000.0;

/// Second tries that are allowed now.
#[derive(Debug)]
pub(super) struct Budget {
    allowed: f64,
    floor: f64,
    at: Instant,
}

impl Budget {
    /// `floor`: as many are allowed without traffic.
    pub(super) fn new(floor: f64, now: Instant) -> Self {
        Self { allowed: floor, floor, at: now }
    }

    /// A request came.
    pub(super) fn earn(&mut self) {
        self.allowed = (self.allowed + SHARE).min(SAVED_MAX);
    }

    /// Whether one may be sent a second time; it counts.
    pub(super) fn spend(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.at).as_secs_f64() / FLOOR_SECONDS;
        self.at = now.max(self.at);
        self.allowed = self.allowed.max((self.allowed + passed).min(self.floor));
        let may = self.allowed >= 1.0;
        self.allowed -= f64::from(u8::from(may));
        may
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn spent(budget: &mut Budget, now: Instant) -> usize {
        (0..10_000).take_while(|_| budget.spend(now)).count()
    }

    #[test]
    fn a_tenth_of_the_traffic_and_a_little_for_a_quiet_gateway() {
        let began = Instant::now();
        let mut budget = Budget::new(RETRIES_FLOOR, began);
        assert_eq!(spent(&mut budget, began), 20);
        (0..1000).for_each(|_| budget.earn());
        let spent_then = spent(&mut budget, began);
        assert!((99..=100).contains(&spent_then), "{spent_then}");
        assert_eq!(spent(&mut budget, began + Duration::from_secs(3)), 3);
        assert_eq!(spent(&mut budget, began + Duration::from_secs(3600)), 20, "no more than the floor by time");
        (0..100_000).for_each(|_| budget.earn());
        assert_eq!(spent(&mut budget, began + Duration::from_secs(3600)), 1000, "not saved for ever");
        assert!(!budget.spend(began), "time does not run backwards");
    }

    #[test]
    fn over_any_traffic_it_keeps_to_its_share() {
        let began = Instant::now();
        for failing in [0.02, 0.1, 0.5, 1.0] {
            let mut budget = Budget::new(RETRIES_FLOOR, began);
            let (mut wanted, mut sent) = (0.0, 0);
            for number in 0..50_000_u64 {
                let now = began + Duration::from_millis(number);
                budget.earn();
                wanted += failing;
                while wanted >= 1.0 {
                    wanted -= 1.0;
                    sent += u32::from(budget.spend(now));
                }
            }
            let share = f64::from(sent) / 50_000.0;
            assert!((share - f64::min(failing, 0.1)).abs() < 0.005, "{failing} of them fail: {share}");
        }
    }
}
