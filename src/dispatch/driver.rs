//! The shell around the scheduler's core: one caller at a time under a short lock, time from the clock, actions done.
//!
//! A lock rather than a thread: a decision takes a few microseconds, less than handing it to a thread and back. No
//! action is performed while the lock is held except waking the one that waits for it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use forebay_scheduler::{
    Action, Config, Core, End, Event, Failure, HealthState, Refusal, Request, RequestId, Tick, WorkerId, WorkerView,
};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use crate::telemetry::Registry;

/// What the core decided for a request.
#[derive(Debug)]
pub(super) enum Verdict {
    Sent(Sent),
    Refused { reason: Refusal, retry_after: Option<Duration> },
}

/// Where a request goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sent {
    pub(super) worker: WorkerId,
    pub(super) matched_tokens: u32,
    pub(super) predicted_wait: Duration,
}

/// The core, its clock and those who wait for its word.
pub(super) struct Driver {
    state: Mutex<State>,
    /// The core's time 0.
    epoch: Instant,
    next_request: AtomicU64,
    /// Tells the timer task that the next deadline came nearer.
    nearer: Notify,
    /// What must be done outside the lock by `intake`.
    on_action: Box<dyn Fn(Action) + Send + Sync>,
    registry: Registry,
}

/// Those whom the core had nothing to say to at once.
type Waiters = HashMap<RequestId, oneshot::Sender<Verdict>>;

struct State {
    core: Core,
    waiters: Waiters,
    actions: Vec<Action>,
    /// The deadline that the timer task sleeps for.
    armed: Option<Tick>,
}

impl Driver {
    /// `on_action` gets the actions that no request waits for (probes, notices); it must not block or call back.
    pub(super) fn new(registry: Registry, on_action: impl Fn(Action) + Send + Sync + 'static) -> Self {
        let core = Core::new(Config::default(), rand::random());
        Self {
            state: Mutex::new(State { core, waiters: Waiters::new(), actions: Vec::new(), armed: None }),
            epoch: Instant::now(),
            next_request: AtomicU64::new(1),
            nearer: Notify::new(),
            on_action: Box::new(on_action),
            registry,
        }
    }

    /// The core's name for a moment.
    pub(super) fn tick(&self, at: Instant) -> Tick {
        let since = at.saturating_duration_since(self.epoch);
        Tick(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
    }

    /// Tells the core what happened.
    pub(super) fn tell(&self, event: Event) {
        self.turn(None, |core, now, actions| core.handle(now, event, actions), |_, _| ());
    }

    /// Reads something of the core.
    pub(super) fn read<T>(&self, read: impl FnOnce(&Core, Tick) -> T) -> T {
        let now = self.tick(Instant::now());
        read(&self.state.lock().core, now)
    }

    pub(super) fn workers_up(&self) -> usize {
        self.read(|core, now| core.worker_views(now).filter(takes_requests).count())
    }

    /// A name for a request.
    pub(super) fn next_request(&self) -> RequestId {
        RequestId(self.next_request.fetch_add(1, Ordering::Relaxed))
    }

    /// Brings a new request; `make` gets its name.
    pub(super) fn arrive(self: &Arc<Self>, make: impl FnOnce(RequestId) -> Request) -> (Place, Waiting) {
        let id = self.next_request();
        let place = Place { driver: Arc::clone(self), id, end: None, over: false };
        let waiting = self.ask(id, Event::Arrived(make(id)));
        (place, waiting)
    }

    /// Tells the core what happened to a request that waits for its word from now on.
    fn ask(&self, request: RequestId, event: Event) -> Waiting {
        self.turn(
            Some(request),
            |core, now, actions| core.handle(now, event, actions),
            |waiters, said| {
                said.map_or_else(
                    || {
                        let (waiter, word) = oneshot::channel();
                        waiters.insert(request, waiter);
                        Waiting::Later(word)
                    },
                    Waiting::Said,
                )
            },
        )
    }

    /// One call of the core. What it says to `asker` goes to `settle`, under the same lock; what it says to others
    /// wakes them.
    fn turn<T>(
        &self,
        asker: Option<RequestId>,
        run: impl FnOnce(&mut Core, Tick, &mut Vec<Action>),
        settle: impl FnOnce(&mut Waiters, Option<Verdict>) -> T,
    ) -> T {
        let mut outside = smallvec::SmallVec::<[Action; 4]>::new();
        let mut said = None;
        let mut state = self.state.lock();
        let now = Instant::now();
        let State { core, waiters, actions, armed } = &mut *state;
        run(core, self.tick(now), actions);
        for action in actions.drain(..) {
            let (request, verdict) = match action {
                Action::Send { request, worker, matched_tokens, predicted_at_arrival, .. } => {
                    (request, Verdict::Sent(Sent { worker, matched_tokens, predicted_wait: predicted_at_arrival }))
                }
                Action::Refuse { request, reason, retry_after } => (request, Verdict::Refused { reason, retry_after }),
                other => {
                    outside.push(other);
                    continue;
                }
            };
            if asker == Some(request) {
                said.get_or_insert(verdict);
            } else if let Some(waiter) = waiters.remove(&request) {
                let _ = waiter.send(verdict);
            }
        }
        let settled = settle(waiters, said);
        let next = core.next_deadline();
        let nearer = next.is_some_and(|next| armed.is_none_or(|armed| next < armed));
        if nearer {
            *armed = next;
        }
        drop(state);
        self.registry.decision_seconds.record(now.elapsed().as_secs_f64());
        if nearer {
            self.nearer.notify_one();
        }
        outside.into_iter().for_each(&self.on_action);
        settled
    }

    /// Wakes the core at its deadlines. Runs until it is dropped.
    pub(super) async fn run_timers(&self) {
        loop {
            let armed = self.state.lock().armed;
            let nearer = self.nearer.notified();
            match armed {
                None => nearer.await,
                Some(at) => {
                    tokio::select! {
                        () = nearer => continue,
                        () = tokio::time::sleep_until(self.epoch + Duration::from_micros(at.0)) => {}
                    }
                    self.state.lock().armed = None;
                    self.turn(None, |core, now, actions| core.tick(now, actions), |_, _| ());
                }
            }
        }
    }
}

/// Whether new requests may go there.
pub(super) fn takes_requests(view: &WorkerView) -> bool {
    view.health == HealthState::Up && !view.draining
}

/// The core's next word on a request.
pub(super) enum Waiting {
    Said(Verdict),
    Later(oneshot::Receiver<Verdict>),
}

impl Waiting {
    pub(super) fn is_refusal(&self) -> bool {
        matches!(self, Self::Said(Verdict::Refused { .. }))
    }

    pub(super) async fn wait(self) -> Verdict {
        match self {
            Self::Said(verdict) => verdict,
            // The sender is dropped unused only when the core forgets a request without a word, which it never does.
            Self::Later(word) => {
                word.await.unwrap_or(Verdict::Refused { reason: Refusal::NoWorker, retry_after: None })
            }
        }
    }
}

/// A request's place in the core, from its arrival to its end. Dropping it tells the core how it ended; without a
/// word before, that the client left.
pub struct Place {
    driver: Arc<Driver>,
    id: RequestId,
    end: Option<End>,
    /// The core was told already: this stands for a part of an answer to several requests.
    over: bool,
}

impl Place {
    /// A place that holds nothing any more, for those whose one call this was, or where the place went on.
    #[must_use]
    pub fn given_back(&self) -> Self {
        Self { driver: Arc::clone(&self.driver), id: self.id, end: None, over: true }
    }

    pub(super) fn request(&self) -> RequestId {
        self.id
    }

    pub(super) fn first_token(&self) {
        self.driver.tell(Event::FirstToken { request: self.id });
    }

    /// The attempt brought nothing and the client has seen nothing; waits for the next word.
    pub(super) fn attempt_failed(&self, failure: Failure) -> Waiting {
        self.driver.ask(self.id, Event::AttemptFailed { request: self.id, failure })
    }

    /// The engine refused the request for what it is; the worker is well.
    pub(super) fn answered_with_refusal(&mut self) {
        self.end = Some(End::Finished { prompt_tokens: 0, cached_tokens: None, output_tokens: 0 });
    }

    /// The answer is over at the worker, complete or not.
    pub fn ended(&mut self, end: End) {
        self.end = Some(end);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        let request = self.id;
        let event = match self.end.take() {
            Some(end) => Event::Ended { request, end },
            None => Event::Cancelled { request },
        };
        self.driver.turn(
            None,
            |core, now, actions| core.handle(now, event, actions),
            // Withdrawn while it waited: nobody will ask for the verdict any more.
            |waiters, _| _ = waiters.remove(&request),
        );
    }
}
