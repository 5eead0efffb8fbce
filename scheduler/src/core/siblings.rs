//! Requests with a long prefix in common that come together, as best-of-n and groups of agents do.
//!
//! They are drawn to one worker by what the first of them will leave in its cache. Where an engine can reuse that only
//! once it has been computed, a sibling that is sent meanwhile computes it, too; so it waits beside the lane until the
//! first one's first token. Once that one was sent it waits for twice the time that was predicted for that at most, and
//! only where what it saves is worth more than the way to the engine and back. Engines that share what is about to be
//! computed are sent all at once.
//!
//! Invariants: whoever is waited for is at the worker or in its lane, and has no first token; nobody waits in a circle.

use std::time::Duration;

use super::{Core, Place};
use crate::lane::Gate;
use crate::time::duration;
use crate::worker::Slot;
use crate::{RequestId, Tick};

/// Requests that a newcomer is compared with: those that came last.
const LEADERS_SEEN: usize = 64;
/// On top of twice the predicted time.
const PATIENCE: Duration = Duration::from_millis(50);

impl Core {
    /// The request at the worker whose prefill this one is to wait for. Of those in the lane only who came before: else
    /// two could wait for each other.
    pub(super) fn leader(&self, slot: Slot, id: RequestId) -> Option<RequestId> {
        let worker = self.workers.get(slot).filter(|worker| worker.spec.caches_late)?;
        let request = &self.requests.get(&id)?.request;
        let pool = self.pools.get(&request.pool)?;
        let speed = worker.speed(self.now, pool.fleet_rate(), &self.config);
        let leads = |leader: &&RequestId| {
            let Some(entry) = self.requests.get(leader) else { return false };
            let uncached = match entry.place {
                Place::Sent(sent) if self.held_until(**leader).is_some_and(|until| until > self.now) => sent.uncached,
                Place::Lane(_, standing) if **leader < id => standing.uncached,
                _ => return false,
            };
            let held = entry.request.prompt_tokens.saturating_sub(uncached);
            let common = common(&entry.request.blocks, &request.blocks).saturating_mul(pool.limits.block_tokens);
            f64::from(common.saturating_sub(held)) / speed >= self.config.sibling_gain.as_secs_f64()
        };
        worker.unstarted.iter().rev().filter(|leader| **leader != id).take(LEADERS_SEEN).find(leads).copied()
    }

    /// How long others wait for the prefill of a request that was sent.
    fn held_until(&self, leader: RequestId) -> Option<Tick> {
        let Place::Sent(sent) = self.requests.get(&leader)?.place else { return None };
        let patience = duration(2.0 * sent.predicted) + PATIENCE;
        Some(sent.at.after(patience.min(self.config.sibling_wait_max)))
    }

    /// When the next of those that wait for a prefill at this worker need not wait any more.
    pub(super) fn siblings_wait_until(&self, slot: Slot) -> Option<Tick> {
        self.leaders(slot).filter_map(|leader| self.held_until(leader)).min()
    }

    fn leaders(&self, slot: Slot) -> impl Iterator<Item = RequestId> {
        let gates = self.workers.get(slot).map(|worker| worker.lane.gates()).unwrap_or_default();
        gates.into_iter().filter_map(|(_, gate)| match gate {
            Gate::Prefill(leader) => Some(leader),
            Gate::Adapter(_) => None,
        })
    }

    /// Whoever has waited for a prefill for long enough waits for room alone.
    pub(super) fn release_siblings(&mut self, slot: Slot) {
        let over = |leader: &RequestId| self.held_until(*leader).is_some_and(|until| until <= self.now);
        let over: Vec<RequestId> = self.leaders(slot).filter(over).collect();
        if let Some(worker) = self.workers.get_mut(slot) {
            over.into_iter().for_each(|leader| worker.lane.open(Gate::Prefill(leader)));
        }
    }

    /// Lets a request in the worker's lane wait for another's prefill.
    pub(super) fn hold(&mut self, slot: Slot, id: RequestId, leader: RequestId) {
        let Some(worker) = self.workers.get_mut(slot) else { return };
        if let Some(Place::Lane(_, at)) = self.requests.get_mut(&id).map(|entry| &mut entry.place) {
            worker.lane.remove(id, *at);
            at.gate = Some(Gate::Prefill(leader));
            worker.lane.gather(id, *at);
        }
    }
}

/// Blocks that two prompts have in common.
fn common(a: &[u64], b: &[u64]) -> u32 {
    // Equal hashes mean equal prefixes: up to the first that differs all are equal, and none behind it.
    let (mut equal, mut differs) = (0, a.len().min(b.len()));
    while equal < differs {
        let at = usize::midpoint(equal, differs);
        if a.get(at) == b.get(at) {
            equal = at + 1;
        } else {
            differs = at;
        }
    }
    u32::try_from(equal).unwrap_or(u32::MAX)
}
