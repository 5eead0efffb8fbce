//! Listeners: which connections we serve, with bounds, and how they end.
//!
//! On shutdown a listener stops accepting at once, answers under way are finished (idle connections close), and what
//! is left when the drain time is over is closed hard.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Time for a client to send its request line and headers.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// Pause after a failed accept (no file descriptors left), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const HEADER_BYTES_MAX: usize = 64 << 10;
const HEADERS_MAX: usize = 100;
const HTTP2_STREAMS_MAX: u32 = 256;

/// One listener with its router and bounds.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    router: Router,
    connections: Arc<Semaphore>,
}

impl Server {
    /// # Errors
    /// When the socket has no local address.
    pub fn new(listener: TcpListener, router: Router, connections_max: usize) -> std::io::Result<Self> {
        let address = listener.local_addr()?;
        let connections = Arc::new(Semaphore::new(connections_max.min(Semaphore::MAX_PERMITS)));
        Ok(Self { listener, address, router, connections })
    }

    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop`; then connections finish what they are at, until `abort`.
    pub async fn run(self, tracker: TaskTracker, stop: CancellationToken, abort: CancellationToken) {
        let protocol = Arc::new(protocol());
        loop {
            let permit = tokio::select! {
                () = stop.cancelled() => return,
                permit = Arc::clone(&self.connections).acquire_owned() => permit,
            };
            let Ok(permit) = permit else { return };
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    let connection = connection(Arc::clone(&protocol), stream, self.router.clone(), permit);
                    tracker.spawn(connection(stop.clone(), abort.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, listener = %self.address, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

fn protocol() -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEADER_BYTES_MAX.max(8 << 10))
        .max_headers(HEADERS_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(HTTP2_STREAMS_MAX)
        .max_header_list_size(u32::try_from(HEADER_BYTES_MAX).unwrap_or(u32::MAX))
        .keep_alive_interval(Some(Duration::from_secs(30)));
    builder
}

/// A connection's task: returns the future maker so that the accept loop moves everything in at once.
fn connection(
    protocol: Arc<Builder<TokioExecutor>>,
    stream: TcpStream,
    router: Router,
    permit: OwnedSemaphorePermit,
) -> impl FnOnce(CancellationToken, CancellationToken) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> {
    move |stop, abort| {
        Box::pin(async move {
            let _permit = permit;
            // A stream's events are small writes; waiting to fill a segment costs a client 40 ms each.
            if stream.set_nodelay(true).is_err() {
                return; // the peer is gone already
            }
            let serving =
                protocol.serve_connection_with_upgrades(TokioIo::new(stream), TowerToHyperService::new(router));
            tokio::pin!(serving);
            let ended = tokio::select! {
                ended = serving.as_mut() => ended,
                () = stop.cancelled() => {
                    serving.as_mut().graceful_shutdown();
                    tokio::select! {
                        ended = serving.as_mut() => ended,
                        () = abort.cancelled() => return,
                    }
                }
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "a client connection ended early");
            }
        })
    }
}
