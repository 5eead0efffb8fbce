//! Why a request went where it went: the candidates, each term in seconds, and the winner.
//!
//! A bounded ring of the latest decisions; the oldest is overwritten. Each decision is written to it and hardly any is
//! ever read, so that it is kept small, and made what it looks like when asked for.

use std::collections::VecDeque;

use smallvec::SmallVec;

use crate::placement::TERMS;
use crate::{HealthState, Leg, RequestId, Tick, WorkerId};

/// Digits of a second that are told.
const TOLD: f64 = 1e6;

/// What a decision was taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The request arrived.
    Arrival,
    /// An attempt failed, its worker went away, or one appeared that it had waited for.
    Retry,
    /// It stood in a lane that did not move, or a worker with room took it from there.
    Rescore,
    /// It waits for the prefill of another with the same long prefix at its worker.
    Held,
    /// Its time was up: nobody was weighed.
    Expiry,
}

/// One worker as it was weighed for one request.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Which.
    pub worker: WorkerId,
    /// For what of it.
    pub leg: Leg,
    /// Whether it won: where two workers have a part each, one of each part.
    pub won: bool,
    /// Prompt tokens it is believed to hold.
    pub matched_tokens: u32,
    /// Each term in seconds to the microsecond, in the order of [`crate::term_names`].
    pub terms: [f64; TERMS.len()],
}

impl Candidate {
    /// The score: the sum of the terms, in seconds; lower is better.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.terms.iter().sum()
    }
}

/// A worker of the pool that was not weighed for a request, since nothing may be sent there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeftOut {
    /// Which.
    pub worker: WorkerId,
    /// Why.
    pub why: Unfit,
}

/// Why a worker gets nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unfit {
    /// It is to leave.
    Draining,
    /// A GPU beneath it cannot be trusted, or could not of late.
    Gpu,
    /// It does not stand as one that serves.
    Health(HealthState),
}

/// One decision.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// For which request.
    pub request: RequestId,
    /// When.
    pub at: Tick,
    /// What for.
    pub cause: Cause,
    /// All who were weighed.
    pub candidates: Vec<Candidate>,
    /// Who was not, as far as there is room: the first few.
    pub left_out: SmallVec<[LeftOut; 2]>,
    /// Who won, of two the one for the prompt; none when it was refused for its deadline or for having waited too long.
    pub winner: Option<WorkerId>,
}

/// A [`Candidate`], kept.
#[derive(Debug)]
pub(crate) struct Weighed {
    worker: WorkerId,
    leg: Leg,
    won: bool,
    matched_tokens: u32,
    terms: [f32; TERMS.len()],
}

impl Weighed {
    pub(crate) fn new(worker: WorkerId, leg: Leg, won: bool, matched_tokens: u32, terms: [f64; TERMS.len()]) -> Self {
        Self { worker, leg, won, matched_tokens, terms: terms.map(|seconds| seconds as f32) }
    }

    fn told(&self) -> Candidate {
        let terms = self.terms.map(|seconds| (f64::from(seconds) * TOLD).round() / TOLD);
        Candidate { worker: self.worker, leg: self.leg, won: self.won, matched_tokens: self.matched_tokens, terms }
    }
}

/// A [`Decision`], kept.
#[derive(Debug)]
struct Kept {
    request: RequestId,
    at: Tick,
    cause: Cause,
    candidates: Vec<Weighed>,
    left_out: SmallVec<[LeftOut; 2]>,
    winner: Option<WorkerId>,
}

#[derive(Debug)]
pub(crate) struct Decisions {
    kept: VecDeque<Kept>,
    kept_max: usize,
}

impl Decisions {
    pub(crate) fn new(kept_max: usize) -> Self {
        Self { kept: VecDeque::new(), kept_max }
    }

    pub(crate) fn record(
        &mut self,
        (request, at, cause): (RequestId, Tick, Cause),
        candidates: impl Iterator<Item = Weighed>,
        left_out: SmallVec<[LeftOut; 2]>,
        winner: Option<WorkerId>,
    ) {
        if self.kept_max == 0 {
            return;
        }
        let mut list = match self.kept.len() >= self.kept_max {
            true => self.kept.pop_front().map(|old| old.candidates).unwrap_or_default(),
            false => Vec::new(),
        };
        list.clear();
        list.extend(candidates);
        self.kept.push_back(Kept { request, at, cause, candidates: list, left_out, winner });
    }

    /// The decisions still kept for a request, oldest first.
    pub(crate) fn of(&self, request: RequestId) -> impl Iterator<Item = Decision> {
        self.kept.iter().filter(move |kept| kept.request == request).map(move |kept| Decision {
            request,
            at: kept.at,
            cause: kept.cause,
            candidates: kept.candidates.iter().map(Weighed::told).collect(),
            left_out: kept.left_out.clone(),
            winner: kept.winner,
        })
    }
}
