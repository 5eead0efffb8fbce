//! Which batches were taken, which are missing, and whether the publisher is still the one they came from.
//!
//! A publisher numbers its batches from 0 and begins anew when its engine restarts (vLLM 0.32, `ZmqEventPublisher`).
//! Pure: told of each number that comes, it says what that means.

use std::hash::{DefaultHasher, Hasher};

/// What a number on the live stream means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is the next.
    Take,
    /// It is known already, from a replay.
    Known,
    /// Those from here up to it are missing.
    Missing(u64),
    /// The publisher began anew.
    Restarted,
}

/// The last batch taken. The time in a batch makes it unlike any other of the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) number: u64,
    digest: u64,
}

impl Mark {
    pub(super) fn new(number: u64, payload: &[u8]) -> Self {
        let mut hasher = DefaultHasher::new();
        hasher.write(payload);
        Self { number, digest: hasher.finish() }
    }
}

#[derive(Debug, Default)]
pub(super) struct Sequence {
    /// The number that comes next; none while nothing is known.
    next: Option<u64>,
    last: Option<Mark>,
    /// The highest number on this connection's live stream.
    live: Option<u64>,
    /// Everything was taken since the publisher began, or since its cache was empty.
    pub(super) complete: bool,
}

impl Sequence {
    /// A new connection: its live stream may begin with what a replay told as well.
    pub(super) fn connected(&mut self) {
        self.live = None;
    }

    pub(super) fn next(&self) -> Option<u64> {
        self.next
    }

    pub(super) fn last(&self) -> Option<Mark> {
        self.last
    }

    /// Judges a number that came on the live stream.
    pub(super) fn live(&mut self, number: u64) -> Verdict {
        let began_anew = self.live.is_some_and(|live| number <= live);
        self.live = Some(number);
        match self.next {
            _ if began_anew => Verdict::Restarted,
            None if number == 0 => Verdict::Take,
            None => Verdict::Missing(0),
            Some(next) if number == next => Verdict::Take,
            Some(next) if number < next => Verdict::Known,
            Some(next) => Verdict::Missing(next),
        }
    }

    /// A batch was taken.
    pub(super) fn took(&mut self, mark: Mark) {
        match self.next {
            None => self.complete = mark.number == 0,
            Some(next) => self.complete &= mark.number == next,
        }
        self.next = Some(mark.number.saturating_add(1));
        self.last = Some(mark);
    }

    /// The publisher has published nothing yet.
    pub(super) fn is_fresh(&mut self) {
        (self.next, self.complete) = (Some(0), true);
    }

    /// What was taken means nothing any more.
    pub(super) fn forget(&mut self) {
        *self = Self { live: self.live, ..Self::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(numbers: &[u64]) -> Sequence {
        let mut sequence = Sequence::default();
        for number in numbers {
            sequence.live(*number);
            sequence.took(Mark::new(*number, b"x"));
        }
        sequence
    }

    #[test]
    fn verdicts() {
        for (taken, number, verdict) in [
            (&[][..], 0, Verdict::Take),
            (&[], 7, Verdict::Missing(0)),
            (&[0, 1], 2, Verdict::Take),
            (&[0, 1], 5, Verdict::Missing(2)),
            (&[0, 1], 0, Verdict::Restarted),
            (&[5], 5, Verdict::Restarted),
            (&[u64::MAX], 0, Verdict::Restarted),
        ] {
            assert_eq!(after(taken).live(number), verdict, "{number} after {taken:?}");
        }
    }

    #[test]
    fn a_new_connection_may_repeat_what_was_replayed() {
        let mut sequence = after(&[0, 1, 2]);
        sequence.connected();
        assert_eq!(sequence.live(1), Verdict::Known);
        assert_eq!(sequence.live(2), Verdict::Known);
        assert_eq!(sequence.live(3), Verdict::Take);
    }

    #[test]
    fn all_is_known_only_from_the_beginning_and_without_a_gap() {
        assert!(after(&[0, 1, 2]).complete);
        assert!(!after(&[1, 2]).complete);
        assert!(!after(&[0, 2]).complete);
        let mut sequence = after(&[3]);
        sequence.forget();
        assert_eq!((sequence.next(), sequence.last(), sequence.complete), (None, None, false));
        sequence.is_fresh();
        assert!(sequence.complete && sequence.next() == Some(0));
    }

    #[test]
    fn marks_tell_payloads_apart() {
        assert_eq!(Mark::new(3, b"a"), Mark::new(3, b"a"));
        assert_ne!(Mark::new(3, b"a"), Mark::new(3, b"b"));
        assert_ne!(Mark::new(3, b"a"), Mark::new(4, b"a"));
    }
}
