//! What calls cost: every single one, by kind, in rounds that make the same calls.
//!
//! The machine is not ours alone, so that a round's percentiles are at most as good as the machine was at the time: the
//! least and the median of the rounds are given. The longest calls are judged by the least that each took in any round,
//! which another program's turn on the core does not touch.

use std::time::Duration;

/// What the core was called for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Arrived,
    FirstToken,
    Ended,
    Failed,
    Kv,
    Load,
    Fleet,
    Tick,
}

impl Call {
    pub(crate) const NAMES: [(Self, &str); 8] = [
        (Self::Arrived, "arrived: the decision"),
        (Self::FirstToken, "first token"),
        (Self::Ended, "ended"),
        (Self::Failed, "attempt failed: decided again"),
        (Self::Kv, "KV event"),
        (Self::Load, "load polled"),
        (Self::Fleet, "worker left, joined, probed"),
        (Self::Tick, "timer"),
    ];

    /// Whether it is part of what every request costs.
    fn is_of_a_request(self) -> bool {
        !matches!(self, Self::Kv | Self::Load | Self::Fleet)
    }
}

/// Nanoseconds of each call of one round, by kind in the order of the calls.
#[derive(Debug, Default)]
pub(crate) struct Costs {
    nanos: [Vec<u32>; Call::NAMES.len()],
    pub(crate) refused: u64,
}

impl Costs {
    pub(crate) fn add(&mut self, call: Call, took: Duration) {
        if let Some(of) = self.nanos.get_mut(call as usize) {
            of.push(u32::try_from(took.as_nanos()).unwrap_or(u32::MAX));
        }
    }

    pub(crate) fn of(&self, call: Call) -> &[u32] {
        self.nanos.get(call as usize).map_or(&[], Vec::as_slice)
    }

    /// Time of all calls of the requests themselves.
    pub(crate) fn of_requests(&self) -> Duration {
        let calls = Call::NAMES.iter().filter(|(call, _)| call.is_of_a_request());
        calls.map(|(call, _)| total(self.of(*call))).sum()
    }

    /// Mean of one kind of call, in seconds.
    pub(crate) fn mean(&self, call: Call) -> f64 {
        let of = self.of(call);
        total(of).as_secs_f64() / of.len().max(1) as f64
    }

    /// Each call at the least that it took in either.
    pub(crate) fn least(&mut self, other: &Self) {
        for (mine, theirs) in self.nanos.iter_mut().zip(&other.nanos) {
            assert_eq!(mine.len(), theirs.len(), "rounds make the same calls");
            mine.iter_mut().zip(theirs).for_each(|(mine, theirs)| *mine = (*mine).min(*theirs));
        }
    }
}

fn total(nanos: &[u32]) -> Duration {
    Duration::from_nanos(nanos.iter().map(|nanos| u64::from(*nanos)).sum())
}

/// One figure of several rounds.
#[derive(Debug, Default, Clone)]
pub(crate) struct Series(Vec<f64>);

impl Series {
    pub(crate) fn add(&mut self, value: f64) {
        self.0.push(value);
        self.0.sort_by(f64::total_cmp);
    }

    pub(crate) fn least(&self) -> f64 {
        self.0.first().copied().unwrap_or(f64::NAN)
    }

    pub(crate) fn most(&self) -> f64 {
        self.0.last().copied().unwrap_or(f64::NAN)
    }

    pub(crate) fn median(&self) -> f64 {
        self.0.get(self.0.len() / 2).copied().unwrap_or(f64::NAN)
    }
}

/// Shares of calls for which a time is given.
pub(crate) const SHARES: [f64; 4] = [0.5, 0.99, 0.999, 1.0];

/// The times, in microseconds, within which these shares of the calls were done.
pub(crate) fn percentiles(nanos: &[u32]) -> [f64; SHARES.len()] {
    let mut sorted = nanos.to_vec();
    sorted.sort_unstable();
    SHARES.map(|share| {
        let rank = (share * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).map_or(f64::NAN, |nanos| f64::from(*nanos) / 1e3)
    })
}
