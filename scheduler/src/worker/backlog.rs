//! Prompt tokens that were sent to a worker and that it has not prefilled yet.
//!
//! Engines prefill first come, first served. Where a stream shows the first token, the end of its prefill is seen and
//! nothing is guessed; between such moments, and for answers that come whole, the tokens drain at the worker's speed.
//! The first prompt whose first token will be seen holds the drain back: an engine that hangs never looks idle.
//!
//! Invariant: the sum is that of the parts; no part is negative.

use std::collections::BTreeMap;

use crate::Tick;

/// Position of one send in the order of all sends to a worker.
pub(crate) type SendNumber = u64;

#[derive(Debug)]
struct Part {
    tokens: f64,
    /// Its first token will be seen.
    visible: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Backlog {
    parts: BTreeMap<SendNumber, Part>,
    sent: SendNumber,
    sum: f64,
    /// Of `sum`, what may drain before a visible first token must come.
    free: f64,
    /// Until when the parts were drained.
    at: Tick,
}

impl Backlog {
    /// Tokens not prefilled at `now`, when they drain at `speed` tokens/s.
    pub(crate) fn tokens(&self, now: Tick, speed: f64) -> f64 {
        (self.sum - self.free.min(now.seconds_since(self.at) * speed)).max(0.0)
    }

    /// Adds a prompt with `tokens` to prefill.
    pub(crate) fn send(&mut self, now: Tick, speed: f64, tokens: u32, visible: bool) -> SendNumber {
        self.drain(now, speed);
        self.sent += 1;
        self.parts.insert(self.sent, Part { tokens: f64::from(tokens), visible });
        self.sum += f64::from(tokens);
        self.measure();
        self.sent
    }

    /// The prompt is prefilled, and so is what was sent before it and cannot be seen.
    pub(crate) fn started(&mut self, now: Tick, speed: f64, number: SendNumber) {
        self.drain(now, speed);
        self.parts.retain(|&at, part| at > number || (at < number && part.visible));
        self.measure();
    }

    /// The prompt will not be prefilled, or was.
    pub(crate) fn remove(&mut self, now: Tick, speed: f64, number: SendNumber) {
        self.drain(now, speed);
        self.parts.remove(&number);
        self.measure();
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Nothing but the last send is in it.
    pub(crate) fn is_single(&self) -> bool {
        self.parts.len() == 1
    }

    fn drain(&mut self, now: Tick, speed: f64) {
        let mut budget = now.seconds_since(self.at) * speed;
        self.at = self.at.max(now);
        while let Some(mut first) = self.parts.first_entry() {
            let part = first.get_mut();
            if part.visible || part.tokens > budget {
                // a visible part keeps a token until it is seen, so that it still counts as being there
                part.tokens = (part.tokens - budget).max(if part.visible { part.tokens.min(1.0) } else { 0.0 });
                break;
            }
            budget -= part.tokens;
            first.remove();
        }
    }

    fn measure(&mut self) {
        self.sum = self.parts.values().map(|part| part.tokens).sum();
        self.free = 0.0;
        for part in self.parts.values() {
            self.free += if part.visible { (part.tokens - 1.0).max(0.0) } else { part.tokens };
            if part.visible {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEED: f64 = 1000.0;

    fn at(seconds: f64) -> Tick {
        Tick((seconds * 1e6) as u64)
    }

    #[test]
    fn unseen_prompts_drain_by_time() {
        let mut backlog = Backlog::default();
        backlog.send(at(0.0), SPEED, 500, false);
        backlog.send(at(0.1), SPEED, 500, false);
        assert_eq!(backlog.tokens(at(0.1), SPEED), 900.0);
        assert_eq!(backlog.tokens(at(0.6), SPEED), 400.0);
        assert_eq!(backlog.tokens(at(9.0), SPEED), 0.0);
    }

    #[test]
    fn a_prompt_whose_first_token_is_awaited_holds_the_drain_back() {
        let mut backlog = Backlog::default();
        let first = backlog.send(at(0.0), SPEED, 500, true);
        let second = backlog.send(at(0.0), SPEED, 500, true);
        assert_eq!(backlog.tokens(at(60.0), SPEED), 501.0, "the engine hangs: it does not look idle");
        backlog.started(at(60.0), SPEED, first);
        assert_eq!(backlog.tokens(at(60.0), SPEED), 500.0);
        backlog.remove(at(60.0), SPEED, second);
        assert_eq!((backlog.tokens(at(60.0), SPEED), backlog.is_empty()), (0.0, true));
    }

    #[test]
    fn a_first_token_clears_what_was_sent_before_and_cannot_be_seen() {
        let mut backlog = Backlog::default();
        backlog.send(at(0.0), SPEED, 5000, false);
        let seen = backlog.send(at(0.0), SPEED, 10, true);
        backlog.send(at(0.0), SPEED, 70, true);
        backlog.started(at(0.5), SPEED, seen);
        assert_eq!(backlog.tokens(at(0.5), SPEED), 70.0);
    }

    #[test]
    fn a_clock_that_jumps_back_drains_nothing() {
        let mut backlog = Backlog::default();
        backlog.send(at(5.0), SPEED, 500, false);
        assert_eq!(backlog.tokens(at(1.0), SPEED), 500.0);
        backlog.send(at(1.0), SPEED, 500, false);
        assert_eq!(backlog.tokens(at(5.5), SPEED), 500.0);
    }
}
