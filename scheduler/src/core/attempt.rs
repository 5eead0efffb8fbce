//! From the send to the end: what is held at a worker for a request, and what its course teaches.
//!
//! Every way out (end, failure, cancel, the worker's leaving) gives the place back through [`Core::release`], once: the
//! request is no longer `Sent` after it. What was reserved for it at a second worker goes with it.

use super::{Core, Place, Sent};
use crate::explain::Cause;
use crate::placement::Scene;
use crate::time::duration;
use crate::worker::Slot;
use crate::{Action, End, Failure, HealthState, Leg, Refusal, RequestId};

impl Core {
    /// Sends a request that has no place; of one whose prompt alone goes there, the rest will go to `then`.
    pub(super) fn send(
        &mut self,
        id: RequestId,
        (slot, then): (Slot, Option<Slot>),
        matched_tokens: u32,
        out: &mut Vec<Action>,
    ) {
        let Some(entry) = self.requests.get_mut(&id) else { return };
        if entry.plan.leg == Leg::Decode && entry.kept_at(self.now).is_none() {
            entry.turn(Leg::Whole); // it waited for too long
        }
        let Some(pool) = self.pools.get_mut(&entry.request.pool) else { return };
        let (now, config) = (self.now, &self.config);
        let scene = Scene { now, config, pool, workers: &self.workers };
        let Some(worker) = self.workers.get(slot) else { return };
        let (leg, uncached) = (entry.plan.leg, entry.plan.uncached_tokens(matched_tokens));
        let fleet_rate = pool.fleet_rate();
        let said = worker.reported.said(now, config.report_ttl);
        let speed = worker.speeds(now, fleet_rate, &said).now;
        let predicted = (scene.ahead_tokens(worker, &said, speed, 0) + f64::from(uncached)) / speed;

        let Some(worker) = self.workers.get_mut(slot) else { return };
        let before = worker.before();
        let (held, number) = match leg {
            Leg::Decode => (worker.take(now, id, &entry.plan), None),
            Leg::Whole | Leg::Prefill => {
                let (held, number) = worker.hold(now, (&entry.request, &entry.plan), uncached, fleet_rate, config);
                (held, Some(number))
            }
        };
        let worker = worker.id;
        entry.place = Place::Sent(Sent {
            worker,
            slot: Some(slot),
            at: now,
            predicted,
            uncached,
            before,
            held,
            number,
            started: None,
        });
        entry.attempts += 1;
        let tenant = entry.request.tenant;
        let weight = self.weights.get(&tenant).copied().unwrap_or(1.0);
        pool.fairness.sent(tenant, weight, uncached);
        pool.mixed.sent(now, (entry.request.class, tenant));
        let tokens = u64::from(uncached) + entry.whole.output_tokens;
        pool.shares.sent(entry.request.class, tokens, &pool.limits.class_shares, &pool.queue.requests);
        out.push(Action::Send {
            request: id,
            worker,
            leg,
            matched_tokens,
            predicted_ttft: duration(predicted),
            predicted_at_arrival: duration(entry.predicted.unwrap_or(predicted)),
        });
        self.filled(slot);
        if let Some(then) = then {
            self.reserve(id, then);
        }
    }

    pub(super) fn first_token(&mut self, id: RequestId, out: &mut Vec<Action>) {
        let Some(entry) = self.requests.get_mut(&id) else { return };
        let Place::Sent(sent) = &mut entry.place else { return };
        if sent.started.is_some() {
            return;
        }
        sent.started = Some(self.now);
        if entry.plan.leg != Leg::Prefill {
            // It was for this; whoever goes on with the answer has time.
            entry.request.deadline = None;
        }
        let Some(pool) = self.pools.get_mut(&entry.request.pool) else { return };
        let Some((slot, worker)) = sent.slot.and_then(|slot| Some((slot, self.workers.get_mut(slot)?))) else { return };
        let before = (sent.held, sent.number);
        worker.prefilled(id);
        sent.held = worker.started(self.now, before, sent.uncached, pool.fleet_rate(), &self.config);
        // fetching a cache takes time that nobody predicted
        let seen = match entry.plan.leg {
            Leg::Whole => entry.request.streamed,
            Leg::Prefill => true,
            Leg::Decode => false,
        };
        let outlier = seen
            && worker.measured_rate().is_some()
            && worker.latency.observe(self.now, self.now.seconds_since(sent.at), sent.predicted);
        pool.observe_rates(self.now, &self.workers);
        self.worked(slot, out);
        if outlier {
            self.eject(slot, out);
        }
        self.touch(slot);
    }

    pub(super) fn progress(&mut self, id: RequestId, output_tokens: u32) {
        let Some(entry) = self.requests.get_mut(&id) else { return };
        let Place::Sent(_) = entry.place else { return };
        let more = output_tokens.saturating_sub(entry.charged);
        entry.charged += more;
        if let Some(pool) = self.pools.get_mut(&entry.request.pool) {
            pool.fairness.generated(entry.request.tenant, more);
        }
    }

    pub(super) fn attempt_failed(&mut self, id: RequestId, failure: Failure, out: &mut Vec<Action>) {
        let Some(sent) = self.release(id) else { return };
        let Some(entry) = self.requests.get_mut(&id) else { return };
        entry.last = Some(failure);
        // perhaps it could not fetch the cache
        entry.undivided |= entry.plan.leg == Leg::Decode && failure == Failure::Status5xx;
        entry.at_workers += self.now.since(sent.at);
        // whoever may have begun to fetch the cache may have let it go, too: its blocks can be another prompt's by now
        if !matches!(failure, Failure::Connect | Failure::Overloaded { .. } | Failure::Unsupported) {
            entry.kept = None;
        }
        match failure {
            Failure::Overloaded { .. } | Failure::Unavailable { .. } => entry.avoided.push(sent.worker),
            // an engine's error may be of the moment, and an adapter may be loaded again
            Failure::Status5xx | Failure::NoAdapter if !entry.avoided.contains(&sent.worker) => {
                entry.avoided.push(sent.worker);
            }
            Failure::Unsupported => {
                entry.failed_on.push(sent.worker);
                entry.attempts -= 1;
            }
            _ => entry.failed_on.push(sent.worker),
        }
        let (attempts, pool) = (entry.attempts, entry.request.pool);
        let attempts_max = self.pools.get_mut(&pool).map_or(0, |pool| {
            pool.fairness.refunded(entry.request.tenant, sent.uncached);
            pool.limits.attempts_max
        });
        if failure == Failure::NoAdapter {
            self.adapter_lost(id, sent.slot);
        }
        self.broke(sent, failure, out);
        if attempts >= attempts_max {
            self.refuse(id, Refusal::AttemptsExhausted { last: failure }, out);
        } else {
            self.place(id, Cause::Retry, out);
        }
    }

    pub(super) fn ended(&mut self, id: RequestId, end: End, out: &mut Vec<Action>) {
        // An answer that is there all at once is told by its end alone; one of nothing is a refusal.
        let is_whole = self.requests.get(&id).is_some_and(|entry| !entry.request.streamed);
        if is_whole && matches!(end, End::Finished { prompt_tokens: 1.., .. }) {
            self.first_token(id, out);
        }
        let Some(sent) = self.release(id) else { return };
        match end {
            End::Finished { prompt_tokens, output_tokens, .. } => {
                let streamed = self.requests.get(&id).is_some_and(|entry| entry.request.streamed);
                let output_each = self.settle_output(id, output_tokens);
                if let Some((slot, worker)) = sent.slot.and_then(|slot| Some((slot, self.workers.get_mut(slot)?))) {
                    let seconds = self.now.seconds_since(sent.at);
                    // of an answer that comes whole, the first token is the last
                    let generating = sent.started.filter(|_| streamed).map(|started| self.now.seconds_since(started));
                    worker.stayed(seconds, output_each, generating);
                    if !streamed && prompt_tokens > 0 {
                        let slowdown = self.pools.get(&worker.pool).map_or(0.0, |pool| pool.pace.slowdown_seconds());
                        worker.answered(
                            self.now,
                            (sent.before, sent.uncached),
                            (output_each, seconds),
                            (slowdown, &self.config),
                        );
                    }
                    if let (Some(generating), Some(pool)) = (generating, self.pools.get_mut(&worker.pool)) {
                        pool.pace.observe(output_each, generating, worker.held.sequences() as f64);
                    }
                    if sent.started.is_none() {
                        self.worked(slot, out);
                    }
                }
            }
            End::Failed(failure) => self.broke(sent, failure, out),
            End::Cancelled => {}
        }
        self.requests.remove(&id);
    }

    pub(super) fn cancelled(&mut self, id: RequestId) {
        self.unqueue(id);
        self.release(id);
        self.requests.remove(&id);
    }

    /// Gives back what is held for a sent request, at one worker or two; none if it is not sent.
    fn release(&mut self, id: RequestId) -> Option<Sent> {
        let entry = self.requests.get_mut(&id)?;
        let Place::Sent(sent) = entry.place else { return None };
        entry.place = Place::Loose;
        self.unreserve(id);
        self.give_back(id, sent);
        Some(sent)
    }

    /// Gives back what is held at one worker.
    pub(super) fn give_back(&mut self, id: RequestId, sent: Sent) {
        let Some(entry) = self.requests.get(&id) else { return };
        let (Some(slot), Some(pool)) = (sent.slot, self.pools.get_mut(&entry.request.pool)) else { return };
        pool.used = Some(self.now);
        let Some(worker) = self.workers.get_mut(slot) else { return };
        let scales = (pool.fleet_rate(), &self.config);
        worker.release(self.now, &entry.request, (sent.held, sent.number), sent.started.is_some(), scales);
        self.touch(slot);
    }

    /// A worker has shown that it serves.
    fn worked(&mut self, slot: Slot, out: &mut Vec<Action>) {
        let Some(worker) = self.workers.get_mut(slot) else { return };
        let before = worker.health.state();
        worker.health.succeeded(self.now, &self.config);
        worker.said_busy = 0;
        self.health_changed(slot, before, out);
    }

    /// Leaves a worker alone that turned much slower than it was, unless too many are left alone already.
    fn eject(&mut self, slot: Slot, out: &mut Vec<Action>) {
        let Some(pool) = self.workers.get(slot).and_then(|worker| self.pools.get(&worker.pool)) else { return };
        let others = pool.workers.iter().filter(|other| **other != slot).filter_map(|other| self.workers.get(*other));
        let out_already = others.clone().filter(|other| other.health.state() != HealthState::Up).count();
        let most = ((pool.workers.len() as f64 * self.config.outliers_max) as usize).max(1);
        if out_already >= most || out_already == others.count() {
            return;
        }
        let Some(worker) = self.workers.get_mut(slot) else { return };
        worker.latency.forget();
        let before = worker.health.state();
        worker.health.open(self.now, &self.config);
        self.touch(slot);
        self.health_changed(slot, before, out);
    }

    /// A worker has failed a request.
    fn broke(&mut self, sent: Sent, failure: Failure, out: &mut Vec<Action>) {
        let Some((slot, worker)) = sent.slot.and_then(|slot| Some((slot, self.workers.get_mut(slot)?))) else { return };
        let before = worker.health.state();
        worker.health.failed(self.now, failure, &self.config);
        if let Some(asked) = failure.left_alone() {
            worker.leave_alone(self.now, asked, self.rng.unit(), &self.config);
        }
        let gone = before != HealthState::Down && worker.health.state() == HealthState::Down;
        if gone && let Some(pool) = self.pools.get_mut(&worker.pool) {
            pool.index.forget(slot);
        }
        self.touch(slot);
        self.health_changed(slot, before, out);
    }

    /// Charges its tenant for what was not charged yet, and learns how long such outputs are: the tokens of each sequence.
    fn settle_output(&mut self, id: RequestId, output_tokens: u32) -> u32 {
        let Some(entry) = self.requests.get(&id) else { return 0 };
        let rest = output_tokens.saturating_sub(entry.charged);
        let request = &entry.request;
        if let Some(pool) = self.pools.get_mut(&request.pool) {
            pool.fairness.generated(request.tenant, rest);
            if output_tokens > 0 {
                let each = f64::from(output_tokens) / f64::from(entry.plan.sequences);
                pool.outputs.observe(request.tenant, request.route, each);
            }
        }
        output_tokens / entry.plan.sequences
    }
}
