//! HTTP toward workers: one pool of connections per worker, and answers that stream. [`zmtp`] is beside it, and
//! `grpc` on top.
//!
//! A [`Channel`] sends a request over a pooled or a fresh connection and hands back a [`Response`] whose [`Body`] yields
//! the bytes as they come. The most recently used connection is taken first, so that surplus ones age out. Engines speak
//! HTTP/1.1; HTTP/2 is spoken where a worker behind TLS offers it, and in the clear where the endpoint says so.
//!
//! Invariants:
//! - **Cancellation is dropping.** Whoever waits for an answer holds its connection: `http1` has the socket itself, and an
//!   HTTP/2 connection is driven by a task that ends with the last one who shares it. A dropped [`Channel::send`] future or
//!   a [`Body`] dropped before its end closes the TCP connection at once, or resets the HTTP/2 stream, also while the worker
//!   is silent, so that the engine frees the sequence.
//! - **Never twice.** A request goes out on another connection only when nothing of it was written.
//! - A connection returns to its pool only after a complete answer; an idle one is kept for less time than engines keep
//!   theirs (uvicorn under vLLM 0.33: 5 s) and their number is bounded. None is used for ever: names are looked up anew.
//! - Three waits have limits, each its own: connecting, the first body byte, and the gap between two of them. Time in
//!   which the caller did not ask for bytes is never counted against the worker.
//!
//! Not here: redirects, cookies, proxies, compression, retries on another worker.

mod body;
mod channel;
mod connect;
mod endpoint;
pub(crate) mod grpc;
mod http1;
mod pool;
pub mod zmtp;

use std::{sync::Arc, sync::Weak, time::Duration};

use parking_lot::Mutex;
use rustls::RootCertStore;
use tokio_util::task::TaskTracker;

pub use self::{
    body::{Body, Response},
    channel::{Channel, Outgoing},
    endpoint::{Endpoint, EndpointError},
};
use self::{connect::Tls, pool::Pool};

/// How long a worker may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Name lookup, TCP and TLS handshake together.
    pub connect: Duration,
    /// From handing the request to a connection until the first byte of the answer's body. Engines send a stream's head
    /// before they have a token and queue without limit, so this covers their queue and prefill. `None`: no limit here,
    /// the request's deadline is the only one.
    pub first_byte: Option<Duration>,
    /// Between two pieces of the body. The only way out of an engine that goes silent without closing, as vLLM does on
    /// SIGTERM.
    pub idle: Duration,
    /// How long an unused connection is kept.
    pub keep_alive: Duration,
    /// Age at which a connection takes no more requests.
    pub lifetime: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            // A SYN lost once is sent again after 1 s; a worker that takes longer is as good as away.
            connect: Duration::from_secs(2),
            // Patient with a long queue; a worker that went silent is still left some day.
            first_byte: Some(Duration::from_secs(600)),
            idle: Duration::from_secs(60),
            // uvicorn closes after 5 s (vLLM 0.33, `VLLM_HTTP_TIMEOUT_KEEP_ALIVE`); a second of distance.
            keep_alive: Duration::from_secs(4),
            // About as long as resolvers keep what they know of a name that is meant to move.
            lifetime: Duration::from_secs(60),
        }
    }
}

/// What all channels share: the tracker of connection tasks and the TLS configuration. Cheap to clone.
#[derive(Clone)]
pub struct Transport {
    shared: Arc<Shared>,
}

struct Shared {
    tracker: TaskTracker,
    tls: Tls,
    /// Pools of living channels, so that [`Transport::close`] can empty them.
    pools: Mutex<Vec<Weak<Pool>>>,
}

impl Transport {
    /// A transport that trusts the machine's certificate authorities, read when the first `https` connection is made.
    #[must_use]
    pub fn new(tracker: TaskTracker) -> Self {
        Self::build(tracker, Tls::native())
    }

    /// A transport that trusts these certificate authorities only.
    #[must_use]
    pub fn with_roots(tracker: TaskTracker, roots: RootCertStore) -> Self {
        Self::build(tracker, Tls::with_roots(roots))
    }

    fn build(tracker: TaskTracker, tls: Tls) -> Self {
        Self { shared: Arc::new(Shared { tracker, tls, pools: Mutex::new(Vec::new()) }) }
    }

    /// A pool of connections to one worker.
    #[must_use]
    pub fn channel(&self, endpoint: Endpoint, timeouts: Timeouts) -> Channel {
        let pool = Arc::new(Pool::new(timeouts.keep_alive, timeouts.lifetime));
        let mut pools = self.shared.pools.lock();
        pools.retain(|pool| pool.strong_count() > 0);
        pools.push(Arc::downgrade(&pool));
        drop(pools);
        Channel::new(self.clone(), endpoint, timeouts, pool)
    }

    /// Closes all idle connections, and every other one as soon as its answer ends, so that the tracker can become
    /// empty. Requests under way are not disturbed, and new ones still work.
    pub fn close(&self) {
        let pools = std::mem::take(&mut *self.shared.pools.lock());
        for pool in pools.iter().filter_map(Weak::upgrade) {
            pool.close();
        }
    }
}
