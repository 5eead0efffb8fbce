//! Everything the core can ask of the shell around it.

use std::time::Duration;

use crate::{AdapterId, Failure, HealthState, RequestId, WorkerId};

/// One thing to do, in the order given.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Send the request to the worker now.
    Send {
        /// Which.
        request: RequestId,
        /// Where.
        worker: WorkerId,
        /// Prompt tokens that the worker is believed to hold in its cache.
        matched_tokens: u32,
        /// Time from now to its first token, as predicted.
        predicted_ttft: Duration,
        /// Time from its arrival to its first token, as was predicted when it arrived.
        predicted_at_arrival: Duration,
    },
    /// Answer the client that it will not be served; the core has forgotten it.
    Refuse {
        /// Which.
        request: RequestId,
        /// Why.
        reason: Refusal,
        /// When to come back, where coming back may help.
        retry_after: Option<Duration>,
    },
    /// Ask the worker whether it can serve, and answer with [`crate::Event::Probed`].
    Probe {
        /// Whom.
        worker: WorkerId,
    },
    /// Bring its model into the memory of its GPUs, and answer with [`crate::Event::SleepDone`].
    Wake {
        /// Whose.
        worker: WorkerId,
    },
    /// Take its model out of there; it has nothing to do. Answer with [`crate::Event::SleepDone`].
    Sleep {
        /// Whose.
        worker: WorkerId,
    },
    /// Give it this adapter, and answer with [`crate::Event::AdapterTurned`].
    LoadAdapter {
        /// Whom.
        worker: WorkerId,
        /// Which.
        adapter: AdapterId,
    },
    /// Take this adapter from it; nothing is asked of it there. Answer with [`crate::Event::AdapterTurned`].
    UnloadAdapter {
        /// Whose.
        worker: WorkerId,
        /// Which.
        adapter: AdapterId,
    },
    /// Nothing to do: its health changed, for logs and gauges.
    Health {
        /// Whose.
        worker: WorkerId,
        /// What it was.
        from: HealthState,
        /// What it is now.
        to: HealthState,
    },
}

/// Why a request gets no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The pool's queue is at one of its bounds, and nothing of less priority waits in it.
    #[error("the queue is full")]
    QueueFull,
    /// No worker can give its first token before the client's deadline, by measured rates and what stands before it.
    #[error("no worker can answer before the deadline")]
    DeadlineInfeasible,
    /// The same, even if nothing stood before it.
    #[error("no worker is fast enough for the deadline")]
    DeadlineTooShort,
    /// It waited until its client's deadline, or came after it.
    #[error("the deadline passed")]
    DeadlinePassed,
    /// It waited for the queue's time-out.
    #[error("waited too long for a worker")]
    TimedOut,
    /// No worker of the pool is there to take it.
    #[error("no worker is available")]
    NoWorker,
    /// No worker has the adapter that it is for, or can be given it.
    #[error("no worker can have the adapter")]
    AdapterUnavailable,
    /// It was sent as often as allowed, or to every worker there is.
    #[error("every attempt failed")]
    AttemptsExhausted {
        /// How the last attempt failed.
        #[source]
        last: Failure,
    },
    /// Every worker that could take it asked to be left alone for longer than it may wait.
    #[error("every worker asked to be left alone")]
    Busy {
        /// For so long.
        wait: Duration,
    },
    /// There is no such pool.
    #[error("no such pool")]
    PoolUnknown,
    /// Its prompt fits in no worker's KV cache.
    #[error("the prompt is larger than any worker's KV cache")]
    TooLarge,
}
