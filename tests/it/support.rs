//! What the wire tests stand on: processes that end with their test, a worker that records bytes, a client that sends
//! them. Plain threads and blocking sockets: a second implementation beside the gateway's own.

pub(crate) mod body;
pub(crate) mod client;
pub(crate) mod dns;
pub(crate) mod gpus;
pub(crate) mod http2;
#[cfg(feature = "kubernetes")]
pub(crate) mod kubernetes;
pub(crate) mod process;
pub(crate) mod recorder;

use std::time::{Duration, Instant};

/// Longest wait for anything in a test. Machines are shared: generous, and never waited for when all is well.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Asks `condition` again and again until it says `Some`.
///
/// # Panics
/// After [`PATIENCE`], with `what` was waited for.
pub(crate) fn eventually<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    within(PATIENCE, what, condition)
}

/// The same for what takes longer than [`PATIENCE`].
pub(crate) fn within<T>(limit: Duration, what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(began.elapsed() < limit, "waited {limit:?} for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
