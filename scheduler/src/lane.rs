//! What waits for one worker: class, then tenant, then an order by size and age.
//!
//! The order inside a tenant is first come, first served, in which long prompts give way to short ones for a bounded
//! time: the key is `expiry + patience * service / (service + half)`, where `service` is the time to compute what is not
//! cached and `patience` grows with the time that the pool takes to drain. Taking the expiry for the arrival lets a
//! request with an early deadline count as having waited longer. Shortest first has the best mean, but `service - a *
//! waited` delays the longest in proportion to their length; with the saturating form, which delays a prompt of ten
//! seconds little more than one of five, the longest waits stay within 5 % of those of first come, first served.
//!
//! Invariants: a request stands in it once; the sums are those of what stands in it.
//! Not here: whether the worker has room, and who may be in it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::fairness::Fairness;
use crate::shares::Shares;
use crate::{Class, RequestId, TenantId, Tick};

/// Where a request stands in a lane; needed to find it again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) class: Class,
    pub(crate) tenant: TenantId,
    /// Prompt tokens to compute here.
    pub(crate) uncached: u32,
    pub(crate) sequences: u32,
    key: u64,
}

impl Standing {
    /// `service_seconds`: how long the prompt takes the worker. `patience_seconds`: how long it gives way at most;
    /// half of that for a prompt of `half`.
    pub(crate) fn new(
        (class, tenant): (Class, TenantId),
        (uncached, sequences): (u32, u32),
        (service_seconds, patience_seconds): (f64, f64),
        expires: Tick,
        half: Duration,
    ) -> Self {
        let gives_way = patience_seconds * service_seconds / (service_seconds + half.as_secs_f64().max(1e-6));
        Self { class, tenant, uncached, sequences, key: expires.0.saturating_add((gives_way * 1e6) as u64) }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Lane {
    classes: [Share; Class::COUNT],
}

#[derive(Debug, Default)]
struct Share {
    tenants: BTreeMap<TenantId, BTreeSet<(u64, RequestId)>>,
    requests: u32,
    tokens: u64,
    sequences: u64,
}

impl Lane {
    pub(crate) fn insert(&mut self, id: RequestId, at: Standing) {
        let Some(share) = self.classes.get_mut(at.class as usize) else { return };
        if share.tenants.entry(at.tenant).or_default().insert((at.key, id)) {
            share.requests += 1;
            share.tokens += u64::from(at.uncached);
            share.sequences += u64::from(at.sequences);
        }
    }

    pub(crate) fn remove(&mut self, id: RequestId, at: Standing) {
        let Some(share) = self.classes.get_mut(at.class as usize) else { return };
        let Some(queue) = share.tenants.get_mut(&at.tenant) else { return };
        if queue.remove(&(at.key, id)) {
            if queue.is_empty() {
                share.tenants.remove(&at.tenant);
            }
            share.requests -= 1;
            share.tokens -= u64::from(at.uncached);
            share.sequences -= u64::from(at.sequences);
        }
    }

    /// Who goes next.
    pub(crate) fn head(&self, shares: &Shares, fairness: &Fairness) -> Option<RequestId> {
        let of = |class: Class| self.classes.get(class as usize).filter(|share| share.requests > 0);
        let share = of(shares.next(|class| of(class).is_some())?)?;
        let queue = match share.tenants.first_key_value() {
            Some((_, queue)) if share.tenants.len() == 1 => queue,
            _ => share.tenants.iter().min_by_key(|(tenant, _)| fairness.counter(**tenant))?.1,
        };
        queue.first().map(|(_, id)| *id)
    }

    /// Everyone, in an order that depends on nothing but who they are.
    pub(crate) fn ids(&self) -> impl Iterator<Item = RequestId> {
        self.classes.iter().flat_map(|share| share.tenants.values()).flatten().map(|(_, id)| *id)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.requests() == 0
    }

    pub(crate) fn requests(&self) -> u32 {
        self.classes.iter().map(|share| share.requests).sum()
    }

    /// Prompt tokens that would be computed before those of a newcomer of `class`.
    pub(crate) fn tokens_before(&self, class: Class) -> u64 {
        self.before(class).map(|share| share.tokens).sum()
    }

    /// Sequences that would be started before those of a newcomer of `class`.
    pub(crate) fn sequences_before(&self, class: Class) -> u64 {
        self.before(class).map(|share| share.sequences).sum()
    }

    fn before(&self, class: Class) -> impl Iterator<Item = &Share> {
        self.classes.iter().take(class as usize + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(class: Class, tenant: u32, uncached: u32, expires: u64) -> Standing {
        Standing::new(
            (class, TenantId(tenant)),
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
        assert_eq!((lane.tokens_before(Class::Batch), lane.sequences_before(Class::Batch)), (0, 0));
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
        let before = Class::ALL.map(|class| (lane.tokens_before(class), lane.sequences_before(class)));
        assert_eq!(before, [(100, 1), (100, 1), (1100, 2)]);
    }

    #[test]
    fn removing_who_is_not_there_changes_nothing() {
        let mut lane = Lane::default();
        lane.insert(RequestId(1), standing(Class::Default, 1, 100, 0));
        lane.remove(RequestId(2), standing(Class::Default, 1, 100, 0));
        lane.remove(RequestId(1), standing(Class::Default, 1, 100, 9_000_000));
        assert_eq!((lane.requests(), lane.tokens_before(Class::Default)), (1, 100));
    }
}
