//! What is told of the process as a whole: names, labels and buckets, and the handles that rooms hold.

use std::sync::Arc;

use metrics::{Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram};
use metrics::{gauge, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use super::ModelMetrics;

const QUEUE_WAIT_SECONDS: &str = "forebay_queue_wait_seconds";
const DECISION_SECONDS: &str = "forebay_decision_seconds";
const CACHE_LOOKUPS: &str = "forebay_cache_lookups_total";
const MICRO_BATCH_SIZE: &str = "forebay_micro_batch_size";
const RETRIES: &str = "forebay_retries_total";
const FAILOVERS: &str = "forebay_failovers_total";
const HANDOVERS: &str = "forebay_handovers_total";
const RETRIES_DENIED: &str = "forebay_retries_denied_total";
const SPANS_DROPPED: &str = "forebay_spans_dropped_total";
const TASKS: &str = "forebay_tasks";

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
/// What a worker that computed a prompt for another gave it, as `forebay_handovers_total{given}` names it.
pub const HANDED_OVER: [&str; 2] = ["cache", "nothing"];
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
    handovers: [Counter; HANDED_OVER.len()],
    /// What was not tried again since that is a share of the traffic at most.
    pub retries_denied: Counter,
    micro_batch_size: [Histogram; MICRO_BATCH_KINDS.len()],
    /// What requests for models that nobody configured count as.
    pub other_models: Arc<ModelMetrics>,
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
        let wait = [0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
        let decision = [1e-6, 2e-6, 3e-6, 5e-6, 1e-5, 1.5e-5, 3e-5, 6e-5, 1e-4, 1e-3, 1e-2];
        let mut builder = PrometheusBuilder::new();
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
            handovers: HANDED_OVER.map(|given| counter!(HANDOVERS, "given" => given)),
            retries_denied: counter!(RETRIES_DENIED),
            micro_batch_size: MICRO_BATCH_KINDS.map(|kind| histogram!(MICRO_BATCH_SIZE, "kind" => kind.name())),
            other_models: Arc::new(ModelMetrics::new("other")),
        })
    }

    /// The text of what is told here (Prometheus exposition format 0.0.4).
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

    /// Counts a prompt that was computed apart, and whether its cache could be had.
    pub fn handed_over(&self, cache: bool) {
        let [given, nothing] = &self.handovers;
        if cache { given } else { nothing }.increment(1);
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
    describe_histogram!(QUEUE_WAIT_SECONDS, Unit::Seconds, "arrival at the scheduler to being sent, by class");
    describe_histogram!(DECISION_SECONDS, Unit::Seconds, "time the scheduler took for one event");
    describe_gauge!(TASKS, "tasks of the runtime: some for the process, its workers and each open connection");
    describe_counter!(RETRIES, "attempts beyond a request's first, by why they were made");
    describe_counter!(HANDOVERS, "prompts that one worker computed for another, by what it gave for that");
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
