//! What every request cost and how it ended: exactly one durable row each, whatever happens.
//!
//! An [`Entry`] is opened before anything else is done for a request and dropped last; its `Drop` writes the row, so
//! completion, refusal, upstream failure, a client that leaves and shutdown all end the same way. Opening takes a
//! place in the journal's bounded channel: a full channel (the disk stands still) refuses new requests, and a row
//! whose request was let in can never be lost for want of room.
//!
//! Not here: prices and stored usage (they read the journal), and who is asked to pay.

mod journal;
mod row;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use forebay_proto::stream::Usage;
use forebay_proto::trace_context::TraceParent;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::ids::RequestName;
use crate::telemetry::metrics::Api;
use crate::telemetry::traces::Facts;
use crate::telemetry::{ModelMetrics, Trace};

pub use journal::Journal;
pub use row::{Outcome, Row, TokensFrom};

/// Rows that may be open or waiting for the disk at one time, and so the most requests inside the gateway. A row is
/// some 300 bytes.
pub const OPEN_ROWS_MAX: usize = 65_536;

/// More tokens than any engine counts for one request.
const TOKENS_PLAUSIBLE_MAX: u64 = 1 << 28;

/// The ledger cannot take another row now: the disk does not keep up.
#[derive(Debug, thiserror::Error)]
#[error("the usage journal is full")]
pub struct Full;

/// Opens entries.
#[derive(Debug, Clone)]
pub struct Ledger {
    rows: mpsc::Sender<Row>,
    /// What requests for models that nobody configured count as.
    other: Arc<ModelMetrics>,
}

impl Ledger {
    /// Starts the journal in `directory` (made when absent). With `access_log`, each row also goes to standard
    /// output as a line of JSON, dropped rather than waited for when nobody reads it.
    ///
    /// # Errors
    /// When the directory cannot be made or written.
    pub fn start(directory: &Path, access_log: bool, other: Arc<ModelMetrics>) -> std::io::Result<(Self, Journal)> {
        let (rows, receiver) = mpsc::channel(OPEN_ROWS_MAX);
        let journal = Journal::start(directory, access_log, receiver)?;
        Ok((Self { rows, other }, journal))
    }

    /// Opens the row of a request that arrived just now.
    ///
    /// # Errors
    /// [`Full`] when the journal has no room.
    pub fn open(&self, name: RequestName, api: Api) -> Result<Entry, Full> {
        let permit = self.rows.clone().try_reserve_owned().map_err(|_| Full)?;
        Ok(Entry {
            permit: Some(permit),
            metrics: Arc::clone(&self.other),
            arrived: Instant::now(),
            counted: None,
            first: None,
            failed: Vec::new(),
            apportioned: false,
            row: Box::new(Row::new(name, api, SystemTime::now())),
            trace: None,
            within: None,
            told: None,
        })
    }
}

/// One request's row in the making. Dropping it writes the row.
#[derive(Debug)]
pub struct Entry {
    permit: Option<mpsc::OwnedPermit<Row>>,
    metrics: Arc<ModelMetrics>,
    arrived: Instant,
    /// When its prompt was counted, which is when it began to wait for a worker; until it is sent to one.
    counted: Option<Instant>,
    first: Option<Instant>,
    /// Attempts that brought nothing, and why.
    failed: Vec<(Arc<str>, &'static str)>,
    row: Box<Row>,
    /// What the engine says it used is of a call of several, and divided.
    apportioned: bool,
    /// Handed over at the end.
    trace: Option<Box<Trace>>,
    /// Of a call that several requests share: where the first of them stands in its trace.
    within: Option<TraceParent>,
    /// Where such a call is followed until it is answered.
    told: Option<watch::Sender<Option<Cost>>>,
}

/// What a call that several requests share went through, and has cost by now.
#[derive(Debug, Clone)]
pub struct Cost {
    metrics: Arc<ModelMetrics>,
    counted: Option<Instant>,
    failed: Vec<(Arc<str>, &'static str)>,
    row: Row,
}

impl Cost {
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        self.row.outcome
    }
}

impl Entry {
    #[must_use]
    pub fn name(&self) -> &RequestName {
        &self.row.request
    }

    #[must_use]
    pub fn arrived(&self) -> Instant {
        self.arrived
    }

    /// Lets a trace be told what happens.
    pub fn trace(&mut self, trace: Option<Box<Trace>>) {
        self.trace = trace;
    }

    /// Where the request stands in its trace.
    #[must_use]
    pub fn trace_parent(&self) -> Option<TraceParent> {
        self.trace.as_ref().map(|trace| trace.own()).or(self.within)
    }

    /// Names the configured model that will answer.
    pub fn routed(&mut self, model: &Arc<str>, metrics: &Arc<ModelMetrics>) {
        // It waited for another model's workers, and none took it.
        self.waited(Instant::now());
        self.row.model = Some(Arc::clone(model));
        self.metrics = Arc::clone(metrics);
        if let Some(trace) = &mut self.trace {
            trace.routed();
        }
    }

    /// Notes the prompt's length; `exact` when counted with the model's own tokenizer.
    pub fn prompt(&mut self, tokens: u32, exact: bool) {
        let now = Instant::now();
        self.counted = Some(now);
        if let Some(trace) = &mut self.trace {
            trace.prepared(now);
        }
        self.row.prompt_tokens = tokens;
        self.row.prompt_tokens_from = if exact { TokensFrom::Tokenizer } else { TokensFrom::Estimate };
        self.tell();
    }

    /// Notes one more attempt: at which worker, of which engine, after how long in lanes.
    pub fn sent(&mut self, worker: &Arc<str>, engine: &'static str, queued: Duration) {
        if let Some(trace) = &mut self.trace {
            trace.sent(worker, engine, queued);
        }
        self.row.worker = Some(Arc::clone(worker));
        self.row.queue_ms += milliseconds(queued);
        self.counted = None;
        self.row.attempts += 1;
        self.tell();
    }

    /// Notes that this worker has computed the prompt, and whether it kept it for another.
    pub fn prefilled(&mut self, worker: &Arc<str>, kept: bool) {
        self.row.prefill_worker = Some(Arc::clone(worker)).filter(|_| kept);
        if let Some(trace) = &mut self.trace {
            trace.prefilled();
        }
        self.tell();
    }

    /// Notes the time in lanes of a request that nobody sent.
    fn waited(&mut self, until: Instant) {
        if let Some(counted) = self.counted.take() {
            self.row.queue_ms += milliseconds(until.saturating_duration_since(counted));
        }
    }

    /// Notes that the attempt at this worker brought nothing, for a reason in a word.
    pub fn failed(&mut self, worker: &Arc<str>, reason: &'static str) {
        self.failed.push((Arc::clone(worker), reason));
        self.tell();
    }

    /// The attempts that brought nothing, in order.
    #[must_use]
    pub fn failures(&self) -> &[(Arc<str>, &'static str)] {
        &self.failed
    }

    pub fn streaming(&mut self, stream: bool) {
        self.row.stream = stream;
    }

    /// The answer's first event or byte is here, and with it the client's status line: 200. The worker it comes from was
    /// expected to have so many of the prompt's tokens in its cache.
    pub fn first_byte(&mut self, worker: &Arc<str>, matched_tokens: u32) {
        self.row.worker = Some(Arc::clone(worker));
        self.row.status = 200;
        self.row.matched_tokens = Some(matched_tokens);
        let now = Instant::now();
        self.first = Some(now);
        if let Some(trace) = &mut self.trace {
            trace.first_token(now);
        }
        self.row.ttft_ms = Some(milliseconds(now.duration_since(self.arrived)));
    }

    /// Notes that the answer is a part of one to several requests, whose counts are divided.
    pub fn apportioned(&mut self) {
        self.apportioned = true;
    }

    /// Notes what the engine says it used, if it says anything; it wins over our own counts.
    pub fn used(&mut self, usage: Option<Usage>) {
        let Some(usage) = usage else { return };
        if usage.prompt_tokens.max(usage.completion_tokens) > TOKENS_PLAUSIBLE_MAX {
            return; // one absurd answer must not spoil every sum it goes into
        }
        let tokens = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
        self.row.prompt_tokens = tokens(usage.prompt_tokens);
        self.row.prompt_tokens_from = if self.apportioned { TokensFrom::Apportioned } else { TokensFrom::Engine };
        self.row.output_tokens = tokens(usage.completion_tokens);
        self.row.output_tokens_from = TokensFrom::Engine;
        self.row.cached_tokens = usage.cached_tokens.map(tokens);
    }

    /// Notes one event with content, for answers whose usage never comes.
    pub fn produced(&mut self) {
        if self.row.output_tokens_from != TokensFrom::Engine {
            self.row.output_tokens = self.row.output_tokens.saturating_add(1);
            self.row.output_tokens_from = TokensFrom::Events;
        }
    }

    /// An entry for a call that several requests share, and where it can be followed: it notes what theirs are told
    /// ([`Entry::shared`]), and becomes no row. The call stands in the trace of this request.
    #[must_use]
    pub fn of_all(&self) -> (Self, watch::Receiver<Option<Cost>>) {
        let (told, heard) = watch::channel(None);
        let all = Self {
            permit: None,
            metrics: Arc::clone(&self.metrics),
            arrived: self.arrived,
            counted: None,
            first: None,
            failed: Vec::new(),
            apportioned: false,
            row: self.row.clone(),
            trace: None,
            within: self.trace_parent(),
            told: Some(told),
        };
        (all, heard)
    }

    /// What its call has cost by now.
    #[must_use]
    pub fn cost(&self) -> Cost {
        Cost {
            metrics: Arc::clone(&self.metrics),
            counted: self.counted,
            failed: self.failed.clone(),
            row: Row::clone(&self.row),
        }
    }

    fn tell(&self) {
        if let Some(told) = &self.told {
            told.send_replace(Some(self.cost()));
        }
    }

    /// Takes over what a shared call has cost. One of its requests pays; the others' rows say that they do not.
    pub fn shared(&mut self, call: &Cost, pays: bool) {
        let Cost { metrics, counted, failed, row: call } = call;
        self.metrics.clone_from(metrics);
        self.counted = counted.map(|counted| counted.max(self.arrived));
        self.failed.clone_from(failed);
        let row = &mut *self.row;
        row.model.clone_from(&call.model);
        row.worker.clone_from(&call.worker);
        row.prefill_worker.clone_from(&call.prefill_worker);
        row.attempts = call.attempts;
        (row.prompt_tokens, row.prompt_tokens_from) = (call.prompt_tokens, call.prompt_tokens_from);
        (row.cached_tokens, row.matched_tokens) = (call.cached_tokens, call.matched_tokens);
        (row.output_tokens, row.output_tokens_from) = (call.output_tokens, call.output_tokens_from);
        row.queue_ms = call.queue_ms;
        row.cache = if pays { None } else { Some("coalesced") };
    }

    #[must_use]
    pub fn row(&self) -> &Row {
        &self.row
    }

    /// Says how the request ended; the last word counts. An entry that is dropped without it was left by its client.
    pub fn end(&mut self, outcome: Outcome, status: u16) {
        // A deadline that passes at a worker is no refusal: an engine saw the request.
        let tried = outcome == Outcome::Refused && self.row.attempts > 0;
        self.row.outcome = if tried { Outcome::Failed } else { outcome };
        self.row.status = status;
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let Some(permit) = self.permit.take() else { return };
        let now = Instant::now();
        let total = now.duration_since(self.arrived);
        self.row.total_ms = milliseconds(total);
        self.waited(now);
        self.metrics.answered(self.row.api, self.row.status, total.as_secs_f64());
        let row = &self.row;
        if row.cache.is_none() {
            self.metrics.prompt_tokens.increment(u64::from(if self.first.is_some() { row.prompt_tokens } else { 0 }));
            self.metrics.prefix_hit_tokens.increment(u64::from(row.matched_tokens.unwrap_or(0)));
            self.metrics.cached_tokens.increment(u64::from(row.cached_tokens.unwrap_or(0)));
            self.metrics.output_tokens.increment(u64::from(row.output_tokens));
        }
        if let (Some(first), true) = (self.first, row.stream) {
            self.metrics.ttft.record(first.duration_since(self.arrived).as_secs_f64());
            if row.output_tokens > 1 {
                let gaps = f64::from(row.output_tokens - 1);
                self.metrics.tpot.record(now.duration_since(first).as_secs_f64() / gaps);
            }
        }
        if let Some(trace) = self.trace.take() {
            let facts = Facts {
                request: row.request.shared(),
                api: row.api,
                model: row.model.clone(),
                stream: row.stream,
                status: row.status,
                error: row.outcome.error(),
                input_tokens: row.prompt_tokens,
                cached_tokens: row.cached_tokens,
                output_tokens: row.output_tokens,
            };
            trace.finish(now, facts);
        }
        permit.send(Row::clone(&self.row));
    }
}

fn milliseconds(duration: Duration) -> f64 {
    // Microseconds are as fine as anyone reads; it keeps the rows short.
    (duration.as_secs_f64() * 1e6).round() / 1e3
}
