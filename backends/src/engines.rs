//! What the engines have in common, and the table of those that are known.
//!
//! An engine is one file here and one line in [`ENGINES`]: a pure adapter that names the paths of its server and reads
//! its answers. Recognition goes down the table; the last line, any server with OpenAI's API, takes what no other
//! recognised.
//!
//! Invariants: an adapter never opens a connection; whatever bytes it is given it answers, at worst with `None`.
//!
//! Not here: the OpenAI requests themselves, which travel as the client wrote them, and error bodies (`forebay-proto`).

mod kv_sources;
mod llamacpp;
mod models;
mod openai;
mod tally;
mod vllm;

use std::{fmt, time::Duration};

use forebay_scheduler::LoadReport;
use http::StatusCode;
use serde_json::Value;

pub use self::models::ServedModel;
use crate::{Error, signals::kv_events::KvSource, transport::Channel};

/// All known engines, in the order in which they are asked whether a server is theirs.
pub static ENGINES: [&dyn Engine; 3] = [&vllm::Vllm, &llamacpp::LlamaCpp, &openai::OpenAi];

/// Time for one question to a server that is there.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// A list of models: some 500 bytes each.
const MODELS_BYTES_MAX: usize = 4 << 20;
/// vLLM 0.32 writes 67 KB of metrics for one rank.
const METRICS_BYTES_MAX: usize = 8 << 20;
/// Answers of which nothing or one short value is read.
const SMALL_BYTES_MAX: usize = 64 << 10;

/// An API that a client may ask for, in OpenAI's shape or, for the last two, in vLLM's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    ChatCompletions,
    Completions,
    Embeddings,
    Tokenize,
    Detokenize,
}

/// How one engine's server is asked and understood.
pub trait Engine: Send + Sync {
    /// Its name in the configuration.
    fn name(&self) -> &'static str;

    /// Whether a server that lists these models is this engine's.
    fn recognises(&self, models: &[ServedModel]) -> bool;

    /// Path that answers 2xx while requests can be taken. It need not prove that a generation would succeed.
    fn health_path(&self) -> &'static str;

    /// Path that answers `{"version": "…"}`, where there is one.
    fn version_path(&self) -> Option<&'static str>;

    /// Path of the Prometheus text that [`Engine::read_load`] reads, where there is one.
    fn metrics_path(&self) -> Option<&'static str>;

    /// Reads the engine's own view of its load. `None` when the text does not tell it.
    fn read_load(&self, metrics: &[u8]) -> Option<Load>;

    /// Path that tells where the engine publishes its KV events, as vLLM's `/kv_event_sources` does, where there is one.
    fn kv_sources_path(&self) -> Option<&'static str> {
        None
    }

    /// Whether the engine speaks this API. A model may still refuse: embeddings of a chat model.
    fn serves(&self, api: Api) -> bool;

    /// Whether `prompt` of a completion and `input` of an embedding may be token ids.
    fn takes_token_ids(&self) -> bool;
}

impl fmt::Debug for dyn Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The engine of this name in the configuration.
#[must_use]
pub fn by_name(name: &str) -> Option<&'static dyn Engine> {
    ENGINES.into_iter().find(|engine| engine.name() == name)
}

/// What an engine says of itself at one moment. Where a server runs several ranks, this is about all of them together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    /// Sequences in the running batch.
    pub running: u32,
    /// Requests in the engine's own queue.
    pub waiting: u32,
    /// Share of the KV cache held by living requests, 0 to 1; a cached prefix that can be evicted counts as free.
    pub kv_usage: Option<f64>,
    /// Tokens in one KV block, and thus the grain of the prefix cache.
    pub block_tokens: Option<u32>,
    /// Tokens that the whole KV cache holds.
    pub kv_tokens: Option<u64>,
    /// The model is off the GPU. The health path answers all the same.
    pub sleeping: bool,
    pub totals: Totals,
}

impl Load {
    /// The part that the scheduler acts on.
    #[must_use]
    pub fn report(&self) -> LoadReport {
        LoadReport { running: self.running, waiting: self.waiting, kv_usage: self.kv_usage }
    }
}

/// Counters since the engine started; they fall when it restarts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Prompt tokens, those from the prefix cache included.
    pub prompt_tokens: Option<u64>,
    pub generation_tokens: Option<u64>,
    /// Tokens looked up in the prefix cache.
    pub prefix_queries: Option<u64>,
    /// Tokens found there.
    pub prefix_hits: Option<u64>,
    /// Sequences thrown out of the batch for want of KV blocks.
    pub preemptions: Option<u64>,
}

/// What was found at an address.
#[derive(Clone, Debug)]
pub struct Detected {
    pub engine: &'static dyn Engine,
    /// At least one.
    pub models: Vec<ServedModel>,
    pub version: Option<String>,
}

impl Detected {
    /// Where the engine has its model from: a directory on its machine or the name of a repository. Of a LoRA adapter
    /// that is the base model's.
    #[must_use]
    pub fn tokenizer_hint(&self) -> Option<&str> {
        self.models.iter().find(|model| model.parent.is_none()).and_then(|model| model.root.as_deref())
    }
}

/// The models that a server lists, at least one.
///
/// # Errors
/// [`Error::Status`] when it refuses, [`Error::Unreadable`] when this is not OpenAI's list or it is empty.
pub async fn models(channel: &Channel) -> Result<Vec<ServedModel>, Error> {
    let (status, body) = channel.get("/v1/models", ANSWER_LIMIT, MODELS_BYTES_MAX).await?;
    require_success(status)?;
    models::read(&body).filter(|models| !models.is_empty()).ok_or(Error::Unreadable)
}

/// Finds out which engine listens and what it serves.
///
/// # Errors
/// As [`models`]: a server without OpenAI's list of models is none that requests could be sent to.
pub async fn detect(channel: &Channel) -> Result<Detected, Error> {
    let models = models(channel).await?;
    let engine = ENGINES.into_iter().find(|engine| engine.recognises(&models)).ok_or(Error::Unreadable)?;
    let version = match engine.version_path() {
        Some(path) => version(channel, path).await,
        None => None,
    };
    Ok(Detected { engine, models, version })
}

/// Asks once whether the worker can take requests.
///
/// # Errors
/// The reason why not. Nothing is tried again.
pub async fn probe(channel: &Channel, engine: &dyn Engine) -> Result<(), Error> {
    // The list of models of a server whose health path it is can be long; none of it is kept.
    let (status, _) = channel.get(engine.health_path(), ANSWER_LIMIT, MODELS_BYTES_MAX).await?;
    require_success(status)
}

/// What the engine says of its load now; `None` where it publishes none that can be read.
///
/// # Errors
/// When it does not answer, or refuses.
pub async fn load(channel: &Channel, engine: &dyn Engine) -> Result<Option<Load>, Error> {
    let Some(path) = engine.metrics_path() else { return Ok(None) };
    let (status, text) = channel.get(path, ANSWER_LIMIT, METRICS_BYTES_MAX).await?;
    require_success(status)?;
    Ok(engine.read_load(&text))
}

/// Where the engine publishes what its prefix cache holds; `None` where it does not, or does not say.
///
/// # Errors
/// When it does not answer.
pub async fn kv_source(channel: &Channel, engine: &dyn Engine) -> Result<Option<KvSource>, Error> {
    let Some(path) = engine.kv_sources_path() else { return Ok(None) };
    let (status, body) = channel.get(path, ANSWER_LIMIT, SMALL_BYTES_MAX).await?;
    Ok(kv_sources::read(&body, channel.endpoint().host()).filter(|_| status.is_success()))
}

/// A version is for people to read: without one, all works.
async fn version(channel: &Channel, path: &'static str) -> Option<String> {
    let (status, body) = channel.get(path, ANSWER_LIMIT, SMALL_BYTES_MAX).await.ok()?;
    let answer: Value = serde_json::from_slice(&body).ok().filter(|_| status.is_success())?;
    answer.get("version")?.as_str().map(str::to_owned)
}

fn require_success(status: StatusCode) -> Result<(), Error> {
    if status.is_success() { Ok(()) } else { Err(Error::Status { status }) }
}
