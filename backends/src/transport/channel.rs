//! One worker's requests.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri,
    header::{
        ACCEPT_ENCODING, AUTHORIZATION, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, EXPECT, HOST, PROXY_AUTHENTICATE,
        PROXY_AUTHORIZATION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
    },
    uri::PathAndQuery,
};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::time::{Instant, timeout, timeout_at};

use super::{
    Body, Endpoint, Response, Timeouts, Transport,
    connect::connect,
    grpc::{GRPC, Status},
    http1::Lost,
    pool::{Connection, Line, Pool},
};
use crate::{Error, Phase};

/// Headers that never travel on: those of one hop (RFC 9110, 7.6.1), those that the transport writes itself, the
/// client's own credentials, and the wish for an encoding that the gateway could not read.
const DROPPED: [HeaderName; 14] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
    CONTENT_LENGTH,
    EXPECT,
    HOST,
    AUTHORIZATION,
    ACCEPT_ENCODING,
];

/// A request to a worker. Its path is an engine's own; the endpoint's prefix, host and key are added when it is sent.
#[derive(Clone, Debug)]
pub struct Outgoing {
    pub method: Method,
    pub path: PathAndQuery,
    /// What the client sent and may travel on. Credentials and headers of one hop are taken off.
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// The pool of connections to one worker. Clones share it.
#[derive(Clone)]
pub struct Channel {
    inner: Arc<Inner>,
}

struct Inner {
    transport: Transport,
    endpoint: Endpoint,
    timeouts: Timeouts,
    pool: Arc<Pool>,
    /// To where its metrics are, if that is another port.
    metrics: OnceLock<Channel>,
}

/// A failed exchange, and the request where it is certain that none of it was written.
struct Failed {
    error: Error,
    unsent: Option<Request<Bytes>>,
}

impl Channel {
    pub(super) fn new(transport: Transport, endpoint: Endpoint, timeouts: Timeouts, pool: Arc<Pool>) -> Self {
        Self { inner: Arc::new(Inner { transport, endpoint, timeouts, pool, metrics: OnceLock::new() }) }
    }

    /// Where this channel leads.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        &self.inner.endpoint
    }

    /// The channel to the same host's metrics, which are in plain HTTP at the port that the endpoint names or this one.
    pub(crate) fn metrics(&self, port: u16) -> &Channel {
        let Inner { transport, endpoint, timeouts, metrics, .. } = &*self.inner;
        metrics.get_or_init(|| transport.channel(endpoint.metrics(port), *timeouts))
    }

    /// Connections that are open and unused, at most 256.
    #[must_use]
    pub fn idle_connections(&self) -> usize {
        self.inner.pool.ready()
    }

    /// Sends a request and waits for the head of the answer, whatever its status. Dropping the future closes the
    /// connection.
    ///
    /// # Errors
    /// See [`Error`]; whether the worker may have begun the request is told by the variant.
    pub async fn send(&self, request: Outgoing) -> Result<Response, Error> {
        let mut request = self.inner.encode(request);
        while let Some(connection) = self.inner.pool.take() {
            match self.inner.exchange(connection, request).await {
                Ok(response) => return Ok(response),
                Err(Failed { unsent: Some(unsent), .. }) => request = unsent,
                Err(Failed { error, .. }) => return Err(error),
            }
        }
        // Connecting is rare and its future is large; every request would carry it along.
        Box::pin(self.inner.send_fresh(request)).await
    }

    /// As [`Channel::send`], on a connection of its own: for a request that met a reused one which the worker just closed.
    ///
    /// # Errors
    /// As [`Channel::send`].
    pub async fn send_fresh(&self, request: Outgoing) -> Result<Response, Error> {
        self.inner.send_fresh(self.inner.encode(request)).await
    }

    /// Asks for a small answer, bounded in time and size as a whole. Should a reused connection turn out to be closed it
    /// asks once more on a fresh one, which a GET allows.
    ///
    /// # Errors
    /// As [`Channel::send`]; [`Error::TooLarge`] beyond `bytes_max`. A status that says no is not an error.
    pub async fn get(
        &self,
        path: &'static str,
        limit: Duration,
        bytes_max: usize,
    ) -> Result<(StatusCode, Bytes), Error> {
        let question = || Outgoing {
            method: Method::GET,
            path: PathAndQuery::from_static(path),
            headers: HeaderMap::new(),
            body: Bytes::new(),
        };
        bounded(limit, async {
            let response = match self.send(question()).await {
                Err(Error::Reset { reused: true, .. }) => Box::pin(self.send_fresh(question())).await?,
                other => other?,
            };
            Ok((response.status, response.body.collect(bytes_max).await?))
        })
        .await
    }

    /// Posts JSON and reads a small answer, bounded in time and size as a whole. Never sent twice.
    ///
    /// # Errors
    /// As [`Channel::get`].
    pub async fn post(
        &self,
        path: &'static str,
        body: Bytes,
        limit: Duration,
        bytes_max: usize,
    ) -> Result<(StatusCode, Bytes), Error> {
        let path = PathAndQuery::from_static(path);
        bounded(limit, async {
            let response = self.send(Outgoing { method: Method::POST, path, headers: HeaderMap::new(), body }).await?;
            Ok((response.status, response.body.collect(bytes_max).await?))
        })
        .await
    }
}

pub(super) async fn bounded<T>(limit: Duration, exchange: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    timeout(limit, exchange).await.unwrap_or(Err(Error::Timeout { phase: Phase::Whole, after: limit }))
}

impl Inner {
    fn encode(&self, outgoing: Outgoing) -> Request<Bytes> {
        let Outgoing { method, path, mut headers, body } = outgoing;
        strip(&mut headers);
        headers.insert(HOST, self.endpoint.host_header().clone());
        if let Some(authorization) = self.endpoint.authorization() {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        if method == Method::POST {
            headers.entry(CONTENT_TYPE).or_insert(const { HeaderValue::from_static("application/json") });
        }
        let mut request = Request::new(body);
        *request.method_mut() = method;
        *request.uri_mut() = Uri::from(self.endpoint.join(path));
        *request.headers_mut() = headers;
        request
    }

    /// Says whom the request is for, in the way of the connection's protocol.
    fn address(&self, request: &mut Request<Bytes>, connection: &Connection) {
        if connection.is_http2() {
            let path = request.uri().path_and_query().cloned();
            let headers = request.headers_mut();
            headers.remove(HOST);
            if headers.get(CONTENT_TYPE).is_some_and(|kind| kind == GRPC) {
                headers.insert(TE, const { HeaderValue::from_static("trailers") });
            }
            *request.uri_mut() = self.endpoint.absolute(path.unwrap_or(const { PathAndQuery::from_static("/") }));
        } else if let (Some(_), Some(path)) = (request.uri().authority(), request.uri().path_and_query().cloned()) {
            // It comes back from an HTTP/2 connection that closed, and the worker speaks HTTP/1.1 now.
            *request.uri_mut() = Uri::from(path);
            request.headers_mut().insert(HOST, self.endpoint.host_header().clone());
        }
    }

    async fn send_fresh(&self, request: Request<Bytes>) -> Result<Response, Error> {
        let shared = &self.transport.shared;
        let connection = connect(&shared.tracker, &shared.tls, &self.endpoint, self.timeouts.connect).await?;
        self.pool.offer(&connection);
        self.exchange(connection, request).await.map_err(|failed| failed.error)
    }

    /// One request on one connection, which travels into the answer's body or, on any failure, is closed.
    async fn exchange(&self, mut connection: Connection, mut request: Request<Bytes>) -> Result<Response, Failed> {
        let first_byte = self.timeouts.first_byte.map(|limit| (Instant::now() + limit, limit));
        self.address(&mut request, &connection);
        let reused = connection.reused();
        let answer = ask(&mut connection.line, request, reused);
        let (status, headers, incoming) = match first_byte {
            Some((deadline, after)) => timeout_at(deadline, answer)
                .await
                .unwrap_or(Err(Failed { error: Error::Timeout { phase: Phase::FirstByte, after }, unsent: None }))?,
            None => answer.await?,
        };
        let body = Body::new(incoming, connection, self.pool.clone(), first_byte, self.timeouts.idle);
        let body = body.with_trailers(Status::is_in(&headers).then(|| headers.clone()));
        Ok(Response { status, headers, body })
    }
}

/// The answer's head; and its body where it does not come on the connection itself.
async fn ask(
    line: &mut Line,
    request: Request<Bytes>,
    reused: bool,
) -> Result<(StatusCode, HeaderMap, Option<Incoming>), Failed> {
    match line {
        Line::Http1(http1) => {
            let lost = match http1.ask(&request).await {
                Ok((status, headers)) => return Ok((status, headers, None)),
                Err(lost) => lost,
            };
            Err(match lost {
                Lost::Unsent(source) => {
                    Failed { error: Error::Reset { reused, source: source.into() }, unsent: Some(request) }
                }
                Lost::Closed { source, unheard } => {
                    Failed { error: Error::Reset { reused: reused && unheard, source: source.into() }, unsent: None }
                }
                Lost::Malformed(why) => Failed { error: Error::Malformed { source: why.into() }, unsent: None },
            })
        }
        Line::Http2(http2) => {
            let body = request.body().clone();
            // Its future is the larger one, and the rarer.
            match Box::pin(http2.sender.try_send_request(request.map(Full::new))).await {
                Ok(response) => {
                    let (head, incoming) = response.into_parts();
                    Ok((head.status, head.headers, Some(incoming)))
                }
                Err(mut failure) => {
                    let unsent = failure.take_message().map(|request| request.map(|_| body));
                    let source = failure.into_error();
                    let is_parse = source.is_parse();
                    let source = source.into();
                    let error = if is_parse { Error::Malformed { source } } else { Error::Reset { reused, source } };
                    Err(Failed { error, unsent })
                }
            }
        }
    }
}

fn strip(headers: &mut HeaderMap) {
    if !headers.keys().any(|name| DROPPED.contains(name)) {
        return;
    }
    // The Connection header may name further headers that are meant for one hop.
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| HeaderName::try_from(name.trim()).ok())
        .collect();
    for name in named.iter().chain(&DROPPED) {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_of_one_hop_does_not_travel() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("authorization", "Bearer client"),
            ("connection", "keep-alive, X-Secret ,bad name"),
            ("x-secret", "1"),
            ("content-length", "7"),
            ("transfer-encoding", "chunked"),
            ("host", "gateway"),
            ("accept-encoding", "gzip"),
            ("expect", "100-continue"),
            ("x-request-id", "r1"),
            ("traceparent", "t"),
        ] {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        strip(&mut headers);
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["traceparent", "x-request-id"]);
    }
}
