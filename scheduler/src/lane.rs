//! What waits for one worker: class, then tenant, then an order by size and age.
//!
//! The order inside a tenant is first come, first served, in which long prompts give way to short ones for a bounded
//! time: the key is `expiry + patience * service / (service + half)`, where `service` is the time to compute what is not
//! cached and `patience` grows with the time that the pool takes to drain. Taking the expiry for the arrival lets a
//! request with an early deadline count as having waited longer. Shortest first has the best mean, but `service - a *
//! waited` delays the longest in proportion to their length; with the saturating form, which delays a prompt of ten
//! seconds little more than one of five, the longest waits stay within 5 % of those of first come, first served.
//!
//! Beside the order stand those that wait for more than room: gathered, until a gate opens.
//!
//! Invariants: a request stands in it once; the sums are those of what stands in it.
//! Not here: whether the worker has room, and who may be in it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use smallvec::SmallVec;

use crate::fairness::Fairness;
use crate::shares::Shares;
use crate::{AdapterId, Class, RequestId, TenantId, Tick};

/// What a request waits for beside the order of a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Gate {
    /// The worker is to be given this adapter.
    Adapter(AdapterId),
    /// This request, which the worker has, is to be prefilled: they have a long prefix in common.
    Prefill(RequestId),
}

/// Where a request stands in a lane; needed to find it again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) class: Class,
    pub(crate) tenant: TenantId,
    /// Prompt tokens to compute here.
    pub(crate) uncached: u32,
    pub(crate) sequences: u32,
    /// That the request is for.
    pub(crate) adapter: Option<AdapterId>,
    /// What it waits for, or did: one that was opened stands in the order.
    pub(crate) gate: Option<Gate>,
    key: u64,
}

impl Standing {
    /// `service_seconds`: how long the prompt takes the worker. `patience_seconds`: how long it gives way at most;
    /// half of that for a prompt of `half`.
    pub(crate) fn new(
        (class, tenant, adapter): (Class, TenantId, Option<AdapterId>),
        (uncached, sequences): (u32, u32),
        (service_seconds, patience_seconds): (f64, f64),
        expires: Tick,
        half: Duration,
    ) -> Self {
        let gives_way = patience_seconds * service_seconds / (service_seconds + half.as_secs_f64().max(1e-6));
        Self {
            class,
            tenant,
            uncached,
            sequences,
            adapter,
            gate: None,
            key: expires.0.saturating_add((gives_way * 1e6) as u64),
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Lane {
    classes: [Share; Class::COUNT],
    /// Of these, so many for each adapter.
    adapters: BTreeMap<AdapterId, u32>,
    /// Those that wait for more than room, not among the others.
    gathered: BTreeMap<Gate, BTreeMap<RequestId, Standing>>,
}

#[derive(Debug, Default)]
struct Share {
    tenants: BTreeMap<TenantId, Queue>,
    requests: u32,
    work: Work,
}

/// The requests of one tenant.
#[derive(Debug, Default)]
struct Queue {
    order: BTreeSet<(u64, RequestId)>,
    work: Work,
}

/// What stands in a lane, or a part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Work {
    /// Prompt tokens to compute.
    pub(crate) tokens: u64,
    pub(crate) sequences: u64,
}

/// A tenant in whose turn not all others are before it, and the tokens of one request.
pub(crate) type InTurn = (TenantId, u64);

impl Work {
    fn of(at: Standing) -> Self {
        Self { tokens: u64::from(at.uncached), sequences: u64::from(at.sequences) }
    }

    fn add(&mut self, more: Self) {
        self.tokens += more.tokens;
        self.sequences += more.sequences;
    }

    fn take(&mut self, less: Self) {
        self.tokens -= less.tokens;
        self.sequences -= less.sequences;
    }

    fn times(self, count: usize) -> Self {
        let count = count as u64;
        Self { tokens: self.tokens.saturating_mul(count), sequences: self.sequences.saturating_mul(count) }
    }

    fn at_most(self, most: Self) -> Self {
        Self { tokens: self.tokens.min(most.tokens), sequences: self.sequences.min(most.sequences) }
    }
}

impl Lane {
    pub(crate) fn insert(&mut self, id: RequestId, at: Standing) {
        let Some(share) = self.classes.get_mut(at.class as usize) else { return };
        let queue = share.tenants.entry(at.tenant).or_default();
        if queue.order.insert((at.key, id)) {
            share.requests += 1;
            queue.work.add(Work::of(at));
            share.work.add(Work::of(at));
            if let Some(adapter) = at.adapter {
                *self.adapters.entry(adapter).or_default() += 1;
            }
        }
    }

    /// Puts one beside the others until its gate opens; one that has none among them.
    pub(crate) fn gather(&mut self, id: RequestId, at: Standing) {
        match at.gate {
            Some(gate) => drop(self.gathered.entry(gate).or_default().insert(id, at)),
            None => self.insert(id, at),
        }
    }

    /// Whoever waited for this stands among the others.
    pub(crate) fn open(&mut self, gate: Gate) {
        for (id, at) in self.gathered.remove(&gate).unwrap_or_default() {
            self.insert(id, at);
        }
    }

    /// What is waited for: each with whoever came first for it, the longest waiting first.
    pub(crate) fn gates(&self) -> SmallVec<[(RequestId, Gate); 4]> {
        let first =
            |(gate, requests): (&Gate, &BTreeMap<RequestId, Standing>)| Some((*requests.first_key_value()?.0, *gate));
        let mut gates: SmallVec<[_; 4]> = self.gathered.iter().filter_map(first).collect();
        gates.sort_unstable();
        gates
    }

    /// The same of adapters alone.
    pub(crate) fn wanted(&self) -> SmallVec<[(RequestId, AdapterId); 4]> {
        let adapter = |(first, gate)| match gate {
            Gate::Adapter(adapter) => Some((first, adapter)),
            Gate::Prefill(_) => None,
        };
        self.gates().into_iter().filter_map(adapter).collect()
    }

    /// Whoever waits for this.
    pub(crate) fn gathered(&self, gate: Gate) -> impl Iterator<Item = RequestId> {
        self.gathered.get(&gate).into_iter().flat_map(|requests| requests.keys().copied())
    }

    /// How many for the adapter could be sent if there were room.
    pub(crate) fn asks_for(&self, adapter: AdapterId) -> u32 {
        self.adapters.get(&adapter).copied().unwrap_or_default()
    }

    pub(crate) fn remove(&mut self, id: RequestId, at: Standing) {
        if let Some(gate) = at.gate
            && let Some(requests) = self.gathered.get_mut(&gate)
            && requests.remove(&id).is_some()
        {
            if requests.is_empty() {
                self.gathered.remove(&gate);
            }
            return;
        }
        let Some(share) = self.classes.get_mut(at.class as usize) else { return };
        let Some(queue) = share.tenants.get_mut(&at.tenant) else { return };
        if queue.order.remove(&(at.key, id)) {
            queue.work.take(Work::of(at));
            if queue.order.is_empty() {
                share.tenants.remove(&at.tenant);
            }
            share.requests -= 1;
            share.work.take(Work::of(at));
            if let Some(adapter) = at.adapter
                && let Some(count) = self.adapters.get_mut(&adapter)
            {
                *count -= 1;
                if *count == 0 {
                    self.adapters.remove(&adapter);
                }
            }
        }
    }

    /// Who goes next.
    pub(crate) fn head(&self, shares: &Shares, fairness: &Fairness) -> Option<RequestId> {
        let of = |class: Class| self.classes.get(class as usize).filter(|share| share.requests > 0);
        let share = of(shares.next(|class| of(class).is_some())?)?;
        let queue = match share.tenants.first_key_value() {
            Some((_, queue)) if share.tenants.len() == 1 => queue,
            // who comes back from idling has the counter of those that wait: not behind whoever has most waiting
            _ => share.tenants.iter().min_by_key(|(tenant, queue)| (fairness.counter(**tenant), queue.work.tokens))?.1,
        };
        queue.order.first().map(|(_, id)| *id)
    }

    /// Everyone, in an order that depends on nothing but who they are.
    pub(crate) fn ids(&self) -> impl Iterator<Item = RequestId> {
        let order = self.classes.iter().flat_map(|share| share.tenants.values()).flat_map(|queue| &queue.order);
        order.map(|(_, id)| *id).chain(self.gathered.values().flat_map(|requests| requests.keys().copied()))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.is_clear() && self.gathered.is_empty()
    }

    /// Whether nobody waits for nothing but room.
    pub(crate) fn is_clear(&self) -> bool {
        self.classes.iter().all(|share| share.requests == 0)
    }

    pub(crate) fn requests(&self) -> u32 {
        let gathered: usize = self.gathered.values().map(BTreeMap::len).sum();
        self.classes.iter().map(|share| share.requests).sum::<u32>() + u32::try_from(gathered).unwrap_or(u32::MAX)
    }

    /// All that stands in it.
    pub(crate) fn work(&self) -> Work {
        let mut all = Work::default();
        self.classes.iter().for_each(|share| all.add(share.work));
        self.gathered.values().flat_map(BTreeMap::values).for_each(|at| all.add(Work::of(*at)));
        all
    }

    /// What would go before a newcomer: the classes above its own, and of its own class all; or, for one in whose
    /// tenant's turn the others are not all before it, as much of each tenant as its own has there and one request of
    /// so many tokens more.
    pub(crate) fn before(&self, class: Class, in_turn: Option<InTurn>) -> Work {
        let mut before = Work::default();
        self.classes.iter().take(class as usize).for_each(|share| before.add(share.work));
        if let Some(share) = self.classes.get(class as usize) {
            before.add(in_turn.map_or(share.work, |(tenant, tokens)| {
                let mut each = share.tenants.get(&tenant).map(|queue| queue.work).unwrap_or_default();
                each.add(Work { tokens, sequences: 1 });
                each.times(share.tenants.len()).at_most(share.work)
            }));
        }
        before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(class: Class, tenant: u32, uncached: u32, expires: u64) -> Standing {
        Standing::new(
            (class, TenantId(tenant), None),
            (uncached, 1),
            (f64::from(uncached) / 1000.0, 60.0),
            Tick(expires),
            Duration::from_secs(5),
        )
    }

    fn order(requests: &[(u64, Standing)], fairness: &Fairness) -> Vec<u64> {
        let mut lane = Lane::default();
        for (id, at) in requests {
            lane.insert(RequestId(*id), *at);
        }
        let mut order = Vec::new();
        while let Some(id) = lane.head(&Shares::default(), fairness) {
            let (_, at) = requests.iter().find(|(other, _)| *other == id.0).unwrap();
            lane.remove(id, *at);
            order.push(id.0);
        }
        assert_eq!(lane.work(), Work::default());
        order
    }

    #[test]
    fn class_then_tenant_then_size_and_age() {
        let mut fairness = Fairness::default();
        fairness.sent(TenantId(1), 1.0, 500);
        fairness.enter(TenantId(2), 1.0);
        fairness.enter(TenantId(1), 1.0);
        let requests = [
            (1, standing(Class::Batch, 2, 1, 0)),
            (2, standing(Class::Default, 1, 10, 0)),
            (3, standing(Class::Default, 2, 5000, 0)),
            (4, standing(Class::Interactive, 1, 5000, 0)),
            (5, standing(Class::Default, 1, 5, 0)),
        ];
        assert_eq!(order(&requests, &fairness), [4, 3, 5, 2, 1]);
    }

    #[test]
    fn a_long_prompt_gives_way_for_a_bounded_time() {
        let fairness = Fairness::default();
        // a prompt of 5 s gives way for half of the patience of 60 s, one of 1000 s for hardly more than that
        for (tokens, later, expect) in
            [(5000, 29, [2, 1]), (5000, 31, [1, 2]), (1_000_000, 59, [2, 1]), (1_000_000, 61, [1, 2])]
        {
            let requests =
                [(1, standing(Class::Default, 1, tokens, 0)), (2, standing(Class::Default, 1, 0, later * 1_000_000))];
            assert_eq!(order(&requests, &fairness), expect, "{tokens} tokens, {later} s later");
        }
    }

    #[test]
    fn a_newcomer_stands_behind_its_class_and_those_above() {
        let mut lane = Lane::default();
        lane.insert(RequestId(1), standing(Class::Interactive, 1, 100, 0));
        lane.insert(RequestId(2), standing(Class::Batch, 1, 1000, 0));
        lane.insert(RequestId(3), standing(Class::Batch, 1, 500, 0));
        lane.insert(RequestId(4), standing(Class::Batch, 2, 200, 0));
        let pair = |work: Work| (work.tokens, work.sequences);
        let before = |class, tenant| pair(lane.before(class, Some((TenantId(tenant), 50))));
        assert_eq!(Class::ALL.map(|class| pair(lane.before(class, None))), [(100, 1), (100, 1), (1800, 4)]);
        assert_eq!(before(Class::Batch, 1), (1800, 4));
        assert_eq!(before(Class::Batch, 2), (100 + 500, 1 + 3), "of each tenant as much as its own has there");
        assert_eq!(before(Class::Batch, 3), (100 + 100, 1 + 2), "who has nothing there goes soon");
    }

    #[test]
    fn removing_who_is_not_there_changes_nothing() {
        let mut lane = Lane::default();
        lane.insert(RequestId(1), standing(Class::Default, 1, 100, 0));
        lane.remove(RequestId(2), standing(Class::Default, 1, 100, 0));
        lane.remove(RequestId(1), standing(Class::Default, 1, 100, 9_000_000));
        assert_eq!((lane.requests(), lane.work().tokens), (1, 100));
    }
}
