//! Names that identify one request to people: in headers, logs, the ledger.
//!
//! The scheduler's numeric [`forebay_scheduler::RequestId`] is internal and never leaves the process.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

/// Longest request id taken over from a client, in bytes.
const CLIENT_ID_BYTES_MAX: usize = 128;

/// Random per process, so that ids of two gateways or two runs do not meet.
static PROCESS: LazyLock<u64> = LazyLock::new(rand::random);
static COUNTER: AtomicU64 = AtomicU64::new(1);

/// What `x-request-id` says in the answer, and what the ledger and the logs call the request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestName(Arc<str>);

impl RequestName {
    /// The client's own id where it sent a usable one, else a fresh one.
    #[must_use]
    pub fn from_client(header: Option<&[u8]>) -> Self {
        match header.and_then(|value| std::str::from_utf8(value).ok()) {
            Some(id) if is_usable(id) => Self(id.into()),
            _ => Self::fresh(),
        }
    }

    /// A new id, `req_` and 28 hexadecimal digits, unique over processes.
    #[must_use]
    pub fn fresh() -> Self {
        let count = COUNTER.fetch_add(1, Ordering::Relaxed);
        Self(format!("req_{:016x}{count:012x}", *PROCESS).into())
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn is_usable(id: &str) -> bool {
    !id.is_empty()
        && id.len() <= CLIENT_ID_BYTES_MAX
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clients_id_is_kept_only_when_it_is_harmless() {
        assert_eq!(RequestName::from_client(Some(b"req-abc.1:2_x")).as_str(), "req-abc.1:2_x");
        let long = [b'a'; CLIENT_ID_BYTES_MAX + 1];
        for bad in [&b""[..], b"a b", b"a\nb", b"\xff", b"a\"b", &long] {
            assert!(RequestName::from_client(Some(bad)).as_str().starts_with("req_"), "{bad:?}");
        }
        assert!(RequestName::from_client(None).as_str().starts_with("req_"));
    }

    #[test]
    fn fresh_ids_differ() {
        assert_ne!(RequestName::fresh(), RequestName::fresh());
    }
}
