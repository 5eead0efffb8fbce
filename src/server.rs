//! Listeners: which connections we serve, with bounds, and how they end.
//!
//! On shutdown a listener stops accepting at once, answers under way are finished, and what is left when the drain time
//! is over is closed hard. Nobody who came in time is turned away: callers whose connection the kernel has made are
//! served, and an idle connection is closed with an answer that says so, or when it stays idle, so that a client which
//! asks just then is not cut off.

mod socket;
mod stall;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::response::Response;
use http::header::CONNECTION;
use http::{HeaderValue, Request};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use socket::{Refuse, Socket};
use stall::Watched;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service;

/// Time for a client to send its request line and headers.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// Pause after a failed accept (no file descriptors left), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Between two looks at the beginning of an HTTP/2 preface.
const PREFACE_PAUSE: Duration = Duration::from_millis(20);
const HEADER_BYTES_MAX: usize = 64 << 10;
const HTTP2_STREAMS_MAX: u32 = 256;
/// What the kernel takes for a client that does not read it, beyond what is on its way. Else it is megabytes, and a slow
/// client looks like one that reads nothing.
#[cfg(target_os = "linux")]
const UNSENT_BYTES_MAX: u32 = 128 << 10;
/// Streams that a client may reset before they were looked at: beyond that it only means to make work (CVE-2023-44487).
const HTTP2_RESETS_MAX: usize = 64;
/// On shutdown: how long handshakes that have begun may take to end.
const LAST_HANDSHAKES: Duration = Duration::from_millis(50);
/// On shutdown: how long a connection may stay idle before it is closed. A client that has more to ask does so sooner.
const IDLE_AT_THE_END: Duration = Duration::from_secs(1);

/// What a listener allows.
pub struct Bounds {
    /// Connections open at once; one more waits in the listener's backlog.
    pub connections_max: usize,
    /// How long a client may take no byte of its answer.
    pub stall_max: Duration,
}

/// Who answers a listener's requests.
pub type Answerer = Box<dyn Fn(Request<Incoming>) -> Answering + Send + Sync>;
/// An answer in the making.
pub type Answering = Pin<Box<dyn Future<Output = Response> + Send>>;

/// A router as who answers.
pub fn routed(router: Router) -> Answerer {
    Box::new(move |request| {
        let answering = router.clone().call(request);
        Box::pin(async {
            match answering.await {
                Ok(answer) => answer,
                Err(never) => match never {},
            }
        })
    })
}

/// One listener with who answers there and its bounds.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    answerer: Answerer,
    connections: Arc<Semaphore>,
    bounds: Bounds,
    refuse: Refuse,
}

impl Server {
    /// `refuse` words what the HTTP library refuses by itself: further header lines and a body for a status.
    ///
    /// # Errors
    /// When the socket has no local address.
    pub fn new(listener: TcpListener, answerer: Answerer, bounds: Bounds, refuse: Refuse) -> std::io::Result<Self> {
        let address = listener.local_addr()?;
        let connections = Arc::new(Semaphore::new(bounds.connections_max.min(Semaphore::MAX_PERMITS)));
        Ok(Self { listener, address, answerer, connections, bounds, refuse })
    }

    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop`; then connections finish what they are at, until `abort`.
    pub async fn run(self, tracker: TaskTracker, stop: CancellationToken, abort: CancellationToken) {
        let Self { listener, address, answerer, connections, bounds, refuse } = self;
        let stopping = AtomicBool::new(false);
        let serving = Serving {
            http1: http1(),
            http2: http2(),
            answerer,
            stall_max: bounds.stall_max,
            refuse,
            stop,
            abort,
            stopping,
            tracker,
        };
        let door = Door { listener, address, connections, serving: Arc::new(serving) };
        door.serving.stop.run_until_cancelled(door.accept()).await;
        door.serving.stopping.store(true, Ordering::Relaxed);
        turn_away(&door.listener);
        let _ = tokio::time::timeout(LAST_HANDSHAKES, door.accept()).await;
    }
}

/// A listener at work.
struct Door {
    listener: TcpListener,
    address: SocketAddr,
    connections: Arc<Semaphore>,
    serving: Arc<Serving>,
}

impl Door {
    async fn accept(&self) {
        loop {
            let Ok(permit) = Arc::clone(&self.connections).acquire_owned().await else { return };
            match self.listener.accept().await {
                Ok((stream, _)) if tune(&stream).is_ok() => {
                    self.serving.tracker.spawn(Arc::clone(&self.serving).connection(stream, permit));
                }
                Ok(_) => {} // the peer is gone already
                Err(error) => {
                    tracing::warn!(%error, listener = %self.address, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

fn tune(stream: &TcpStream) -> std::io::Result<()> {
    // A stream's events are small writes; waiting to fill a segment costs a client 40 ms each.
    stream.set_nodelay(true)?;
    #[cfg(target_os = "linux")]
    socket2::SockRef::from(stream).set_tcp_notsent_lowat(UNSENT_BYTES_MAX)?;
    Ok(())
}

/// From now on the kernel drops whoever knocks, and lets in who is at the door already. A listener that is simply closed
/// resets those whom it has not accepted yet; who was dropped knocks again, and finds it closed.
fn turn_away(listener: &TcpListener) {
    #[cfg(target_os = "linux")]
    {
        use socket2::SockFilter;
        // Classic BPF over the TCP header: its flags; is SYN among them? then nothing of it, else all.
        const DROP_SYN: [SockFilter; 4] = [
            SockFilter::new(0x30, 0, 0, 13),
            SockFilter::new(0x45, 0, 1, 0x02),
            SockFilter::new(0x06, 0, 0, 0),
            SockFilter::new(0x06, 0, 0, u32::MAX),
        ];
        if let Err(error) = socket2::SockRef::from(listener).attach_filter(&DROP_SYN) {
            tracing::debug!(%error, "the listener cannot be closed gently");
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = listener;
}

fn http1() -> http1::Builder {
    let mut builder = http1::Builder::new();
    // At most 100 header fields, by itself: to say so would make it fill tables of them for every request (hyper 1.12).
    builder.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).max_buf_size(HEADER_BYTES_MAX);
    builder
}

fn http2() -> http2::Builder<TokioExecutor> {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(HTTP2_STREAMS_MAX)
        .max_pending_accept_reset_streams(HTTP2_RESETS_MAX)
        .max_send_buf_size(HEADER_BYTES_MAX)
        .max_header_list_size(u32::try_from(HEADER_BYTES_MAX).unwrap_or(u32::MAX))
        .keep_alive_interval(Some(Duration::from_secs(30)));
    builder
}

/// What the client has begun to speak, if anything. The HTTP library's own clock starts only after that.
async fn begins(stream: &TcpStream) -> Option<Version> {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let mut start = [0; PREFACE.len()];
    loop {
        let Ok(length) = stream.peek(&mut start).await else { return None };
        let said = start.get(..length).unwrap_or_default();
        if said.is_empty() {
            return None; // it closed
        }
        if !PREFACE.starts_with(said) {
            return Some(Version::Http1);
        }
        if said.len() == PREFACE.len() {
            return Some(Version::Http2);
        }
        // Bytes that are there already are peeked at again at once; HTTP/2 clients send all of it in one piece.
        tokio::time::sleep(PREFACE_PAUSE).await;
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Version {
    Http1,
    Http2,
}

/// What the connections of a listener share.
struct Serving {
    http1: http1::Builder,
    http2: http2::Builder<TokioExecutor>,
    answerer: Answerer,
    stall_max: Duration,
    refuse: Refuse,
    stop: CancellationToken,
    abort: CancellationToken,
    /// As `stop`, for every answer to ask.
    stopping: AtomicBool,
    tracker: TaskTracker,
}

/// Serves a connection of either protocol until it is over; from the end on it takes nothing more.
macro_rules! drive {
    ($serving:ident, $connection:ident, $end:expr) => {
        tokio::select! {
            ended = $connection.as_mut() => ended,
            () = $end => {
                $connection.as_mut().graceful_shutdown();
                tokio::select! {
                    ended = $connection.as_mut() => ended,
                    () = $serving.abort.cancelled() => Ok(()),
                }
            }
        }
    };
}

impl Serving {
    /// Serves one connection to its end.
    async fn connection(self: Arc<Self>, stream: TcpStream, permit: OwnedSemaphorePermit) {
        let _permit = permit;
        let begun = tokio::select! {
            begun = tokio::time::timeout(HEADER_TIMEOUT, begins(&stream)) => begun.ok().flatten(),
            () = self.idle_at_the_end() => None,
        };
        let Some(version) = begun else { return };
        let serving = Arc::clone(&self);
        let service = service_fn(move |request| {
            let answering = (serving.answerer)(request);
            let serving = Arc::clone(&serving);
            async move { Ok::<_, Infallible>(serving.finish(answering.await, version)) }
        });
        let socket = TokioIo::new(Socket::new(stream, self.stall_max, self.refuse));
        let ended = match version {
            Version::Http1 => {
                let mut connection = std::pin::pin!(self.http1.serve_connection(socket, service));
                drive!(self, connection, self.idle_at_the_end())
            }
            // It has a word for the end, behind which nothing that was asked is lost. Boxed, since it is larger and rarer.
            Version::Http2 => {
                let mut connection = Box::pin(self.http2.serve_connection(socket, service));
                drive!(self, connection, self.stop.cancelled())
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "a client connection ended early");
        }
    }

    /// Says whether it is the connection's last answer; the HTTP/2 library says so by itself.
    fn finish(&self, mut answer: Response, version: Version) -> Response {
        match version {
            Version::Http1 if self.stopping.load(Ordering::Relaxed) => {
                answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                answer
            }
            Version::Http1 => answer,
            Version::Http2 => answer.map(|body| Body::new(Watched::new(body, self.stall_max, &self.tracker))),
        }
    }

    /// When an idle connection must end because the process does.
    async fn idle_at_the_end(&self) {
        self.stop.cancelled().await;
        tokio::select! {
            () = tokio::time::sleep(IDLE_AT_THE_END) => {}
            () = self.abort.cancelled() => {}
        }
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
        let bounds = Bounds { connections_max: 2, stall_max: Duration::from_secs(60) };
        let answerer: Answerer = Box::new(|_| Box::pin(async { Response::default() }));
        let server = Server::new(listener, answerer, bounds, |_| Default::default()).unwrap();
        let address = server.address();
        let tracker = TaskTracker::new();
        let stop = CancellationToken::new();
        tracker.spawn(server.run(tracker.clone(), stop.clone(), CancellationToken::new()));
        for start in [
            &b""[..],
            b"PRI * HT",
            b"POST / HT",
            b"GET / HTTP/1.1\r\nhost: idle afterwards\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ] {
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

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn at_the_end_those_at_the_door_are_let_in_and_who_knocks_then_is_not_answered() {
        use std::net::TcpStream;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let early = TcpStream::connect(address).unwrap();
        turn_away(&listener);
        // Neither let in nor refused: it knocks again, when another process may listen.
        let late = TcpStream::connect_timeout(&address, Duration::from_millis(100));
        assert_eq!(late.unwrap_err().kind(), std::io::ErrorKind::TimedOut);
        assert_eq!(listener.accept().await.unwrap().1, early.local_addr().unwrap());
    }
}
