//! The models as they are now: configuration, and what the workers have said since.
//!
//! Whenever either changes, the routing table is made anew and swapped. What was learned of a model survives a reload.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io::ErrorKind;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use forebay_backends::engines;
use forebay_backends::signals::gpu::{Readings, Source};
use forebay_backends::transport::Endpoint;
use forebay_scheduler::{AdapterId, PoolId, PoolLimits, SleepSpec};
use forebay_tokens::Tokenizer;
use tokio::sync::{Mutex, mpsc};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::joined::{JOINED_MAX, Joined};
use super::lists::{Clash, Enlisted, Listed, Lists};
use super::tokenizers::{self, Tokenizers};
use crate::admin::order::{Change, Order, Refused};
use crate::admin::wire::Join;
use crate::config::{self, Config, GpuName};
use crate::dispatch::{Dispatch, Fact, Learned, NodeSpec, PoolSpec, WorkerSpec, WorkerStatus};
use crate::routing::{Adapter, Counting, EngineTokenizer, Model, Routing};
use crate::telemetry::ModelMetrics;

/// Tokens in a prefix block until an engine says how large its KV blocks are (vLLM's default).
const BLOCK_TOKENS: u32 = 16;
/// Adapters of a model that are configured no more and remembered, so that workers unload them; else those that left first
/// stay loaded.
const ADAPTERS_GONE_MAX: usize = 256;
/// How often a worker that leaves is looked at.
const LEAVING_LOOK: Duration = Duration::from_millis(100);

pub(super) struct Catalog {
    routing: Arc<Routing>,
    dispatch: Arc<Dispatch>,
    /// This machine's GPUs, for as long as no node is configured.
    here: Option<Readings>,
    /// An async lock: loading a tokenizer happens under it, away from every request.
    state: Mutex<State>,
}

struct State {
    /// As it was given.
    given: Config,
    lists: Lists,
    joined: Joined,
    /// With the workers that joined and those that are listed.
    config: Config,
    /// The workers of these names get nothing new.
    draining: BTreeSet<String>,
    tokenizers: Tokenizers,
    next_pool: u32,
    models: HashMap<Arc<str>, Known>,
    next_adapter: u32,
}

/// What stays with a model's name for the life of the process.
struct Known {
    pool: PoolId,
    metrics: Arc<ModelMetrics>,
    created: u64,
    /// By the worker's name.
    said: BTreeMap<Arc<str>, Said>,
    block_tokens: u32,
    adapters: Arc<[Adapter]>,
    /// The tokenizer found at the worker's word, where the configuration names none.
    found: Option<Arc<Tokenizer>>,
}

/// What one worker said of the model.
struct Said {
    max_model_len: Option<u32>,
    tokenizer: Option<EngineTokenizer>,
}

impl Known {
    /// A prompt must fit wherever it is placed: the smallest context of the pool counts.
    fn max_model_len(&self) -> Option<u32> {
        self.said.values().filter_map(|said| said.max_model_len).min()
    }

    fn engines(&self) -> Arc<[EngineTokenizer]> {
        self.said.values().filter_map(|said| said.tokenizer.clone()).collect()
    }
}

impl Catalog {
    pub(super) fn new(
        routing: Arc<Routing>,
        dispatch: Arc<Dispatch>,
        here: Option<Readings>,
        lists: Lists,
        joined: Joined,
    ) -> Self {
        let none = Config { server: config::Server::default(), nodes: Vec::new(), models: Vec::new() };
        let state = State {
            given: none.clone(),
            lists,
            joined,
            config: none,
            draining: BTreeSet::new(),
            tokenizers: Tokenizers::default(),
            next_pool: 0,
            models: HashMap::new(),
            next_adapter: 0,
        };
        Self { routing, dispatch, here, state: Mutex::new(state) }
    }

    /// Takes over a configuration whole, or not at all when one of its tokenizers cannot be loaded.
    pub(super) async fn apply(&self, config: Config) -> anyhow::Result<()> {
        for worker in config.models.iter().flat_map(|model| &model.workers) {
            endpoint(worker)?;
        }
        let mut state = self.state.lock().await;
        let directories: Vec<PathBuf> = config.models.iter().filter_map(|model| model.tokenizer.clone()).collect();
        let mut tokenizers = state.tokenizers.clone();
        state.tokenizers = tokio::task::spawn_blocking(move || {
            tokenizers.keep_only(&directories);
            for directory in directories {
                tokenizers
                    .load(&directory)
                    .with_context(|| format!("cannot load the tokenizer in {}", directory.display()))?;
            }
            anyhow::Ok(tokenizers)
        })
        .await??;
        state.lists.apply(&config);
        state.joined.read(&config);
        state.given = config;
        self.renew(&mut state)?;
        self.dispatch.follow_nodes(&self.nodes(&state.config));
        Ok(())
    }

    /// Lets the configuration, who joined and what is listed be what is served.
    fn renew(&self, state: &mut State) -> anyhow::Result<()> {
        let mut config = state.given.clone();
        let mut enlisted = Enlisted::of(&config);
        state.joined.complete(&mut config, &mut enlisted);
        state.lists.complete(&mut config, &mut enlisted);
        state.draining = state.joined.draining(&config);
        state.draining.append(&mut enlisted.draining);
        let old = std::mem::replace(&mut state.config, config);
        state.name_models(&old);
        let pools = state.pools()?;
        self.routing.apply(state.table());
        self.dispatch.apply(&pools);
        Ok(())
    }

    fn nodes(&self, config: &Config) -> Vec<NodeSpec> {
        let agent = |node: &config::Node| {
            let source = Source::Agent(node.agent.clone()?);
            Some(NodeSpec { name: (&*node.name).into(), source })
        };
        match (&config.nodes[..], &self.here) {
            ([], Some(here)) => {
                vec![NodeSpec { name: config::GpuName::HERE.into(), source: Source::Here(here.clone()) }]
            }
            (nodes, _) => nodes.iter().filter_map(agent).collect(),
        }
    }

    /// Takes in what workers, lists and the owner say, until the last sender is gone.
    pub(super) async fn follow(
        &self,
        mut facts: mpsc::Receiver<Learned>,
        mut lists: mpsc::Receiver<Listed>,
        mut orders: mpsc::Receiver<Order>,
    ) {
        let mut leaving: Vec<Leaving> = Vec::new();
        let mut looks = interval(LEAVING_LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let learned = tokio::select! {
                Some(learned) = facts.recv() => learned,
                Some(Order { change, done }) = orders.recv() => {
                    let mut state = self.state.lock().await;
                    let changed = self.change(&mut state, change, &mut leaving).await;
                    // Said before one that leaves can be gone. Who asked may have gone; it is done all the same.
                    let _ = done.send(changed.map(|ranks| self.statuses(&ranks)));
                    continue;
                }
                _ = looks.tick(), if !leaving.is_empty() => {
                    self.let_go(&mut leaving).await;
                    continue;
                }
                Some(listed) = lists.recv() => {
                    let mut state = self.state.lock().await;
                    if state.lists.learn(listed)
                        && let Err(error) = self.renew(&mut state)
                    {
                        tracing::error!(error = format!("{error:#}"), "the listed workers cannot be served");
                    }
                    continue;
                }
                else => return,
            };
            let mut state = self.state.lock().await;
            let blocks_changed = state.learn(learned).await;
            self.routing.apply(state.table());
            if let (true, Ok(pools)) = (blocks_changed, state.pools()) {
                self.dispatch.apply(&pools);
            }
        }
    }
}

impl State {
    /// Gives each model its pool and metrics, and forgets the models that are gone.
    fn name_models(&mut self, old: &Config) {
        let Self { config, next_pool, next_adapter, models, .. } = self;
        models.retain(|name, known| {
            let Some(model) = config.models.iter().find(|model| model.name.as_str() == &**name) else { return false };
            let before = old.models.iter().find(|old| old.name == model.name);
            let before = before.iter().flat_map(|before| &before.workers);
            let before: HashMap<&str, &config::Worker> = before.map(|worker| (worker.name.as_str(), worker)).collect();
            let known_before =
                model.workers.iter().filter_map(|worker| Some((worker, *before.get(worker.name.as_str())?)));
            let (stay, changed): (Vec<_>, Vec<_>) = known_before.partition(|(worker, before)| worker == before);
            let stay: HashSet<String> =
                stay.iter().flat_map(|(worker, _)| worker.ranks().map(|rank| worker.rank_name(rank))).collect();
            known.said.retain(|name, _| stay.contains(&**name));
            if !changed.is_empty() {
                known.found = None; // it may serve another model's files under the old name
            }
            true
        });
        for model in &config.models {
            let known = models.entry(model.name.as_str().into()).or_insert_with(|| {
                let pool = PoolId(*next_pool);
                *next_pool += 1;
                let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
                Known {
                    pool,
                    metrics: Arc::new(ModelMetrics::new(model.name.as_str())),
                    created: now.map_or(0, |now| now.as_secs()),
                    said: BTreeMap::new(),
                    block_tokens: BLOCK_TOKENS,
                    adapters: Arc::default(),
                    found: None,
                }
            });
            let adapter = |adapter: &config::Adapter| {
                let before = known.adapters.iter().find(|before| *before.name == *adapter.name);
                let id = before.map_or_else(
                    || {
                        *next_adapter += 1;
                        AdapterId(*next_adapter)
                    },
                    |before| before.id,
                );
                Adapter {
                    id,
                    name: adapter.name.as_str().into(),
                    base: model.name.as_str().into(),
                    path: adapter.path.as_deref().map(Into::into),
                    memory_bytes: adapter.memory_mib.map_or(0, |mib| u64::from(mib.get()) << 20),
                    gone: false,
                }
            };
            let mut adapters: Vec<Adapter> = model.adapters.iter().map(adapter).collect();
            let is_gone = |before: &&Adapter| before.path.is_some() && adapters.iter().all(|now| now.id != before.id);
            let (before, just): (Vec<_>, Vec<_>) = known.adapters.iter().filter(is_gone).partition(|known| known.gone);
            let over = (before.len() + just.len()).saturating_sub(ADAPTERS_GONE_MAX);
            let gone: Vec<Adapter> = before.into_iter().chain(just).skip(over).cloned().collect();
            adapters.extend(gone.into_iter().map(|adapter| Adapter { gone: true, ..adapter }));
            if adapters != *known.adapters {
                known.adapters = adapters.into();
            }
        }
    }

    fn workers(&self) -> impl Iterator<Item = &config::Worker> {
        self.config.models.iter().flat_map(|model| &model.workers)
    }

    /// The ranks of a worker, or the one of this name.
    fn ranks(&self, name: &str) -> Vec<String> {
        let ranks = self.workers().flat_map(|worker| worker.ranks().map(move |rank| (worker, worker.rank_name(rank))));
        ranks.filter(|(worker, rank)| worker.name.as_str() == name || rank == name).map(|(_, rank)| rank).collect()
    }

    /// The same where there are any.
    fn known(&self, name: &str) -> Result<Vec<String>, Refused> {
        let ranks = self.ranks(name);
        if ranks.is_empty() { Err(Refused::Unknown(format!("There is no worker `{name}`."))) } else { Ok(ranks) }
    }

    fn table(&self) -> Vec<Arc<Model>> {
        let models = self.config.models.iter();
        let known = models.filter_map(|model| Some((model, self.models.get(model.name.as_str())?)));
        let both = known.flat_map(|(model, known)| {
            let base = self.model(model, known);
            let adapters = known.adapters.iter().filter(|adapter| !adapter.gone);
            let adapters: Vec<_> = adapters.map(|adapter| base.adapted(adapter)).collect();
            std::iter::once(base).chain(adapters)
        });
        both.map(Arc::new).collect()
    }

    fn model(&self, model: &config::Model, known: &Known) -> Model {
        let configured = model.tokenizer.as_ref().and_then(|directory| self.tokenizers.get(directory));
        let counting = match (configured.or_else(|| known.found.clone()), known.engines()) {
            (Some(tokenizer), _) => Counting::Tokenizer(tokenizer),
            (None, engines) if !engines.is_empty() => Counting::Engines(engines),
            (None, _) => Counting::Estimate,
        };
        Model {
            name: model.name.as_str().into(),
            aliases: model.aliases.iter().map(|alias| alias.as_str().into()).collect(),
            is_default: model.is_default,
            pool: known.pool,
            adapter: None,
            counting,
            max_model_len: model.max_model_len.map(Into::into).or_else(|| known.max_model_len()),
            block_tokens: known.block_tokens,
            hedge_after: model.hedge_after,
            fallbacks: model.fallbacks.clone(),
            micro_batch: model.micro_batch,
            coalesce: model.coalesce,
            continue_streams: model.continue_streams,
            metrics: Arc::clone(&known.metrics),
            created: known.created,
        }
    }

    fn pools(&self) -> anyhow::Result<Vec<PoolSpec>> {
        let models = self.config.models.iter();
        models
            .filter_map(|model| {
                let known = self.models.get(model.name.as_str())?;
                Some(pool(&self.config.nodes, model, known, &self.draining))
            })
            .collect()
    }

    /// Whether the size of the model's prefix blocks changed.
    async fn learn(&mut self, learned: Learned) -> bool {
        let Self { config, models, .. } = self;
        let Some((name, known)) = models.iter_mut().find(|(_, known)| known.pool == learned.pool) else {
            return false;
        };
        let (max_model_len, root, tokenizer) = match learned.fact {
            Fact::BlockTokens(tokens) => return std::mem::replace(&mut known.block_tokens, tokens) != tokens,
            Fact::Model { max_model_len, root, tokenizer } => (max_model_len, root, tokenizer),
        };
        let first = known.said.insert(learned.worker, Said { max_model_len, tokenizer }).is_none();
        let configured = config.models.iter().any(|model| model.name.as_str() == &**name && model.tokenizer.is_some());
        if configured || known.found.is_some() {
            return false;
        }
        if let Some(root) = root {
            known.found = tokio::task::spawn_blocking(move || tokenizers::find(&root)).await.ok().flatten();
        }
        match (&known.found, known.engines().is_empty()) {
            (Some(_), _) => tracing::info!(model = &**name, "counting tokens with the model's files on this machine"),
            _ if !first => {}
            (None, false) => tracing::info!(model = &**name, "counting tokens by asking the engine"),
            (None, true) => tracing::warn!(model = &**name, "no tokenizer found, token counts are estimates"),
        }
        false
    }
}

/// A worker that leaves: once it has nothing, or then.
struct Leaving {
    name: String,
    ranks: Vec<String>,
    until: Instant,
}

/// What the owner wants changed.
impl Catalog {
    /// The names of the workers that the change concerns, one for each rank.
    async fn change(
        &self,
        state: &mut State,
        change: Change,
        leaving: &mut Vec<Leaving>,
    ) -> Result<Vec<String>, Refused> {
        let ranks = match change {
            Change::Join { model, keys } => return self.join(state, Join { model, worker: keys }).await,
            Change::Drain(name) => {
                let ranks = state.known(&name)?;
                state.joined.set_draining(&ranks, true);
                ranks
            }
            Change::Resume(name) => {
                let ranks = state.known(&name)?;
                if state.joined.is_leaving(&name) {
                    return Err(Refused::Conflict(format!(
                        "`{name}` is about to leave: let it join again afterwards."
                    )));
                }
                state.joined.set_draining(&ranks, false);
                ranks
            }
            Change::Leave(name) => {
                if !state.joined.holds(&name) {
                    state.known(&name)?;
                    return Err(Refused::Conflict(format!(
                        "`{name}` is not a worker that joined by call: take it out of the configuration or of its list, \
                         or let it drain."
                    )));
                }
                state.joined.leave(&name).await.map_err(|error| unkept(&error))?;
                // Who has its name in its place stays as it is.
                let ranks = state.joined.ranks(&name);
                state.joined.set_draining(&ranks, true);
                if !ranks.is_empty() && leaving.iter().all(|known| known.name != name) {
                    let until = Instant::now() + state.given.server.drain;
                    leaving.push(Leaving { name, ranks: ranks.clone(), until });
                }
                ranks
            }
        };
        self.renew(state).map_err(|error| Refused::Unkept(format!("{error:#}")))?;
        Ok(ranks)
    }

    fn statuses(&self, ranks: &[String]) -> Vec<WorkerStatus> {
        let mut statuses = self.dispatch.worker_statuses();
        statuses.retain(|status| ranks.iter().any(|rank| **rank == *status.name));
        statuses
    }

    async fn join(&self, state: &mut State, mut said: Join) -> Result<Vec<String>, Refused> {
        let is_called = |model: &&config::Model| {
            model.name.as_str() == said.model || model.aliases.iter().any(|alias| alias.as_str() == said.model)
        };
        let Some(model) = state.given.models.iter().find(is_called) else {
            let known: Vec<_> = state.given.models.iter().map(|model| model.name.as_str()).collect();
            let known = known.join("`, `");
            return Err(Refused::Unknown(format!("`{}` is no configured model; there are `{known}`.", said.model)));
        };
        if state.joined.is_full() {
            return Err(Refused::Conflict(format!("{JOINED_MAX} workers have joined, which is the most: use a list.")));
        }
        let worker = state.joined.check(&said.worker, &state.given.nodes).map_err(Refused::Wrong)?;
        endpoint(&worker).map_err(|error| Refused::Wrong(format!("{error:#}")))?;
        match Enlisted::of(&state.config).clash(&model.name, &worker) {
            None => {}
            Some(Clash::Address) => {
                return Err(Refused::Conflict(format!("{} serves `{}` already.", worker.url, model.name)));
            }
            Some(Clash::Name(name)) => return Err(Refused::Conflict(format!("The name `{name}` is taken."))),
        }
        said.model = model.name.to_string();
        let ranks = worker.ranks().map(|rank| worker.rank_name(rank)).collect();
        state.joined.join(said, worker).await.map_err(|error| unkept(&error))?;
        self.renew(state).map_err(|error| Refused::Unkept(format!("{error:#}")))?;
        Ok(ranks)
    }

    /// Forgets the workers that leave and have nothing any more, or had their time. What they still have goes on.
    async fn let_go(&self, leaving: &mut Vec<Leaving>) {
        let busy: BTreeSet<Arc<str>> = self.dispatch.busy_workers();
        let over = |leaving: &Leaving| {
            leaving.until <= Instant::now() || !leaving.ranks.iter().any(|rank| busy.contains(rank.as_str()))
        };
        let gone: Vec<Leaving> = leaving.extract_if(.., |leaving| over(leaving)).collect();
        if gone.is_empty() {
            return;
        }
        let mut state = self.state.lock().await;
        for Leaving { name, ranks, .. } in &gone {
            if state.joined.is_leaving(name) {
                state.joined.forget(name);
                state.joined.set_draining(ranks, false);
            }
        }
        if let Err(error) = self.renew(&mut state) {
            tracing::error!(error = format!("{error:#}"), "the workers that are left cannot be served");
        }
    }
}

fn unkept(error: &std::io::Error) -> Refused {
    if error.kind() == ErrorKind::FileTooLarge {
        return Refused::Conflict("The workers that joined say more than can be kept: use a list.".to_owned());
    }
    tracing::error!(%error, "the workers that joined cannot be written to the data directory");
    Refused::Unkept("The change cannot be kept, so it was not made: the data directory cannot be written.".to_owned())
}

fn endpoint(worker: &config::Worker) -> anyhow::Result<Endpoint> {
    Endpoint::new(&worker.url, worker.api_key.as_ref().map(config::Secret::inner))
        .map(|endpoint| {
            let grpc = worker.engine.and_then(engines::by_name).is_some_and(|engine| engine.is_grpc());
            endpoint.with_http2(worker.http2 || grpc).with_metrics_port(worker.metrics_port)
        })
        .with_context(|| format!("worker `{}` cannot be reached by its url", worker.name.as_str()))
}

fn pool(
    nodes: &[config::Node],
    model: &config::Model,
    known: &Known,
    draining: &BTreeSet<String>,
) -> anyhow::Result<PoolSpec> {
    let limits = PoolLimits {
        policy: model.policy,
        block_tokens: known.block_tokens,
        queue_requests_max: model.queue_requests_max.get(),
        queue_tokens_max: model.queue_tokens_max,
        queue_bytes_max: model.queue_bytes_max as u64,
        queue_timeout: model.queue_wait_max,
        attempts_max: model.attempts_max.get(),
        worker_grace: model.worker_grace,
        class_shares: model.class_shares,
        split_tokens_min: model.split_tokens_min.get(),
    };
    let bytes = |gib: NonZeroU32| u64::from(gib.get()) << 30;
    let gpu_gib = |gpu: &GpuName| nodes.iter().find(|node| node.name == gpu.node)?.gpu_memory_gib;
    let ranks = model.workers.iter().flat_map(|worker| worker.ranks().map(move |rank| (worker, rank)));
    let workers = ranks.map(|(worker, rank)| {
        Ok(WorkerSpec {
            name: worker.rank_name(rank).into(),
            endpoint: endpoint(worker)?,
            role: worker.role,
            rank,
            engine: worker.engine,
            model: worker.model.as_ref().map(|name| name.as_str().to_owned()),
            kv_events: worker.kv_events.clone(),
            gpus: worker.gpus.clone(),
            token_ids: worker.token_ids,
            memory_bytes: worker.memory_gib.map(bytes),
            gpu_bytes: worker.gpus.iter().filter_map(gpu_gib).map(bytes).min(),
            sleep: worker.sleep.then_some(SleepSpec { residency: worker.awake_min }),
            first_byte: model.first_byte_timeout,
            first_token: model.first_token_timeout.unwrap_or(model.first_byte_timeout),
            idle: model.idle_timeout,
        })
    });
    let workers: Vec<WorkerSpec> = workers.collect::<anyhow::Result<_>>()?;
    Ok(PoolSpec {
        pool: known.pool,
        model: model.name.as_str().into(),
        limits,
        metrics: Arc::clone(&known.metrics),
        adapters: Arc::clone(&known.adapters),
        adapters_max: model.adapters_max.map(Into::into),
        draining: workers
            .iter()
            .map(|worker| &worker.name)
            .filter(|name| draining.contains(&***name))
            .cloned()
            .collect(),
        workers,
    })
}
