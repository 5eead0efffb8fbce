//! What happened in a run, in order: enough for anybody to compute its figures again.

use forebay_scheduler::Tick;

/// One thing that happened to one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// When.
    pub at: Tick,
    /// The row's number in the trace.
    pub request: u32,
    /// What.
    pub what: What,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// It reached the gateway.
    Arrived,
    /// It was bound to a worker: on arrival, and again before a send to another than the last one.
    Placed {
        /// Which.
        worker: u32,
    },
    /// It was sent to a worker.
    Sent {
        /// Which.
        worker: u32,
    },
    /// Its first token came.
    FirstToken {
        /// Where from.
        worker: u32,
        /// Prompt tokens found in that engine's cache.
        cached_tokens: u32,
    },
    /// The engine ran out of KV memory and will compute it again.
    Preempted {
        /// Which.
        worker: u32,
    },
    /// It was answered in full.
    Finished {
        /// By whom.
        worker: u32,
        /// Prompt tokens found in that engine's cache.
        cached_tokens: u32,
        /// Tokens generated.
        output_tokens: u32,
    },
    /// The queue was over its bounds, and this was the one to go.
    Shed,
    /// It waited too long for a place.
    TimedOut,
    /// No engine has the memory for it, whatever the policy.
    Refused,
    /// Its engine died after the first token, or no engine was left to try.
    Failed,
}

impl What {
    /// Whether this is a request's last entry.
    #[must_use]
    pub fn is_end(&self) -> bool {
        match self {
            Self::Finished { .. } | Self::Shed | Self::TimedOut | Self::Refused | Self::Failed => true,
            Self::Arrived
            | Self::Placed { .. }
            | Self::Sent { .. }
            | Self::FirstToken { .. }
            | Self::Preempted { .. } => false,
        }
    }
}
