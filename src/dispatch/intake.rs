//! The tasks that feed the core: probes it asks for, and what each worker reports of its load.
//!
//! A probe also asks who the worker is (engine, model, context length), each time anew, since a worker that returns
//! may be another one. What is learned of a model goes out as [`Learned`]; the gateway's routing table is made of it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use forebay_backends::engines::{self, Api, Detected, Load, Ways};
use forebay_backends::signals::kv_events::KvSource;
use forebay_backends::signals::{Pace, Signal, Signals, Traffic};
use forebay_backends::transport::{Endpoint, Timeouts, Transport};
use forebay_scheduler::{Action, Event, PoolId, PoolLimits, Role, SleepSpec, WorkerId};
use http::HeaderValue;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use xxhash_rust::xxh3::xxh3_64;

use super::Dispatch;
use super::adapters::{Change, LIST_EVERY, Places};
use super::budget::{Budget, CONTINUATIONS_FLOOR, RETRIES_FLOOR};
use super::driver::Driver;
use super::gpus::{Nodes, Tenant};
use super::kv::KvThread;
use super::micro_batch::MicroBatches;
use super::recent::Recent;
use super::workers::{Identity, Worker, Workers};
use crate::config::GpuName;
use crate::routing::{Adapter, EngineTokenizer};
use crate::telemetry::{ModelMetrics, Registry, WorkerMetrics};

/// Probes and notices that may wait for the task that carries them out. The core asks again for what is lost.
const ACTIONS_MAX: usize = 4096;
/// Facts that may wait for the routing table.
const LEARNED_MAX: usize = 1024;
/// How often a worker that may be put to sleep is asked whether it is.
const SLEEP_EVERY: Duration = Duration::from_secs(5);

/// A pool as configured.
#[derive(Clone)]
pub struct PoolSpec {
    pub pool: PoolId,
    /// The model's configured name.
    pub model: Arc<str>,
    pub limits: PoolLimits,
    pub metrics: Arc<ModelMetrics>,
    /// That its workers serve beside the model, and those that they may still have.
    pub adapters: Arc<[Adapter]>,
    /// How many of them one worker is given.
    pub adapters_max: Option<u32>,
    pub workers: Vec<WorkerSpec>,
    /// The names of those that get nothing new.
    pub draining: HashSet<Arc<str>>,
}

/// A worker as configured. Two equal specs are the same worker; a change makes a new one.
#[derive(Clone, PartialEq)]
pub struct WorkerSpec {
    pub name: Arc<str>,
    pub endpoint: Endpoint,
    pub role: Role,
    /// Of a server with several data-parallel ranks, the one that this is: a cache and a queue of its own.
    pub rank: Option<u32>,
    /// `None`: to be detected.
    pub engine: Option<&'static str>,
    /// The model's name at the worker; `None`: detected.
    pub model: Option<String>,
    /// Where it publishes what its prefix cache holds; `None`: asked.
    pub kv_events: Option<KvSource>,
    /// The GPUs it runs on; empty: found by its port.
    pub gpus: Vec<GpuName>,
    /// Whether it is sent token ids where its engine takes them.
    pub token_ids: bool,
    /// Memory that it takes of each of them while it is awake.
    pub memory_bytes: Option<u64>,
    /// Memory of each of them, for as long as they do not say themselves.
    pub gpu_bytes: Option<u64>,
    /// Whether and how it may be put to sleep.
    pub sleep: Option<SleepSpec>,
    pub first_byte: Duration,
    /// The same, of an answer that is streamed.
    pub first_token: Duration,
    pub idle: Duration,
}

/// What a worker said about the model it serves.
pub struct Learned {
    pub pool: PoolId,
    /// The worker's configured name.
    pub worker: Arc<str>,
    pub fact: Fact,
    /// Dropped once the fact is taken in.
    pub taken: oneshot::Sender<()>,
}

pub enum Fact {
    /// Who the worker is, told at every probe that it passes.
    Model {
        max_model_len: Option<u32>,
        /// Where the worker has the model's files: a directory, perhaps also on this machine, or a hub name.
        root: Option<String>,
        /// For counting by the engine itself, where it can.
        tokenizer: Option<EngineTokenizer>,
    },
    /// Tokens in one of its KV blocks.
    BlockTokens(u32),
}

/// What a worker's model is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    Wake,
    Sleep,
}

/// What belongs to one configured worker while it is here.
struct Member {
    pool: PoolId,
    spec: WorkerSpec,
    worker: Arc<Worker>,
    /// As the core was told.
    draining: bool,
    /// Ends its tasks.
    gone: CancellationToken,
}

/// What is to be known of a pool here.
struct Pool {
    model: Arc<str>,
    block_tokens: u32,
    adapters: Arc<[Adapter]>,
    adapters_max: Option<u32>,
}

/// Puts configured pools and workers into the core and keeps their tasks.
pub(super) struct Intake {
    pub(super) driver: Arc<Driver>,
    workers: Arc<Workers>,
    transport: Transport,
    pub(super) tracker: TaskTracker,
    pub(super) kv_thread: KvThread,
    pub(super) nodes: Nodes,
    learned: mpsc::Sender<Learned>,
    members: Mutex<Members>,
}

#[derive(Default)]
struct Members {
    next: u32,
    pools: HashMap<PoolId, Pool>,
    workers: HashMap<WorkerId, Member>,
}

impl Dispatch {
    /// Starts the core with its tasks on `tracker`, which end with `stop`. What workers say about models comes out of
    /// the receiver.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(
        registry: Registry,
        transport: Transport,
        tracker: &TaskTracker,
        stop: CancellationToken,
    ) -> std::io::Result<(Arc<Self>, mpsc::Receiver<Learned>)> {
        let (actions, mut to_do) = mpsc::channel(ACTIONS_MAX);
        let (learned, facts) = mpsc::channel(LEARNED_MAX);
        let driver = Arc::new(Driver::new(registry.clone(), move |action| {
            if actions.try_send(action).is_err() {
                tracing::warn!("too many probes wait, one is left out");
            }
        }));
        let workers = Arc::new(Workers::default());
        let intake = Arc::new(Intake {
            driver: Arc::clone(&driver),
            workers: Arc::clone(&workers),
            transport,
            tracker: tracker.clone(),
            kv_thread: KvThread::start()?,
            nodes: Nodes::default(),
            learned,
            members: Mutex::default(),
        });
        let timers = Arc::clone(&driver);
        let timers_stop = stop.clone();
        tracker.spawn(async move { timers_stop.run_until_cancelled(timers.run_timers()).await });
        let acting = Arc::clone(&intake);
        tracker.spawn(stop.run_until_cancelled_owned(async move {
            while let Some(action) = to_do.recv().await {
                acting.act(&action);
            }
        }));
        Ok((
            Arc::new(Self {
                driver,
                workers,
                intake,
                recent: Recent::default(),
                budget: Mutex::new(Budget::new(RETRIES_FLOOR, Instant::now())),
                continuations: Mutex::new(Budget::new(CONTINUATIONS_FLOOR, Instant::now())),
                micro_batches: MicroBatches::new(tracker.clone()),
                registry,
            }),
            facts,
        ))
    }

    /// Makes the core's pools and workers those of `pools`. Workers that stay keep their connections and load.
    pub fn apply(&self, pools: &[PoolSpec]) {
        self.intake.apply(pools);
    }

    /// Ends every worker's tasks; requests under way are not touched.
    pub fn stop(&self) {
        self.stop_nodes();
        for member in self.intake.members.lock().workers.values() {
            member.gone.cancel();
        }
    }
}

impl Intake {
    fn apply(self: &Arc<Self>, pools: &[PoolSpec]) {
        let mut members = self.members.lock();
        // A name is given once.
        let wanted: HashMap<(PoolId, &str), (&PoolSpec, &WorkerSpec)> = pools
            .iter()
            .flat_map(|pool| pool.workers.iter().map(move |spec| ((pool.pool, &*spec.name), (pool, spec))))
            .collect();
        let goes = |member: &Member| {
            wanted.get(&(member.pool, &*member.spec.name)).is_none_or(|(_, spec)| **spec != member.spec)
        };
        let mut left: Vec<_> = members.workers.iter().filter(|(_, member)| goes(member)).map(|(id, _)| *id).collect();
        left.sort_unstable();
        for id in left {
            if let Some(member) = members.workers.remove(&id) {
                member.gone.cancel();
                self.driver.tell(Event::WorkerLeft { worker: id });
                tracing::info!(worker = &*member.worker.name, "worker left");
            }
        }
        let mut pools_left: Vec<_> =
            members.pools.keys().filter(|id| !pools.iter().any(|pool| pool.pool == **id)).copied().collect();
        pools_left.sort_unstable();
        for pool in pools_left {
            members.pools.remove(&pool);
            self.driver.tell(Event::PoolLeft { pool });
        }
        let here: HashSet<(PoolId, Arc<str>)> =
            members.workers.values().map(|member| (member.pool, Arc::clone(&member.spec.name))).collect();
        let (mut joined, mut adapted) = (Vec::new(), Vec::new());
        for pool in pools {
            let known = Pool {
                model: Arc::clone(&pool.model),
                block_tokens: pool.limits.block_tokens,
                adapters: Arc::clone(&pool.adapters),
                adapters_max: pool.adapters_max,
            };
            let before = members.pools.insert(pool.pool, known);
            let other = |old: &Pool| (&old.adapters, old.adapters_max) != (&pool.adapters, pool.adapters_max);
            adapted.extend(before.filter(other).map(|before| (pool.pool, before.adapters)));
            self.driver.tell(Event::PoolJoined { pool: pool.pool, limits: pool.limits.clone() });
            for spec in &pool.workers {
                if !here.contains(&(pool.pool, Arc::clone(&spec.name))) {
                    let id = WorkerId(members.next);
                    members.next += 1;
                    joined.push(id);
                    members.workers.insert(id, self.member(id, pool, spec));
                }
            }
        }
        // The table comes before the event: the core may send at once.
        let table: Vec<_> = members.workers.values().map(|member| Arc::clone(&member.worker)).collect();
        self.workers.apply(&table, pools.iter().map(|pool| (pool.pool, Arc::clone(&pool.metrics))).collect());
        for id in joined {
            if let Some(Member { pool, worker, .. }) = members.workers.get(&id) {
                let spec = worker.spec.lock().clone();
                self.driver.tell(Event::WorkerJoined { worker: id, pool: *pool, spec });
            }
        }
        let mut turned = Vec::new();
        for (id, member) in &mut members.workers {
            let name = &member.spec.name;
            let draining = wanted.get(&(member.pool, &**name)).is_some_and(|(pool, _)| pool.draining.contains(name));
            if std::mem::replace(&mut member.draining, draining) != draining {
                tracing::info!(worker = &*member.worker.name, draining, "worker told to drain, or no more");
                turned.push((*id, draining));
            }
        }
        turned.sort_unstable();
        for (worker, draining) in turned {
            self.driver.tell(Event::WorkerDraining { worker, draining });
        }
        drop(members);
        for (pool, before) in adapted {
            self.adapters_configured(pool, &before);
        }
    }

    fn member(&self, id: WorkerId, pool: &PoolSpec, spec: &WorkerSpec) -> Member {
        // Whoever asks bounds the wait for the first byte: attempts, probes and counts each as they need.
        let timeouts = Timeouts { first_byte: None, idle: spec.idle, ..Timeouts::default() };
        let worker = Arc::new(Worker {
            id,
            pool: pool.pool,
            pool_model: Arc::clone(&pool.model),
            name: Arc::clone(&spec.name),
            header: HeaderValue::from_str(&spec.name).unwrap_or_else(|_| HeaderValue::from_static("worker")),
            channel: self.transport.channel(spec.endpoint.clone(), timeouts),
            rank: spec.rank,
            first_byte: spec.first_byte,
            first_token: spec.first_token,
            identity: ArcSwapOption::empty(),
            spec: Mutex::new(forebay_scheduler::WorkerSpec {
                role: spec.role,
                gpus: self.nodes.named(&spec.gpus),
                memory_bytes: spec.memory_bytes,
                gpu_bytes: spec.gpu_bytes,
                sleep: spec.sleep,
                server: Some(xxh3_64(spec.endpoint.to_string().as_bytes())),
                ..forebay_scheduler::WorkerSpec::default()
            }),
            places: Places::default(),
            returned: Notify::new(),
            traffic: Traffic::default(),
            sleeps: AtomicBool::new(false),
            metrics: WorkerMetrics::new(&spec.name),
        });
        Member { pool: pool.pool, spec: spec.clone(), worker, draining: false, gone: CancellationToken::new() }
    }

    fn act(self: &Arc<Self>, action: &Action) {
        match action {
            Action::Probe { worker } => {
                let (intake, worker) = (Arc::clone(self), *worker);
                self.tracker.spawn(async move { intake.probe(worker).await });
            }
            Action::Health { worker, from, to } => {
                let name = self.workers.get(*worker).map(|worker| Arc::clone(&worker.name));
                tracing::info!(worker = name.as_deref(), ?from, ?to, "worker health changed");
            }
            Action::Wake { worker } => self.turn(*worker, Turn::Wake),
            Action::Sleep { worker } => self.turn(*worker, Turn::Sleep),
            Action::LoadAdapter { worker, adapter } => self.change_adapter(*worker, *adapter, Change::Load),
            Action::UnloadAdapter { worker, adapter } => self.change_adapter(*worker, *adapter, Change::Unload),
            Action::Send { .. } | Action::Refuse { .. } => {}
        }
    }

    /// Wakes a worker's model or puts it to sleep, and tells the core what became of it.
    fn turn(self: &Arc<Self>, id: WorkerId, turn: Turn) {
        let (Some((_, gone, _)), Some(worker)) = (self.member_facts(id), self.workers.get(id)) else { return };
        let driver = Arc::clone(&self.driver);
        let turning = async move {
            let began = Instant::now();
            let worked = match worker.identity.load_full() {
                Some(identity) => {
                    let Identity { engine, model, .. } = &*identity;
                    engines::set_asleep(&worker.channel, *engine, model, turn == Turn::Sleep).await
                }
                None => Err(forebay_backends::Error::Unreadable),
            };
            let seconds = began.elapsed().as_secs_f64();
            match &worked {
                Ok(()) => tracing::info!(worker = &*worker.name, ?turn, seconds, "the engine did it"),
                Err(error) => {
                    let error: &dyn std::error::Error = error;
                    tracing::warn!(worker = &*worker.name, ?turn, error, "the engine did not do it");
                }
            }
            driver.tell(Event::SleepDone { worker: id, worked: worked.is_ok() });
        };
        self.tracker.spawn(gone.run_until_cancelled_owned(turning));
    }

    async fn probe(self: Arc<Self>, id: WorkerId) {
        let Some((spec, gone, model)) = self.member_facts(id) else { return };
        let Some(worker) = self.workers.get(id) else { return };
        let asked = gone.run_until_cancelled(identify(&worker, &spec)).await;
        let healthy = match asked {
            None => return,
            Some(None) => false,
            Some(Some((detected, load))) => {
                let first = worker.identity.load().is_none();
                self.identified(&worker, &spec, &model, &detected).await;
                self.adapters_listed(&worker, &detected.models, load);
                if !self.look_asleep(&worker).await {
                    let engine = detected.engine.name();
                    tracing::warn!(worker = &*worker.name, engine, "it cannot be put to sleep as it was started");
                }
                if first {
                    self.watch(&worker, &gone, detected.engine);
                    self.watch_sleep(&worker, &gone);
                    self.follow_cache(&worker, &gone, detected.engine, spec.kv_events.clone());
                }
                worker.returned.notify_waiters();
                true
            }
        };
        self.driver.tell(Event::Probed { worker: id, healthy });
    }

    /// Asks a worker that may be put to sleep whether it is. False where its engine cannot tell.
    async fn look_asleep(&self, worker: &Worker) -> bool {
        let sleeps = worker.spec.lock().sleep.is_some();
        let Some(identity) = worker.identity.load_full().filter(|_| sleeps) else { return true };
        match engines::is_asleep(&worker.channel, identity.engine, &identity.model).await {
            Ok(Some(asleep)) => self.driver.tell(Event::SleepSeen { worker: worker.id, asleep }),
            Ok(None) => return false,
            Err(error) => tracing::debug!(worker = &*worker.name, %error, "whether it sleeps is not known"),
        }
        true
    }

    /// Asks that again and again: others may wake it or put it to sleep, and Ollama unloads a model by itself.
    fn watch_sleep(self: &Arc<Self>, worker: &Arc<Worker>, gone: &CancellationToken) {
        if worker.spec.lock().sleep.is_none() {
            return;
        }
        let (intake, worker) = (Arc::clone(self), Arc::clone(worker));
        self.tracker.spawn(gone.clone().run_until_cancelled_owned(async move {
            loop {
                tokio::time::sleep(SLEEP_EVERY).await;
                intake.look_asleep(&worker).await;
            }
        }));
    }

    fn member_facts(&self, id: WorkerId) -> Option<(WorkerSpec, CancellationToken, Arc<str>)> {
        let members = self.members.lock();
        let member = members.workers.get(&id)?;
        let pool = members.pools.get(&member.pool)?;
        Some((member.spec.clone(), member.gone.clone(), Arc::clone(&pool.model)))
    }

    async fn identified(&self, worker: &Arc<Worker>, spec: &WorkerSpec, model: &str, detected: &Detected) {
        let served = match &spec.model {
            Some(name) => name.clone(),
            None => only_model(detected).unwrap_or(model).to_owned(),
        };
        let facts = detected.models.iter().find(|candidate| candidate.id == served);
        if facts.is_none() && !detected.models.is_empty() {
            tracing::warn!(worker = &*worker.name, model = served, "the worker does not list this model");
        }
        if worker.rank.is_some() && detected.engine.rank_header().is_none() {
            tracing::warn!(worker = &*worker.name, "its engine takes no request for one of its ranks");
        }
        let counts = detected.engine.serves(Api::Tokenize);
        let fact = Fact::Model {
            max_model_len: facts.and_then(|facts| facts.max_model_len),
            root: facts.and_then(|facts| facts.root.clone()),
            tokenizer: counts.then(|| EngineTokenizer { channel: worker.channel.clone(), model: served.clone() }),
        };
        let adapter = facts.is_some_and(|facts| facts.parent.is_some()).then(|| served.clone());
        let tensors = facts.and_then(|facts| facts.tensors.clone());
        let server = Ways { openai_routes: detected.openai_routes, token_ids: spec.token_ids, tensors };
        // Of a server of an unknown kind nothing is known of its answers either.
        let listed = detected.models.iter().filter(|_| !matches!(detected.engine.mark(), engines::Mark::Any));
        let names = listed.flat_map(|model| [Some(model.id.clone()), model.root.clone()]).flatten().collect();
        worker.identity.store(Some(Arc::new(Identity {
            engine: detected.engine,
            server,
            model: served,
            adapter,
            names,
        })));
        let caches_late = detected.engine.caches_late();
        if worker.spec.lock().caches_late != caches_late {
            self.respec(worker, |spec| spec.caches_late = caches_late);
        }
        self.tell(worker, fact).await;
    }

    /// Tells the routing table and waits until it knows, so that a worker that is up is a worker that is known.
    pub(super) async fn tell(&self, worker: &Worker, fact: Fact) {
        let (taken, known) = oneshot::channel();
        let learned = Learned { pool: worker.pool, worker: Arc::clone(&worker.name), fact, taken };
        if self.learned.send(learned).await.is_ok() {
            let _ = known.await;
        }
    }

    /// Follows the worker's own load reports until it is gone.
    fn watch(self: &Arc<Self>, worker: &Arc<Worker>, gone: &CancellationToken, engine: &'static dyn engines::Engine) {
        let (intake, worker) = (Arc::clone(self), Arc::clone(worker));
        self.tracker.spawn(gone.clone().run_until_cancelled_owned(async move {
            let (channel, traffic) = (worker.channel.clone(), worker.traffic.clone());
            let Some(mut signals) = Signals::new(channel, engine, traffic, Pace::default()) else { return };
            signals = signals.of_rank(worker.rank);
            let mut cache = (None, None);
            let (mut places, mut listed) = (None, Instant::now());
            let sleeps = worker.spec.lock().sleep.is_some();
            loop {
                match signals.next().await {
                    // One that may is asked for that by itself.
                    Signal::Load(load) if load.sleeping && sleeps => {}
                    Signal::Load(load) if load.sleeping => {
                        worker.sleeps_for_itself(true);
                        intake.driver.tell(Event::Probed { worker: worker.id, healthy: false });
                    }
                    Signal::Load(load) => {
                        let says = (load.kv_tokens, load.block_tokens);
                        if says != (None, None) && says != cache {
                            cache = says;
                            intake.cache_size(&worker, &load).await;
                        }
                        if load.adapters_max != places {
                            places = load.adapters_max;
                            intake.places_said(&worker, places);
                        }
                        if listed.elapsed() >= LIST_EVERY {
                            listed = Instant::now();
                            intake.list_adapters(&worker).await;
                        }
                        let gauges = &worker.metrics;
                        gauges.running.set(f64::from(load.running));
                        gauges.waiting.set(f64::from(load.waiting));
                        gauges.kv_usage.set(load.kv_usage.unwrap_or(0.0));
                        intake.driver.tell(Event::Load { worker: worker.id, report: load.report() });
                    }
                    Signal::Lost => intake.driver.tell(Event::LoadLost { worker: worker.id }),
                }
            }
        }));
    }

    /// The worker says how large its KV cache is and its blocks are: the core counts reservations in them, and prompts
    /// are hashed in them.
    async fn cache_size(&self, worker: &Worker, load: &Load) {
        self.respec(worker, |spec| {
            spec.kv_tokens = load.kv_tokens;
            spec.block_tokens = load.block_tokens.unwrap_or(spec.block_tokens);
        });
        if let Some(block_tokens) = load.block_tokens {
            self.tell(worker, Fact::BlockTokens(block_tokens)).await;
        }
    }

    /// Changes what the core knows of a worker.
    pub(super) fn respec(&self, worker: &Worker, change: impl FnOnce(&mut forebay_scheduler::WorkerSpec)) {
        let mut spec = worker.spec.lock();
        change(&mut spec);
        let (worker, pool, spec) = (worker.id, worker.pool, spec.clone());
        self.driver.tell(Event::WorkerJoined { worker, pool, spec });
    }

    /// All workers, with the GPUs they are configured to run on.
    pub(super) fn tenants(&self) -> Vec<Tenant> {
        let members = self.members.lock();
        let tenants = members
            .workers
            .values()
            .map(|member| Tenant { worker: Arc::clone(&member.worker), configured: member.spec.gpus.clone() });
        tenants.collect()
    }

    /// The configured name of a pool's model.
    pub(super) fn model(&self, pool: PoolId) -> Option<Arc<str>> {
        self.members.lock().pools.get(&pool).map(|pool| Arc::clone(&pool.model))
    }

    /// The adapters of a pool's model.
    pub(super) fn adapters(&self, pool: PoolId) -> Arc<[Adapter]> {
        self.members.lock().pools.get(&pool).map(|pool| Arc::clone(&pool.adapters)).unwrap_or_default()
    }

    /// Whether an adapter that left a worker's model is configured for another one of the same server, whose it is now.
    pub(super) fn is_anothers(&self, worker: &Worker, adapter: &Adapter) -> bool {
        let members = self.members.lock();
        let Some(member) = members.workers.get(&worker.id).filter(|_| adapter.gone) else { return false };
        let server = member.spec.endpoint.to_string();
        let others = members.workers.values().filter(|other| other.pool != member.pool);
        let shared = others.filter(|other| other.spec.endpoint.to_string() == server);
        let mut known = shared.filter_map(|other| members.pools.get(&other.pool)).flat_map(|pool| pool.adapters.iter());
        known.any(|known| !known.gone && known.name == adapter.name)
    }

    /// How many of them one worker is given, where that is configured.
    pub(super) fn places(&self, pool: PoolId) -> Option<u32> {
        self.members.lock().pools.get(&pool)?.adapters_max
    }

    /// What ends the tasks of a worker.
    pub(super) fn gone(&self, worker: WorkerId) -> Option<CancellationToken> {
        Some(self.members.lock().workers.get(&worker)?.gone.clone())
    }

    pub(super) fn worker(&self, id: WorkerId) -> Option<Arc<Worker>> {
        self.workers.get(id)
    }

    pub(super) fn workers_of(&self, pool: PoolId) -> Vec<Arc<Worker>> {
        self.workers.of(pool)
    }

    /// Tokens in one block of the hashes of a pool's prompts.
    pub(super) fn block_tokens(&self, pool: PoolId) -> Option<u32> {
        self.members.lock().pools.get(&pool).map(|pool| pool.block_tokens)
    }
}

/// Asks a worker who it is and whether it can serve, `None` when it cannot; and what it has to do, where that may be asked.
async fn identify(worker: &Worker, spec: &WorkerSpec) -> Option<(Detected, Option<Load>)> {
    let channel = &worker.channel;
    let asked = async {
        // A server whose engine is configured need not list its models.
        let detected = engines::detect(channel, spec.engine.and_then(engines::by_name)).await?;
        let engine = detected.engine;
        engines::probe(channel, engine).await?;
        // vLLM's health path answers 200 while the model sleeps. What only one may read is left to the poll, and a worker
        // that we put to sleep is well.
        let unasked = engine.load_drains() || spec.sleep.is_some();
        let load = if unasked { None } else { engines::load(channel, engine, None).await.ok().flatten() };
        let asleep = load.is_some_and(|load| load.sleeping);
        Ok::<_, forebay_backends::Error>((!asleep).then_some((detected, load)))
    };
    let asked = asked.await;
    worker.sleeps_for_itself(matches!(asked, Ok(None)));
    match asked {
        Ok(detected) => detected,
        Err(error) => {
            tracing::debug!(worker = &*spec.name, %error, "a probe failed");
            None
        }
    }
}

/// The one base model a worker serves; adapters and other ways to it do not count.
fn only_model(detected: &Detected) -> Option<&str> {
    let mut bases = detected.models.iter().filter(|model| model.parent.is_none() && !model.alternative);
    match (bases.next(), bases.next()) {
        (Some(only), None) => Some(&only.id),
        _ => None,
    }
}
