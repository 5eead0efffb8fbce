//! Open connections to one worker: HTTP/1.1 ones that wait, the most recently used on top, and HTTP/2 ones, which many
//! requests share.
//!
//! Invariants: at most [`IDLE_MAX`] wait here, each for at most the keep-alive time; they stand in the order in which
//! they were put back, so that the oldest is in front. A connection that is older than its lifetime takes no new
//! request, so that a name that leads elsewhere is followed also under a load that never lets a connection rest.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::{
    body::Incoming,
    client::conn::{TrySendError, http1, http2},
};
use parking_lot::Mutex;
use tokio::{task::AbortHandle, time::Instant};

/// More than an engine's usual largest batch (vLLM: 256 sequences), so that a burst that ends leaves all its connections
/// for the next one.
const IDLE_MAX: usize = 256;
/// Requests at once on one HTTP/2 connection; the next one opens another. The least that RFC 9113 (6.5.2) advises a
/// server to allow: nothing waits inside a connection, where no clock sees it.
const STREAMS_MAX: usize = 100;

/// The right to use an open connection. Dropping it closes an HTTP/1.1 connection at once, whatever is under way on it;
/// an HTTP/2 connection closes when the last one who shares it is gone.
pub(super) struct Connection {
    sender: Sender,
    task: Arc<Task>,
    born: Instant,
    reused: bool,
}

/// What a request is handed to.
pub(super) enum Sender {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

/// The task that drives a connection.
struct Task(AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        // hyper closes by itself where an answer is dropped, but a request that is stuck half-way, to a worker that does
        // not read, it would go on writing to the end (1.12).
        self.0.abort();
    }
}

impl Connection {
    pub(super) fn new(sender: Sender, task: AbortHandle) -> Self {
        Self { sender, task: Arc::new(Task(task)), born: Instant::now(), reused: false }
    }

    pub(super) fn is_http2(&self) -> bool {
        matches!(self.sender, Sender::Http2(_))
    }

    /// As hyper: what was certainly not written comes back with the error.
    pub(super) async fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, TrySendError<Request<Full<Bytes>>>> {
        match &mut self.sender {
            Sender::Http1(sender) => sender.try_send_request(request).await,
            // Its future is the larger one, and the rarer.
            Sender::Http2(sender) => Box::pin(sender.try_send_request(request)).await,
        }
    }

    /// Whether an earlier request was answered on it, or is under way.
    pub(super) fn reused(&self) -> bool {
        self.reused
    }

    fn is_ready(&self) -> bool {
        match &self.sender {
            Sender::Http1(sender) => sender.is_ready(),
            Sender::Http2(sender) => sender.is_ready(),
        }
    }

    /// Requests under way on a connection of which the pool holds one handle.
    fn streams(&self) -> usize {
        Arc::strong_count(&self.task) - 1
    }

    /// Another right to use it, where several may.
    fn share(&self) -> Option<Self> {
        let Sender::Http2(sender) = &self.sender else { return None };
        let sender = Sender::Http2(sender.clone());
        Some(Self { sender, task: Arc::clone(&self.task), born: self.born, reused: true })
    }
}

struct Idle {
    connection: Connection,
    since: Instant,
}

/// The connections of one worker; closed when [`Pool::close`] was called.
pub(super) struct Pool {
    open: Mutex<Option<Open>>,
    keep_alive: Duration,
    lifetime: Duration,
}

#[derive(Default)]
struct Open {
    idle: VecDeque<Idle>,
    /// `since`: when its last request began.
    shared: Vec<Idle>,
}

impl Pool {
    pub(super) fn new(keep_alive: Duration, lifetime: Duration) -> Self {
        Self { open: Mutex::new(Some(Open::default())), keep_alive, lifetime }
    }

    /// One that can take a request now: a shared one with room, else the one used last.
    pub(super) fn take(&self) -> Option<Connection> {
        let now = Instant::now();
        let mut open = self.open.lock();
        let open = open.as_mut()?;
        self.sweep(open, now);
        if let Some(entry) = open.shared.iter_mut().find(|entry| entry.connection.streams() < STREAMS_MAX) {
            entry.since = now;
            return entry.connection.share();
        }
        // Passed over are those that the worker closed, and those whose task has not finished the last exchange.
        let at = open.idle.iter().rposition(|entry| entry.connection.is_ready())?;
        open.idle.remove(at).map(|entry| entry.connection)
    }

    /// Lets others use a fresh connection, too, where its protocol allows that.
    pub(super) fn offer(&self, fresh: &Connection) {
        if let (Some(connection), Some(open)) = (fresh.share(), self.open.lock().as_mut()) {
            open.shared.push(Idle { connection, since: Instant::now() });
        }
    }

    /// Keeps a connection whose answer is complete.
    pub(super) fn put(&self, mut connection: Connection) {
        let Sender::Http1(sender) = &connection.sender else { return };
        if sender.is_closed() {
            return;
        }
        connection.reused = true;
        let now = Instant::now();
        if now.duration_since(connection.born) >= self.lifetime {
            return;
        }
        let mut open = self.open.lock();
        let Some(open) = open.as_mut() else { return };
        self.sweep(open, now);
        if open.idle.len() >= IDLE_MAX {
            open.idle.pop_front();
        }
        open.idle.push_back(Idle { connection, since: now });
    }

    /// Drops what waits, and from now on what is put back.
    pub(super) fn close(&self) {
        self.open.lock().take();
    }

    /// Number of connections that can take a request now.
    pub(super) fn ready(&self) -> usize {
        let open = self.open.lock();
        open.iter()
            .flat_map(|open| open.idle.iter().chain(&open.shared))
            .filter(|idle| idle.connection.is_ready())
            .count()
    }

    /// Lets go of what is too old or waits too long. What is under way on a shared one goes on.
    fn sweep(&self, open: &mut Open, now: Instant) {
        let age = |since: Instant| now.saturating_duration_since(since);
        while open.idle.front().is_some_and(|entry| age(entry.since) >= self.keep_alive) {
            open.idle.pop_front();
        }
        open.shared.retain(|Idle { connection, since }| {
            let rests = connection.streams() == 0 && age(*since) >= self.keep_alive;
            connection.is_ready() && !rests && age(connection.born) < self.lifetime
        });
    }
}
