//! Forebay's own request and response headers, and what of a client's headers an engine gets to see.

use std::sync::Arc;
use std::time::Duration;

use forebay_proto::trace_context::TraceParent;
use forebay_scheduler::Class;
use http::header::{HeaderName, HeaderValue};
use http::{HeaderMap, Response};
use tokio::time::Instant;

use super::errors::Error;
use crate::dispatch::Worker;
use crate::ids::RequestName;
use crate::routing::Route;

pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const PRIORITY: HeaderName = HeaderName::from_static("x-forebay-priority");
const DEADLINE_MS: HeaderName = HeaderName::from_static("x-forebay-deadline-ms");
const WORKER: HeaderName = HeaderName::from_static("x-forebay-worker");
const MODEL: HeaderName = HeaderName::from_static("x-forebay-model");
const QUEUE_MS: HeaderName = HeaderName::from_static("x-forebay-queue-ms");
const PREDICTED_WAIT_MS: HeaderName = HeaderName::from_static("x-forebay-predicted-wait-ms");

const ATTEMPTS: HeaderName = HeaderName::from_static("x-forebay-attempts");
/// Whether the answer is another request's, too.
pub(super) const CACHE: HeaderName = HeaderName::from_static("x-forebay-cache");

/// Fields of an answer's head, the HTTP library's own among them.
pub(super) const ANSWER_FIELDS: usize = 11;

/// What goes on to an engine as it came: trace context, and vLLM's session attribution. Everything else (keys,
/// cookies, addresses) stays here.
const TRACE_PARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACE_STATE: HeaderName = HeaderName::from_static("tracestate");
const FORWARDED: [HeaderName; 3] = [TRACE_PARENT, TRACE_STATE, HeaderName::from_static("x-session-id")];

/// The trace that a client's request belongs to, where it names one that can be read.
pub(super) fn trace_parent(headers: &HeaderMap) -> Option<TraceParent> {
    TraceParent::read(headers.get(TRACE_PARENT)?.as_bytes())
}

pub(super) fn request_id(headers: &HeaderMap) -> Option<&[u8]> {
    headers.get(&REQUEST_ID).map(HeaderValue::as_bytes)
}

/// What a head says beside a request's name.
pub(super) struct Said {
    /// `default` when it asks for none.
    pub(super) class: Class,
    /// The latest first token.
    pub(super) deadline: Option<Instant>,
    /// What engines are told. Of a trace that cannot be read neither half is passed on (W3C Trace Context, 4.3).
    pub(super) forwarded: HeaderMap,
}

/// Reads all of it in one pass, which is sooner done than to look up each field. Of fields that repeat the first counts.
pub(super) fn read(headers: &HeaderMap, arrived: Instant) -> Result<Said, Error> {
    let (mut priority, mut milliseconds, mut forwarded) = (None, None, HeaderMap::new());
    for (name, value) in headers {
        if *name == PRIORITY {
            priority.get_or_insert(value);
        } else if *name == DEADLINE_MS {
            milliseconds.get_or_insert(value);
        } else if FORWARDED.contains(name) {
            forwarded.entry(name).or_insert_with(|| value.clone());
        }
    }
    if !forwarded.is_empty() && trace_parent(&forwarded).is_none() {
        forwarded.remove(TRACE_PARENT);
        forwarded.remove(TRACE_STATE);
    }
    let deadline = milliseconds.map(|value| deadline(value, arrived)).transpose()?;
    Ok(Said { class: class(priority)?, deadline, forwarded })
}

fn class(value: Option<&HeaderValue>) -> Result<Class, Error> {
    match value.map(HeaderValue::as_bytes) {
        None | Some(b"default") => Ok(Class::Default),
        Some(b"interactive") => Ok(Class::Interactive),
        Some(b"batch") => Ok(Class::Batch),
        Some(_) => Err(Error::Header { name: PRIORITY, expected: "interactive, default or batch" }),
    }
}

fn deadline(value: &HeaderValue, arrived: Instant) -> Result<Instant, Error> {
    match value.to_str().ok().and_then(|text| text.trim().parse::<u32>().ok()) {
        Some(milliseconds) if milliseconds > 0 => Ok(arrived + Duration::from_millis(milliseconds.into())),
        _ => Err(Error::Header { name: DEADLINE_MS, expected: "a whole number of milliseconds above 0" }),
    }
}

/// Names the request in its answer.
pub(super) fn identify<B>(response: &mut Response<B>, name: &RequestName) {
    if let Ok(value) = HeaderValue::from_str(name.as_str()) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
}

/// Says where and how an answer was made.
pub(super) fn describe<B>(
    response: &mut Response<B>,
    route: &Route,
    worker: &Worker,
    (queued, predicted_wait): (Duration, Duration),
) {
    let headers = response.headers_mut();
    headers.insert(WORKER, worker.header.clone());
    if let Ok(model) = HeaderValue::from_str(&route.model.name) {
        headers.insert(MODEL, model);
    }
    headers.insert(QUEUE_MS, whole_milliseconds(queued));
    headers.insert(PREDICTED_WAIT_MS, whole_milliseconds(predicted_wait));
}

/// Lists the attempts that brought nothing, where there were any: `gpu-a=timeout, gpu-b=status`.
pub(super) fn attempts<B>(response: &mut Response<B>, failures: &[(Arc<str>, &'static str)]) {
    let listed: Vec<String> = failures.iter().map(|(worker, reason)| format!("{worker}={reason}")).collect();
    if let (false, Ok(value)) = (listed.is_empty(), HeaderValue::try_from(listed.join(", ").into_bytes())) {
        response.headers_mut().insert(ATTEMPTS, value);
    }
}

fn whole_milliseconds(duration: Duration) -> HeaderValue {
    HeaderValue::from(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
}
