//! From arrival to a place: a worker's window, its lane, the pool's own queue, or a refusal.

use std::time::Duration;

use smallvec::SmallVec;

use super::{Core, Entry, Place, Sent};
use crate::config::Config;
use crate::explain::{Cause, LeftOut, Unfit, Weighed};
use crate::lane::{Gate, Standing};
use crate::outputs::Plan;
use crate::placement::{Choice, Scene, Scored};
use crate::pool::Pool;
use crate::time::duration;
use crate::timers::Timer;
use crate::worker::Slot;
use crate::{Action, HealthState, Leg, Policy, PoolId, Refusal, Request, RequestId, Role, TenantId, Tick};

/// Workers that an explanation names as not weighed.
const LEFT_OUT_MAX: usize = 8;
/// Bounds of what a client is told to wait.
const RETRY_AFTER_SECONDS: (f64, f64) = (1.0, 60.0);
/// Share of it that is random, so that clients do not come back together.
const RETRY_AFTER_JITTER: f64 = 0.2;

impl Core {
    pub(super) fn arrived(&mut self, request: Request, out: &mut Vec<Action>) {
        let id = request.id;
        if self.requests.contains_key(&id) {
            return;
        }
        let now = self.now;
        let expires = self.pools.get_mut(&request.pool).map_or(now, |pool| {
            pool.used = Some(now);
            let timeout = now.after(pool.limits.queue_timeout);
            request.deadline.map_or(timeout, |deadline| deadline.min(timeout))
        });
        let reason = self.inadmissible(&request);
        let plan = self.plan(&request);
        let failed_on = request.beside.iter().map(|(worker, _)| *worker).collect();
        let attempts = request.beside.map_or(0, |(_, attempts)| attempts);
        let entry = Entry {
            request,
            whole: plan,
            plan,
            arrived: now,
            predicted: None,
            expires,
            at_workers: Duration::ZERO,
            place: Place::Loose,
            then: None,
            kept: None,
            undivided: false,
            timer: None,
            attempts,
            failed_on,
            avoided: Default::default(),
            last: None,
            charged: 0,
        };
        self.requests.insert(id, Box::new(entry));
        match reason {
            Some(reason) => self.refuse(id, reason, out),
            None => self.place(id, Cause::Arrival, out),
        }
    }

    fn plan(&self, request: &Request) -> Plan {
        let expected = self.pools.get(&request.pool).map(|pool| pool.outputs.expected(request.tenant, request.route));
        Plan::new(request, expected.unwrap_or_default())
    }

    fn inadmissible(&self, request: &Request) -> Option<Refusal> {
        let Some(pool) = self.pools.get(&request.pool) else { return Some(Refusal::PoolUnknown) };
        let all = pool.workers.iter().filter_map(|slot| self.workers.get(*slot));
        // Whoever computes prompts alone answers nobody.
        let workers = all.filter(|worker| worker.spec.role != Role::Prefill);
        // Where nobody stays, one may be on its way, as where all are down.
        let mut staying = workers.filter(|worker| !worker.draining).peekable();
        if staying.peek().is_some() && !staying.any(|worker| worker.holds(request.prompt_tokens)) {
            Some(Refusal::TooLarge)
        } else {
            request.deadline.filter(|deadline| *deadline <= self.now).map(|_| Refusal::DeadlinePassed)
        }
    }

    /// Finds a place for a request that has none.
    pub(super) fn place(&mut self, id: RequestId, cause: Cause, out: &mut Vec<Action>) {
        let Some(entry) = self.requests.get_mut(&id) else { return };
        let pool_id = entry.request.pool;
        if entry.request.deadline.is_some_and(|deadline| deadline <= self.now) {
            return self.refuse(id, Refusal::DeadlinePassed, out);
        }
        if !self.pools.contains_key(&pool_id) {
            return self.refuse(id, Refusal::PoolUnknown, out);
        }
        let (choice, then) = self.weigh_legs(id);
        let (Some(entry), Some(pool)) = (self.requests.get_mut(&id), self.pools.get_mut(&pool_id)) else { return };
        match choice {
            Choice::Winner(at) => {
                let Some(winner) = self.scored.get(at).cloned() else { return };
                entry.turn(winner.leg);
                let scene = Scene { now: self.now, config: &self.config, pool, workers: &self.workers };
                let asked = (&entry.request, &entry.plan);
                let until = entry.waits_until();
                if let Some(busy) = scene.busy_until(&winner, &entry.failed_on).filter(|busy| *busy > until) {
                    let wait = busy.since(self.now);
                    return self.refuse(id, Refusal::Busy { wait }, out);
                }
                if entry.request.beside.is_some() && cause == Cause::Arrival && !scene.is_spare(&winner, asked) {
                    return self.refuse(id, Refusal::NoWorker, out);
                }
                let waited = self.now.seconds_since(entry.arrived);
                let after = then.as_ref().map_or(0.0, |then| then.first_token_seconds);
                entry.predicted.get_or_insert(waited + winner.first_token_seconds + after);
                let alike = self.scored.iter().filter(|scored| scored.leg == winner.leg);
                let busy = alike.clone().filter(|scored| scored.waits).count();
                pool.observe_decision(busy as f64 / alike.count().max(1) as f64, winner.uncached_tokens);
                pool.observe_drain(self.now, winner.drain_seconds, &self.config);
                let then = then.map(|then| then.slot);
                self.record(id, cause, Some(&winner), then);
                self.bind(id, (&winner, then), out);
                self.shed(pool_id, out);
                self.believe(id, winner.first_token_seconds);
            }
            Choice::Infeasible => {
                self.record(id, cause, None, None);
                self.refuse_infeasible(id, out);
            }
            Choice::Nobody if entry.request.beside.is_some() && entry.last.is_none() => {
                self.refuse(id, Refusal::NoWorker, out);
            }
            Choice::Nobody => self.park(id, pool_id, out),
        }
    }

    /// Scores who may do this of a request, those apart that it avoids.
    pub(super) fn consider(&mut self, id: RequestId, leg: Leg) -> Choice {
        let Some(entry) = self.requests.get(&id) else { return Choice::Nobody };
        let Some(pool) = self.pools.get(&entry.request.pool) else { return Choice::Nobody };
        let scene = Scene { now: self.now, config: &self.config, pool, workers: &self.workers };
        let plan = entry.whole.of(leg);
        let asked = (&entry.request, &plan);
        if !entry.avoided.is_empty() {
            let avoided: SmallVec<[_; 6]> = entry.failed_on.iter().chain(&entry.avoided).copied().collect();
            let choice = scene.choose(asked, &avoided, None, &mut self.rng, &mut self.scored);
            // rather than a prompt's worker that failed, one that does all
            if matches!(choice, Choice::Winner(_)) || leg == Leg::Prefill {
                return choice;
            }
        }
        scene.choose(asked, &entry.failed_on, None, &mut self.rng, &mut self.scored)
    }

    /// Notes the decision whose candidates were scored last. `then`: who will go on where the winner ends.
    pub(super) fn record(&mut self, id: RequestId, cause: Cause, winner: Option<&Scored>, then: Option<Slot>) {
        let winner = winner.map(|winner| (winner.slot, winner.leg));
        let workers = &self.workers;
        let candidates = self.scored.iter().filter_map(|scored| {
            let worker = workers.get(scored.slot)?.id;
            let won =
                winner == Some((scored.slot, scored.leg)) || (then == Some(scored.slot) && scored.leg == Leg::Decode);
            Some(Weighed::new(worker, scored.leg, won, scored.matched_tokens, scored.terms))
        });
        let winner = winner.and_then(|(slot, _)| workers.get(slot)).map(|worker| worker.id);
        self.decisions.record((id, self.now, cause), candidates, self.left_out(id), winner);
    }

    /// Workers of a request's pool that nothing may be sent to.
    fn left_out(&self, id: RequestId) -> SmallVec<[LeftOut; 2]> {
        let pool = self.requests.get(&id).and_then(|entry| self.pools.get(&entry.request.pool));
        let Some(pool) = pool else { return SmallVec::new() };
        let unfit = pool.unfit.iter().filter_map(|slot| self.workers.get(*slot)).filter_map(|worker| {
            let why = match worker.health.state() {
                _ if worker.is_eligible() => return None,
                _ if worker.draining => Unfit::Draining,
                HealthState::Open | HealthState::HalfOpen if worker.beneath.fault => Unfit::Gpu,
                state => Unfit::Health(state),
            };
            Some(LeftOut { worker: worker.id, why })
        });
        unfit.take(LEFT_OUT_MAX).collect()
    }

    /// Sends the request to the worker, or puts it in its lane. `then`: who is to go on where it computes a prompt alone.
    pub(super) fn bind(&mut self, id: RequestId, (to, then): (&Scored, Option<Slot>), out: &mut Vec<Action>) {
        let second = self.second(id, then);
        let leader = self.leader(to.slot, id);
        let (Some(entry), Some(worker)) = (self.requests.get_mut(&id), self.workers.get_mut(to.slot)) else { return };
        let Some(pool) = self.pools.get(&entry.request.pool) else { return };
        let fleet_rate = pool.fleet_rate();
        let adapter = entry.request.adapter.filter(|adapter| !worker.adapters.has(Some(*adapter)));
        let gate = adapter.map(|adapter| Gate::Adapter(adapter.id)).or(leader.map(Gate::Prefill));
        let at_once = pool.limits.policy != Policy::Forebay && worker.may_send();
        let room = || worker.has_room(self.now, (&entry.request, &entry.plan), to.uncached_tokens, pool, &self.config);
        if gate.is_none()
            && let Some(then) = second
            && (at_once || worker.lane.is_clear() && room())
        {
            return self.send(id, (to.slot, then), to.matched_tokens, out);
        }
        let speed = worker.speed(self.now, fleet_rate, &self.config);
        let mut standing =
            entry.standing(to.uncached_tokens, speed, pool.patience(self.now, &self.config), &self.config);
        standing.gate = gate;
        if worker.lane.is_empty() {
            worker.rescored = self.now;
        }
        worker.lane.gather(id, standing);
        if leader.is_none() {
            worker.unstarted.insert(id);
        }
        entry.place = Place::Lane(to.slot, standing);
        let until = entry.waits_until();
        self.enqueued(id, until);
        if matches!(gate, Some(Gate::Prefill(_))) {
            self.record(id, Cause::Held, Some(to), None);
        }
        self.touch(to.slot);
    }

    /// Lets a request wait without a worker, when one may come, or refuses it.
    fn park(&mut self, id: RequestId, pool_id: PoolId, out: &mut Vec<Action>) {
        let (Some(entry), Some(pool)) = (self.requests.get_mut(&id), self.pools.get_mut(&pool_id)) else { return };
        let workers = pool.workers.iter().filter_map(|slot| self.workers.get(*slot));
        let answers = workers.filter(|worker| worker.spec.role != Role::Prefill);
        let mut untried = answers.filter(|worker| !entry.failed_on.contains(&worker.id));
        let hopeful = untried.any(|worker| worker.is_hopeful());
        if let Some(last) = entry.last
            && !hopeful
        {
            return self.refuse(id, Refusal::AttemptsExhausted { last }, out);
        }
        let mut workers = pool.workers.iter().filter_map(|slot| self.workers.get(*slot)).peekable();
        let someone = workers.peek().is_some() && !hopeful;
        if someone && !workers.any(|worker| worker.may_have(self.now, entry.request.adapter)) {
            return self.refuse(id, Refusal::AdapterUnavailable, out);
        }
        let standing = entry.standing(
            entry.request.prompt_tokens,
            pool.fleet_rate(),
            pool.patience(self.now, &self.config),
            &self.config,
        );
        let grace = self.now.after(pool.limits.worker_grace);
        let until = if hopeful { entry.waits_until() } else { entry.waits_until().min(grace) };
        pool.unbound.insert(id, standing);
        entry.place = Place::Unbound(standing);
        self.enqueued(id, until);
        self.shed(pool_id, out);
    }

    /// The request waits now, until `until`.
    fn enqueued(&mut self, id: RequestId, until: Tick) {
        let Some(entry) = self.requests.get_mut(&id) else { return };
        self.timers.set(Timer::Request(id), &mut entry.timer, Some(until));
        let (tenant, arrived) = (entry.request.tenant, entry.arrived);
        let weight = self.weights.get(&tenant).copied().unwrap_or(1.0);
        if let Some(pool) = self.pools.get_mut(&entry.request.pool) {
            pool.queue.add(&entry.request, arrived, weight);
            pool.fairness.enter(tenant, weight);
        }
    }

    /// Takes a request out of whatever queue it waits in.
    pub(super) fn unqueue(&mut self, id: RequestId) {
        let Some(entry) = self.requests.get_mut(&id) else { return };
        let Some(pool) = self.pools.get_mut(&entry.request.pool) else { return };
        let from = match entry.place {
            Place::Unbound(standing) => {
                pool.unbound.remove(id, standing);
                None
            }
            Place::Lane(slot, standing) => {
                if let Some(worker) = self.workers.get_mut(slot) {
                    worker.lane.remove(id, standing);
                    worker.prefilled(id);
                }
                Some(slot)
            }
            Place::Loose | Place::Sent(_) => return,
        };
        entry.place = Place::Loose;
        self.timers.set(Timer::Request(id), &mut entry.timer, None);
        pool.queue.take(&entry.request, entry.arrived);
        pool.fairness.leave(entry.request.tenant);
        if let Some(slot) = from {
            self.touch(slot);
        }
    }

    /// Refuses from the end of the queue until it keeps its bounds.
    pub(super) fn shed(&mut self, pool_id: PoolId, out: &mut Vec<Action>) {
        while let Some(pool) = self.pools.get(&pool_id).filter(|pool| pool.queue.is_over(&pool.limits)) {
            let Some(id) = pool.queue.sheddable() else { return };
            self.unqueue(id);
            self.refuse(id, Refusal::QueueFull, out);
        }
    }

    /// The worker that the request is bound to will soon hold its prompt. While it may still move, that is believed
    /// only until it is due: `wait_seconds` from now.
    pub(super) fn believe(&mut self, id: RequestId, wait_seconds: f64) {
        let Some(entry) = self.requests.get(&id) else { return };
        let (slot, bound) = match entry.place {
            Place::Lane(slot, _) => (slot, true),
            Place::Sent(Sent { slot: Some(slot), .. }) => (slot, false),
            Place::Loose | Place::Unbound(_) | Place::Sent(_) => return,
        };
        let (Some(pool), Some(worker)) = (self.pools.get_mut(&entry.request.pool), self.workers.get(slot)) else {
            return;
        };
        let lease = match bound {
            true => self.config.speculative_lease + duration(wait_seconds),
            false if worker.spec.kv_events => self.config.speculative_lease,
            false => self.config.speculative_ttl,
        };
        pool.index.expect(self.now, slot, &entry.request.blocks, self.now.after(lease));
    }

    /// Refuses a request for which none of those scored last is in time.
    pub(super) fn refuse_infeasible(&mut self, id: RequestId, out: &mut Vec<Action>) {
        let Some(entry) = self.requests.get(&id) else { return };
        let allowed = entry.request.deadline.map_or(f64::MAX, |deadline| deadline.seconds_since(entry.arrived));
        let alone = self.scored.iter().any(|scored| scored.first_token_seconds - scored.drain_seconds <= allowed);
        let reason = if alone { Refusal::DeadlineInfeasible } else { Refusal::DeadlineTooShort };
        self.refuse(id, reason, out);
    }

    /// Ends a request that has no place.
    pub(super) fn refuse(&mut self, id: RequestId, reason: Refusal, out: &mut Vec<Action>) {
        let Some(entry) = self.requests.remove(&id) else { return };
        let request = &entry.request;
        if matches!(reason, Refusal::DeadlinePassed | Refusal::TimedOut) {
            self.decisions.record((id, self.now, Cause::Expiry), std::iter::empty(), SmallVec::new(), None);
        }
        let retry_after = match reason {
            Refusal::PoolUnknown | Refusal::TooLarge | Refusal::DeadlineTooShort => None,
            Refusal::Busy { wait } => Some(wait),
            Refusal::AttemptsExhausted { last } if last.left_alone().flatten().is_some() => last.left_alone().flatten(),
            Refusal::QueueFull
            | Refusal::DeadlineInfeasible
            | Refusal::DeadlinePassed
            | Refusal::TimedOut
            | Refusal::NoWorker
            | Refusal::AdapterUnavailable
            | Refusal::AttemptsExhausted { .. } => Some(self.retry_after(request)),
        };
        out.push(Action::Refuse { request: id, reason, retry_after });
    }

    /// When a newcomer of its class and tenant would find what waits before it gone: whole seconds, jittered.
    fn retry_after(&mut self, request: &Request) -> Duration {
        let (low, high) = RETRY_AFTER_SECONDS;
        let drain = self.pools.get(&request.pool).map_or(low, |pool| self.drain_seconds(pool, request));
        let jittered = drain.clamp(low, high) * (1.0 + RETRY_AFTER_JITTER * self.rng.unit());
        Duration::from_secs_f64(jittered.ceil().clamp(low, high))
    }

    fn drain_seconds(&self, pool: &Pool, request: &Request) -> f64 {
        let workers = pool.by_ready.iter().filter_map(|(_, slot)| self.workers.get(*slot));
        let speed: f64 = workers.map(|worker| worker.speed(self.now, pool.fleet_rate(), &self.config)).sum();
        let weight = |tenant| self.weights.get(&tenant).copied().unwrap_or(1.0);
        let tokens = pool.queue.tokens_before(request.class, request.tenant, weight);
        if speed > 0.0 { tokens / speed } else { 0.0 }
    }

    pub(super) fn tenant_weight(&mut self, tenant: TenantId, weight: f64) {
        if weight.is_finite() && weight > 0.0 {
            self.weights.insert(tenant, weight);
        }
    }
}

impl Entry {
    fn standing(&self, uncached: u32, speed: f64, patience: f64, config: &Config) -> Standing {
        let request = &self.request;
        let service = f64::from(uncached) / speed;
        let size = (uncached, request.sequences.max(1));
        let adapter = request.adapter.map(|adapter| adapter.id);
        Standing::new(
            (request.class, request.tenant, adapter),
            size,
            (service, patience),
            self.expires,
            config.patience_half,
        )
    }
}
