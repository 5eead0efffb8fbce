//! Open connections to one worker: HTTP/1.1 ones that wait, the most recently used on top, and HTTP/2 ones, which many
//! requests share.
//!
//! Invariants: at most [`IDLE_MAX`] wait here, each for at most the keep-alive time; they stand in the order in which
//! they were put back, so that the oldest is in front. A connection that is older than its lifetime takes no new
//! request, so that a name that leads elsewhere is followed also under a load that never lets a connection rest.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http2;
use parking_lot::Mutex;
use tokio::{task::AbortHandle, time::Instant};

use super::http1::Http1;

/// More than an engine's usual largest batch (vLLM: 256 sequences), so that a burst that ends leaves all its connections
/// for the next one.
const IDLE_MAX: usize = 256;
/// Requests at once on one HTTP/2 connection; the next one opens another. The least that RFC 9113 (6.5.2) advises a
/// server to allow: nothing waits inside a connection, where no clock sees it.
const STREAMS_MAX: usize = 100;

/// The right to use an open connection. Dropping it closes an HTTP/1.1 connection at once, whatever is under way on it;
/// an HTTP/2 connection closes when the last one who shares it is gone.
pub(super) struct Connection {
    pub(super) line: Line,
    born: Instant,
    reused: bool,
}

/// What a request is handed to.
pub(super) enum Line {
    Http1(Box<Http1>),
    Http2(Http2),
}

/// One of the rights to an HTTP/2 connection.
#[derive(Clone)]
pub(super) struct Http2 {
    pub(super) sender: http2::SendRequest<Full<Bytes>>,
    task: Arc<Task>,
}

/// The task that drives a connection.
struct Task(AbortHandle);

impl Http2 {
    pub(super) fn new(sender: http2::SendRequest<Full<Bytes>>, task: AbortHandle) -> Self {
        Self { sender, task: Arc::new(Task(task)) }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Connection {
    pub(super) fn new(line: Line) -> Self {
        Self { line, born: Instant::now(), reused: false }
    }

    pub(super) fn is_http2(&self) -> bool {
        matches!(self.line, Line::Http2(_))
    }

    /// Whether an earlier request was answered on it, or is under way.
    pub(super) fn reused(&self) -> bool {
        self.reused
    }

    fn is_ready(&mut self) -> bool {
        match &mut self.line {
            Line::Http1(http1) => http1.is_ready(),
            Line::Http2(http2) => http2.sender.is_ready(),
        }
    }

    /// Requests under way on a connection of which the pool holds one handle.
    fn streams(&self) -> usize {
        match &self.line {
            Line::Http1(_) => 0,
            Line::Http2(http2) => Arc::strong_count(&http2.task) - 1,
        }
    }

    /// Another right to use it, where several may.
    fn share(&self) -> Option<Self> {
        let Line::Http2(http2) = &self.line else { return None };
        Some(Self { line: Line::Http2(http2.clone()), born: self.born, reused: true })
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
        // Those that the worker closed are dropped on the way.
        std::iter::from_fn(|| open.idle.pop_back())
            .map(|entry| entry.connection)
            .find_map(|mut connection| if connection.is_ready() { Some(connection) } else { None })
    }

    /// Lets others use a fresh connection, too, where its protocol allows that.
    pub(super) fn offer(&self, fresh: &Connection) {
        if let (Some(connection), Some(open)) = (fresh.share(), self.open.lock().as_mut()) {
            open.shared.push(Idle { connection, since: Instant::now() });
        }
    }

    /// Keeps a connection whose answer is complete.
    pub(super) fn put(&self, mut connection: Connection) {
        if !matches!(&connection.line, Line::Http1(http1) if http1.is_free()) {
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
        let mut open = self.open.lock();
        let open = open.iter_mut().flat_map(|open| open.idle.iter_mut().chain(&mut open.shared));
        open.filter_map(|idle| idle.connection.is_ready().then_some(())).count()
    }

    /// Lets go of what is too old or waits too long. What is under way on a shared one goes on.
    fn sweep(&self, open: &mut Open, now: Instant) {
        let age = |since: Instant| now.saturating_duration_since(since);
        while open.idle.front().is_some_and(|entry| age(entry.since) >= self.keep_alive) {
            open.idle.pop_front();
        }
        open.shared.retain_mut(|Idle { connection, since }| {
            let rests = connection.streams() == 0 && age(*since) >= self.keep_alive;
            connection.is_ready() && !rests && age(connection.born) < self.lifetime
        });
    }
}
