//! Reading a request's body within its bounds.

pub(super) mod coding;

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{Request, header};
use http_body::Body;
use http_body_util::BodyExt;
use tokio::time::{Instant, timeout_at};

use super::Api;
use super::errors::Error;
use crate::pipeline;
use coding::Coding;

/// Time for a body to come in, however short it is …
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// … and longer by what this many bytes a second take: 2 Mbit/s.
const BYTES_PER_SECOND_MIN: u32 = 256 << 10;

/// A request's body, whoever holds it.
pub(super) trait RequestBody: Body<Data = Bytes, Error: std::error::Error + 'static> + Unpin {}
impl<B: Body<Data = Bytes, Error: std::error::Error + 'static> + Unpin> RequestBody for B {}

/// The whole body of a JSON request, decoded where it is compressed.
///
/// # Errors
/// A content type other than JSON, an encoding we do not decode, a body over `body_bytes_max` (also when it is decoded),
/// one that does not come in time, breaks off or is framed wrongly.
pub(super) async fn read<B: RequestBody>(api: &Api, request: Request<B>) -> Result<Bytes, Error> {
    let headers = request.headers();
    if let Some(content_type) = headers.get(header::CONTENT_TYPE)
        && !is_json(content_type.as_bytes())
    {
        return Err(Error::ContentType);
    }
    let mut codings = headers.get_all(header::CONTENT_ENCODING).iter().map(|coding| coding.as_bytes());
    let coding = match (codings.next(), codings.next()) {
        (None, _) => None,
        (Some(name), None) if name.eq_ignore_ascii_case(b"identity") => None,
        (Some(name), None) => Some(Coding::named(name).ok_or(Error::ContentEncoding)?),
        (Some(_), Some(_)) => return Err(Error::ContentEncoding),
    };
    let bytes_max = api.body_bytes_max;
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    let expected = announced.map_or(Ok(0), usize::try_from).unwrap_or(usize::MAX);
    if expected > bytes_max {
        return Err(Error::BodyTooLarge { bytes_max });
    }
    let body = collect(request.into_body(), expected, bytes_max).await?;
    match coding {
        None => Ok(body),
        Some(coding) => Box::pin(decode(api, coding, body)).await,
    }
}

async fn decode(api: &Api, coding: Coding, body: Bytes) -> Result<Bytes, Error> {
    let bytes_max = api.body_bytes_max;
    // However short it is: it may become a thousand times as long.
    let decoding = api.pipeline.prepare.apart(move || coding.decode(&body, bytes_max));
    match decoding.await.map_err(pipeline::Error::from)? {
        Ok(Some(body)) => Ok(body),
        Ok(None) => Err(Error::BodyTooLarge { bytes_max }),
        Err(why) => Err(Error::Undecodable(coding, why)),
    }
}

/// A body of which `expected` bytes are announced.
async fn collect<B: RequestBody>(mut body: B, expected: usize, bytes_max: usize) -> Result<Bytes, Error> {
    let began = Instant::now();
    let mut whole = BytesMut::new();
    loop {
        let earned = Duration::from_secs(1) * u32::try_from(whole.len()).unwrap_or(u32::MAX) / BYTES_PER_SECOND_MIN;
        let frame = match timeout_at(began + BODY_TIMEOUT + earned, body.frame()).await {
            Ok(None) => return Ok(whole.freeze()),
            Ok(Some(Ok(frame))) => frame,
            Ok(Some(Err(error))) if is_end(&error) => return Err(Error::ClientGone),
            Ok(Some(Err(_))) => return Err(Error::BodyBroken),
            Err(_) => return Err(Error::BodyTimeout),
        };
        let Ok(piece) = frame.into_data() else { continue };
        if piece.len() > bytes_max - whole.len() {
            return Err(Error::BodyTooLarge { bytes_max });
        }
        if whole.is_empty() {
            if body.is_end_stream() {
                return Ok(piece); // as most are, whole in one piece
            }
            whole.reserve(expected);
        }
        whole.extend_from_slice(&piece);
    }
}

/// Whether the connection ended before the body did.
fn is_end(error: &(dyn std::error::Error + 'static)) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    std::iter::successors(Some(error), |error| error.source())
        .filter_map(|error| error.downcast_ref::<std::io::Error>())
        .any(|error| matches!(error.kind(), UnexpectedEof | ConnectionReset | ConnectionAborted | BrokenPipe))
}

fn is_json(content_type: &[u8]) -> bool {
    let essence = content_type.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
    let ending = essence.len().checked_sub(5).and_then(|at| essence.get(at..)).unwrap_or_default();
    essence.eq_ignore_ascii_case(b"application/json") || ending.eq_ignore_ascii_case(b"+json")
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use http_body::Frame;
    use http_body_util::StreamBody;

    use super::*;

    /// A body of so many pieces, each a while after the one before.
    fn dripping(pieces: usize, size: usize, pause: Duration) -> Body {
        let stream = futures::stream::unfold(pieces, move |left| async move {
            tokio::time::sleep(pause).await;
            let piece = Ok::<_, std::convert::Infallible>(Frame::data(Bytes::from(vec![b' '; size])));
            left.checked_sub(1).map(|left| (piece, left))
        });
        Body::new(StreamBody::new(stream))
    }

    /// Time is paused: it jumps ahead whenever nothing else is left to do.
    #[tokio::test(start_paused = true)]
    async fn a_body_may_be_long_but_must_come() {
        let second = Duration::from_secs(1);
        let long = collect(dripping(100, 1 << 20, second), 0, 128 << 20).await;
        assert_eq!(long.unwrap().len(), 100 << 20);
        let began = Instant::now();
        let dripping = collect(dripping(1000, 1, second), 1000, 128 << 20).await;
        assert!(matches!(dripping, Err(Error::BodyTimeout)), "{dripping:?}");
        assert!(began.elapsed() <= BODY_TIMEOUT + second, "{:?}", began.elapsed());
    }

    #[test]
    fn json_is_told_from_other_types() {
        for yes in ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"] {
            assert!(is_json(yes.as_bytes()), "{yes}");
        }
        for no in ["text/plain", "application/x-www-form-urlencoded", "", "json", "application/jsonx"] {
            assert!(!is_json(no.as_bytes()), "{no}");
        }
    }
}
