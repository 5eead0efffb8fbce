//! Traces made to order, and what a log says of them.

use std::sync::Arc;
use std::time::Duration;

use forebay_scheduler::{Class, Tick};
use forebay_simulator::{Entry, Outcome, Policy, Row, Settings, Trace, What};

pub(crate) const BLOCK_TOKENS: u32 = 16;

/// SplitMix64.
pub(crate) struct Chance(pub(crate) u64);

impl Chance {
    pub(crate) fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }

    pub(crate) fn exponential(&mut self, mean: f64) -> f64 {
        -(1.0 - self.unit()).ln() * mean
    }

    pub(crate) fn between(&mut self, range: (u32, u32)) -> u32 {
        range.0 + (self.unit() * f64::from(range.1 - range.0)) as u32
    }

    /// Log-normal with a standard deviation of `sigma` in its logarithm.
    pub(crate) fn log_normal(&mut self, median: f64, sigma: f64) -> f64 {
        let normal = (-2.0 * (1.0 - self.unit()).ln()).sqrt() * (self.unit() * std::f64::consts::TAU).cos();
        median * (normal * sigma).exp()
    }
}

/// A request of tenant 0 and the default class that shares nothing with others.
pub(crate) fn row(at: f64, prompt_tokens: u32, output_tokens: u32) -> Row {
    let at = Duration::from_secs_f64(at);
    Row { at, prompt_tokens, output_tokens, blocks: Arc::from([]), tenant: 0, class: Class::Default }
}

/// A Poisson stream from 0 to `seconds`, each row as `make` wants it.
pub(crate) fn poisson(
    chance: &mut Chance,
    per_second: f64,
    seconds: f64,
    mut make: impl FnMut(&mut Chance, f64) -> Row,
) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut at = chance.exponential(1.0 / per_second);
    while at < seconds {
        rows.push(make(chance, at));
        at += chance.exponential(1.0 / per_second);
    }
    rows
}

pub(crate) fn trace(mut rows: Vec<Row>) -> Trace {
    rows.sort_by_key(|row| row.at);
    Trace { block_tokens: BLOCK_TOKENS, rows }
}

pub(crate) fn forebay() -> Policy {
    Policy::by_name("forebay").unwrap()
}

pub(crate) fn run(trace: &Trace, settings: &Settings, seed: u64) -> Outcome {
    forebay_simulator::run(trace, settings, forebay(), seed)
}

/// Seconds to the first token of each row that got one.
pub(crate) fn ttft(trace: &Trace, log: &[Entry], wanted: impl Fn(&Row) -> bool) -> Vec<f64> {
    let mut arrived = vec![Tick::ZERO; trace.rows.len()];
    let mut times = Vec::new();
    for entry in log {
        let request = entry.request as usize;
        match entry.what {
            What::Arrived => arrived[request] = entry.at,
            What::FirstToken { .. } if wanted(&trace.rows[request]) => {
                times.push(entry.at.seconds_since(arrived[request]));
            }
            _ => {}
        }
    }
    times
}

/// The nearest-rank 99th percentile.
pub(crate) fn p99(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() as f64 * 0.99).ceil() as usize).max(1) - 1]
}

/// What engines did for one request until `until`, as far as the log shows it: prompt tokens computed, and output tokens,
/// taken as evenly spread between the first and the last.
#[derive(Clone, Copy, Default)]
pub(crate) struct Service {
    pub(crate) uncached: f64,
    pub(crate) output: f64,
}

/// [`Service`] by row.
pub(crate) fn service(trace: &Trace, log: &[Entry], until: Tick) -> Vec<Service> {
    let mut first: Vec<Option<Tick>> = vec![None; trace.rows.len()];
    let mut services = vec![Service::default(); trace.rows.len()];
    for entry in log {
        let request = entry.request as usize;
        let (row, service) = (&trace.rows[request], &mut services[request]);
        match entry.what {
            What::FirstToken { cached_tokens, .. } if entry.at <= until => {
                service.uncached = f64::from(row.prompt_tokens - cached_tokens);
                first[request] = Some(entry.at);
            }
            What::Finished { output_tokens, .. } => {
                let Some(first) = first[request] else { continue };
                let whole = entry.at.seconds_since(first).max(1e-9);
                service.output = f64::from(output_tokens) * (until.seconds_since(first) / whole).min(1.0);
            }
            _ => {}
        }
    }
    services
}
