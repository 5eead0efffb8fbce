//! OpenTelemetry traces: what a request waited for and where, told to a collector over OTLP.
//!
//! A [`Trace`] notes moments while its request is under way and is handed over whole at its end; a task of its own makes
//! spans of it and sends them in batches. A request never waits for it: where the queue is full, or the collector takes
//! nothing, spans are dropped and counted.
//!
//! Spans: the request (server), within it its prompt's counting, each wait in lanes, and each attempt (client, with
//! `gen_ai.*`), within which the wait for the first token. Not here: what was asked and answered.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use forebay_backends::transport::Channel;
use forebay_proto::otlp::{
    self, ExportTraces, Exported, KeyValue, Kind, Resource, ResourceSpans, Scope, ScopeSpans, Span, Value,
};
use forebay_proto::trace_context::TraceParent;
use metrics::Counter;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::metrics::Api;

/// Traces that may wait to be sent: a second's at some thousand requests a second, and some 4 MB.
const WAITING_MAX: usize = 8192;
/// Sent at once; a request has some six spans.
const BATCH_MAX: usize = 256;
/// How long traces gather.
const GATHER: Duration = Duration::from_secs(1);
/// How long a collector may take.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// A collector's answer says how many spans it did not take, and why.
const ANSWER_BYTES_MAX: usize = 64 << 10;
/// Spans beside attempts are numbered from here on.
const OTHERS_FROM: u64 = 256;

/// Begins traces; clones share the way out.
#[derive(Debug, Clone)]
pub struct Traces {
    finished: mpsc::Sender<Box<Trace>>,
    /// Of the requests that come without a trace, how many begin one.
    share: f64,
    dropped: Counter,
}

/// One request's moments.
#[derive(Debug)]
pub struct Trace {
    traces: Traces,
    /// Of the request's own span.
    own: TraceParent,
    parent: Option<u64>,
    began: (SystemTime, Instant),
    steps: Vec<Step>,
    end: Option<(Instant, Facts)>,
}

#[derive(Debug)]
struct Step {
    what: What,
    from: Instant,
    to: Option<Instant>,
}

#[derive(Debug)]
enum What {
    Prepare,
    Queue,
    Attempt { worker: Arc<str>, engine: &'static str },
    FirstToken,
}

/// What is known of a request at its end.
#[derive(Debug)]
pub struct Facts {
    pub request: Arc<str>,
    pub api: Api,
    pub model: Option<Arc<str>>,
    pub stream: bool,
    pub status: u16,
    /// What went wrong, in a word; `None` when nothing did.
    pub error: Option<&'static str>,
    pub input_tokens: u32,
    pub cached_tokens: Option<u32>,
    pub output_tokens: u32,
}

impl Traces {
    /// Where traces go, and the task that sends them to the collector at `channel`; it ends when all that may begin one
    /// are gone.
    pub fn new(channel: Channel, share: f64) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (finished, waiting) = mpsc::channel(WAITING_MAX);
        let dropped = super::metrics::spans_dropped();
        let sending = send(channel, waiting, dropped.clone());
        (Self { finished, share, dropped }, sending)
    }

    /// The trace of a request that arrives now, if it has one: as whoever came before decided, else by chance.
    #[must_use]
    pub fn begin(&self, parent: Option<TraceParent>) -> Option<Box<Trace>> {
        let is_sampled = parent.map_or_else(|| rand::random::<f64>() < self.share, |parent| parent.is_sampled);
        is_sampled.then(|| {
            let trace = parent.map_or_else(|| rand::random::<u128>().max(1), |parent| parent.trace);
            // With room for the numbers of its children.
            let span = rand::random::<u64>() >> 1 | 1 << 32;
            Box::new(Trace {
                traces: self.clone(),
                own: TraceParent { trace, span, is_sampled },
                parent: parent.map(|parent| parent.span),
                began: (SystemTime::now(), Instant::now()),
                steps: Vec::with_capacity(4),
                end: None,
            })
        })
    }
}

impl Trace {
    /// What an engine is told of where it stands: within the attempt of this number, from 1.
    #[must_use]
    pub fn own(&self) -> TraceParent {
        self.own
    }

    /// The prompt's counting begins.
    pub fn routed(&mut self) {
        self.steps.push(Step { what: What::Prepare, from: Instant::now(), to: None });
    }

    /// It has ended.
    pub fn prepared(&mut self, now: Instant) {
        self.close(now);
    }

    /// An attempt begins, after so long in lanes.
    pub fn sent(&mut self, worker: &Arc<str>, engine: &'static str, queued: Duration) {
        let now = Instant::now();
        let from = now.checked_sub(queued).unwrap_or(now);
        self.close(from);
        self.steps.push(Step { what: What::Queue, from, to: Some(now) });
        self.steps.push(Step { what: What::Attempt { worker: Arc::clone(worker), engine }, from: now, to: None });
    }

    /// The answer's first event or byte is here.
    pub fn first_token(&mut self, now: Instant) {
        let attempt = self.steps.iter().rfind(|step| step.to.is_none());
        if let Some(from) = attempt.map(|attempt| attempt.from) {
            self.steps.push(Step { what: What::FirstToken, from, to: Some(now) });
        }
    }

    /// The request has ended.
    pub fn finish(mut self: Box<Self>, now: Instant, facts: Facts) {
        self.close(now);
        self.end = Some((now, facts));
        let Traces { finished, dropped, .. } = self.traces.clone();
        if let Err(refused) = finished.try_send(self) {
            dropped.increment(refused.into_inner().spans_count());
        }
    }

    fn close(&mut self, now: Instant) {
        for step in &mut self.steps {
            step.to.get_or_insert(now);
        }
    }

    fn spans_count(&self) -> u64 {
        self.steps.len() as u64 + 1
    }

    fn spans(&self, spans: &mut Vec<Span>) {
        let Some((end, facts)) = &self.end else { return };
        let model = facts.model.as_deref().unwrap_or_default();
        let (operation, route) = match facts.api {
            Api::Completions => ("text_completion", "/v1/completions"),
            Api::Embeddings => ("embeddings", "/v1/embeddings"),
            Api::Rerank => ("rerank", "/v1/rerank"),
            Api::Score => ("score", "/v1/score"),
            Api::Pooling => ("pooling", "/pooling"),
            Api::Classify => ("classify", "/v1/classify"),
            Api::Chat | Api::Tokenize | Api::Detokenize => ("chat", "/v1/chat/completions"),
        };
        let mut attributes = vec![
            text("http.request.method", "POST"),
            text("http.route", route),
            int("http.response.status_code", facts.status.into()),
            text("forebay.request", &facts.request),
        ];
        attributes.extend(facts.error.map(|error| text("error.type", error)));
        let own = self.span(self.own.span, self.parent, format!("POST {route}"), Kind::Server, (self.began.1, *end));
        spans.push(Span { attributes, status: status(facts.error), ..own });

        let attempts = self.steps.iter().filter(|step| matches!(step.what, What::Attempt { .. })).count() as u64;
        let first = self.steps.iter().find(|step| matches!(step.what, What::FirstToken));
        let mut attempt = 0;
        for (number, step) in (OTHERS_FROM..).zip(&self.steps) {
            let id = self.own.span + number;
            let time = (step.from, step.to.unwrap_or(*end));
            let within = |parent, name: &str, kind| self.span(id, Some(parent), name.to_owned(), kind, time);
            spans.push(match &step.what {
                What::Prepare => within(self.own.span, "prepare", Kind::Internal),
                What::Queue => within(self.own.span, "queue", Kind::Internal),
                What::FirstToken => within(self.own.span + attempt, "first_token", Kind::Internal),
                What::Attempt { worker, engine } => {
                    attempt += 1;
                    let error = if attempt < attempts { Some("failed") } else { facts.error };
                    let mut attributes = vec![
                        text("gen_ai.operation.name", operation),
                        text("gen_ai.provider.name", engine),
                        text("gen_ai.request.model", model),
                        otlp::attribute("gen_ai.request.stream", Value::Bool(facts.stream)),
                        text("forebay.worker", worker),
                    ];
                    attributes.extend(error.map(|error| text("error.type", error)));
                    if let (Some(first), true) = (first, attempt == attempts) {
                        let waited = first.to.unwrap_or(*end).duration_since(first.from).as_secs_f64();
                        attributes.extend([
                            otlp::attribute("gen_ai.response.time_to_first_chunk", Value::Double(waited)),
                            int("gen_ai.usage.input_tokens", facts.input_tokens),
                            int("gen_ai.usage.output_tokens", facts.output_tokens),
                        ]);
                        let cached =
                            facts.cached_tokens.map(|cached| int("gen_ai.usage.cache_read.input_tokens", cached));
                        attributes.extend(cached);
                    }
                    let parent = Some(self.own.span);
                    let span =
                        self.span(self.own.span + attempt, parent, format!("{operation} {model}"), Kind::Client, time);
                    Span { attributes, status: status(error), ..span }
                }
            });
        }
    }

    fn span(&self, id: u64, parent: Option<u64>, name: String, kind: Kind, time: (Instant, Instant)) -> Span {
        let bytes = |id: u64| Bytes::copy_from_slice(&id.to_be_bytes());
        Span {
            trace_id: Bytes::copy_from_slice(&self.own.trace.to_be_bytes()),
            span_id: bytes(id),
            parent_span_id: parent.map(bytes).unwrap_or_default(),
            name,
            kind: kind.into(),
            start_time_unix_nano: self.nanoseconds(time.0),
            end_time_unix_nano: self.nanoseconds(time.1),
            attributes: Vec::new(),
            status: None,
        }
    }

    /// Since 1970.
    fn nanoseconds(&self, moment: Instant) -> u64 {
        let (wall, began) = self.began;
        let since = wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let at = (since + moment.saturating_duration_since(began)).as_nanos();
        u64::try_from(at).unwrap_or(u64::MAX)
    }
}

fn text(key: &str, value: &str) -> KeyValue {
    otlp::attribute(key, Value::Text(value.to_owned()))
}

fn int(key: &str, value: u32) -> KeyValue {
    otlp::attribute(key, Value::Int(value.into()))
}

fn status(error: Option<&str>) -> Option<otlp::Status> {
    error.map(|_| otlp::Status { message: String::new(), code: otlp::Code::Error.into() })
}

/// Sends what is finished, until nothing more can come.
async fn send(channel: Channel, mut waiting: mpsc::Receiver<Box<Trace>>, dropped: Counter) {
    let mut batch = Vec::with_capacity(BATCH_MAX);
    let mut is_well = true;
    while waiting.recv_many(&mut batch, BATCH_MAX).await > 0 {
        let end = Instant::now() + GATHER;
        while batch.len() < BATCH_MAX
            && let Ok(more) = timeout_at(end, waiting.recv_many(&mut batch, BATCH_MAX)).await
            && more > 0
        {}
        let mut spans = Vec::new();
        batch.drain(..).for_each(|trace| trace.spans(&mut spans));
        let refused = export(&channel, spans).await;
        if let Some((count, reason)) = &refused {
            dropped.increment(*count);
            if is_well {
                tracing::warn!(reason, count, "the collector does not take all traces, what it refuses is dropped");
            }
        }
        is_well = refused.is_none();
    }
}

/// How many of the spans the collector did not take, and why.
async fn export(channel: &Channel, spans: Vec<Span>) -> Option<(u64, String)> {
    let count = spans.len() as u64;
    let resource = Resource {
        attributes: vec![text("service.name", "forebay"), text("service.version", env!("CARGO_PKG_VERSION"))],
    };
    let scope = Scope { name: "forebay".to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() };
    let spans = ScopeSpans { scope: Some(scope), spans };
    let message =
        ExportTraces { resource_spans: vec![ResourceSpans { resource: Some(resource), scope_spans: vec![spans] }] };
    match channel.call::<Exported>(otlp::EXPORT_PATH, &message, EXPORT_TIMEOUT, ANSWER_BYTES_MAX).await {
        Ok(Exported { partial_success: None }) => None,
        Ok(Exported { partial_success: Some(partial) }) => {
            let rejected = u64::try_from(partial.rejected_spans).unwrap_or(0);
            (rejected > 0).then_some((rejected, partial.error_message))
        }
        Err(error) => Some((count, error.to_string())),
    }
}
