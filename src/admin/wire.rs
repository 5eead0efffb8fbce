//! What `/admin/v1` answers, as JSON: written here, read by `forebay workers`.
//!
//! Stable: members are added, never renamed. What is not known is null. Times are seconds unless the name says
//! otherwise; shares and scores run from 0 to 1.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// `GET /admin/v1/workers`; after a change of workers, those it concerns that are there.
#[derive(Debug, Serialize, Deserialize)]
pub struct Workers {
    /// In the order of their joining.
    pub workers: Vec<Worker>,
}

/// `POST /admin/v1/workers`: a worker joins.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Join {
    /// The model's configured name.
    pub model: String,
    /// With the keys of `[[model.worker]]`; `url` must be there.
    pub worker: Map<String, Value>,
}

/// One worker as the scheduler sees it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Worker {
    pub name: String,
    /// `both`, `prefill` or `decode`.
    pub role: String,
    /// The model's configured name.
    pub model: String,
    /// Null until the worker has been asked.
    pub engine: Option<String>,
    /// What it calls the model; null until it has been asked.
    pub engine_model: Option<String>,
    /// Without its key.
    pub url: String,
    /// Whether a new request may go there.
    pub takes_requests: bool,
    /// `unknown`, `up`, `down`, `open` (fails requests, left alone) or `half_open` (on trial).
    pub health: String,
    /// Decays with failures and with first tokens that come later than predicted; 0 while it gets nothing.
    pub health_score: f64,
    pub draining: bool,
    /// How long it still wants to be left alone.
    pub busy_seconds: f64,
    /// Sent and not ended.
    pub sent_requests: u32,
    pub sent_sequences: u64,
    /// Waiting for it here.
    pub lane_requests: u32,
    /// Uncached prompt tokens promised to it and not prefilled, sent or not.
    pub promised_tokens: u64,
    /// KV tokens set aside for what was sent.
    pub reserved_tokens: u64,
    /// Size of its KV cache.
    pub kv_tokens: Option<u64>,
    /// Share of it in use: the greater of our account and the engine's.
    pub kv_usage: Option<f64>,
    pub prefill_tokens_per_second: f64,
    /// Whether that was measured at this worker; else it is the pool's median or a guess.
    pub rate_measured: bool,
    /// Null when it said nothing, or too long ago to go by.
    pub reported: Option<Reported>,
    /// Share of their usual speed at which its GPUs run.
    pub gpu_derate: f64,
    /// Share of its GPUs' time that others leave it.
    pub gpu_share: f64,
    /// A fault of a GPU is why it gets nothing.
    pub gpu_fault: bool,
    /// `awake`, `leaving` (finishes what it has, since another needs the memory), `falling_asleep`, `asleep` or `waking`;
    /// null for a worker that is never put to sleep.
    pub sleep: Option<String>,
    /// Until it is awake, as far as that can be told.
    pub wake_seconds: f64,
    /// Times that it was woken.
    pub wakes: u64,
    /// LoRA adapters by name: `loaded`, `loading`, `leaving` (another needs the place) or `unloading`.
    #[serde(default)]
    pub adapters: BTreeMap<String, String>,
    /// Those it runs on, as far as that is known.
    pub gpus: Vec<Gpu>,
}

/// A GPU under a worker, as it said last.
#[derive(Debug, Serialize, Deserialize)]
pub struct Gpu {
    /// Node and index, as in `gpu-a/0`.
    pub name: String,
    pub uuid: Option<String>,
    pub model: Option<String>,
    pub ago_seconds: f64,
    /// Share of the last sample period in which some kernel ran.
    pub utilization: Option<f64>,
    pub memory_used_bytes: Option<u64>,
    pub memory_total_bytes: Option<u64>,
    pub temperature_celsius: Option<u32>,
    pub power_watts: Option<f64>,
    pub power_limit_watts: Option<f64>,
    /// Share of its usual speed.
    pub derate: f64,
    /// Why it cannot be trusted.
    pub fault: Option<String>,
    /// Processes on it that belong to no worker, where that can be told.
    pub foreign_processes: usize,
}

/// What an engine said of its load.
#[derive(Debug, Serialize, Deserialize)]
pub struct Reported {
    pub ago_seconds: f64,
    pub running: u32,
    pub waiting: u32,
    pub kv_usage: Option<f64>,
}

/// `GET /admin/v1/decisions/{request}`: why a request went where it went.
#[derive(Debug, Serialize, Deserialize)]
pub struct Explained {
    /// Its `x-request-id`. Of several with the same name the latest is told.
    pub request: String,
    /// Null when the model is no longer configured.
    pub model: Option<String>,
    pub class: String,
    pub prompt_tokens: u32,
    pub arrived: When,
    /// `under_way`, `ended` or `refused`.
    pub state: String,
    /// Waited in lanes, over all attempts.
    pub queued_seconds: f64,
    /// Where it was sent, one worker an attempt. An idle worker takes what waits elsewhere, so that the last need not be
    /// the last decision's winner.
    pub sent: Vec<String>,
    pub refusal: Option<Refusal>,
    /// Oldest first; the gateway keeps the latest ones of all requests.
    pub decisions: Vec<Decision>,
}

/// Why a request was not served.
#[derive(Debug, Serialize, Deserialize)]
pub struct Refusal {
    /// `queue_full`, `deadline_infeasible`, `timed_out`, `no_worker`, `adapter_unavailable`, `attempts_exhausted`,
    /// `pool_unknown` or `too_large`.
    pub reason: String,
    pub message: String,
    pub retry_after_seconds: Option<f64>,
}

/// One decision.
#[derive(Debug, Serialize, Deserialize)]
pub struct Decision {
    /// `arrival`, `retry` (an attempt failed, or a worker appeared) `rescore` (its lane did not move) or `held` (another
    /// with the same long prefix is being prefilled there).
    pub cause: String,
    pub decided: When,
    /// Null when nobody could answer before the deadline. Of two workers the one for the prompt.
    pub winner: Option<String>,
    /// The one that goes on from the prompt, where that is another.
    pub decode_winner: Option<String>,
    /// Best first.
    pub candidates: Vec<Candidate>,
    /// Workers of the model to which nothing could be sent; the first few.
    pub left_out: Vec<LeftOut>,
}

/// One worker that was not weighed.
#[derive(Debug, Serialize, Deserialize)]
pub struct LeftOut {
    pub worker: String,
    /// `gpu_fault`, `draining`, or as in [`Worker::health`].
    pub reason: String,
}

/// One worker as it was weighed.
#[derive(Debug, Serialize, Deserialize)]
pub struct Candidate {
    pub worker: String,
    pub winner: bool,
    /// `whole`, or the part that it is weighed for: `prefill` or `decode`. Of each part one wins.
    pub leg: String,
    /// As in [`Worker::health`], or `left`. Now, not then.
    pub health: String,
    /// Prompt tokens that it was believed to hold.
    pub matched_tokens: u32,
    /// Seconds by name; a gain is negative.
    pub terms: Map<String, Value>,
    /// Their sum. The lowest wins, and of those within 1% any.
    pub seconds: f64,
}

/// A moment, by the gateway's wall clock and as seen when it answered.
#[derive(Debug, Serialize, Deserialize)]
pub struct When {
    pub unix_ms: u64,
    pub ago_seconds: f64,
}
