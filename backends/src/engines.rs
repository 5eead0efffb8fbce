//! What the engines have in common, and the table of those that are known.
//!
//! An engine is one file here and one line in [`ENGINES`]: a pure adapter that names the paths of its server, makes of
//! a request what it takes, and reads its answers. Recognition goes down the table; the last line, any server with
//! OpenAI's API, takes what no other recognised.
//!
//! Invariants: an adapter never opens a connection; whatever bytes it is given it answers, at worst with `None`; what
//! an engine would pass over although it changes the answer is refused by name.
//!
//! Not here: error bodies (`forebay-proto`).

mod answer;
mod chunks;
mod fields;
pub mod handover;
mod kv_sources;
mod llamacpp;
mod lora;
mod members;
mod models;
mod ollama;
mod openai;
mod sglang;
mod sleep;
mod tally;
mod tgi;
mod tidy;
mod triton;
mod trtllm;
mod vllm;

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use forebay_scheduler::LoadReport;
use forebay_tokens::Tokenizer;
use http::{HeaderName, StatusCode};
use serde_json::Value;

use self::members::Members;
pub use self::{
    answer::{Answer, Translation},
    lora::{AdapterError, AdapterPaths, listed, load_adapter, unload_adapter},
    models::ServedModel,
    sleep::{Dormant, is_asleep, set_asleep},
    triton::Tensors,
};
use crate::{Error, signals::kv_events::KvSource, transport::Channel};

/// All known engines, in the order in which they are asked whether a server is theirs.
pub static ENGINES: [&dyn Engine; 8] = [
    &vllm::Vllm,
    &sglang::SgLang,
    &trtllm::TrtLlm,
    &llamacpp::LlamaCpp,
    &tgi::Tgi,
    &ollama::Ollama,
    &triton::Triton,
    &openai::OpenAi,
];

/// Time for one question to a server that is there. trtllm-serve's `/metrics` waits 2 s for something to tell.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);
/// A list of models: some 500 bytes each.
const MODELS_BYTES_MAX: usize = 4 << 20;
/// vLLM 0.32 writes 67 KB of metrics for one rank.
const METRICS_BYTES_MAX: usize = 8 << 20;
/// Answers of which a few values are read. SGLang's `/model_info` is the longest.
const SMALL_BYTES_MAX: usize = 256 << 10;

/// An API that a client may ask for, in OpenAI's shape or, for those after embeddings, in vLLM's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    ChatCompletions,
    Completions,
    Embeddings,
    Rerank,
    Score,
    /// What a model's pooler gives for each input, whatever that is.
    Pooling,
    Classify,
    Tokenize,
    Detokenize,
}

impl Api {
    /// Where clients ask for it.
    #[must_use]
    pub fn path(self) -> &'static str {
        match self {
            Self::ChatCompletions => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
            Self::Embeddings => "/v1/embeddings",
            Self::Rerank => "/v1/rerank",
            Self::Score => "/v1/score",
            Self::Pooling => "/pooling",
            Self::Classify => "/v1/classify",
            Self::Tokenize => "/tokenize",
            Self::Detokenize => "/detokenize",
        }
    }
}

/// What tells an engine's server from others.
#[derive(Clone, Copy)]
pub enum Mark {
    /// Its own name as the owner of the models that it lists.
    Owner(&'static str),
    /// What a path of its own answers.
    Path(&'static str, fn(&[u8]) -> bool),
    /// Its name in gRPC's metadata of the server.
    Grpc(&'static str),
    /// A list of models is enough.
    Any,
}

/// A request as the client wrote it, but for the model's name and the wish for usage.
#[derive(Clone, Debug)]
pub struct Asked {
    pub api: Api,
    pub body: Bytes,
    pub streamed: bool,
    pub server: Ways,
    pub written: Written,
}

impl Asked {
    /// Asked of a server with OpenAI's routes.
    #[must_use]
    pub fn new(api: Api, body: Bytes, streamed: bool) -> Self {
        let server = Ways { openai_routes: true, ..Ways::default() };
        Self { api, body, streamed, server, written: Written::default() }
    }
}

/// What the form of a request depends on beside the engine: how this server is set up.
#[derive(Clone, Debug, Default)]
pub struct Ways {
    /// Whether the server has OpenAI's routes; if not, its own are used.
    pub openai_routes: bool,
    /// Whether token ids are to be sent where the engine takes them in place of text.
    pub token_ids: bool,
    /// What the model takes and gives, where the server tells that.
    pub tensors: Option<Arc<Tensors>>,
}

/// The form in which an engine wants the prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    AsAsked,
    /// As the text that the model reads.
    Text,
    /// As the ids of its tokens.
    Ids,
}

/// What is known of a prompt, where [`Engine::form`] asks for it and the model's tokenizer is at hand.
#[derive(Clone, Debug, Default)]
pub struct Written {
    /// A conversation as the model reads it.
    pub text: Option<String>,
    /// The prompt's ids, if it is one prompt.
    pub ids: Option<Vec<u32>>,
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// The prompt's tokens, where counted.
    pub prompt_tokens: Option<u32>,
    /// Tokens that the context has left for the answer, where known.
    pub room: Option<u32>,
}

/// A request as the engine takes it.
#[derive(Debug)]
pub struct Prepared {
    pub path: &'static str,
    /// Headers that it needs, in place of the client's; none: the client's are sent, and the body is JSON.
    pub headers: &'static [(&'static str, &'static str)],
    pub body: Bytes,
    /// How the answer becomes OpenAI's; `None` where it is already.
    pub translation: Option<Translation>,
}

impl Prepared {
    fn untouched(asked: Asked) -> Self {
        Self { path: asked.api.path(), headers: &[], body: asked.body, translation: None }
    }
}

/// The engine cannot do what is asked, and would either refuse it in words of its own or pass over it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Unsupported {
    pub message: String,
    /// The field that asks for it.
    pub param: Option<String>,
}

impl Unsupported {
    fn field(engine: &str, field: &str) -> Self {
        let message =
            format!("Unsupported parameter: '{field}' is not supported by the engine of this model ({engine}).");
        Self { message, param: Some(field.to_owned()) }
    }

    fn value(engine: &str, field: &str, what: &str) -> Self {
        let message = format!("Unsupported value: '{field}': {what} (the engine of this model is {engine}).");
        Self { message, param: Some(field.to_owned()) }
    }

    fn api(engine: &str, api: Api) -> Self {
        let message = format!("The engine of this model ({engine}) does not serve {}.", api.path());
        Self { message, param: None }
    }
}

/// How one engine's server is asked and understood.
pub trait Engine: Send + Sync {
    /// Its name in the configuration.
    fn name(&self) -> &'static str;

    fn mark(&self) -> Mark;

    /// Paths that answer 2xx while requests can be taken, the first that is there counts. It need not prove that a
    /// generation would succeed.
    fn health_paths(&self) -> &'static [&'static str];

    /// Path that answers `{"version": "…"}`, where there is one.
    fn version_path(&self) -> Option<&'static str> {
        None
    }

    /// Path that tells more of the models than their list does, where there is one.
    fn details_path(&self) -> Option<&'static str> {
        None
    }

    /// Adds what [`Engine::details_path`] tells to the models that are listed, or lists them where nothing else does.
    fn read_details(&self, body: &[u8], models: &mut Vec<ServedModel>) {
        let _ = (body, models);
    }

    /// Paths of what [`Engine::read_load`] reads, the first that is there counts; none: it says nothing of its load.
    fn load_paths(&self) -> &'static [&'static str] {
        &[]
    }

    /// Whether reading its load takes it away: then nobody reads it but the one poll.
    fn load_drains(&self) -> bool {
        false
    }

    /// Reads the engine's own view of its load. `None` when the answer does not tell it.
    fn read_load(&self, answer: &[u8]) -> Option<Load> {
        let _ = answer;
        None
    }

    /// The same of one data-parallel rank of the server alone, where the engine tells them apart.
    fn read_load_of(&self, answer: &[u8], rank: u32) -> Option<Load> {
        let _ = rank;
        self.read_load(answer)
    }

    /// Header that pins a request to a data-parallel rank of the server, by its number.
    fn rank_header(&self) -> Option<HeaderName> {
        None
    }

    /// Path that tells where the engine publishes its KV events, as vLLM's `/kv_event_sources` does, where there is
    /// one.
    fn kv_sources_path(&self) -> Option<&'static str> {
        None
    }

    /// How its model leaves the memory of its GPUs and comes back, where it can.
    fn dormant(&self) -> Option<Dormant> {
        None
    }

    /// Whether another prompt can reuse a prefix only once that has been computed, so that of two that are prefilled at
    /// one time both compute it.
    fn caches_late(&self) -> bool {
        false
    }

    /// Where it takes LoRA adapters while it runs, if it does.
    fn adapter_paths(&self) -> Option<AdapterPaths> {
        None
    }

    /// What a request calls an adapter of this model.
    fn adapter_name(&self, model: &str, adapter: &str) -> String {
        let _ = model;
        adapter.to_owned()
    }

    /// Whether one server of its kind can compute a prompt and another go on from there, see [`handover`]. Both must be
    /// started so.
    fn hands_over(&self) -> bool {
        false
    }

    /// Whether the engine speaks this API. A model may still refuse: embeddings of a chat model.
    fn serves(&self, api: Api) -> bool;

    /// Whether it gains from one call with the inputs of several requests in place of a call each, and answers each
    /// input as if it were alone. A model's inputs must be a list in the request, and the answer a list with their
    /// `index`, as in OpenAI's embeddings; what an adapter makes of that on the wire is its own.
    fn merges(&self, api: Api) -> bool {
        let _ = api;
        false
    }

    /// In which form this server of its kind wants a prompt.
    fn form(&self, api: Api, server: &Ways) -> Form {
        if server.token_ids && self.takes_ids(api) { Form::Ids } else { Form::AsAsked }
    }

    /// Whether a prompt of token ids is taken where OpenAI's API has one, and answered as its text would be.
    fn takes_ids(&self, api: Api) -> bool {
        let _ = api;
        false
    }

    /// Whether it is spoken to in gRPC; then its paths are those of calls.
    fn is_grpc(&self) -> bool {
        false
    }

    /// The port of [`Engine::load_paths`], where it is not the server's own.
    fn metrics_port(&self) -> Option<u16> {
        None
    }

    /// Whether [`Engine::adapt`] reads the body, which takes time where it is long.
    fn rewrites(&self) -> bool {
        false
    }

    /// Makes of a request what the engine takes. To be asked by way of [`prepare`].
    ///
    /// # Errors
    /// When the engine cannot do what is asked.
    fn adapt(&self, asked: Asked) -> Result<Prepared, Unsupported> {
        Ok(Prepared::untouched(asked))
    }
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
    /// LoRA adapters that one batch may have.
    pub adapters_max: Option<u32>,
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
    /// At least one, unless the engine was known before and does not list them.
    pub models: Vec<ServedModel>,
    pub version: Option<String>,
    /// Whether it has OpenAI's routes.
    pub openai_routes: bool,
}

impl Detected {
    /// Where the engine has its model from: a directory on its machine or the name of a repository. Of a LoRA adapter
    /// that is the base model's.
    #[must_use]
    pub fn tokenizer_hint(&self) -> Option<&str> {
        self.models.iter().find(|model| model.parent.is_none()).and_then(|model| model.root.as_deref())
    }
}

/// Makes of a request what the engine takes.
///
/// # Errors
/// When the engine cannot do what is asked.
pub fn prepare(engine: &dyn Engine, asked: Asked) -> Result<Prepared, Unsupported> {
    if !engine.serves(asked.api) {
        return Err(Unsupported::api(engine.name(), asked.api));
    }
    match engine.form(asked.api, &asked.server) {
        Form::Text if asked.api == Api::ChatCompletions && asked.written.text.is_none() => {
            let what = "this server takes only text, and the model's chat template is not at hand to write it";
            Err(Unsupported::value(engine.name(), "messages", what))
        }
        Form::Ids if engine.takes_ids(asked.api) => engine.adapt(by_ids(asked)),
        _ => engine.adapt(asked),
    }
}

/// The same with its prompt in token ids, where they are at hand and the answer does not show the prompt.
fn by_ids(asked: Asked) -> Asked {
    let body = asked.body.clone();
    let Some(mut members) = Members::read(&body) else { return asked };
    let Some(ids) = asked.written.ids.as_deref() else { return asked };
    let text = members.get("prompt").is_some_and(|prompt| prompt.starts_with('"') || prompt.starts_with("[\""));
    let idle = |name: &str| members.get(name).is_none_or(|value| value == "false");
    if !text || !["echo", "truncate_prompt_tokens", "suffix"].into_iter().all(idle) {
        return asked;
    }
    members.set("prompt", &ids.into());
    Asked { body: members.write(&body), ..asked }
}

/// Refuses a prompt of token ids for an engine that takes only text.
fn require_text(engine: &'static str, members: &Members<'_>) -> Result<(), Unsupported> {
    for field in ["prompt", "input"] {
        let Some(text) = members.get(field) else { continue };
        let first = text.trim_start_matches(|c: char| c == '[' || c.is_ascii_whitespace());
        if text.starts_with('[') && !first.starts_with(['"', ']']) {
            return Err(Unsupported::value(engine, field, "token ids cannot be sent, only text"));
        }
    }
    Ok(())
}

/// Finds out what a server serves, and which engine it is unless that is known.
///
/// # Errors
/// [`Error::Status`] when it refuses, [`Error::Unreadable`] when it is no engine that requests could be sent to. Of an
/// engine that is known only what keeps it from being asked at all.
pub async fn detect(channel: &Channel, known: Option<&'static dyn Engine>) -> Result<Detected, Error> {
    if let Some(engine) = known.filter(|engine| engine.is_grpc()) {
        return triton::detect(channel, engine).await;
    }
    let listed = models(channel).await;
    // A server of gRPC answers a question of HTTP in many ways, none of them a list.
    if known.is_none()
        && matches!(listed, Err(ref error) if !matches!(error, Error::Connect { .. } | Error::Tls { .. }))
        && channel.endpoint().speaks_http2()
        && let Ok(detected) = triton::detect(channel, &triton::Triton).await
    {
        return Ok(detected);
    }
    let openai_routes = !matches!(listed, Err(Error::Status { status: StatusCode::NOT_FOUND }));
    let (engine, mut models) = match (known, listed) {
        (Some(_), Err(error @ (Error::Connect { .. } | Error::Tls { .. }))) => return Err(error),
        (Some(engine), listed) => (engine, listed.unwrap_or_default()),
        (None, Ok(models)) => (recognise(channel, &models).await.ok_or(Error::Unreadable)?, models),
        // Some have a list of their own, elsewhere.
        (None, Err(error @ Error::Status { .. })) => (recognise(channel, &[]).await.ok_or(error)?, Vec::new()),
        (None, Err(error)) => return Err(error),
    };
    if let Some(details) = page(channel, engine.details_path()).await {
        engine.read_details(&details, &mut models);
    }
    if known.is_none() && models.is_empty() {
        return Err(Error::Unreadable);
    }
    let version = page(channel, engine.version_path()).await.and_then(|answer| version(&answer));
    Ok(Detected { engine, models, version, openai_routes })
}

/// The models that a server lists in OpenAI's way, at least one.
async fn models(channel: &Channel) -> Result<Vec<ServedModel>, Error> {
    let (status, body) = channel.get("/v1/models", ANSWER_LIMIT, MODELS_BYTES_MAX).await?;
    require_success(status)?;
    models::read(&body).filter(|models| !models.is_empty()).ok_or(Error::Unreadable)
}

/// Whose server it is that lists these models.
async fn recognise(channel: &Channel, models: &[ServedModel]) -> Option<&'static dyn Engine> {
    for engine in ENGINES {
        let its = match engine.mark() {
            Mark::Owner(name) => models.iter().any(|model| model.owned_by.as_deref() == Some(name)),
            Mark::Path(path, reads) => page(channel, Some(path)).await.is_some_and(|answer| reads(&answer)),
            Mark::Grpc(_) => false,
            Mark::Any => !models.is_empty(),
        };
        if its {
            return Some(engine);
        }
    }
    None
}

/// Asks once whether the worker can take requests.
///
/// # Errors
/// The reason why not. Nothing is tried again.
pub async fn probe(channel: &Channel, engine: &dyn Engine) -> Result<(), Error> {
    if engine.is_grpc() {
        return triton::ready(channel).await;
    }
    // The list of models of a server whose health path it is can be long; none of it is kept.
    first_of(channel, engine.health_paths(), MODELS_BYTES_MAX).await.map(drop)
}

/// What the engine says of its load now, or of that of one of its data-parallel ranks; `None` where it publishes none
/// that can be read.
///
/// # Errors
/// When it does not answer, or refuses.
pub async fn load(channel: &Channel, engine: &dyn Engine, rank: Option<u32>) -> Result<Option<Load>, Error> {
    if engine.load_paths().is_empty() {
        return Ok(None);
    }
    let channel = engine.metrics_port().map_or(channel, |port| channel.metrics(port));
    let answer = first_of(channel, engine.load_paths(), METRICS_BYTES_MAX).await?;
    Ok(rank.map_or_else(|| engine.read_load(&answer), |rank| engine.read_load_of(&answer, rank)))
}

/// The answer of the first of these paths that the server has.
async fn first_of(channel: &Channel, paths: &[&'static str], bytes_max: usize) -> Result<Bytes, Error> {
    let mut last = Err(Error::Unreadable);
    for path in paths {
        let (status, answer) = channel.get(path, ANSWER_LIMIT, bytes_max).await?;
        last = require_success(status).map(|()| answer);
        if status != StatusCode::NOT_FOUND {
            break;
        }
    }
    last
}

/// Where the engine, or one of its data-parallel ranks, publishes what its prefix cache holds; `None` where it does
/// not, or does not say.
///
/// # Errors
/// When it does not answer.
pub async fn kv_source(channel: &Channel, engine: &dyn Engine, rank: Option<u32>) -> Result<Option<KvSource>, Error> {
    let Some(path) = engine.kv_sources_path() else { return Ok(None) };
    let (status, body) = channel.get(path, ANSWER_LIMIT, SMALL_BYTES_MAX).await?;
    Ok(kv_sources::read(&body, channel.endpoint().host(), rank).filter(|_| status.is_success()))
}

/// A small answer that all works without.
async fn page(channel: &Channel, path: Option<&'static str>) -> Option<Bytes> {
    let (status, body) = channel.get(path?, ANSWER_LIMIT, SMALL_BYTES_MAX).await.ok()?;
    status.is_success().then_some(body)
}

fn version(answer: &[u8]) -> Option<String> {
    let answer: Value = serde_json::from_slice(answer).ok()?;
    answer.get("version")?.as_str().map(str::to_owned)
}

fn require_success(status: StatusCode) -> Result<(), Error> {
    if status.is_success() { Ok(()) } else { Err(Error::Status { status }) }
}
