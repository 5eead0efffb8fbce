//! What is told of each model, for as long as it is configured.

use std::sync::OnceLock;

use forebay_scheduler::ScaleView;
use metrics::{Counter, Gauge, Histogram};

use super::metrics::{Api, CLASSES};
use super::series::{self, Family, Series};

/// Status codes that answers can have; 499 is "the client left" (nginx's number). Others count as `other`.
const CODES: [u16; 16] = [200, 400, 401, 403, 404, 405, 408, 413, 415, 429, 499, 500, 501, 502, 503, 504];

static REQUESTS: Family = Family::counter("forebay_requests_total", "requests by model, api and status code");
// OpenTelemetry's bucket advice for gen_ai.server.* durations, extended downwards where we are faster.
static REQUEST_SECONDS: Family = Family::histogram(
    "forebay_request_seconds",
    "arrival of a request to the last byte of its answer",
    &[0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 300.0],
);
static TTFT_SECONDS: Family = Family::histogram(
    "forebay_ttft_seconds",
    "arrival to the first event of a streamed answer",
    &[0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0],
);
static TPOT_SECONDS: Family = Family::histogram(
    "forebay_tpot_seconds",
    "mean gap between output tokens after the first",
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5],
);
static TOKENS: Family = Family::counter("forebay_tokens_total", "tokens by model and kind (prompt, cached, output)");
static PREFIX_HIT_TOKENS: Family = Family::counter(
    "forebay_prefix_hit_tokens_total",
    "prompt tokens that the chosen worker was expected to hold in its KV cache",
);
static QUEUE_DEPTH: Family = Family::gauge("forebay_queue_depth", "requests waiting in lanes, by model and class");
static PREFIX_INDEX_BLOCKS: Family =
    Family::gauge("forebay_prefix_index_blocks", "blocks in the prefix index, by model");
static PREFIX_INDEX_BYTES: Family =
    Family::gauge("forebay_prefix_index_bytes", "bytes accounted for the prefix index, by model");
static DESIRED_WORKERS: Family = Family::gauge(
    "forebay_model_desired_workers",
    "workers that would serve what runs and waits now with room to spare; 0 when nothing does: scale by its mean",
);
static DRAIN_SECONDS: Family =
    Family::gauge("forebay_model_drain_seconds", "time until the model's workers have prefilled all that waits now");
static IDLE_SECONDS: Family = Family::gauge("forebay_model_idle_seconds", "time since the model had any request");

/// One model's handles.
pub struct ModelMetrics {
    /// By api, then by code; the last one is for codes beyond [`CODES`]. Made when first counted, so that the metrics are
    /// not a page of zeros.
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
    series: Series,
}

impl std::fmt::Debug for ModelMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelMetrics").finish_non_exhaustive()
    }
}

impl ModelMetrics {
    /// `model` must be a configured name; requests for names that nobody configured share `other`.
    #[must_use]
    pub fn new(model: &str) -> Self {
        let series = Series::new(&[("model", model)]);
        let tokens = |kind| series.counter(&TOKENS, &[("kind", kind)]);
        let gauge = |family| series.gauge(family, &[], 0.0);
        Self {
            requests: std::array::from_fn(|_| std::array::from_fn(|_| OnceLock::new())),
            request_seconds: Api::ALL.map(|api| series.histogram(&REQUEST_SECONDS, &[("api", api.name())])),
            ttft: series.histogram(&TTFT_SECONDS, &[]),
            tpot: series.histogram(&TPOT_SECONDS, &[]),
            prompt_tokens: tokens("prompt"),
            cached_tokens: tokens("cached"),
            output_tokens: tokens("output"),
            prefix_hit_tokens: series.counter(&PREFIX_HIT_TOKENS, &[]),
            queue_depth: CLASSES.map(|class| series.gauge(&QUEUE_DEPTH, &[("class", class)], 0.0)),
            index_blocks: gauge(&PREFIX_INDEX_BLOCKS),
            index_bytes: gauge(&PREFIX_INDEX_BYTES),
            desired_workers: gauge(&DESIRED_WORKERS),
            drain_seconds: gauge(&DRAIN_SECONDS),
            idle_seconds: gauge(&IDLE_SECONDS),
            series,
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
            let make = || self.series.counter(&REQUESTS, &[("api", api.name()), ("code", &code())]);
            counter.get_or_init(make).increment(1);
        }
        duration.record(seconds);
    }

    #[expect(clippy::cast_precision_loss, reason = "an index is bounded far below 2^52 bytes")]
    pub fn prefix_index(&self, blocks: usize, bytes: usize) {
        self.index_blocks.set(blocks as f64);
        self.index_bytes.set(bytes as f64);
    }

    /// What an autoscaler goes by; `None` when the model is not served yet.
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

    /// The text of these models' series.
    pub fn render<'a>(models: impl IntoIterator<Item = &'a Self>) -> String {
        series::render(models.into_iter().map(|model| &model.series))
    }
}
