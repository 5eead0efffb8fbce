//! An engine's answer in OpenAI's shape: as it came, or translated on its way.
//!
//! A [`Translation`] is given the bytes of an answer wherever they are cut, and gives those that OpenAI's wire would have.
//! It touches only what it knows: an event that it does not understand goes on as it came, to be judged as any other.

use std::{
    fmt,
    future::poll_fn,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use forebay_proto::sse::{self, Splitter};
use http::HeaderMap;
use memchr::memchr;

use crate::{
    Error,
    transport::{
        Body,
        grpc::{Messages, Status},
    },
};

/// Longest event or line: a chunk with the log probabilities of many tokens is some 100 KiB.
const EVENT_BYTES_MAX: usize = 8 << 20;
/// Longest whole answer that is translated; it is held as a whole.
const WHOLE_BYTES_MAX: usize = 64 << 20;

/// Answers up to this length are translated where they are: some 50 µs of JSON.
const INLINE_BYTES_MAX: usize = 8 << 10;

/// How one engine's answers become OpenAI's.
pub(super) trait Translator: Send {
    /// One event's data, one line, or one message; adds what OpenAI's stream would have to `out`. False: it goes on as
    /// it came.
    fn event(&mut self, data: &[u8], out: &mut Vec<u8>) -> bool;

    /// The answer has ended; adds what is still owed.
    fn end(&mut self, out: &mut Vec<u8>) {
        let _ = out;
    }

    /// A gRPC call has ended, this way; adds what is owed for a failure. Whether all came that should have is another
    /// question.
    fn status(&mut self, status: Status, out: &mut Vec<u8>) {
        let _ = (status, out);
    }

    /// Whether the answer is complete and nothing more is wanted of the engine.
    fn is_done(&self) -> bool {
        false
    }

    /// A whole answer. `None`: it is none that can be read, or tells of a failure. Of messages `body` is what
    /// [`Translator::event`] and the like added.
    fn whole(&mut self, body: &Bytes) -> Option<Bytes>;

    /// What it means that [`Translator::whole`] gave nothing.
    fn refused(&self) -> Error {
        Error::Unreadable
    }

    /// What an answer is made of.
    fn wire(&self) -> Wire {
        Wire::Events
    }
}

/// What an answer is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wire {
    /// Server-sent events; a whole answer is one document.
    Events,
    /// Lines of JSON; a whole answer is one document.
    Lines,
    /// gRPC's messages, also where the answer is wanted whole.
    Messages,
}

/// Makes one answer of an engine OpenAI's.
pub struct Translation {
    translator: Box<dyn Translator>,
    pieces: Pieces,
}

/// What cuts a stream's bytes into what the translator reads.
enum Pieces {
    Events(Splitter),
    Lines(BytesMut),
    Messages(Messages),
}

impl fmt::Debug for Translation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Translation")
    }
}

impl Translation {
    pub(super) fn new(translator: impl Translator + 'static) -> Self {
        let pieces = match translator.wire() {
            Wire::Events => Pieces::Events(Splitter::new(EVENT_BYTES_MAX)),
            Wire::Lines => Pieces::Lines(BytesMut::new()),
            Wire::Messages => Pieces::Messages(Messages::default()),
        };
        Self { translator: Box::new(translator), pieces }
    }

    /// More bytes of a stream; gives what OpenAI's would have by now.
    ///
    /// # Errors
    /// [`Error::TooLarge`] at an event without end.
    pub fn push(&mut self, bytes: Bytes) -> Result<Bytes, Error> {
        let too_large = Error::TooLarge { bytes_max: EVENT_BYTES_MAX };
        let mut out = Vec::new();
        match &mut self.pieces {
            Pieces::Events(splitter) => {
                splitter.push(bytes);
                loop {
                    match splitter.next() {
                        Ok(Some(event)) => pass(&mut *self.translator, &event, &mut out),
                        Ok(None) => break,
                        Err(_) => return Err(too_large),
                    }
                }
            }
            Pieces::Lines(held) => {
                held.extend_from_slice(&bytes);
                while let Some(end) = memchr(b'\n', held) {
                    let line = held.split_to(end + 1);
                    pass_line(&mut *self.translator, &line, &mut out);
                }
                if held.len() > EVENT_BYTES_MAX {
                    return Err(too_large);
                }
            }
            Pieces::Messages(messages) => {
                messages.push(&bytes);
                while !self.translator.is_done()
                    && let Some(message) = messages.next(EVENT_BYTES_MAX)?
                {
                    if !self.translator.event(&message, &mut out) {
                        return Err(Error::Unreadable);
                    }
                }
            }
        }
        Ok(out.into())
    }

    /// The stream has ended, with these trailers; gives what is still owed.
    pub fn finish(mut self, trailers: Option<&HeaderMap>) -> Bytes {
        let mut out = Vec::new();
        self.close(trailers, &mut out);
        out.into()
    }

    fn close(&mut self, trailers: Option<&HeaderMap>, out: &mut Vec<u8>) {
        match std::mem::replace(&mut self.pieces, Pieces::Lines(BytesMut::new())) {
            Pieces::Events(splitter) => match splitter.finish() {
                Some(sse::End::Whole(event) | sse::End::Cut(event)) => pass(&mut *self.translator, &event, out),
                None => {}
            },
            Pieces::Lines(line) => pass_line(&mut *self.translator, &line, out),
            Pieces::Messages(_) => self.translator.status(Status::read(trailers), out),
        }
        self.translator.end(out);
    }

    /// A whole answer in OpenAI's shape, from the engine's document.
    ///
    /// # Errors
    /// [`Error::Unreadable`] when it is none that can be read, [`Error::Status`] when it tells of a failure.
    pub fn whole(mut self, body: &Bytes) -> Result<Bytes, Error> {
        self.translator.whole(body).ok_or_else(|| self.translator.refused())
    }
}

fn pass(translator: &mut dyn Translator, event: &sse::Event, out: &mut Vec<u8>) {
    let translated = event.well_formed && event.data.as_ref().is_some_and(|data| translator.event(data, out));
    if !translated {
        out.extend_from_slice(&event.raw);
    }
}

fn pass_line(translator: &mut dyn Translator, line: &[u8], out: &mut Vec<u8>) {
    let line = line.trim_ascii();
    if !line.is_empty() && !translator.event(line, out) {
        event(out, line);
    }
}

/// Adds an event with this data.
pub(super) fn event(out: &mut Vec<u8>, data: impl AsRef<[u8]>) {
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(data.as_ref());
    out.extend_from_slice(b"\n\n");
}

/// The body of an answer, in OpenAI's shape.
pub struct Answer {
    /// `None` once it ended.
    body: Option<Body>,
    translation: Option<Translation>,
}

impl Answer {
    #[must_use]
    pub fn new(body: Body, translation: Option<Translation>) -> Self {
        Self { body: Some(body), translation }
    }

    /// Whether the engine streams something else than events, which becomes events here.
    #[must_use]
    pub fn becomes_events(&self) -> bool {
        self.wire().is_some_and(|wire| wire != Wire::Events)
    }

    fn wire(&self) -> Option<Wire> {
        self.translation.as_ref().map(|translation| translation.translator.wire())
    }

    /// The next piece, `None` after the last one. After an error, too, `None` follows.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
        loop {
            let Some(body) = &mut self.body else { return Poll::Ready(None) };
            let Some(translation) = &mut self.translation else { return body.poll_data(cx) };
            match body.poll_data(cx) {
                Poll::Ready(Some(Ok(bytes))) => match translation.push(bytes) {
                    Ok(bytes) => {
                        if translation.translator.is_done() {
                            // What the engine would still say is not waited for: it may stop.
                            self.body = None;
                        }
                        if !bytes.is_empty() {
                            return Poll::Ready(Some(Ok(bytes)));
                        }
                    }
                    Err(error) => {
                        self.body = None;
                        return Poll::Ready(Some(Err(error)));
                    }
                },
                Poll::Ready(None) => {
                    let finish = |translation: Translation| translation.finish(body.trailers());
                    let last = self.translation.take().map(finish).filter(|last| !last.is_empty());
                    self.body = None;
                    return Poll::Ready(last.map(Ok));
                }
                other => return other,
            }
        }
    }

    /// The next piece, `None` after the last one. Cancel-safe: no byte is lost when the future is dropped.
    pub async fn next(&mut self) -> Option<Result<Bytes, Error>> {
        poll_fn(|cx| self.poll_data(cx)).await
    }

    /// All of an answer that is translated as a whole; one that needs no translation is given back.
    ///
    /// # Errors
    /// As [`Body::collect`] and [`Translation::whole`].
    pub async fn translated(self) -> Result<Result<Bytes, Self>, Error> {
        match self {
            Self { body: Some(body), translation: Some(translation) }
                if translation.translator.wire() == Wire::Messages =>
            {
                messages(body, translation).await.map(Ok)
            }
            Self { body: Some(body), translation: Some(translation) } => {
                let whole = body.collect(WHOLE_BYTES_MAX).await?;
                if whole.len() <= INLINE_BYTES_MAX {
                    return translation.whole(&whole).map(Ok);
                }
                let translating = tokio::task::spawn_blocking(move || translation.whole(&whole));
                translating.await.map_err(|_| Error::Unreadable)?.map(Ok)
            }
            plain => Ok(Err(plain)),
        }
    }
}

/// Reads messages to the end of what is wanted of them.
async fn messages(mut body: Body, mut translation: Translation) -> Result<Bytes, Error> {
    let mut out = BytesMut::new();
    while !translation.translator.is_done() {
        let Some(bytes) = body.next().await else {
            let mut last = Vec::new();
            translation.close(body.trailers(), &mut last);
            out.extend_from_slice(&last);
            break;
        };
        out.extend_from_slice(&translation.push(bytes?)?);
        if out.len() > WHOLE_BYTES_MAX {
            return Err(Error::TooLarge { bytes_max: WHOLE_BYTES_MAX });
        }
    }
    translation.whole(&out.freeze())
}
