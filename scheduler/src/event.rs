//! Everything the core can be told. The shell around it turns sockets, polls and clients into these.
//!
//! The life of a request as events: `Arrived`, then either the core refuses it, or it is sent; for each send the shell
//! answers with exactly one of `AttemptFailed` (nothing has reached the client yet, or the rest may come from another
//! worker; the core places it again or refuses it) and `Ended`; the send of a prompt alone ([`crate::Leg::Prefill`])
//! with `AttemptFailed` or `Prefilled`, after which the core sends the rest. `Cancelled` may come at any time before,
//! and is then the last word. Events that name an unknown request or worker are late and are ignored.

use std::sync::Arc;
use std::time::Duration;

use crate::{
    Adapter, AdapterChange, AdapterEnd, AdapterId, GpuId, PoolId, RequestId, Role, RouteId, TenantId, WorkerId,
};

/// Priority class of a request; the order of the variants is the order of service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Class {
    /// Someone is watching.
    Interactive,
    /// What callers get who say nothing.
    #[default]
    Default,
    /// Work that fills what the others leave.
    Batch,
}

impl Class {
    /// Every class, first served first.
    pub const ALL: [Self; 3] = [Self::Interactive, Self::Default, Self::Batch];
    /// Number of classes.
    pub const COUNT: usize = Self::ALL.len();
}

/// What the core knows of a request. Never the output's true length: that is known only at the end.
#[derive(Debug, Clone)]
pub struct Request {
    /// Its name; not in use by another live request.
    pub id: RequestId,
    /// The pool that serves its model.
    pub pool: PoolId,
    /// Whose turn it is counted as.
    pub tenant: TenantId,
    /// Its priority.
    pub class: Class,
    /// In which way it is asked; how long its output will be is learned for each tenant and route.
    pub route: RouteId,
    /// Latest moment of the first token, where the client named one. Bounds the wait here; after the send the caller
    /// enforces it, since only it can stop the engine.
    pub deadline: Option<crate::Tick>,
    /// Prompt tokens, over all prompts of the request.
    pub prompt_tokens: u32,
    /// Rolling hashes of the prompt's full blocks, one per [`PoolLimits::block_tokens`] tokens. Each covers all tokens
    /// before it, so that equal hashes mean equal prefixes at the same position; the salt (model, LoRA, cache salt)
    /// is in the first.
    pub blocks: Arc<[u64]>,
    /// The client's own limit on output tokens of one sequence.
    pub max_output: Option<u32>,
    /// Sequences the engine will generate: `n` times the number of prompts; at least 1.
    pub sequences: u32,
    /// Bytes of the body held in memory while it waits.
    pub body_bytes: u32,
    /// Whether the answer is streamed, so that `FirstToken` marks the end of the prefill. For an answer that comes
    /// whole the first byte is also the last, and says nothing about the prefill.
    pub streamed: bool,
    /// The LoRA adapter that it is for; it is sent to workers only that have it.
    pub adapter: Option<Adapter>,
    /// Whether one worker may compute its prompt and another its output, where the pool has such. Then it has one sequence.
    pub splits: bool,
    /// The worker that works on the same already, and the attempts made by now: this is a second try beside it, made
    /// elsewhere and at once, where there is room and nobody waits, or not at all.
    pub beside: Option<(WorkerId, u32)>,
}

/// How a pool's workers are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Policy {
    /// Everything this crate is for.
    #[default]
    Forebay,
    /// The workers in turn. For comparison: a request is sent as it comes, and waits in the engine.
    RoundRobin,
    /// The worker with the fewest requests of ours. For comparison, as above.
    LeastRequests,
}

impl Policy {
    /// Every policy by the name that users give it.
    pub const NAMES: [(&str, Self); 3] =
        [("forebay", Self::Forebay), ("round-robin", Self::RoundRobin), ("least-requests", Self::LeastRequests)];
}

/// Bounds and habits of one pool.
#[derive(Debug, Clone)]
pub struct PoolLimits {
    /// How its workers are chosen.
    pub policy: Policy,
    /// Tokens in one block of [`Request::blocks`] (16: what vLLM uses by default).
    pub block_tokens: u32,
    /// Share of the pool's tokens that each class gets while it waits, even if the classes before it could use all
    /// (0.1 for the default class, 0.02 for batch: nothing starves).
    pub class_shares: [f64; Class::COUNT],
    /// Requests that may wait (4096).
    pub queue_requests_max: u32,
    /// Body bytes that may wait (256 MiB: bodies live in memory).
    pub queue_bytes_max: u64,
    /// Prompt tokens that may wait (16 Mi: about 4 minutes of work for 8 workers at 8000 tokens/s).
    pub queue_tokens_max: u64,
    /// Longest wait for a place (60 s), in lanes and over all attempts: the time at workers that failed it is not counted.
    /// A client's own deadline bounds everything.
    pub queue_timeout: Duration,
    /// Sends of one request, the first included (3).
    pub attempts_max: u32,
    /// How long a request waits for a worker when every one is down, or none is there (2 s: a restarting proxy or a
    /// dropped connection goes unnoticed; a dead fleet is reported soon).
    pub worker_grace: Duration,
    /// Prompt tokens to compute from which on a worker for prompts computes them, where there is one (512: some 60 ms of
    /// prefill, for which every sequence beside it would wait; for less, a cache is hardly worth fetching).
    pub split_tokens_min: u32,
}

impl Default for PoolLimits {
    fn default() -> Self {
        Self {
            policy: Policy::Forebay,
            block_tokens: 16,
            class_shares: [0.0, 0.1, 0.02],
            queue_requests_max: 4096,
            queue_bytes_max: 256 << 20,
            queue_tokens_max: 16 << 20,
            queue_timeout: Duration::from_secs(60),
            attempts_max: 3,
            worker_grace: Duration::from_secs(2),
            split_tokens_min: 512,
        }
    }
}

/// What a worker can hold. Unknown facts have defaults that leave the engine in charge.
#[derive(Debug, Clone)]
pub struct WorkerSpec {
    /// What it is for.
    pub role: Role,
    /// Tokens that fit in its KV cache, where it said so.
    pub kv_tokens: Option<u64>,
    /// Tokens in one of its KV blocks; reservations are rounded up to it (16).
    pub block_tokens: u32,
    /// Sequences to have there at once (256: vLLM's default `max_num_seqs` for servers).
    pub sequences_max: u32,
    /// Uncached prompt tokens to have there, not yet prefilled (16384: two steps of vLLM's default 8192).
    pub window_tokens: u32,
    /// Prefill speed in tokens/s to assume until it is measured.
    pub rate_hint: Option<f64>,
    /// Whether it publishes KV-cache events; then guesses about its cache are kept for a short lease only.
    pub kv_events: bool,
    /// The GPUs that it runs on, where known. Workers that name the same one share it.
    pub gpus: Vec<GpuId>,
    /// Memory in bytes that it takes of each of them while it is awake, where configuration says.
    pub memory_bytes: Option<u64>,
    /// Memory in bytes of each of them, for where they do not say themselves.
    pub gpu_bytes: Option<u64>,
    /// It may be put to sleep, so that others have the memory of its GPUs.
    pub sleep: Option<SleepSpec>,
    /// Whether another prompt can reuse a prefix only once that has been computed: of two that are prefilled at one time both
    /// compute it.
    pub caches_late: bool,
    /// LoRA adapters that it may be given, one beside the other; 0: it can be given none.
    pub adapters_max: u32,
    /// Workers with the same number are models of one server, which computes them together: they do not take the GPU
    /// from one another.
    pub server: Option<u64>,
}

impl Default for WorkerSpec {
    fn default() -> Self {
        Self {
            role: Role::Both,
            kv_tokens: None,
            block_tokens: 16,
            sequences_max: 256,
            window_tokens: 16_384,
            rate_hint: None,
            kv_events: false,
            gpus: Vec::new(),
            memory_bytes: None,
            gpu_bytes: None,
            sleep: None,
            caches_late: false,
            adapters_max: 0,
            server: None,
        }
    }
}

/// How a worker sleeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SleepSpec {
    /// How long it stays awake at least, once it is: what bounds the share of time that goes into waking.
    pub residency: Duration,
}

/// What an engine's own metrics say.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoadReport {
    /// Sequences in its batch.
    pub running: u32,
    /// Requests in its own queue.
    pub waiting: u32,
    /// Share of its KV cache in use by live requests, 0 to 1; none where it does not say.
    pub kv_usage: Option<f64>,
}

/// What a GPU says of itself now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GpuReport {
    /// Share of its usual speed that it runs at, above 0 to 1; lower when clocks are throttled.
    pub derate: f64,
    /// It cannot be trusted: an error of late after which its results or its life are in doubt (XID, uncorrectable ECC),
    /// or it does not answer.
    pub fault: bool,
    /// Share of the last moments in which it computed anything, for whomever, 0 to 1.
    pub utilization: Option<f64>,
    /// Share of its time that processes took which belong to no worker, where that is measured.
    pub foreign: Option<f64>,
    /// Share of its memory in use, 0 to 1.
    pub memory: Option<f64>,
    /// Bytes of its memory, used or not.
    pub memory_bytes: Option<u64>,
}

impl Default for GpuReport {
    /// Of a GPU that is well and tells nothing else.
    fn default() -> Self {
        Self { derate: 1.0, fault: false, utilization: None, foreign: None, memory: None, memory_bytes: None }
    }
}

/// Why one attempt brought nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// No connection: the worker is not there.
    #[error("cannot connect to the worker")]
    Connect,
    /// The connection broke.
    #[error("the worker closed the connection")]
    Reset,
    /// Nothing came in time.
    #[error("the worker did not answer in time")]
    Timeout,
    /// The engine reported an error of its own.
    #[error("the worker reported an internal error")]
    Status5xx,
    /// The engine is full (429): load, not illness.
    #[error("the worker is overloaded")]
    Overloaded {
        /// How long it asked to be left alone.
        retry_after: Option<Duration>,
    },
    /// The engine cannot serve now (503, 529): mostly load, illness where it says nothing else.
    #[error("the worker cannot serve now")]
    Unavailable {
        /// How long it asked to be left alone.
        retry_after: Option<Duration>,
    },
    /// The answer was not in the engine's protocol.
    #[error("the worker answered with bytes that are not its protocol")]
    Malformed,
    /// It does not accept the gateway's key.
    #[error("the worker does not accept the gateway's key")]
    Denied,
    /// The answer names another model than the worker was taken to serve.
    #[error("the worker answered as another model")]
    OtherModel,
    /// The engine does not have the LoRA adapter that the request is for, though it had; nothing is wrong with the worker.
    #[error("the worker does not have the adapter")]
    NoAdapter,
    /// The engine cannot do what is asked; nothing is wrong with the worker, and it counts as no attempt.
    #[error("the worker's engine cannot do what is asked")]
    Unsupported,
}

impl Failure {
    /// Of a worker that is to be left alone: how long it asked for, where it did.
    #[must_use]
    pub fn left_alone(self) -> Option<Option<Duration>> {
        match self {
            Self::Overloaded { retry_after } | Self::Unavailable { retry_after } => Some(retry_after),
            Self::Connect
            | Self::Reset
            | Self::Timeout
            | Self::Status5xx
            | Self::Malformed
            | Self::Denied
            | Self::OtherModel
            | Self::NoAdapter
            | Self::Unsupported => None,
        }
    }
}

/// How the last attempt of a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It was answered; also with an error that is the client's own fault (then no tokens).
    Finished {
        /// Prompt tokens as the engine counted them.
        prompt_tokens: u32,
        /// Of these, read from its cache; none where it does not say.
        cached_tokens: Option<u32>,
        /// Output tokens over all sequences.
        output_tokens: u32,
    },
    /// It broke after something had reached the client.
    Failed(Failure),
    /// The client left.
    Cancelled,
}

/// A change in a worker's KV cache, in the hashes of [`Request::blocks`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvEvent {
    /// These blocks can be read from its cache.
    Stored {
        /// Rolling hashes, each of one block.
        blocks: Vec<u64>,
    },
    /// These can no more.
    Removed {
        /// Rolling hashes, each of one block.
        blocks: Vec<u64>,
    },
    /// Nothing can; also when its events have a gap that could not be filled.
    Cleared,
}

/// One thing that happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// A pool exists, or its limits changed.
    PoolJoined {
        /// Its name.
        pool: PoolId,
        /// Its limits.
        limits: PoolLimits,
    },
    /// A pool is gone with its workers; what waits for it is refused.
    PoolLeft {
        /// Its name.
        pool: PoolId,
    },
    /// A worker exists; it is asked for its health before anything is sent. Joining the same pool again changes what it
    /// can hold (once its metrics told); it keeps the rest.
    WorkerJoined {
        /// Its name.
        worker: WorkerId,
        /// Where it serves.
        pool: PoolId,
        /// What it can hold.
        spec: WorkerSpec,
    },
    /// Nothing new is to be sent to it; what it has may finish. Or that is over.
    WorkerDraining {
        /// Which.
        worker: WorkerId,
        /// Whether it is so now.
        draining: bool,
    },
    /// It is gone. Requests at it are still ended by their own events.
    WorkerLeft {
        /// Which.
        worker: WorkerId,
    },
    /// Its metrics were read.
    Load {
        /// Whose.
        worker: WorkerId,
        /// What they said.
        report: LoadReport,
    },
    /// Its engine said, unasked, whether it sleeps.
    SleepSeen {
        /// Whose.
        worker: WorkerId,
        /// Whether.
        asleep: bool,
    },
    /// It did what [`crate::Action::Wake`] or [`crate::Action::Sleep`] told it, or could not.
    SleepDone {
        /// Who.
        worker: WorkerId,
        /// Whether it did.
        worked: bool,
    },
    /// Its engine said, unasked, which adapters it has, of those that may be asked for.
    AdaptersSeen {
        /// Whose.
        worker: WorkerId,
        /// All of them.
        adapters: Vec<Adapter>,
        /// Of these, those that were loaded from other files than the configured ones.
        stale: Vec<AdapterId>,
    },
    /// It did what [`crate::Action::LoadAdapter`] or [`crate::Action::UnloadAdapter`] told it, or did not.
    AdapterTurned {
        /// Who.
        worker: WorkerId,
        /// Which.
        adapter: AdapterId,
        /// Whether it did.
        end: AdapterEnd,
    },
    /// The configuration of an adapter that workers can be given changed.
    AdapterChanged {
        /// Whose workers.
        pool: PoolId,
        /// Which.
        adapter: AdapterId,
        /// How.
        change: AdapterChange,
    },
    /// Its metrics could not be read.
    LoadLost {
        /// Whose.
        worker: WorkerId,
    },
    /// Answer to [`crate::Action::Probe`].
    Probed {
        /// Who was asked.
        worker: WorkerId,
        /// Whether it can serve.
        healthy: bool,
    },
    /// A GPU under some worker was read.
    Gpu {
        /// Which.
        gpu: GpuId,
        /// What they said.
        report: GpuReport,
    },
    /// A worker's KV cache changed.
    Kv {
        /// Whose.
        worker: WorkerId,
        /// How.
        change: KvEvent,
    },
    /// A tenant's share of the service against others (1 unless told).
    TenantWeight {
        /// Which.
        tenant: TenantId,
        /// Its weight, above 0.
        weight: f64,
    },
    /// A request wants a place.
    Arrived(Request),
    /// Its client left.
    Cancelled {
        /// Which.
        request: RequestId,
    },
    /// Its first token came from the worker. Need not be told of an answer that comes whole and ends at once.
    FirstToken {
        /// Which.
        request: RequestId,
    },
    /// Optional and coarse: how much it has generated so far.
    Progress {
        /// Which.
        request: RequestId,
        /// Output tokens until now, over all sequences.
        output_tokens: u32,
    },
    /// The worker that was sent its prompt alone has computed it.
    Prefilled {
        /// Which.
        request: RequestId,
        /// Until when another worker may fetch its cache; none: nobody can, and it is computed again.
        kept: Option<crate::Tick>,
    },
    /// An attempt failed, and another one can still bring what the client lacks.
    AttemptFailed {
        /// Which.
        request: RequestId,
        /// Why.
        failure: Failure,
    },
    /// It is over at the worker.
    Ended {
        /// Which.
        request: RequestId,
        /// How.
        end: End,
    },
}
