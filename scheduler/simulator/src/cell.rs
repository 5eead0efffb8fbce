//! The figures of one run, computed from its log and its trace alone.
//!
//! TTFT counts from arrival. A percentile is the nearest rank: the value at `ceil(p * n)` of the sorted values. Hit ratio
//! is weighted by tokens. Shares and goodput count against requests that arrived, so that nobody gains by rejecting.

use std::collections::BTreeMap;
use std::time::Duration;

use forebay_scheduler::Tick;

use crate::{Entry, Offered, Settings, Trace, What};

/// Figures of one policy at one rate and seed.
#[derive(Debug, Clone, PartialEq)]
pub struct Cell {
    /// Name of the policy.
    pub policy: &'static str,
    /// By what arrival times were divided.
    pub rate: f64,
    /// Offered work over the fleet's capacity, as [`Offered`] counts it; none when all arrives at once.
    pub load: Option<f64>,
    /// Seed of the run.
    pub seed: u64,
    /// Rows of the trace.
    pub requests: u32,
    /// Answered in full.
    pub completed: u32,
    /// Refused since the queue was full.
    pub shed: u32,
    /// Waited too long.
    pub timed_out: u32,
    /// Too large for any engine.
    pub refused: u32,
    /// Broken after the first token, or left without an engine.
    pub failed: u32,
    /// Arrival to first token, in milliseconds.
    pub ttft_ms: Option<Spread>,
    /// Mean gap between the tokens of one request with at least two, in milliseconds.
    pub tpot_ms: Option<Spread>,
    /// Arrival to end, of those answered in full, in milliseconds.
    pub e2e_ms: Option<Spread>,
    /// Share of all requests whose first token came within the SLO.
    pub within_slo: f64,
    /// Requests a second that were answered in full with their first token within the SLO.
    pub goodput_rps: f64,
    /// Cached tokens over all tokens of the prompts whose first token came.
    pub hit_ratio_tokens: Option<f64>,
    /// How often an engine ran out of KV memory and put a sequence back.
    pub preemptions: u32,
    /// Tokens computed (prompt less cached, and output) for requests answered in full, by worker: the most over the mean.
    pub load_max_over_mean: Option<f64>,
    /// Jain's index, `(sum x)^2 / (n * sum x^2)`, over the tenants' shares of requests within the SLO; none for fewer than
    /// two tenants.
    pub jain_tenants: Option<f64>,
    /// Wall-clock microseconds of a decision about an arrival (median and 99th percentile), where timed.
    pub decision_us: Option<(f64, f64)>,
    /// Time of the last event.
    pub virtual_seconds: f64,
}

/// Mean and nearest-rank percentiles.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// Arithmetic mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
}

impl Spread {
    /// The spread of some values; none when there is none.
    #[must_use]
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let rank = |share: f64| {
            let rank = (share * values.len() as f64).ceil().max(1.0) as usize;
            values.get(rank - 1).copied()
        };
        let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
        Some(Self { mean, p50: rank(0.5)?, p90: rank(0.9)?, p99: rank(0.99)? })
    }
}

/// What the log says of one request.
#[derive(Debug, Clone, Copy, Default)]
struct Course {
    arrived: Tick,
    first: Option<Tick>,
    finished: Option<(Tick, u32)>,
}

impl Course {
    fn ttft_ms(&self) -> Option<f64> {
        Some(self.first?.seconds_since(self.arrived) * 1e3)
    }
}

impl Cell {
    /// The figures of a log; `decisions` are the times that decisions took, where measured.
    #[must_use]
    pub fn of(
        log: &[Entry],
        trace: &Trace,
        settings: &Settings,
        (policy, seed): (&'static str, u64),
        decisions: &[Duration],
    ) -> Self {
        let mut courses = vec![Course::default(); trace.rows.len()];
        let mut done = vec![0_u64; settings.workers as usize];
        let (mut shed, mut timed_out, mut refused, mut failed, mut preemptions) = (0, 0, 0, 0, 0);
        let (mut cached, mut looked_up) = (0_u64, 0_u64);
        for entry in log {
            let Some(row) = trace.rows.get(entry.request as usize) else { continue };
            let Some(course) = courses.get_mut(entry.request as usize) else { continue };
            match entry.what {
                What::Arrived => course.arrived = entry.at,
                What::Placed { .. } | What::Sent { .. } => {}
                What::FirstToken { cached_tokens, .. } => {
                    course.first = Some(entry.at);
                    cached += u64::from(cached_tokens);
                    looked_up += u64::from(row.prompt_tokens);
                }
                What::Preempted { .. } => preemptions += 1,
                What::Finished { worker, cached_tokens, output_tokens } => {
                    course.finished = Some((entry.at, output_tokens));
                    if let Some(done) = done.get_mut(worker as usize) {
                        *done += u64::from(row.prompt_tokens - cached_tokens) + u64::from(output_tokens);
                    }
                }
                What::Shed => shed += 1,
                What::TimedOut => timed_out += 1,
                What::Refused => refused += 1,
                What::Failed => failed += 1,
            }
        }
        let slo_ms = settings.slo_ttft.as_secs_f64() * 1e3;
        let good = |course: &Course| course.ttft_ms().is_some_and(|ttft| ttft <= slo_ms);
        let arrived = courses.len().max(1) as f64;
        let virtual_seconds = log.last().map_or(0.0, |entry| entry.at.seconds_since(Tick::ZERO));
        let answered_well = courses.iter().filter(|course| course.finished.is_some() && good(course)).count();
        let load = Offered::of(trace, settings).load(settings, settings.rate);
        Self {
            policy,
            rate: settings.rate,
            load: Some(load).filter(|load| load.is_finite()),
            seed,
            requests: count(courses.len()),
            completed: count(courses.iter().filter(|course| course.finished.is_some()).count()),
            shed,
            timed_out,
            refused,
            failed,
            ttft_ms: Spread::of(courses.iter().filter_map(Course::ttft_ms).collect()),
            tpot_ms: Spread::of(courses.iter().filter_map(tpot_ms).collect()),
            e2e_ms: Spread::of(courses.iter().filter_map(e2e_ms).collect()),
            within_slo: courses.iter().filter(|course| good(course)).count() as f64 / arrived,
            goodput_rps: if virtual_seconds > 0.0 { answered_well as f64 / virtual_seconds } else { 0.0 },
            hit_ratio_tokens: (looked_up > 0).then(|| cached as f64 / looked_up as f64),
            preemptions,
            load_max_over_mean: max_over_mean(&done),
            jain_tenants: jain_of_tenants(trace, &courses, good),
            decision_us: Spread::of(decisions.iter().map(|time| time.as_secs_f64() * 1e6).collect())
                .map(|spread| (spread.p50, spread.p99)),
            virtual_seconds,
        }
    }
}

fn tpot_ms(course: &Course) -> Option<f64> {
    let (at, tokens) = course.finished?;
    (tokens >= 2).then_some(at.seconds_since(course.first?) * 1e3 / f64::from(tokens.saturating_sub(1)))
}

fn e2e_ms(course: &Course) -> Option<f64> {
    Some(course.finished?.0.seconds_since(course.arrived) * 1e3)
}

fn max_over_mean(done: &[u64]) -> Option<f64> {
    let total: u64 = done.iter().sum();
    let most = done.iter().copied().max()?;
    (total > 0).then(|| most as f64 * done.len() as f64 / total as f64)
}

fn jain_of_tenants(trace: &Trace, courses: &[Course], good: impl Fn(&Course) -> bool) -> Option<f64> {
    let mut tenants: BTreeMap<u32, (f64, f64)> = BTreeMap::new();
    for (row, course) in trace.rows.iter().zip(courses) {
        let (within, all) = tenants.entry(row.tenant).or_default();
        *all += 1.0;
        *within += if good(course) { 1.0 } else { 0.0 };
    }
    if tenants.len() < 2 {
        return None;
    }
    let shares = tenants.values().map(|(within, all)| within / all);
    let (sum, squares) = shares.fold((0.0, 0.0), |(sum, squares), share| (sum + share, squares + share * share));
    // Nobody served well is nobody served worse than another.
    Some(if squares > 0.0 { sum * sum / (tenants.len() as f64 * squares) } else { 1.0 })
}

fn count(of: usize) -> u32 {
    u32::try_from(of).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let spread = Spread::of((1..=200).map(f64::from).rev().collect()).unwrap();
        assert_eq!(spread, Spread { mean: 100.5, p50: 100.0, p90: 180.0, p99: 198.0 });
        assert_eq!(Spread::of(vec![3.0]).unwrap(), Spread { mean: 3.0, p50: 3.0, p90: 3.0, p99: 3.0 });
        assert_eq!(Spread::of(Vec::new()), None);
    }

    #[test]
    fn the_busiest_worker_is_compared_with_the_mean() {
        for (done, expect) in [(vec![], None), (vec![0, 0], None), (vec![5, 5], Some(1.0)), (vec![8, 0], Some(2.0))] {
            assert_eq!(max_over_mean(&done), expect, "{done:?}");
        }
    }
}
