//! An answer on one of many streams of an HTTP/2 connection, whose client takes no byte of it.
//!
//! The connection's socket says nothing of it, and the HTTP library does not ask for bytes for which the client left no
//! room. So a task looks after each answer: one that has bytes to give and was not asked for too long is dropped, and
//! with it what it holds at a worker.

use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

/// The body that the HTTP library gets; with it ends the task that looks after it.
pub(super) struct Watched(Arc<Mutex<Watch>>, #[expect(dead_code, reason = "tells when it is dropped")] DropGuard);

struct Watch {
    /// Taken away when nobody asks for it.
    body: Option<Body>,
    /// Since when it could give more and was not asked; `None` while it waits itself.
    unasked: Option<Instant>,
}

/// The client took nothing for too long.
#[derive(Debug, thiserror::Error)]
#[error("the client takes no byte of its answer")]
pub(super) struct Stalled;

impl Watched {
    pub(super) fn new(body: Body, stall_max: Duration, tracker: &TaskTracker) -> Self {
        let watch = Arc::new(Mutex::new(Watch { body: Some(body), unasked: Some(Instant::now()) }));
        let gone = CancellationToken::new();
        let looking = gone.clone().run_until_cancelled_owned(look_after(Arc::downgrade(&watch), stall_max));
        tracker.spawn(looking);
        Self(watch, gone.drop_guard())
    }
}

async fn look_after(watch: Weak<Mutex<Watch>>, stall_max: Duration) {
    let mut next = Instant::now() + stall_max;
    loop {
        sleep_until(next).await;
        let Some(watch) = watch.upgrade() else { return };
        let mut watch = watch.lock();
        let now = Instant::now();
        next = watch.unasked.unwrap_or(now) + stall_max;
        if next <= now {
            let stalled = watch.body.take();
            drop(watch);
            return drop(stalled);
        }
    }
}

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let mut watch = self.0.lock();
        let Some(body) = &mut watch.body else { return Poll::Ready(Some(Err(axum::Error::new(Stalled)))) };
        let frame = Pin::new(body).poll_frame(context);
        watch.unasked = frame.is_ready().then(Instant::now);
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.0.lock().body.as_ref().is_some_and(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.0.lock().body.as_ref().map_or_else(SizeHint::default, Body::size_hint)
    }
}
