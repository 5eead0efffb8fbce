//! Micro-batches: requests of several clients as one call to an engine, and its answer as theirs.
//!
//! What may be asked as one is equal to the byte but for its inputs, of one model, class and length: the engine cannot
//! tell the call from one that a single client wrote. The scheduler's core sees the call as one request with the tokens of
//! all: it goes to one worker, and its members are alike in all that the core tells requests apart by, so that no
//! one's share changes. Each member keeps a row, a deadline and an explanation of its own.
//!
//! Who leaves together is [`BatchFormer`]'s to say; the bytes are [`forebay_proto::merge`]'s. A request that finds a free
//! worker goes its usual way, untouched. A call whose members have all left ends. When an engine refuses a call, or what it
//! answers is not an answer to all, each member asks again by itself: whoever is at fault fails alone, and a faulty
//! request costs one call more than if nothing had been merged. When an engine fails they do so, too, as far as the budget
//! for second tries goes: an input may be what it failed of.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use forebay_backends::engines::Api;
use forebay_proto::merge::{self, Share, Split};
use forebay_proto::peek::{self, Items};
use forebay_proto::trace_context::TraceParent;
use forebay_scheduler::{BatchFormer, Class, End, Failure, LotLimits, Member, PoolId, Refusal};
use http::{HeaderMap, HeaderValue};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::{Dispatch, Error, Job, Opened, Reply, Step, Whole, Worker};
use crate::config::MicroBatch;
use crate::ids::RequestName;
use crate::prepare::{Asked, Prepare, Prompt};
use crate::routing::Model;
use crate::telemetry::metrics;

/// Inputs of one call: with the longest embeddings that are common (4096 numbers) its answer is some 20 MB.
const ITEMS_MAX: u32 = 256;
/// Requests of one call.
const REQUESTS_MAX: usize = 128;
/// A longer answer is not divided.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Answers up to this length are divided where they are: some 50 µs.
const INLINE_ANSWER_BYTES_MAX: usize = 16 << 10;
/// Inputs up to so many tokens stand in one bucket, those of up to four times as many in the next, and so on: who is
/// short does not wait for who is long, and an engine that pads pads little.
const SHORT_TOKENS: u32 = 64;
/// What a member is told at most: every attempt, and the end.
const WORDS_MAX: usize = 32;
/// Why an attempt brought nothing to a member that is asked apart: others had a part in it.
const MERGED: &str = "merged";
const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// What requests that are asked as one have in common.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Kind {
    pool: PoolId,
    path: &'static str,
    class: Class,
    /// Of the longest input.
    bucket: u32,
    ids: bool,
    /// The body in front of its inputs, and behind them.
    before: Bytes,
    after: Bytes,
    /// What the engine is told beside the body, but for the trace.
    headers: Vec<(String, HeaderValue)>,
}

/// A request among those that gather.
pub(super) struct Seat {
    name: RequestName,
    trace: Option<TraceParent>,
    attempted: u32,
    headers: HeaderMap,
    body: Bytes,
    items: Items,
    prompt: Prompt,
    deadline: Option<Instant>,
    model: Arc<Model>,
    prepare: Arc<Prepare>,
    api: Api,
    words: mpsc::Sender<Word>,
}

/// What a member is told.
enum Word {
    /// It goes by itself: as a call that gathers others behind it, or because the call of all failed.
    Alone(Option<UnderWay>),
    /// What the call of all goes through.
    Step(Step),
    /// Its own part of the answer.
    Opened(Box<Opened>),
    Failed(Error),
}

/// Those who gather, and what calls of their own accord need.
pub(super) struct MicroBatches {
    former: Mutex<BatchFormer<Kind, Seat>>,
    next_seat: AtomicU64,
    tracker: TaskTracker,
    /// Calls begin where others end, which may be outside of any task.
    runtime: Handle,
}

impl MicroBatches {
    /// Calls run on `tracker`, in the runtime that this is called in.
    pub(super) fn new(tracker: TaskTracker) -> Self {
        Self { former: Mutex::default(), next_seat: AtomicU64::new(0), tracker, runtime: Handle::current() }
    }
}

impl Dispatch {
    /// As [`Dispatch::open`], in one call with others where the model's engines gain from it.
    ///
    /// # Errors
    /// As [`Dispatch::open`].
    pub async fn open_or_join(
        self: &Arc<Self>,
        mut job: Job<'_>,
        mut tell: impl FnMut(Step) + Send,
    ) -> Result<Opened, Error> {
        let Some((kind, items, limits, delay)) = self.mergeable(&job) else { return self.open(job, tell).await };
        let id = self.micro_batches.next_seat.fetch_add(1, Ordering::Relaxed);
        let (words, mut said) = mpsc::channel(WORDS_MAX);
        let (tokens, count) = (job.prompt.tokens, items.count);
        let lot = {
            let what = Seat::new(&job, items, words);
            self.micro_batches.former.lock().arrived(&kind, Member { id, tokens, items: count, what }, &limits)
        };
        self.depart(&kind, lot);
        let seat = Gathering { dispatch: self, kind: &kind, id };
        let began = Instant::now();
        let due = tokio::time::sleep_until(began + delay);
        tokio::pin!(due);
        let deadline = job.deadline;
        let mut gathers = true;
        let mut attempts = 0;
        // Where the call of all is, as far as nothing is known to have failed there.
        let mut at: Vec<Arc<Worker>> = Vec::new();
        let together = async {
            loop {
                // Both branches may be dropped and asked again.
                let word = tokio::select! {
                    biased;
                    word = said.recv() => word,
                    () = due.as_mut(), if gathers => {
                        gathers = false;
                        let lot = self.micro_batches.former.lock().waited(&kind, id);
                        self.depart(&kind, lot);
                        continue;
                    }
                };
                match word {
                    // The time that it gathered counts as waited, too.
                    Some(Word::Step(Step::Sent { worker, queued })) => {
                        attempts += 1;
                        at.push(Arc::clone(&worker));
                        tell(Step::Sent { worker, queued: if gathers { began.elapsed() } else { queued } });
                        gathers = false;
                    }
                    Some(Word::Step(Step::Failed { worker, reason })) => {
                        at.retain(|other| other.id != worker.id);
                        tell(Step::Failed { worker, reason });
                    }
                    Some(last) => return last,
                    // The call's task is gone, because the process ends.
                    None => return Word::Failed(Error::Refused { reason: Refusal::NoWorker, retry_after: None }),
                }
            }
        };
        let last = match deadline {
            Some(deadline) => tokio::time::timeout_at(deadline, together).await,
            None => Ok(together.await),
        };
        drop(seat);
        match last {
            Ok(Word::Alone(under_way)) => {
                job.attempted += attempts;
                at.into_iter().for_each(|worker| tell(Step::Failed { worker, reason: MERGED }));
                let opened = self.open(job, tell).await;
                drop(under_way);
                opened
            }
            Ok(Word::Opened(opened)) => Ok(*opened),
            Ok(Word::Failed(error)) => Err(error),
            Ok(Word::Step(_)) | Err(_) => {
                self.too_late(job.name.clone(), job.model.pool, job.class);
                Err(Error::Refused { reason: Refusal::DeadlinePassed, retry_after: None })
            }
        }
    }

    /// What `job` has in common with those it may be asked with.
    fn mergeable(&self, job: &Job<'_>) -> Option<(Kind, Items, LotLimits, Duration)> {
        let MicroBatch { max_tokens, max_delay } = job.model.micro_batch?;
        let items = job.asked.items()?;
        let at_once = self.workers.merging(job.model.pool, job.api)?;
        let headers = job.headers.iter().filter(|(name, _)| !matches!(name.as_str(), "traceparent" | "tracestate"));
        let kind = Kind {
            pool: job.model.pool,
            path: job.api.path(),
            class: job.class,
            bucket: job.prompt.longest.max(SHORT_TOKENS).div_ceil(SHORT_TOKENS).next_power_of_two().ilog2().div_ceil(2),
            ids: items.ids,
            before: job.body.get(..items.value.start).map(|before| job.body.slice_ref(before))?,
            after: job.body.get(items.value.end..).map(|after| job.body.slice_ref(after))?,
            headers: headers.map(|(name, value)| (name.as_str().to_owned(), value.clone())).collect(),
        };
        let limits = LotLimits { tokens: max_tokens.get().into(), items: ITEMS_MAX, requests: REQUESTS_MAX, at_once };
        Some((kind, items.clone(), limits, max_delay))
    }

    /// Sends those who leave together on their way.
    fn depart(self: &Arc<Self>, kind: &Kind, lot: Option<Vec<Member<Seat>>>) {
        let Some(mut lot) = lot else { return };
        let under_way = UnderWay { dispatch: Arc::clone(self), kind: kind.clone() };
        if let Some(first) = lot.first() {
            self.registry.micro_batched(named(first.what.api), lot.len());
        }
        if lot.len() > 1 {
            let seats = lot.into_iter().map(|member| member.what).collect();
            let MicroBatches { tracker, runtime, .. } = &self.micro_batches;
            tracker.spawn_on(together(Arc::clone(self), seats, under_way), runtime);
        } else if let Some(alone) = lot.pop() {
            // If it left just now, the call ends as this is dropped.
            let _ = alone.what.words.try_send(Word::Alone(Some(under_way)));
        }
    }
}

/// A call of a kind, from its departure to its answer. Dropping it lets those who gathered meanwhile leave.
struct UnderWay {
    dispatch: Arc<Dispatch>,
    kind: Kind,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let lot = self.dispatch.micro_batches.former.lock().ended(&self.kind);
        self.dispatch.depart(&self.kind, lot);
    }
}

/// A request that gathers, or did. Dropping it withdraws the request if it has not left.
struct Gathering<'a> {
    dispatch: &'a Dispatch,
    kind: &'a Kind,
    id: u64,
}

impl Drop for Gathering<'_> {
    fn drop(&mut self) {
        self.dispatch.micro_batches.former.lock().withdrawn(self.kind, self.id);
    }
}

impl Seat {
    fn new(job: &Job<'_>, items: Items, words: mpsc::Sender<Word>) -> Self {
        Self {
            name: job.name.clone(),
            trace: job.trace,
            attempted: job.attempted,
            headers: job.headers.clone(),
            body: job.body.clone(),
            items,
            prompt: job.prompt.clone(),
            deadline: job.deadline,
            model: Arc::clone(job.model),
            prepare: Arc::clone(job.prepare),
            api: job.api,
            words,
        }
    }

    fn inner(&self) -> &[u8] {
        self.body.get(self.items.inner.clone()).unwrap_or_default()
    }

    fn share(&self) -> Share {
        Share { items: self.items.count, tokens: self.prompt.tokens }
    }

    fn tell(&self, word: Word) {
        // There is room for every attempt; who is gone hears nothing.
        let _ = self.words.try_send(word);
    }
}

/// Makes one call for all of `seats`, until the last of them has left.
async fn together(dispatch: Arc<Dispatch>, seats: Vec<Seat>, under_way: UnderWay) {
    let class = under_way.kind.class;
    let all_left = futures::future::join_all(seats.iter().map(|seat| seat.words.closed()));
    let answered = tokio::select! {
        answered = ask(&dispatch, &seats, class) => answered,
        _ = all_left => return,
    };
    drop(under_way);
    match answered {
        Ok(answers) => {
            for (seat, opened) in seats.iter().zip(answers) {
                seat.tell(Word::Opened(Box::new(opened)));
            }
        }
        Err(Failed::All(error)) => seats.iter().for_each(|seat| seat.tell(Word::Failed(error.clone()))),
        Err(Failed::Suspect(error)) => seats.iter().for_each(|seat| {
            let may = dispatch.budget.lock().spend(Instant::now());
            seat.tell(if may { Word::Alone(None) } else { Word::Failed(error.clone()) });
        }),
        Err(Failed::Apart) => seats.iter().for_each(|seat| seat.tell(Word::Alone(None))),
    }
}

/// Why a call of several brought no answers.
enum Failed {
    /// None of them could have had one.
    All(Error),
    /// An engine failed: for itself, or because of one of them.
    Suspect(Error),
    /// One of them may be at fault.
    Apart,
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        match &error {
            Error::Engine { status, .. } if status.is_client_error() => Self::Apart,
            Error::Engine { .. } => Self::Suspect(error),
            // No worker holds all of it; some may hold a part.
            Error::Refused { reason: Refusal::TooLarge, .. } => Self::Apart,
            Error::Refused { .. } => Self::All(error),
        }
    }
}

/// The answers of all, in their order.
async fn ask(dispatch: &Dispatch, seats: &[Seat], class: Class) -> Result<Vec<Opened>, Failed> {
    let Some((first, others)) = seats.split_first() else { return Err(Failed::Apart) };
    let body = merge::join(&first.body, &first.items, seats.iter().map(Seat::inner));
    let Ok(Ok(asked)) = first.prepare.read(&body, reader(first.api)).await else { return Err(Failed::Apart) };
    let tokens = seats.iter().map(|seat| seat.prompt.tokens).fold(0, u32::saturating_add);
    let others: Vec<RequestName> = others.iter().map(|seat| seat.name.clone()).collect();
    let job = Job {
        name: first.name.clone(),
        others: &others,
        trace: first.trace,
        attempted: first.attempted,
        model: &first.model,
        prepare: &first.prepare,
        class,
        // Who must have it sooner gives up sooner.
        deadline: seats
            .iter()
            .map(|seat| seat.deadline)
            .max_by_key(|deadline| (deadline.is_none(), *deadline))
            .flatten(),
        prompt: Prompt {
            tokens,
            longest: seats.iter().map(|seat| seat.prompt.longest).max().unwrap_or(0),
            exact: seats.iter().all(|seat| seat.prompt.exact),
            blocks: Arc::default(),
        },
        asked: &Arc::new(asked),
        body,
        api: first.api,
        goes_on: false,
        headers: first.headers.clone(),
    };
    let tell = |step: Step| seats.iter().for_each(|seat| seat.tell(Word::Step(step.clone())));
    let opened = dispatch.open(job, tell).await?;
    let Opened { mut place, worker, queued, predicted_wait, matched_tokens, reply, .. } = opened;
    let answers = match whole(reply).await {
        Ok(Some(answer)) => divide(&first.prepare, answer, seats.iter().map(Seat::share).collect()).await,
        Ok(None) => None,
        Err(failure) => {
            place.ended(End::Failed(failure));
            return Err(Failed::Apart);
        }
    };
    place.ended(End::Finished { prompt_tokens: tokens, cached_tokens: None, output_tokens: 0 });
    let Some(Split { answers, apportioned }) = answers else {
        tracing::warn!(worker = &*worker.name, "an answer to several requests cannot be divided, they are asked apart");
        return Err(Failed::Apart);
    };
    let opened = answers.into_iter().map(|answer| Opened {
        place: place.given_back(),
        worker: Arc::clone(&worker),
        queued,
        predicted_wait,
        matched_tokens,
        apportioned,
        reply: Reply::Whole(Whole {
            content_type: JSON,
            length: Some(answer.len() as u64),
            head: VecDeque::from([answer]),
            rest: None,
        }),
    });
    Ok(opened.collect())
}

fn named(api: Api) -> metrics::Api {
    match api {
        Api::Rerank => metrics::Api::Rerank,
        Api::Score => metrics::Api::Score,
        Api::Pooling => metrics::Api::Pooling,
        Api::Classify => metrics::Api::Classify,
        _ => metrics::Api::Embeddings,
    }
}

fn reader(api: Api) -> fn(&[u8]) -> Result<Asked, peek::Refusal> {
    match api {
        Api::Rerank => |body| peek::Ranking::rerank(body).map(Asked::Ranking),
        Api::Score => |body| peek::Ranking::score(body).map(Asked::Ranking),
        _ => |body| peek::Embedding::peek(body).map(Asked::Embedding),
    }
}

/// All of an answer. `None` for one that is too long, or no document.
async fn whole(reply: Reply) -> Result<Option<Bytes>, Failure> {
    let Reply::Whole(Whole { mut head, rest, .. }) = reply else { return Ok(None) };
    if let (1, None) = (head.len(), &rest) {
        return Ok(head.pop_front());
    }
    let mut answer = BytesMut::new();
    head.iter().for_each(|bytes| answer.extend_from_slice(bytes));
    let Some(mut rest) = rest else { return Ok(Some(answer.freeze())) };
    while let Some(bytes) = rest.next().await {
        let bytes: Bytes = bytes.map_err(|error| error.failure())?;
        if answer.len() + bytes.len() > ANSWER_BYTES_MAX {
            return Ok(None);
        }
        answer.extend_from_slice(&bytes);
    }
    Ok(Some(answer.freeze()))
}

async fn divide(prepare: &Prepare, answer: Bytes, shares: Vec<Share>) -> Option<Split> {
    if answer.len() <= INLINE_ANSWER_BYTES_MAX {
        return merge::split(&answer, &shares);
    }
    prepare.apart(move || merge::split(&answer, &shares)).await.ok()?
}
