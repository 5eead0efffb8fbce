//! Reading a request's body within its bounds.

use std::time::Duration;

use axum::extract::Request;
use bytes::Bytes;
use http::header;
use http_body_util::{BodyExt, LengthLimitError, Limited};

use super::errors::Error;

/// Time for the whole body to come in: 32 MiB at 5 Mbit/s.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);

/// The whole body of a JSON request.
///
/// # Errors
/// A content type other than JSON, an encoding we do not decode, a body over `bytes_max`, one that does not come
/// within [`BODY_TIMEOUT`], breaks off or is framed wrongly.
pub(super) async fn read(request: Request, bytes_max: usize) -> Result<Bytes, Error> {
    let headers = request.headers();
    if let Some(content_type) = headers.get(header::CONTENT_TYPE)
        && !is_json(content_type.as_bytes())
    {
        return Err(Error::ContentType);
    }
    if let Some(encoding) = headers.get(header::CONTENT_ENCODING)
        && encoding != "identity"
    {
        return Err(Error::ContentEncoding);
    }
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > bytes_max as u64) {
        return Err(Error::BodyTooLarge { bytes_max });
    }
    let collecting = Limited::new(request.into_body(), bytes_max).collect();
    match tokio::time::timeout(BODY_TIMEOUT, collecting).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(Error::BodyTooLarge { bytes_max }),
        Ok(Err(error)) if is_end(&*error) => Err(Error::ClientGone),
        Ok(Err(_)) => Err(Error::BodyBroken),
        Err(_) => Err(Error::BodyTimeout),
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
    use super::is_json;

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
