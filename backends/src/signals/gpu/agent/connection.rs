//! A gateway's connection: one of a bounded number, and for a bounded time unless it has a call.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::OwnedSemaphorePermit,
    time::{Instant, Sleep, sleep},
};
use tonic::transport::server::Connected;

/// TLS, HTTP/2's first words and the call together: a connection without a call for so long is closed.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// How long a peer may take no byte of what is written to it.
const STALL_LIMIT: Duration = Duration::from_secs(10);

pub(super) struct Connection {
    socket: TcpStream,
    calls: Calls,
    limit: Pin<Box<Sleep>>,
    stalled: Option<Pin<Box<Sleep>>>,
    /// Given back after the socket is closed.
    _place: OwnedSemaphorePermit,
}

/// How many calls a connection has; calls find it among their extensions.
#[derive(Clone, Default)]
pub(super) struct Calls(Arc<AtomicUsize>);

/// One of them, until it is dropped.
pub(super) struct Call(Calls);

impl Calls {
    pub(super) fn begin(&self) -> Call {
        self.0.fetch_add(1, Relaxed);
        Call(self.clone())
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Relaxed);
    }
}

impl Connection {
    pub(super) fn new(socket: TcpStream, place: OwnedSemaphorePermit) -> Self {
        let limit = Box::pin(sleep(CALL_LIMIT));
        Self { socket, calls: Calls::default(), limit, stalled: None, _place: place }
    }

    /// Fails once the connection was without a call for too long. Looked at whatever is done: HTTP/2 reads nothing while
    /// an answer that it owes cannot be written.
    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        if self.calls.0.load(Relaxed) > 0 {
            self.limit.as_mut().reset(Instant::now() + CALL_LIMIT);
        }
        if self.limit.as_mut().poll(context).is_ready() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
    }
}

impl Connected for Connection {
    type ConnectInfo = Calls;

    fn connect_info(&self) -> Calls {
        self.calls.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.check(context)?;
        Pin::new(&mut this.socket).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.check(context)?;
        let written = Pin::new(&mut this.socket).poll_write(context, bytes);
        if written.is_ready() {
            this.stalled = None;
            return written;
        }
        let stalled = this.stalled.get_or_insert_with(|| Box::pin(sleep(STALL_LIMIT)));
        ready!(stalled.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_shutdown(context)
    }
}
