//! Pools and workers come, go, fall ill and recover; their loads and caches change.

use super::{Core, Place};
use crate::explain::Cause;
use crate::pool::Pool;
use crate::timers::Timer;
use crate::worker::{Slot, Worker};
use crate::{Action, HealthState, KvEvent, LoadReport, PoolId, PoolLimits, Refusal, RequestId, WorkerId, WorkerSpec};

impl Core {
    pub(super) fn pool_joined(&mut self, pool: PoolId, limits: PoolLimits, out: &mut Vec<Action>) {
        match self.pools.get_mut(&pool) {
            Some(known) => {
                known.index.set_block_tokens(limits.block_tokens);
                known.limits = limits;
                self.shed(pool, out);
            }
            None => {
                self.pools.insert(pool, Pool::new(limits, &self.config));
            }
        }
    }

    pub(super) fn pool_left(&mut self, pool: PoolId, out: &mut Vec<Action>) {
        let Some(state) = self.pools.get(&pool) else { return };
        let queued: Vec<RequestId> = state.queue.ids().collect();
        let workers: Vec<Slot> = state.workers.iter().copied().collect();
        for id in queued {
            self.unqueue(id);
            self.refuse(id, Refusal::PoolUnknown, out);
        }
        for slot in workers {
            self.remove_worker(slot);
        }
        self.pools.remove(&pool);
    }

    pub(super) fn worker_joined(&mut self, id: WorkerId, pool: PoolId, spec: WorkerSpec, out: &mut Vec<Action>) {
        if let Some(slot) = self.workers.slot(id)
            && let Some(known) = self.workers.get_mut(slot).filter(|known| known.pool == pool)
        {
            if let Some(pool) = self.pools.get_mut(&pool) {
                pool.index.set_capacity(slot, pool.cache_blocks(&spec));
                pool.has_role(slot, spec.role);
            }
            let before = std::mem::replace(&mut known.spec, spec);
            self.touch(slot);
            self.gpus_changed(slot, &before.gpus);
            // what is bound to it may not fit any more, and what waits may fit now
            self.evacuate(slot, out);
            return self.rehome(pool, out);
        }
        self.worker_left(id, out);
        let Some(state) = self.pools.get_mut(&pool) else { return };
        let (blocks, role) = (state.cache_blocks(&spec), spec.role);
        let slot = self.workers.insert(Worker::new(self.now, id, pool, spec, &self.config));
        state.workers.insert(slot);
        state.has_role(slot, role);
        state.index.set_capacity(slot, blocks);
        self.touch(slot);
        self.gpus_changed(slot, &[]);
        out.push(Action::Probe { worker: id });
    }

    pub(super) fn worker_draining(&mut self, id: WorkerId, draining: bool, out: &mut Vec<Action>) {
        let Some(slot) = self.workers.slot(id) else { return };
        let Some(worker) = self.workers.get_mut(slot) else { return };
        worker.draining = draining;
        let pool = worker.pool;
        self.touch(slot);
        if draining {
            self.evacuate(slot, out);
            self.park_again(pool, out);
        } else {
            self.rehome(pool, out);
        }
    }

    pub(super) fn worker_left(&mut self, id: WorkerId, out: &mut Vec<Action>) {
        let Some(slot) = self.workers.slot(id) else { return };
        let Some(worker) = self.workers.get_mut(slot) else { return };
        worker.draining = true;
        let pool = worker.pool;
        let bound: Vec<RequestId> = worker.lane.ids().collect();
        for id in &bound {
            self.unqueue(*id);
        }
        self.remove_worker(slot);
        for id in bound {
            self.place(id, Cause::Retry, out);
        }
        self.park_again(pool, out);
    }

    pub(super) fn probed(&mut self, id: WorkerId, healthy: bool, out: &mut Vec<Action>) {
        let Some(slot) = self.workers.slot(id) else { return };
        let Some(worker) = self.workers.get_mut(slot) else { return };
        let before = worker.health.state();
        worker.health.probed(self.now, healthy, &self.config);
        if healthy && worker.trial.is_none() {
            worker.health.untried(self.now);
        }
        if before == HealthState::Down && healthy {
            worker.busy_until = self.now; // it is another process, most likely
        }
        self.touch(slot);
        self.health_changed(slot, before, out);
    }

    pub(super) fn load(&mut self, id: WorkerId, report: LoadReport) {
        let Some(slot) = self.workers.slot(id) else { return };
        let Some(worker) = self.workers.get_mut(slot) else { return };
        let Some(pool) = self.pools.get(&worker.pool) else { return };
        worker.observe(self.now, report, pool.fleet_rate(), &self.config);
        self.touch(slot);
    }

    /// No metrics may mean no worker: it is asked.
    pub(super) fn load_lost(&mut self, id: WorkerId, out: &mut Vec<Action>) {
        let Some(slot) = self.workers.slot(id) else { return };
        let Some(worker) = self.workers.get_mut(slot) else { return };
        worker.reported.lost();
        if worker.health.state() == HealthState::Up {
            out.push(Action::Probe { worker: id });
        }
        self.touch(slot);
    }

    pub(super) fn kv(&mut self, id: WorkerId, change: &KvEvent) {
        let Some(slot) = self.workers.slot(id) else { return };
        let Some(worker) = self.workers.get(slot) else { return };
        let Some(pool) = self.pools.get_mut(&worker.pool) else { return };
        match change {
            KvEvent::Stored { blocks } => pool.index.confirm(slot, blocks),
            KvEvent::Removed { blocks } => pool.index.drop_blocks(slot, blocks),
            KvEvent::Cleared => pool.index.forget(slot),
        }
    }

    /// Says that a worker's health changed, if it did, and moves what that concerns.
    pub(super) fn health_changed(&mut self, slot: Slot, from: HealthState, out: &mut Vec<Action>) {
        let Some(worker) = self.workers.get(slot) else { return };
        let (to, pool) = (worker.health.state(), worker.pool);
        if from == to {
            return;
        }
        out.push(Action::Health { worker: worker.id, from, to });
        if !worker.serves() {
            self.evacuate(slot, out);
            self.park_again(pool, out);
        }
    }

    /// Places what waits in a lane from which nothing will be sent.
    fn evacuate(&mut self, slot: Slot, out: &mut Vec<Action>) {
        let Some(worker) = self.workers.get(slot) else { return };
        let bound: Vec<RequestId> = worker.lane.ids().collect();
        for id in bound {
            self.unqueue(id);
            self.place(id, Cause::Retry, out);
        }
    }

    /// Places what waits without a worker, as long as there is one.
    pub(super) fn rehome(&mut self, pool: PoolId, out: &mut Vec<Action>) {
        let Some(state) = self.pools.get(&pool) else { return };
        let unbound: Vec<RequestId> = state.unbound.ids().collect();
        for id in unbound {
            if !self.pool_has(pool, Worker::is_eligible) {
                return;
            }
            self.unqueue(id);
            self.place(id, Cause::Retry, out);
        }
    }

    /// Shortens the wait of what waits for a worker that will not come soon.
    fn park_again(&mut self, pool: PoolId, out: &mut Vec<Action>) {
        if self.pool_has(pool, |worker| worker.is_eligible() || worker.is_hopeful()) {
            return;
        }
        let Some(state) = self.pools.get(&pool) else { return };
        let unbound: Vec<RequestId> = state.unbound.ids().collect();
        for id in unbound {
            self.unqueue(id);
            self.place(id, Cause::Retry, out);
        }
    }

    fn pool_has(&self, pool: PoolId, what: impl Fn(&Worker) -> bool) -> bool {
        let Some(state) = self.pools.get(&pool) else { return false };
        state.workers.iter().filter_map(|slot| self.workers.get(*slot)).any(what)
    }

    /// Forgets a worker whose lane is empty. Requests sent to it live on until their own end.
    fn remove_worker(&mut self, slot: Slot) {
        let Some(mut worker) = self.workers.remove(slot) else { return };
        for id in &worker.sent {
            let Some(entry) = self.requests.get_mut(id) else { continue };
            let second = entry.then.iter_mut();
            let first = if let Place::Sent(sent) = &mut entry.place { Some(sent) } else { None };
            second.chain(first).filter(|sent| sent.slot == Some(slot)).for_each(|sent| sent.slot = None);
        }
        self.timers.set(Timer::Worker(slot), &mut worker.timer, None);
        self.gpus_left(slot, &worker.spec.gpus);
        if let Some(pool) = self.pools.get_mut(&worker.pool) {
            pool.workers.remove(&slot);
            pool.prefillers.remove(&slot);
            pool.laden.remove(&slot);
            pool.unfit.remove(&slot);
            pool.adapters.retain(|(_, other)| *other != slot);
            pool.index.forget(slot);
            if let Some(key) = worker.ready_key {
                pool.by_ready.remove(&(key, slot));
            }
        }
    }
}
