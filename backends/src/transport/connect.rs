//! Opening a connection: name, TCP, TLS, HTTP/1.1 or HTTP/2. The name is looked up each time.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::{ClientConfig, RootCertStore, crypto::ring};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, lookup_host},
    sync::OnceCell,
    time::{Instant, timeout, timeout_at},
};
use tokio_rustls::TlsConnector;
use tokio_util::task::TaskTracker;

use super::{
    Endpoint,
    http1::{Http1, Stream},
    pool::{Connection, Http2, Line},
};
use crate::{Error, Phase};

/// Addresses of one name that are tried; more share the same fate.
const ADDRESSES_MAX: usize = 8;
/// An answer's head over HTTP/2. Engines send some 300 bytes.
const HEAD_BYTES_MAX: usize = 64 * 1024;
/// What an HTTP/2 worker may send ahead for a caller that is slow to take it, and thus the memory of one stalled stream.
const BUFFER_BYTES_MAX: usize = 64 * 1024;
/// What a worker may send ahead on one HTTP/2 connection: enough that streams whose callers are slow do not hold up the
/// others.
const WINDOW_BYTES: u32 = 16 << 20;
/// How often a busy HTTP/2 connection is asked for a sign of life, and how long that may take.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const HTTP2: &[u8] = b"h2";

/// The TLS configuration, made when first asked for: reading the machine's authorities takes milliseconds of file reads.
pub(super) struct Tls {
    roots: Option<RootCertStore>,
    connector: OnceCell<TlsConnector>,
}

impl Tls {
    pub(super) fn native() -> Self {
        Self { roots: None, connector: OnceCell::new() }
    }

    pub(super) fn with_roots(roots: RootCertStore) -> Self {
        Self { roots: Some(roots), connector: OnceCell::new() }
    }

    async fn connector(&self) -> io::Result<&TlsConnector> {
        self.connector
            .get_or_try_init(|| async {
                let roots = match self.roots.clone() {
                    Some(roots) => roots,
                    None => tokio::task::spawn_blocking(native_roots).await.map_err(io::Error::other)?,
                };
                let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
                    .with_safe_default_protocol_versions()
                    .map_err(io::Error::other)?
                    .with_root_certificates(roots)
                    .with_no_client_auth();
                config.alpn_protocols = vec![HTTP2.to_vec(), b"http/1.1".to_vec()];
                Ok(TlsConnector::from(Arc::new(config)))
            })
            .await
    }
}

fn native_roots() -> RootCertStore {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::warn!(%error, "cannot read some of this machine's certificate authorities");
    }
    let mut roots = RootCertStore::empty();
    let (taken, passed_over) = roots.add_parsable_certificates(found.certs);
    tracing::debug!(taken, passed_over, "read this machine's certificate authorities");
    roots
}

/// Opens a connection; one of HTTP/2 gets a task that drives it.
pub(super) async fn connect(
    tracker: &TaskTracker,
    tls: &Tls,
    endpoint: &Endpoint,
    limit: Duration,
) -> Result<Connection, Error> {
    let late = || Error::Timeout { phase: Phase::Connect, after: limit };
    let opening = async {
        let tcp =
            dial((endpoint.host(), endpoint.port()), Instant::now() + limit).await.map_err(|source| {
                match source.kind() {
                    io::ErrorKind::TimedOut => late(),
                    _ => Error::Connect { source },
                }
            })?;
        let Some(name) = endpoint.server_name() else {
            if endpoint.speaks_http2() {
                return start_http2(tracker, tcp).await;
            }
            return Ok(Connection::new(Line::Http1(Box::new(Http1::new(Stream::Plain(tcp))))));
        };
        let connector = tls.connector().await.map_err(|source| Error::Tls { source })?;
        let stream = connector.connect(name.clone(), tcp).await.map_err(|source| Error::Tls { source })?;
        if stream.get_ref().1.alpn_protocol() == Some(HTTP2) {
            return start_http2(tracker, stream).await;
        }
        Ok(Connection::new(Line::Http1(Box::new(Http1::new(Stream::Tls(Box::new(stream)))))))
    };
    timeout(limit, opening).await.unwrap_or_else(|_| Err(late()))
}

/// Tries the name's addresses in turn. Each gets its share of the time that is left, so that one that swallows packets
/// (often IPv6) does not starve the others.
pub(super) async fn dial(host_and_port: (&str, u16), deadline: Instant) -> io::Result<TcpStream> {
    let addresses: Vec<SocketAddr> = lookup_host(host_and_port).await?.take(ADDRESSES_MAX).collect();
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for (&address, left) in addresses.iter().zip((1..=addresses.len()).rev()) {
        let share = deadline.saturating_duration_since(Instant::now()) / u32::try_from(left).unwrap_or(u32::MAX);
        match timeout_at(Instant::now() + share, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                // Small writes go out at once; else a request's tail waits some 40 ms for an acknowledgement.
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Ok(Err(error)) => failure = error,
            Err(_) => failure = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(failure)
}

async fn start_http2<S>(tracker: &TaskTracker, stream: S) -> Result<Connection, Error>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (sender, connection) = http2::Builder::new(Tracked(tracker.clone()))
        .timer(TokioTimer::new())
        .max_header_list_size(u32::try_from(HEAD_BYTES_MAX).unwrap_or(u32::MAX))
        .initial_stream_window_size(u32::try_from(BUFFER_BYTES_MAX).unwrap_or(u32::MAX))
        .initial_connection_window_size(WINDOW_BYTES)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_INTERVAL)
        .handshake::<_, Full<Bytes>>(TokioIo::new(stream))
        .await
        .map_err(|source| Error::Reset { reused: false, source: source.into() })?;
    let task = tracker.spawn(async move {
        if let Err(error) = connection.await {
            tracing::trace!(%error, "connection to a worker ended");
        }
    });
    Ok(Connection::new(Line::Http2(Http2::new(sender, task.abort_handle()))))
}

/// Where hyper's HTTP/2 spawns what it needs beside the connection's own task; all of it ends with that one.
#[derive(Clone)]
struct Tracked(TaskTracker);

impl<F: Future<Output: Send> + Send + 'static> hyper::rt::Executor<F> for Tracked {
    fn execute(&self, future: F) {
        self.0.spawn(future);
    }
}
