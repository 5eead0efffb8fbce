//! After an event: windows are filled, idle workers steal, lanes that do not move are looked at again.
//!
//! Work is conserved: no request waits while an eligible worker has room, unless staying, with the cache it would lose
//! priced in, is no worse than moving. Room that comes with an event is seen at once, room that comes with time alone
//! within [`crate::Config::rescore_every`]; and so is a lane's new head, where it changed because of what another lane
//! sent.

use smallvec::SmallVec;

use super::{Core, Place};
use crate::explain::Cause;
use crate::lane::Gate;
use crate::placement::{Ahead, Choice, Scene, Scored, pays};
use crate::time::duration;
use crate::timers::Timer;
use crate::worker::Slot;
use crate::{Action, Leg, PoolId, Refusal, RequestId, Role, Tick};

/// Lanes that a worker with room looks into.
const LANES_SEEN: usize = 8;
/// Requests it looks at in each, past a head that it may not take.
const LANE_DEPTH: usize = 4;
/// Requests that leave a lane at one look.
const MOVES_MAX: usize = 8;

impl Core {
    /// Lets time pass up to `now`.
    pub(super) fn advance(&mut self, now: Tick, out: &mut Vec<Action>) {
        self.now = self.now.max(now);
        while let Some(timer) = self.timers.pop(self.now) {
            match timer {
                Timer::Request(id) => self.expire(id, out),
                Timer::Worker(slot) => self.wake(slot, out),
            }
            self.settle(out);
        }
    }

    /// Settles every worker that was touched.
    pub(super) fn settle(&mut self, out: &mut Vec<Action>) {
        while let Some(slot) = self.touched.pop() {
            let Some(worker) = self.workers.get_mut(slot) else { continue };
            if worker.may_take {
                self.pump(slot, out);
                self.steal(slot, out);
                self.touch_prefillers(slot);
            }
            // what these two changed of it is seen to below
            if let Some(worker) = self.workers.get_mut(slot) {
                (worker.touched, worker.may_take) = (false, false);
            }
            self.occupy(slot);
            self.doze(slot, out);
            self.load_adapters(slot, out);
            if let Some(pool) = self.order(slot) {
                self.rehome(pool, out);
            }
        }
    }

    /// Sends from a worker's lane while it has room.
    fn pump(&mut self, slot: Slot, out: &mut Vec<Action>) {
        self.release_siblings(slot);
        while let Some((id, matched_tokens)) = self.sendable_head(slot) {
            if let Some(leader) = self.leader(slot, id) {
                self.hold(slot, id, leader);
                continue;
            }
            let Some(then) = self.second(id, None) else { return };
            self.unqueue(id);
            self.send(id, (slot, then), matched_tokens, out);
            self.believe(id, 0.0);
        }
    }

    /// What waits for a prompt's worker may have waited for room at the one that goes on.
    fn touch_prefillers(&mut self, slot: Slot) {
        let Some(worker) = self.workers.get(slot).filter(|worker| worker.spec.role == Role::Decode) else { return };
        let Some(pool) = self.pools.get(&worker.pool) else { return };
        let waiting: SmallVec<[Slot; 8]> = pool.prefillers.intersection(&pool.laden).copied().collect();
        waiting.into_iter().for_each(|slot| self.touch(slot));
    }

    /// The head of a lane and its tokens that need not be computed, if there is room for it.
    fn sendable_head(&self, slot: Slot) -> Option<(RequestId, u32)> {
        let worker = self.workers.get(slot)?;
        let pool = self.pools.get(&worker.pool)?;
        let id = worker.lane.head(&pool.shares, &pool.fairness)?;
        let entry = self.requests.get(&id)?;
        let Place::Lane(_, standing) = entry.place else { return None };
        let room = worker.has_room(self.now, (&entry.request, &entry.plan), standing.uncached, pool, &self.config);
        room.then_some((id, entry.matched_tokens()))
    }

    /// A worker with room and nothing in its lane takes heads of other lanes that are better off with it.
    fn steal(&mut self, slot: Slot, out: &mut Vec<Action>) {
        while let Some((id, here, there)) = self.spoils(slot) {
            let Some(then) = self.second(id, None) else { return };
            self.scored.clear();
            self.scored.extend([here.clone(), there]);
            self.record(id, Cause::Rescore, Some(&here), None);
            self.unqueue(id);
            self.send(id, (slot, then), here.matched_tokens, out);
            self.believe(id, 0.0);
        }
    }

    /// The request of another lane that gains most by being sent to `slot` now, and its scores here and there; of each
    /// lane the first that gains.
    fn spoils(&self, slot: Slot) -> Option<(RequestId, Scored, Scored)> {
        let worker = self.workers.get(slot)?;
        let pool = self.pools.get(&worker.pool)?;
        let no_lane = pool.laden.is_empty() || !worker.lane.is_clear();
        if no_lane || !worker.may_have_room(self.now, pool.fleet_rate(), &self.config) {
            return None;
        }
        let scene = Scene { now: self.now, config: &self.config, pool, workers: &self.workers };
        let others = pool.laden.range(slot..).chain(pool.laden.range(..slot));
        let mut best: Option<(f64, RequestId, Scored, Scored)> = None;
        for victim in others.take(LANES_SEEN) {
            let lane = &self.workers.get(*victim)?.lane;
            let head = lane.head(&pool.shares, &pool.fairness);
            let behind = lane.ids().take(LANE_DEPTH).filter(|id| head != Some(*id));
            let mut first = head.into_iter().chain(behind);
            let spoil = first.find_map(|id| {
                let entry = self.requests.get(&id)?;
                let request = &entry.request;
                // the cheap question first: most that are asked have no room, even if they held the whole prompt
                let room = |uncached| worker.has_room(self.now, (request, &entry.plan), uncached, pool, &self.config);
                let fits = entry.plan.leg.fits(worker.spec.role) && worker.holds(request.prompt_tokens);
                if !fits || entry.failed_on.contains(&worker.id) || !room(0) {
                    return None;
                }
                let own = scene.matched_tokens(request, pool.index.held_by(self.now, slot, &request.blocks));
                let [own, theirs] = [own, entry.matched_tokens()].map(|tokens| scene.matching(request, tokens));
                let asked = scene.asked(request, &entry.plan);
                let here = scene.score(&asked, slot, own, Ahead::Sent)?;
                let there = scene.score(&asked, *victim, theirs, Ahead::Sent)?;
                let takes = pays(&self.config, there.seconds, here.seconds)
                    && room(here.uncached_tokens)
                    && self.leader(slot, id).is_none();
                takes.then_some((there.seconds - here.seconds, id, here, there))
            });
            if let Some(spoil) = spoil
                && best.as_ref().is_none_or(|best| spoil.0 > best.0)
            {
                best = Some(spoil);
            }
        }
        best.map(|(_, id, here, there)| (id, here, there))
    }

    /// Renews a worker's place in its pool's orders, and its timer. Returns the pool when the worker just became
    /// eligible, so that what waits for one gets it.
    fn order(&mut self, slot: Slot) -> Option<PoolId> {
        let siblings = self.siblings_wait_until(slot);
        let worker = self.workers.get_mut(slot)?;
        let pool = self.pools.get_mut(&worker.pool)?;
        let (now, fleet_rate) = (self.now, pool.fleet_rate());
        let eligible = worker.is_eligible();
        let ready = eligible.then(|| {
            let speed = worker.speed(now, fleet_rate, &self.config);
            let tokens = worker.backlog_tokens(now, speed) + worker.lane.work().tokens as f64;
            let wake = worker.wake_seconds(now, &self.config);
            now.after(duration(tokens / speed + wake)).max(worker.busy_until)
        });
        if worker.ready_key != ready {
            if let Some(key) = worker.ready_key {
                pool.by_ready.remove(&(key, slot));
            }
            if let Some(key) = ready {
                pool.by_ready.insert((key, slot));
            }
        }
        if eligible {
            pool.unfit.remove(&slot)
        } else {
            pool.unfit.insert(slot)
        };
        let appeared = worker.ready_key.is_none() && ready.is_some();
        worker.ready_key = ready;
        let laden = !worker.lane.is_empty();
        if laden {
            pool.laden.insert(slot)
        } else {
            pool.laden.remove(&slot)
        };

        let busy = Some(worker.busy_until).filter(|until| laden && *until > now);
        let rescore = laden.then(|| worker.rescored.after(self.config.rescore_every));
        let health = worker.health.next_wake().filter(|_| !worker.draining);
        let asleep = worker.sleep.gives_up(&self.config);
        let unwanted = worker.adapters.unload_retry(now, &pool.adapters_gone);
        let wanted = [busy, rescore, health, asleep, siblings, unwanted].into_iter().flatten().min();
        self.timers.set(Timer::Worker(slot), &mut worker.timer, wanted);
        appeared.then_some(worker.pool)
    }

    fn wake(&mut self, slot: Slot, out: &mut Vec<Action>) {
        let Some(worker) = self.workers.get_mut(slot) else { return };
        worker.timer = None;
        let before = worker.health.state();
        if !worker.draining && worker.health.wake(self.now, &self.config) {
            out.push(Action::Probe { worker: worker.id });
        }
        let rescore = worker.rescored.after(self.config.rescore_every) <= self.now;
        self.touch(slot);
        self.health_changed(slot, before, out);
        if rescore {
            self.rescore(slot, out);
        }
    }

    /// Moves heads of a lane that would be better off elsewhere.
    fn rescore(&mut self, slot: Slot, out: &mut Vec<Action>) {
        let Some(worker) = self.workers.get_mut(slot) else { return };
        worker.rescored = self.now;
        let pool_id = worker.pool;
        // of those that wait for more than room, whoever came first for each thing; and who waits with it for an adapter
        let gathered = worker.lane.gates();
        for (id, gate) in gathered {
            if self.move_away(id, slot, out)
                && let (Gate::Adapter(_), Some(worker)) = (gate, self.workers.get(slot))
            {
                let others: SmallVec<[RequestId; MOVES_MAX]> = worker.lane.gathered(gate).take(MOVES_MAX - 1).collect();
                others.into_iter().all(|id| self.move_away(id, slot, out));
            }
        }
        for _ in 0..MOVES_MAX {
            let (Some(worker), Some(pool)) = (self.workers.get(slot), self.pools.get(&pool_id)) else { return };
            let Some(id) = worker.lane.head(&pool.shares, &pool.fairness) else { return };
            if !self.move_away(id, slot, out) {
                return;
            }
        }
    }

    /// Moves a request out of a worker's lane if it would be better off elsewhere, or is refused. Whether it left.
    fn move_away(&mut self, id: RequestId, slot: Slot, out: &mut Vec<Action>) -> bool {
        let Some(entry) = self.requests.get(&id) else { return false };
        let Some(pool) = self.pools.get(&entry.request.pool) else { return false };
        let scene = Scene { now: self.now, config: &self.config, pool, workers: &self.workers };
        let next = (&entry.request, Leg::Decode);
        if entry.plan.leg == Leg::Prefill
            && !pool.workers.iter().any(|slot| scene.may_take(next, &entry.failed_on, *slot))
        {
            // nobody is left to go on from its prompt
            self.unqueue(id);
            self.place(id, Cause::Retry, out);
            return true;
        }
        let at_head = Some((slot, entry.matched_tokens()));
        let asked = (&entry.request, &entry.plan);
        match scene.choose(asked, &entry.failed_on, at_head, &mut self.rng, &mut self.scored) {
            Choice::Winner(at) => {
                let Some(best) = self.scored.get(at).filter(|best| best.slot != slot).cloned() else { return false };
                let here = self.scored.iter().find(|scored| scored.slot == slot);
                if !here.is_none_or(|here| pays(&self.config, here.seconds, best.seconds)) {
                    return false;
                }
                self.record(id, Cause::Rescore, Some(&best), None);
                self.unqueue(id);
                self.bind(id, (&best, None), out);
                self.believe(id, best.first_token_seconds);
                true
            }
            Choice::Infeasible => {
                self.record(id, Cause::Rescore, None, None);
                self.unqueue(id);
                self.refuse_infeasible(id, out);
                true
            }
            Choice::Nobody => false,
        }
    }

    /// A request has waited long enough.
    fn expire(&mut self, id: RequestId, out: &mut Vec<Action>) {
        let Some(entry) = self.requests.get_mut(&id) else { return };
        entry.timer = None;
        let late = entry.request.deadline.is_some_and(|deadline| deadline <= self.now);
        let reason = match (entry.place, entry.last) {
            (Place::Unbound(_), Some(last)) if !late => Refusal::AttemptsExhausted { last },
            (Place::Unbound(_), None) if !late => Refusal::NoWorker,
            _ if late => Refusal::DeadlinePassed,
            _ => Refusal::TimedOut,
        };
        self.unqueue(id);
        self.refuse(id, reason, out);
    }
}
