//! Cuts a byte stream into server-sent events, wherever its chunks are cut.
//!
//! Line ends are `\n`, `\r\n` and `\r`, also mixed; a byte order mark at the start, comments and a missing space after
//! the colon are taken as the WHATWG standard says. The exact bytes of every event are kept, so that the events' `raw`
//! and the end of [`Splitter::finish`] together are the input, byte for byte, and so that the same input gives the same
//! events however it arrives.
//!
//! An event ends with its blank line. When that line ends in `\r`, its event waits for the next byte (or the end), since
//! a `\n` would still belong to it; after `\n` nothing is waited for, so streams as engines write them (`\n\n`) and
//! `\r\n` ones are never late.
//!
//! Cost: an event that lies in one chunk is a slice of it, without copy or allocation; one that is cut is collected into
//! one buffer. Not here: what the data mean ([`crate::stream`]).

use bytes::{Bytes, BytesMut};
use memchr::{memchr, memchr2};

/// An event, a comment or a stray blank line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The exact bytes, blank line included.
    pub raw: Bytes,
    /// Values of the `data` lines, joined by `\n`. None if there is no such line, as in a keep-alive comment.
    pub data: Option<Bytes>,
    /// Value of the last `event` line.
    pub name: Option<Bytes>,
    /// Whether it is UTF-8 and every line of it is a comment or a known field. The standard has clients skip other
    /// lines, but no engine writes any: they tell of a damaged stream.
    pub well_formed: bool,
}

/// What a stream ended with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// A whole event, whose blank line was a `\r` that could have become `\r\n`.
    Whole(Event),
    /// Bytes without their blank line, read as far as they go. The standard drops such an event; some servers omit the
    /// last line end of `data: [DONE]`.
    Cut(Event),
}

/// An event exceeds the splitter's bound. The stream cannot be read on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a server-sent event exceeds {event_bytes_max} bytes")]
pub struct TooLong {
    pub event_bytes_max: usize,
}

/// The incremental splitter.
#[derive(Debug)]
pub struct Splitter {
    event_bytes_max: usize,
    /// Begin of an event of which the rest has not arrived.
    held: BytesMut,
    /// Bytes not looked at.
    fresh: Bytes,
    line: Line,
    started: bool,
    failed: bool,
}

/// Where in a line the bytes looked at end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    /// At its begin.
    Empty,
    /// Within it.
    Begun,
    /// At the begin of the next, unless a `\n` follows, which still belongs to the last one's `\r`.
    AfterCr,
    /// As before, and that line was blank.
    AfterBlankCr,
}

impl Splitter {
    /// A splitter that holds at most `event_bytes_max` bytes of an event.
    #[must_use]
    pub fn new(event_bytes_max: usize) -> Self {
        Self {
            event_bytes_max,
            held: BytesMut::new(),
            fresh: Bytes::new(),
            line: Line::Empty,
            started: false,
            failed: false,
        }
    }

    /// Adds what arrived. Take all events before the next push: bytes left over are copied.
    pub fn push(&mut self, chunk: Bytes) {
        if self.fresh.is_empty() {
            self.fresh = chunk;
        } else {
            let mut both = BytesMut::with_capacity(self.fresh.len() + chunk.len());
            both.extend_from_slice(&self.fresh);
            both.extend_from_slice(&chunk);
            self.fresh = both.freeze();
        }
    }

    /// The next event that has arrived whole.
    ///
    /// # Errors
    /// [`TooLong`], then and on every later call.
    #[expect(clippy::should_implement_trait, reason = "None means not yet, where an iterator's None means the end")]
    pub fn next(&mut self) -> Result<Option<Event>, TooLong> {
        let end = self.line.scan(&self.fresh);
        let length = self.held.len() + end.unwrap_or(self.fresh.len());
        if self.failed || length > self.event_bytes_max {
            self.failed = true;
            return Err(TooLong { event_bytes_max: self.event_bytes_max });
        }
        let Some(end) = end else {
            self.held.extend_from_slice(&self.fresh);
            self.fresh.clear();
            return Ok(None);
        };
        self.line = Line::Empty;
        let mut raw = self.fresh.split_to(end);
        if !self.held.is_empty() {
            self.held.extend_from_slice(&raw);
            raw = self.held.split().freeze();
        }
        let event = Event::read(raw, !self.started);
        self.started = true;
        Ok(Some(event))
    }

    /// What is left when the stream has ended and [`Splitter::next`] gives nothing more.
    #[must_use]
    pub fn finish(mut self) -> Option<End> {
        self.held.extend_from_slice(&self.fresh);
        if self.held.is_empty() {
            return None;
        }
        let whole = self.line == Line::AfterBlankCr && self.fresh.is_empty();
        let event = Event::read(self.held.freeze(), !self.started);
        Some(if whole { End::Whole(event) } else { End::Cut(event) })
    }
}

impl Line {
    /// Looks on through `bytes`; the offset just after the first event's end, if it is among them.
    fn scan(&mut self, bytes: &[u8]) -> Option<usize> {
        let first = bytes.first()?;
        let mut at = usize::from(*first == b'\n' && matches!(self, Self::AfterCr | Self::AfterBlankCr));
        if *self == Self::AfterBlankCr {
            return Some(at);
        }
        let mut blank = *self != Self::Begun;
        loop {
            let rest = bytes.get(at..).unwrap_or_default();
            let Some(length) = memchr2(b'\n', b'\r', rest) else {
                *self = if rest.is_empty() && blank { Self::Empty } else { Self::Begun };
                return None;
            };
            blank &= length == 0;
            at += length + 1;
            if rest.get(length) == Some(&b'\r') {
                match bytes.get(at) {
                    Some(b'\n') => at += 1,
                    Some(_) => {}
                    None => {
                        *self = if blank { Self::AfterBlankCr } else { Self::AfterCr };
                        return None;
                    }
                }
            }
            if blank {
                return Some(at);
            }
            blank = true;
        }
    }
}

impl Event {
    fn read(raw: Bytes, first: bool) -> Self {
        const BOM: &[u8] = "\u{feff}".as_bytes();
        let mut event = Self { data: None, name: None, well_formed: std::str::from_utf8(&raw).is_ok(), raw };
        let mut joined = BytesMut::new();
        let mut rest: &[u8] = &event.raw;
        if first {
            rest = rest.strip_prefix(BOM).unwrap_or(rest);
        }
        while !rest.is_empty() {
            // A `\r\n` gives one blank line too many, which means nothing within an event.
            let (line, next) = cut(rest, memchr2(b'\n', b'\r', rest));
            rest = next;
            let (field, value) = cut(line, memchr(b':', line));
            let value = value.strip_prefix(b" ").unwrap_or(value);
            match field {
                b"event" => event.name = Some(event.raw.slice_ref(value)),
                b"data" => match &event.data {
                    None => event.data = Some(event.raw.slice_ref(value)),
                    Some(before) => {
                        if joined.is_empty() {
                            joined.extend_from_slice(before);
                        }
                        joined.extend_from_slice(b"\n");
                        joined.extend_from_slice(value);
                    }
                },
                // A comment, a blank line, and the fields that only browsers act on.
                b"" | b"id" | b"retry" => {}
                _ => event.well_formed = false,
            }
        }
        if !joined.is_empty() {
            event.data = Some(joined.freeze());
        }
        event
    }
}

/// What stands before and after the byte at `at`; all and nothing if there is none.
fn cut(bytes: &[u8], at: Option<usize>) -> (&[u8], &[u8]) {
    at.and_then(|at| Some((bytes.get(..at)?, bytes.get(at + 1..)?))).unwrap_or((bytes, &[]))
}

#[cfg(test)]
mod tests;
