//! Which model answers: configured names and aliases.
//!
//! A [`Route`] proves that the name is one we serve. The table is a snapshot, swapped whole when configuration or
//! what the workers say about themselves changes; a request keeps the snapshot's model it began with.
//!
//! Not here: which worker (`dispatch`), and how long the prompt is (`prepare`).

use std::sync::Arc;

use arc_swap::ArcSwap;
use foldhash::HashMap;
use forebay_backends::transport::Channel;
use forebay_scheduler::PoolId;
use forebay_tokens::Tokenizer;

use crate::config::MicroBatch;
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

/// One configured model with its pool of workers.
pub struct Model {
    pub name: Arc<str>,
    pub aliases: Vec<Arc<str>>,
    pub pool: PoolId,
    pub counting: Counting,
    /// Prompt and output tokens together; `None` while no configuration or worker has said.
    pub max_model_len: Option<u32>,
    /// Tokens in one KV block at the workers, the unit of prefix hashes.
    pub block_tokens: u32,
    /// What embeddings and the like of several clients may be asked as one call; `None`: each by itself.
    pub micro_batch: Option<MicroBatch>,
    /// Whether equal requests in flight share an answer.
    pub coalesce: bool,
    pub metrics: Arc<ModelMetrics>,
    /// Unix seconds at which this gateway began to serve the model.
    pub created: u64,
}

/// A request's model, found by name.
#[derive(Clone)]
pub struct Route {
    pub model: Arc<Model>,
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
    by_name: HashMap<Arc<str>, Arc<Model>>,
}

impl Routing {
    /// Replaces the table. Names and aliases are unique by configuration.
    pub fn apply(&self, models: Vec<Arc<Model>>) {
        let by_name = models
            .iter()
            .flat_map(|model| {
                std::iter::once(&model.name).chain(&model.aliases).map(|name| (Arc::clone(name), Arc::clone(model)))
            })
            .collect();
        self.table.store(Arc::new(Table { models, by_name }));
    }

    /// # Errors
    /// [`UnknownModel`] when no model has this name or alias.
    pub fn route(&self, name: &str) -> Result<Route, UnknownModel> {
        match self.table.load().by_name.get(name) {
            Some(model) => Ok(Route { model: Arc::clone(model) }),
            None => Err(UnknownModel { name: name.to_owned() }),
        }
    }

    /// The route of a request that names no model: the only one there is.
    ///
    /// # Errors
    /// [`UnknownModel`] when there is none or a choice.
    pub fn only(&self) -> Result<Route, UnknownModel> {
        match self.table.load().models.as_slice() {
            [model] => Ok(Route { model: Arc::clone(model) }),
            _ => Err(UnknownModel { name: String::new() }),
        }
    }

    /// All models in the order of the configuration.
    #[must_use]
    pub fn models(&self) -> Vec<Arc<Model>> {
        self.table.load().models.clone()
    }
}
