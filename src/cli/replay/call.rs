//! One request of a replay: sent, followed to its end, and when what came.

use anyhow::Context;
use bytes::Bytes;
use forebay_backends::transport::{Body, Channel, Outgoing, Response};
use forebay_proto::error::from_engine;
use forebay_proto::sse::Splitter;
use forebay_proto::stream::{self, Chunk, Completeness, Usage};
use forebay_scheduler::Class;
use http::header::{CONTENT_TYPE, HeaderName};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use serde::Serialize;
use tokio::time::Instant;

use super::prompts::Prompt;
use crate::telemetry::metrics::CLASSES;

const PATH: &str = "/v1/completions";
const EVENT_BYTES_MAX: usize = 8 << 20;
const ERROR_BYTES_MAX: usize = 64 << 10;
const PRIORITY: HeaderName = HeaderName::from_static("x-forebay-priority");

/// The body. `ignore_eos` is the engines' word for an answer that goes on to its last token.
#[derive(Serialize)]
struct Asked<'a> {
    model: &'a str,
    prompt: &'a Prompt,
    max_tokens: u32,
    ignore_eos: bool,
    stream: bool,
    stream_options: StreamOptions,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

/// The body of a request for so many tokens; none is not to be had, so that 0 counts as 1.
pub(super) fn body(model: &str, prompt: &Prompt, output_tokens: u32) -> anyhow::Result<Bytes> {
    let asked = Asked {
        model,
        prompt,
        max_tokens: output_tokens.max(1),
        ignore_eos: true,
        stream: true,
        stream_options: StreamOptions { include_usage: true },
    };
    Ok(serde_json::to_vec(&asked).context("cannot write a request")?.into())
}

/// What became of a request.
pub(super) struct Outcome {
    pub(super) sent: Instant,
    pub(super) first: Option<Instant>,
    pub(super) ended: Instant,
    pub(super) end: End,
    /// What the endpoint says it used, where it does.
    pub(super) usage: Option<Usage>,
    /// `x-forebay-worker`, where a gateway answered.
    pub(super) worker: Option<String>,
}

/// How it ended, in the words of the report.
#[derive(Debug, PartialEq)]
pub(super) enum End {
    Finished,
    Shed(String),
    TimedOut(String),
    Refused(String),
    Failed(String),
}

/// Sends one request and reads its answer to the end.
pub(super) async fn call(channel: &Channel, body: Bytes, class: Class) -> Outcome {
    let sent = Instant::now();
    let mut outcome = Outcome { sent, first: None, ended: sent, end: End::Finished, usage: None, worker: None };
    outcome.end = match channel.send(outgoing(body, class)).await {
        Ok(response) => {
            let worker = response.headers.get("x-forebay-worker");
            outcome.worker = worker.and_then(|name| name.to_str().ok()).map(str::to_owned);
            if response.status == StatusCode::OK {
                follow(response.body, &mut outcome).await.map_or_else(End::Failed, |()| End::Finished)
            } else {
                refused(response).await
            }
        }
        // The transport's own words speak of a worker.
        Err(error) => End::Failed(anyhow::Error::from(error).root_cause().to_string()),
    };
    outcome.ended = Instant::now();
    outcome
}

fn outgoing(body: Bytes, class: Class) -> Outgoing {
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Some(name) = CLASSES.get(class as usize).filter(|_| class != Class::Default) {
        headers.insert(PRIORITY, HeaderValue::from_static(name));
    }
    Outgoing { method: Method::POST, path: PathAndQuery::from_static(PATH), headers, body }
}

/// Reads a stream to its end, and whether that was a good one.
async fn follow(mut body: Body, outcome: &mut Outcome) -> Result<(), String> {
    let mut splitter = Splitter::new(EVENT_BYTES_MAX);
    let mut completeness = Completeness::new(1);
    while let Some(bytes) = body.next().await {
        splitter.push(bytes.map_err(|error| error.to_string())?);
        while let Some(event) = splitter.next().map_err(|error| error.to_string())? {
            match event.data.as_deref().map(stream::read) {
                None | Some(Chunk::Done) => {}
                Some(Chunk::Error { error, .. }) => return Err(error.message),
                Some(Chunk::Malformed) => return Err("an event that is not JSON".to_owned()),
                Some(Chunk::Delta(delta)) => {
                    if !delta.choices.is_empty() {
                        outcome.first.get_or_insert_with(Instant::now);
                    }
                    completeness.observe(&delta);
                    outcome.usage = delta.usage.or(outcome.usage.take());
                }
            }
        }
    }
    if completeness.complete() { Ok(()) } else { Err("the stream broke off".to_owned()) }
}

async fn refused(response: Response) -> End {
    let status = response.status;
    let body = response.body.collect(ERROR_BYTES_MAX).await.unwrap_or_default();
    let message = format!("{status}: {}", from_engine(status.as_u16(), &body).message);
    match status {
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => End::Shed(message),
        StatusCode::REQUEST_TIMEOUT | StatusCode::GATEWAY_TIMEOUT => End::TimedOut(message),
        status if status.is_client_error() => End::Refused(message),
        _ => End::Failed(message),
    }
}
