//! gRPC over the transport's HTTP/2: messages in their frames, and how a call ended.
//!
//! A call is a POST with one framed message; its answer is framed messages and, behind them, a status. Compression is
//! not offered, so that none may come.

use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header::CONTENT_TYPE, uri::PathAndQuery};
use prost::Message;

use super::{Channel, Outgoing};
use crate::Error;

/// What requests and answers say of their bodies.
pub(crate) const GRPC: &str = "application/grpc";
/// Before each message: whether it is compressed, and its length.
const HEAD: usize = 5;
const STATUS: &str = "grpc-status";

/// A message in its frame.
pub(crate) fn frame(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut out = BytesMut::with_capacity(HEAD + length);
    out.put_u8(0);
    out.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    // It cannot fail: the buffer grows.
    let _ = message.encode(&mut out);
    out.freeze()
}

/// Cuts an answer's bytes into messages.
#[derive(Debug, Default)]
pub(crate) struct Messages(BytesMut);

impl Messages {
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The next whole message.
    ///
    /// # Errors
    /// [`Error::TooLarge`] at one longer than `bytes_max`, [`Error::Unreadable`] at what is no frame.
    pub(crate) fn next(&mut self, bytes_max: usize) -> Result<Option<Bytes>, Error> {
        let Some(mut head) = self.0.get(..HEAD) else { return Ok(None) };
        let (flag, length) = (head.get_u8(), head.get_u32() as usize);
        if flag != 0 {
            return Err(Error::Unreadable);
        }
        if length > bytes_max {
            return Err(Error::TooLarge { bytes_max });
        }
        if self.0.len() - HEAD < length {
            return Ok(None);
        }
        self.0.advance(HEAD);
        Ok(Some(self.0.split_to(length).freeze()))
    }
}

/// How a call ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Status {
    /// 0 where it went well.
    pub(crate) code: u32,
    pub(crate) message: String,
}

impl Status {
    /// Whether these are the headers of a call that ended without a message: then they hold what trailers would.
    pub(super) fn is_in(headers: &HeaderMap) -> bool {
        headers.contains_key(STATUS)
    }

    /// What the trailers tell. A call without them ended for an unknown reason.
    pub(crate) fn read(trailers: Option<&HeaderMap>) -> Self {
        let text = |name| trailers.and_then(|trailers| trailers.get(name)).map(HeaderValue::as_bytes);
        let code = text(STATUS).and_then(|code| std::str::from_utf8(code).ok()?.parse().ok());
        Self { code: code.unwrap_or(2), message: unescaped(text("grpc-message").unwrap_or_default()) }
    }

    /// The status in HTTP's words.
    pub(crate) fn http(&self) -> StatusCode {
        match self.code {
            0 => StatusCode::OK,
            3 | 9 | 11 => StatusCode::BAD_REQUEST,
            4 => StatusCode::GATEWAY_TIMEOUT,
            5 => StatusCode::NOT_FOUND,
            7 => StatusCode::FORBIDDEN,
            8 => StatusCode::TOO_MANY_REQUESTS,
            12 => StatusCode::NOT_IMPLEMENTED,
            14 => StatusCode::SERVICE_UNAVAILABLE,
            16 => StatusCode::UNAUTHORIZED,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// Text with `%XX` for what a header cannot hold.
fn unescaped(text: &[u8]) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        let escaped = || u8::from_str_radix(std::str::from_utf8(after.get(..2)?).ok()?, 16).ok();
        match escaped().filter(|_| first == b'%') {
            Some(byte) => {
                out.push(byte);
                rest = after.get(2..).unwrap_or_default();
            }
            None => {
                out.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

impl Channel {
    /// Asks one question with one answer, bounded in time and size as a whole. Never sent twice.
    ///
    /// # Errors
    /// As [`Channel::get`]; [`Error::Status`] when the call ends with another status than "ok".
    pub async fn call<A: Message + Default>(
        &self,
        path: &'static str,
        question: &impl Message,
        limit: Duration,
        bytes_max: usize,
    ) -> Result<A, Error> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, const { HeaderValue::from_static(GRPC) });
        let path = PathAndQuery::from_static(path);
        let request = Outgoing { method: Method::POST, path, headers, body: frame(question) };
        super::channel::bounded(limit, async {
            let mut body = Box::pin(self.send(request)).await?.body;
            let mut messages = Messages::default();
            let mut answer = None;
            while let Some(bytes) = body.next().await {
                messages.push(&bytes?);
                if let Some(message) = messages.next(bytes_max)? {
                    answer = Some(A::decode(message).map_err(|_| Error::Unreadable)?);
                }
            }
            match Status::read(body.trailers()) {
                Status { code: 0, .. } => answer.ok_or(Error::Unreadable),
                status => Err(Error::Status { status: status.http() }),
            }
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_wherever_they_are_cut() {
        let bytes = [frame(&"é".to_owned()), frame(&String::new()), frame(&"kyōto".to_owned())].concat();
        for cut in 0..=bytes.len() {
            let mut messages = Messages::default();
            let mut read = Vec::new();
            for piece in [&bytes[..cut], &bytes[cut..]] {
                messages.push(piece);
                while let Some(message) = messages.next(100).expect("frames") {
                    read.push(String::decode(message).expect("a text"));
                }
            }
            assert_eq!(read, ["é", "", "kyōto"]);
        }
        let mut messages = Messages::default();
        messages.push(&[0, 0, 0, 1, 0]);
        assert!(matches!(messages.next(255), Err(Error::TooLarge { bytes_max: 255 })));
        let mut messages = Messages::default();
        messages.push(&[1, 0, 0, 0, 0]);
        assert!(matches!(messages.next(255), Err(Error::Unreadable)));
    }

    #[test]
    fn statuses() {
        assert_eq!(Status::read(None), Status { code: 2, message: String::new() });
        let mut trailers = HeaderMap::new();
        trailers.insert(STATUS, HeaderValue::from_static("14"));
        trailers.insert("grpc-message", HeaderValue::from_static("100%25 %C3%A9 %zz %4"));
        let status = Status::read(Some(&trailers));
        assert_eq!((status.http(), status.message.as_str()), (StatusCode::SERVICE_UNAVAILABLE, "100% é %zz %4"));
    }
}
