//! Two workers for one request: the first computes its prompt, the second fetches the cache and generates.
//!
//! Both are chosen together, when the request comes: the score of a pair is the sum of both scores, and no score of one
//! depends on who the other is. The request waits in the first one's lane and is sent when that has room *and* a second
//! has; from then on a place is held for it at both, so that what was computed never waits. Once the prompt is there, the
//! first's is given back and the second is sent the rest.
//!
//! A prompt is divided that is long ([`crate::PoolLimits::split_tokens_min`]), in a pool that has workers for both parts. A
//! worker that decodes also takes it whole where it holds all but a little of it, or where nobody is there for prompts.
//! Prefixes tie a request to the worker of either part by what that one holds itself.
//!
//! Not here: what the two tell each other; that is the shell's to pass on, and the engine's to keep for as long as it says.

use smallvec::SmallVec;

use super::{Core, Entry, Place, Sent};
use crate::explain::Cause;
use crate::placement::{Choice, Scene, Scored, winner};
use crate::pool::Pool;
use crate::worker::{Slot, Worker};
use crate::{Action, HealthState, Leg, RequestId, Role, Tick, WorkerId};

impl Core {
    /// Scores who may serve a request, as a whole or in two parts. The winner, and who goes on where it computes the
    /// prompt alone.
    pub(super) fn weigh_legs(&mut self, id: RequestId) -> (Choice, Option<Scored>) {
        let Some(entry) = self.requests.get_mut(&id) else { return (Choice::Nobody, None) };
        entry.kept = entry.kept_at(self.now);
        if entry.kept.is_some() {
            match self.consider(id, Leg::Decode) {
                Choice::Nobody => {}
                choice => return (choice, None),
            }
        }
        let divides = self
            .requests
            .get(&id)
            .is_some_and(|entry| self.pools.get(&entry.request.pool).is_some_and(|pool| entry.divides(pool)));
        if divides && let Some(pair) = self.weigh_pair(id) { pair } else { (self.consider(id, Leg::Whole), None) }
    }

    /// Scores pairs, and who would do as well alone; none where there is no pair.
    fn weigh_pair(&mut self, id: RequestId) -> Option<(Choice, Option<Scored>)> {
        let second = self.best(id, Leg::Decode)?;
        let mut all = std::mem::take(&mut self.scored);
        let first = self.best(id, Leg::Prefill)?;
        all.splice(..0, self.scored.drain(..));
        let alone = self.consider(id, Leg::Whole);
        let pool = self.pools.get(&self.requests.get(&id)?.request.pool)?;
        let little = pool.limits.split_tokens_min;
        let workers = &self.workers;
        self.scored.retain(|scored| {
            let role = workers.get(scored.slot).map(|worker| worker.spec.role);
            scored.uncached_tokens < little || role == Some(Role::Both)
        });
        let alone = match alone {
            Choice::Winner(_) => winner(&self.scored, &mut self.rng),
            Choice::Infeasible | Choice::Nobody => Choice::Nobody,
        };
        let better = |at: usize| self.scored.get(at).is_some_and(|one| one.seconds <= first.seconds + second.seconds);
        let alone = if let Choice::Winner(at) = alone { Some(at).filter(|at| better(*at)) } else { None };
        let whole = self.scored.len();
        self.scored.append(&mut all);
        if let Some(at) = alone {
            return Some((Choice::Winner(at), None));
        }
        let pair = self.scored.iter().skip(whole).position(|scored| scored.slot == first.slot)?;
        Some((Choice::Winner(whole + pair), Some(second)))
    }

    fn best(&mut self, id: RequestId, leg: Leg) -> Option<Scored> {
        let Choice::Winner(at) = self.consider(id, leg) else { return None };
        self.scored.get(at).cloned()
    }

    /// Who goes on with a request that is to be sent now: nobody where all of it is, and no answer where it must wait for
    /// that one. `chosen` before others, if it has room.
    pub(super) fn second(&mut self, id: RequestId, chosen: Option<Slot>) -> Option<Option<Slot>> {
        let entry = self.requests.get(&id)?;
        if entry.plan.leg != Leg::Prefill {
            return Some(None);
        }
        let pool = self.pools.get(&entry.request.pool)?;
        let scene = Scene { now: self.now, config: &self.config, pool, workers: &self.workers };
        let plan = entry.whole.of(Leg::Decode);
        let asked = (&entry.request, &plan);
        let (now, workers, config) = (self.now, &self.workers, &self.config);
        let room = |slot: Slot| workers.get(slot).is_some_and(|worker| worker.has_room(now, asked, 0, pool, config));
        if let Some(chosen) = chosen.filter(|chosen| room(*chosen)) {
            return Some(Some(chosen));
        }
        let not: SmallVec<[WorkerId; 6]> = entry.failed_on.iter().chain(&entry.avoided).copied().collect();
        scene.choose(asked, &not, None, &mut self.rng, &mut self.scored);
        self.scored.retain(|scored| room(scored.slot));
        match winner(&self.scored, &mut self.rng) {
            Choice::Winner(at) => self.scored.get(at).map(|scored| Some(scored.slot)),
            Choice::Infeasible | Choice::Nobody => None,
        }
    }

    /// Holds a place for the rest of a request whose prompt was sent.
    pub(super) fn reserve(&mut self, id: RequestId, slot: Slot) {
        let (Some(entry), Some(worker)) = (self.requests.get_mut(&id), self.workers.get_mut(slot)) else { return };
        let held = worker.reserve(self.now, id, &entry.whole);
        entry.then = Some(Sent {
            worker: worker.id,
            slot: Some(slot),
            at: self.now,
            predicted: 0.0,
            uncached: 0,
            before: worker.before(),
            held,
            number: None,
            started: None,
        });
        self.filled(slot);
    }

    /// Gives that place back.
    pub(super) fn unreserve(&mut self, id: RequestId) {
        let Some(then) = self.requests.get_mut(&id).and_then(|entry| entry.then.take()) else { return };
        self.come(id, then);
        self.give_back(id, then);
    }

    /// What is reserved is no longer computed elsewhere.
    fn come(&mut self, id: RequestId, then: Sent) {
        let Some(entry) = self.requests.get(&id) else { return };
        if let Some(worker) = then.slot.and_then(|slot| self.workers.get_mut(slot)) {
            worker.awaited(&entry.whole);
        }
    }

    /// The prompt is computed: the rest goes on where a place is held for it, or where one is found.
    pub(super) fn prefilled(&mut self, id: RequestId, kept: Option<Tick>, out: &mut Vec<Action>) {
        let Some(entry) = self.requests.get(&id) else { return };
        if !matches!(entry.place, Place::Sent(_)) || entry.plan.leg != Leg::Prefill {
            return;
        }
        let kept = kept.filter(|until| *until > self.now);
        if kept.is_some() {
            self.first_token(id, out);
        }
        let Some(entry) = self.requests.get_mut(&id) else { return };
        let Place::Sent(first) = std::mem::replace(&mut entry.place, Place::Loose) else { return };
        entry.at_workers += self.now.since(first.at);
        (entry.kept, entry.undivided) = (kept, kept.is_none());
        let then = entry.then.take();
        self.give_back(id, first);
        if let Some(worker) = first.slot.and_then(|slot| self.workers.get_mut(slot)) {
            worker.stayed(self.now.seconds_since(first.at), 0, None);
        }
        let Some(then) = then else { return self.place(id, Cause::Retry, out) };
        self.come(id, then);
        let there = then.slot.and_then(|slot| self.workers.get(slot)).filter(|_| kept.is_some());
        let well = |worker: &&Worker| {
            Leg::Decode.fits(worker.spec.role)
                && matches!(worker.health.state(), HealthState::Up | HealthState::HalfOpen)
        };
        let Some(before) = there.filter(well).map(Worker::before) else {
            self.give_back(id, then);
            return self.place(id, Cause::Retry, out);
        };
        let Some(entry) = self.requests.get_mut(&id) else { return };
        entry.turn(Leg::Decode);
        entry.place = Place::Sent(Sent { at: self.now, before, ..then });
        out.push(Action::Send {
            request: id,
            worker: then.worker,
            leg: Leg::Decode,
            matched_tokens: entry.request.prompt_tokens,
            predicted_ttft: std::time::Duration::ZERO,
            predicted_at_arrival: crate::time::duration(entry.predicted.unwrap_or_default()),
        });
        self.believe(id, 0.0);
    }
}

impl Entry {
    /// Whether two workers of the pool may do it, each a part.
    fn divides(&self, pool: &Pool) -> bool {
        self.request.splits
            && self.request.beside.is_none()
            && !self.undivided
            && !pool.prefillers.is_empty()
            && self.request.prompt_tokens >= pool.limits.split_tokens_min
    }
}
