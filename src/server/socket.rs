//! A client's connection as the HTTP library sees it: bytes, with two things that the library does not do.
//!
//! A client that takes no byte of its answer for a time is let go, since it holds a worker's place; and the library's own
//! refusals (a head that is no HTTP, or too large), which have no body, get one in the shape of all others.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Buf;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// How a refusal goes on behind its status line: further header lines, each with its line end, and a body.
pub(super) type Refuse = fn(status: u16) -> (String, Vec<u8>);

/// What the library's refusals begin and end with; every answer of the router has a request's name, and so another end.
const REFUSAL_START: &[u8] = b"HTTP/1.1 4";
const NO_BODY: &[u8] = b"content-length: 0\r\n";

pub(super) struct Socket<S> {
    stream: S,
    /// How long the client may take no byte.
    stall_max: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
    refuse: Refuse,
    /// A refusal with its body, in place of what the library wrote.
    instead: io::Cursor<Vec<u8>>,
}

impl<S: AsyncWrite + Unpin> Socket<S> {
    pub(super) fn new(stream: S, stall_max: Duration, refuse: Refuse) -> Self {
        Self { stream, stall_max, stalled: None, refuse, instead: io::Cursor::default() }
    }

    /// The outcome of a write, which must not be pending for too long.
    fn progress<T>(&mut self, context: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(self.stall_max)));
        ready!(stalled.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    fn poll_instead(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.instead.has_remaining() {
            let written = Pin::new(&mut self.stream).poll_write(context, self.instead.chunk());
            let written = ready!(self.progress(context, written))?;
            self.instead.advance(written);
        }
        Poll::Ready(Ok(()))
    }

    /// Keeps a refusal's other form for the next flush, if these bytes are one.
    fn replace(&mut self, head: &[u8]) -> bool {
        let Some(form) = completed(head, self.refuse) else { return false };
        self.instead = io::Cursor::new(form);
        true
    }
}

/// A bare refusal of the library's with what it lacks.
fn completed(head: &[u8], refuse: Refuse) -> Option<Vec<u8>> {
    if !head.starts_with(REFUSAL_START) || !head.ends_with(b"\r\n\r\n") {
        return None;
    }
    let at = head.windows(NO_BODY.len()).position(|window| window == NO_BODY)?;
    let (before, after) = (head.get(..at)?, head.get(at + NO_BODY.len()..)?);
    let status = std::str::from_utf8(head.get(9..12)?).ok()?.parse().ok()?;
    let (fields, body) = refuse(status);
    let length = format!("content-length: {}\r\n", body.len());
    Some([before, fields.as_bytes(), length.as_bytes(), after, &body].concat())
}

impl<S: AsyncRead + Unpin> AsyncRead for Socket<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Socket<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_instead(context))?;
        if this.replace(bytes) {
            return Poll::Ready(Ok(bytes.len()));
        }
        let written = Pin::new(&mut this.stream).poll_write(context, bytes);
        this.progress(context, written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_instead(context))?;
        if let [head] = pieces
            && this.replace(head)
        {
            return Poll::Ready(Ok(head.len()));
        }
        let written = Pin::new(&mut this.stream).poll_write_vectored(context, pieces);
        this.progress(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_instead(context))?;
        Pin::new(&mut this.stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_instead(context))?;
        Pin::new(&mut this.stream).poll_shutdown(context)
    }
}
