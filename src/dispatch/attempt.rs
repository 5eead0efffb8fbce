//! One attempt at one worker: the request as the engine wants it, and the answer up to its first event or byte.
//!
//! Until then nothing has been said to the client, so that a failure here can be tried elsewhere and a real status
//! can still be given. Keep-alive comments are no first event, and a role alone is none yet.

use std::collections::VecDeque;
use std::time::{Duration, Instant, SystemTime};

use bytes::{Bytes, BytesMut};
use forebay_backends::engines::{self, Answer, Form, Prepared, Unsupported, Written};
use forebay_backends::transport::{Outgoing, Response};
use forebay_proto::error::{ApiError, from_engine};
use forebay_proto::splice::Edits;
use forebay_proto::sse::Splitter;
use forebay_proto::stream::{self, Chunk};
use forebay_proto::trace_context::TraceParent;
use forebay_scheduler::Failure;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderName, RETRY_AFTER};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use tracing::Instrument;

use super::handover::Handed;
use super::workers::Identity;
use super::{Error, Job, Reply, Streamed, Whole, Worker};
use crate::ids::RequestName;
#[cfg(doc)]
use crate::telemetry::metrics::RETRY_REASONS;

/// How much of a whole answer is held back, so that one that breaks off can be had elsewhere.
const HELD_BYTES_MAX: usize = 1 << 20;
/// Bodies up to this length are rewritten where they are: some 40 µs of JSON.
pub(super) const INLINE_BODY_BYTES_MAX: usize = 32 << 10;
/// A reused connection that breaks so soon was closed as idle while the request was under way: a round trip, on a busy
/// machine.
const CLOSED_AS_IDLE: Duration = Duration::from_millis(500);
/// Whole answers up to this length are read for the model they name: some 100 µs of JSON.
const NAMED_BYTES_MAX: u64 = 64 << 10;
/// An engine's error answer is read up to here.
const ERROR_BYTES_MAX: usize = 64 << 10;
/// Longest stream event: a chunk with the log probabilities of many tokens is some 100 KiB.
const EVENT_BYTES_MAX: usize = 8 << 20;
/// The longest time to stay away that an engine may ask of a client.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(3600);
/// "Not now": 503, and 529 as Anthropic's API says it.
const UNAVAILABLE: [u16; 2] = [503, 529];
/// Events in a row that cannot be read before a stream that has not begun counts as garbage.
const MALFORMED_IN_A_ROW_MAX: u32 = 8;
/// So many events that say nothing are held back: vLLM begins each choice of a chat with one, even of a chat that it gives
/// up unheard.
const ROLES_MAX: usize = 4;
const RETRY_AFTER_MS: HeaderName = HeaderName::from_static("retry-after-ms");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Fields of a request to an engine that are ours: its name, trace, rank and type, and the transport's three.
const OWN_FIELDS: usize = 7;
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
    pub(super) fn elsewhere(failure: Failure) -> Self {
        Self::Elsewhere { failure, shown: None }
    }
}

impl Failed {
    /// Of a request for an adapter: an engine that knows no such model has lost it, which is no fault of the request's.
    fn of_adapter(self) -> Self {
        match self {
            Self::Final(error) if matches!(*error, Error::Engine { status: StatusCode::NOT_FOUND, .. }) => {
                Self::Elsewhere { failure: Failure::NoAdapter, shown: Some(error) }
            }
            failed => failed,
        }
    }
}

impl From<forebay_backends::Error> for Failed {
    fn from(error: forebay_backends::Error) -> Self {
        Self::elsewhere(error.failure())
    }
}

/// Why a second attempt is made beside a first that is slow, as [`RETRY_REASONS`] names it.
pub(super) const HEDGE: &str = "hedge";

/// A failure in a word of [`RETRY_REASONS`].
pub(super) fn reason(failure: Failure) -> &'static str {
    match failure {
        Failure::Connect => "connect",
        Failure::Reset => "reset",
        Failure::Timeout => "timeout",
        Failure::Status5xx => "status",
        Failure::Overloaded { .. } | Failure::Unavailable { .. } => "overloaded",
        Failure::Malformed => "malformed",
        Failure::Denied => "denied",
        Failure::OtherModel => "other_model",
        Failure::NoAdapter => "no_adapter",
        Failure::Unsupported => "unsupported",
    }
}

/// Sends `job` to `worker` and waits for the beginning of its answer. `handed`: from where it is to fetch the prompt's
/// cache.
pub(super) async fn attempt(
    worker: &Worker,
    job: &Job<'_>,
    number: u32,
    handed: Option<&Handed>,
) -> Result<Reply, Failed> {
    worker.traffic.note();
    let limit = if job.streamed() { worker.first_token } else { worker.first_byte };
    let span = tracing::debug_span!("attempt", worker = &*worker.name, number);
    // Not left to the transport: an engine that sends nothing but keep-alive comments is late, too.
    let opening = std::pin::pin!(open(worker, job, number, handed));
    let opening = tokio::time::timeout(limit, opening.instrument(span));
    opening.await.unwrap_or(Err(Failed::elsewhere(Failure::Timeout)))
}

async fn open(worker: &Worker, job: &Job<'_>, number: u32, handed: Option<&Handed>) -> Result<Reply, Failed> {
    let Prepared { path, headers, mut body, translation } = prepared(worker, job).await?;
    if let Some(handed) = handed {
        body = handed.go_on(body).await?;
    }
    let name = handed.map(|handed| &handed.name);
    let response = answered((worker, job, number), (path, headers, name), body).await?;
    let Response { status, headers, body } = response;
    // Translated answers name the model that was asked for.
    let is_own = translation.is_none();
    let answer = Answer::new(body, translation);
    let reply = if job.streamed() && (answer.becomes_events() || is_event_stream(&headers)) {
        stream(answer).await?
    } else {
        let whole = whole(status, &headers, answer).await?;
        given_up(&whole)?;
        Reply::Whole(whole)
    };
    if is_own {
        whose(worker, job, &reply)?;
    }
    Ok(reply)
}

/// Sends it and waits for an answer that is no refusal. `name`: what the engine is to call it; by default a new one.
pub(super) async fn answered(
    (worker, job, number): (&Worker, &Job<'_>, u32),
    (path, own, name): (&'static str, Headers, Option<&HeaderValue>),
    body: Bytes,
) -> Result<Response, Failed> {
    let request = |body| outgoing((worker, job, number), (path, own, name), body);
    let sent_at = Instant::now();
    let response = match worker.channel.send(request(body.clone())).await {
        // An idle connection that the worker closed while the request was on its way there: no failure of the worker's,
        // and no reason to leave its cache. Later than that the worker may have worked on it, and is to blame.
        Err(forebay_backends::Error::Reset { reused: true, .. }) if sent_at.elapsed() < CLOSED_AS_IDLE => {
            Box::pin(worker.channel.send_fresh(request(body))).await?
        }
        sent => sent?,
    };
    if !response.status.is_success() {
        let refused = Box::pin(refused(response)).await;
        return Err(if job.model.adapter.is_some() { refused.of_adapter() } else { refused });
    }
    Ok(response)
}

/// That the beginning of an answer does not name a model that the worker does not have. Long documents are not read.
fn whose(worker: &Worker, job: &Job<'_>, reply: &Reply) -> Result<(), Failed> {
    let document = match reply {
        Reply::Stream(streamed) => streamed.first.front().and_then(|event| event.data.clone()),
        Reply::Whole(whole) if whole.length.is_some_and(|length| length <= NAMED_BYTES_MAX) => document(whole),
        Reply::Whole(_) => None,
    };
    let (Some(document), Some(identity)) = (document, &*worker.identity.load()) else { return Ok(()) };
    let own = identity.name_of(job.model);
    if stream::names(&document, &own) {
        return Ok(()); // as nearly all do, and sooner seen than read
    }
    let is_strange = |model: &str| *model != *own && identity.is_stranger(model);
    match stream::model(&document).filter(|model| is_strange(model)) {
        Some(model) => {
            tracing::warn!(worker = &*worker.name, model, expected = identity.model, "answered as another model");
            Err(Failed::elsewhere(Failure::OtherModel))
        }
        None => Ok(()),
    }
}

/// That the engine did not let go of the request. An answer that is longer than what is held back is not read for it: it
/// has more to say than that.
fn given_up(whole: &Whole) -> Result<(), Failed> {
    if document(whole).is_some_and(|document| stream::is_given_up(&document)) {
        let (error, status) = stream::gave_up();
        return Err(engine_error(StatusCode::from_u16(status).unwrap_or_default(), error, None));
    }
    Ok(())
}

/// All of an answer, where all of it is here.
fn document(Whole { head, rest, .. }: &Whole) -> Option<Bytes> {
    match (rest, head.len()) {
        (Some(_), _) => None,
        (None, 1) => head.front().cloned(),
        (None, _) => Some(head.iter().flatten().copied().collect()),
    }
}

/// The request as the worker's engine takes it.
pub(super) async fn prepared(worker: &Worker, job: &Job<'_>) -> Result<Prepared, Failed> {
    let mut edits = Edits::new();
    let identity = worker.identity.load_full();
    if job.goes_on && !identity.as_ref().is_some_and(|identity| identity.engine.takes_ids(job.api)) {
        return Err(unsupported("The engine cannot go on with an answer of another.".to_owned(), None));
    }
    if let Some(identity) = &identity {
        edits.model(job.asked.model(), &identity.name_of(job.model));
    }
    if let Some(streaming) = job.asked.streaming()
        && streaming.stream
    {
        edits.usage(streaming);
    }
    let body = edits.apply(&job.body);
    let Some(identity) = identity else {
        return Ok(Prepared { path: job.api.path(), headers: &[], body, translation: None });
    };
    let Identity { engine, server, .. } = &*identity;
    let engine = *engine;
    let form = engine.form(job.api, server);
    let rewrites = engine.rewrites() || form != Form::AsAsked;
    let written = match form {
        Form::AsAsked => Written::default(),
        form => Box::pin(written(job, form)).await?,
    };
    let asked = engines::Asked { api: job.api, body, streamed: job.streamed(), server: server.clone(), written };
    let prepared = if rewrites && asked.body.len() > INLINE_BODY_BYTES_MAX {
        let preparing = tokio::task::spawn_blocking(move || engines::prepare(engine, asked));
        preparing.await.map_err(|_| Failed::elsewhere(Failure::Malformed))?
    } else {
        engines::prepare(engine, asked)
    };
    prepared.map_err(|Unsupported { message, param }| unsupported(message, param))
}

/// The engine cannot do what is asked, now or later: nothing is wrong with the worker, and one of another kind may.
pub(super) fn unsupported(message: String, param: Option<String>) -> Failed {
    let code = if param.is_some() { "unsupported_parameter" } else { "unsupported_api" };
    let error = ApiError { message, kind: "invalid_request_error".to_owned(), param, code: Some(code.to_owned()) };
    let shown = Some(Box::new(Error::Engine { status: StatusCode::BAD_REQUEST, error, retry_after: None }));
    Failed::Elsewhere { failure: Failure::Unsupported, shown }
}

/// The prompt as the model reads it, where its tokenizer and template are at hand, and the room that it leaves.
async fn written(job: &Job<'_>, form: Form) -> Result<Written, Failed> {
    let written = job.prepare.written(job.model, job.asked, &job.body, form).await.map_err(|error| {
        tracing::debug!(%error, "a prompt cannot be written out");
        Failed::elsewhere(Failure::Overloaded { retry_after: None })
    })?;
    let prompt_tokens = job.prompt.exact.then_some(job.prompt.tokens);
    let room = prompt_tokens.zip(job.model.max_model_len).map(|(prompt, all)| all.saturating_sub(prompt));
    Ok(Written { prompt_tokens, room, ..written })
}

pub(super) type Headers = &'static [(&'static str, &'static str)];

fn outgoing(
    (worker, job, number): (&Worker, &Job<'_>, u32),
    (path, own, name): (&'static str, Headers, Option<&HeaderValue>),
    body: Bytes,
) -> Outgoing {
    let mut headers = if own.is_empty() { job.headers.clone() } else { HeaderMap::new() };
    headers.reserve(OWN_FIELDS);
    // Engines name their own requests after it: a name used twice would meet itself in vLLM.
    if let Some(name) = name.cloned().or_else(RequestName::fresh_header) {
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
    for (name, value) in own {
        headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    Outgoing { method: Method::POST, path: PathAndQuery::from_static(path), headers, body }
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    let content_type = headers.get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    content_type.get(..17).is_some_and(|start| start.eq_ignore_ascii_case(b"text/event-stream"))
}

/// Reads until the first event that says something. One that cannot be read is passed over, as long as others can.
async fn stream(mut body: Answer) -> Result<Reply, Failed> {
    let mut splitter = Splitter::new(EVENT_BYTES_MAX);
    let mut first = VecDeque::new();
    let mut malformed = 0;
    loop {
        while let Some(event) = splitter.next().map_err(|_| Failed::elsewhere(Failure::Malformed))? {
            if !event.well_formed {
                return Err(Failed::elsewhere(Failure::Malformed));
            }
            let Some(data) = event.data.as_deref() else { continue };
            match stream::read(data) {
                Chunk::Delta(delta) => {
                    first.push_back(event);
                    let is_role = !delta.has_content && delta.choices.iter().any(|choice| !choice.finished);
                    if !is_role || first.len() > ROLES_MAX {
                        return Ok(Reply::Stream(Streamed { first, splitter, body }));
                    }
                }
                Chunk::Error { error, status } => {
                    let status = status.and_then(|status| StatusCode::from_u16(status).ok());
                    return Err(engine_error(status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), error, None));
                }
                Chunk::Malformed if malformed < MALFORMED_IN_A_ROW_MAX => {
                    malformed += 1;
                    tracing::warn!("skipped a stream event that cannot be read");
                }
                Chunk::Malformed | Chunk::Done => return Err(Failed::elsewhere(Failure::Malformed)),
            }
        }
        match body.next().await {
            Some(bytes) => splitter.push(bytes?),
            None if malformed > 0 => return Err(Failed::elsewhere(Failure::Malformed)),
            None => return Err(Failed::elsewhere(Failure::Reset)),
        }
    }
}

async fn whole(status: StatusCode, headers: &HeaderMap, body: Answer) -> Result<Whole, Failed> {
    // Whatever else an engine, or something that stands where one was, calls a success is no answer to a client.
    let encoded = headers.get(CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity");
    let html = headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"text/html"));
    if status != StatusCode::OK || encoded || html {
        return Err(Failed::elsewhere(Failure::Malformed));
    }
    let translated = body.translated().await.map_err(|error| match error {
        forebay_backends::Error::Refused { status, error } => engine_error(status, *error, None),
        error => error.into(),
    });
    let mut body = match translated? {
        Ok(answer) => {
            let length = Some(answer.len() as u64);
            return Ok(Whole { content_type: JSON, head: VecDeque::from([answer]), rest: None, length });
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
                return Ok(Whole { content_type, head, rest: None, length });
            }
        }
    }
    Ok(Whole { content_type, head, rest: Some(body), length })
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
    engine_error(status, from_engine(status.as_u16(), &bytes), retry_after(&headers, SystemTime::now()))
}

/// How long to stay away: milliseconds where they are given, else seconds or until a date.
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = |name: &HeaderName| headers.get(name)?.to_str().ok().map(str::trim);
    let number = |text: &str, unit: f64| Duration::try_from_secs_f64(text.parse::<f64>().ok()? * unit).ok();
    let wait = text(&RETRY_AFTER_MS).and_then(|text| number(text, 1e-3)).or_else(|| {
        let text = text(&RETRY_AFTER)?;
        let until = || httpdate::parse_http_date(text).ok();
        number(text, 1.0).or_else(|| until()?.duration_since(now).ok())
    });
    wait.map(|wait| wait.min(RETRY_AFTER_MAX))
}

fn engine_error(status: StatusCode, error: ApiError, retry_after: Option<Duration>) -> Failed {
    let failure = match status {
        StatusCode::TOO_MANY_REQUESTS => Failure::Overloaded { retry_after },
        status if UNAVAILABLE.contains(&status.as_u16()) => Failure::Unavailable { retry_after },
        // The engine does not accept the key that this gateway has for it: nothing the client did.
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::PROXY_AUTHENTICATION_REQUIRED => {
            tracing::warn!(%status, "a worker does not accept the gateway's key");
            return Failed::elsewhere(Failure::Denied);
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
        failure if failure.left_alone().is_some() => None,
        _ => Some(Box::new(Error::Engine { status: StatusCode::BAD_GATEWAY, error, retry_after })),
    };
    Failed::Elsewhere { failure, shown }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_long_to_stay_away() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777); // Sun, 06 Nov 1994 08:49:37 GMT
        for (given, wait) in [
            (&[("retry-after", "2")][..], Some(2000)),
            (&[("retry-after", " 0.5 ")], Some(500)),
            (&[("retry-after", "2"), ("retry-after-ms", "1500")], Some(1500)),
            (&[("retry-after", "2"), ("retry-after-ms", "soon")], Some(2000)),
            (&[("retry-after", "Sun, 06 Nov 1994 08:50:00 GMT")], Some(23_000)),
            (&[("retry-after", "Sun, 06 Nov 1994 08:49:00 GMT")], None),
            (&[("retry-after", "1e9")], Some(3_600_000)),
            (&[("retry-after", "-1")], None),
            (&[("retry-after", "NaN")], None),
            (&[("retry-after", "never")], None),
            (&[], None),
        ] {
            let headers =
                given.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
            let found = retry_after(&headers.collect(), now);
            assert_eq!(found, wait.map(Duration::from_millis), "{given:?}");
        }
    }
}
