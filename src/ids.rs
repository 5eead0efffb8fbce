//! Names that identify one request to people: in headers, logs, the ledger.
//!
//! The scheduler's numeric [`forebay_scheduler::RequestId`] is internal and never leaves the process.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use http::HeaderValue;

/// Longest request id taken over from a client, in bytes.
const CLIENT_ID_BYTES_MAX: usize = 128;

/// Random per process, so that ids of two gateways or two runs do not meet.
static PROCESS: LazyLock<u64> = LazyLock::new(rand::random);
const HEXADECIMAL: &[u8; 16] = b"0123456789abcdef";
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
        Self(std::str::from_utf8(&Self::fresh_bytes()).unwrap_or_default().into())
    }

    /// A new id for a header, as [`RequestName::fresh`] gives them.
    #[must_use]
    pub fn fresh_header() -> Option<HeaderValue> {
        HeaderValue::from_bytes(&Self::fresh_bytes()).ok()
    }

    fn fresh_bytes() -> [u8; 32] {
        let count = COUNTER.fetch_add(1, Ordering::Relaxed);
        let mut name = *b"req_0000000000000000000000000000";
        let digits = [(*PROCESS, 4..20), (count, 20..32)];
        for (mut number, place) in digits {
            for digit in name.get_mut(place).unwrap_or_default().iter_mut().rev() {
                *digit = HEXADECIMAL.get((number & 15) as usize).copied().unwrap_or(b'0');
                number >>= 4;
            }
        }
        name
    }

    /// The same, to be kept elsewhere.
    #[must_use]
    pub fn shared(&self) -> Arc<str> {
        Arc::clone(&self.0)
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
        let (one, other) = (RequestName::fresh(), RequestName::fresh());
        assert_ne!(one, other);
        let digits = one.as_str().strip_prefix("req_").unwrap();
        assert_eq!((digits.len(), &digits[..16]), (28, format!("{:016x}", *PROCESS).as_str()));
        assert!(is_usable(one.as_str()));
    }
}
