//! What administration may see of the core: its workers, and why a request went where it went.
//!
//! The core speaks of numbers; here they get the names that people use. Copies, made when somebody asks; the core's
//! lock is held for the copying only.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use forebay_scheduler::{
    AdapterState, Cause, Class, Core, Decision, HealthState, Refusal, Tick, Unfit, WorkerId, WorkerView,
};

use super::Dispatch;
use super::driver::takes_requests;
use super::gpus::GpuStatus;
use super::recent::{KEPT, Known};

/// One worker: what it was configured as, what it said it is, and how the core sees it.
#[derive(Debug, Clone)]
pub struct WorkerStatus {
    pub name: Arc<str>,
    /// The model's configured name.
    pub model: Arc<str>,
    /// Its address, without any key.
    pub url: String,
    /// `None` until it has been asked.
    pub engine: Option<&'static str>,
    /// What it calls the model; `None` until it has been asked.
    pub engine_model: Option<String>,
    pub takes_requests: bool,
    /// LoRA adapters that it has, or is about to.
    pub adapters: Vec<(Arc<str>, AdapterState)>,
    /// Those it runs on, as far as that is known.
    pub gpus: Vec<GpuStatus>,
    pub view: WorkerView,
}

/// One request, as far as it is remembered.
#[derive(Debug, Clone)]
pub struct Explained {
    pub name: String,
    /// The model's configured name; `None` when that is gone.
    pub model: Option<Arc<str>>,
    pub class: Class,
    pub prompt_tokens: u32,
    pub arrived: Moment,
    /// Whether it waits or runs.
    pub under_way: bool,
    /// Waited in lanes, over all attempts.
    pub queued: Duration,
    /// The workers it was sent to, one an attempt. The last may be another than the last decision's winner: an idle
    /// worker takes what waits elsewhere.
    pub sent: Vec<Arc<str>>,
    /// Why it was not served, and when the client was told to come again.
    pub refusal: Option<(Refusal, Option<Duration>)>,
    /// Oldest first.
    pub decisions: Vec<Decided>,
}

/// One decision about it.
#[derive(Debug, Clone)]
pub struct Decided {
    pub cause: Cause,
    pub at: Moment,
    /// Best first. Nobody won where nobody could answer before the deadline.
    pub candidates: Vec<Weighed>,
    /// Workers to which nothing may be sent; the first few.
    pub left_out: Vec<Unweighed>,
}

/// One worker that was not weighed.
#[derive(Debug, Clone)]
pub struct Unweighed {
    pub worker: Arc<str>,
    pub why: Unfit,
}

/// One worker as it was weighed.
#[derive(Debug, Clone)]
pub struct Weighed {
    pub worker: Arc<str>,
    pub winner: bool,
    pub matched_tokens: u32,
    /// In the order of [`forebay_scheduler::term_names`], in seconds.
    pub terms: Vec<f64>,
    /// Their sum; the lowest wins, and of those within 1% any.
    pub seconds: f64,
    /// Now, not then; `None` when the worker has left.
    pub health: Option<HealthState>,
}

/// When something was, by the wall clock and as seen now.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    pub at: SystemTime,
    pub ago: Duration,
}

impl Moment {
    fn before_now(ago: Duration) -> Self {
        let now = SystemTime::now();
        Self { at: now.checked_sub(ago).unwrap_or(now), ago }
    }
}

/// The request is not among those remembered: it never came to the core, or others came since.
#[derive(Debug, thiserror::Error)]
#[error("not one of the last {kept} requests that were to be placed")]
pub struct NotKept {
    pub kept: usize,
}

impl Dispatch {
    /// All workers, in the order in which they were configured.
    #[must_use]
    pub fn worker_statuses(&self) -> Vec<WorkerStatus> {
        let views: Vec<WorkerView> = self.driver.read(|core, now| core.worker_views(now).collect());
        let mut statuses: Vec<_> = views.into_iter().filter_map(|view| self.status(view)).collect();
        statuses.sort_by_key(|status| status.view.worker);
        statuses
    }

    /// The names of the workers to which something was sent that has not ended.
    #[must_use]
    pub fn busy_workers(&self) -> BTreeSet<Arc<str>> {
        let busy = |core: &Core, now| {
            let busy = core.worker_views(now).filter(|view| view.sent_requests > 0);
            busy.map(|view| view.worker).collect::<Vec<_>>()
        };
        self.driver.read(busy).into_iter().map(|worker| self.name_of(worker)).collect()
    }

    fn status(&self, view: WorkerView) -> Option<WorkerStatus> {
        let worker = self.workers.get(view.worker)?;
        let identity = worker.identity.load();
        let on = worker.spec.lock().gpus.clone();
        let gpus = self.gpu_statuses(&on);
        let known = self.intake.adapters(worker.pool);
        let named = |(id, state)| {
            known.iter().find(|adapter| adapter.id == id).map(|adapter| (Arc::clone(&adapter.name), state))
        };
        Some(WorkerStatus {
            name: Arc::clone(&worker.name),
            model: Arc::clone(&worker.pool_model),
            url: worker.channel.endpoint().to_string(),
            engine: identity.as_ref().map(|identity| identity.engine.name()),
            engine_model: identity.as_ref().map(|identity| identity.model.clone()),
            takes_requests: takes_requests(&view),
            adapters: view.adapters.iter().copied().filter_map(named).collect(),
            gpus,
            view,
        })
    }

    /// Why the latest request of this name went where it went.
    ///
    /// # Errors
    /// [`NotKept`] when no request of this name is remembered.
    pub fn explain(&self, name: &str) -> Result<Explained, NotKept> {
        let known = self.recent.find(name).ok_or(NotKept { kept: KEPT })?;
        let request = known.request;
        let (now, under_way, decisions) = self.driver.read(|core, now| {
            let decisions: Vec<Decision> = core.explain(request).collect();
            (now, core.request(request).is_some(), decisions)
        });
        let mut explained = self.course(&known, under_way);
        explained.decisions = decisions.iter().map(|decision| self.decided(now, decision)).collect();
        Ok(explained)
    }

    fn course(&self, known: &Known, under_way: bool) -> Explained {
        let course = known.course.lock().clone();
        Explained {
            name: known.names.first().map_or_else(String::new, |name| name.as_str().to_owned()),
            model: self.intake.model(known.pool),
            class: known.class,
            prompt_tokens: known.prompt_tokens,
            arrived: Moment::before_now(known.arrived.elapsed()),
            under_way,
            queued: course.queued,
            sent: course.sent.iter().map(|worker| self.name_of(*worker)).collect(),
            refusal: course.refusal,
            decisions: Vec::new(),
        }
    }

    fn decided(&self, now: Tick, decision: &Decision) -> Decided {
        let weighed = decision.candidates.iter().map(|candidate| Weighed {
            worker: self.name_of(candidate.worker),
            winner: Some(candidate.worker) == decision.winner,
            matched_tokens: candidate.matched_tokens,
            terms: candidate.terms.to_vec(),
            seconds: candidate.seconds(),
            health: self.driver.read(|core, now| Some(core.worker_view(now, candidate.worker)?.health)),
        });
        let mut candidates: Vec<_> = weighed.collect();
        candidates.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
        let left_out = decision.left_out.iter().map(|out| Unweighed { worker: self.name_of(out.worker), why: out.why });
        Decided {
            cause: decision.cause,
            at: Moment::before_now(now.since(decision.at)),
            candidates,
            left_out: left_out.collect(),
        }
    }

    /// A worker's name; its number when it has left.
    fn name_of(&self, worker: WorkerId) -> Arc<str> {
        self.workers.get(worker).map_or_else(|| worker.to_string().into(), |worker| Arc::clone(&worker.name))
    }
}
