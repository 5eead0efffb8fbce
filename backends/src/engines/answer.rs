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
use memchr::memchr;

use crate::{Error, transport::Body};

/// Longest event or line: a chunk with the log probabilities of many tokens is some 100 KiB.
const EVENT_BYTES_MAX: usize = 8 << 20;
/// Longest whole answer that is translated; it is held as a whole.
const WHOLE_BYTES_MAX: usize = 64 << 20;

/// Answers up to this length are translated where they are: some 50 µs of JSON.
const INLINE_BYTES_MAX: usize = 8 << 10;

/// How one engine's answers become OpenAI's.
pub(super) trait Translator: Send {
    /// One event's data, or one line; adds what OpenAI's stream would have to `out`. False: it goes on as it came.
    fn event(&mut self, data: &[u8], out: &mut Vec<u8>) -> bool;

    /// The answer has ended; adds what is still owed.
    fn end(&mut self, out: &mut Vec<u8>) {
        let _ = out;
    }

    /// A whole answer. `None`: it is none that can be read, or tells of a failure.
    fn whole(&mut self, body: &Bytes) -> Option<Bytes>;

    /// What it means that [`Translator::whole`] gave nothing.
    fn refused(&self) -> Error {
        Error::Unreadable
    }

    /// Whether a stream is lines of JSON in place of server-sent events.
    fn lines(&self) -> bool {
        false
    }
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
}

impl fmt::Debug for Translation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Translation")
    }
}

impl Translation {
    pub(super) fn new(translator: impl Translator + 'static) -> Self {
        let pieces = if translator.lines() {
            Pieces::Lines(BytesMut::new())
        } else {
            Pieces::Events(Splitter::new(EVENT_BYTES_MAX))
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
        }
        Ok(out.into())
    }

    /// The stream has ended; gives what is still owed.
    pub fn finish(mut self) -> Bytes {
        let mut out = Vec::new();
        match self.pieces {
            Pieces::Events(splitter) => match splitter.finish() {
                Some(sse::End::Whole(event) | sse::End::Cut(event)) => pass(&mut *self.translator, &event, &mut out),
                None => {}
            },
            Pieces::Lines(line) => pass_line(&mut *self.translator, &line, &mut out),
        }
        self.translator.end(&mut out);
        out.into()
    }

    /// A whole answer in OpenAI's shape.
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

    /// Whether the engine streams lines of JSON, which become events here.
    #[must_use]
    pub fn is_lines(&self) -> bool {
        self.translation.as_ref().is_some_and(|translation| translation.translator.lines())
    }

    /// The next piece, `None` after the last one. After an error, too, `None` follows.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
        loop {
            let Some(body) = &mut self.body else { return Poll::Ready(None) };
            let Some(translation) = &mut self.translation else { return body.poll_data(cx) };
            match body.poll_data(cx) {
                Poll::Ready(Some(Ok(bytes))) => match translation.push(bytes) {
                    Ok(bytes) if bytes.is_empty() => {}
                    Ok(bytes) => return Poll::Ready(Some(Ok(bytes))),
                    Err(error) => {
                        self.body = None;
                        return Poll::Ready(Some(Err(error)));
                    }
                },
                Poll::Ready(None) => {
                    self.body = None;
                    let last = self.translation.take().map(Translation::finish).filter(|last| !last.is_empty());
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
