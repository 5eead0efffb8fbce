//! The configuration: one TOML file, the environment and the flags, checked once.
//!
//! [`Reader`] turns text into a [`Config`] whose types cannot hold a bad value, or into [`Mistakes`]: every mistake of
//! the file at once, each with its place, key, value and remedy. The rest of the program sees neither text nor raw
//! tables nor the environment.
//!
//! Invariants: nothing is ignored in silence (an unknown key, an unknown variable and a key this version cannot act on
//! are mistakes); no secret is ever shown, in a mistake, in `Debug`, or where one was written by error; the same inputs
//! give equal values, so that a reload can compare the old with the new. Values given twice: a flag wins over the
//! environment, the environment over the file, and all of them are checked. Relative paths start at the working
//! directory of the process.
//!
//! Not here: what is found at the engines themselves (models, context lengths, an omitted engine kind), downloading a
//! tokenizer, and the loop that reloads; [`Watch`] only tells when it is time.

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use forebay_backends::discovery::Source;
use forebay_backends::signals::kv_events::KvSource;
use forebay_scheduler::Policy;
use url::{Host, Url};

mod adapter;
mod defaults;
mod discover;
mod joined;
mod log;
mod mistake;
mod model;
mod name;
mod node;
mod read;
mod secret;
mod server;
mod tokenizer;
mod tree;
mod watch;

#[cfg(test)]
mod tests;

pub use mistake::{Mistake, Mistakes, Place};
pub use name::{BadName, Name};
pub use read::{Environment, Flag, Reader};
pub use secret::Secret;
pub use tokenizer::in_hub_cache;
pub use watch::Watch;

/// Everything an operator decides.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The gateway itself.
    pub server: Server,
    /// The machines whose GPUs an agent tells of. Names are unique.
    pub nodes: Vec<Node>,
    /// What clients may ask for. At least one where a file was read, none without a file. Names and aliases are unique,
    /// and so are the names of all workers.
    pub models: Vec<Model>,
}

/// `[server]`: the process and its listeners.
#[derive(Debug, Clone, PartialEq)]
pub struct Server {
    /// Where clients connect. Port 0 takes any free port.
    pub listen: SocketAddr,
    /// Where operators connect: metrics, health, administration. Never the same place as `listen`.
    pub ops_listen: SocketAddr,
    /// Where the gateway keeps what must survive a restart. May not exist yet; is no plain file.
    pub data_dir: PathBuf,
    /// Whether a listener that other machines reach may serve callers whom nobody authenticated.
    pub allow_unauthenticated: bool,
    /// Longest request body that is read; a longer one is 413.
    pub body_bytes_max: usize,
    /// Connections of the client listener open at once; one more waits in the listener's backlog.
    pub max_connections: NonZeroU32,
    /// How long a client may take no byte of an answer that is there; after that its connection is closed.
    pub stall_max: Duration,
    /// The collector that traces go to, OTLP over gRPC; `None`: nowhere.
    pub otlp: Option<Url>,
    /// Of the requests that come without a trace, how many begin one: 0 to 1.
    pub trace_share: f64,
    /// How long running requests may go on after SIGTERM.
    pub drain: Duration,
    /// Whether each finished request is logged as a line.
    pub access_log: bool,
}

/// `[[node]]`: a machine with GPUs, and the agent there.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    pub name: Name,
    /// `http` or `https` with a host and its port, and nothing more; `None`: no agent runs there.
    pub agent: Option<Url>,
    /// Memory of each of its GPUs, for as long as no agent tells.
    pub gpu_memory_gib: Option<NonZeroU32>,
}

/// One GPU of a node, as in `gpu-a/0`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuName {
    /// A [`Node`]'s, or [`GpuName::HERE`].
    pub node: Name,
    /// Its index (`0`, of a MIG instance `0:1`) or UUID.
    pub gpu: Name,
}

impl GpuName {
    /// The gateway's own machine, where no node is configured.
    pub const HERE: &str = "local";
}

/// `[[model]]`: one model that clients ask for by name, and the pool that serves it.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    pub name: Name,
    /// Other names for the same model; a `*` in one stands for any text.
    pub aliases: Vec<Name>,
    /// Whether requests that name no model are for this one; at most one is.
    pub is_default: bool,
    /// A directory that holds `tokenizer.json`; `None`: to be found at the workers.
    pub tokenizer: Option<PathBuf>,
    /// How its workers are chosen.
    pub policy: Policy,
    /// Tokens of prompt and output together; `None`: as the workers report.
    pub max_model_len: Option<NonZeroU32>,
    /// Requests that may wait for a worker; one more is 503 at once.
    pub queue_requests_max: NonZeroU32,
    /// Prompt tokens of all waiting requests; one more request is 503 at once.
    pub queue_tokens_max: u64,
    /// Bytes of the bodies of all waiting requests; never less than `server.body_bytes_max`.
    pub queue_bytes_max: usize,
    /// How long a request may wait for a worker; after that it is 504.
    pub queue_wait_max: Duration,
    /// How long a request waits for a worker when every one is down, or none is there; after that it is 503.
    pub worker_grace: Duration,
    /// Share of the pool's tokens that each class gets while it waits, even if the classes before it could use all:
    /// interactive, default, batch. Together at most 1.
    pub class_shares: [f64; 3],
    /// Workers tried for one request before it fails, the first included.
    pub attempts_max: NonZeroU32,
    /// From the request sent to the first byte of the answer.
    pub first_byte_timeout: Duration,
    /// The same for an answer that is streamed; `None`: no other.
    pub first_token_timeout: Option<Duration>,
    /// How long an attempt may be silent before another is made beside it; `None`: for ever.
    pub hedge_after: Option<Duration>,
    /// Longest silence of a worker inside an answer.
    pub idle_timeout: Duration,
    /// Who answers when it cannot, in this order. Their own fallbacks do not count.
    pub fallbacks: Vec<Fallback>,
    /// What requests for embeddings and the like may be asked as one; `None`: each by itself.
    pub micro_batch: Option<MicroBatch>,
    /// Whether equal requests in flight, of which nothing is left to chance, share one answer.
    pub coalesce: bool,
    /// LoRA adapters that its workers serve beside it.
    pub adapters: Vec<Adapter>,
    /// How many of them one worker is given; `None`: as many as its engine says.
    pub adapters_max: Option<NonZeroU32>,
    /// Whether a streamed text that breaks off is gone on with at another worker.
    pub continue_streams: bool,
    /// At least one where it comes from a file, unless something lists them.
    pub workers: Vec<Worker>,
    /// What lists more of them while the gateway runs.
    pub discover: Vec<Discover>,
}

/// `[[model.fallback]]`: a model that answers for another one.
#[derive(Debug, Clone, PartialEq)]
pub struct Fallback {
    /// A name or alias of another model.
    pub to: Name,
    /// In which trouble. At least one.
    pub on: Vec<Trouble>,
}

/// Why a model gave no answer, as far as another may give one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// Prompt and output are longer than its context.
    ContextLength,
    /// No worker is there or has room.
    Unavailable,
    /// Every attempt failed.
    Error,
    /// It cannot begin before the client's deadline, though that has not passed.
    Deadline,
    /// It refused for the content: followed elsewhere only where that is named.
    ContentFilter,
}

impl Trouble {
    /// Every one with its name in the file and in metrics.
    pub const ALL: [(&str, Self); 5] = [
        ("context_length", Self::ContextLength),
        ("unavailable", Self::Unavailable),
        ("error", Self::Error),
        ("deadline", Self::Deadline),
        ("content_filter", Self::ContentFilter),
    ];
}

impl Model {
    /// A model as the file would give it with nothing but its name and its workers written.
    #[must_use]
    pub fn new(name: Name, workers: Vec<Worker>, server: &Server) -> Self {
        Self {
            name,
            aliases: Vec::new(),
            is_default: false,
            tokenizer: None,
            policy: Policy::default(),
            max_model_len: None,
            queue_requests_max: defaults::QUEUE_REQUESTS_MAX,
            queue_tokens_max: defaults::QUEUE_TOKENS_MAX,
            queue_bytes_max: defaults::QUEUE_BYTES_MAX.max(server.body_bytes_max),
            queue_wait_max: defaults::QUEUE_WAIT_MAX,
            worker_grace: defaults::WORKER_GRACE,
            class_shares: defaults::CLASS_SHARES,
            attempts_max: defaults::ATTEMPTS_MAX,
            first_byte_timeout: defaults::FIRST_BYTE_TIMEOUT,
            first_token_timeout: None,
            hedge_after: None,
            idle_timeout: defaults::IDLE_TIMEOUT,
            fallbacks: Vec::new(),
            micro_batch: Some(MicroBatch::default()),
            coalesce: false,
            adapters: Vec::new(),
            adapters_max: None,
            continue_streams: false,
            workers,
            discover: Vec::new(),
        }
    }
}

/// `[model.micro_batch]`: embeddings, rankings and scores of several clients as one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MicroBatch {
    /// Tokens of one call; a request that has more goes alone.
    pub max_tokens: NonZeroU32,
    /// How long a request may wait for others while every worker is busy.
    pub max_delay: Duration,
}

/// `[[model.adapter]]`: a LoRA adapter of the model.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    /// The name that clients ask for, and that workers know it by.
    pub name: Name,
    /// Where workers find its files; `None`: it is served only by those that begin with it.
    pub path: Option<String>,
    /// Memory that it takes of each GPU of a worker; `None`: the engine has set it aside.
    pub memory_mib: Option<NonZeroU32>,
}

/// `[[model.discover]]`: a list of workers, and what holds for all of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Discover {
    pub source: Source,
    /// How often the list is read.
    pub every: Duration,
    /// As in [`Worker`].
    pub engine: Option<&'static str>,
    pub model: Option<Name>,
    pub api_key: Option<Secret>,
    pub http2: bool,
}

/// `[[model.worker]]`: one engine instance that the model's requests are sent to.
#[derive(Debug, Clone, PartialEq)]
pub struct Worker {
    /// The only fact about the worker that clients see (`x-forebay-worker`).
    pub name: Name,
    /// `http` or `https` with a host, without user, query and fragment; a path is a prefix of every call. `grpc` is
    /// written as `http` with `http2`.
    pub url: Url,
    /// One of the engines that the [`Reader`] was told of; `None`: to be detected.
    pub engine: Option<&'static str>,
    /// What the worker calls the model; `None`: detected where it serves one model, else the model's own name.
    pub model: Option<Name>,
    /// Sent to the worker as a bearer token.
    pub api_key: Option<Secret>,
    /// Whether it is spoken to in HTTP/2 although its address is `http`.
    pub http2: bool,
    /// Where it publishes what its prefix cache holds; `None`: asked of the worker.
    pub kv_events: Option<KvSource>,
    /// Data-parallel ranks behind its address, each a worker of its own to us. More than 1 only without `kv_events` and
    /// `sleep`.
    pub data_parallel: NonZeroU32,
    /// The GPUs it runs on; empty: found by the port it listens on.
    pub gpus: Vec<GpuName>,
    /// The port of its metrics on the same host, where that is one of its own; `None`: the engine's default.
    pub metrics_port: Option<u16>,
    /// Whether it is sent token ids in place of text, where its engine takes them.
    pub token_ids: bool,
    /// Memory that it takes of each of them while it is awake; `None`: all of it, if it may sleep.
    pub memory_gib: Option<NonZeroU32>,
    /// Whether it may be put to sleep, so that others have that memory. Then `gpus` are not empty.
    pub sleep: bool,
    /// How long it stays awake at least.
    pub awake_min: Duration,
}

impl Worker {
    /// The data-parallel ranks of the server; of one that has but one, none by number.
    pub fn ranks(&self) -> impl Iterator<Item = Option<u32>> + use<> {
        let count = self.data_parallel.get();
        (0..count).map(move |rank| (count > 1).then_some(rank))
    }

    /// The name of one of [`Worker::ranks`], which is a worker of its own.
    #[must_use]
    pub fn rank_name(&self, rank: Option<u32>) -> String {
        rank.map_or_else(|| self.name.to_string(), |rank| format!("{}/{rank}", self.name))
    }

    /// A worker of which nothing is known but its name and its address.
    #[must_use]
    pub fn new(name: Name, url: Url) -> Self {
        Self {
            name,
            url,
            engine: None,
            model: None,
            api_key: None,
            http2: false,
            kv_events: None,
            data_parallel: NonZeroU32::MIN,
            gpus: Vec::new(),
            metrics_port: None,
            token_ids: false,
            memory_gib: None,
            sleep: false,
            awake_min: defaults::AWAKE_MIN,
        }
    }

    /// Whether it runs on the gateway's own machine, by its address.
    #[must_use]
    pub fn is_here(&self) -> bool {
        match self.url.host() {
            Some(Host::Domain(name)) => name == "localhost",
            Some(Host::Ipv4(address)) => address.is_loopback(),
            Some(Host::Ipv6(address)) => address.is_loopback(),
            None => false,
        }
    }
}

impl Config {
    /// Puts back what only a start can set, as it was in `running`, and names each such change for the log. Models and
    /// `drain_seconds` are free to change.
    pub fn keep_fixed(&mut self, running: &Config) -> Vec<String> {
        fn keep<T: PartialEq + Clone + fmt::Debug>(key: &str, new: &mut T, old: &T, refused: &mut Vec<String>) {
            if new != old {
                refused.push(format!("server.{key} stays {old:?}: {new:?} needs a restart"));
                new.clone_from(old);
            }
        }
        let old = &running.server;
        let mut refused = Vec::new();
        // Named one by one, so that a new key does not pass without a decision.
        let Server {
            listen,
            ops_listen,
            data_dir,
            allow_unauthenticated,
            body_bytes_max,
            max_connections,
            stall_max,
            otlp,
            trace_share,
            drain: _,
            access_log,
        } = &mut self.server;
        keep("listen", listen, &old.listen, &mut refused);
        keep("ops_listen", ops_listen, &old.ops_listen, &mut refused);
        keep("data_dir", data_dir, &old.data_dir, &mut refused);
        // What the listeners were opened with holds as long as they do.
        keep("allow_unauthenticated", allow_unauthenticated, &old.allow_unauthenticated, &mut refused);
        keep("body_bytes_max", body_bytes_max, &old.body_bytes_max, &mut refused);
        keep("max_connections", max_connections, &old.max_connections, &mut refused);
        keep("stall_seconds_max", stall_max, &old.stall_max, &mut refused);
        keep("otlp", otlp, &old.otlp, &mut refused);
        keep("trace_share", trace_share, &old.trace_share, &mut refused);
        keep("access_log", access_log, &old.access_log, &mut refused);
        for model in &mut self.models {
            model.queue_bytes_max = model.queue_bytes_max.max(*body_bytes_max);
        }
        refused
    }
}
