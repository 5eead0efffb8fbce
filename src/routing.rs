//! Which model answers: what a name means among the configured ones (`names`), and the models that answer for one that
//! cannot.
//!
//! A [`Route`] proves that the name is one we serve. The table is a snapshot, swapped whole when configuration or
//! what the workers say about themselves changes; a request keeps the snapshot's model it began with.
//!
//! Not here: which worker (`dispatch`), and how long the prompt is (`prepare`).

mod names;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use forebay_backends::transport::Channel;
use forebay_scheduler::{AdapterId, PoolId};
use forebay_tokens::Tokenizer;

use crate::config::{Fallback, MicroBatch, Trouble};
use crate::telemetry::ModelMetrics;

/// How prompts of a model are counted.
#[derive(Clone)]
pub enum Counting {
    /// With the model's own tokenizer, here.
    Tokenizer(Arc<Tokenizer>),
    /// With the model's own tokenizer, by asking one of these engines' `/tokenize`. At least one.
    Engines(Arc<[EngineTokenizer]>),
    /// By length; never a reason to refuse.
    Estimate,
}

/// An engine that counts for us.
#[derive(Clone)]
pub struct EngineTokenizer {
    pub channel: Channel,
    /// The model's name there.
    pub model: String,
}

/// A LoRA adapter of a model, which is asked for as a model of its own.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    pub id: AdapterId,
    /// Also its name at the workers.
    pub name: Arc<str>,
    /// The configured name of the model that it adapts.
    pub base: Arc<str>,
    /// Where workers find its files.
    pub path: Option<Arc<str>>,
    /// What it takes of each GPU of a worker.
    pub memory_bytes: u64,
    /// It is configured no more, but for whoever asked for it before, and workers may still have it.
    pub gone: bool,
}

impl Adapter {
    /// What the scheduler goes by.
    #[must_use]
    pub fn facts(&self) -> forebay_scheduler::Adapter {
        let loadable = self.path.is_some();
        forebay_scheduler::Adapter { id: self.id, loadable, memory_bytes: self.memory_bytes }
    }
}

/// One configured model, or an adapter of one, with its pool of workers.
pub struct Model {
    pub name: Arc<str>,
    /// Other names; a `*` in one stands for any text.
    pub aliases: Vec<Arc<str>>,
    /// Whether requests that name no model are for this one.
    pub is_default: bool,
    pub pool: PoolId,
    /// Of an adapter, which has the pool of the model that it adapts.
    pub adapter: Option<Adapter>,
    pub counting: Counting,
    /// Prompt and output tokens together; `None` while no configuration or worker has said.
    pub max_model_len: Option<u32>,
    /// Tokens in one KV block at the workers, the unit of prefix hashes.
    pub block_tokens: u32,
    /// How long an attempt may be silent before another is made beside it.
    pub hedge_after: Option<Duration>,
    /// Who answers when it cannot.
    pub fallbacks: Vec<Fallback>,
    /// What embeddings and the like of several clients may be asked as one call; `None`: each by itself.
    pub micro_batch: Option<MicroBatch>,
    /// Whether equal requests in flight share an answer.
    pub coalesce: bool,
    /// Whether a stream that breaks off is gone on with at another worker.
    pub continue_streams: bool,
    pub metrics: Arc<ModelMetrics>,
    /// Unix seconds at which this gateway began to serve the model.
    pub created: u64,
}

/// A request's model, found by name.
#[derive(Clone)]
pub struct Route {
    /// Who is to answer.
    pub model: Arc<Model>,
    /// Who was asked for.
    asked: Arc<Model>,
    /// How many of its fallbacks were looked at.
    passed: usize,
}

impl Route {
    fn new(model: &Arc<Model>) -> Self {
        Self { model: Arc::clone(model), asked: Arc::clone(model), passed: 0 }
    }
}

impl Model {
    /// An adapter of it: all is as with the model itself but what only the configuration of a model says, its other names
    /// and who answers in its place.
    #[must_use]
    pub fn adapted(&self, adapter: &Adapter) -> Self {
        Self {
            name: Arc::clone(&adapter.name),
            aliases: Vec::new(),
            is_default: false,
            pool: self.pool,
            adapter: Some(adapter.clone()),
            counting: self.counting.clone(),
            max_model_len: self.max_model_len,
            block_tokens: self.block_tokens,
            hedge_after: self.hedge_after,
            fallbacks: Vec::new(),
            micro_batch: self.micro_batch,
            coalesce: self.coalesce,
            continue_streams: self.continue_streams,
            metrics: Arc::clone(&self.metrics),
            created: self.created,
        }
    }

    /// Its name, and the aliases that are whole names.
    pub fn listed(&self) -> impl Iterator<Item = &Arc<str>> {
        std::iter::once(&self.name).chain(self.aliases.iter().filter(|alias| !alias.contains('*')))
    }
}

/// Nobody configured a model of that name.
#[derive(Debug, Clone, thiserror::Error)]
#[error("no model `{name}`")]
pub struct UnknownModel {
    pub name: String,
}

/// The table of models.
#[derive(Default)]
pub struct Routing {
    table: ArcSwap<Table>,
}

#[derive(Default)]
struct Table {
    models: Vec<Arc<Model>>,
    names: names::Names,
}

impl Routing {
    /// Replaces the table. Names and aliases are unique by configuration.
    pub fn apply(&self, models: Vec<Arc<Model>>) {
        let names = names::Names::new(
            models.iter().map(|model| (&*model.name, model.aliases.iter().map(|alias| &**alias), model.is_default)),
        );
        self.table.store(Arc::new(Table { models, names }));
    }

    /// The model that `name` means; empty: the default.
    ///
    /// # Errors
    /// [`UnknownModel`] when it means none.
    pub fn route(&self, name: &str) -> Result<Route, UnknownModel> {
        let table = self.table.load();
        match table.names.find(name).and_then(|number| table.models.get(number)) {
            Some(model) => Ok(Route::new(model)),
            None => Err(UnknownModel { name: name.to_owned() }),
        }
    }

    /// The route to the next model that answers for the one asked for, when that is in trouble. Each is asked once.
    #[must_use]
    pub fn fall_back(&self, route: &Route, trouble: Trouble) -> Option<Route> {
        let table = self.table.load();
        let fallbacks = route.asked.fallbacks.iter().enumerate().skip(route.passed);
        fallbacks.filter(|(_, fallback)| fallback.on.contains(&trouble)).find_map(|(at, fallback)| {
            let model = Arc::clone(table.models.get(table.names.find(&fallback.to)?)?);
            Some(Route { model, asked: Arc::clone(&route.asked), passed: at + 1 })
        })
    }

    /// The route of a request that names no model: the only one there is.
    ///
    /// # Errors
    /// [`UnknownModel`] when there is none or a choice.
    pub fn only(&self) -> Result<Route, UnknownModel> {
        let table = self.table.load();
        let mut models = table.models.iter().filter(|model| model.adapter.is_none());
        match (models.next(), models.next()) {
            (Some(model), None) => Ok(Route::new(model)),
            _ => Err(UnknownModel { name: String::new() }),
        }
    }

    /// All models in the order of the configuration, each with its adapters behind it.
    #[must_use]
    pub fn models(&self) -> Vec<Arc<Model>> {
        self.table.load().models.clone()
    }
}
