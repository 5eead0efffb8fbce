//! LoRA adapters: which worker is given which, and whose place it gets.
//!
//! What is asked for an adapter that its worker does not have waits beside the lane; the worker is told once for all of
//! that. Where its places are taken, the adapter that was used longest ago and of which nothing is asked now is unloaded
//! first. Where all are in use, one that had its place for a turn gets nothing more at this worker once another was waited
//! for as long, and is unloaded when what it has is over: so adapters take turns where there are fewer places than are
//! asked for. The same where it is memory that lacks; what was freed is there once the GPU says so.
//!
//! An adapter that is configured no more is unloaded where nothing is asked of it, whoever loaded it. One whose files moved
//! gets nothing more, is unloaded once it is not in use, and loaded anew for those who wait.
//!
//! A load that fails, or finds no memory that an adapter could make free, is not tried again for a while, and whoever waited for it is placed anew.
//!
//! Invariants: nobody is told to load or unload what it was told already; nothing is unloaded that requests were sent for;
//! what we load takes no more places than there are; nobody stands in a lane's order whose adapter is not there.
//! Not here: what a load costs a request (`placement::terms`).

use smallvec::SmallVec;

use super::{Core, Place};
use crate::explain::Cause;
use crate::lane::Gate;
use crate::worker::{Slot, Worker};
use crate::{Action, Adapter, AdapterChange, AdapterEnd, AdapterId, AdapterState, PoolId, RequestId, WorkerId};

impl Core {
    /// An engine says which adapters it has, and which of these are `stale`. One that was known keeps its files until they
    /// move: we loaded it, or the engine did not let it go.
    pub(super) fn adapters_seen(
        &mut self,
        id: WorkerId,
        adapters: &[Adapter],
        stale: &[AdapterId],
        out: &mut Vec<Action>,
    ) {
        let Some(slot) = self.workers.slot(id) else { return };
        let Some(worker) = self.workers.get_mut(slot) else { return };
        let (came, gone) = worker.adapters.seen(self.now, adapters);
        let pool = worker.pool;
        for adapter in &came {
            if stale.contains(adapter) && worker.spec.adapters_max > 0 {
                worker.adapters.moved(self.now, *adapter);
            } else {
                worker.lane.open(Gate::Adapter(*adapter));
            }
        }
        gone.iter().for_each(|adapter| self.close(slot, *adapter));
        if !came.is_empty() || !gone.is_empty() {
            self.adapters_changed(slot);
            self.rehome(pool, out);
        }
    }

    /// An adapter left the configuration, came back, or has other files.
    pub(super) fn adapter_changed(&mut self, pool: PoolId, adapter: AdapterId, change: AdapterChange) {
        let Some(state) = self.pools.get_mut(&pool) else { return };
        if change == AdapterChange::Gone {
            state.adapters_gone.insert(adapter);
        } else {
            state.adapters_gone.remove(&adapter);
        }
        let slots: Vec<Slot> = state.workers.iter().copied().collect();
        for slot in slots {
            let takes = |worker: &&mut Worker| change == AdapterChange::Moved && worker.spec.adapters_max > 0;
            if let Some(worker) = self.workers.get_mut(slot).filter(takes) {
                worker.adapters.moved(self.now, adapter);
                if worker.adapters.is_stale(adapter) {
                    self.close(slot, adapter);
                }
            }
            self.touch(slot);
        }
    }

    /// A worker did what it was told, or did not.
    pub(super) fn adapter_turned(&mut self, id: WorkerId, adapter: AdapterId, end: AdapterEnd, out: &mut Vec<Action>) {
        let Some(slot) = self.workers.slot(id) else { return };
        let Some(worker) = self.workers.get_mut(slot) else { return };
        let (pool, gpus, bytes) = (worker.pool, worker.spec.gpus.clone(), worker.adapters.bytes_of(adapter));
        let Some((state, took)) = worker.adapters.turned(self.now, adapter, end, &self.config) else { return };
        if let (Some(pool), Some(took)) = (self.pools.get_mut(&pool), took) {
            pool.adapter_loaded(took);
        }
        for id in gpus.iter().filter(|_| bytes > 0) {
            if let Some(gpu) = self.gpus.get_mut(id) {
                gpu.memory_changed = Some(self.now);
            }
        }
        self.adapters_changed(slot);
        if state == Some(AdapterState::Loaded) {
            self.open(slot, adapter);
        } else if end != AdapterEnd::Done {
            self.disperse(slot, adapter, out);
        }
    }

    /// A worker does not have the adapter of a request that was sent there.
    pub(super) fn adapter_lost(&mut self, id: RequestId, slot: Option<Slot>) {
        let adapter = self.requests.get(&id).and_then(|entry| entry.request.adapter);
        let worker = slot.and_then(|slot| Some((slot, self.workers.get_mut(slot)?)));
        let (Some(adapter), Some((slot, worker))) = (adapter, worker) else { return };
        worker.adapters.lost(adapter.id);
        if !worker.adapters.has(Some(adapter)) {
            self.close(slot, adapter.id);
        }
        self.adapters_changed(slot);
    }

    /// Looks whether a worker is to be told to load or unload something.
    pub(super) fn load_adapters(&mut self, slot: Slot, out: &mut Vec<Action>) {
        self.unload_unwanted(slot, out);
        let Some(worker) = self.workers.get(slot) else { return };
        let wanted = worker.lane.wanted();
        let moving: Vec<_> = worker.adapters.moving().collect();
        if wanted.is_empty() && moving.is_empty() {
            return;
        }
        let id = worker.id;
        let needs_place = |adapter: AdapterId| worker.adapters.state(adapter).is_none();
        let more = wanted.iter().any(|(_, adapter)| needs_place(*adapter));
        for (adapter, state, since) in moving {
            match state {
                AdapterState::Leaving if !more && !self.is_stale(slot, adapter) => self.stay(slot, adapter),
                AdapterState::Leaving => self.unload(slot, adapter, out),
                AdapterState::Loading | AdapterState::Unloading if since.after(self.config.wake_max) <= self.now => {
                    self.adapter_turned(id, adapter, AdapterEnd::Failed, out);
                }
                AdapterState::Loading | AdapterState::Unloading | AdapterState::Loaded => {}
            }
        }
        let going = |state| matches!(state, AdapterState::Leaving | AdapterState::Unloading);
        let Some(worker) = self.workers.get(slot).filter(|worker| worker.may_send()) else { return };
        let mut coming = worker.adapters.states().filter(|(_, state)| going(*state)).count();
        for (first, adapter) in wanted {
            let Some(worker) = self.workers.get(slot) else { return };
            let Some(entry) = self.requests.get(&first) else { continue };
            let Some(asked) = entry.request.adapter.filter(|asked| asked.id == adapter) else { continue };
            if worker.adapters.state(adapter).is_some() || worker.adapters.retry(adapter) > self.now {
                continue;
            }
            let waited = self.now.since(entry.arrived);
            let Some(lacks) = self.lacks_memory(slot, asked.memory_bytes) else { continue };
            if lacks > worker.adapters.memory_bytes() {
                if let Some(worker) = self.workers.get_mut(slot) {
                    worker.adapters.failed(self.now, adapter, false, &self.config);
                }
                self.disperse(slot, adapter, out);
            } else if lacks == 0 && worker.adapters.places_taken() < worker.spec.adapters_max {
                out.push(Action::LoadAdapter { worker: id, adapter });
                if let Some(worker) = self.workers.get_mut(slot) {
                    worker.adapters.load(self.now, asked);
                }
                self.adapters_changed(slot);
            } else if coming > 0 {
                coming -= 1;
            } else if let Some(spare) = worker.spare_adapter(self.now, lacks > 0) {
                self.unload(slot, spare, out);
            } else if waited >= self.config.adapter_turn
                && let Some(had) = worker.adapters.had_its_turn(self.now, lacks > 0, &self.config)
            {
                self.turn_adapter(slot, had, AdapterState::Leaving);
                self.close(slot, had);
            }
        }
    }

    fn is_stale(&self, slot: Slot, adapter: AdapterId) -> bool {
        self.workers.get(slot).is_some_and(|worker| worker.adapters.is_stale(adapter))
    }

    /// Unloads what is not to be there any more.
    fn unload_unwanted(&mut self, slot: Slot, out: &mut Vec<Action>) {
        let Some(worker) = self.workers.get(slot) else { return };
        let Some(pool) = self.pools.get(&worker.pool) else { return };
        // whoever asked while it was configured is served; and who takes none at our word keeps what it has
        let rests = |id: &AdapterId| worker.spec.adapters_max > 0 && worker.lane.asks_for(*id) == 0;
        let leaves = |id: &AdapterId| worker.adapters.is_stale(*id) || rests(id);
        let unwanted: SmallVec<[AdapterId; 4]> = worker.adapters.unwanted(&pool.adapters_gone).filter(leaves).collect();
        unwanted.into_iter().for_each(|adapter| self.unload(slot, adapter, out));
    }

    /// Unloads an adapter, once nothing that was sent for it is under way.
    fn unload(&mut self, slot: Slot, adapter: AdapterId, out: &mut Vec<Action>) {
        let Some(worker) = self.workers.get(slot) else { return };
        if !worker.adapters.is_used(adapter) && worker.may_send() && worker.adapters.unload_after(adapter) <= self.now {
            out.push(Action::UnloadAdapter { worker: worker.id, adapter });
            self.turn_adapter(slot, adapter, AdapterState::Unloading);
        }
    }

    /// Nobody needs the place of an adapter that was to leave.
    fn stay(&mut self, slot: Slot, adapter: AdapterId) {
        self.turn_adapter(slot, adapter, AdapterState::Loaded);
        self.open(slot, adapter);
    }

    fn turn_adapter(&mut self, slot: Slot, adapter: AdapterId, to: AdapterState) {
        if let Some(worker) = self.workers.get_mut(slot) {
            worker.adapters.turn(self.now, adapter, to);
        }
        self.adapters_changed(slot);
    }

    /// Those who waited for it stand in the lane's order.
    fn open(&mut self, slot: Slot, adapter: AdapterId) {
        if let Some(worker) = self.workers.get_mut(slot) {
            worker.lane.open(Gate::Adapter(adapter));
        }
        self.touch(slot);
    }

    /// Those in the lane who need it wait for it, and for nothing else.
    fn close(&mut self, slot: Slot, adapter: AdapterId) {
        let Some(worker) = self.workers.get_mut(slot) else { return };
        let bound: Vec<RequestId> = worker.lane.ids().collect();
        for id in bound {
            if let Some(Place::Lane(_, at)) = self.requests.get_mut(&id).map(|entry| &mut entry.place)
                && at.adapter == Some(adapter)
            {
                worker.lane.remove(id, *at);
                at.gate = Some(Gate::Adapter(adapter));
                worker.lane.gather(id, *at);
            }
        }
    }

    /// Those who waited for it are placed anew.
    fn disperse(&mut self, slot: Slot, adapter: AdapterId, out: &mut Vec<Action>) {
        let Some(worker) = self.workers.get(slot) else { return };
        let gathered: Vec<RequestId> = worker.lane.gathered(Gate::Adapter(adapter)).collect();
        for id in gathered {
            self.unqueue(id);
            self.place(id, Cause::Retry, out);
        }
    }

    /// Others may find a place now, and requests may find who has it.
    fn adapters_changed(&mut self, slot: Slot) {
        if let Some(worker) = self.workers.get(slot)
            && let Some(pool) = self.pools.get_mut(&worker.pool)
        {
            pool.adapters.retain(|(_, other)| *other != slot);
            pool.adapters.extend(worker.adapters.states().map(|(adapter, _)| (adapter, slot)));
        }
        self.touch(slot);
    }

    /// Of so many bytes on each GPU of a worker, those that are not free, as far as the GPUs say; none where they have said
    /// nothing since something changed there.
    fn lacks_memory(&self, slot: Slot, bytes: u64) -> Option<u64> {
        let Some(worker) = self.workers.get(slot).filter(|_| bytes > 0) else { return Some(0) };
        let mut lacks = 0;
        for gpu in worker.spec.gpus.iter().filter_map(|id| self.gpus.get(id)) {
            let Some(free) = gpu.free_bytes(self.now, &self.config) else { continue };
            if gpu.read_before_change() {
                return None;
            }
            let coming = gpu.workers().filter_map(|other| Some(self.workers.get(other)?.adapters.coming_bytes()));
            lacks = lacks.max(coming.fold(bytes, u64::saturating_add).saturating_sub(free));
        }
        Some(lacks)
    }
}
