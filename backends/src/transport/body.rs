//! An answer as it comes in.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, StatusCode};
use http_body::Body as _;
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep, sleep_until};

use super::pool::{Connection, Line, Pool};
use crate::{Error, Phase};

/// The head of an answer, and its body still to come.
pub struct Response {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Body,
}

/// The bytes of an answer. Read to its end it gives the connection back to the pool; dropped before, it closes it.
pub struct Body {
    /// Over HTTP/2; else it comes on the connection itself.
    incoming: Option<Incoming>,
    /// Taken away at the end, whichever way it comes.
    connection: Option<Connection>,
    pool: Arc<Pool>,
    patience: Patience,
    trailers: Option<HeaderMap>,
}

impl Body {
    pub(super) fn new(
        incoming: Option<Incoming>,
        connection: Connection,
        pool: Arc<Pool>,
        first_byte: Option<(Instant, Duration)>,
        idle: Duration,
    ) -> Self {
        let patience = Patience { first: Some(first_byte), idle, waiting_since: None, alarm: None };
        Self { incoming, connection: Some(connection), pool, patience, trailers: None }
    }

    /// With these in place of the trailers that will not come.
    pub(super) fn with_trailers(mut self, trailers: Option<HeaderMap>) -> Self {
        self.trailers = trailers;
        self
    }

    /// What came behind the last piece; gRPC tells there how a call ended.
    pub(crate) fn trailers(&self) -> Option<&HeaderMap> {
        self.trailers.as_ref()
    }

    /// The next piece, `None` after the last one. After an error, too, `None` follows.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
        let Some(connection) = &mut self.connection else { return Poll::Ready(None) };
        let piece = match (&mut connection.line, &mut self.incoming) {
            (Line::Http1(http1), _) => http1.poll_piece(cx).map_err(Into::into),
            (Line::Http2(_), Some(incoming)) => poll_http2(incoming, &mut self.trailers, cx).map_err(Into::into),
            (Line::Http2(_), None) => Poll::Ready(None),
        };
        let piece = match piece {
            Poll::Ready(piece) => piece,
            Poll::Pending => {
                let error = ready!(self.patience.poll_lost(cx));
                self.connection = None;
                return Poll::Ready(Some(Err(error)));
            }
        };
        self.patience.waiting_since = None;
        match piece {
            Some(Ok(piece)) => {
                self.patience.first = None;
                Poll::Ready(Some(Ok(piece)))
            }
            Some(Err(source)) => {
                self.connection = None;
                Poll::Ready(Some(Err(Error::Broken { source })))
            }
            None => {
                self.give_back();
                Poll::Ready(None)
            }
        }
    }

    /// Bytes still to come, at least.
    fn expected(&self) -> u64 {
        match (&self.connection, &self.incoming) {
            (_, Some(incoming)) => incoming.size_hint().lower(),
            (Some(Connection { line: Line::Http1(http1), .. }), None) => http1.expected(),
            _ => 0,
        }
    }

    fn is_over(&self) -> bool {
        match (&self.connection, &self.incoming) {
            (_, Some(incoming)) => incoming.is_end_stream(),
            (Some(Connection { line: Line::Http1(http1), .. }), None) => http1.is_over(),
            _ => true,
        }
    }

    /// The next piece, `None` after the last one. Cancel-safe: no byte is lost when the future is dropped.
    pub async fn next(&mut self) -> Option<Result<Bytes, Error>> {
        poll_fn(|cx| self.poll_data(cx)).await
    }

    /// The whole answer, if it is not longer than `bytes_max`.
    ///
    /// # Errors
    /// As the pieces'; [`Error::TooLarge`] as soon as it is known to be longer.
    pub async fn collect(mut self, bytes_max: usize) -> Result<Bytes, Error> {
        let expected = usize::try_from(self.expected()).unwrap_or(usize::MAX);
        if expected > bytes_max {
            return Err(Error::TooLarge { bytes_max });
        }
        let mut all = BytesMut::with_capacity(expected);
        while let Some(piece) = self.next().await {
            let piece = piece?;
            if piece.len() > bytes_max - all.len() {
                return Err(Error::TooLarge { bytes_max });
            }
            all.extend_from_slice(&piece);
        }
        Ok(all.freeze())
    }

    fn give_back(&mut self) {
        if let Some(connection) = self.connection.take() {
            self.pool.put(connection);
        }
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        // A reader that counts bytes may stop at the last one; the exchange is over all the same.
        if self.is_over() {
            self.give_back();
        }
    }
}

/// The next piece that is not empty; trailers go where they are kept.
fn poll_http2(
    incoming: &mut Incoming,
    trailers: &mut Option<HeaderMap>,
    cx: &mut Context<'_>,
) -> Poll<Option<hyper::Result<Bytes>>> {
    loop {
        let Some(frame) = ready!(Pin::new(&mut *incoming).poll_frame(cx)?) else { return Poll::Ready(None) };
        match frame.into_data() {
            Ok(data) if !data.is_empty() => return Poll::Ready(Some(Ok(data))),
            Ok(_) => {}
            Err(frame) => *trailers = frame.into_trailers().ok().or(trailers.take()),
        }
    }
}

/// How long the worker may still be silent.
///
/// The clock runs only while the caller waits: a slow client must not make a healthy worker look dead.
struct Patience {
    /// Until the first byte came: the limit for it, if there is one.
    first: Option<Option<(Instant, Duration)>>,
    idle: Duration,
    waiting_since: Option<Instant>,
    /// Set late and moved lazily, so that a stream that flows touches no timer.
    alarm: Option<Pin<Box<Sleep>>>,
}

impl Patience {
    /// Ready when the wait has become too long. To be called whenever nothing was there to read.
    fn poll_lost(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        let since = *self.waiting_since.get_or_insert_with(Instant::now);
        let (phase, deadline, after) = match self.first {
            Some(None) => return Poll::Pending,
            Some(Some((deadline, after))) => (Phase::FirstByte, deadline, after),
            None => (Phase::Idle, since + self.idle, self.idle),
        };
        let alarm = self.alarm.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if deadline < alarm.deadline() {
            alarm.as_mut().reset(deadline);
        }
        while alarm.as_mut().poll(cx).is_ready() {
            if deadline <= alarm.deadline() {
                return Poll::Ready(Error::Timeout { phase, after });
            }
            alarm.as_mut().reset(deadline);
        }
        Poll::Pending
    }
}
