//! What can go wrong between the gateway and a worker, told apart by what may be done about it.

use std::{io, time::Duration};

use forebay_proto::error::ApiError;
use forebay_scheduler::Failure;
use http::StatusCode;

/// The wait that ran out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Name lookup, TCP and TLS handshake.
    Connect,
    /// From the request being handed to the connection until the first byte of the answer's body.
    FirstByte,
    /// Between two pieces of the answer's body.
    Idle,
    /// A small exchange that is bounded as a whole: a probe, a poll, a count.
    Whole,
}

/// What the HTTP of a connection had to say.
pub type Source = Box<dyn std::error::Error + Send + Sync>;

/// A failed exchange with a worker. Names no host, path or key, so that it may be shown.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing listens, or nothing is reachable there. No byte was sent.
    #[error("cannot connect to the worker")]
    Connect {
        #[source]
        source: io::Error,
    },
    /// The worker's certificate was not accepted, or it does not speak TLS. No byte of the request was sent.
    #[error("cannot agree on TLS with the worker")]
    Tls {
        #[source]
        source: io::Error,
    },
    /// The connection ended before a complete answer head came. The worker may have begun the request.
    #[error("the worker closed the connection before it answered")]
    Reset {
        /// The connection had served a request before and nothing came, so the worker may have closed it as idle, just then.
        reused: bool,
        #[source]
        source: Source,
    },
    /// Nothing came within the time allowed; the connection was closed.
    #[error("the worker was silent for {after:?} ({phase:?})")]
    Timeout { phase: Phase, after: Duration },
    /// What came is not an HTTP answer, or its head is larger than is accepted.
    #[error("the worker's answer is not HTTP that can be read")]
    Malformed {
        #[source]
        source: Source,
    },
    /// The answer's body ended before it was complete.
    #[error("the worker broke its answer off")]
    Broken {
        #[source]
        source: Source,
    },
    /// The answer is longer than its reader takes.
    #[error("the worker's answer is longer than {bytes_max} bytes")]
    TooLarge { bytes_max: usize },
    /// An answer to one of our own questions, with a status that says no.
    #[error("the worker answered status {}", status.as_u16())]
    Status { status: StatusCode },
    /// The answer to a request says success and holds a refusal.
    #[error("the engine refused with {}: {}", status.as_u16(), error.message)]
    Refused { status: StatusCode, error: Box<ApiError> },
    /// An answer to one of our own questions that is not what the engine's API documents.
    #[error("the worker's answer is not what its API documents")]
    Unreadable,
}

impl Error {
    /// What this means for the worker, in the scheduler's words.
    #[must_use]
    pub fn failure(&self) -> Failure {
        match self {
            Self::Connect { .. } | Self::Tls { .. } | Self::Timeout { phase: Phase::Connect, .. } => Failure::Connect,
            Self::Reset { .. } | Self::Broken { .. } => Failure::Reset,
            Self::Timeout { phase: Phase::FirstByte | Phase::Idle | Phase::Whole, .. } => Failure::Timeout,
            Self::Status { status: StatusCode::TOO_MANY_REQUESTS }
            | Self::Refused { status: StatusCode::TOO_MANY_REQUESTS, .. } => Failure::Overloaded { retry_after: None },
            Self::Status { status } | Self::Refused { status, .. } if status.is_server_error() => Failure::Status5xx,
            Self::Malformed { .. }
            | Self::TooLarge { .. }
            | Self::Status { .. }
            | Self::Refused { .. }
            | Self::Unreadable => Failure::Malformed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_scheduler_is_told() {
        let late = |phase| Error::Timeout { phase, after: Duration::from_secs(1) };
        let says = |status| Error::Status { status };
        for (error, failure) in [
            (Error::Connect { source: io::ErrorKind::ConnectionRefused.into() }, Failure::Connect),
            (Error::Tls { source: io::ErrorKind::InvalidData.into() }, Failure::Connect),
            (late(Phase::Connect), Failure::Connect),
            (late(Phase::FirstByte), Failure::Timeout),
            (late(Phase::Idle), Failure::Timeout),
            (late(Phase::Whole), Failure::Timeout),
            (says(StatusCode::TOO_MANY_REQUESTS), Failure::Overloaded { retry_after: None }),
            (says(StatusCode::SERVICE_UNAVAILABLE), Failure::Status5xx),
            (says(StatusCode::NOT_FOUND), Failure::Malformed),
            (Error::TooLarge { bytes_max: 1 }, Failure::Malformed),
            (Error::Unreadable, Failure::Malformed),
        ] {
            assert_eq!(error.failure(), failure, "{error:?}");
        }
    }
}
