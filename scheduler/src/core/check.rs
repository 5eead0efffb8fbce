//! The core's invariants, for debug builds and property tests.

use super::{Core, Place};
use crate::lane::Gate;
use crate::worker::Worker;
use crate::worker::kv::Held;
use crate::{AdapterState, PoolId, RequestId, WorkerId};

/// An invariant that does not hold: a fault of the core, never of its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// What a worker has reserved is not the sum over what was sent to it.
    #[error("reservations of `{0}` are not those of its requests")]
    Reservations(WorkerId),
    /// A request stands somewhere and does not know it, or the other way round.
    #[error("the places of the requests of `{0}` do not agree")]
    Places(PoolId),
    /// A worker stands neither among the eligible ones nor among the others, or in both.
    #[error("a worker of `{0}` is in none of its pool's orders, or in two")]
    Orders(PoolId),
    /// A GPU does not know who runs or works on it.
    #[error("the GPUs of `{0}` do not know it")]
    Gpus(WorkerId),
    /// Somebody waits for an adapter that is there, or does not wait for one that is not; or one that is in use is unloaded.
    #[error("who waits for adapters of `{0}` is not who needs them")]
    Adapters(WorkerId),
    /// Somebody waits for the prefill of a request that is not prefilled there.
    #[error("somebody at `{0}` waits for nobody's prefill")]
    Siblings(WorkerId),
    /// More waits than may.
    #[error("the queue of `{0}` is over its bounds")]
    Bounds(PoolId),
}

impl Core {
    /// Looks at everything; costs time in proportion to all that lives.
    ///
    /// # Errors
    /// The first invariant that does not hold.
    pub fn check(&self) -> Result<(), Broken> {
        for (slot, worker) in self.workers.iter() {
            let (mut held, mut awaited) = (Held::default(), 0);
            for id in &worker.sent {
                let entry = self.requests.get(id);
                let Some((entry, Place::Sent(sent))) = entry.map(|entry| (entry, entry.place)) else {
                    return Err(Broken::Reservations(worker.id));
                };
                let here = [Some(sent), entry.then].into_iter().flatten().find(|sent| sent.slot == Some(slot));
                let Some(here) = here else { return Err(Broken::Reservations(worker.id)) };
                held = held.plus(here.held);
                let is_awaited = entry.then.is_some_and(|then| then.slot == Some(slot));
                awaited += if is_awaited { u64::from(entry.whole.prompt_tokens) } else { 0 };
            }
            if held != worker.held || awaited != worker.awaited_tokens {
                return Err(Broken::Reservations(worker.id));
            }
            let idle = |gate| matches!(gate, Gate::Prefill(leader) if !worker.unstarted.contains(&leader));
            if worker.lane.gates().into_iter().any(|(_, gate)| idle(gate)) {
                return Err(Broken::Siblings(worker.id));
            }
            if !self.adapters_agree(worker) {
                return Err(Broken::Adapters(worker.id));
            }
            let mut gpus = worker.spec.gpus.iter().map(|id| self.gpus.get(id));
            if !gpus.all(|gpu| gpu.is_some_and(|gpu| gpu.knows(slot, !worker.sent.is_empty()))) {
                return Err(Broken::Gpus(worker.id));
            }
        }
        for (id, pool) in &self.pools {
            let lanes = pool.workers.iter().filter_map(|slot| self.workers.get(*slot)).map(|worker| &worker.lane);
            let waiting: Vec<_> = lanes.chain([&pool.unbound]).flat_map(|lane| lane.ids()).collect();
            let known = waiting.iter().all(|id| {
                let entry = self.requests.get(id);
                entry.is_some_and(|entry| {
                    matches!(entry.place, Place::Lane(..) | Place::Unbound(_))
                        && pool.queue.contains(&entry.request, entry.arrived)
                        && entry.timer.is_some()
                })
            });
            let by_class: u32 = pool.queue.requests.iter().sum();
            if pool.by_ready.len() + pool.unfit.len() != pool.workers.len() {
                return Err(Broken::Orders(*id));
            }
            if !known || waiting.len() != pool.queue.len() || waiting.len() != by_class as usize {
                return Err(Broken::Places(*id));
            }
            if pool.queue.is_over(&pool.limits) || pool.index.bytes() > self.config.index_bytes_max {
                return Err(Broken::Bounds(*id));
            }
        }
        Ok(())
    }

    fn adapters_agree(&self, worker: &Worker) -> bool {
        let waits = |state: Option<AdapterState>| state != Some(AdapterState::Loaded);
        let mut gathered = worker.lane.wanted().into_iter().map(|(_, adapter)| adapter);
        let adapter = |id: &RequestId| self.requests.get(id)?.request.adapter;
        let mut unloading = worker.adapters.moving().filter(|(_, state, _)| *state == AdapterState::Unloading);
        gathered.all(|adapter| waits(worker.adapters.state(adapter)))
            && worker
                .lane
                .ids()
                .filter_map(|id| adapter(&id))
                .all(|adapter| worker.lane.asks_for(adapter.id) == 0 || worker.adapters.has(Some(adapter)))
            && unloading.all(|(id, ..)| !worker.sent.iter().filter_map(adapter).any(|used| used.id == id))
    }

    /// [`Core::check`] at one call in many, so that debug builds stay usable with thousands of workers.
    pub(super) fn check_sampled(&self) -> Result<(), Broken> {
        const EVERY: u64 = 256;
        if self.now.0.is_multiple_of(EVERY) { self.check() } else { Ok(()) }
    }
}
