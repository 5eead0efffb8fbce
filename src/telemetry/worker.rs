//! What is told of each worker, for as long as it is one.
//!
//! Not in the recorder of the other metrics, which keeps every series for ever: workers come and go. Here a worker's
//! values are its own, and are gone with it.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use forebay_backends::signals::kv_events::{Loss, Standing};
use metrics::{Counter, Gauge};

/// What became of a break in a worker's KV events, as `forebay_kv_event_breaks_total{kind}` names it.
const KV_BREAKS: [&str; 5] = ["filled", "gap", "restarted", "unproven", "unreadable"];

/// What each family tells. Those whose names end in `_total` are counters.
const FAMILIES: [(Family, &str, &str); 12] = [
    (Family::Running, "forebay_worker_running", "sequences running, as the engine reported last"),
    (Family::Waiting, "forebay_worker_waiting", "sequences waiting in the engine, as it reported last"),
    (
        Family::KvUsage,
        "forebay_worker_kv_usage_ratio",
        "share of the KV cache held by live requests, as the engine reported last",
    ),
    (
        Family::Promised,
        "forebay_worker_promised_tokens",
        "uncached prompt tokens promised to the worker and not yet prefilled",
    ),
    (Family::Up, "forebay_worker_up", "1 when the worker takes requests"),
    (
        Family::Health,
        "forebay_worker_health_score",
        "how well the worker is, 1 to 0; falls with failures and with late first tokens",
    ),
    (Family::BreakerOpen, "forebay_breaker_open", "1 while the worker's circuit breaker is open"),
    (Family::Asleep, "forebay_worker_asleep", "1 while the worker's model is not in the memory of its GPUs"),
    (Family::Wakes, "forebay_worker_wakes_total", "times that the worker's model was woken"),
    (Family::KvEvents, "forebay_kv_events_total", "KV-cache events received, by worker"),
    (
        Family::KvBreaks,
        "forebay_kv_event_breaks_total",
        "breaks in a worker's KV-cache events: filled by a replay, or else by why what was known became void",
    ),
    (
        Family::KvStanding,
        "forebay_worker_kv_events",
        "0 no KV-cache events come, 1 they come but the cache may hold more than they told, 2 all of it is known",
    ),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Running,
    Waiting,
    KvUsage,
    Promised,
    Up,
    Health,
    BreakerOpen,
    Asleep,
    Wakes,
    KvEvents,
    KvBreaks,
    KvStanding,
}

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
    /// The same values, to be read.
    series: Vec<Series>,
}

struct Series {
    family: Family,
    kind: Option<&'static str>,
    /// A counter's count, or the bits of a gauge's number.
    value: Arc<AtomicU64>,
}

impl std::fmt::Debug for WorkerMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkerMetrics").finish_non_exhaustive()
    }
}

impl Default for WorkerMetrics {
    fn default() -> Self {
        let mut series = Vec::new();
        let mut cell = |family, kind| {
            let value = Arc::new(AtomicU64::new(0));
            series.push(Series { family, kind, value: Arc::clone(&value) });
            value
        };
        let mut gauge = |family| Gauge::from_arc(cell(family, None));
        let (running, waiting, kv_usage) = (gauge(Family::Running), gauge(Family::Waiting), gauge(Family::KvUsage));
        let (promised_tokens, up, health_score) = (gauge(Family::Promised), gauge(Family::Up), gauge(Family::Health));
        let (breaker_open, asleep, kv_standing) =
            (gauge(Family::BreakerOpen), gauge(Family::Asleep), gauge(Family::KvStanding));
        let mut counter = |family, kind| Counter::from_arc(cell(family, kind));
        Self {
            running,
            waiting,
            kv_usage,
            promised_tokens,
            up,
            health_score,
            breaker_open,
            asleep,
            wakes: counter(Family::Wakes, None),
            kv_events: counter(Family::KvEvents, None),
            kv_breaks: KV_BREAKS.map(|kind| counter(Family::KvBreaks, Some(kind))),
            kv_standing,
            series,
        }
    }
}

impl WorkerMetrics {
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

    /// The text of these workers' series (Prometheus exposition format 0.0.4), a family after the other.
    #[must_use]
    pub fn render(workers: &[(&str, &Self)]) -> String {
        let mut text = String::new();
        for (family, name, help) in FAMILIES.iter().filter(|_| !workers.is_empty()) {
            let counts = name.ends_with("_total");
            let kind = if counts { "counter" } else { "gauge" };
            let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
            for (worker, metrics) in workers {
                for series in metrics.series.iter().filter(|series| series.family == *family) {
                    let _ = write!(text, "{name}{{worker=\"{}\"", escaped(worker));
                    if let Some(kind) = series.kind {
                        let _ = write!(text, ",kind=\"{kind}\"");
                    }
                    let value = series.value.load(Ordering::Acquire);
                    let _ = if counts {
                        writeln!(text, "}} {value}")
                    } else {
                        writeln!(text, "}} {}", f64::from_bits(value))
                    };
                }
            }
            text.push('\n');
        }
        text
    }
}

/// A label's value, in which names have no line breaks.
fn escaped(name: &str) -> String {
    name.replace('\\', "\\\\").replace('"', "\\\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_is_told_of_every_worker() {
        let [one, two] = [WorkerMetrics::default(), WorkerMetrics::default()];
        one.up.set(1.0);
        one.kv_usage.set(0.25);
        one.kv_break(Loss::Gap);
        two.wakes.absolute(3);
        let text = WorkerMetrics::render(&[("a", &one), ("b \"\\", &two)]);
        for line in [
            "# TYPE forebay_worker_up gauge",
            "forebay_worker_up{worker=\"a\"} 1",
            "forebay_worker_kv_usage_ratio{worker=\"a\"} 0.25",
            "# TYPE forebay_worker_wakes_total counter",
            "forebay_worker_wakes_total{worker=\"b \\\"\\\\\"} 3",
            "forebay_kv_event_breaks_total{worker=\"a\",kind=\"gap\"} 1",
            "forebay_kv_event_breaks_total{worker=\"a\",kind=\"filled\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "no `{line}` in\n{text}");
        }
        assert_eq!(text.lines().filter(|line| line.starts_with("forebay_")).count(), 2 * one.series.len());
        for (family, name, _) in FAMILIES {
            assert!(one.series.iter().any(|series| series.family == family), "{name}");
        }
        assert_eq!(WorkerMetrics::render(&[]), "");
    }
}
