//! Which class goes next inside one pool.
//!
//! Classes are served in their order, except that each has a reserved share of the pool's tokens: while it waits it
//! earns its share of every token sent, and when it has earned about a prompt it goes before the classes above it. What
//! it is sent while others wait is taken from what it earned, so that over time a class that always waits gets its
//! share, or what the classes above leave if that is more.
//!
//! Invariants: a class that does not wait earns nothing and keeps nothing; credit and debt are bounded.
//! Not here: whose request inside the class (`fairness`).

use crate::Class;

/// Most tokens a class can be ahead or behind: a few seconds of a GPU's work, so that neither a burst of one class nor
/// an idle time of another is paid for long after.
const CREDIT_MAX: f64 = 65_536.0;

/// Tokens that a class must have earned to go before another: about one prompt, so that a class that waits a moment does
/// not overtake.
const OWED_MIN: f64 = 2048.0;

/// Earned and not used, in tokens, by [`Class`].
#[derive(Debug, Default)]
pub(crate) struct Shares {
    credit: [f64; Class::COUNT],
}

impl Shares {
    /// So many tokens of `class` go to a worker, while so many requests of each class wait.
    pub(crate) fn sent(&mut self, class: Class, tokens: u64, reserved: &[f64], waiting: &[u32]) {
        let tokens = tokens as f64;
        let alone = waiting.iter().enumerate().all(|(at, waiting)| at == class as usize || *waiting == 0);
        for (at, (credit, (share, waiting))) in self.credit.iter_mut().zip(reserved.iter().zip(waiting)).enumerate() {
            if at == class as usize {
                *credit -= if alone { 0.0 } else { tokens * (1.0 - share) };
            } else if *waiting > 0 {
                *credit += tokens * share;
            } else {
                *credit = credit.min(0.0);
            }
            *credit = credit.clamp(-CREDIT_MAX, CREDIT_MAX);
        }
    }

    /// The class to serve next of those that wait.
    pub(crate) fn next(&self, waits: impl Fn(Class) -> bool) -> Option<Class> {
        let mut first = None;
        for class in Class::ALL.into_iter().filter(|class| waits(*class)) {
            if self.credit.get(class as usize).is_some_and(|credit| *credit >= OWED_MIN) {
                return Some(class);
            }
            first = first.or(Some(class));
        }
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESERVED: [f64; 3] = [0.0, 0.2, 0.05];

    /// Tokens sent of each class when `waiting` always wait, in sends of 1000.
    fn served(waiting: [u32; 3], sends: u32) -> [u32; 3] {
        let mut shares = Shares::default();
        let mut served = [0; 3];
        for _ in 0..sends {
            let class = shares.next(|class| waiting[class as usize] > 0).unwrap();
            shares.sent(class, 1000, &RESERVED, &waiting);
            served[class as usize] += 1;
        }
        served
    }

    #[test]
    fn each_class_that_waits_gets_its_share() {
        for (waiting, expect) in [
            ([1, 0, 0], [1000, 0, 0]),
            ([1, 1, 0], [800, 200, 0]),
            ([1, 0, 1], [950, 0, 50]),
            ([1, 1, 1], [750, 200, 50]),
            ([0, 1, 1], [0, 950, 50]),
            ([0, 0, 1], [0, 0, 1000]),
        ] {
            let got = served(waiting, 1000);
            assert!(got.iter().zip(expect).all(|(got, expect)| got.abs_diff(expect) <= 5), "{waiting:?}: {got:?}");
        }
    }

    #[test]
    fn who_does_not_wait_earns_nothing() {
        let mut shares = Shares::default();
        for _ in 0..1000 {
            shares.sent(Class::Interactive, 1000, &RESERVED, &[5, 0, 0]);
        }
        assert_eq!(shares.next(|_| true), Some(Class::Interactive));
        for _ in 0..11 {
            shares.sent(Class::Interactive, 1000, &RESERVED, &[5, 1, 0]);
        }
        assert_eq!(shares.next(|_| true), Some(Class::Default), "who does, earns");
        shares.sent(Class::Interactive, 1000, &RESERVED, &[5, 0, 0]);
        assert_eq!(shares.next(|_| true), Some(Class::Interactive), "and keeps nothing when it stops waiting");
    }
}
