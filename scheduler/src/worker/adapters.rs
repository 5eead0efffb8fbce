//! Which LoRA adapters a worker has.
//!
//! An adapter is to a worker what a model is to a GPU: it takes one of a few places, comes and goes at our word, and that
//! takes time.
//!
//! Not here: who is given which adapter and whose place it gets (`core::adapters`), and who waits for it (`lane`).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::config::Config;
use crate::{AdapterId, Tick};

/// Failures that are remembered of one worker; where there are more, the first to end is forgotten.
const FAILURES_MAX: usize = 256;

/// A LoRA adapter as a request for it names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Adapter {
    /// Which.
    pub id: AdapterId,
    /// Whether workers can be given it: it is known where its files are. If not, it is only where it was from the start,
    /// and stays there.
    pub loadable: bool,
    /// Bytes that it takes of the memory of each GPU of a worker; 0 where the engine has set them aside.
    pub memory_bytes: u64,
}

/// Where an adapter is at a worker that has it, or is about to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdapterState {
    /// The worker was told to load it.
    Loading,
    /// It can be asked for.
    Loaded,
    /// Gets nothing more and ends what it has: another needs the place.
    Leaving,
    /// The worker was told to unload it.
    Unloading,
}

/// What became of an adapter in the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdapterChange {
    /// It is not there any more. Workers forget it once nobody asks for it.
    Gone,
    /// It is there again, as it was; or it is gone for so long that it is remembered no more, and stays where it is.
    Back,
    /// Its files are others. Nothing more is asked of the old ones, and workers load it anew.
    Moved,
}

/// What became of telling a worker to load an adapter, or to unload it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdapterEnd {
    /// It did.
    Done,
    /// It did not, this time.
    Failed,
    /// It will not: it has no such files, or cannot do it at all.
    Refused,
}

#[derive(Debug)]
struct Here {
    adapter: Adapter,
    state: AdapterState,
    since: Tick,
    /// When something was sent for it, or ended, last.
    used: Tick,
    /// Its files are others now than those that it was loaded from.
    stale: bool,
    /// It is not unloaded before, since that failed; and for how long it is left alone when it fails next.
    unload_after: Tick,
    next: Duration,
}

impl Here {
    fn new(now: Tick, adapter: Adapter, state: AdapterState) -> Self {
        Self { adapter, state, since: now, used: now, stale: false, unload_after: Tick::ZERO, next: Duration::ZERO }
    }

    /// Its state while it is there and the worker is told nothing.
    fn at_rest(&self) -> AdapterState {
        if self.stale { AdapterState::Leaving } else { AdapterState::Loaded }
    }

    /// Whether it is there until the worker is told something else.
    fn stays(&self) -> bool {
        matches!(self.state, AdapterState::Loaded | AdapterState::Leaving)
    }
}

#[derive(Debug)]
struct Failure {
    until: Tick,
    /// How long it is left alone when it fails next.
    next: Duration,
    refused: bool,
}

/// The adapters of one worker.
#[derive(Debug, Default)]
pub(crate) struct Adapters {
    here: BTreeMap<AdapterId, Here>,
    failures: BTreeMap<AdapterId, Failure>,
    /// Requests that were sent for each and have not ended.
    sent: BTreeMap<AdapterId, u32>,
}

impl Adapters {
    /// Whether requests for it may be sent; also those for none.
    pub(crate) fn has(&self, adapter: Option<Adapter>) -> bool {
        adapter.is_none_or(|adapter| self.state(adapter.id) == Some(AdapterState::Loaded))
    }

    pub(crate) fn state(&self, adapter: AdapterId) -> Option<AdapterState> {
        self.here.get(&adapter).map(|here| here.state)
    }

    pub(crate) fn states(&self) -> impl Iterator<Item = (AdapterId, AdapterState)> {
        self.here.iter().map(|(id, here)| (*id, here.state))
    }

    /// Those that are to leave though nobody needs their place: `gone` ones, and such whose files moved.
    pub(crate) fn unwanted(&self, gone: &BTreeSet<AdapterId>) -> impl Iterator<Item = AdapterId> {
        let here = self.here.iter().filter(|(_, here)| here.adapter.loadable && here.stays());
        here.filter(|(id, here)| here.stale || gone.contains(id)).map(|(id, _)| *id)
    }

    /// When the next of those that failed to leave may be tried again.
    pub(crate) fn unload_retry(&self, now: Tick, gone: &BTreeSet<AdapterId>) -> Option<Tick> {
        let retries = self.unwanted(gone).map(|adapter| self.unload_after(adapter));
        retries.filter(|at| *at > now).min()
    }

    /// Until when an unload that failed is not tried again.
    pub(crate) fn unload_after(&self, adapter: AdapterId) -> Tick {
        self.here.get(&adapter).map_or(Tick::ZERO, |here| here.unload_after)
    }

    pub(crate) fn is_stale(&self, adapter: AdapterId) -> bool {
        self.here.get(&adapter).is_some_and(|here| here.stale)
    }

    /// Its files are others now, so that what is known of the old ones is void.
    pub(crate) fn moved(&mut self, now: Tick, adapter: AdapterId) {
        self.failures.remove(&adapter);
        if let Some(here) = self.here.get_mut(&adapter).filter(|here| here.adapter.loadable) {
            here.stale = true;
            if here.state == AdapterState::Loaded {
                self.turn(now, adapter, AdapterState::Leaving);
            }
        }
    }

    /// Since when each is in its state, of those that were told something or are to be.
    pub(crate) fn moving(&self) -> impl Iterator<Item = (AdapterId, AdapterState, Tick)> {
        let moving = self.here.iter().filter(|(_, here)| here.state != AdapterState::Loaded);
        moving.map(|(id, here)| (*id, here.state, here.since))
    }

    /// Whether it is there, or may come to be where a worker is given `places` adapters at most.
    pub(crate) fn may_have(&self, now: Tick, adapter: Adapter, places: u32) -> bool {
        let refused = || self.failures.get(&adapter.id).is_some_and(|failure| failure.refused && failure.until > now);
        self.here.contains_key(&adapter.id) || (adapter.loadable && places > 0 && !refused())
    }

    /// Places that are taken; what was there from the start and stays takes none.
    pub(crate) fn places_taken(&self) -> u32 {
        u32::try_from(self.here.values().filter(|here| here.adapter.loadable).count()).unwrap_or(u32::MAX)
    }

    /// Bytes on each GPU that those take which are there, or leave, or come, as far as they are ours to unload.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.here.values().filter(|here| here.adapter.loadable).map(|here| here.adapter.memory_bytes).sum()
    }

    /// Of these, what those take that come.
    pub(crate) fn coming_bytes(&self) -> u64 {
        let coming = self.here.values().filter(|here| here.state == AdapterState::Loading);
        coming.map(|here| here.adapter.memory_bytes).sum()
    }

    /// What one that is here takes.
    pub(crate) fn bytes_of(&self, adapter: AdapterId) -> u64 {
        self.here.get(&adapter).map_or(0, |here| here.adapter.memory_bytes)
    }

    /// Whether it is loaded, or will be without more to do.
    pub(crate) fn is_coming(&self, adapter: AdapterId) -> bool {
        matches!(self.state(adapter), Some(AdapterState::Loading | AdapterState::Loaded))
    }

    /// Until when a load that failed is not tried again.
    pub(crate) fn retry(&self, adapter: AdapterId) -> Tick {
        self.failures.get(&adapter).map_or(Tick::ZERO, |failure| failure.until)
    }

    /// Seconds until it is there, once it has a place, where a load takes so long. One that is overdue may never end: it is
    /// taken to last as long again as it has lasted, so that others are asked long before it is given up.
    pub(crate) fn wait_seconds(&self, now: Tick, adapter: AdapterId, load: f64) -> f64 {
        match self.here.get(&adapter) {
            Some(Here { state: AdapterState::Loaded, .. }) => 0.0,
            Some(Here { state: AdapterState::Loading, since, .. }) => match now.seconds_since(*since) {
                lasted if lasted < load => load - lasted,
                lasted => lasted,
            },
            Some(here) => load + here.unload_after.seconds_since(now),
            None => load + self.retry(adapter).seconds_since(now),
        }
    }

    /// The one that was used longest ago of those that `rest`, if one may be unloaded now; `for_memory`: of those that take
    /// any.
    pub(crate) fn spare(&self, now: Tick, for_memory: bool, rest: impl Fn(AdapterId) -> bool) -> Option<AdapterId> {
        let may = |here: &Here| self.may_leave(now, here, for_memory);
        let spare = self.here.iter().filter(|(id, here)| may(here) && !self.is_used(**id));
        spare.filter(|(id, _)| rest(**id)).min_by_key(|(id, here)| (here.used, **id)).map(|(id, _)| *id)
    }

    /// The one that had its place for longest, of those that had it for a turn; `for_memory` as above.
    pub(crate) fn had_its_turn(&self, now: Tick, for_memory: bool, config: &Config) -> Option<AdapterId> {
        let over = |here: &Here| now.since(here.since) >= config.adapter_turn;
        let had = self.here.iter().filter(|(_, here)| self.may_leave(now, here, for_memory) && over(here));
        had.min_by_key(|(id, here)| (here.since, **id)).map(|(id, _)| *id)
    }

    fn may_leave(&self, now: Tick, here: &Here, for_memory: bool) -> bool {
        let helps = here.adapter.loadable && (!for_memory || here.adapter.memory_bytes > 0);
        helps && here.state == AdapterState::Loaded && here.unload_after <= now
    }

    /// Whether something that was sent for it has not ended.
    pub(crate) fn is_used(&self, adapter: AdapterId) -> bool {
        self.sent.contains_key(&adapter)
    }

    pub(crate) fn sent(&mut self, now: Tick, adapter: Option<Adapter>) {
        let Some(adapter) = adapter else { return };
        *self.sent.entry(adapter.id).or_default() += 1;
        self.used(now, adapter.id);
    }

    pub(crate) fn ended(&mut self, now: Tick, adapter: Option<Adapter>) {
        let Some(adapter) = adapter else { return };
        if let Some(count) = self.sent.get_mut(&adapter.id) {
            *count -= 1;
            if *count == 0 {
                self.sent.remove(&adapter.id);
            }
        }
        self.used(now, adapter.id);
    }

    fn used(&mut self, now: Tick, adapter: AdapterId) {
        if let Some(here) = self.here.get_mut(&adapter) {
            here.used = now;
        }
    }

    /// It was told to load it.
    pub(crate) fn load(&mut self, now: Tick, adapter: Adapter) {
        self.here.insert(adapter.id, Here::new(now, adapter, AdapterState::Loading));
    }

    pub(crate) fn turn(&mut self, now: Tick, adapter: AdapterId, to: AdapterState) {
        if let Some(here) = self.here.get_mut(&adapter) {
            (here.state, here.since) = (to, now);
        }
    }

    /// It did what it was told, or did not. If it was told anything: the state that the adapter is in now, and the seconds
    /// that a load took.
    pub(crate) fn turned(
        &mut self,
        now: Tick,
        adapter: AdapterId,
        end: AdapterEnd,
        config: &Config,
    ) -> Option<(Option<AdapterState>, Option<f64>)> {
        let here = self.here.get_mut(&adapter)?;
        let mut took = None;
        match (here.state, end) {
            (AdapterState::Loaded | AdapterState::Leaving, _) => return None,
            (AdapterState::Loading, AdapterEnd::Done) => {
                took = Some(now.seconds_since(here.since));
                self.failures.remove(&adapter);
                let there = here.at_rest();
                self.turn(now, adapter, there);
            }
            (AdapterState::Loading, AdapterEnd::Failed | AdapterEnd::Refused) => {
                self.here.remove(&adapter);
                self.failed(now, adapter, end == AdapterEnd::Refused, config);
            }
            (AdapterState::Unloading, AdapterEnd::Done) => drop(self.here.remove(&adapter)),
            (AdapterState::Unloading, AdapterEnd::Failed | AdapterEnd::Refused) => {
                let refused = end == AdapterEnd::Refused;
                here.next = (here.next * 2).max(config.wake_retry).min(config.wake_retry_max);
                here.unload_after = now.after(if refused { config.adapter_refused } else { here.next });
                here.stale &= !refused; // better the old files than none
                let there = here.at_rest();
                self.turn(now, adapter, there);
            }
        }
        Some((self.state(adapter), took))
    }

    /// It could not be loaded.
    pub(crate) fn failed(&mut self, now: Tick, adapter: AdapterId, refused: bool, config: &Config) {
        if self.failures.len() >= FAILURES_MAX && !self.failures.contains_key(&adapter) {
            let first = self.failures.iter().min_by_key(|(id, failure)| (failure.until, **id)).map(|(id, _)| *id);
            first.and_then(|id| self.failures.remove(&id));
        }
        let next = self.failures.get(&adapter).map_or(config.wake_retry, |failure| failure.next);
        let lease = if refused { config.adapter_refused } else { next };
        let next = (next * 2).min(config.wake_retry_max);
        self.failures.insert(adapter, Failure { until: now.after(lease), next, refused });
    }

    /// It does not have it, whatever we thought; unless it was told something since.
    pub(crate) fn lost(&mut self, adapter: AdapterId) {
        if self.here.get(&adapter).is_some_and(Here::stays) {
            self.here.remove(&adapter);
        }
    }

    /// Its engine says what it has, unasked. What is on its way is not looked at: the list may be from before. Those that
    /// came, and those that are gone.
    pub(crate) fn seen(&mut self, now: Tick, adapters: &[Adapter]) -> (Vec<AdapterId>, Vec<AdapterId>) {
        let still = |id: &AdapterId| adapters.iter().any(|adapter| adapter.id == *id);
        let gone: Vec<AdapterId> =
            self.here.iter().filter(|(id, here)| here.stays() && !still(id)).map(|(id, _)| *id).collect();
        let came: Vec<Adapter> =
            adapters.iter().filter(|adapter| !self.here.contains_key(&adapter.id)).copied().collect();
        for id in &gone {
            self.lost(*id);
        }
        for adapter in &came {
            self.failures.remove(&adapter.id);
            self.here.insert(adapter.id, Here::new(now, *adapter, AdapterState::Loaded));
        }
        (came.iter().map(|adapter| adapter.id).collect(), gone)
    }
}
