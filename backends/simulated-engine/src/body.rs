//! What is sent: whole answers and streams of events, and the faults that happen to them on the way.
//!
//! A stream's events are sent as they come, one HTTP chunk each. Dropping a body drops its source, and with it the
//! sequences behind it.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use http::{HeaderMap, HeaderValue};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use serde_json::{Value, json};

use crate::{
    faults::{Mid, MidKind},
    server::Open,
};

pub(crate) type Body = UnsyncBoxBody<Bytes, Cut>;

/// Ends a body in the middle; the HTTP library then closes the connection.
#[derive(Debug, thiserror::Error)]
#[error("cut by a fault")]
pub(crate) struct Cut;

pub(crate) type Events = Pin<Box<dyn Stream<Item = Bytes> + Send>>;

/// A comment line; carries no event.
const KEEP_ALIVE: Bytes = Bytes::from_static(b": keep-alive\n\n");

/// Bytes that are neither an event nor UTF-8.
const GARBAGE: Bytes = Bytes::from_static(b"data: {\"id\":\"\xff\xfe\x00, \"choices\": [[[}\n\n\x80\x81 no event\n\n");

/// How a stream ends when the engine dies under it.
pub(crate) enum Death {
    /// With these last events.
    Events(Vec<Bytes>),
    /// Without a word.
    Cut,
}

/// How a body is sent.
pub(crate) struct Sending {
    pub(crate) mid: Option<Mid>,
    /// Silence after which a comment is sent.
    pub(crate) keep_alive: Option<Duration>,
    /// Set to end the connection with a reset.
    pub(crate) reset: Arc<AtomicBool>,
    /// Whether gRPC's "ok" comes behind it.
    pub(crate) status: bool,
    /// Counts the request as finished or left.
    pub(crate) open: Open,
}

/// A body that is there at once, with faults that cut it in half.
pub(crate) fn whole(bytes: Bytes, sending: Sending) -> Body {
    let Sending { mid, reset, status, mut open, .. } = sending;
    let half = bytes.slice(..bytes.len() / 2);
    match mid.map(|mid| mid.kind) {
        Some(MidKind::Garbage) => whole_of(GARBAGE, open),
        Some(MidKind::Abort) => whole_of(aborted(&bytes).unwrap_or(bytes), open),
        Some(kind @ (MidKind::Stall | MidKind::Cut { .. })) => {
            let steps = stream::unfold((Some(half), open), move |(half, open)| {
                let reset = Arc::clone(&reset);
                async move {
                    match half {
                        Some(half) => Some((Ok(Frame::data(half)), (None, open))),
                        None => Some((end(kind, &reset).await, (None, open))),
                    }
                }
            });
            // The declared length stays that of the whole answer.
            BodyExt::boxed_unsync(StreamBody::new(steps))
        }
        Some(MidKind::Error) | None => {
            open.complete();
            if status {
                let frames = [Ok(Frame::data(bytes)), Ok(Frame::trailers(ok_status()))];
                return BodyExt::boxed_unsync(StreamBody::new(stream::iter(frames)));
            }
            whole_of(bytes, open)
        }
    }
}

/// What stands behind the messages of a call that went well.
fn ok_status() -> HeaderMap {
    HeaderMap::from_iter([(http::HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"))])
}

fn whole_of(bytes: Bytes, mut open: Open) -> Body {
    open.complete();
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

/// What OpenAI's dialect says, a whole answer or one event's data, cut short: nothing said, for the reason `abort`.
fn aborted(json: &[u8]) -> Option<Bytes> {
    let mut said: Value = serde_json::from_slice(json).ok()?;
    for choice in said.get_mut("choices")?.as_array_mut()? {
        choice["finish_reason"] = json!("abort");
        for (said, nothing) in [("delta", json!({})), ("text", json!(""))] {
            if let Some(said) = choice.get_mut(said) {
                *said = nothing;
            }
        }
    }
    Some(said.to_string().into())
}

/// The last events of a stream that ends so in place of this one.
fn aborted_events(event: &[u8]) -> Option<Bytes> {
    let data = aborted(event.strip_prefix(b"data: ")?.trim_ascii_end())?;
    Some([b"data: ", &*data, b"\n\n", &*crate::vllm::stream::DONE].concat().into())
}

/// A body of events.
pub(crate) fn events(source: Events, death: Death, sending: Sending) -> Body {
    let (death, dies_cut) = match death {
        Death::Events(events) => (events, false),
        Death::Cut => (Vec::new(), true),
    };
    let state =
        Sender { source, death: death.into_iter(), dies_cut, sent: 0, phase: Phase::Running, ended: false, sending };
    let frames = stream::unfold(state, |mut state| async move { Some((state.next().await?, state)) });
    BodyExt::boxed_unsync(StreamBody::new(frames))
}

struct Sender {
    source: Events,
    death: std::vec::IntoIter<Bytes>,
    dies_cut: bool,
    sent: u32,
    phase: Phase,
    ended: bool,
    sending: Sending,
}

#[derive(Clone, Copy, PartialEq)]
enum Phase {
    Running,
    Stalled,
    Dying,
}

impl Sender {
    async fn next(&mut self) -> Option<Result<Frame<Bytes>, Cut>> {
        if let Some(mid) = self.sending.mid.filter(|mid| mid.after <= self.sent) {
            self.sending.mid = None;
            match mid.kind {
                MidKind::Stall => self.phase = Phase::Stalled,
                MidKind::Error => self.phase = Phase::Dying,
                MidKind::Garbage => return Some(Ok(Frame::data(GARBAGE))),
                MidKind::Abort => {
                    let event = self.source.next().await?;
                    self.phase = Phase::Dying;
                    self.death = Vec::new().into_iter();
                    return Some(Ok(Frame::data(aborted_events(&event).unwrap_or(event))));
                }
                MidKind::Cut { .. } => return Some(end(mid.kind, &self.sending.reset).await),
            }
        }
        let event = match self.phase {
            Phase::Dying if self.dies_cut => return Some(Err(Cut)),
            Phase::Dying => self.death.next(),
            Phase::Stalled => {
                silence(self.sending.keep_alive).await;
                return Some(Ok(Frame::data(KEEP_ALIVE)));
            }
            Phase::Running => match self.sending.keep_alive {
                // Cancelling `next` loses nothing: what it awaits is kept in the stream.
                Some(silence) => match tokio::time::timeout(silence, self.source.next()).await {
                    Ok(event) => event,
                    Err(_) => return Some(Ok(Frame::data(KEEP_ALIVE))),
                },
                None => self.source.next().await,
            },
        };
        match event {
            Some(event) => {
                self.sent += 1;
                Some(Ok(Frame::data(event)))
            }
            None => {
                self.sending.open.complete();
                let status = self.sending.status && !std::mem::replace(&mut self.ended, true);
                status.then(|| Ok(Frame::trailers(ok_status())))
            }
        }
    }
}

/// Waits as long as a stalled stream is silent.
async fn silence(keep_alive: Option<Duration>) {
    match keep_alive {
        Some(silence) => tokio::time::sleep(silence).await,
        None => std::future::pending().await,
    }
}

/// Ends a body as a fault says: never, or by an error.
async fn end(kind: MidKind, reset: &AtomicBool) -> Result<Frame<Bytes>, Cut> {
    if kind == MidKind::Stall {
        silence(None).await;
    }
    // What was sent before is flushed while this waits.
    tokio::task::yield_now().await;
    reset.store(matches!(kind, MidKind::Cut { reset: true }), Ordering::Relaxed);
    Err(Cut)
}
