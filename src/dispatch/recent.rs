//! The latest requests under the names that people know them by, so that a decision can be asked for afterwards.
//!
//! Invariants: at most [`KEPT`] requests; a request notes its own course in what it holds, so that nothing is searched
//! on its way. What was decided stands in the core's own record, which is bounded too.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use forebay_scheduler::{Class, PoolId, Refusal, RequestId, WorkerId};
use parking_lot::Mutex;
use smallvec::SmallVec;
use tokio::time::Instant;

use crate::ids::RequestName;

/// Requests that are remembered: as many as the core keeps decisions, about 200 KiB.
pub(super) const KEPT: usize = 1024;

pub(super) type Names = SmallVec<[RequestName; 1]>;

/// One request that came to the core, or too late for it.
pub(super) struct Known {
    /// The client's own first; several where one call answers several requests.
    pub(super) names: Names,
    pub(super) request: RequestId,
    pub(super) pool: PoolId,
    pub(super) class: Class,
    pub(super) prompt_tokens: u32,
    pub(super) arrived: Instant,
    pub(super) course: Mutex<Course>,
}

/// What became of it.
#[derive(Default, Clone)]
pub(super) struct Course {
    /// Where it was sent, one worker an attempt.
    pub(super) sent: SmallVec<[WorkerId; 2]>,
    /// Waited in lanes, over all attempts.
    pub(super) queued: Duration,
    pub(super) refusal: Option<(Refusal, Option<Duration>)>,
}

impl Known {
    pub(super) fn new(names: Names, request: RequestId, (pool, class, prompt_tokens): (PoolId, Class, u32)) -> Self {
        Self { names, request, pool, class, prompt_tokens, arrived: Instant::now(), course: Mutex::default() }
    }

    pub(super) fn sent(&self, worker: WorkerId, waited: Duration) {
        let mut course = self.course.lock();
        course.sent.push(worker);
        course.queued += waited;
    }

    pub(super) fn refused(&self, reason: Refusal, retry_after: Option<Duration>) {
        self.course.lock().refusal = Some((reason, retry_after));
    }
}

#[derive(Default)]
pub(super) struct Recent(Mutex<VecDeque<Arc<Known>>>);

impl Recent {
    pub(super) fn note(&self, known: Arc<Known>) {
        let mut kept = self.0.lock();
        if kept.len() >= KEPT {
            kept.pop_front();
        }
        kept.push_back(known);
    }

    /// What is remembered of a request.
    pub(super) fn find_request(&self, request: RequestId) -> Option<Arc<Known>> {
        self.0.lock().iter().rev().find(|known| known.request == request).map(Arc::clone)
    }

    /// The latest request of this name: clients may use theirs again.
    pub(super) fn find(&self, name: &str) -> Option<Arc<Known>> {
        self.0.lock().iter().rev().find(|known| known.names.iter().any(|known| known.as_str() == name)).map(Arc::clone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(name: &str, number: u64) -> Arc<Known> {
        Arc::new(Known {
            names: [RequestName::from_client(Some(name.as_bytes()))].into(),
            request: RequestId(number),
            pool: PoolId(0),
            class: Class::Default,
            prompt_tokens: 1,
            arrived: Instant::now(),
            course: Mutex::default(),
        })
    }

    #[test]
    fn the_latest_are_kept_and_the_latest_of_a_name_is_found() {
        let recent = Recent::default();
        recent.note(known("same", 1));
        recent.note(known("other", 2));
        recent.note(known("same", 3));
        let found = |name: &str| recent.find(name).map(|known| known.request.0);
        assert_eq!((found("same"), found("other"), found("none")), (Some(3), Some(2), None));
        for number in 0..KEPT as u64 - 1 {
            recent.note(known("more", 10 + number));
        }
        assert_eq!((found("same"), found("other")), (Some(3), None), "the oldest give way");
        recent.note(known("more", 9999));
        assert_eq!((found("same"), recent.0.lock().len()), (None, KEPT));
    }
}
