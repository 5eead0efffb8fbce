//! How many tokens requests generate, learned from those that ended.
//!
//! Kept per tenant and route (chat, completions, …) of one pool, since what an application asks for is alike; a pair
//! that ended too few requests is judged by its route, a new route by an assumption. Mean and variance decay with each
//! observation. A sum over many sequences is far more certain than one of them: a worker therefore reserves the means
//! plus a number of standard deviations of the *sum*, not a quantile of each, which would leave half its memory unused.
//!
//! Invariant: memory is bounded; pairs not seen for long are forgotten first.
//! Not here: what the client allows (`max_tokens`), which only ever lowers the expectation (`Plan`).

use std::collections::{BTreeMap, HashMap};

use foldhash::fast::FixedState;

use crate::{Leg, Request, RouteId, TenantId};

/// Weight of one ended request.
const WEIGHT: f64 = 0.05;
/// Ended requests before a tenant's own outputs are believed.
const TRUSTED_AFTER: u32 = 8;
/// Pairs of one generation; two generations are kept.
const PAIRS_MAX: usize = 4096;
/// Routes known; there are as many as the gateway has kinds of request.
const ROUTES_MAX: usize = 64;
/// What is assumed of a route that ended nothing yet: the mean of public conversation traces, and as wide as it is long.
const ASSUMED: Expected = Expected { mean: 256.0, variance: 256.0 * 256.0 };

/// Output tokens of one sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Expected {
    pub(crate) mean: f64,
    pub(crate) variance: f64,
}

/// What one request is expected to take of a KV cache.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Plan {
    /// What of it that is about.
    pub(crate) leg: Leg,
    pub(crate) prompt_tokens: u32,
    /// Sequences that will be generated, at least 1.
    pub(crate) sequences: u32,
    /// Mean output tokens of one sequence.
    pub(crate) output_each: f64,
    /// Mean output tokens over all sequences.
    pub(crate) output_tokens: u64,
    /// Variance of that.
    pub(crate) variance: u64,
}

impl Plan {
    pub(crate) fn new(request: &Request, expected: Expected) -> Self {
        let allowed = request.max_output.map_or(f64::MAX, f64::from);
        let mean = expected.mean.clamp(0.0, allowed);
        // what may not be passed bounds the spread, too
        let variance = expected.variance.min((allowed - mean) * (allowed - mean));
        let sequences = request.sequences.max(1);
        Self {
            leg: Leg::Whole,
            prompt_tokens: request.prompt_tokens,
            sequences,
            output_each: mean,
            output_tokens: (mean * f64::from(sequences)) as u64,
            variance: (variance * f64::from(sequences)) as u64,
        }
    }

    /// The same for a part of what this was made for as a whole: a prompt alone has no output to speak of.
    pub(crate) fn of(self, leg: Leg) -> Self {
        match leg {
            Leg::Whole | Leg::Decode => Self { leg, ..self },
            Leg::Prefill => Self { leg, output_each: 0.0, output_tokens: 0, variance: 0, ..self },
        }
    }

    /// Prompt tokens to compute where so many are held.
    pub(crate) fn uncached_tokens(&self, matched_tokens: u32) -> u32 {
        match self.leg {
            Leg::Whole | Leg::Prefill => self.prompt_tokens.saturating_sub(matched_tokens),
            Leg::Decode => 0,
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Outputs {
    routes: BTreeMap<RouteId, Learned>,
    /// Looked up, never iterated.
    young: Pairs,
    old: Pairs,
}

type Pairs = HashMap<(TenantId, RouteId), Learned, FixedState>;

#[derive(Debug, Clone, Copy)]
struct Learned {
    of: Expected,
    ended: u32,
}

impl Outputs {
    /// What to expect of one sequence.
    pub(crate) fn expected(&self, tenant: TenantId, route: RouteId) -> Expected {
        let pair = (tenant, route);
        let own = self.young.get(&pair).or_else(|| self.old.get(&pair)).filter(|own| own.ended >= TRUSTED_AFTER);
        own.or_else(|| self.routes.get(&route)).map_or(ASSUMED, |learned| learned.of)
    }

    /// A sequence ended by itself after so many tokens.
    pub(crate) fn observe(&mut self, tenant: TenantId, route: RouteId, tokens: f64) {
        if self.routes.len() < ROUTES_MAX || self.routes.contains_key(&route) {
            self.routes.entry(route).or_insert(Learned { of: ASSUMED, ended: 0 }).observe(tokens);
        }
        let pair = (tenant, route);
        if self.young.len() >= PAIRS_MAX && !self.young.contains_key(&pair) {
            self.old = std::mem::take(&mut self.young);
        }
        let route = self.routes.get(&route).map_or(ASSUMED, |learned| learned.of);
        let before = self.old.get(&pair).copied().unwrap_or(Learned { of: route, ended: 0 });
        self.young.entry(pair).or_insert(before).observe(tokens);
    }
}

impl Default for Expected {
    fn default() -> Self {
        ASSUMED
    }
}

impl Learned {
    fn observe(&mut self, tokens: f64) {
        self.ended = self.ended.saturating_add(1);
        // the first observations are averaged evenly, so that the assumption is soon forgotten
        let weight = WEIGHT.max(1.0 / f64::from(self.ended));
        let off = tokens - self.of.mean;
        self.of.mean += weight * off;
        self.of.variance = (1.0 - weight) * (self.of.variance + weight * off * off);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHAT: RouteId = RouteId(0);
    const A: TenantId = TenantId(1);
    const B: TenantId = TenantId(2);

    #[test]
    fn a_tenant_is_judged_by_its_own_once_it_ended_some_and_by_its_route_before() {
        let mut outputs = Outputs::default();
        assert_eq!(outputs.expected(A, CHAT), ASSUMED);
        for _ in 0..200 {
            outputs.observe(A, CHAT, 1000.0);
        }
        let of = |outputs: &Outputs, tenant| outputs.expected(tenant, CHAT).mean.round();
        assert_eq!((of(&outputs, A), of(&outputs, B)), (1000.0, 1000.0), "a stranger is like the others");
        for _ in 0..7 {
            outputs.observe(B, CHAT, 10.0);
        }
        assert!(of(&outputs, B) > 500.0, "seven are too few");
        outputs.observe(B, CHAT, 10.0);
        assert_eq!((of(&outputs, A), of(&outputs, B)), (1000.0, 10.0));
        assert_eq!(outputs.expected(B, RouteId(9)), ASSUMED, "another route knows nothing");
    }

    #[test]
    fn the_variance_is_that_of_what_was_seen() {
        let mut outputs = Outputs::default();
        for i in 0..2000 {
            outputs.observe(A, CHAT, if i % 2 == 0 { 100.0 } else { 300.0 });
        }
        let Expected { mean, variance } = outputs.expected(A, CHAT);
        assert!((mean - 200.0).abs() < 10.0 && (variance - 10_000.0).abs() < 1000.0, "{mean} {variance}");
    }

    #[test]
    fn memory_is_bounded_and_the_busy_stay() {
        let mut outputs = Outputs::default();
        for i in 0..100_000 {
            outputs.observe(TenantId(10 + i), CHAT, 5000.0);
            outputs.observe(A, CHAT, 10.0);
            outputs.observe(A, RouteId(1000 + i), 10.0);
        }
        assert!(outputs.young.len() + outputs.old.len() <= 2 * PAIRS_MAX);
        assert!(outputs.routes.len() <= ROUTES_MAX);
        assert_eq!(outputs.expected(A, CHAT).mean.round(), 10.0);
    }
}
