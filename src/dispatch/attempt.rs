//! One attempt at one worker: the request as the engine wants it, and the answer up to its first event or byte.
//!
//! Until then nothing has been said to the client, so that a failure here can be tried elsewhere and a real status
//! can still be given. Keep-alive comments are no first event.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use forebay_backends::engines::{self, Answer, Prepared, Unsupported};
use forebay_backends::transport::{Outgoing, Response};
use forebay_proto::error::{ApiError, from_engine};
use forebay_proto::splice::Edits;
use forebay_proto::sse::{Event, Splitter};
use forebay_proto::stream::{self, Chunk};
use forebay_proto::trace_context::TraceParent;
use forebay_scheduler::Failure;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderName, RETRY_AFTER};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, StatusCode};

use super::workers::Identity;
use super::{Error, Job, Reply, Streamed, Whole, Worker};
use crate::ids::RequestName;
use crate::telemetry::metrics::RETRY_REASONS;

/// How much of a whole answer is held back, so that one that breaks off can be had elsewhere.
const HELD_BYTES_MAX: usize = 1 << 20;
/// Bodies up to this length are rewritten where they are: some 40 µs of JSON.
const INLINE_BODY_BYTES_MAX: usize = 32 << 10;
/// A reused connection that breaks so soon was closed as idle while the request was under way: a round trip, on a busy
/// machine.
const CLOSED_AS_IDLE: Duration = Duration::from_millis(500);
/// An engine's error answer is read up to here.
const ERROR_BYTES_MAX: usize = 64 << 10;
/// Longest stream event: a chunk with the log probabilities of many tokens is some 100 KiB.
const EVENT_BYTES_MAX: usize = 8 << 20;
/// The longest time to stay away that an engine may ask of a client.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(3600);
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TRACE_PARENT: HeaderName = HeaderName::from_static("traceparent");
const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// An attempt without an answer.
pub(super) enum Failed {
    /// Another worker may be tried; `shown` is what the engine said, if it is the last.
    Elsewhere { failure: Failure, shown: Option<Box<Error>> },
    /// The request itself is at fault; no other worker would take it.
    Final(Box<Error>),
}

impl Failed {
    fn elsewhere(failure: Failure) -> Self {
        Self::Elsewhere { failure, shown: None }
    }
}

impl From<forebay_backends::Error> for Failed {
    fn from(error: forebay_backends::Error) -> Self {
        Self::elsewhere(error.failure())
    }
}

/// The metric's name for a failure, as an index into [`RETRY_REASONS`].
pub(super) fn reason(failure: Failure) -> usize {
    let name = match failure {
        Failure::Connect => "connect",
        Failure::Reset => "reset",
        Failure::Timeout => "timeout",
        Failure::Status5xx => "status",
        Failure::Overloaded { .. } => "overloaded",
        Failure::Malformed => "malformed",
        Failure::Unsupported => "unsupported",
    };
    RETRY_REASONS.iter().position(|reason| *reason == name).unwrap_or(0)
}

/// Sends `job` to `worker` and waits for the beginning of its answer.
pub(super) async fn attempt(worker: &Worker, job: &Job<'_>, number: u32) -> Result<Reply, Failed> {
    worker.traffic.note();
    // Not left to the transport: an engine that sends nothing but keep-alive comments is late, too.
    let opening = tokio::time::timeout(worker.first_byte, open(worker, job, number));
    opening.await.unwrap_or(Err(Failed::elsewhere(Failure::Timeout)))
}

async fn open(worker: &Worker, job: &Job<'_>, number: u32) -> Result<Reply, Failed> {
    let Prepared { path, body, translation } = prepared(worker, job).await?;
    let sent_at = Instant::now();
    let response = match worker.channel.send(outgoing((worker, job, number), path, body.clone())).await {
        // An idle connection that the worker closed while the request was on its way there: no failure of the worker's,
        // and no reason to leave its cache. Later than that the worker may have worked on it, and is to blame.
        Err(forebay_backends::Error::Reset { reused: true, .. }) if sent_at.elapsed() < CLOSED_AS_IDLE => {
            Box::pin(worker.channel.send_fresh(outgoing((worker, job, number), path, body))).await?
        }
        sent => sent?,
    };
    if !response.status.is_success() {
        return Err(Box::pin(refused(response)).await);
    }
    let Response { status, headers, body } = response;
    let answer = Answer::new(body, translation);
    if job.streamed() && (answer.is_lines() || is_event_stream(&headers)) {
        stream(answer).await
    } else {
        whole(status, &headers, answer).await
    }
}

/// The request as the worker's engine takes it.
async fn prepared(worker: &Worker, job: &Job<'_>) -> Result<Prepared, Failed> {
    let mut edits = Edits::new();
    let identity = worker.identity.load_full();
    if let Some(identity) = &identity {
        edits.model(job.asked.model(), &identity.model);
    }
    if let Some(streaming) = job.asked.streaming()
        && streaming.stream
    {
        edits.usage(streaming);
    }
    let body = edits.apply(&job.body);
    let Some(identity) = identity else {
        return Ok(Prepared { path: job.api.path(), body, translation: None });
    };
    let Identity { engine, openai_routes, .. } = *identity;
    let text = if engine.needs_text(job.api, openai_routes) { Box::pin(written(job)).await? } else { None };
    let asked = engines::Asked { api: job.api, body, streamed: job.streamed(), openai_routes, text };
    let prepared = if engine.rewrites() && asked.body.len() > INLINE_BODY_BYTES_MAX {
        let preparing = tokio::task::spawn_blocking(move || engines::prepare(engine, asked));
        preparing.await.map_err(|_| Failed::elsewhere(Failure::Malformed))?
    } else {
        engines::prepare(engine, asked)
    };
    prepared.map_err(|Unsupported { message, param }| unsupported(message, param))
}

/// The engine cannot do what is asked, now or later: nothing is wrong with the worker, and one of another kind may.
fn unsupported(message: String, param: Option<String>) -> Failed {
    let code = if param.is_some() { "unsupported_parameter" } else { "unsupported_api" };
    let error = ApiError { message, kind: "invalid_request_error".to_owned(), param, code: Some(code.to_owned()) };
    let shown = Some(Box::new(Error::Engine { status: StatusCode::BAD_REQUEST, error, retry_after: None }));
    Failed::Elsewhere { failure: Failure::Unsupported, shown }
}

/// The conversation as the model reads it, where its template is at hand.
async fn written(job: &Job<'_>) -> Result<Option<String>, Failed> {
    job.prepare.written(job.model, job.asked, &job.body).await.map_err(|error| {
        tracing::debug!(%error, "a conversation cannot be written out");
        Failed::elsewhere(Failure::Overloaded { retry_after: None })
    })
}

fn outgoing((worker, job, number): (&Worker, &Job<'_>, u32), path: &'static str, body: Bytes) -> Outgoing {
    let mut headers = job.headers.clone();
    // Engines name their own requests after it: a name used twice would meet itself in vLLM.
    if let Some(name) = RequestName::fresh_header() {
        headers.insert(REQUEST_ID, name);
    }
    if let Some(trace) = job.trace {
        let attempt = TraceParent { span: trace.span + u64::from(number), ..trace };
        if let Ok(parent) = HeaderValue::try_from(attempt.to_string()) {
            headers.insert(TRACE_PARENT, parent);
        }
    }
    // Whatever the client wrote there: the place that it was given is at this rank.
    let header = worker.identity.load().as_ref().and_then(|identity| identity.engine.rank_header());
    if let Some((rank, header)) = worker.rank.zip(header) {
        headers.insert(header, rank.into());
    }
    headers.insert(CONTENT_TYPE, JSON);
    Outgoing { method: Method::POST, path: PathAndQuery::from_static(path), headers, body }
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    let content_type = headers.get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    content_type.get(..17).is_some_and(|start| start.eq_ignore_ascii_case(b"text/event-stream"))
}

/// Reads until the first event that carries data.
async fn stream(mut body: Answer) -> Result<Reply, Failed> {
    let mut splitter = Splitter::new(EVENT_BYTES_MAX);
    loop {
        while let Some(event) = splitter.next().map_err(|_| Failed::elsewhere(Failure::Malformed))? {
            if !event.well_formed {
                return Err(Failed::elsewhere(Failure::Malformed));
            }
            if event.data.is_some() {
                return begin(event, splitter, body);
            }
        }
        match body.next().await {
            Some(bytes) => splitter.push(bytes?),
            None => return Err(Failed::elsewhere(Failure::Reset)),
        }
    }
}

fn begin(event: Event, splitter: Splitter, body: Answer) -> Result<Reply, Failed> {
    match event.data.as_deref().map(stream::read) {
        Some(Chunk::Delta(_)) => Ok(Reply::Stream(Streamed { first: VecDeque::from([event]), splitter, body })),
        Some(Chunk::Error { error, status }) => {
            let status = status.and_then(|status| StatusCode::from_u16(status).ok());
            Err(engine_error(status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), error, None))
        }
        _ => Err(Failed::elsewhere(Failure::Malformed)),
    }
}

async fn whole(status: StatusCode, headers: &HeaderMap, body: Answer) -> Result<Reply, Failed> {
    // Whatever else an engine, or something that stands where one was, calls a success is no answer to a client.
    let encoded = headers.get(CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity");
    let html = headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"text/html"));
    if status != StatusCode::OK || encoded || html {
        return Err(Failed::elsewhere(Failure::Malformed));
    }
    let mut body = match body.translated().await? {
        Ok(answer) => {
            let length = Some(answer.len() as u64);
            return Ok(Reply::Whole(Whole { content_type: JSON, head: VecDeque::from([answer]), rest: None, length }));
        }
        Err(plain) => plain,
    };
    let length = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    let content_type = headers.get(CONTENT_TYPE).cloned().unwrap_or(JSON);
    let mut head = VecDeque::new();
    let mut held = 0;
    while held < HELD_BYTES_MAX {
        match body.next().await {
            Some(bytes) => {
                let bytes: Bytes = bytes?;
                held += bytes.len();
                head.push_back(bytes);
            }
            None => {
                let length = Some(held as u64);
                return Ok(Reply::Whole(Whole { content_type, head, rest: None, length }));
            }
        }
    }
    Ok(Reply::Whole(Whole { content_type, head, rest: Some(body), length }))
}

/// What an engine's error status means for the request.
async fn refused(response: Response) -> Failed {
    let Response { status, headers, mut body } = response;
    let mut bytes = BytesMut::new();
    while bytes.len() < ERROR_BYTES_MAX
        && let Some(Ok(piece)) = body.next().await
    {
        bytes.extend_from_slice(&piece);
    }
    let retry_after = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse::<f64>().ok());
    let retry_after = retry_after.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let retry_after = retry_after.map(|wait| wait.min(RETRY_AFTER_MAX));
    engine_error(status, from_engine(status.as_u16(), &bytes), retry_after)
}

fn engine_error(status: StatusCode, error: ApiError, retry_after: Option<Duration>) -> Failed {
    let failure = match status {
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => Failure::Overloaded { retry_after },
        // The engine does not accept the key that this gateway has for it: nothing the client did.
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::PROXY_AUTHENTICATION_REQUIRED => {
            tracing::warn!(%status, "a worker does not accept the gateway's key");
            return Failed::elsewhere(Failure::Status5xx);
        }
        // vLLM and llama.cpp: not with this model, or not as this server was started.
        StatusCode::NOT_IMPLEMENTED => return unsupported(error.message, error.param),
        // TGI's "generation error", and a server that gave up waiting.
        StatusCode::FAILED_DEPENDENCY | StatusCode::REQUEST_TIMEOUT => Failure::Status5xx,
        status if status.is_client_error() => {
            return Failed::Final(Box::new(Error::Engine { status, error, retry_after }));
        }
        status if status.is_server_error() => Failure::Status5xx,
        // A redirect (vLLM answers a trailing slash with one to its own address) or stranger.
        _ => return Failed::elsewhere(Failure::Malformed),
    };
    let shown = match failure {
        Failure::Overloaded { .. } => None,
        _ => Some(Box::new(Error::Engine { status: StatusCode::BAD_GATEWAY, error, retry_after })),
    };
    Failed::Elsewhere { failure, shown }
}
