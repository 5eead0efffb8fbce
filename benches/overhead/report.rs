//! Figures of many rounds, as rows of a table in Markdown.

use std::fmt::Write as _;
use std::time::Duration;

/// The target that others are compared with, and the one that latency is added to.
pub(crate) const NGINX: &str = "nginx";
pub(crate) const DIRECT: &str = "direct";

pub(crate) const HEADER: &str = "\
| path | through | CPU µs a request (least to most) | x nginx | p50 µs | p99 µs | added p50 µs | requests/s |
| --- | --- | --- | --- | --- | --- | --- | --- |";

/// One measurement.
pub(crate) struct Round {
    /// CPU time of the proxy alone, per request.
    cpu_us: Option<f64>,
    p50_us: f64,
    p99_us: f64,
    per_second: f64,
}

/// All measurements of one target on one path, by round.
pub(crate) struct Series<'t> {
    pub(crate) target: &'t str,
    pub(crate) rounds: Vec<Round>,
}

impl Round {
    /// `cpu` is what the proxy used for all the requests whose latencies these are.
    #[expect(clippy::cast_precision_loss, reason = "counts of requests are far below 2^52")]
    pub(crate) fn new(mut latencies: Vec<Duration>, cpu: Option<Duration>, length: Duration) -> Self {
        latencies.sort_unstable();
        let requests = latencies.len() as f64;
        let at = |percent: usize| latencies.get(latencies.len() * percent / 100).copied().unwrap_or_default();
        Self {
            cpu_us: cpu.map(|cpu| micros(cpu) / requests),
            p50_us: micros(at(50)),
            p99_us: micros(at(99)),
            per_second: requests / length.as_secs_f64(),
        }
    }
}

impl Series<'_> {
    fn each(&self, figure: impl Fn(&Round) -> f64) -> Vec<f64> {
        self.rounds.iter().map(figure).collect()
    }

    fn cpu_us(&self) -> Option<Vec<f64>> {
        self.rounds.iter().map(|round| round.cpu_us).collect()
    }

    fn p50_us(&self) -> Vec<f64> {
        self.each(|round| round.p50_us)
    }
}

/// One row for each target.
pub(crate) fn rows(path: &str, all: &[Series<'_>]) -> String {
    let named = |name| all.iter().find(|series| series.target == name);
    let nginx = named(NGINX).and_then(Series::cpu_us);
    let direct = named(DIRECT).map(Series::p50_us).unwrap_or_default();
    let mut rows = String::new();
    for series in all {
        let cpu = series.cpu_us();
        let spread = cpu.as_ref().map(|cpu| {
            let (least, most) =
                (cpu.iter().copied().fold(f64::INFINITY, f64::min), cpu.iter().copied().fold(0.0, f64::max));
            format!("{:.1} ({least:.1} to {most:.1})", median(cpu.clone()))
        });
        let ratio = cpu.zip(nginx.as_ref()).map(|(cpu, nginx)| pairwise(&cpu, nginx, |cpu, nginx| cpu / nginx));
        let added = (series.target != DIRECT).then(|| pairwise(&series.p50_us(), &direct, |p50, direct| p50 - direct));
        let _ = writeln!(
            rows,
            "| {path} | {} | {} | {} | {:.0} | {:.0} | {} | {:.0} |",
            series.target,
            spread.unwrap_or_default(),
            ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default(),
            median(series.p50_us()),
            median(series.each(|round| round.p99_us)),
            added.map(|added| format!("{added:.0}")).unwrap_or_default(),
            median(series.each(|round| round.per_second)),
        );
    }
    rows
}

/// Median of what `of` says of the two figures of each round.
fn pairwise(ours: &[f64], theirs: &[f64], of: impl Fn(f64, f64) -> f64) -> f64 {
    median(ours.iter().zip(theirs).map(|(ours, theirs)| of(*ours, *theirs)).collect())
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_unstable_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}
