//! An answer on its way to the client: bytes with back-pressure, each event as soon as it is whole.
//!
//! A body owns the ledger's entry and the place at the worker; dropping it (the client left) drops the upstream
//! connection with them, which is how the engine learns of it. Events leave as the bytes they came in. What is read
//! of them: errors, finish reasons and usage. Events that already lie together leave together, which spares a system call
//! for each; none waits for one that has still to come.
//!
//! Rules of a stream: it is a success when every choice has a finish reason and no error event came; then a missing
//! `[DONE]` is added. Whatever else ends it, the client gets one error event and nothing after it, unless another worker
//! goes on with it (`continuation`).

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use forebay_backends::engines::Answer;
use forebay_proto::error::{ApiError, openai_event};
use forebay_proto::peek::Span;
use forebay_proto::splice::Edits;
use forebay_proto::sse::{self, Event, Splitter, TooLong};
use forebay_proto::stream::{self, Chunk, Completeness};
use forebay_proto::tap::{self, Tap};
use forebay_scheduler::{End, Failure};
use http_body::{Frame, SizeHint};
use tokio::time::Sleep;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::continuation::{Continuation, Rest};
use crate::dispatch::{Place, Streamed, Whole};
use crate::ledger::{Cost, Entry, Outcome};

/// How long an engine may keep a stream open after every choice has finished (for usage and `[DONE]`).
const AFTER_FINISH_MAX: Duration = Duration::from_secs(2);
/// Events in a row that are not JSON before the stream counts as garbage.
const MALFORMED_IN_A_ROW_MAX: u32 = 8;
/// Events that lie together leave together up to here.
const GLUED_BYTES_MAX: usize = 8 << 10;
const SHUTTING_DOWN: &str = "the gateway is shutting down";
const DONE: Bytes = Bytes::from_static(b"data: [DONE]\n\n");

/// A streamed answer.
pub struct StreamRelay {
    entry: Entry,
    place: Place,
    state: State,
    upstream: Option<Answer>,
    splitter: Splitter,
    first: VecDeque<Event>,
    /// The client did not ask for the usage we asked for.
    hide_usage: bool,
    reader: stream::Reader,
    completeness: Completeness,
    malformed: u32,
    after_finish: Option<Pin<Box<Sleep>>>,
    closing: Closing,
    glued: Glued,
    continuation: Option<Box<Continuation>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Events pass.
    Flowing,
    /// It broke off, and the rest is looked for.
    Seeking,
    /// The client has everything; the engine's end of the body is still awaited, so that its connection can be used
    /// again.
    Ending,
    Over,
}

impl StreamRelay {
    /// `choices` as many choices must finish; `closing` cuts the stream when the gateway's drain time is over.
    #[must_use]
    pub fn new(
        mut entry: Entry,
        place: Place,
        streamed: Streamed,
        choices: u32,
        hide_usage: bool,
        closing: CancellationToken,
    ) -> Self {
        entry.streaming(true);
        let Streamed { first, splitter, body } = streamed;
        Self {
            entry,
            place,
            state: State::Flowing,
            upstream: Some(body),
            splitter,
            first,
            hide_usage,
            reader: stream::Reader::default(),
            completeness: Completeness::new(choices),
            malformed: 0,
            after_finish: None,
            closing: Closing::new(closing),
            glued: Glued::default(),
            continuation: None,
        }
    }

    /// The same, to be gone on with where it breaks off.
    #[must_use]
    pub fn going_on(self, continuation: Option<Box<Continuation>>) -> Self {
        Self { continuation, ..self }
    }

    #[must_use]
    pub fn cost(&self) -> Cost {
        self.entry.cost()
    }

    /// What the client gets of one event.
    fn pass(&mut self, event: &Event) -> Option<Bytes> {
        if !event.well_formed {
            return self.cut("the worker sent garbage", Failure::Malformed);
        }
        let told = self.continuation.as_mut().and_then(|continuation| continuation.hear(event));
        let event = told.as_ref().unwrap_or(event);
        let Some(data) = &event.data else { return Some(event.raw.clone()) };
        match self.reader.read(data) {
            Chunk::Done if self.completeness.complete() => {
                self.succeed(State::Ending);
                Some(event.raw.clone())
            }
            Chunk::Done => self.cut("the worker ended the stream before the answer was finished", Failure::Malformed),
            Chunk::Error { error, status } => {
                let code = error.code.or_else(|| Some("upstream_error".to_owned()));
                let error = ApiError { code, ..error };
                // The request itself may be at fault.
                let is_refusal = status.is_some_and(|status| (400..500).contains(&status));
                if is_refusal {
                    Some(self.fail(&error, Failure::Status5xx))
                } else {
                    self.broke(&error, Failure::Status5xx)
                }
            }
            Chunk::Malformed => {
                self.malformed += 1;
                tracing::warn!(request = self.entry.name().as_str(), "skipped a stream event that is not JSON");
                let is_garbage = self.malformed >= MALFORMED_IN_A_ROW_MAX;
                if is_garbage { self.cut("the worker sent garbage", Failure::Malformed) } else { None }
            }
            Chunk::Delta(delta) => {
                self.malformed = 0;
                self.completeness.observe(&delta);
                if delta.has_content {
                    self.entry.produced();
                }
                self.entry.used(delta.usage);
                match delta.usage_member {
                    Some(_) if self.hide_usage && delta.usage_only => None,
                    Some(member) if self.hide_usage => Some(without(event, data, member)),
                    _ => Some(event.raw.clone()),
                }
            }
        }
    }

    /// The next whole event that has come, if any.
    fn event(&mut self) -> Result<Option<Event>, TooLong> {
        match self.first.pop_front() {
            Some(event) => Ok(Some(event)),
            None => self.splitter.next(),
        }
    }

    /// The upstream has ended; says what the client still has to get.
    fn finish(&mut self) -> Bytes {
        let splitter = std::mem::replace(&mut self.splitter, Splitter::new(0));
        let last = match splitter.finish() {
            Some(sse::End::Whole(event)) => Some(event),
            // Some servers leave out the last line end; half an event is none.
            Some(sse::End::Cut(event))
                if event.data.as_deref().is_some_and(|d| stream::read(d) != Chunk::Malformed) =>
            {
                Some(Event { raw: [&event.raw, &b"\n\n"[..]].concat().into(), ..event })
            }
            _ => None,
        };
        let mut bytes = last.and_then(|event| self.pass(&event)).unwrap_or_default();
        if self.state == State::Flowing {
            let end = if self.completeness.complete() {
                self.succeed(State::Over);
                DONE
            } else {
                let broke_off = "the worker broke off before the answer was finished";
                self.cut(broke_off, Failure::Reset).unwrap_or_default()
            };
            bytes = if bytes.is_empty() { end } else { [bytes, end].concat().into() };
        }
        if self.state != State::Seeking {
            self.over();
        }
        bytes
    }

    fn succeed(&mut self, next: State) {
        self.entry.end(Outcome::Completed, 200);
        let before = self.continuation.as_ref().map_or(0, |continuation| continuation.tokens_before());
        self.place.ended(finished(&self.entry, before));
        self.state = next;
    }

    fn cut(&mut self, message: &str, failure: Failure) -> Option<Bytes> {
        self.broke(&broken_off(message), failure)
    }

    /// The stream cannot go on as it is: what the client is told, unless the rest may be had elsewhere.
    fn broke(&mut self, error: &ApiError, failure: Failure) -> Option<Bytes> {
        let Some(continuation) = self.continuation.as_mut().filter(|_| !self.completeness.complete()) else {
            return Some(self.fail(error, failure));
        };
        let nothing = self.place.given_back();
        let place = std::mem::replace(&mut self.place, nothing);
        match continuation.seek(place, (error.clone(), failure), self.entry.row().attempts) {
            Ok(()) => {
                self.over();
                self.state = State::Seeking;
                None
            }
            Err(place) => {
                self.place = place;
                Some(self.fail(error, failure))
            }
        }
    }

    /// Goes on where the rest of the answer is, once that is known; or says what the client is told instead.
    fn poll_rest(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let found = match &mut self.continuation {
            Some(continuation) => continuation.poll(context, &mut self.entry),
            None => Poll::Ready(None),
        };
        match found {
            Poll::Pending if self.closing.poll(context).is_ready() => {
                Poll::Ready(Some(self.fail(&broken_off(SHUTTING_DOWN), Failure::Reset)))
            }
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(Rest::Streamed(place, streamed))) => {
                let Streamed { first, splitter, body } = *streamed;
                (self.place, self.first, self.splitter, self.upstream) = (place, first, splitter, Some(body));
                (self.state, self.malformed) = (State::Flowing, 0);
                Poll::Ready(None)
            }
            Poll::Ready(Some(Rest::Ended(events))) => {
                (self.first, self.state, self.continuation) = (events, State::Flowing, None);
                Poll::Ready(None)
            }
            Poll::Ready(Some(Rest::None(error, failure))) => Poll::Ready(Some(self.fail(&error, failure))),
            Poll::Ready(None) => Poll::Ready(Some(self.fail(&broken_off("the answer broke off"), Failure::Reset))),
        }
    }

    fn fail(&mut self, error: &ApiError, failure: Failure) -> Bytes {
        self.entry.end(Outcome::Cut, 200);
        self.place.ended(End::Failed(failure));
        self.over();
        openai_event(error)
    }

    /// Nothing more goes to the client. An engine that is not at its end loses the connection.
    fn over(&mut self) {
        self.state = State::Over;
        self.upstream = None;
        self.first.clear();
    }

    /// What leaves next: all that is there now.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if !self.first.is_empty() {
            return self.poll_event(context); // it leaves with the head
        }
        while self.glued.len() < GLUED_BYTES_MAX {
            match self.poll_event(context) {
                Poll::Ready(Some(bytes)) => self.glued.push(bytes),
                Poll::Ready(None) if self.glued.len() == 0 => return Poll::Ready(None),
                Poll::Pending if self.glued.len() == 0 => return Poll::Pending,
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        Poll::Ready(Some(self.glued.take()))
    }

    fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        loop {
            if self.state == State::Seeking {
                match std::task::ready!(self.poll_rest(context)) {
                    Some(last) => return Poll::Ready(Some(last)),
                    None => continue,
                }
            }
            if self.state == State::Flowing {
                let passed = match self.event() {
                    Ok(Some(event)) => Some(self.pass(&event)),
                    Ok(None) => None,
                    Err(_) => Some(self.cut("the worker sent an event without end", Failure::Malformed)),
                };
                match passed {
                    Some(Some(bytes)) => return Poll::Ready(Some(bytes)),
                    Some(None) => continue,
                    None => {}
                }
            }
            let Some(upstream) = &mut self.upstream else { return Poll::Ready(None) };
            match (upstream.poll_data(context), self.state) {
                (Poll::Pending, _) => return self.poll_limits(context),
                (Poll::Ready(Some(Ok(bytes))), State::Flowing) => self.splitter.push(bytes),
                (Poll::Ready(Some(Ok(_))), _) => {}
                (Poll::Ready(None), State::Flowing) => {
                    let last = self.finish();
                    if !last.is_empty() {
                        return Poll::Ready(Some(last));
                    }
                }
                (Poll::Ready(Some(Err(error))), State::Flowing) => {
                    if let Some(last) = self.broken(&error) {
                        return Poll::Ready(Some(last));
                    }
                }
                (Poll::Ready(_), _) => self.over(),
            }
        }
    }

    /// Nothing is there to send: the clocks that end a stream all the same.
    fn poll_limits(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if self.state == State::Flowing && self.closing.poll(context).is_ready() {
            return Poll::Ready(Some(self.fail(&broken_off(SHUTTING_DOWN), Failure::Reset)));
        }
        if self.completeness.complete() {
            let sleep = self.after_finish.get_or_insert_with(|| Box::pin(tokio::time::sleep(AFTER_FINISH_MAX)));
            if sleep.as_mut().poll(context).is_ready() {
                if self.state == State::Flowing {
                    return Poll::Ready(Some(self.finish()));
                }
                self.over();
                return Poll::Ready(None);
            }
        }
        Poll::Pending
    }

    fn broken(&mut self, error: &forebay_backends::Error) -> Option<Bytes> {
        if self.completeness.complete() {
            return Some(self.finish());
        }
        let message = match error {
            forebay_backends::Error::Timeout { .. } => "the worker went silent before the answer was finished",
            _ => "the connection to the worker broke before the answer was finished",
        };
        self.cut(message, error.failure())
    }
}

impl http_body::Body for StreamRelay {
    type Data = Bytes;
    type Error = forebay_backends::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        self.get_mut().poll(context).map(|bytes| bytes.map(|bytes| Ok(Frame::data(bytes))))
    }
}

/// Bytes that leave together; copied only where there are several pieces.
#[derive(Default)]
struct Glued {
    first: Bytes,
    all: BytesMut,
}

impl Glued {
    fn len(&self) -> usize {
        self.first.len().max(self.all.len())
    }

    fn push(&mut self, bytes: Bytes) {
        if self.first.is_empty() {
            self.first = bytes;
            return;
        }
        if self.all.is_empty() {
            self.all.reserve(GLUED_BYTES_MAX);
            self.all.extend_from_slice(&self.first);
        }
        self.all.extend_from_slice(&bytes);
    }

    fn take(&mut self) -> Bytes {
        let first = std::mem::take(&mut self.first);
        if self.all.is_empty() { first } else { std::mem::take(&mut self.all).freeze() }
    }
}

/// The end of the gateway's drain time, watched from when there is first nothing to send.
struct Closing {
    token: CancellationToken,
    watch: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
}

impl Closing {
    fn new(token: CancellationToken) -> Self {
        Self { token, watch: None }
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let watch = self.watch.get_or_insert_with(|| Box::pin(self.token.clone().cancelled_owned()));
        watch.as_mut().poll(context)
    }
}

/// The event again without the member that only our asking for usage put there.
fn without(event: &Event, data: &Bytes, member: Span) -> Bytes {
    let mut edits = Edits::new();
    let at = data.as_ptr().addr().wrapping_sub(event.raw.as_ptr().addr());
    if at < event.raw.len() {
        edits.replace(at + member.start..at + member.end, Bytes::new());
        return edits.apply(&event.raw);
    }
    // Data of several lines were joined, and are no part of the event's bytes.
    edits.replace(member, Bytes::new());
    let mut raw = BytesMut::with_capacity(event.raw.len());
    for line in edits.apply(data).split(|byte| *byte == b'\n') {
        raw.extend_from_slice(b"data: ");
        raw.extend_from_slice(line);
        raw.extend_from_slice(b"\n");
    }
    raw.extend_from_slice(b"\n");
    raw.freeze()
}

fn broken_off(message: &str) -> ApiError {
    ApiError {
        message: message.to_owned(),
        kind: "server_error".to_owned(),
        param: None,
        code: Some("upstream_error".to_owned()),
    }
}

/// The end of an answer that is complete, with the tokens that its row says but for those of workers before.
fn finished(entry: &Entry, before: u32) -> End {
    let row = entry.row();
    End::Finished {
        prompt_tokens: row.prompt_tokens,
        cached_tokens: row.cached_tokens,
        output_tokens: row.output_tokens.saturating_sub(before),
    }
}

/// An answer that is one JSON document.
pub struct WholeRelay {
    entry: Entry,
    /// Until the worker is done with it.
    place: Option<Place>,
    head: VecDeque<Bytes>,
    upstream: Option<Answer>,
    /// `None` where the usage is read already.
    tap: Option<Tap>,
    /// Bytes still to go, where known.
    left: Option<u64>,
    closing: Closing,
}

/// Why a whole answer ends before its last byte.
#[derive(Debug, thiserror::Error)]
pub enum Cut {
    #[error(transparent)]
    Worker(#[from] forebay_backends::Error),
    #[error("the gateway is shutting down")]
    Closing,
}

impl WholeRelay {
    /// `closing` cuts the answer when the gateway's drain time is over.
    #[must_use]
    pub fn new(mut entry: Entry, place: Place, whole: Whole, closing: CancellationToken) -> Self {
        let Whole { mut head, rest, length, .. } = whole;
        let tap = match (&rest, &*head.make_contiguous()) {
            (None, [answer]) => {
                entry.used(tap::of_whole(answer));
                None
            }
            (None, pieces) => {
                let mut tap = Tap::new();
                pieces.iter().for_each(|piece| tap.feed(piece));
                entry.used(tap.finish());
                None
            }
            (Some(_), _) => Some(Tap::new()),
        };
        let closing = Closing::new(closing);
        let mut relay = Self { entry, place: Some(place), head, upstream: rest, tap, left: length, closing };
        if relay.upstream.is_none() {
            // Its worker is free, however long the client takes.
            relay.left_by_worker(finished(&relay.entry, 0));
        }
        if relay.is_all() {
            relay.complete();
        }
        relay
    }

    #[must_use]
    pub fn cost(&self) -> Cost {
        self.entry.cost()
    }

    /// Whether the client has all of it. A server that knows the length does not ask for more.
    fn is_all(&self) -> bool {
        self.left == Some(0) || (self.head.is_empty() && self.upstream.is_none())
    }

    fn passed(&mut self, bytes: Bytes) -> Frame<Bytes> {
        if let Some(tap) = &mut self.tap {
            tap.feed(&bytes);
        }
        self.left = self.left.map(|left| left.saturating_sub(bytes.len() as u64));
        if self.is_all() {
            self.complete();
        }
        Frame::data(bytes)
    }

    fn complete(&mut self) {
        self.entry.used(self.tap.take().and_then(Tap::finish));
        self.entry.end(Outcome::Completed, 200);
        self.left_by_worker(finished(&self.entry, 0));
    }

    fn left_by_worker(&mut self, end: End) {
        if let Some(mut place) = self.place.take() {
            place.ended(end);
        }
    }

    /// The status line is out: only a cut connection tells the client that this is not the whole answer.
    fn cut(&mut self, end: End) {
        self.entry.end(Outcome::Cut, 200);
        self.left_by_worker(end);
        self.upstream = None;
    }
}

impl http_body::Body for WholeRelay {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        if let Some(bytes) = this.head.pop_front() {
            return Poll::Ready(Some(Ok(this.passed(bytes))));
        }
        let Some(upstream) = &mut this.upstream else { return Poll::Ready(None) };
        match upstream.poll_data(context) {
            Poll::Pending if this.closing.poll(context).is_ready() => {
                this.cut(End::Cancelled);
                Poll::Ready(Some(Err(Cut::Closing)))
            }
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(Ok(bytes))) => Poll::Ready(Some(Ok(this.passed(bytes)))),
            Poll::Ready(Some(Err(error))) => {
                this.cut(End::Failed(error.failure()));
                Poll::Ready(Some(Err(error.into())))
            }
            Poll::Ready(None) => {
                this.upstream = None;
                if this.left.is_none() {
                    this.complete();
                }
                Poll::Ready(None)
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
