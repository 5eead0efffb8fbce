//! The metric names, their labels and buckets, and the handles that rooms hold.

use std::sync::{Arc, OnceLock};

use forebay_backends::signals::gpu::{self, Gpu};
use forebay_scheduler::ScaleView;
use metrics::{Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram};
use metrics::{gauge, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

const REQUESTS: &str = "forebay_requests_total";
const REQUEST_SECONDS: &str = "forebay_request_seconds";
const TTFT_SECONDS: &str = "forebay_ttft_seconds";
const TPOT_SECONDS: &str = "forebay_tpot_seconds";
const QUEUE_WAIT_SECONDS: &str = "forebay_queue_wait_seconds";
const QUEUE_DEPTH: &str = "forebay_queue_depth";
const DESIRED_WORKERS: &str = "forebay_model_desired_workers";
const DRAIN_SECONDS: &str = "forebay_model_drain_seconds";
const IDLE_SECONDS: &str = "forebay_model_idle_seconds";
const TOKENS: &str = "forebay_tokens_total";
const PREFIX_HIT_TOKENS: &str = "forebay_prefix_hit_tokens_total";
const PREFIX_INDEX_BLOCKS: &str = "forebay_prefix_index_blocks";
const PREFIX_INDEX_BYTES: &str = "forebay_prefix_index_bytes";
const DECISION_SECONDS: &str = "forebay_decision_seconds";
const GPU_MEMORY_USED: &str = "forebay_gpu_memory_used_bytes";
const GPU_MEMORY_TOTAL: &str = "forebay_gpu_memory_total_bytes";
const GPU_UTILIZATION: &str = "forebay_gpu_utilization_ratio";
const GPU_TEMPERATURE: &str = "forebay_gpu_temperature_celsius";
const GPU_POWER: &str = "forebay_gpu_power_watts";
const GPU_THROTTLED: &str = "forebay_gpu_throttled";
const CACHE_LOOKUPS: &str = "forebay_cache_lookups_total";
const MICRO_BATCH_SIZE: &str = "forebay_micro_batch_size";
const RETRIES: &str = "forebay_retries_total";
const FAILOVERS: &str = "forebay_failovers_total";
const RETRIES_DENIED: &str = "forebay_retries_denied_total";
const SPANS_DROPPED: &str = "forebay_spans_dropped_total";
const TASKS: &str = "forebay_tasks";

/// Status codes that answers can have; 499 is "the client left" (nginx's number). Others count as `other`.
const CODES: [u16; 16] = [200, 400, 401, 403, 404, 405, 408, 413, 415, 429, 499, 500, 501, 502, 503, 504];
/// Reasons for a retry, as `forebay_retries_total{reason}` names them.
pub const RETRY_REASONS: [&str; 11] = [
    "connect",
    "reset",
    "timeout",
    "status",
    "overloaded",
    "malformed",
    "denied",
    "other_model",
    "no_adapter",
    "unsupported",
    "hedge",
];
/// Why another model was asked, as `forebay_failovers_total{reason}` names it.
pub const FAILOVER_REASONS: [&str; 5] = ["context_length", "unavailable", "error", "deadline", "content_filter"];
/// Request classes in the order of the scheduler's enum.
pub const CLASSES: [&str; 3] = ["interactive", "default", "batch"];

/// What can leave together, as `forebay_micro_batch_size{kind}` names it.
const MICRO_BATCH_KINDS: [Api; 5] = [Api::Embeddings, Api::Rerank, Api::Score, Api::Pooling, Api::Classify];

/// Where a request came in, as metrics and the ledger name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Api {
    Chat,
    Completions,
    Embeddings,
    Rerank,
    Score,
    Pooling,
    Classify,
    Tokenize,
    Detokenize,
}

impl Api {
    pub const ALL: [Self; 9] = [
        Self::Chat,
        Self::Completions,
        Self::Embeddings,
        Self::Rerank,
        Self::Score,
        Self::Pooling,
        Self::Classify,
        Self::Tokenize,
        Self::Detokenize,
    ];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Completions => "completions",
            Self::Embeddings => "embeddings",
            Self::Rerank => "rerank",
            Self::Score => "score",
            Self::Pooling => "pooling",
            Self::Classify => "classify",
            Self::Tokenize => "tokenize",
            Self::Detokenize => "detokenize",
        }
    }
}

/// The process's metrics registry.
#[derive(Clone)]
pub struct Registry {
    handle: PrometheusHandle,
    pub decision_seconds: Histogram,
    queue_wait: [Histogram; CLASSES.len()],
    retries: [Counter; RETRY_REASONS.len()],
    pub tasks: Gauge,
    failovers: [Counter; FAILOVER_REASONS.len()],
    /// What was not tried again since that is a share of the traffic at most.
    pub retries_denied: Counter,
    micro_batch_size: [Histogram; MICRO_BATCH_KINDS.len()],
}

impl Registry {
    /// Installs the process-wide recorder.
    ///
    /// # Errors
    /// When a recorder is already installed in this process.
    pub fn install() -> Result<Self, BuildError> {
        let seconds = |name: &str, buckets: &[f64], builder: PrometheusBuilder| {
            builder.set_buckets_for_metric(Matcher::Full(name.to_owned()), buckets)
        };
        // OpenTelemetry's bucket advice for gen_ai.server.* durations, extended downwards where we are faster.
        let long =
            [0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 300.0];
        let ttft = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0];
        let tpot = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5];
        let wait = [0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
        let decision = [1e-6, 2e-6, 3e-6, 5e-6, 1e-5, 1.5e-5, 3e-5, 6e-5, 1e-4, 1e-3, 1e-2];
        let mut builder = PrometheusBuilder::new();
        builder = seconds(REQUEST_SECONDS, &long, builder)?;
        builder = seconds(TTFT_SECONDS, &ttft, builder)?;
        builder = seconds(TPOT_SECONDS, &tpot, builder)?;
        builder = seconds(QUEUE_WAIT_SECONDS, &wait, builder)?;
        builder = seconds(DECISION_SECONDS, &decision, builder)?;
        let sizes: [f64; 8] = std::array::from_fn(|power| f64::from(1u8 << power));
        builder = builder.set_buckets_for_metric(Matcher::Full(MICRO_BATCH_SIZE.to_owned()), &sizes)?;
        let handle = builder.install_recorder()?;
        describe();
        Ok(Self {
            handle,
            decision_seconds: histogram!(DECISION_SECONDS),
            queue_wait: CLASSES.map(|class| histogram!(QUEUE_WAIT_SECONDS, "class" => class)),
            retries: RETRY_REASONS.map(|reason| counter!(RETRIES, "reason" => reason)),
            tasks: gauge!(TASKS),
            failovers: FAILOVER_REASONS.map(|reason| counter!(FAILOVERS, "reason" => reason)),
            retries_denied: counter!(RETRIES_DENIED),
            micro_batch_size: MICRO_BATCH_KINDS.map(|kind| histogram!(MICRO_BATCH_SIZE, "kind" => kind.name())),
        })
    }

    /// The text that `/metrics` answers with (Prometheus exposition format 0.0.4).
    #[must_use]
    pub fn render(&self) -> String {
        self.handle.render()
    }

    /// Folds recorded samples into the histograms; call every few seconds, else they grow until the next scrape.
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }

    pub fn queue_waited(&self, class: usize, seconds: f64) {
        if let Some(histogram) = self.queue_wait.get(class) {
            histogram.record(seconds);
        }
    }

    /// Counts one retry for a reason of [`RETRY_REASONS`].
    pub fn retried(&self, reason: &str) {
        count(&RETRY_REASONS, &self.retries, reason);
    }

    /// Counts a request that another model was asked, for a reason of [`FAILOVER_REASONS`].
    pub fn failed_over(&self, reason: &str) {
        count(&FAILOVER_REASONS, &self.failovers, reason);
    }

    /// Notes how many requests left together as one call.
    #[expect(clippy::cast_precision_loss, reason = "a call answers some hundred requests at most")]
    pub fn micro_batched(&self, kind: Api, requests: usize) {
        let at = MICRO_BATCH_KINDS.iter().position(|known| *known == kind);
        if let Some(histogram) = at.and_then(|at| self.micro_batch_size.get(at)) {
            histogram.record(requests as f64);
        }
    }
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").finish_non_exhaustive()
    }
}

fn count(reasons: &[&str], counters: &[Counter], reason: &str) {
    let known = reasons.iter().position(|known| *known == reason);
    if let Some(counter) = known.and_then(|index| counters.get(index)) {
        counter.increment(1);
    }
}

fn describe() {
    describe_counter!(REQUESTS, "requests by model, api and status code");
    describe_histogram!(REQUEST_SECONDS, Unit::Seconds, "arrival of a request to the last byte of its answer");
    describe_histogram!(TTFT_SECONDS, Unit::Seconds, "arrival to the first event of a streamed answer");
    describe_histogram!(TPOT_SECONDS, Unit::Seconds, "mean gap between output tokens after the first");
    describe_histogram!(QUEUE_WAIT_SECONDS, Unit::Seconds, "arrival at the scheduler to being sent, by class");
    describe_gauge!(QUEUE_DEPTH, "requests waiting in lanes, by model and class");
    describe_gauge!(
        DESIRED_WORKERS,
        "workers that would serve what runs and waits now with room to spare; 0 when nothing does: scale by its mean"
    );
    describe_gauge!(DRAIN_SECONDS, Unit::Seconds, "time until the model's workers have prefilled all that waits now");
    describe_gauge!(IDLE_SECONDS, Unit::Seconds, "time since the model had any request");
    describe_counter!(TOKENS, "tokens by model and kind (prompt, cached, output)");
    describe_counter!(PREFIX_HIT_TOKENS, "prompt tokens that the chosen worker was expected to hold in its KV cache");
    describe_gauge!(PREFIX_INDEX_BLOCKS, "blocks in the prefix index, by model");
    describe_gauge!(PREFIX_INDEX_BYTES, "bytes accounted for the prefix index, by model");
    describe_histogram!(DECISION_SECONDS, Unit::Seconds, "time the scheduler took for one event");
    describe_gauge!(GPU_MEMORY_USED, Unit::Bytes, "memory in use on a GPU, with what the driver reserves");
    describe_gauge!(GPU_MEMORY_TOTAL, Unit::Bytes, "memory of a GPU");
    describe_gauge!(GPU_UTILIZATION, "share of the last sample period in which some kernel ran on the GPU");
    describe_gauge!(GPU_TEMPERATURE, "temperature of a GPU in degrees Celsius");
    describe_gauge!(GPU_POWER, "power that a GPU draws in watts");
    describe_gauge!(GPU_THROTTLED, "1 while heat or power holds a GPU below its usual speed");
    describe_gauge!(TASKS, "tasks of the runtime: some for the process, its workers and each open connection");
    describe_counter!(RETRIES, "attempts beyond a request's first, by why they were made");
    describe_counter!(
        RETRIES_DENIED,
        "failed attempts that were not made again, so that retries stay a share of the traffic"
    );
    describe_counter!(FAILOVERS, "requests that another model was asked, by the trouble of the one before");
    describe_histogram!(MICRO_BATCH_SIZE, "requests that left as one call, by what they ask");
}

/// Spans that no collector got; there is one only where traces are exported.
pub fn spans_dropped() -> Counter {
    describe_counter!(SPANS_DROPPED, "spans that were dropped because the collector took none or too few");
    counter!(SPANS_DROPPED)
}

/// Requests that looked for an equal one in flight, by whether they found it: no, yes.
pub fn coalescing_lookups() -> [Counter; 2] {
    describe_counter!(
        CACHE_LOOKUPS,
        "requests that looked for an answer that needs no call of its own, by where and with what result"
    );
    ["miss", "hit"].map(|result| counter!(CACHE_LOOKUPS, "kind" => "coalesce", "result" => result))
}

/// One model's handles, registered when the model is configured.
pub struct ModelMetrics {
    model: Arc<str>,
    /// By api, then by code; the last one is for codes beyond [`CODES`]. Registered when first counted, so that the
    /// metrics are not a page of zeros.
    requests: [[OnceLock<Counter>; CODES.len() + 1]; Api::ALL.len()],
    request_seconds: [Histogram; Api::ALL.len()],
    pub ttft: Histogram,
    pub tpot: Histogram,
    pub prompt_tokens: Counter,
    pub cached_tokens: Counter,
    pub output_tokens: Counter,
    pub prefix_hit_tokens: Counter,
    queue_depth: [Gauge; CLASSES.len()],
    index_blocks: Gauge,
    index_bytes: Gauge,
    desired_workers: Gauge,
    drain_seconds: Gauge,
    idle_seconds: Gauge,
}

impl std::fmt::Debug for ModelMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelMetrics").finish_non_exhaustive()
    }
}

impl ModelMetrics {
    /// `model` must be a configured name; requests for names that nobody configured share `other`.
    #[must_use]
    pub fn register(model: &str) -> Self {
        let model = || model.to_owned();
        let tokens = |kind: &'static str| counter!(TOKENS, "model" => model(), "kind" => kind);
        Self {
            model: model().into(),
            requests: std::array::from_fn(|_| std::array::from_fn(|_| OnceLock::new())),
            request_seconds: Api::ALL.map(|api| histogram!(REQUEST_SECONDS, "model" => model(), "api" => api.name())),
            ttft: histogram!(TTFT_SECONDS, "model" => model()),
            tpot: histogram!(TPOT_SECONDS, "model" => model()),
            prompt_tokens: tokens("prompt"),
            cached_tokens: tokens("cached"),
            output_tokens: tokens("output"),
            prefix_hit_tokens: counter!(PREFIX_HIT_TOKENS, "model" => model()),
            queue_depth: CLASSES.map(|class| gauge!(QUEUE_DEPTH, "model" => model(), "class" => class)),
            index_blocks: gauge!(PREFIX_INDEX_BLOCKS, "model" => model()),
            index_bytes: gauge!(PREFIX_INDEX_BYTES, "model" => model()),
            desired_workers: gauge!(DESIRED_WORKERS, "model" => model()),
            drain_seconds: gauge!(DRAIN_SECONDS, "model" => model()),
            idle_seconds: gauge!(IDLE_SECONDS, "model" => model()),
        }
    }

    /// Counts one answered request and its duration.
    pub fn answered(&self, api: Api, code: u16, seconds: f64) {
        let at = CODES.iter().position(|known| *known == code);
        let (Some(codes), Some(duration)) = (self.requests.get(api as usize), self.request_seconds.get(api as usize))
        else {
            return;
        };
        if let Some(counter) = codes.get(at.unwrap_or(CODES.len())) {
            let code = || at.map_or_else(|| "other".to_owned(), |_| code.to_string());
            let register =
                || counter!(REQUESTS, "model" => self.model.to_string(), "api" => api.name(), "code" => code());
            counter.get_or_init(register).increment(1);
        }
        duration.record(seconds);
    }

    #[expect(clippy::cast_precision_loss, reason = "an index is bounded far below 2^52 bytes")]
    pub fn prefix_index(&self, blocks: usize, bytes: usize) {
        self.index_blocks.set(blocks as f64);
        self.index_bytes.set(bytes as f64);
    }

    /// What an autoscaler goes by; `None` when the model is gone.
    pub fn scale(&self, scale: Option<ScaleView>) {
        let desired = scale.map_or(0, |scale| scale.desired_workers);
        self.desired_workers.set(f64::from(desired));
        self.drain_seconds.set(scale.map_or(0.0, |scale| scale.drain.as_secs_f64()));
        self.idle_seconds.set(scale.map_or(0.0, |scale| scale.idle.as_secs_f64()));
    }

    pub fn queue_depth(&self, class: usize, requests: usize) {
        if let Some(gauge) = self.queue_depth.get(class) {
            #[expect(clippy::cast_precision_loss, reason = "queues are bounded far below 2^52")]
            gauge.set(requests as f64);
        }
    }
}

/// One GPU's gauges, each there once the GPU has told its value, and not a number while it does not.
pub struct GpuMetrics {
    node: Arc<str>,
    /// Its index, as in `0` or `0:1`.
    gpu: String,
    gauges: [OnceLock<Gauge>; Self::NAMES.len()],
}

impl GpuMetrics {
    const NAMES: [&str; 6] =
        [GPU_MEMORY_USED, GPU_MEMORY_TOTAL, GPU_UTILIZATION, GPU_TEMPERATURE, GPU_POWER, GPU_THROTTLED];

    #[must_use]
    pub fn new(node: Arc<str>, gpu: String) -> Self {
        Self { node, gpu, gauges: Default::default() }
    }

    #[expect(clippy::cast_precision_loss, reason = "memory is far below 2^52 bytes")]
    pub fn set(&self, gpu: &Gpu) {
        self.set_all([
            gpu.memory_used_bytes.map(|bytes| bytes as f64),
            gpu.memory_total_bytes.map(|bytes| bytes as f64),
            gpu.utilization_percent.map(|percent| f64::from(percent) / 100.0),
            gpu.temperature_celsius.map(f64::from),
            gpu.power_milliwatts.map(|milliwatts| f64::from(milliwatts) / 1000.0),
            gpu.throttle_reasons.map(|_| f64::from(u8::from(gpu::slowdown(gpu) < 1.0))),
        ]);
    }

    /// Says that nothing is known of the GPU any more.
    pub fn clear(&self) {
        self.set_all([None; Self::NAMES.len()]);
    }

    fn set_all(&self, values: [Option<f64>; Self::NAMES.len()]) {
        for ((gauge, name), value) in self.gauges.iter().zip(Self::NAMES).zip(values) {
            let register = || gauge!(name, "node" => self.node.to_string(), "gpu" => self.gpu.clone());
            match value {
                Some(value) => gauge.get_or_init(register).set(value),
                None => {
                    if let Some(gauge) = gauge.get() {
                        gauge.set(f64::NAN);
                    }
                }
            }
        }
    }
}
