//! A gateway's connection: one of a bounded number, and for a bounded time unless a call comes over it.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::OwnedSemaphorePermit,
    time::{Sleep, sleep},
};
use tonic::transport::server::Connected;

/// TLS, HTTP/2's first words and the call together: a connection without a call for so long is closed.
const CALL_LIMIT: Duration = Duration::from_secs(5);

pub(super) struct Connection {
    socket: TcpStream,
    called: Called,
    limit: Pin<Box<Sleep>>,
    /// Given back after the socket is closed.
    _place: OwnedSemaphorePermit,
}

/// Whether a call came over a connection; calls find it among their extensions.
#[derive(Clone, Default)]
pub(super) struct Called(Arc<AtomicBool>);

impl Called {
    pub(super) fn note(&self) {
        self.0.store(true, Relaxed);
    }
}

impl Connection {
    pub(super) fn new(socket: TcpStream, place: OwnedSemaphorePermit) -> Self {
        Self { socket, called: Called::default(), limit: Box::pin(sleep(CALL_LIMIT)), _place: place }
    }
}

impl Connected for Connection {
    type ConnectInfo = Called;

    fn connect_info(&self) -> Called {
        self.called.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.called.0.load(Relaxed) && this.limit.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut this.socket).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().socket).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_shutdown(context)
    }
}
