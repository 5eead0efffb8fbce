//! Which requests leave together as one call: micro-batches for engines that gain from them.
//!
//! Requests of one kind, which is the caller's word for those that could be asked as one, gather only while as many
//! calls of that kind are under way as the caller wants at once (one a worker). So a request that finds a free worker
//! leaves at once and alone, and what comes while all are busy leaves together: when a call ends, when the lot is full, or
//! when somebody has waited long enough. The delay is the load's: none without it, and never more than the caller's
//! clock allows.
//!
//! Invariants: everybody who arrives leaves in exactly one lot unless withdrawn; nobody gathers while fewer calls are
//! under way than wanted; a lot keeps the limits unless a single request exceeds them, which goes alone; first come,
//! first out; a kind that nobody uses is forgotten.
//!
//! Not here: time (who gathers watches the clock and says [`BatchFormer::waited`]), what a kind is, and the call itself.

use std::cmp::Ordering;
use std::collections::BTreeMap;

/// What a lot may hold, and how many calls of a kind are wanted at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LotLimits {
    pub tokens: u64,
    /// Inputs of all requests.
    pub items: u32,
    pub requests: usize,
    /// Calls under way before others gather; 0 counts as 1.
    pub at_once: u32,
}

/// One request that may leave with others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member<T> {
    /// The caller's number for it, unlike that of any other that gathers.
    pub id: u64,
    pub tokens: u32,
    pub items: u32,
    pub what: T,
}

/// Those who gather, by kind. Each lot that it gives is a call under way until [`BatchFormer::ended`] is said for it.
#[derive(Debug)]
pub struct BatchFormer<K, T> {
    kinds: BTreeMap<K, Kind<T>>,
}

#[derive(Debug)]
struct Kind<T> {
    under_way: u32,
    gathered: Vec<Member<T>>,
}

impl<K, T> Default for BatchFormer<K, T> {
    fn default() -> Self {
        Self { kinds: BTreeMap::new() }
    }
}

impl<T> Kind<T> {
    fn leave(&mut self) -> Option<Vec<Member<T>>> {
        if self.gathered.is_empty() {
            return None;
        }
        self.under_way += 1;
        Some(std::mem::take(&mut self.gathered))
    }

    /// How the gathered and `member` compare with the most that may leave together.
    fn with(&self, member: &Member<T>, limits: &LotLimits) -> Ordering {
        let all = || self.gathered.iter().chain([member]);
        let tokens = all().map(|member| u64::from(member.tokens)).sum::<u64>().cmp(&limits.tokens);
        let items = all().map(|member| u64::from(member.items)).sum::<u64>().cmp(&u64::from(limits.items));
        tokens.max(items).max(all().count().cmp(&limits.requests))
    }
}

impl<K: Ord + Clone, T> BatchFormer<K, T> {
    /// A request came. Gives the lot that leaves because of it: itself alone, itself with those who waited, or those
    /// who waited, with whom it does not fit.
    pub fn arrived(&mut self, kind: &K, member: Member<T>, limits: &LotLimits) -> Option<Vec<Member<T>>> {
        let entry = self.kinds.entry(kind.clone()).or_insert_with(|| Kind { under_way: 0, gathered: Vec::new() });
        let empty = Kind { under_way: 0, gathered: Vec::new() };
        if empty.with(&member, limits) != Ordering::Less {
            entry.under_way += 1;
            return Some(vec![member]);
        }
        let together = entry.with(&member, limits);
        let pushed = if together == Ordering::Greater { entry.leave() } else { None };
        entry.gathered.push(member);
        if together == Ordering::Equal || (pushed.is_none() && entry.under_way < limits.at_once.max(1)) {
            return entry.leave();
        }
        pushed
    }

    /// This one has waited long enough; gives its lot, if it still gathers.
    pub fn waited(&mut self, kind: &K, id: u64) -> Option<Vec<Member<T>>> {
        let entry = self.kinds.get_mut(kind)?;
        if entry.gathered.iter().any(|member| member.id == id) { entry.leave() } else { None }
    }

    /// This one is withdrawn. Nothing happens if it does not gather any more.
    pub fn withdrawn(&mut self, kind: &K, id: u64) {
        if let Some(entry) = self.kinds.get_mut(kind) {
            entry.gathered.retain(|member| member.id != id);
        }
        self.forget(kind);
    }

    /// A call of this kind is over; gives the lot that leaves in its place.
    pub fn ended(&mut self, kind: &K) -> Option<Vec<Member<T>>> {
        let entry = self.kinds.get_mut(kind)?;
        entry.under_way = entry.under_way.saturating_sub(1);
        let lot = entry.leave();
        self.forget(kind);
        lot
    }

    fn forget(&mut self, kind: &K) {
        if self.kinds.get(kind).is_some_and(|entry| entry.under_way == 0 && entry.gathered.is_empty()) {
            self.kinds.remove(kind);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: LotLimits = LotLimits { tokens: 100, items: 10, requests: 4, at_once: 1 };

    fn member(id: u64, tokens: u32) -> Member<()> {
        Member { id, tokens, items: 1, what: () }
    }

    fn ids(lot: Option<Vec<Member<()>>>) -> Vec<u64> {
        lot.unwrap_or_default().into_iter().map(|member| member.id).collect()
    }

    #[test]
    fn a_lone_request_leaves_at_once_and_those_behind_it_together() {
        let mut former = BatchFormer::default();
        assert_eq!(ids(former.arrived(&"a", member(1, 5), &LIMITS)), [1]);
        assert_eq!(ids(former.arrived(&"a", member(2, 5), &LIMITS)), []);
        assert_eq!(ids(former.arrived(&"b", member(3, 5), &LIMITS)), [3], "another kind waits for none of these");
        assert_eq!(ids(former.arrived(&"a", member(4, 5), &LIMITS)), []);
        assert_eq!(ids(former.ended(&"a")), [2, 4]);
        assert_eq!(ids(former.ended(&"a")), []);
        assert_eq!(ids(former.arrived(&"a", member(5, 5), &LIMITS)), [5]);
    }

    #[test]
    fn as_many_calls_are_under_way_as_wanted() {
        let limits = LotLimits { at_once: 2, ..LIMITS };
        let mut former = BatchFormer::default();
        assert_eq!(ids(former.arrived(&"a", member(1, 5), &limits)), [1]);
        assert_eq!(ids(former.arrived(&"a", member(2, 5), &limits)), [2]);
        assert_eq!(ids(former.arrived(&"a", member(3, 5), &limits)), []);
        assert_eq!(ids(former.ended(&"a")), [3]);
    }

    #[test]
    fn who_waited_long_enough_takes_all_along() {
        let mut former = BatchFormer::default();
        for id in 1..=3 {
            former.arrived(&"a", member(id, 5), &LIMITS);
        }
        former.withdrawn(&"a", 2);
        assert_eq!(ids(former.waited(&"a", 2)), [], "it left");
        assert_eq!(ids(former.waited(&"a", 3)), [3]);
        assert_eq!(ids(former.waited(&"a", 3)), []);
    }

    #[test]
    fn a_lot_that_is_full_leaves() {
        let mut former = BatchFormer::default();
        former.arrived(&"a", member(1, 5), &LIMITS);
        former.arrived(&"a", member(2, 60), &LIMITS);
        assert_eq!(ids(former.arrived(&"a", member(3, 41), &LIMITS)), [2]);
        assert_eq!(
            ids(former.arrived(&"a", member(4, 100), &LIMITS)),
            [4],
            "what fills a lot by itself waits for none"
        );
        assert_eq!(ids(former.arrived(&"a", member(5, 1), &LIMITS)), []);
        assert_eq!(ids(former.arrived(&"a", member(6, 1), &LIMITS)), []);
        assert_eq!(ids(former.arrived(&"a", member(7, 1), &LIMITS)), [3, 5, 6, 7]);
    }

    #[derive(Debug, Clone)]
    enum Move {
        Arrive { kind: u8, tokens: u32, items: u32 },
        Wait(prop::sample::Index),
        Leave(prop::sample::Index),
        End(prop::sample::Index),
    }

    fn moves() -> impl Strategy<Value = Vec<Move>> {
        let index = any::<prop::sample::Index>;
        let one = prop_oneof![
            4 => (0u8..3, 0u32..130, 1u32..13).prop_map(|(kind, tokens, items)| Move::Arrive { kind, tokens, items }),
            1 => index().prop_map(Move::Wait),
            1 => index().prop_map(Move::Leave),
            2 => index().prop_map(Move::End),
        ];
        prop::collection::vec(one, 0..200)
    }

    proptest! {
        #[test]
        fn the_invariants_hold(moves in moves(), at_once in 0u32..4) {
            let limits = LotLimits { at_once, ..LIMITS };
            let mut former = BatchFormer::default();
            let mut gathering: Vec<(u8, u64)> = Vec::new();
            let mut under_way: Vec<u8> = Vec::new();
            for (id, event) in (0u64..).zip(moves) {
                let (kind, lot) = match event {
                    Move::Arrive { kind, tokens, items } => {
                        gathering.push((kind, id));
                        (kind, former.arrived(&kind, Member { id, tokens, items, what: () }, &limits))
                    }
                    Move::Wait(at) if !gathering.is_empty() => {
                        let (kind, id) = *at.get(&gathering);
                        let lot = former.waited(&kind, id);
                        prop_assert!(lot.as_ref().is_some_and(|lot| lot.iter().any(|member| member.id == id)));
                        (kind, lot)
                    }
                    Move::Leave(at) if !gathering.is_empty() => {
                        let (kind, id) = gathering.remove(at.index(gathering.len()));
                        former.withdrawn(&kind, id);
                        (kind, None)
                    }
                    Move::End(at) if !under_way.is_empty() => {
                        let kind = under_way.remove(at.index(under_way.len()));
                        (kind, former.ended(&kind))
                    }
                    _ => continue,
                };
                if let Some(lot) = lot {
                    under_way.push(kind);
                    let tokens: u32 = lot.iter().map(|member| member.tokens).sum();
                    let items: u32 = lot.iter().map(|member| member.items).sum();
                    let within = tokens <= 100 && items <= 10 && lot.len() <= 4;
                    prop_assert!(within || lot.len() == 1, "{lot:?}");
                    for member in lot {
                        let at = gathering.iter().position(|one| *one == (kind, member.id));
                        prop_assert!(at.is_some(), "left twice: {member:?}");
                        gathering.remove(at.unwrap());
                    }
                }
                for (kind, _) in &gathering {
                    let calls = under_way.iter().filter(|one| *one == kind).count();
                    prop_assert!(calls >= limits.at_once.max(1) as usize, "somebody waits for nothing");
                }
            }
            for (kind, id) in gathering {
                former.withdrawn(&kind, id);
            }
            for kind in under_way {
                prop_assert!(former.ended(&kind).is_none());
            }
            prop_assert!(former.kinds.is_empty());
        }
    }
}
