//! A shell for tests: performs actions, remembers what it was told, and holds the core to its promises at each step.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use crate::*;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Waiting,
    Sent(WorkerId),
    Refused(Refusal),
    Over,
}

pub(super) struct World {
    pub(super) core: Core,
    pub(super) now: Tick,
    pub(super) stages: BTreeMap<RequestId, Stage>,
    pub(super) health: BTreeMap<WorkerId, HealthState>,
    draining: Vec<WorkerId>,
    /// What workers are for, and what was sent to them last of each request.
    roles: BTreeMap<WorkerId, Role>,
    legs: BTreeMap<RequestId, Leg>,
    failed_on: Vec<(RequestId, WorkerId)>,
    erred: Vec<(RequestId, WorkerId)>,
    /// Workers that sleep, as far as the core was told, and those that were told to change that.
    pub(super) asleep: BTreeSet<WorkerId>,
    pub(super) told: BTreeSet<WorkerId>,
    /// Adapters by worker, as far as the core was told; and those that a worker was told to load (true) or unload.
    pub(super) adapters: BTreeSet<(WorkerId, AdapterId)>,
    pub(super) turning: BTreeMap<(WorkerId, AdapterId), bool>,
    /// Of both, those whose files moved since, where workers take adapters at our word; and who takes none.
    stale: BTreeSet<(WorkerId, AdapterId)>,
    fixed: BTreeSet<WorkerId>,
    pub(super) log: Vec<(Tick, Action)>,
    pub(super) next: u64,
}

pub(super) const POOL: PoolId = PoolId(1);

/// Rolling hashes that share their beginning when the seeds do.
pub(super) fn chain(seed: u64, blocks: u32) -> Arc<[u64]> {
    (0..u64::from(blocks)).map(|at| (seed << 32 | at).wrapping_mul(0x9E37_79B9_7F4A_7C15)).collect()
}

pub(super) fn request(id: u64, prompt_tokens: u32) -> Request {
    Request {
        id: RequestId(id),
        pool: POOL,
        tenant: TenantId(0),
        class: Class::Default,
        deadline: None,
        prompt_tokens,
        blocks: chain(1000 + id, prompt_tokens / 16),
        route: RouteId(0),
        max_output: Some(100),
        sequences: 1,
        body_bytes: 1000,
        adapter: None,
        splits: false,
        beside: None,
        streamed: true,
    }
}

impl World {
    pub(super) fn new(seed: u64, limits: PoolLimits) -> Self {
        // windows are those of the worker's spec, whatever its speed
        Self::with(Config { window: Duration::from_secs(3600), ..Config::default() }, seed, limits)
    }

    pub(super) fn with(config: Config, seed: u64, limits: PoolLimits) -> Self {
        let mut world = Self {
            core: Core::new(config, seed),
            now: Tick::ZERO,
            stages: BTreeMap::new(),
            health: BTreeMap::new(),
            draining: Vec::new(),
            roles: BTreeMap::new(),
            legs: BTreeMap::new(),
            failed_on: Vec::new(),
            erred: Vec::new(),
            asleep: BTreeSet::new(),
            told: BTreeSet::new(),
            adapters: BTreeSet::new(),
            turning: BTreeMap::new(),
            stale: BTreeSet::new(),
            fixed: BTreeSet::new(),
            log: Vec::new(),
            next: 0,
        };
        world.event(Event::PoolJoined { pool: POOL, limits });
        world
    }

    /// With `count` workers that are up.
    pub(super) fn with_workers(count: u32, spec: &WorkerSpec) -> Self {
        let mut world = Self::new(7, PoolLimits::default());
        for worker in 0..count {
            world.join(worker, spec.clone());
            world.event(Event::Probed { worker: WorkerId(worker), healthy: true });
        }
        world
    }

    pub(super) fn join(&mut self, worker: u32, spec: WorkerSpec) -> Vec<Action> {
        let worker = WorkerId(worker);
        self.health.entry(worker).or_insert_with(|| {
            self.draining.retain(|draining| *draining != worker);
            HealthState::Unknown
        });
        self.roles.insert(worker, spec.role);
        if spec.adapters_max > 0 {
            self.fixed.remove(&worker)
        } else {
            self.fixed.insert(worker)
        };
        self.event(Event::WorkerJoined { worker, pool: POOL, spec })
    }

    pub(super) fn arrive(&mut self, request: Request) -> Vec<Action> {
        self.event(Event::Arrived(request))
    }

    /// Handles one event and performs what it causes.
    pub(super) fn event(&mut self, event: Event) -> Vec<Action> {
        match &event {
            Event::Arrived(request) => {
                if !self.stages.contains_key(&request.id) {
                    self.failed_on.extend(request.beside.map(|(worker, _)| (request.id, worker)));
                }
                self.stages.entry(request.id).or_insert(Stage::Waiting);
            }
            Event::Cancelled { request } | Event::Ended { request, .. } => {
                self.stages.insert(*request, Stage::Over);
            }
            Event::AttemptFailed { request, failure } => {
                if let Some(Stage::Sent(worker)) = self.stages.insert(*request, Stage::Waiting)
                    && failure.left_alone().is_none()
                {
                    // an error of the engine's may be tried again once
                    let again = matches!(failure, Failure::Status5xx | Failure::NoAdapter)
                        && !self.erred.contains(&(*request, worker));
                    if again { &mut self.erred } else { &mut self.failed_on }.push((*request, worker));
                }
            }
            Event::Prefilled { request, .. } => {
                self.stages.insert(*request, Stage::Waiting);
            }
            Event::SleepSeen { worker, asleep } => {
                if *asleep {
                    self.asleep.insert(*worker);
                } else {
                    self.asleep.remove(worker);
                }
            }
            Event::SleepDone { worker, worked } => {
                assert!(self.told.remove(worker), "{worker} was told nothing");
                if *worked && !self.asleep.remove(worker) {
                    self.asleep.insert(*worker);
                }
            }
            Event::WorkerDraining { worker, draining } => {
                self.draining.retain(|known| known != worker);
                self.draining.extend(draining.then_some(*worker));
            }
            Event::AdaptersSeen { worker, adapters, stale } => {
                let turning = |key: &(WorkerId, AdapterId)| self.turning.contains_key(key);
                let had = self.adapters.clone();
                self.adapters.retain(|key| key.0 != *worker || turning(key));
                let seen = adapters.iter().map(|adapter| (*worker, adapter.id));
                let seen: Vec<_> = seen.filter(|key| !turning(key)).collect();
                let came = seen.iter().filter(|key| !had.contains(key) && stale.contains(&key.1));
                self.stale.extend(came.filter(|key| !self.fixed.contains(&key.0)));
                self.adapters.extend(seen);
            }
            Event::AdapterTurned { worker, adapter, end } => {
                let loads = self.turning.remove(&(*worker, *adapter)).expect("it was told something");
                if loads == (*end == AdapterEnd::Done) {
                    self.adapters.insert((*worker, *adapter));
                }
                if !loads && *end == AdapterEnd::Refused {
                    self.stale.remove(&(*worker, *adapter));
                }
            }
            Event::AdapterChanged { adapter, change: AdapterChange::Moved, .. } => {
                let moved = |key: &&(WorkerId, AdapterId)| key.1 == *adapter && !self.fixed.contains(&key.0);
                self.stale.extend(self.adapters.iter().chain(self.turning.keys()).filter(moved));
            }
            Event::WorkerLeft { worker } => {
                self.health.remove(worker);
            }
            _ => {}
        }
        self.stale.retain(|key| self.adapters.contains(key) || self.turning.contains_key(key));
        let mut out = Vec::new();
        self.core.handle(self.now, event, &mut out);
        self.perform(&out);
        out
    }

    /// Lets time pass, calling the core whenever it wants to be called.
    pub(super) fn wait(&mut self, millis: u64) -> Vec<Action> {
        let target = Tick(self.now.0 + millis * 1000);
        let mut all = Vec::new();
        while let Some(due) = self.core.next_deadline().filter(|due| *due <= target) {
            let mut out = Vec::new();
            self.now = self.now.max(due);
            self.core.tick(self.now, &mut out);
            let next = self.core.next_deadline();
            assert!(next.is_none_or(|next| next > self.now), "no progress at {due:?}: {next:?}");
            self.perform(&out);
            all.extend(out);
        }
        self.now = target;
        all
    }

    fn perform(&mut self, actions: &[Action]) {
        for action in actions {
            match action {
                Action::Send { request, worker, leg, .. } => {
                    assert!(
                        leg.fits(self.roles.get(worker).copied().unwrap_or_default()),
                        "{leg:?} of {request} was sent to {worker}"
                    );
                    // where a place was held since the prompt was sent
                    let continues = *leg == Leg::Decode;
                    self.legs.insert(*request, *leg);
                    let before = self.stages.insert(*request, Stage::Sent(*worker));
                    assert_eq!(before, Some(Stage::Waiting), "{request} was sent to {worker}");
                    let health = self.health.get(worker);
                    assert!(matches!(health, Some(HealthState::Up | HealthState::HalfOpen)), "{worker} is {health:?}");
                    assert!(continues || !self.draining.contains(worker), "{worker} is draining");
                    let awake = !self.asleep.contains(worker) && !self.told.contains(worker);
                    assert!(awake, "{request} was sent to {worker}, which is not awake");
                    assert!(!self.failed_on.contains(&(*request, *worker)), "{request} failed on {worker} before");
                    let adapter = self.core.request(*request).and_then(|request| request.adapter);
                    let has = adapter.is_none_or(|adapter| self.adapters.contains(&(*worker, adapter.id)));
                    assert!(has, "{request} was sent to {worker}, which does not have its adapter");
                    let old = adapter.is_some_and(|adapter| self.stale.contains(&(*worker, adapter.id)));
                    assert!(!old, "{request} was sent to {worker}, which has other files");
                }
                Action::Refuse { request, reason, retry_after } => {
                    let before = self.stages.insert(*request, Stage::Refused(*reason));
                    assert_eq!(before, Some(Stage::Waiting), "{request} was refused");
                    let comes_back =
                        !matches!(reason, Refusal::PoolUnknown | Refusal::TooLarge | Refusal::DeadlineTooShort);
                    assert_eq!(retry_after.is_some(), comes_back, "{reason}");
                }
                Action::Wake { worker } => {
                    assert!(self.asleep.contains(worker) && self.told.insert(*worker), "{worker} is to wake");
                }
                Action::Sleep { worker } => {
                    assert!(!self.asleep.contains(worker) && self.told.insert(*worker), "{worker} is to sleep");
                    let has_work = self.stages.values().any(|stage| *stage == Stage::Sent(*worker));
                    assert!(!has_work, "{worker} is to sleep over its work");
                }
                Action::LoadAdapter { worker, adapter } => {
                    let key = (*worker, *adapter);
                    assert!(!self.adapters.contains(&key), "{worker} has {adapter}");
                    self.stale.remove(&key);
                    assert!(self.turning.insert(key, true).is_none(), "{worker} was told of {adapter} before");
                }
                Action::UnloadAdapter { worker, adapter } => {
                    let key = (*worker, *adapter);
                    assert!(self.adapters.remove(&key), "{worker} does not have {adapter}");
                    assert!(self.turning.insert(key, false).is_none(), "{worker} was told of {adapter} before");
                    let uses = |id: &RequestId| self.core.request(*id).and_then(|request| request.adapter);
                    let sent = self.stages.iter().filter(|(_, stage)| **stage == Stage::Sent(*worker));
                    let used = sent.filter_map(|(id, _)| uses(id)).any(|used| used.id == *adapter);
                    assert!(!used, "{adapter} is in use at {worker}");
                }
                Action::Probe { worker } => assert!(self.health.contains_key(worker)),
                Action::Health { worker, from, to } => {
                    assert_eq!(self.health.insert(*worker, *to), Some(*from));
                    assert_ne!(from, to);
                }
            }
            self.log.push((self.now, action.clone()));
        }
        assert_eq!(self.core.check(), Ok(()));
    }

    pub(super) fn in_stage(&self, is: impl Fn(Stage) -> bool) -> Vec<RequestId> {
        self.stages.iter().filter(|(_, stage)| is(**stage)).map(|(id, _)| *id).collect()
    }

    pub(super) fn sent(&self) -> Vec<RequestId> {
        self.in_stage(|stage| matches!(stage, Stage::Sent(_)))
    }

    pub(super) fn waiting(&self) -> Vec<RequestId> {
        self.in_stage(|stage| stage == Stage::Waiting)
    }

    pub(super) fn sent_to(&self, request: u64) -> Option<u32> {
        match self.stages.get(&RequestId(request)) {
            Some(Stage::Sent(worker)) => Some(worker.0),
            _ => None,
        }
    }

    pub(super) fn refusal(&self, request: u64) -> Option<Refusal> {
        match self.stages.get(&RequestId(request)) {
            Some(Stage::Refused(refusal)) => Some(*refusal),
            _ => None,
        }
    }

    pub(super) fn first_token(&mut self, request: u64) -> Vec<Action> {
        self.event(Event::FirstToken { request: RequestId(request) })
    }

    /// Requests whose prompt alone was sent.
    pub(super) fn prefilling(&self) -> Vec<RequestId> {
        self.sent().into_iter().filter(|id| self.legs[id] == Leg::Prefill).collect()
    }

    /// The prompt is computed, and can be fetched for so long.
    pub(super) fn prefilled(&mut self, request: u64, kept_ms: Option<u64>) -> Vec<Action> {
        let kept = kept_ms.map(|ms| self.now.after(Duration::from_millis(ms)));
        self.event(Event::Prefilled { request: RequestId(request), kept })
    }

    pub(super) fn finish(&mut self, request: u64) -> Vec<Action> {
        self.end(request, End::Finished { prompt_tokens: 1, cached_tokens: None, output_tokens: 10 })
    }

    pub(super) fn end(&mut self, request: u64, end: End) -> Vec<Action> {
        self.event(Event::Ended { request: RequestId(request), end })
    }

    pub(super) fn fail(&mut self, request: u64, failure: Failure) -> Vec<Action> {
        self.event(Event::AttemptFailed { request: RequestId(request), failure })
    }

    pub(super) fn probed(&mut self, worker: u32, healthy: bool) -> Vec<Action> {
        self.event(Event::Probed { worker: WorkerId(worker), healthy })
    }
}

pub(super) fn one_slot() -> WorkerSpec {
    WorkerSpec { sequences_max: 1, ..WorkerSpec::default() }
}

pub(super) fn retry_after(actions: &[Action]) -> Duration {
    let after = actions.iter().find_map(|action| match action {
        Action::Refuse { retry_after, .. } => *retry_after,
        _ => None,
    });
    after.expect("a refusal that says when to come back")
}

/// Eight prompts served by a worker at `speed`, so that its rate is measured.
pub(super) fn calibrate(world: &mut World, first_id: u64, worker: u32, speed: u32) {
    let others: Vec<u32> = world.health.keys().map(|other| other.0).filter(|other| *other != worker).collect();
    others.iter().for_each(|other| drop(world.probed(*other, false)));
    for id in first_id..first_id + 8 {
        world.arrive(request(id, 2000));
        assert_eq!(world.sent_to(id), Some(worker));
        world.wait(2000 * 1000 / u64::from(speed));
        world.first_token(id);
        world.finish(id);
    }
    others.iter().for_each(|other| drop(world.probed(*other, true)));
    world.wait(20_000); // until they have their full share again
}
