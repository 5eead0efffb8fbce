//! When the core wants to be called without an event.
//!
//! Each owner holds at most one timer and remembers its moment, so that nothing stale is ever in here.

use std::collections::BTreeSet;

use crate::worker::Slot;
use crate::{RequestId, Tick};

/// Whose moment has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Timer {
    /// A request has waited long enough.
    Request(RequestId),
    /// A worker has something to do: a lease ends, a probe is due, a lane is to be looked at again.
    Worker(Slot),
}

#[derive(Debug, Default)]
pub(crate) struct Timers {
    due: BTreeSet<(Tick, Timer)>,
}

impl Timers {
    /// Moves `timer` from the moment `held` to `wanted`; `held` is what its owner remembers.
    pub(crate) fn set(&mut self, timer: Timer, held: &mut Option<Tick>, wanted: Option<Tick>) {
        if *held == wanted {
            return;
        }
        if let Some(at) = held.take() {
            self.due.remove(&(at, timer));
        }
        if let Some(at) = wanted {
            self.due.insert((at, timer));
        }
        *held = wanted;
    }

    /// Takes the first timer that is due; its owner must forget the moment it held.
    pub(crate) fn pop(&mut self, now: Tick) -> Option<Timer> {
        let &(at, timer) = self.due.first().filter(|(at, _)| *at <= now)?;
        self.due.remove(&(at, timer));
        Some(timer)
    }

    pub(crate) fn first(&self) -> Option<Tick> {
        self.due.first().map(|(at, _)| *at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_moment_per_owner_in_order() {
        let mut timers = Timers::default();
        let (mut a, mut b) = (None, None);
        timers.set(Timer::Request(RequestId(1)), &mut a, Some(Tick(30)));
        timers.set(Timer::Worker(Slot(1)), &mut b, Some(Tick(20)));
        timers.set(Timer::Request(RequestId(1)), &mut a, Some(Tick(10)));
        assert_eq!((timers.first(), a), (Some(Tick(10)), Some(Tick(10))));
        assert_eq!(timers.pop(Tick(9)), None);
        assert_eq!(timers.pop(Tick(25)), Some(Timer::Request(RequestId(1))));
        timers.set(Timer::Worker(Slot(1)), &mut b, None);
        assert_eq!((timers.pop(Tick(25)), timers.first(), b), (None, None, None));
    }
}
