//! Idle connections to one worker, the most recently used on top.
//!
//! Invariants: at most [`IDLE_MAX`] wait here, each for at most the keep-alive time; they stand in the order in which
//! they were put back, so that the oldest is in front.

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http1::SendRequest;
use parking_lot::Mutex;
use tokio::{task::AbortHandle, time::Instant};

/// More than an engine's usual largest batch (vLLM: 256 sequences), so that a burst that ends leaves all its connections
/// for the next one.
const IDLE_MAX: usize = 256;

/// An open connection. Dropping it closes the socket at once, whatever is under way on it.
pub(super) struct Connection {
    sender: SendRequest<Full<Bytes>>,
    task: AbortHandle,
    reused: bool,
}

impl Connection {
    pub(super) fn new(sender: SendRequest<Full<Bytes>>, task: AbortHandle) -> Self {
        Self { sender, task, reused: false }
    }

    pub(super) fn sender(&mut self) -> &mut SendRequest<Full<Bytes>> {
        &mut self.sender
    }

    /// Whether an earlier request was answered on it.
    pub(super) fn reused(&self) -> bool {
        self.reused
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // hyper closes by itself where an answer is dropped, but a request that is stuck half-way, to a worker that does
        // not read, it would go on writing to the end (1.12).
        self.task.abort();
    }
}

struct Idle {
    connection: Connection,
    since: Instant,
}

pub(super) struct Pool {
    /// `None` once closed.
    idle: Mutex<Option<VecDeque<Idle>>>,
    keep_alive: Duration,
}

impl Pool {
    pub(super) fn new(keep_alive: Duration) -> Self {
        Self { idle: Mutex::new(Some(VecDeque::new())), keep_alive }
    }

    /// The connection used last among those that can take a request now.
    pub(super) fn take(&self) -> Option<Connection> {
        let mut idle = self.idle.lock();
        let idle = idle.as_mut()?;
        self.sweep(idle);
        // Passed over are those that the worker closed, and those whose task has not finished the last exchange.
        let at = idle.iter().rposition(|entry| entry.connection.sender.is_ready())?;
        idle.remove(at).map(|entry| entry.connection)
    }

    /// Keeps a connection whose answer is complete.
    pub(super) fn put(&self, mut connection: Connection) {
        if connection.sender.is_closed() {
            return;
        }
        connection.reused = true;
        let mut idle = self.idle.lock();
        let Some(idle) = idle.as_mut() else { return };
        self.sweep(idle);
        if idle.len() >= IDLE_MAX {
            idle.pop_front();
        }
        idle.push_back(Idle { connection, since: Instant::now() });
    }

    /// Drops what waits, and from now on what is put back.
    pub(super) fn close(&self) {
        self.idle.lock().take();
    }

    /// Number of connections that wait and can take a request now.
    pub(super) fn ready(&self) -> usize {
        let idle = self.idle.lock();
        idle.iter().flatten().filter(|entry| entry.connection.sender.is_ready()).count()
    }

    fn sweep(&self, idle: &mut VecDeque<Idle>) {
        while idle.front().is_some_and(|entry| entry.since.elapsed() >= self.keep_alive) {
            idle.pop_front();
        }
    }
}
