//! Which workers are weighed for a request.
//!
//! A small pool is weighed whole. In a large one: the best holders of the prompt's prefix, some that have its adapter,
//! those that are ready first, and a few at random (so that a wrong belief about a worker is found out). This is the
//! one place that decides it.

use smallvec::SmallVec;

use super::Scene;
use crate::prefix::Matches;
use crate::rng::Rng;
use crate::worker::Slot;
use crate::{Leg, Request, WorkerId};

/// Pools up to this size are weighed whole.
const ALL_MAX: usize = 32;
const HOLDERS: usize = 8;
const READY: usize = 8;
const RANDOM: usize = 4;
/// How many of those ready first are looked at for `READY` that may take the request.
const READY_SEEN: usize = 32;

pub(super) type Slots = SmallVec<[Slot; ALL_MAX]>;

/// Eligible workers that fit the request and on which it has not failed; `kept` is weighed in any case.
pub(super) fn gather(
    scene: &Scene<'_>,
    asked: (&Request, Leg),
    failed_on: &[WorkerId],
    kept: Option<Slot>,
    matches: &Matches,
    rng: &mut Rng,
) -> Slots {
    let pool = scene.pool;
    let may = |slot: &Slot| scene.may_take(asked, failed_on, *slot);
    if pool.workers.len() <= ALL_MAX {
        return pool.workers.iter().copied().filter(|slot| Some(*slot) == kept || may(slot)).collect();
    }
    let mut slots = Slots::new();
    let mut most = matches.iter().map(|(_, held)| *held).max();
    while let Some(held) = most.filter(|_| slots.len() < HOLDERS) {
        let best = matches.iter().filter(|(_, other)| *other == held).map(|(slot, _)| *slot);
        slots.extend(best.filter(may).take(HOLDERS - slots.len()));
        most = matches.iter().map(|(_, other)| *other).filter(|other| *other < held).max();
    }
    if let Some(adapter) = asked.0.adapter {
        let range = (adapter.id, Slot(0))..=(adapter.id, Slot(u32::MAX));
        slots.extend(pool.adapters.range(range).map(|(_, slot)| *slot).filter(may).take(HOLDERS));
    }
    slots.extend(pool.by_ready.iter().take(READY_SEEN).map(|(_, slot)| *slot).filter(may).take(READY));
    // slots are dense, so a random one is usually a worker, of some pool
    let highest = pool.workers.last().map_or(0, |slot| slot.0 as usize + 1);
    for _ in 0..RANDOM {
        let at = Slot(u32::try_from(rng.below(highest)).unwrap_or_default());
        slots.extend(pool.workers.range(at..).next().copied().filter(may));
    }
    slots.extend(kept);
    if slots.is_empty() {
        slots.extend(pool.workers.iter().copied().find(may));
    }
    slots.sort_unstable();
    slots.dedup();
    slots
}
