//! The models as they are now: configuration, and what the workers have said since.
//!
//! Whenever either changes, the routing table is made anew and swapped. What was learned of a model survives a reload.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::Context;
use forebay_backends::transport::{Channel, Endpoint};
use forebay_scheduler::{PoolId, PoolLimits};
use forebay_tokens::Tokenizer;
use tokio::sync::{Mutex, mpsc};

use super::tokenizers::{self, Tokenizers};
use crate::config::{self, Config};
use crate::dispatch::{Dispatch, Learned, PoolSpec, WorkerSpec};
use crate::routing::{Counting, Model, Routing};
use crate::telemetry::ModelMetrics;

/// Tokens in a prefix block until an engine says how large its KV blocks are (vLLM's default).
const BLOCK_TOKENS: u32 = 16;

pub(super) struct Catalog {
    routing: Arc<Routing>,
    dispatch: Arc<Dispatch>,
    /// An async lock: loading a tokenizer happens under it, away from every request.
    state: Mutex<State>,
}

struct State {
    config: Config,
    tokenizers: Tokenizers,
    next_pool: u32,
    models: HashMap<Arc<str>, Known>,
}

/// What stays with a model's name for the life of the process.
struct Known {
    pool: PoolId,
    metrics: Arc<ModelMetrics>,
    created: u64,
    max_model_len: Option<u32>,
    block_tokens: u32,
    /// The tokenizer found at the worker's word, where the configuration names none.
    found: Option<Arc<Tokenizer>>,
    engine: Option<(Channel, String)>,
}

impl Catalog {
    pub(super) fn new(routing: Arc<Routing>, dispatch: Arc<Dispatch>) -> Self {
        let state = State {
            config: Config { server: config::Server::default(), models: Vec::new() },
            tokenizers: Tokenizers::default(),
            next_pool: 0,
            models: HashMap::new(),
        };
        Self { routing, dispatch, state: Mutex::new(state) }
    }

    /// Takes over a configuration whole, or not at all when one of its tokenizers cannot be loaded.
    pub(super) async fn apply(&self, config: Config) -> anyhow::Result<()> {
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
        state.config = config;
        state.name_models();
        let pools = state.pools()?;
        self.routing.apply(state.table());
        self.dispatch.apply(&pools);
        Ok(())
    }

    /// Takes in what workers say, until the last sender is gone.
    pub(super) async fn follow(&self, mut learned: mpsc::Receiver<Learned>) {
        while let Some(fact) = learned.recv().await {
            let mut state = self.state.lock().await;
            let blocks_changed = state.learn(fact).await;
            self.routing.apply(state.table());
            if let (true, Ok(pools)) = (blocks_changed, state.pools()) {
                self.dispatch.apply(&pools);
            }
        }
    }
}

impl State {
    /// Gives each model its pool and metrics, and forgets the models that are gone.
    fn name_models(&mut self) {
        let Self { config, next_pool, models, .. } = self;
        models.retain(|name, _| config.models.iter().any(|model| model.name.as_str() == &**name));
        for model in &config.models {
            models.entry(model.name.as_str().into()).or_insert_with(|| {
                let pool = PoolId(*next_pool);
                *next_pool += 1;
                let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
                Known {
                    pool,
                    metrics: Arc::new(ModelMetrics::register(model.name.as_str())),
                    created: now.map_or(0, |now| now.as_secs()),
                    max_model_len: None,
                    block_tokens: BLOCK_TOKENS,
                    found: None,
                    engine: None,
                }
            });
        }
    }

    fn table(&self) -> Vec<Arc<Model>> {
        let models = self.config.models.iter();
        models.filter_map(|model| Some(Arc::new(self.model(model, self.models.get(model.name.as_str())?)))).collect()
    }

    fn model(&self, model: &config::Model, known: &Known) -> Model {
        let configured = model.tokenizer.as_ref().and_then(|directory| self.tokenizers.get(directory));
        let counting = match (configured.or_else(|| known.found.clone()), &known.engine) {
            (Some(tokenizer), _) => Counting::Tokenizer(tokenizer),
            (None, Some((channel, name))) => Counting::Engine { channel: channel.clone(), model: name.clone() },
            (None, None) => Counting::Estimate,
        };
        Model {
            name: model.name.as_str().into(),
            aliases: model.aliases.iter().map(|alias| alias.as_str().into()).collect(),
            pool: known.pool,
            counting,
            max_model_len: model.max_model_len.map(Into::into).or(known.max_model_len),
            block_tokens: known.block_tokens,
            metrics: Arc::clone(&known.metrics),
            created: known.created,
        }
    }

    fn pools(&self) -> anyhow::Result<Vec<PoolSpec>> {
        let models = self.config.models.iter();
        models.filter_map(|model| Some(pool(model, self.models.get(model.name.as_str())?))).collect()
    }

    /// Whether the size of the model's prefix blocks changed.
    async fn learn(&mut self, fact: Learned) -> bool {
        let Self { config, models, .. } = self;
        let Some((name, known)) = models.iter_mut().find(|(_, known)| known.pool == fact.pool) else {
            return false;
        };
        // A prompt must fit wherever it is placed: the smallest context of the pool counts.
        known.max_model_len = match (known.max_model_len, fact.max_model_len) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        let blocks_changed = fact.block_tokens.is_some_and(|tokens| tokens != known.block_tokens);
        known.block_tokens = fact.block_tokens.unwrap_or(known.block_tokens);
        known.engine = fact.tokenizer.or(known.engine.take());
        let configured = config.models.iter().any(|model| model.name.as_str() == &**name && model.tokenizer.is_some());
        let Some(root) = fact.root.filter(|_| !configured && known.found.is_none()) else { return blocks_changed };
        known.found = tokio::task::spawn_blocking(move || tokenizers::find(&root)).await.ok().flatten();
        match (&known.found, &known.engine) {
            (Some(_), _) => tracing::info!(model = &**name, "counting tokens with the model's files on this machine"),
            (None, Some(_)) => tracing::info!(model = &**name, "counting tokens by asking the engine"),
            (None, None) => tracing::warn!(model = &**name, "no tokenizer found, token counts are estimates"),
        }
        blocks_changed
    }
}

fn pool(model: &config::Model, known: &Known) -> anyhow::Result<PoolSpec> {
    let limits = PoolLimits {
        block_tokens: known.block_tokens,
        queue_requests_max: model.queue_requests_max.get(),
        queue_bytes_max: model.queue_bytes_max as u64,
        queue_timeout: model.queue_wait_max,
        attempts_max: model.attempts_max.get(),
        ..PoolLimits::default()
    };
    let workers = model.workers.iter().map(|worker| {
        let key = worker.api_key.as_ref().map(config::Secret::inner);
        let endpoint = Endpoint::new(&worker.url, key)
            .with_context(|| format!("worker `{}` cannot be reached by its url", worker.name.as_str()))?;
        Ok(WorkerSpec {
            name: worker.name.as_str().into(),
            endpoint,
            engine: worker.engine,
            model: worker.model.as_ref().map(|name| name.as_str().to_owned()),
            first_byte: model.first_byte_timeout,
            idle: model.idle_timeout,
        })
    });
    Ok(PoolSpec {
        pool: known.pool,
        model: model.name.as_str().into(),
        limits,
        metrics: Arc::clone(&known.metrics),
        workers: workers.collect::<anyhow::Result<_>>()?,
    })
}
