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
/// Between two looks at the beginning of an HTTP/2 preface.
const PREFACE_PAUSE: Duration = Duration::from_millis(20);
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
        .max_buf_size(HEADER_BYTES_MAX)
        .max_headers(HEADERS_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(HTTP2_STREAMS_MAX)
        .max_header_list_size(u32::try_from(HEADER_BYTES_MAX).unwrap_or(u32::MAX))
        .keep_alive_interval(Some(Duration::from_secs(30)));
    builder
}

/// Whether the client has begun to say which protocol it speaks. The HTTP library's own clock starts only after that.
async fn begins(stream: &TcpStream) -> bool {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let mut start = [0; PREFACE.len()];
    loop {
        let Ok(length) = stream.peek(&mut start).await else { return false };
        let said = start.get(..length).unwrap_or_default();
        if said.is_empty() {
            return false; // it closed
        }
        if said.len() == PREFACE.len() || !PREFACE.starts_with(said) {
            return true;
        }
        // Bytes that are there already are peeked at again at once; HTTP/2 clients send all of it in one piece.
        tokio::time::sleep(PREFACE_PAUSE).await;
    }
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
            let begun = tokio::select! {
                begun = tokio::time::timeout(HEADER_TIMEOUT, begins(&stream)) => begun.unwrap_or(false),
                () = stop.cancelled() => false,
            };
            if !begun {
                return;
            }
            let serving = protocol.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
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

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// Time is paused: it jumps ahead whenever nothing else is left to do.
    #[tokio::test(start_paused = true)]
    async fn a_client_that_does_not_say_what_it_wants_is_let_go() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Server::new(listener, Router::new(), 2).unwrap();
        let address = server.address();
        let tracker = TaskTracker::new();
        let stop = CancellationToken::new();
        tracker.spawn(server.run(tracker.clone(), stop.clone(), CancellationToken::new()));
        for start in [&b""[..], b"PRI * HT", b"POST / HT"] {
            let mut client = TcpStream::connect(address).await.unwrap();
            client.write_all(start).await.unwrap();
            let began = tokio::time::Instant::now();
            let mut answer = Vec::new();
            let _ = client.read_to_end(&mut answer).await;
            let waited = began.elapsed();
            assert!((HEADER_TIMEOUT..HEADER_TIMEOUT * 2).contains(&waited), "{start:?}: {waited:?}");
        }
        stop.cancel();
        tracker.close();
        tracker.wait().await;
    }
}
