//! When and where inside a pool: the scheduler's core and what happens at its word.
//!
//! [`Dispatch::open`] asks the core for a place, sends the request there and waits for the first event or byte of the
//! answer. An attempt that fails before that is placed again by the core, elsewhere where it can; afterwards nothing is
//! retried but what [`Dispatch::go_on`] is asked for. Second tries are a share of the traffic at most (`budget`); where
//! a model is hedged, one may be made beside a first that is slow to begin. A [`Place`] is the core's promise for one
//! attempt; dropping it gives the place back.
//!
//! Here: `driver` owns the core, `attempt` speaks with one worker, `handover` with one that computes a prompt for
//! another, `micro_batch` makes one call of several requests, `intake` owns the tasks that feed the core with what
//! workers report of themselves, `adapters` their LoRA adapters, `kv` what they publish of their caches, `gpus` what is
//! said of their GPUs, `explain` tells administration what the core knows and why it decided as it did. Not here:
//! another model or a cloud when a pool cannot (`pipeline`).

mod adapters;
mod attempt;
mod budget;
mod driver;
mod explain;
mod gpus;
mod handover;
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
use forebay_scheduler::{Class, End, Failure, Leg as Part, PoolId, Refusal, Request, RouteId, TenantId, WorkerId};
use http::{HeaderMap, HeaderValue, StatusCode};
use parking_lot::Mutex;
use tokio::time::Instant;
use tracing::Instrument;

use crate::ids::RequestName;
use crate::prepare::{Asked, Prepare, Prompt};
use crate::routing::{Adapter, Model};
use crate::telemetry::Registry;
use attempt::Failed;
use budget::Budget;
pub use driver::Place;
use driver::{Driver, Sent, Verdict, Waiting};
pub use explain::{Decided, Explained, Moment, NotKept, Unweighed, Weighed, WorkerStatus};
pub use gpus::{GpuStatus, NodeSpec};
use handover::Handed;
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
    /// Where it stands in its trace; its attempts stand below it, by their numbers.
    pub trace: Option<TraceParent>,
    /// Attempts made before, at other models.
    pub attempted: u32,
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
    /// Whether only an engine will do that is known to go on after token ids.
    pub goes_on: bool,
    pub headers: HeaderMap,
}

impl Job<'_> {
    fn names(&self) -> Names {
        std::iter::once(&self.name).chain(self.others).cloned().collect()
    }

    fn streamed(&self) -> bool {
        self.asked.streaming().is_some_and(|streaming| streaming.stream)
    }

    /// Whether one worker may compute its prompt and another its output. Of an adapter both would have to have it.
    fn splits(&self) -> bool {
        let echoes = matches!(&**self.asked, Asked::Completion(completion) if completion.echo);
        self.asked.choices() == 1 && !echoes && self.model.adapter.is_none()
    }

    /// How long an attempt may be silent before another is made beside it. An answer that is generated and comes whole
    /// is silent to its end, and batch work has time.
    fn hedged_after(&self) -> Option<Duration> {
        let tells = self.streamed() || matches!(&**self.asked, Asked::Embedding(_) | Asked::Ranking(_));
        self.model.hedge_after.filter(|_| tells && self.class != Class::Batch)
    }
}

/// What is told of a request on its way.
#[derive(Clone)]
pub enum Step {
    /// An attempt begins, after so long in lanes since the last one.
    Sent { worker: Arc<Worker>, queued: Duration },
    /// One brought the computation of the prompt, and its cache, where there is one to go on from.
    Prefilled { worker: Arc<Worker>, kept: bool },
    /// One brought nothing, for a reason in a word.
    Failed { worker: Arc<Worker>, reason: &'static str },
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
    /// It is a part of an answer to several requests whose counts of tokens are divided, not known.
    pub apportioned: bool,
    pub reply: Reply,
}

/// The answer's form.
pub enum Reply {
    Stream(Streamed),
    Whole(Whole),
}

impl Reply {
    /// Whether nothing more is to come of it.
    fn is_all(&self) -> bool {
        matches!(self, Self::Whole(Whole { rest: None, .. }))
    }
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

/// Why nobody goes on with an answer.
#[derive(Debug, thiserror::Error)]
pub enum NobodyGoesOn {
    #[error("more answers break off than may be gone on with")]
    Denied,
    #[error(transparent)]
    Error(#[from] Error),
}

/// The room: pools, workers and the core.
pub struct Dispatch {
    driver: Arc<Driver>,
    workers: Arc<Workers>,
    intake: Arc<Intake>,
    recent: Recent,
    budget: Mutex<Budget>,
    /// That of going on with streams.
    continuations: Mutex<Budget>,
    micro_batches: MicroBatches,
    registry: Registry,
}

/// An attempt: its place, where it is made, and its number among those of its request.
struct Leg {
    place: Place,
    worker: Arc<Worker>,
    sent: Sent,
    number: u32,
}

/// What a request went through until now.
struct Course<F> {
    /// In lanes.
    queued: Duration,
    attempts: u32,
    /// Whether a second attempt was made beside another: once is enough.
    hedged: bool,
    /// What the last engine that said something said.
    last: Option<Error>,
    tell: F,
}

impl<F: FnMut(Step)> Course<F> {
    fn sent(&mut self, worker: &Arc<Worker>, queued: Duration) -> u32 {
        self.queued += queued;
        self.attempts += 1;
        (self.tell)(Step::Sent { worker: Arc::clone(worker), queued });
        self.attempts
    }

    fn failed(&mut self, worker: &Arc<Worker>, failure: Failure, shown: Option<Box<Error>>) {
        let attempts = self.attempts;
        tracing::info!(worker = &*worker.name, %failure, attempts, "an attempt failed before its first byte");
        self.last = shown.map(|shown| *shown).or(self.last.take());
        (self.tell)(Step::Failed { worker: Arc::clone(worker), reason: attempt::reason(failure) });
    }

    /// The most useful word on why nobody answered.
    fn given_up(self, reason: Refusal, retry_after: Option<Duration>) -> Error {
        let refused = Error::Refused { reason, retry_after };
        if matches!(reason, Refusal::AttemptsExhausted { .. }) { self.last.unwrap_or(refused) } else { refused }
    }
}

impl Dispatch {
    /// Brings `job` to a worker of its pool. `tell` hears of each attempt.
    ///
    /// Dropping the future withdraws the request: from its lane, or from the engine by closing the connection.
    ///
    /// # Errors
    /// See [`Error`]; the client has seen nothing, and no engine works on the request any more.
    pub async fn open(&self, job: Job<'_>, mut tell: impl FnMut(Step) + Send) -> Result<Opened, Error> {
        self.budget.lock().earn();
        self.continuations.lock().earn();
        let (place, verdict) = self.driver.arrive(|id| request(id, &job, &self.driver, None));
        let known = Arc::new(Known::new(job.names(), place.request(), (job.model.pool, job.class, job.prompt.tokens)));
        self.recent.note(Arc::clone(&known));
        let tell = |step: Step| {
            if let Step::Sent { worker, queued } = &step {
                known.sent(worker.id, *queued);
            }
            tell(step);
        };
        let opened = self.bounded(&job, place, verdict, None, tell).await;
        if let Err(Error::Refused { reason, retry_after }) = &opened {
            known.refused(*reason, *retry_after);
        }
        opened
    }

    /// Brings what is left of an answer that broke off to another worker, as one more attempt at the same request: its
    /// number and a budget of its own bound it. `place` is that of the attempt that `failed` at `worker`.
    ///
    /// # Errors
    /// [`NobodyGoesOn`]; else as [`Dispatch::open`].
    pub async fn go_on(
        &self,
        job: Job<'_>,
        mut place: Place,
        (failed, worker): (Failure, &Arc<Worker>),
        mut tell: impl FnMut(Step) + Send,
    ) -> Result<Opened, NobodyGoesOn> {
        tell(Step::Failed { worker: Arc::clone(worker), reason: attempt::reason(failed) });
        if !self.may_try_again(&self.continuations) {
            place.ended(End::Failed(failed));
            return Err(NobodyGoesOn::Denied);
        }
        let known = self.recent.find_request(place.request());
        let tell = |step: Step| {
            if let (Step::Sent { worker, queued }, Some(known)) = (&step, &known) {
                known.sent(worker.id, *queued);
            }
            tell(step);
        };
        let verdict = place.attempt_failed(failed);
        Ok(self.bounded(&job, place, verdict, Some(failed), tell).await?)
    }

    /// Whether a second try is within this budget.
    fn may_try_again(&self, budget: &Mutex<Budget>) -> bool {
        let may = budget.lock().spend(Instant::now());
        if !may {
            tracing::warn!("too many requests fail to be sent again");
            self.registry.retries_denied.increment(1);
        }
        may
    }

    /// Makes attempts until the deadline.
    async fn bounded(
        &self,
        job: &Job<'_>,
        place: Place,
        verdict: Waiting,
        failed: Option<Failure>,
        tell: impl FnMut(Step),
    ) -> Result<Opened, Error> {
        let attempts = std::pin::pin!(self.attempts(job, place, verdict, failed, tell));
        match job.deadline {
            Some(deadline) => tokio::time::timeout_at(deadline, attempts)
                .await
                .unwrap_or(Err(Error::Refused { reason: Refusal::DeadlinePassed, retry_after: None })),
            None => attempts.await,
        }
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
        mut failed: Option<Failure>,
        tell: impl FnMut(Step),
    ) -> Result<Opened, Error> {
        // The rest of an answer is not hedged.
        let hedged = failed.is_some();
        let budget = if failed.is_some() { &self.continuations } else { &self.budget };
        let mut course = Course { queued: Duration::ZERO, attempts: job.attempted, hedged, last: None, tell };
        // What the last worker for prompts gave, and how much of the prompt it was believed to hold.
        let mut handed: Option<Handed> = None;
        let mut matched_before = None;
        loop {
            let waiting_since = Instant::now();
            let sent = match verdict.wait().instrument(tracing::debug_span!("queue")).await {
                Verdict::Sent(sent) => sent,
                Verdict::Refused { reason, retry_after } => return Err(course.given_up(reason, retry_after)),
            };
            let waited = waiting_since.elapsed();
            if sent.leg != Part::Decode {
                self.registry.queue_waited(job.class as usize, waited.as_secs_f64());
            }
            if let Some(failure) = failed.take() {
                self.registry.retried(attempt::reason(failure));
            }
            let Some(worker) = self.workers.get(sent.worker) else {
                // It left between the decision and now.
                course.queued += waited;
                verdict = place.attempt_failed(Failure::Connect);
                continue;
            };
            let number = course.sent(&worker, waited);
            let mut leg = Leg { place, worker, sent, number };
            let answered = if sent.leg == Part::Prefill {
                handed = None;
                match Box::pin(handover::prompt_alone(&leg.worker, job, number)).await {
                    // What it refuses it may refuse for its part alone: the word of whoever answers counts.
                    given @ (Ok(_) | Err(Failed::Final(_))) => {
                        handed = given.ok().flatten();
                        self.registry.handed_over(handed.is_some());
                        (course.tell)(Step::Prefilled { worker: leg.worker, kept: handed.is_some() });
                        matched_before = Some(sent.matched_tokens);
                        place = leg.place;
                        verdict = place.prefilled(handed.as_ref().map(Handed::time));
                        continue;
                    }
                    Err(failed) => Err(failed),
                }
            } else {
                let handed = handed.as_ref().filter(|_| sent.leg == Part::Decode);
                let (first, answered) = self.answered(job, leg, handed, &mut course).await;
                leg = first;
                answered
            };
            match answered {
                Ok(reply) => {
                    // An answer that is all here has ended as well, which tells more.
                    if !reply.is_all() {
                        leg.place.first_token();
                    }
                    let Leg { place, worker, sent, .. } = leg;
                    let matched_before = matched_before.filter(|_| sent.leg == Part::Decode);
                    return Ok(Opened {
                        place,
                        worker,
                        queued: course.queued,
                        predicted_wait: sent.predicted_wait,
                        matched_tokens: matched_before.unwrap_or(sent.matched_tokens),
                        apportioned: false,
                        reply,
                    });
                }
                Err(Failed::Final(error)) => {
                    leg.place.answered_with_refusal();
                    return Err(*error);
                }
                Err(Failed::Elsewhere { failure, shown }) => {
                    course.failed(&leg.worker, failure, shown);
                    place = leg.place;
                    verdict = place.attempt_failed(failure);
                    // What never reached an engine costs none of them anything.
                    let is_free = matches!(failure, Failure::Connect | Failure::Unsupported);
                    if !is_free && !verdict.is_refusal() && !self.may_try_again(budget) {
                        return Err(course.given_up(Refusal::AttemptsExhausted { last: failure }, None));
                    }
                    failed = Some(failure);
                }
            }
        }
    }

    /// Makes an attempt; where it is slow to begin and the model is hedged, another one beside it. The first to begin
    /// answers, and the other is withdrawn; when one fails, the other goes on.
    async fn answered<F: FnMut(Step)>(
        &self,
        job: &Job<'_>,
        mut first: Leg,
        handed: Option<&Handed>,
        course: &mut Course<F>,
    ) -> (Leg, Result<Reply, Failed>) {
        let worker = Arc::clone(&first.worker);
        // By far the largest of the futures here; each that holds it would be copied with it.
        let mut answer = Box::pin(attempt::attempt(&worker, job, first.number, handed));
        let Some(after) = job.hedged_after().filter(|_| !course.hedged && handed.is_none()) else {
            let answered = answer.await;
            return (first, answered);
        };
        if let Ok(answered) = tokio::time::timeout(after, answer.as_mut()).await {
            return (first, answered);
        }
        let Some(mut second) = self.beside(job, worker.id, course) else {
            let answered = answer.await;
            return (first, answered);
        };
        let worker = Arc::clone(&second.worker);
        let mut other = Box::pin(attempt::attempt(&worker, job, second.number, None));
        let (is_first, answered) = tokio::select! {
            answered = answer.as_mut() => (true, answered),
            answered = other.as_mut() => (false, answered),
        };
        match answered {
            Err(Failed::Elsewhere { failure, shown }) => {
                let fallen = if is_first { &mut first } else { &mut second };
                course.failed(&fallen.worker, failure, shown);
                fallen.place.ended(End::Failed(failure));
                if is_first {
                    drop(first);
                    (second, other.await)
                } else {
                    drop(second);
                    (first, answer.await)
                }
            }
            answered => (if is_first { first } else { second }, answered),
        }
    }

    /// A place for a second attempt, at another worker than `worker` and at once, or none.
    fn beside<F: FnMut(Step)>(&self, job: &Job<'_>, worker: WorkerId, course: &mut Course<F>) -> Option<Leg> {
        let beside = Some((worker, course.attempts - job.attempted));
        let (place, verdict) = self.driver.arrive(|id| request(id, job, &self.driver, beside));
        let Waiting::Said(Verdict::Sent(sent)) = verdict else { return None };
        let worker = self.workers.get(sent.worker)?;
        if !self.budget.lock().spend(Instant::now()) {
            return None;
        }
        self.registry.retried(attempt::HEDGE);
        course.hedged = true;
        let number = course.sent(&worker, Duration::ZERO);
        Some(Leg { place, worker, sent, number })
    }

    /// The text of what is told of models, workers and GPUs now, which stands beside the [`Registry`]'s.
    #[must_use]
    pub fn publish(&self) -> String {
        self.workers.publish(&self.driver, &self.registry.other_models) + &self.intake.nodes.publish()
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

/// `beside`: the worker that tries it already, and the attempts made by now.
fn request(
    id: forebay_scheduler::RequestId,
    job: &Job<'_>,
    driver: &Driver,
    beside: Option<(WorkerId, u32)>,
) -> Request {
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
        adapter: job.model.adapter.as_ref().map(Adapter::facts),
        splits: job.splits(),
        beside,
    }
}
