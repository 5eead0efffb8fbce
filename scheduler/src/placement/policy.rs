//! The policies that others use, for comparison on the same traffic: they look at no cache and no tokens.

use super::Scene;
use crate::rng::Rng;
use crate::worker::Slot;
use crate::{Leg, Policy, Request, WorkerId};

/// Who gets the request under a policy other than ours; `turn` counts the requests placed so far.
pub(super) fn pick(
    scene: &Scene<'_>,
    asked: (&Request, Leg),
    failed_on: &[WorkerId],
    turn: u64,
    rng: &mut Rng,
) -> Option<Slot> {
    let may = scene.pool.workers.iter().copied().filter(|slot| scene.may_take(asked, failed_on, *slot));
    let sent = |slot: &Slot| scene.workers.get(*slot).map_or(0, |worker| worker.sent.len());
    match scene.pool.limits.policy {
        Policy::Forebay => None,
        Policy::RoundRobin => {
            let count = may.clone().count() as u64;
            may.clone().nth(usize::try_from(turn.checked_rem(count)?).ok()?)
        }
        Policy::LeastRequests => {
            let least = may.clone().map(|slot| sent(&slot)).min()?;
            let ties = may.filter(|slot| sent(slot) == least);
            ties.clone().nth(rng.below(ties.count()))
        }
    }
}
