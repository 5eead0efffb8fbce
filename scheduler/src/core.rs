//! The state machine: takes an event, lets time pass, fills the workers' windows.
//!
//! Invariants (see `check`): a request is in one place; reservations are those of what was sent; queues keep their
//! bounds; every timer has an owner. A request is announced, then refused or sent, and each send is answered once.

mod adapters;
mod admission;
mod attempt;
pub(crate) mod check;
mod fleet;
mod gpus;
mod pairs;
mod settle;
mod siblings;
mod sleep;

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use foldhash::fast::FixedState;
use smallvec::SmallVec;

use crate::config::Config;
use crate::explain::Decisions;
use crate::lane::Standing;
use crate::outputs::Plan;
use crate::placement::Scored;
use crate::pool::Pool;
use crate::rng::Rng;
use crate::timers::Timers;
use crate::worker::backlog::SendNumber;
use crate::worker::kv::Held;
use crate::worker::whole::Before;
use crate::worker::{Slot, Workers};
use crate::{Action, Event, Failure, GpuId, Leg, PoolId, Request, RequestId, TenantId, Tick, WorkerId};

/// The scheduler of one gateway: all its pools, workers and waiting requests.
#[derive(Debug)]
pub struct Core {
    pub(crate) config: Config,
    pub(crate) pools: BTreeMap<PoolId, Pool>,
    pub(crate) workers: Workers,
    /// Those under some worker.
    gpus: BTreeMap<GpuId, gpus::Gpu>,
    /// Looked up, never iterated: its order means nothing. Boxed, so that growing does not move them all at once.
    pub(crate) requests: HashMap<RequestId, Box<Entry>, FixedState>,
    pub(crate) decisions: Decisions,
    weights: BTreeMap<TenantId, f64>,
    timers: Timers,
    rng: Rng,
    now: Tick,
    /// Workers whose window, lane or standing changed and that are to be settled.
    touched: Vec<Slot>,
    /// Room for the candidates of a decision, used again by the next.
    scored: Vec<Scored>,
}

/// A live request.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) request: Request,
    /// Of all of it.
    whole: Plan,
    /// Of what is to be done of it now.
    plan: Plan,
    arrived: Tick,
    /// Seconds from its arrival to its first token, as predicted when it first got a place.
    predicted: Option<f64>,
    /// It is refused when it still waits then; the time at workers that failed it is not counted.
    expires: Tick,
    /// That time.
    at_workers: Duration,
    place: Place,
    /// What is held for the rest of it at a second worker, while the first computes its prompt.
    then: Option<Sent>,
    /// Until when what the first has computed can be fetched from there.
    kept: Option<Tick>,
    /// One worker is to do all of it: there was nothing to fetch.
    undivided: bool,
    timer: Option<Tick>,
    attempts: u32,
    /// Workers that failed it, and get it no more.
    failed_on: SmallVec<[WorkerId; 3]>,
    /// Workers that were too full for it, or answered it with an error once: tried again only when no other may take it.
    avoided: SmallVec<[WorkerId; 3]>,
    last: Option<Failure>,
    /// Output tokens its tenant was charged for.
    charged: u32,
}

#[derive(Debug, Clone, Copy)]
enum Place {
    /// In between; never after an event was handled.
    Loose,
    /// Waits in its pool, bound to no worker.
    Unbound(Standing),
    /// Waits in a worker's lane.
    Lane(Slot, Standing),
    /// Sent.
    Sent(Sent),
}

#[derive(Debug, Clone, Copy)]
struct Sent {
    worker: WorkerId,
    /// None once the worker has left.
    slot: Option<Slot>,
    at: Tick,
    /// Seconds from then to the first token, as predicted.
    predicted: f64,
    uncached: u32,
    /// What had been sent to the worker before.
    before: Before,
    held: Held,
    /// In the worker's backlog; none where there is nothing to prefill.
    number: Option<SendNumber>,
    /// When its first token came.
    started: Option<Tick>,
}

impl Entry {
    /// Until when it may wait: only waiting uses up the queue's time-out, everything uses up a client's deadline.
    fn waits_until(&self) -> Tick {
        let until = self.expires.after(self.at_workers);
        self.request.deadline.map_or(until, |deadline| until.min(deadline))
    }

    /// From now on this is to be done of it.
    fn turn(&mut self, leg: Leg) {
        self.plan = self.whole.of(leg);
    }

    /// Until when the cache of its prompt can be fetched, if it still can.
    fn kept_at(&self, now: Tick) -> Option<Tick> {
        self.kept.filter(|kept| *kept > now)
    }

    /// Prompt tokens that the worker to whose lane it is bound was believed to hold when it was bound.
    fn matched_tokens(&self) -> u32 {
        match self.place {
            Place::Lane(_, standing) => self.request.prompt_tokens.saturating_sub(standing.uncached),
            Place::Loose | Place::Unbound(_) | Place::Sent(_) => 0,
        }
    }
}

impl Core {
    /// A core that knows nothing yet. Equal seeds and events give equal actions.
    #[must_use]
    pub fn new(config: Config, seed: u64) -> Self {
        Self {
            decisions: Decisions::new(config.decisions_kept),
            config,
            pools: BTreeMap::new(),
            workers: Workers::default(),
            gpus: BTreeMap::new(),
            requests: HashMap::default(),
            weights: BTreeMap::new(),
            timers: Timers::default(),
            rng: Rng::new(seed),
            now: Tick::ZERO,
            touched: Vec::new(),
            scored: Vec::new(),
        }
    }

    /// Applies one event; appends the actions it causes to `out`. A `now` before an earlier one counts as that one.
    pub fn handle(&mut self, now: Tick, event: Event, out: &mut Vec<Action>) {
        self.advance(now, out);
        match event {
            Event::PoolJoined { pool, limits } => self.pool_joined(pool, limits, out),
            Event::PoolLeft { pool } => self.pool_left(pool, out),
            Event::WorkerJoined { worker, pool, spec } => self.worker_joined(worker, pool, spec, out),
            Event::WorkerDraining { worker, draining } => self.worker_draining(worker, draining, out),
            Event::WorkerLeft { worker } => self.worker_left(worker, out),
            Event::Load { worker, report } => self.load(worker, report),
            Event::SleepSeen { worker, asleep } => self.sleep_seen(worker, asleep),
            Event::SleepDone { worker, worked } => self.sleep_done(worker, worked),
            Event::AdaptersSeen { worker, adapters, stale } => self.adapters_seen(worker, &adapters, &stale, out),
            Event::AdapterChanged { pool, adapter, change } => self.adapter_changed(pool, adapter, change),
            Event::AdapterTurned { worker, adapter, end } => self.adapter_turned(worker, adapter, end, out),
            Event::LoadLost { worker } => self.load_lost(worker, out),
            Event::Probed { worker, healthy } => self.probed(worker, healthy, out),
            Event::Gpu { gpu, report } => self.gpu(gpu, &report, out),
            Event::Kv { worker, change } => self.kv(worker, &change),
            Event::TenantWeight { tenant, weight } => self.tenant_weight(tenant, weight),
            Event::Arrived(request) => self.arrived(request, out),
            Event::Cancelled { request } => self.cancelled(request),
            Event::FirstToken { request } => self.first_token(request, out),
            Event::Progress { request, output_tokens } => self.progress(request, output_tokens),
            Event::Prefilled { request, kept } => self.prefilled(request, kept, out),
            Event::AttemptFailed { request, failure } => self.attempt_failed(request, failure, out),
            Event::Ended { request, end } => self.ended(request, end, out),
        }
        self.settle(out);
        // a request that is to wait again may have used up its time
        self.advance(now, out);
        debug_assert_eq!(self.check_sampled(), Ok(()));
    }

    /// Lets time pass; to be called at [`Core::next_deadline`] when no event came before.
    pub fn tick(&mut self, now: Tick, out: &mut Vec<Action>) {
        self.advance(now, out);
        debug_assert_eq!(self.check_sampled(), Ok(()));
    }

    /// Earliest time at which something happens without an event.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Tick> {
        self.timers.first()
    }

    /// Something changed that may let the worker take more.
    fn touch(&mut self, slot: Slot) {
        if let Some(worker) = self.workers.get_mut(slot) {
            worker.may_take = true;
        }
        self.filled(slot);
    }

    /// The worker was sent something: it takes no more than before.
    fn filled(&mut self, slot: Slot) {
        if let Some(worker) = self.workers.get_mut(slot)
            && !std::mem::replace(&mut worker.touched, true)
        {
            self.touched.push(slot);
        }
    }
}

#[cfg(test)]
mod tests;
