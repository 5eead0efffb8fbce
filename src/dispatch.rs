//! When and where inside a pool: the scheduler's core and what happens at its word.
//!
//! [`Dispatch::open`] asks the core for a place, sends the request there and waits for the first event or byte of the
//! answer. An attempt that fails before that is placed again by the core, elsewhere where it can; afterwards nothing
//! is ever retried. A [`Place`] is the core's promise for one request; dropping it gives the place back.
//!
//! Here: `driver` owns the core, `attempt` speaks with one worker, `micro_batch` makes one call
//! of several requests, `intake` owns the tasks that feed the core with
//! what workers report of themselves, `kv` what they publish of their caches, `gpus` what is said of their GPUs, `explain` tells administration what the
//! core knows and why it decided as it did. Not here: another model or a cloud when a pool cannot (`pipeline`).

mod attempt;
mod driver;
mod explain;
mod gpus;
mod intake;
mod kv;
mod micro_batch;
mod recent;
mod workers;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use forebay_backends::engines::{Answer, Api};
use forebay_proto::error::ApiError;
use forebay_proto::sse::{Event, Splitter};
use forebay_proto::trace_context::TraceParent;
use forebay_scheduler::{Class, PoolId, Refusal, Request, RouteId, TenantId};
use http::{HeaderMap, HeaderValue, StatusCode};
use tokio::time::Instant;
use tracing::Instrument;

use crate::ids::RequestName;
use crate::prepare::{Asked, Prepare, Prompt};
use crate::routing::Model;
use crate::telemetry::Registry;
use attempt::Failed;
pub use driver::Place;
use driver::{Driver, Verdict, Waiting};
pub use explain::{Decided, Explained, Moment, NotKept, Unweighed, Weighed, WorkerStatus};
pub use gpus::{GpuStatus, NodeSpec};
use intake::Intake;
pub use intake::{Fact, Learned, PoolSpec, WorkerSpec};
use micro_batch::MicroBatches;
use recent::{Known, Names, Recent};
pub use workers::Worker;
use workers::Workers;

/// One request for a pool.
pub struct Job<'a> {
    /// What the client calls the request.
    pub name: RequestName,
    /// Other requests that its answer is for, see `micro_batch`.
    pub others: &'a [RequestName],
    /// Where it stands in its trace; its attempts stand below it, numbered from there.
    pub trace: Option<TraceParent>,
    pub model: &'a Arc<Model>,
    /// For engines that want a prompt written out.
    pub prepare: &'a Arc<Prepare>,
    pub class: Class,
    /// Latest first token.
    pub deadline: Option<Instant>,
    pub prompt: Prompt,
    pub asked: &'a Arc<Asked>,
    pub body: Bytes,
    pub api: Api,
    pub headers: HeaderMap,
}

impl Job<'_> {
    fn names(&self) -> Names {
        std::iter::once(&self.name).chain(self.others).cloned().collect()
    }

    fn streamed(&self) -> bool {
        self.asked.streaming().is_some_and(|streaming| streaming.stream)
    }
}

/// An answer that has begun.
pub struct Opened {
    pub place: Place,
    pub worker: Arc<Worker>,
    /// Waited in lanes, over all attempts.
    pub queued: Duration,
    /// What the core expected when the request came: from then to the first token.
    pub predicted_wait: Duration,
    /// Prompt tokens the core expected in the worker's cache.
    pub matched_tokens: u32,
    pub reply: Reply,
}

/// The answer's form.
pub enum Reply {
    Stream(Streamed),
    Whole(Whole),
}

/// A stream whose first event is here.
pub struct Streamed {
    pub first: VecDeque<Event>,
    pub splitter: Splitter,
    pub body: Answer,
}

/// A document, whole or as much of it as is held back for a retry.
pub struct Whole {
    pub content_type: HeaderValue,
    pub head: VecDeque<Bytes>,
    pub rest: Option<Answer>,
    /// Bytes of the whole document, where known.
    pub length: Option<u64>,
}

/// Why no worker answered.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error("{reason}")]
    Refused { reason: Refusal, retry_after: Option<Duration> },
    /// An engine's own error: its refusal of the request (4xx), or the last of several failures.
    #[error("the engine answered {status}: {}", .error.message)]
    Engine { status: StatusCode, error: ApiError, retry_after: Option<Duration> },
}

/// The room: pools, workers and the core.
pub struct Dispatch {
    driver: Arc<Driver>,
    workers: Arc<Workers>,
    intake: Arc<Intake>,
    recent: Recent,
    micro_batches: MicroBatches,
    registry: Registry,
}

impl Dispatch {
    /// Brings `job` to a worker of its pool. `on_send` hears of each attempt before it begins: where it goes and how
    /// long it waited in lanes since the last one.
    ///
    /// Dropping the future withdraws the request: from its lane, or from the engine by closing the connection.
    ///
    /// # Errors
    /// See [`Error`]; the client has seen nothing, and no engine works on the request any more.
    pub async fn open(
        &self,
        job: Job<'_>,
        mut on_send: impl FnMut(&Arc<Worker>, Duration) + Send,
    ) -> Result<Opened, Error> {
        let (place, verdict) = self.driver.arrive(|id| request(id, &job, &self.driver));
        let known = Arc::new(Known::new(job.names(), place.request(), (job.model.pool, job.class, job.prompt.tokens)));
        self.recent.note(Arc::clone(&known));
        let attempts = std::pin::pin!(self.attempts(&job, place, verdict, |worker, waited| {
            known.sent(worker.id, waited);
            on_send(worker, waited);
        }));
        let opened = match job.deadline {
            Some(deadline) => tokio::time::timeout_at(deadline, attempts)
                .await
                .unwrap_or(Err(Error::Refused { reason: Refusal::DeadlinePassed, retry_after: None })),
            None => attempts.await,
        };
        if let Err(Error::Refused { reason, retry_after }) = &opened {
            known.refused(*reason, *retry_after);
        }
        opened
    }

    /// Remembers a request whose deadline passed before it could be brought to a worker, so that it can be explained.
    pub fn too_late(&self, name: RequestName, pool: PoolId, class: Class) {
        let known = Known::new([name].into(), self.driver.next_request(), (pool, class, 0));
        known.refused(Refusal::DeadlinePassed, None);
        self.recent.note(Arc::new(known));
    }

    async fn attempts(
        &self,
        job: &Job<'_>,
        mut place: Place,
        mut verdict: Waiting,
        mut on_send: impl FnMut(&Arc<Worker>, Duration),
    ) -> Result<Opened, Error> {
        let class = job.class as usize;
        let mut queued = Duration::ZERO;
        let mut attempts = 0;
        let mut failed: Option<forebay_scheduler::Failure> = None;
        let mut last: Option<Error> = None;
        loop {
            let waiting_since = Instant::now();
            let sent = match verdict.wait().instrument(tracing::debug_span!("queue")).await {
                Verdict::Sent(sent) => sent,
                Verdict::Refused { reason: reason @ Refusal::AttemptsExhausted { .. }, retry_after } => {
                    return Err(last.unwrap_or(Error::Refused { reason, retry_after }));
                }
                Verdict::Refused { reason, retry_after } => return Err(Error::Refused { reason, retry_after }),
            };
            let waited = waiting_since.elapsed();
            self.registry.queue_waited(class, waited.as_secs_f64());
            queued += waited;
            attempts += 1;
            if let Some(failure) = failed.take() {
                self.registry.retried(attempt::reason(failure));
            }
            let Some(worker) = self.workers.get(sent.worker) else {
                // It left between the decision and now.
                verdict = place.attempt_failed(forebay_scheduler::Failure::Connect);
                continue;
            };
            on_send(&worker, waited);
            let span = tracing::debug_span!("attempt", worker = &*worker.name, number = attempts);
            match attempt::attempt(&worker, job, attempts).instrument(span).await {
                Ok(reply) => {
                    place.first_token();
                    return Ok(Opened {
                        place,
                        worker,
                        queued,
                        predicted_wait: sent.predicted_wait,
                        matched_tokens: sent.matched_tokens,
                        reply,
                    });
                }
                Err(Failed::Final(error)) => {
                    place.answered_with_refusal();
                    return Err(*error);
                }
                Err(Failed::Elsewhere { failure, shown }) => {
                    tracing::info!(worker = &*worker.name, %failure, attempts, "an attempt failed before its first byte");
                    failed = Some(failure);
                    last = shown.map(|shown| *shown).or(last);
                    verdict = place.attempt_failed(failure);
                }
            }
        }
    }

    /// Writes the gauges that describe pools and workers; called when someone reads the metrics.
    pub fn publish(&self) {
        self.workers.publish(&self.driver);
    }

    /// How many workers take requests.
    #[must_use]
    pub fn workers_up(&self) -> usize {
        self.driver.workers_up()
    }
}

/// What the core tells kinds of request apart by.
fn route(asked: &Asked) -> RouteId {
    RouteId(match asked {
        Asked::Chat(_) => 0,
        Asked::Completion(_) => 1,
        Asked::Embedding(_) => 2,
        Asked::Ranking(_) => 3,
    })
}

fn request(id: forebay_scheduler::RequestId, job: &Job<'_>, driver: &Driver) -> Request {
    let max_output = job.asked.max_output();
    Request {
        id,
        pool: job.model.pool,
        tenant: TenantId(0),
        class: job.class,
        route: route(job.asked),
        deadline: job.deadline.map(|deadline| driver.tick(deadline)),
        prompt_tokens: job.prompt.tokens,
        blocks: Arc::clone(&job.prompt.blocks),
        max_output,
        sequences: job.asked.choices().max(1),
        body_bytes: u32::try_from(job.body.len()).unwrap_or(u32::MAX),
        streamed: job.streamed(),
    }
}
