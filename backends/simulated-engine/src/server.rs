//! Sockets and connections: accepts, serves, refuses for a while, and ends.
//!
//! Not here: what is answered (`wire`, `control`).

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    Options,
    body::{self, Body, Sending},
    control,
    driver::Driver,
    faults::{Faults, MidKind, Plan},
    kv_events::{Publisher, Sockets},
    model::Model,
    vllm::{lora::Adapters, pair::Pairs, sleep::Sleep},
    wire::{self, Wire},
};

/// Time between an outage being asked for and its beginning, in which the answer to whoever asked gets out.
const OUTAGE_NOTICE: Duration = Duration::from_millis(50);

/// Least speed factor; a slower engine would be a hung one.
pub(crate) const SPEED_MIN: f64 = 0.001;

/// Everything that requests share.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) options: Options,
    pub(crate) model: Model,
    pub(crate) driver: Arc<Driver>,
    /// Whose call the server works at, see [`Options::call_ms`].
    pub(crate) calls: tokio::sync::Mutex<()>,
    pub(crate) faults: Faults,
    pub(crate) sleep: Sleep,
    pub(crate) adapters: Adapters,
    pub(crate) pairs: Pairs,
    pub(crate) log: Log,
    /// The outage that was last asked for.
    pub(crate) outage: watch::Sender<Option<Duration>>,
}

/// What happened since the start.
#[derive(Debug, Default)]
pub(crate) struct Log {
    pub(crate) connections: AtomicU64,
    pub(crate) bytes_received: AtomicU64,
    /// Requests for paths that run the model.
    pub(crate) begun: AtomicU64,
    pub(crate) finished: AtomicU64,
    pub(crate) aborted: AtomicU64,
    /// HTTP requests in flight, of any path.
    pub(crate) in_flight: AtomicU64,
    /// Tokens, of prompts and answers, when the statistics were last read by someone who takes them away.
    pub(crate) drained: AtomicU64,
}

/// An answer before it is put on the wire.
pub(crate) enum Answer {
    Whole {
        status: StatusCode,
        headers: Vec<(header::HeaderName, HeaderValue)>,
        body: Bytes,
    },
    Events(body::Events),
    /// Lines of JSON.
    Lines(body::Events),
}

impl Answer {
    /// Whether it is a message of gRPC's, or a stream of them; not one that has its status in its head.
    fn is_message(&self) -> bool {
        match self {
            Self::Whole { headers, .. } => {
                let is_grpc =
                    |(name, value): &(_, HeaderValue)| name == header::CONTENT_TYPE && value == "application/grpc";
                headers.iter().any(is_grpc) && !headers.iter().any(|(name, _)| name == "grpc-status")
            }
            Self::Events(_) => true,
            Self::Lines(_) => false,
        }
    }
}

/// An engine with all its ports, before it serves.
pub struct Bound {
    service: Arc<Service>,
    listener: TcpListener,
    sockets: Option<(Arc<Publisher>, Sockets)>,
}

/// Makes an engine and takes its other ports.
///
/// # Errors
/// The tokenizer cannot be loaded, an option makes no sense, or a port of the KV events cannot be had.
pub async fn bind(options: Options, listener: TcpListener) -> io::Result<Bound> {
    let sockets = match &options.kv_events {
        Some(kv_events) => {
            let (publisher, sockets) = Publisher::bind(kv_events, options.timing.block_tokens).await?;
            Some((Arc::new(publisher), sockets))
        }
        None => None,
    };
    let publisher = sockets.as_ref().map(|(publisher, _)| Arc::clone(publisher));
    let service = Service::new(options, publisher, listener.local_addr()?.port())?;
    Ok(Bound { service: Arc::new(service), listener, sockets })
}

/// Serves until `shutdown` is cancelled; then all connections are closed at once.
///
/// # Errors
/// The listener cannot be opened again after an outage.
pub async fn serve(bound: Bound, shutdown: CancellationToken) -> io::Result<()> {
    let Bound { service, listener, sockets } = bound;
    let address = listener.local_addr()?;
    let tasks = TaskTracker::new();
    if let Some((publisher, sockets)) = sockets {
        publisher.serve(sockets, &tasks, &shutdown);
    }
    let mut outages = service.outage.subscribe();
    tasks.spawn(shutdown.clone().run_until_cancelled_owned(Arc::clone(&service.driver).drive()));
    let mut down = service.options.refuse_at_start;
    let mut listener = Some(listener);
    while !shutdown.is_cancelled() {
        if let Some(duration) = down.take() {
            listener = None;
            shutdown.run_until_cancelled(tokio::time::sleep(duration)).await;
            continue;
        }
        let open = match listener.take() {
            Some(listener) => listener,
            None => TcpListener::bind(address).await?,
        };
        let connections = shutdown.child_token();
        tokio::select! {
            // Cancel-safe: an accepted connection is handed to a task before the next await.
            () = accept(&open, &service, &tasks, &connections) => {}
            () = shutdown.cancelled() => {}
            // Cancel-safe: the value stays in the channel.
            changed = outages.changed() => if changed.is_ok() {
                tokio::time::sleep(OUTAGE_NOTICE).await;
                down = *outages.borrow_and_update();
            }
        }
        connections.cancel();
    }
    tasks.close();
    tasks.wait().await;
    Ok(())
}

impl Service {
    fn new(mut options: Options, publisher: Option<Arc<Publisher>>, port: u16) -> io::Result<Self> {
        if !(options.speed.is_finite() && options.speed >= SPEED_MIN) {
            let message = format!("speed must be at least {SPEED_MIN}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let timing = options.timing.clone();
        let memory = timing.kv_blocks.saturating_mul(timing.block_tokens.max(1));
        // An engine refuses to start with a context that its memory cannot hold; this one takes the smaller.
        options.max_model_len = options.max_model_len.min(memory).max(1);
        let model = Model::load(options.tokenizer.as_deref())
            .map(|model| model.reciting(options.recite))
            .map_err(|source| io::Error::new(io::ErrorKind::InvalidInput, source))?;
        let driver = Arc::new(Driver::new(timing, options.speed, options.max_queued_requests, publisher));
        let faults = Faults::new(options.seed, options.faults.clone());
        let outage = watch::Sender::new(None);
        let (sleep, calls) = (Sleep::new(options.asleep), tokio::sync::Mutex::default());
        let (adapters, pairs) = (Adapters::new(&options), Pairs::new(port));
        Ok(Self { sleep, adapters, pairs, options, model, driver, calls, faults, log: Log::default(), outage })
    }

    /// The server's own work for one call, see [`Options::call_ms`].
    pub(crate) async fn call(&self) {
        let _turn = self.calls.lock().await;
        let work = self.driver.time_of(self.options.call_ms);
        if !work.is_zero() {
            tokio::time::sleep(work).await;
        }
    }

    async fn respond(self: &Arc<Self>, request: Request<Incoming>, reset: Arc<AtomicBool>) -> Response<Body> {
        let path = request.uri().path();
        let plan = if control::owns(path) { Plan::default() } else { self.faults.plan(path) };
        let open = Open::begin(self, path);
        if plan.hang {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(plan.delay).await;
        let wire = self.options.engine.wire();
        let mut answer = match &plan.status {
            Some(status) => wire::failure(wire, status),
            None if control::owns(path) => control::answer(self, request).await,
            None => wire.answer(self, request).await,
        };
        if plan.mid.is_some_and(|mid| mid.kind == MidKind::Error)
            && matches!(&answer, Answer::Whole { status, .. } if status.is_success())
        {
            answer = wire.death();
        }
        // A comment is an event's, and no message of gRPC's.
        let keep_alive = self.options.stream_keep_alive.filter(|_| !wire.is_grpc());
        let status = wire.is_grpc() && answer.is_message();
        into_response(wire, answer, Sending { mid: plan.mid, keep_alive, reset, status, open })
    }
}

fn into_response(wire: &dyn Wire, answer: Answer, sending: Sending) -> Response<Body> {
    let mut response = match answer {
        Answer::Whole { status: code, headers, body } => {
            let status = sending.status;
            let length = HeaderValue::from(body.len());
            let garbled = sending.mid.is_some_and(|mid| matches!(mid.kind, MidKind::Garbage | MidKind::Abort));
            let mut response = Response::new(body::whole(body, sending));
            *response.status_mut() = code;
            if !garbled && !status {
                response.headers_mut().insert(header::CONTENT_LENGTH, length);
            }
            response.headers_mut().extend(headers.into_iter().map(|(name, value)| (Some(name), value)));
            response
        }
        Answer::Events(source) => {
            let mut response = Response::new(body::events(source, wire.death_events(), sending));
            let kind = if wire.is_grpc() { "application/grpc" } else { "text/event-stream; charset=utf-8" };
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
            response
        }
        Answer::Lines(source) => {
            let mut response = Response::new(body::events(source, wire.death_events(), sending));
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
            response
        }
    };
    for (name, value) in wire.headers() {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

/// A request under way: counted when it begins, and as finished or aborted when this is dropped.
pub(crate) struct Open {
    service: Arc<Service>,
    counted: bool,
    complete: bool,
}

impl Open {
    fn begin(service: &Arc<Service>, path: &str) -> Self {
        let counted = wire::runs_model(path);
        service.log.in_flight.fetch_add(1, Ordering::Relaxed);
        if counted {
            service.log.begun.fetch_add(1, Ordering::Relaxed);
        }
        Self { service: Arc::clone(service), counted, complete: false }
    }

    /// Marks that all of the answer was given to the connection.
    pub(crate) fn complete(&mut self) {
        self.complete = true;
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let log = &self.service.log;
        log.in_flight.fetch_sub(1, Ordering::Relaxed);
        if self.counted {
            let counter = if self.complete { &log.finished } else { &log.aborted };
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }
}

async fn accept(listener: &TcpListener, service: &Arc<Service>, tasks: &TaskTracker, connections: &CancellationToken) {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let connection = connection(stream, peer, Arc::clone(service));
                tasks.spawn(connections.clone().run_until_cancelled_owned(connection));
            }
            Err(error) => {
                // Out of file descriptors, mostly: waiting is all there is to do.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, peer: SocketAddr, service: Arc<Service>) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%peer, %error, "cannot set TCP_NODELAY");
    }
    service.log.connections.fetch_add(1, Ordering::Relaxed);
    let reset = Arc::new(AtomicBool::new(false));
    let socket = Socket { stream, reset: Arc::clone(&reset), service: Arc::clone(&service) };
    let keep_alive = service.options.connection_keep_alive;
    let grpc = service.options.engine.wire().is_grpc();
    let respond = service_fn(move |request| {
        let service = Arc::clone(&service);
        let reset = Arc::clone(&reset);
        async move { Ok::<_, Infallible>(service.respond(request, reset).await) }
    });
    // Triton has a port for each; here both are spoken on one, so that its metrics can be read and it can be told to fail.
    if grpc {
        let served = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(socket), respond).await;
        if let Err(error) = served {
            tracing::debug!(%peer, error, "connection ended");
        }
        return;
    }
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(keep_alive)
        .serve_connection(TokioIo::new(socket), respond)
        .await;
    if let Err(error) = served {
        tracing::debug!(%peer, %error, "connection ended");
    }
}

/// A connection's socket: counts what it receives, and resets instead of closing when told so.
struct Socket {
    stream: TcpStream,
    reset: Arc<AtomicBool>,
    service: Arc<Service>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.reset.load(Ordering::Relaxed)
            && let Err(error) = self.stream.set_zero_linger()
        {
            tracing::debug!(%error, "cannot reset a connection");
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(cx, buffer);
        let read = buffer.filled().len() - before;
        self.service.log.bytes_received.fetch_add(read as u64, Ordering::Relaxed);
        result
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // An orderly end would be sent before the reset.
        if self.reset.load(Ordering::Relaxed) {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
