//! HTTP/1.1 with a worker, on one connection without a task of its own: who waits for an answer reads the socket, so that a
//! piece of it goes from there to the client in one turn, and nothing is read for whom nobody asks.
//!
//! Bytes are read into a buffer of the thread and leave it in one copy of just their size: a connection that waits for its
//! worker holds none. Messages are framed as RFC 9112 says (section 6.3 which way, 7.1 chunks); trailers are passed over.
//!
//! Not here: more than one request at a time, upgrades.

use std::{
    cell::RefCell,
    io::{self, IoSlice},
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, Waker, ready},
};

use bytes::{Buf, Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode,
    header::{CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING},
};
use memchr::memchr;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::client::TlsStream;

/// What is read at once, and thus the longest piece of an answer.
const PIECE_BYTES_MAX: usize = 32 << 10;
/// An answer's head; and what chunks have beside their data, over a whole answer. Engines send some 300 bytes, and none.
const HEAD_BYTES_MAX: usize = 64 << 10;
const FIELDS_MAX: usize = 100;
/// Something else than HTTP shows in its first bytes.
const STATUS_LINE_BYTES: usize = 256;
/// Answers before the answer (100, 103).
const INTERIM_MAX: usize = 100;

thread_local! {
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; PIECE_BYTES_MAX].into());
}

/// A connection and what is under way on it.
pub(super) struct Http1 {
    stream: Stream,
    sending: Sending,
    /// The beginning of a head whose rest has not come.
    held: BytesMut,
    /// Whether anything came since the last request.
    heard: bool,
    /// Answers that came before the one to it.
    interim: usize,
    /// What of the body came with the head.
    first: Bytes,
    rest: Rest,
    /// Whether another request may follow.
    goes_on: bool,
}

/// The bytes' way.
pub(super) enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// A request on its way out.
#[derive(Default)]
struct Sending {
    head: Bytes,
    body: Bytes,
    begun: bool,
    flushed: bool,
}

/// What is to come of an answer's body.
#[derive(Debug)]
enum Rest {
    Nothing,
    Bytes(u64),
    Chunks(Chunks),
    UntilClosed,
    /// What came behind the last piece cannot be read.
    Damaged,
}

/// Why there is no answer.
pub(super) enum Lost {
    /// Nothing of the request was written.
    Unsent(io::Error),
    /// `unheard`: nothing came, so that it may be that the request was never seen.
    Closed {
        source: io::Error,
        unheard: bool,
    },
    Malformed(Unread),
}

/// What came is not HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unread {
    #[error("the head is no HTTP/1 head")]
    Head,
    #[error("the head is longer than {HEAD_BYTES_MAX} bytes")]
    Long,
    #[error("the head does not say how long the answer is")]
    Framing,
    #[error("the chunks of the answer are damaged")]
    Chunk,
}

impl From<Unread> for io::Error {
    fn from(why: Unread) -> Self {
        Self::new(io::ErrorKind::InvalidData, why)
    }
}

impl Http1 {
    pub(super) fn new(stream: Stream) -> Self {
        Self {
            stream,
            sending: Sending::default(),
            held: BytesMut::new(),
            heard: false,
            interim: 0,
            first: Bytes::new(),
            rest: Rest::Nothing,
            goes_on: true,
        }
    }

    /// Whether the worker neither closed it nor said anything unasked, which would be taken for the next answer.
    pub(super) fn is_ready(&mut self) -> bool {
        match &mut self.stream {
            // The kernel is asked, since what came just now may not have been told yet.
            Stream::Plain(stream) => {
                let peeked = socket2::SockRef::from(&*stream).peek(&mut [MaybeUninit::uninit()]);
                peeked.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
            }
            Stream::Tls(stream) => {
                let context = &mut Context::from_waker(Waker::noop());
                Pin::new(stream).poll_read(context, &mut ReadBuf::new(&mut [0])).is_pending()
            }
        }
    }

    /// Whether the last answer came to its end and another request may follow.
    pub(super) fn is_free(&self) -> bool {
        self.goes_on && self.is_over() && self.sending.is_done()
    }

    /// Whether all of the answer's body was given out.
    pub(super) fn is_over(&self) -> bool {
        self.first.is_empty() && matches!(self.rest, Rest::Nothing)
    }

    /// Bytes still to come of the body, at least.
    pub(super) fn expected(&self) -> u64 {
        let rest = if let Rest::Bytes(left) = self.rest { left } else { 0 };
        rest + self.first.len() as u64
    }

    /// Writes a request and reads the head of its answer, which may come before all of the request is written.
    pub(super) async fn ask(&mut self, request: &Request<Bytes>) -> Result<(StatusCode, HeaderMap), Lost> {
        self.sending = Sending { head: head_of(request), body: request.body().clone(), ..Sending::default() };
        (self.heard, self.interim) = (false, 0);
        std::future::poll_fn(|context| self.poll_head(context)).await
    }

    fn poll_head(&mut self, context: &mut Context<'_>) -> Poll<Result<(StatusCode, HeaderMap), Lost>> {
        let sent = self.sending.poll(&mut self.stream, context);
        if let Poll::Ready(Err(error)) = sent
            && !self.sending.begun
        {
            return Poll::Ready(Err(Lost::Unsent(error)));
        }
        // One that cannot be written to any more may have said why.
        loop {
            let unheard = !self.heard;
            let closed = |source| Lost::Closed { source, unheard };
            let read = BUFFER.with_borrow_mut(|buffer| {
                let mut buffer = ReadBuf::new(buffer);
                ready!(self.stream.poll_read(context, &mut buffer)).map_err(closed)?;
                match buffer.filled() {
                    [] => Poll::Ready(Err(closed(io::ErrorKind::UnexpectedEof.into()))),
                    bytes => Poll::Ready(self.take(bytes).map_err(Lost::Malformed)),
                }
            });
            if let Some(head) = ready!(read)? {
                return Poll::Ready(Ok(head));
            }
        }
    }

    /// Looks for a whole head in what came.
    fn take(&mut self, bytes: &[u8]) -> Result<Option<(StatusCode, HeaderMap)>, Unread> {
        self.heard = true;
        if self.held.is_empty() {
            return self.begin(bytes);
        }
        self.held.extend_from_slice(bytes);
        // A head ends with a line; what cannot become one is not waited for.
        if memchr(b'\n', bytes).is_none() && self.held.len() > STATUS_LINE_BYTES && self.held.len() <= HEAD_BYTES_MAX {
            return Ok(None);
        }
        let held = std::mem::take(&mut self.held);
        self.begin(&held)
    }

    /// The answer's head, and what of the body follows it. Without a whole one the bytes are held.
    fn begin(&mut self, mut bytes: &[u8]) -> Result<Option<(StatusCode, HeaderMap)>, Unread> {
        loop {
            let Some(Head { length, status, mut headers, keeps_alive, is_old }) = read_head(bytes)? else {
                if bytes.len() > HEAD_BYTES_MAX {
                    return Err(Unread::Long);
                }
                self.held.extend_from_slice(bytes);
                return Ok(None);
            };
            let after = bytes.get(length..).unwrap_or_default();
            if length > HEAD_BYTES_MAX {
                return Err(Unread::Long);
            }
            if status == StatusCode::SWITCHING_PROTOCOLS {
                return Err(Unread::Head); // nobody asked for it
            }
            if status.is_informational() {
                self.interim += 1;
                if self.interim > INTERIM_MAX {
                    return Err(Unread::Head);
                }
                bytes = after; // the answer itself follows, perhaps at once
                continue;
            }
            self.goes_on = keeps_alive;
            self.rest = framing(status, &headers, is_old)?;
            if headers.contains_key(TRANSFER_ENCODING) && headers.remove(CONTENT_LENGTH).is_some() {
                self.goes_on = false; // one of both is wrong (RFC 9112, 6.3)
            }
            self.first = self.decode(after);
            return Ok(Some((status, headers)));
        }
    }

    /// The body's next piece, nothing after the last one. After an error, too, nothing follows.
    pub(super) fn poll_piece(&mut self, context: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        if !self.first.is_empty() {
            return Poll::Ready(Some(Ok(std::mem::take(&mut self.first))));
        }
        if !self.sending.is_done() {
            // An answer that began early: the worker may still want the rest of the request.
            let _ = self.sending.poll(&mut self.stream, context);
        }
        while !matches!(self.rest, Rest::Nothing) {
            if matches!(self.rest, Rest::Damaged) {
                self.rest = Rest::Nothing;
                return Poll::Ready(Some(Err(Unread::Chunk.into())));
            }
            let piece = BUFFER.with_borrow_mut(|buffer| {
                let mut buffer = ReadBuf::new(buffer);
                ready!(self.stream.poll_read(context, &mut buffer))?;
                Poll::Ready(match (buffer.filled(), &self.rest) {
                    ([], Rest::UntilClosed) => {
                        (self.rest, self.goes_on) = (Rest::Nothing, false);
                        Ok(Bytes::new())
                    }
                    ([], _) => Err(io::ErrorKind::UnexpectedEof.into()),
                    (bytes, _) => Ok(self.decode(bytes)),
                })
            });
            match ready!(piece) {
                Ok(piece) if piece.is_empty() => {}
                Ok(piece) => return Poll::Ready(Some(Ok(piece))),
                Err(error) => {
                    (self.rest, self.goes_on) = (Rest::Nothing, false);
                    return Poll::Ready(Some(Err(error)));
                }
            }
        }
        Poll::Ready(None)
    }

    /// What of the body is in these bytes.
    fn decode(&mut self, bytes: &[u8]) -> Bytes {
        let (piece, used, over) = match &mut self.rest {
            Rest::Nothing | Rest::Damaged => (Bytes::new(), 0, true),
            Rest::UntilClosed => (Bytes::copy_from_slice(bytes), bytes.len(), false),
            Rest::Bytes(left) => {
                let here = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                *left -= here as u64;
                (Bytes::copy_from_slice(bytes.get(..here).unwrap_or_default()), here, *left == 0)
            }
            Rest::Chunks(chunks) => {
                let mut data = BytesMut::with_capacity(bytes.len());
                let Ok(used) = chunks.decode(bytes, &mut data) else {
                    (self.rest, self.goes_on) = (Rest::Damaged, false);
                    return data.freeze();
                };
                (data.freeze(), used, chunks.at == At::Over)
            }
        };
        if over {
            self.rest = Rest::Nothing;
        }
        if used < bytes.len() {
            self.goes_on = false; // it says more than it was asked
        }
        piece
    }
}

impl Sending {
    fn is_done(&self) -> bool {
        self.head.is_empty() && self.body.is_empty() && self.flushed
    }

    fn poll(&mut self, stream: &mut Stream, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.head.has_remaining() || self.body.has_remaining() {
            let written = match (self.head.is_empty(), self.body.is_empty()) {
                (false, false) => stream.poll_write(context, &[IoSlice::new(&self.head), IoSlice::new(&self.body)]),
                (false, true) => stream.poll_write(context, &[IoSlice::new(&self.head)]),
                _ => stream.poll_write(context, &[IoSlice::new(&self.body)]),
            };
            // Over TLS a part may have left all the same.
            self.begun |= matches!(stream, Stream::Tls(_));
            let written = ready!(written)?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.begun = true;
            let of_head = written.min(self.head.len());
            self.head.advance(of_head);
            self.body.advance(written - of_head);
        }
        if !self.flushed {
            ready!(stream.poll_flush(context))?;
            self.flushed = true;
            // Even an empty part holds the whole buffer that the client's request came in, for as long as a stream takes.
            (self.head, self.body) = (Bytes::new(), Bytes::new());
        }
        Poll::Ready(Ok(()))
    }
}

impl Stream {
    fn poll_read(&mut self, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }

    fn poll_write(&mut self, context: &mut Context<'_>, pieces: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        match self {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(context, pieces),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(context, pieces),
        }
    }

    fn poll_flush(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(_) => Poll::Ready(Ok(())),
            Self::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }
}

/// A request's line and fields as they are written.
fn head_of(request: &Request<Bytes>) -> Bytes {
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    let fields = request.headers();
    let length = fields.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum::<usize>();
    let mut head = BytesMut::with_capacity(64 + path.len() + length);
    for part in [request.method().as_str(), " ", path, " HTTP/1.1\r\n"] {
        head.extend_from_slice(part.as_bytes());
    }
    for (name, value) in fields {
        for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
            head.extend_from_slice(part);
        }
    }
    // A length of nothing is said only where something is expected (RFC 9110, 8.6).
    if !request.body().is_empty() || *request.method() == Method::POST {
        let length = HeaderValue::from(request.body().len());
        for part in [CONTENT_LENGTH.as_str().as_bytes(), b": ", length.as_bytes(), b"\r\n"] {
            head.extend_from_slice(part);
        }
    }
    head.extend_from_slice(b"\r\n");
    head.freeze()
}

struct Head {
    /// In bytes.
    length: usize,
    status: StatusCode,
    headers: HeaderMap,
    keeps_alive: bool,
    /// HTTP/1.0.
    is_old: bool,
}

/// The head that stands at the beginning; nothing where its end is missing.
fn read_head(bytes: &[u8]) -> Result<Option<Head>, Unread> {
    let mut response = httparse::Response::new(&mut []);
    let mut fields = [const { MaybeUninit::uninit() }; FIELDS_MAX];
    let parsed =
        httparse::ParserConfig::default().parse_response_with_uninit_headers(&mut response, bytes, &mut fields);
    let length = match parsed {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err(Unread::Head),
    };
    let status = response.code.and_then(|code| StatusCode::from_u16(code).ok()).ok_or(Unread::Head)?;
    let is_old = response.version == Some(0);
    // One copy, of which all values are parts.
    let head = Bytes::copy_from_slice(bytes.get(..length).unwrap_or_default());
    let mut headers = HeaderMap::with_capacity(response.headers.len());
    for field in response.headers.iter() {
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| Unread::Head)?;
        let start = field.value.as_ptr().addr().wrapping_sub(bytes.as_ptr().addr());
        let value = head.get(start..start.wrapping_add(field.value.len())).unwrap_or_default();
        let value = HeaderValue::from_maybe_shared(head.slice_ref(value)).map_err(|_| Unread::Head)?;
        headers.append(name, value);
    }
    let says = |word: &str| headers.get_all(CONNECTION).iter().any(|value| lists(value, word));
    let keeps_alive = if is_old { says("keep-alive") } else { !says("close") };
    Ok(Some(Head { length, status, headers, keeps_alive, is_old }))
}

fn lists(value: &HeaderValue, word: &str) -> bool {
    value.as_bytes().split(|byte| *byte == b',').any(|one| one.trim_ascii().eq_ignore_ascii_case(word.as_bytes()))
}

/// How long a body is (RFC 9112, 6.3).
fn framing(status: StatusCode, headers: &HeaderMap, is_old: bool) -> Result<Rest, Unread> {
    if status == StatusCode::NO_CONTENT || status == StatusCode::NOT_MODIFIED {
        return Ok(Rest::Nothing);
    }
    if let Some(last) = headers.get_all(TRANSFER_ENCODING).iter().next_back() {
        let last = last.as_bytes().rsplit(|byte| *byte == b',').next().unwrap_or_default();
        return match last.trim_ascii().eq_ignore_ascii_case(b"chunked") {
            _ if is_old => Err(Unread::Framing), // it had none
            true => Ok(Rest::Chunks(Chunks::default())),
            false => Ok(Rest::UntilClosed),
        };
    }
    let mut lengths =
        headers.get_all(CONTENT_LENGTH).iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    let Some(length) = lengths.next() else { return Ok(Rest::UntilClosed) };
    let length = length.trim_ascii();
    let digits = length.iter().all(u8::is_ascii_digit);
    if !digits || !lengths.all(|other| other.trim_ascii() == length) {
        return Err(Unread::Framing);
    }
    match std::str::from_utf8(length).ok().and_then(|length| length.parse().ok()) {
        Some(0) => Ok(Rest::Nothing),
        Some(length) => Ok(Rest::Bytes(length)),
        None => Err(Unread::Framing),
    }
}

/// Takes data out of chunks, wherever their bytes are cut.
#[derive(Debug, Default)]
struct Chunks {
    at: At,
    /// Of the chunk's data; before those its size as far as it is read.
    left: u64,
    /// Bytes of extensions and trailers.
    beside: usize,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum At {
    /// Before the first digit of a size.
    #[default]
    Start,
    Size,
    Extension,
    SizeEnd,
    Data,
    DataCr,
    DataLf,
    /// At the begin of a line behind the last chunk.
    TrailerStart,
    Trailer,
    LastLf,
    Over,
}

impl Chunks {
    /// Adds the data among `bytes`; how many of them belong to the message.
    fn decode(&mut self, bytes: &[u8], data: &mut BytesMut) -> Result<usize, Unread> {
        let mut rest = bytes;
        while let Some((&byte, after)) = rest.split_first() {
            rest = after;
            self.at = match (self.at, byte) {
                (At::Over, _) => return Ok(bytes.len() - after.len() - 1),
                (At::Start | At::Size, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                    let digit = char::from(byte).to_digit(16).unwrap_or(0);
                    self.left = self.left.checked_mul(16).ok_or(Unread::Chunk)? + u64::from(digit);
                    At::Size
                }
                (At::Size | At::Extension, b'\r') => At::SizeEnd,
                (At::Size, b';' | b' ' | b'\t') => At::Extension,
                (At::Extension, byte) if byte != b'\n' => {
                    self.aside(1)?;
                    At::Extension
                }
                (At::SizeEnd, b'\n') if self.left == 0 => At::TrailerStart,
                (At::SizeEnd, b'\n') => {
                    let here = usize::try_from(self.left).unwrap_or(usize::MAX).min(rest.len());
                    rest = self.pass(rest, here, data);
                    if self.left == 0 { At::DataCr } else { At::Data }
                }
                (At::Data, _) => {
                    // From this very byte on.
                    let from = bytes.get(bytes.len() - after.len() - 1..).unwrap_or_default();
                    let here = usize::try_from(self.left).unwrap_or(usize::MAX).min(from.len());
                    rest = self.pass(from, here, data);
                    if self.left == 0 { At::DataCr } else { At::Data }
                }
                (At::DataCr, b'\r') => At::DataLf,
                (At::DataLf, b'\n') => At::Start,
                (At::TrailerStart, b'\r') => At::LastLf,
                (At::LastLf, b'\n') => At::Over,
                (At::TrailerStart, b'\n') => At::Over,
                (At::Trailer, b'\n') => At::TrailerStart,
                (At::TrailerStart | At::Trailer, _) => {
                    let line = memchr(b'\n', rest).unwrap_or(rest.len());
                    self.aside(line + 1)?;
                    rest = rest.get(line..).unwrap_or_default();
                    At::Trailer
                }
                _ => return Err(Unread::Chunk),
            };
        }
        Ok(bytes.len() - rest.len())
    }

    /// Takes `here` bytes as data; what follows them.
    fn pass<'a>(&mut self, bytes: &'a [u8], here: usize, data: &mut BytesMut) -> &'a [u8] {
        let (now, after) = bytes.split_at_checked(here).unwrap_or((bytes, &[]));
        data.extend_from_slice(now);
        self.left -= now.len() as u64;
        after
    }

    fn aside(&mut self, bytes: usize) -> Result<(), Unread> {
        self.beside += bytes;
        if self.beside > HEAD_BYTES_MAX { Err(Unread::Chunk) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the pieces of a chunked body say, and how many of their bytes were the body's; nothing where it is damaged.
    fn decoded<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Option<(Vec<u8>, usize, bool)> {
        let (mut chunks, mut data, mut used) = (Chunks::default(), BytesMut::new(), 0);
        for piece in pieces {
            if chunks.at != At::Over {
                used += chunks.decode(piece, &mut data).ok()?;
            }
        }
        Some((data.to_vec(), used, chunks.at == At::Over))
    }

    #[test]
    fn chunks_are_read() {
        for (wire, data) in [
            ("0\r\n\r\n", Some("")),
            ("3\r\nabc\r\n0\r\n\r\n", Some("abc")),
            ("03;name=\"v\"\r\nabc\r\nA \r\n0123456789\r\n0\r\n\r\n", Some("abc0123456789")),
            ("1\r\na\r\n0\r\nx-trailer: yes\r\ny: z\r\n\r\n", Some("a")),
            ("1\r\na\r\n0\r\nx: y\n\n", Some("a")),
            ("\r\n", None),
            ("g\r\n", None),
            ("-1\r\n", None),
            ("1\na\r\n", None),
            ("1\r\nab", None),
            ("1\r\na\n", None),
            ("1;x\ny\r\na\r\n", None),
            ("10000000000000000\r\n", None),
        ] {
            let found = decoded([wire.as_bytes()].into_iter());
            assert_eq!(found, data.map(|data| (data.as_bytes().to_vec(), wire.len(), true)), "{wire:?}");
        }
        let endless = format!("1;{}", "x".repeat(HEAD_BYTES_MAX + 1));
        assert_eq!(decoded([endless.as_bytes()].into_iter()), None, "an extension has a bound");
        let endless = format!("0\r\n{}", "x: y\r\n".repeat(HEAD_BYTES_MAX / 4));
        assert_eq!(decoded([endless.as_bytes()].into_iter()), None, "trailers have a bound");
    }

    #[test]
    fn what_a_head_says_of_its_body() {
        let read = |head: &str| {
            let head = read_head(head.as_bytes()).ok().flatten()?;
            Some((framing(head.status, &head.headers, head.is_old).ok()?, head.keeps_alive))
        };
        for (head, expected) in [
            ("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", Some(("Bytes(5)", true))),
            ("HTTP/1.1 200\r\ncontent-length: 5, 5\r\nconnection: x, Close\r\n\r\n", Some(("Bytes(5)", false))),
            ("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", Some(("Nothing", true))),
            ("HTTP/1.1 204 X\r\ncontent-length: 5\r\n\r\n", Some(("Nothing", true))),
            ("HTTP/1.1 200 OK\r\n\r\n", Some(("UntilClosed", true))),
            ("HTTP/1.0 200 OK\r\ncontent-length: 1\r\n\r\n", Some(("Bytes(1)", false))),
            ("HTTP/1.0 200 OK\r\ncontent-length: 1\r\nconnection: keep-alive\r\n\r\n", Some(("Bytes(1)", true))),
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n", Some(("UntilClosed", true))),
            ("HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", None),
            ("HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n", None),
            ("HTTP/1.1 200 OK\r\ncontent-length: +5\r\n\r\n", None),
            ("HTTP/1.1 200 OK\r\ncontent-length: \r\n\r\n", None),
            ("HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\n", None),
        ] {
            let found = read(head).map(|(rest, keeps_alive)| (format!("{rest:?}"), keeps_alive));
            assert_eq!(found, expected.map(|(rest, keeps_alive)| (rest.to_owned(), keeps_alive)), "{head:?}");
        }
        let chunked = read("HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, Chunked\r\ncontent-length: 3\r\n\r\n");
        assert!(matches!(chunked, Some((Rest::Chunks(_), true))));
    }

    proptest! {
        #[test]
        fn chunks_may_be_cut_anywhere(
            data in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..40), 0..6),
            cut in 1_usize..9,
        ) {
            let mut wire = Vec::new();
            for chunk in &data {
                wire.extend_from_slice(format!("{:x};e\r\n", chunk.len()).as_bytes());
                wire.extend_from_slice(chunk);
                wire.extend_from_slice(b"\r\n");
            }
            wire.extend_from_slice(b"0\r\nt: v\r\n\r\n");
            let length = wire.len();
            wire.extend_from_slice(b"more");
            let found = decoded(wire.chunks(cut));
            prop_assert_eq!(found, Some((data.concat(), length, true)));
        }

        #[test]
        fn whatever_comes_is_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in 1_usize..50) {
            let _ = decoded(bytes.chunks(cut));
            if let Ok(Some(head)) = read_head(&bytes) {
                let _ = framing(head.status, &head.headers, head.is_old);
            }
        }
    }
}
