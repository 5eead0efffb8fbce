//! What holds where the file is silent: each default once, with its reason.
//!
//! Limits on what may be written stand beside the default they bound.

use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU32;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use super::{MicroBatch, Server};

/// A day: nothing that the gateway waits for takes longer, and sums of such times cannot overflow.
pub(super) const SECONDS_MAX: u64 = 86_400;

/// Enough for the longest contexts (a million tokens are some 6 MB of JSON) and a score of photographs in base64; it is
/// also the limit of Anthropic's Messages API.
const BODY_BYTES_MAX: usize = 32 << 20;
/// From the smallest body that makes sense to what one process can still hold several times.
pub(super) const BODY_BYTES: RangeInclusive<u64> = 1024..=1 << 30;

/// With one more descriptor toward a worker for each busy connection this stays far under systemd's default hard limit
/// of 524288 open files, and it is several times what a pool of GPUs answers at once.
const MAX_CONNECTIONS: NonZeroU32 = NonZeroU32::new(20_000).unwrap();
/// Beyond this the kernel's limits on open files (`fs.nr_open`) refuse first.
pub(super) const MAX_CONNECTIONS_LIMIT: u32 = 1_000_000;

/// As long as engines may be silent: whoever reads nothing for so long has gone, or holds a worker's place for nothing.
const STALL_MAX: Duration = IDLE_TIMEOUT;

/// As long as Kubernetes waits by default between SIGTERM and SIGKILL (`terminationGracePeriodSeconds`).
const DRAIN: Duration = Duration::from_secs(30);

/// Some minutes of work for a busy pool: with more than this in front of it a request would miss
/// [`QUEUE_WAIT_MAX`] anyway.
pub(super) const QUEUE_REQUESTS_MAX: NonZeroU32 = NonZeroU32::new(4096).unwrap();
pub(super) const QUEUE_REQUESTS_LIMIT: u32 = 1_000_000;

/// About four minutes of work for eight workers at 8000 tokens/s: with more in front of it a request would miss
/// [`QUEUE_WAIT_MAX`], whatever the number of requests.
pub(super) const QUEUE_TOKENS_MAX: u64 = 16 << 20;
pub(super) const QUEUE_TOKENS_LIMIT: u64 = 1 << 40;

/// 64 KiB for each of [`QUEUE_REQUESTS_MAX`] requests, several times a usual chat body: memory that one model's queue
/// may take.
pub(super) const QUEUE_BYTES_MAX: usize = 256 << 20;
pub(super) const QUEUE_BYTES_LIMIT: u64 = 64 << 30;

/// About as long as a person or a proxy waits for a first token; after it the work would be done for nobody.
pub(super) const QUEUE_WAIT_MAX: Duration = Duration::from_secs(60);

/// A wake takes seconds: of thirty that a model has for itself, most are left for work.
pub(super) const AWAKE_MIN: Duration = Duration::from_secs(30);

/// Far more ranks than one server has.
pub(super) const DATA_PARALLEL_LIMIT: u32 = 256;

/// Far more than any GPU has.
pub(super) const MEMORY_GIB_LIMIT: u32 = 1 << 20;

/// `model.adapters_max` at most.
pub(super) const ADAPTERS_LIMIT: u32 = 1024;

/// `model.adapter.memory_mib` at most.
pub(super) const ADAPTER_MIB_LIMIT: u32 = 1 << 20;

/// A proxy that restarts or a connection that drops goes unnoticed; a dead fleet is reported soon.
pub(super) const WORKER_GRACE: Duration = Duration::from_secs(2);

/// Interactive, default and batch requests: who is first in line needs no share, and nobody behind starves.
pub(super) const CLASS_SHARES: [f64; 3] = [0.0, 0.1, 0.02];

/// Two workers can fail a request in a row by chance; three point at the request itself.
pub(super) const ATTEMPTS_MAX: NonZeroU32 = NonZeroU32::new(3).unwrap();
pub(super) const ATTEMPTS_LIMIT: u32 = 16;

/// The whole time that OpenAI's SDKs give an answer (`DEFAULT_TIMEOUT`, 600 s): an answer that is not streamed sends
/// its first byte when it is complete.
pub(super) const FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(600);

/// Ten minutes: no attempt is waited for so long.
pub(super) const HEDGE_AFTER_LIMIT: u32 = 600_000;

/// Far more than any step of an engine takes, also while it prefills others' long prompts between two tokens.
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// As many as vLLM computes in one step by default on large GPUs: more in one call would only wait inside the engine.
const MICRO_BATCH_TOKENS: NonZeroU32 = NonZeroU32::new(8192).unwrap();
/// The longest context of any embedding model, several times over.
pub(super) const MICRO_BATCH_TOKENS_LIMIT: u64 = 1 << 20;
/// About what a small embedding model takes for one call, so that a wait is worth it; people notice ten times as much.
const MICRO_BATCH_DELAY: Duration = Duration::from_millis(5);
/// Longer than anybody waits for an embedding.
pub(super) const MICRO_BATCH_DELAY_LIMIT: u64 = 10_000;

impl Default for MicroBatch {
    fn default() -> Self {
        Self { max_tokens: MICRO_BATCH_TOKENS, max_delay: MICRO_BATCH_DELAY }
    }
}

impl Default for Server {
    /// Both listeners on loopback: whoever wants to be reached from outside says so.
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 7070)),
            ops_listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 7071)),
            data_dir: PathBuf::from("./forebay-data"),
            allow_unauthenticated: false,
            body_bytes_max: BODY_BYTES_MAX,
            max_connections: MAX_CONNECTIONS,
            stall_max: STALL_MAX,
            otlp: None,
            trace_share: 1.0,
            drain: DRAIN,
            access_log: true,
        }
    }
}
