//! A server whose every byte the test decides, and the few things all tests need.

use std::{
    future::Future,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use forebay_backends::transport::{Channel, Endpoint, Outgoing, Timeouts, Transport};
use http::{HeaderMap, Method, uri::PathAndQuery};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_util::task::TaskTracker;

/// Longer than any step of a test takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// What the server saw.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) connections: AtomicUsize,
    pub(crate) requests: Mutex<Vec<Recorded>>,
}

impl Seen {
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    pub(crate) fn requests(&self) -> usize {
        self.requests.lock().len()
    }
}

/// One request as it came in.
#[derive(Clone, Debug)]
pub(crate) struct Recorded {
    /// Request line and headers, up to the empty line.
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Recorded {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

/// The server's side of one connection.
pub(crate) struct Served {
    pub(crate) stream: TcpStream,
    pub(crate) seen: Arc<Seen>,
    /// Number of the connection, from 0.
    pub(crate) number: usize,
}

impl Served {
    /// Reads one request with its body; `None` when the client closes instead.
    pub(crate) async fn request(&mut self) -> Option<Recorded> {
        let mut bytes = Vec::new();
        let head_end = loop {
            if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
                break at + 4;
            }
            if self.stream.read_buf(&mut bytes).await.ok()? == 0 {
                return None;
            }
        };
        let mut recorded = Recorded {
            head: String::from_utf8_lossy(&bytes[..head_end]).into_owned(),
            body: bytes.split_off(head_end),
        };
        let length = recorded.header("content-length").map_or(0, |value| value.parse().expect("a length"));
        while recorded.body.len() < length {
            if self.stream.read_buf(&mut recorded.body).await.ok()? == 0 {
                return None;
            }
        }
        self.seen.requests.lock().push(recorded.clone());
        Some(recorded)
    }

    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        // The client may have left; what it saw is asserted on its side.
        let _ = self.stream.write_all(bytes.as_ref()).await;
    }

    /// Sends a complete answer with this body.
    pub(crate) async fn answer(&mut self, status: u16, body: &str) {
        let length = body.len();
        self.send(format!(
            "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        ))
        .await;
    }

    /// Waits until the client has closed the connection.
    pub(crate) async fn closed(&mut self) {
        let mut buffer = [0; 1024];
        while self.stream.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
    }
}

/// A listening server; each connection is handed to the test's own function.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) seen: Arc<Seen>,
    pub(crate) tracker: TaskTracker,
}

impl Server {
    pub(crate) async fn start<F>(serve: impl Fn(Served) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        Self::on(listener, serve)
    }

    pub(crate) fn on<F>(listener: TcpListener, serve: impl Fn(Served) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let address = listener.local_addr().expect("an address");
        let seen = Arc::new(Seen::default());
        let tracker = TaskTracker::new();
        let (connections, spawn) = (seen.clone(), tracker.clone());
        tracker.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                stream.set_nodelay(true).expect("a socket option");
                let number = connections.connections.fetch_add(1, Ordering::SeqCst);
                spawn.spawn(serve(Served { stream, seen: connections.clone(), number }));
            }
        });
        Self { address, seen, tracker }
    }

    /// A server that answers by path, and keeps connections alive; 404 for what is not listed.
    pub(crate) async fn of_paths<const N: usize>(paths: [(&'static str, u16, &str); N]) -> Self {
        let paths = Arc::new(paths.map(|(path, status, body)| (path, status, body.to_owned())));
        Self::start(move |mut served| {
            let paths = paths.clone();
            async move {
                while let Some(request) = served.request().await {
                    let path = request.head.split(' ').nth(1).unwrap_or_default().to_owned();
                    match paths.iter().find(|(known, ..)| *known == path) {
                        Some((_, status, body)) => served.answer(*status, body).await,
                        None => served.answer(404, r#"{"detail":"Not Found"}"#).await,
                    }
                }
            }
        })
        .await
    }

    pub(crate) fn channel(&self, timeouts: Timeouts) -> Channel {
        channel(&format!("http://{}", self.address), timeouts)
    }
}

pub(crate) fn channel(url: &str, timeouts: Timeouts) -> Channel {
    let endpoint = Endpoint::new(&url.parse().expect("a URL"), None).expect("an endpoint");
    Transport::new(TaskTracker::new()).channel(endpoint, timeouts)
}

pub(crate) fn post(body: impl Into<Bytes>) -> Outgoing {
    Outgoing {
        method: Method::POST,
        path: PathAndQuery::from_static("/v1/chat/completions"),
        headers: HeaderMap::new(),
        body: body.into(),
    }
}

pub(crate) fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Waits until the condition holds, for at most [`PATIENCE`].
pub(crate) async fn until(what: &str, condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"));
}

/// The folder of data that is too large or too foreign to stand in the repository; `None`, said aloud, where it is not.
pub(crate) fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("FOREBAY_SHARED_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared"), PathBuf::from);
    let path = root.join(path);
    if path.exists() {
        return Some(path);
    }
    println!("skipped: {} not found", path.display());
    None
}

/// The body of a real engine's recorded answer.
pub(crate) fn recorded(sample: &str) -> Option<String> {
    let path = shared(&format!("real-engines/samples/{sample}.response.http"))?;
    let answer = std::fs::read_to_string(path).expect("a readable sample");
    let (_, body) = answer.split_once("\r\n\r\n").expect("a head");
    Some(body.to_owned())
}
