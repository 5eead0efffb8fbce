//! Prompt tokens that were sent to a worker and that it has not prefilled yet.
//!
//! Engines prefill first come, first served, several prompts in one step. Where a stream shows the first token, the end of
//! its prefill is seen and nothing is guessed; between such moments, and for answers that come whole, the tokens drain at
//! the worker's speed. Of prompts whose first token will be seen no more than a step's worth drains unseen, so that an
//! engine that hangs looks busier with everything that is sent to it.
//!
//! Invariant: the sum is that of the parts; no part is negative.

use std::collections::BTreeMap;

use crate::Tick;

/// Prompt tokens that an engine computes before any of their first tokens can be seen: a step of vLLM's default budget.
const STEP_TOKENS: f64 = 8192.0;

/// Position of one send in the order of all sends to a worker.
pub(crate) type SendNumber = u64;

#[derive(Debug)]
struct Part {
    tokens: f64,
    /// What drained of it unseen.
    drained: f64,
    /// Its first token will be seen.
    visible: bool,
}

impl Part {
    /// What may drain of it; a visible part keeps a token until it is seen, so that it still counts as being there.
    fn free(&self) -> f64 {
        if self.visible { (self.tokens - 1.0).max(0.0) } else { self.tokens }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Backlog {
    parts: BTreeMap<SendNumber, Part>,
    sent: SendNumber,
    sum: f64,
    /// Of `sum`, what may drain before a first token must be seen.
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
        self.parts.insert(self.sent, Part { tokens: f64::from(tokens), drained: 0.0, visible });
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
        let mut budget = (now.seconds_since(self.at) * speed).min(self.free);
        self.at = self.at.max(now);
        for part in self.parts.values_mut() {
            let drains = part.free().min(budget);
            (part.tokens, part.drained) = (part.tokens - drains, part.drained + drains);
            budget -= drains;
            if budget <= 0.0 {
                break;
            }
        }
        self.parts.retain(|_, part| part.visible || part.tokens > 0.0);
    }

    fn measure(&mut self) {
        self.sum = self.parts.values().map(|part| part.tokens).sum();
        let seen_later = || self.parts.values().filter(|part| part.visible);
        let unseen = (STEP_TOKENS - seen_later().map(|part| part.drained).sum::<f64>()).max(0.0);
        let visible: f64 = seen_later().map(Part::free).sum();
        let invisible: f64 = self.parts.values().filter(|part| !part.visible).map(Part::free).sum();
        self.free = invisible + visible.min(unseen);
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
    fn no_more_than_a_step_drains_before_first_tokens_are_seen() {
        let mut backlog = Backlog::default();
        let sent: Vec<_> = (0..20).map(|_| backlog.send(at(0.0), SPEED, 1000, true)).collect();
        assert_eq!(backlog.tokens(at(5.0), SPEED), 15_000.0);
        let hangs = 20_000.0 - STEP_TOKENS;
        assert_eq!(backlog.tokens(at(60.0), SPEED), hangs, "the engine hangs: it does not look idle");
        let more = backlog.send(at(60.0), SPEED, 1000, true);
        assert_eq!(backlog.tokens(at(90.0), SPEED), hangs + 1000.0, "and busier with all that is sent to it");
        backlog.started(at(90.0), SPEED, sent[0]);
        assert_eq!(backlog.tokens(at(90.0), SPEED), hangs + 999.0);
        assert_eq!(backlog.tokens(at(99.0), SPEED), hangs, "what was seen makes room for more to drain");
        sent.into_iter().chain([more]).for_each(|number| backlog.remove(at(99.0), SPEED, number));
        assert_eq!((backlog.tokens(at(99.0), SPEED), backlog.is_empty()), (0.0, true));
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
