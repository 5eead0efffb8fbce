//! What is told of each worker, for as long as it is one.

use forebay_backends::signals::kv_events::{Loss, Standing};
use metrics::{Counter, Gauge};

use super::series::{self, Family, Series};

/// What became of a break in a worker's KV events, as `forebay_kv_event_breaks_total{kind}` names it.
const KV_BREAKS: [&str; 5] = ["filled", "gap", "restarted", "unproven", "unreadable"];

static RUNNING: Family = Family::gauge("forebay_worker_running", "sequences running, as the engine reported last");
static WAITING: Family =
    Family::gauge("forebay_worker_waiting", "sequences waiting in the engine, as it reported last");
static KV_USAGE: Family = Family::gauge(
    "forebay_worker_kv_usage_ratio",
    "share of the KV cache held by live requests, as the engine reported last",
);
static PROMISED: Family = Family::gauge(
    "forebay_worker_promised_tokens",
    "uncached prompt tokens promised to the worker and not yet prefilled",
);
static UP: Family = Family::gauge("forebay_worker_up", "1 when the worker takes requests");
static HEALTH: Family = Family::gauge(
    "forebay_worker_health_score",
    "how well the worker is, 1 to 0; falls with failures and with late first tokens",
);
static BREAKER_OPEN: Family = Family::gauge("forebay_breaker_open", "1 while the worker's circuit breaker is open");
static ASLEEP: Family =
    Family::gauge("forebay_worker_asleep", "1 while the worker's model is not in the memory of its GPUs");
static WAKES: Family = Family::counter("forebay_worker_wakes_total", "times that the worker's model was woken");
static KV_EVENTS: Family = Family::counter("forebay_kv_events_total", "KV-cache events received, by worker");
static KV_EVENT_BREAKS: Family = Family::counter(
    "forebay_kv_event_breaks_total",
    "breaks in a worker's KV-cache events: filled by a replay, or else by why what was known became void",
);
static KV_STANDING: Family = Family::gauge(
    "forebay_worker_kv_events",
    "0 no KV-cache events come, 1 they come but the cache may hold more than they told, 2 all of it is known",
);

/// One worker's gauges and counters.
pub struct WorkerMetrics {
    pub running: Gauge,
    pub waiting: Gauge,
    pub kv_usage: Gauge,
    pub promised_tokens: Gauge,
    pub up: Gauge,
    pub health_score: Gauge,
    pub breaker_open: Gauge,
    pub asleep: Gauge,
    pub wakes: Counter,
    pub kv_events: Counter,
    kv_breaks: [Counter; KV_BREAKS.len()],
    kv_standing: Gauge,
    series: Series,
}

impl std::fmt::Debug for WorkerMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkerMetrics").finish_non_exhaustive()
    }
}

impl WorkerMetrics {
    #[must_use]
    pub fn new(worker: &str) -> Self {
        let series = Series::new(&[("worker", worker)]);
        let gauge = |family| series.gauge(family, &[], 0.0);
        Self {
            running: gauge(&RUNNING),
            waiting: gauge(&WAITING),
            kv_usage: gauge(&KV_USAGE),
            promised_tokens: gauge(&PROMISED),
            up: gauge(&UP),
            health_score: gauge(&HEALTH),
            breaker_open: gauge(&BREAKER_OPEN),
            asleep: gauge(&ASLEEP),
            wakes: series.counter(&WAKES, &[]),
            kv_events: series.counter(&KV_EVENTS, &[]),
            kv_breaks: KV_BREAKS.map(|kind| series.counter(&KV_EVENT_BREAKS, &[("kind", kind)])),
            kv_standing: gauge(&KV_STANDING),
            series,
        }
    }

    /// Counts a gap in the KV events that a replay filled.
    pub fn kv_filled(&self) {
        self.count_break("filled");
    }

    /// Counts that what was known of the KV cache became void.
    pub fn kv_break(&self, loss: Loss) {
        self.count_break(match loss {
            Loss::Gap => "gap",
            Loss::Restarted => "restarted",
            Loss::Unproven => "unproven",
            Loss::Unreadable => "unreadable",
        });
    }

    fn count_break(&self, kind: &str) {
        let at = KV_BREAKS.iter().position(|known| *known == kind);
        if let Some(counter) = at.and_then(|at| self.kv_breaks.get(at)) {
            counter.increment(1);
        }
    }

    pub fn kv_standing(&self, standing: Standing) {
        self.kv_standing.set(match standing {
            Standing::Away => 0.0,
            Standing::Partial => 1.0,
            Standing::Complete => 2.0,
        });
    }

    /// The text of these workers' series.
    pub fn render<'a>(workers: impl IntoIterator<Item = &'a Self>) -> String {
        series::render(workers.into_iter().map(|worker| &worker.series))
    }
}
