//! HTTP/2 toward workers: spoken where it is offered, shared by many requests, and each of them ends by itself.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use forebay_backends::{
    Error, Phase,
    transport::{Channel, Endpoint, Timeouts, Transport},
};
use futures::future::join_all;
use http::{Request, Response, Version};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::mpsc,
};
use tokio_util::task::TaskTracker;

use crate::support::{PATIENCE, millis, post, until};
use crate::tls;

type Answer = Response<BoxBody<Bytes, Infallible>>;

/// A worker that speaks HTTP/2 alone and answers `ok`; to `stream` with an event and silence, to `silence` not at all.
#[derive(Default)]
struct Worker {
    connections: AtomicUsize,
    /// Streams whose caller has gone.
    left: AtomicUsize,
    heads: Mutex<Vec<String>>,
}

impl Worker {
    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Result<Answer, Infallible> {
        assert_eq!(request.version(), Version::HTTP_2);
        let key = request.headers().get("authorization").is_some();
        self.heads.lock().push(format!(
            "{} {} host {} key {key}",
            request.method(),
            request.uri(),
            request.headers().contains_key("host")
        ));
        let body = request.into_body().collect().await.expect("a body").to_bytes();
        match &*body {
            b"stream" => {
                let (events, stream) = mpsc::channel(1);
                events.send(Ok(Frame::data(Bytes::from_static(b"data: 1\n\n")))).await.expect("a stream");
                TaskTracker::new().spawn(async move {
                    events.closed().await;
                    self.left.fetch_add(1, Ordering::SeqCst);
                });
                let stream = futures::stream::unfold(stream, async |mut stream| {
                    stream.recv().await.map(|frame| (frame, stream))
                });
                Ok(Response::new(StreamBody::new(stream).boxed()))
            }
            b"silence" => {
                let _left = Left(self);
                std::future::pending().await
            }
            _ => Ok(Response::new(Full::new(Bytes::from_static(b"ok")).boxed())),
        }
    }

    fn serve(self: &Arc<Self>, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        self.connections.fetch_add(1, Ordering::SeqCst);
        let worker = self.clone();
        let service = service_fn(move |request| worker.clone().answer(request));
        let serving = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .max_concurrent_streams(1000)
            .serve_connection(TokioIo::new(stream), service);
        TaskTracker::new().spawn(serving);
    }

    /// Listens in the clear.
    async fn start() -> (Arc<Self>, Channel) {
        let worker = Arc::new(Self::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/pool", listener.local_addr().expect("an address")).parse().expect("a URL");
        let serving = worker.clone();
        TaskTracker::new().spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                serving.serve(stream);
            }
        });
        let endpoint = Endpoint::new(&url, Some(&"worker-key".into())).expect("an endpoint").with_http2(true);
        let timeouts = Timeouts { first_byte: Some(millis(500)), idle: PATIENCE, ..Timeouts::default() };
        (worker, Transport::new(TaskTracker::new()).channel(endpoint, timeouts))
    }
}

struct Left(Arc<Worker>);

impl Drop for Left {
    fn drop(&mut self) {
        self.0.left.fetch_add(1, Ordering::SeqCst);
    }
}

async fn ok(channel: &Channel) {
    let answer = channel.send(post("x")).await.expect("an answer");
    assert_eq!(answer.body.collect(2).await.expect("a body"), "ok");
}

#[tokio::test]
async fn requests_share_a_connection() {
    let (worker, channel) = Worker::start().await;
    ok(&channel).await;
    join_all((0..80).map(|_| ok(&channel))).await;
    assert_eq!(worker.connections.load(Ordering::SeqCst), 1);
    assert_eq!(channel.idle_connections(), 1);
    let heads = worker.heads.lock();
    let authority = channel.endpoint().to_string();
    assert_eq!(heads.len(), 81);
    assert!(
        heads.iter().all(|head| *head == format!("POST {authority}/v1/chat/completions host false key true")),
        "{heads:?}"
    );
}

/// What a server allows at once on one connection is no queue that nobody sees.
#[tokio::test]
async fn more_than_one_connection_carries_get_another() {
    let (worker, channel) = Worker::start().await;
    let mut streams = Vec::new();
    for _ in 0..150 {
        let mut body = channel.send(post("stream")).await.expect("an answer").body;
        assert_eq!(body.next().await.expect("a piece").expect("bytes"), "data: 1\n\n");
        streams.push(body);
    }
    assert_eq!(worker.connections.load(Ordering::SeqCst), 2);
    drop(streams);
    until("the worker to see all of them leave", || worker.left.load(Ordering::SeqCst) == 150).await;
}

#[tokio::test]
async fn one_who_leaves_disturbs_nobody() {
    let (worker, channel) = Worker::start().await;
    let mut staying = channel.send(post("stream")).await.expect("an answer").body;
    staying.next().await.expect("a piece").expect("bytes");
    let leaving = channel.send(post("stream")).await.expect("an answer").body;
    drop(leaving);
    until("the worker to see it", || worker.left.load(Ordering::SeqCst) == 1).await;
    // One that has no head yet leaves as well.
    let error = channel.send(post("silence")).await.err().expect("silence");
    assert!(matches!(error, Error::Timeout { phase: Phase::FirstByte, .. }), "{error:?}");
    until("the worker to see it, too", || worker.left.load(Ordering::SeqCst) == 2).await;
    ok(&channel).await;
    assert_eq!(worker.connections.load(Ordering::SeqCst), 1);
    drop(staying);
    until("the last one to leave", || worker.left.load(Ordering::SeqCst) == 3).await;
}

#[tokio::test]
async fn behind_tls_the_worker_chooses() {
    let acceptor = tls::acceptor(&[b"h2", b"http/1.1"]);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let worker = Arc::new(Worker::default());
    let serving = worker.clone();
    TaskTracker::new().spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            serving.serve(acceptor.accept(stream).await.expect("a client that trusts it"));
        }
    });
    let channel = tls::channel(&format!("https://localhost:{port}"), true);
    for _ in 0..3 {
        ok(&channel).await;
    }
    assert_eq!(worker.connections.load(Ordering::SeqCst), 1);
    assert_eq!(
        worker.heads.lock()[0],
        format!("POST https://localhost:{port}/v1/chat/completions host false key false")
    );
}
