//! One call for equal requests that are in flight at one time, and its answer for each of them.
//!
//! The call runs in a task of its own and goes the usual way through the rooms; the first request is a listener like the
//! others, so that it may leave as they may. Each listener has its own row. The call's counts stand in the row of one of
//! them, the others' say `coalesced`.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use forebay_proto::error::{ApiError, openai_event};
use forebay_scheduler::Refusal;
use http::HeaderValue;
use http_body::{Frame, SizeHint};
use metrics::Counter;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::relay::{StreamRelay, WholeRelay};
use super::{Begun, Call, Error, Pipeline};
use crate::cache::{self, Coalescing, Key, Left, Next, Seat};
use crate::dispatch::{self, Opened, Reply, Worker};
use crate::ledger::{Cost, Entry, Outcome};
use crate::routing::Route;
use crate::telemetry::metrics::coalescing_lookups;

/// How long the others wait, in all, for those who fell behind by as much as is kept: they may only have had no turn.
const PATIENCE: Duration = Duration::from_millis(250);

type Pilot = cache::Pilot<Head, Error, Option<Cost>>;
type Listener = cache::Listener<Head, Error, Option<Cost>>;

/// The calls that are shared, and what they run on.
pub struct Shared {
    calls: Arc<Coalescing<Head, Error, Option<Cost>>>,
    tracker: TaskTracker,
    closing: CancellationToken,
    /// Without an equal request, and with one.
    lookups: [Counter; 2],
}

impl Shared {
    /// Calls run on `tracker`; `closing` cuts them when the gateway's drain time is over.
    #[must_use]
    pub fn new(tracker: TaskTracker, closing: CancellationToken) -> Self {
        Self { calls: Arc::default(), tracker, closing, lookups: coalescing_lookups() }
    }
}

/// How an answer begins.
#[derive(Clone)]
pub struct Head {
    pub route: Route,
    pub worker: Arc<Worker>,
    pub queued: Duration,
    pub predicted_wait: Duration,
    matched_tokens: u32,
    /// Of a document; else it is a stream.
    pub content_type: Option<HeaderValue>,
    /// Bytes of a document, where known.
    length: Option<u64>,
}

/// A request that listens to a call.
pub struct Sharing {
    listener: Listener,
    first: bool,
}

/// One whose answer has begun.
pub struct Joined {
    pub head: Head,
    /// Whether the call was made for this one.
    pub first: bool,
    listener: Listener,
}

impl Pipeline {
    /// Joins the call of an equal request, or makes one that equal requests can join. What is not to be shared comes back:
    /// a model that does not allow it, an answer that is drawn by chance, one with a deadline of its own; and one that comes
    /// when all calls together keep as much as they may.
    ///
    /// # Errors
    /// The request, to go its own way.
    pub fn share(&self, entry: &mut Entry, call: Call) -> Result<Sharing, Box<Call>> {
        let Ok(route) = self.routing.route(&call.asked.model().name) else { return Err(Box::new(call)) };
        let model = route.model;
        let sharable = model.coalesce && call.deadline.is_none() && call.body.len() <= cache::BODY_BYTES_MAX;
        if !(sharable && call.asked.can_be_shared()) {
            return Err(Box::new(call));
        }
        let headers = call.headers.iter().filter(|(name, _)| !matches!(name.as_str(), "traceparent" | "tracestate"));
        let key = Key {
            model: Arc::clone(&model.name),
            path: call.api.path(),
            class: call.class as usize,
            headers: headers.map(|(name, value)| (name.as_str().to_owned(), value.clone())).collect(),
            body: call.body.clone(),
        };
        let Some(Seat { listener, pilot }) = self.shared.calls.join(key) else { return Err(Box::new(call)) };
        entry.routed(&model.name, &model.metrics);
        let [miss, hit] = &self.shared.lookups;
        let first = pilot.is_some();
        if let Some(pilot) = pilot {
            miss.increment(1);
            self.shared.tracker.spawn(make(self.clone(), entry.of_all(), call, pilot));
        } else {
            hit.increment(1);
        }
        Ok(Sharing { listener, first })
    }
}

impl Sharing {
    /// Waits until the answer begins.
    ///
    /// # Errors
    /// As [`Pipeline::open`]: all who listen get the same.
    pub async fn begin(self, entry: &mut Entry) -> Result<Joined, Error> {
        let mut waiting = Waiting { listener: Some(self.listener), entry };
        let head = match &mut waiting.listener {
            Some(listener) => listener.head().await,
            None => None,
        };
        if let Some(Err(error)) = head {
            return Err(error);
        }
        // Else the call's task is gone, because the process ends.
        let (Some(Ok(head)), Some(listener)) = (head, waiting.listener.take()) else {
            return Err(dispatch::Error::Refused { reason: Refusal::NoWorker, retry_after: None }.into());
        };
        if let Some(cost) = listener.facts() {
            waiting.entry.shared(&cost, false);
        }
        waiting.entry.first_byte(&head.worker.name, head.matched_tokens);
        Ok(Joined { head, first: self.first, listener })
    }
}

/// A request without an answer, and its row. Dropping it leaves the call with what that has cost by now.
struct Waiting<'a> {
    listener: Option<Listener>,
    entry: &'a mut Entry,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let Some(listener) = &mut self.listener else { return };
        let Left { facts, pays, .. } = listener.leave();
        if let Some(cost) = facts {
            self.entry.shared(&cost, pays);
        }
    }
}

/// Makes the call, until nobody listens.
async fn make(pipeline: Pipeline, entry: (Entry, watch::Receiver<Option<Cost>>), call: Call, pilot: Pilot) {
    tokio::select! {
        () = carry(&pipeline, entry, call, &pilot) => {}
        () = pilot.abandoned() => {}
    }
}

async fn carry(
    pipeline: &Pipeline,
    (mut entry, mut heard): (Entry, watch::Receiver<Option<Cost>>),
    call: Call,
    pilot: &Pilot,
) {
    let (choices, hide_usage) = (call.asked.choices(), call.asked.hides_usage());
    let mut opening = Box::pin(pipeline.open(&mut entry, call));
    let opened = loop {
        tokio::select! {
            biased;
            opened = opening.as_mut() => break opened,
            // Who leaves before there is an answer takes over what it has cost until then.
            Ok(()) = heard.changed() => pilot.note(heard.borrow_and_update().clone()),
        }
    };
    drop(opening);
    let Begun { route, opened, continuation } = match opened {
        Ok(begun) => begun,
        Err(error) => return pilot.head(Err(error), Some(entry.cost())),
    };
    let Opened { place, worker, queued, predicted_wait, matched_tokens, reply, .. } = opened;
    let (content_type, length) = match &reply {
        Reply::Stream(_) => (None, None),
        Reply::Whole(whole) => (Some(whole.content_type.clone()), whole.length),
    };
    let head = Head { route, worker, queued, predicted_wait, matched_tokens, content_type, length };
    pilot.head(Ok(head), Some(entry.cost()));
    let closing = pipeline.shared.closing.clone();
    match reply {
        Reply::Stream(streamed) => {
            let relay = StreamRelay::new(entry, place, streamed, choices, hide_usage, closing).going_on(continuation);
            hand_on(relay, StreamRelay::cost, pilot).await;
        }
        Reply::Whole(whole) => hand_on(WholeRelay::new(entry, place, whole, closing), WholeRelay::cost, pilot).await,
    }
}

/// Hands an answer on to all who listen, after [`PATIENCE`] as fast as the fastest of them reads.
async fn hand_on<B>(mut relay: B, cost: fn(&B) -> Cost, pilot: &Pilot)
where
    B: http_body::Body<Data = Bytes> + Unpin,
{
    let mut patience = PATIENCE;
    loop {
        let frame = poll_fn(|context| Pin::new(&mut relay).poll_frame(context)).await;
        let facts = Some(cost(&relay));
        match frame.map(|frame| frame.map(Frame::into_data)) {
            Some(Ok(Ok(bytes))) => {
                let began = Instant::now();
                let _ = tokio::time::timeout(patience, pilot.room_for_all(bytes.len())).await;
                patience = patience.saturating_sub(began.elapsed());
                pilot.room(bytes.len()).await;
                pilot.push(bytes, facts);
            }
            Some(Ok(Err(_))) => {}
            Some(Err(_)) => return pilot.end(false, facts),
            None => return pilot.end(true, facts),
        }
    }
}

impl Joined {
    /// The answer's body, which owns the request's row.
    #[must_use]
    pub fn relay(self, entry: Entry) -> SharedRelay {
        let Self { head, listener, .. } = self;
        SharedRelay { entry, listener, stream: head.content_type.is_none(), left: head.length, over: false }
    }
}

/// An answer that others may have, too, on its way to one client.
pub struct SharedRelay {
    entry: Entry,
    listener: Listener,
    stream: bool,
    /// Bytes still to go, where known.
    left: Option<u64>,
    over: bool,
}

/// Why a document ends before its last byte.
#[derive(Debug, thiserror::Error)]
#[error("the answer broke off")]
pub struct Cut;

impl SharedRelay {
    /// Nothing more goes to the client, which has the whole answer unless `outcome` says otherwise.
    fn leave(&mut self, outcome: Option<Outcome>) {
        if std::mem::replace(&mut self.over, true) {
            return;
        }
        let Left { facts, pays, has_all } = self.listener.leave();
        let Some(cost) = facts else { return };
        self.entry.shared(&cost, pays);
        // A client may go once it has the end mark, without waiting for the end.
        let ended = (has_all && cost.outcome() != Outcome::ClientGone).then_some(cost.outcome());
        if let Some(outcome) = outcome.or(ended) {
            self.entry.end(outcome, 200);
        }
    }

    /// Ends an answer of which something is missing.
    fn cut(&mut self, message: &str) -> Result<Frame<Bytes>, Cut> {
        self.leave(Some(Outcome::Cut));
        if !self.stream {
            return Err(Cut);
        }
        let error = ApiError {
            message: message.to_owned(),
            kind: "server_error".to_owned(),
            param: None,
            code: Some("upstream_error".to_owned()),
        };
        Ok(Frame::data(openai_event(&error)))
    }
}

impl http_body::Body for SharedRelay {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        if this.over {
            return Poll::Ready(None);
        }
        let next = std::task::ready!(this.listener.poll_next(context));
        Poll::Ready(match next {
            Next::Bytes(bytes) => {
                this.left = this.left.map(|left| left.saturating_sub(bytes.len() as u64));
                // A server that knows the length does not ask for more.
                if this.left == Some(0) {
                    this.leave(None);
                }
                Some(Ok(Frame::data(bytes)))
            }
            Next::End => {
                this.leave(None);
                None
            }
            Next::Broken => Some(this.cut("the gateway is shutting down")),
            Next::Behind => Some(this.cut("the answer was read too slowly to be shared with others")),
        })
    }

    fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl Drop for SharedRelay {
    fn drop(&mut self) {
        self.leave(None);
    }
}
