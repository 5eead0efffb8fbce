//! What a replay measured, in the figures and names of `forebay simulate` where a wire can tell them.

use std::collections::BTreeMap;
use std::time::Duration;

use forebay_scheduler::Tick;
use forebay_simulator::{Cell, Entry, Settings, Trace, What};
use serde::Serialize;
use tokio::time::Instant;

use super::call::{End, Outcome};
use crate::cli::figures::{Figures, Percentiles};
use crate::cli::table::Table;

/// The worker of an answer that names none.
const UNNAMED: &str = "(unnamed)";

/// What was replayed, and how.
#[derive(Serialize)]
pub(super) struct Plan {
    pub(super) trace: String,
    pub(super) url: String,
    pub(super) model: String,
    /// `text` or `token ids`.
    pub(super) prompts: &'static str,
    pub(super) rate: f64,
    pub(super) seed: u64,
    pub(super) jitter_ms: u64,
    pub(super) slo_ttft_ms: u64,
    pub(super) concurrency: usize,
}

/// One request of the trace, with its due time and what became of it.
pub(super) struct Replayed {
    pub(super) number: usize,
    pub(super) due: Instant,
    pub(super) outcome: Outcome,
}

/// `report.json`. Times are in milliseconds but where the name says otherwise.
#[derive(Serialize)]
pub(super) struct Report {
    #[serde(flatten)]
    plan: Plan,
    /// As those of `simulate`.
    cells: [Measured; 1],
    /// Answers by worker, where a gateway names it.
    workers: BTreeMap<String, u32>,
    /// How much later than due a request was sent, at worst.
    late_ms_max: f64,
    /// Requests that were due while as many as `concurrency` were under way.
    held_back: u32,
    /// Requests whose prompt the endpoint counts otherwise than the trace.
    prompt_tokens_off: u32,
    /// The first of each kind of bad end, in the endpoint's words.
    complaints: BTreeMap<&'static str, String>,
}

#[derive(Serialize)]
struct Measured {
    #[serde(flatten)]
    figures: Figures,
    seconds: f64,
}

impl Report {
    pub(super) fn of(plan: Plan, trace: &Trace, began: Instant, replayed: &[Replayed], held_back: u32) -> Self {
        let mut workers: BTreeMap<String, u32> = BTreeMap::new();
        for one in replayed.iter().filter(|one| one.outcome.end == End::Finished) {
            *workers.entry(one.outcome.worker.clone().unwrap_or_else(|| UNNAMED.to_owned())).or_default() += 1;
        }
        let names: Vec<&str> = workers.keys().map(String::as_str).collect();
        let mut log: Vec<Entry> = Vec::new();
        for one in replayed {
            log.extend(entries(one, trace, began, &names));
        }
        log.sort_by_key(|entry| entry.at);
        let settings = settings(&plan, names.len());
        let cell = Cell::of(&log, trace, &settings, ("wire", plan.seed), &[]);
        let late = replayed.iter().map(|one| one.outcome.sent.saturating_duration_since(one.due)).max();
        let counted = |one: &&Replayed| {
            let said = one.outcome.usage.map(|usage| usage.prompt_tokens);
            let meant = trace.rows.get(one.number).map(|row| u64::from(row.prompt_tokens.max(1)));
            said.is_some() && said != meant
        };
        Self {
            plan,
            cells: [Measured { figures: Figures::of(&cell), seconds: cell.virtual_seconds }],
            workers,
            late_ms_max: late.unwrap_or_default().as_secs_f64() * 1e3,
            held_back,
            prompt_tokens_off: u32::try_from(replayed.iter().filter(counted).count()).unwrap_or(u32::MAX),
            complaints: complaints(replayed),
        }
    }

    pub(super) fn json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// Whether any request was answered.
    pub(super) fn answered(&self) -> bool {
        !self.workers.is_empty()
    }

    /// The figures for a person.
    pub(super) fn text(&self) -> String {
        let [Measured { figures: cell, seconds }] = &self.cells;
        let Plan { trace, url, model, rate, slo_ttft_ms, .. } = &self.plan;
        let mut text = format!(
            "{trace} at rate {rate}, against `{model}` of {url}: {} requests in {seconds:.1} s\n\n",
            cell.requests
        );
        let mut table = Table::new().text("ms").number("mean").number("p50").number("p90").number("p99");
        for (name, spread) in [("ttft", cell.ttft_ms), ("tpot", cell.tpot_ms), ("e2e", cell.e2e_ms)] {
            let Some(Percentiles { mean, p50, p90, p99 }) = spread else { continue };
            let digits = usize::from(mean < 100.0);
            let figures = [mean, p50, p90, p99].map(|value| format!("{value:.digits$}"));
            table.row([vec![name.to_owned()], figures.to_vec()].concat());
        }
        if cell.e2e_ms.is_some() || cell.ttft_ms.is_some() {
            text += &(table.render(2) + "\n");
        }
        let ends =
            [("shed", cell.shed), ("timed out", cell.timed_out), ("refused", cell.refused), ("failed", cell.failed)];
        let ends = ends.map(|(name, count)| format!("{count} {name}")).join(", ");
        text += &format!("  {} completed, {ends}\n", cell.completed);
        text += &format!(
            "  first token within {:.1} s: {:.1}% of all, {:.2} requests/s completed so\n",
            *slo_ttft_ms as f64 / 1e3,
            cell.within_slo * 100.0,
            cell.goodput_rps
        );
        if let Some(hit) = cell.hit_ratio_tokens {
            text += &format!("  read from caches: {:.1}% of prompt tokens\n", hit * 100.0);
        }
        if self.workers.keys().any(|name| name != UNNAMED) {
            let each = self.workers.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>();
            text += &format!("  answers by worker: {}\n", each.join(", "));
        }
        text + &self.caveats()
    }

    /// What a reader of the figures must know.
    fn caveats(&self) -> String {
        let mut text = String::new();
        if self.held_back > 0 {
            text += &format!(
                "  note: {} requests were held back because {} were under way (--concurrency)\n",
                self.held_back, self.plan.concurrency
            );
        }
        if self.late_ms_max > 100.0 {
            text += &format!("  note: requests were sent up to {:.0} ms late\n", self.late_ms_max);
        }
        if self.prompt_tokens_off > 0 {
            text += &format!(
                "  note: the endpoint counts {} prompts otherwise than the trace; is --tokenizer the model's?\n",
                self.prompt_tokens_off
            );
        }
        for (end, words) in &self.complaints {
            text += &format!("  first {end}: {words}\n");
        }
        text
    }
}

/// What the wire told of a request, as the simulator would have logged it.
fn entries(one: &Replayed, trace: &Trace, began: Instant, workers: &[&str]) -> Vec<Entry> {
    let Some(row) = trace.rows.get(one.number) else { return Vec::new() };
    let outcome = &one.outcome;
    let worker = workers.iter().position(|name| *name == outcome.worker.as_deref().unwrap_or(UNNAMED));
    let worker = worker.and_then(|at| u32::try_from(at).ok()).unwrap_or(u32::MAX);
    let usage = outcome.usage.unwrap_or_default();
    let cached = usage.cached_tokens.unwrap_or(0).min(row.prompt_tokens.into());
    let cached_tokens = u32::try_from(cached).unwrap_or(row.prompt_tokens);
    let output_tokens = match usage.completion_tokens {
        0 => row.output_tokens,
        said => u32::try_from(said).unwrap_or(row.output_tokens),
    };
    let end = match outcome.end {
        End::Finished => What::Finished { worker, cached_tokens, output_tokens },
        End::Shed(_) => What::Shed,
        End::TimedOut(_) => What::TimedOut,
        End::Refused(_) => What::Refused,
        End::Failed(_) => What::Failed,
    };
    let first = outcome.first.map(|at| (at, What::FirstToken { worker, cached_tokens }));
    let all = [Some((one.due, What::Arrived)), first, Some((outcome.ended, end))].into_iter().flatten();
    let request = u32::try_from(one.number).unwrap_or(u32::MAX);
    let tick = |at: Instant| u64::try_from(at.saturating_duration_since(began).as_micros()).unwrap_or(u64::MAX);
    all.map(|(at, what)| Entry { at: Tick(tick(at)), request, what }).collect()
}

/// What of a simulation's settings the figures depend on.
fn settings(plan: &Plan, workers: usize) -> Settings {
    Settings {
        workers: u32::try_from(workers).unwrap_or(u32::MAX),
        rate: plan.rate,
        jitter: Duration::from_millis(plan.jitter_ms),
        slo_ttft: Duration::from_millis(plan.slo_ttft_ms),
        ..Settings::default()
    }
}

fn complaints(replayed: &[Replayed]) -> BTreeMap<&'static str, String> {
    let mut first = BTreeMap::new();
    for one in replayed {
        let (kind, words) = match &one.outcome.end {
            End::Finished => continue,
            End::Shed(words) => ("shed", words),
            End::TimedOut(words) => ("timed out", words),
            End::Refused(words) => ("refused", words),
            End::Failed(words) => ("failed", words),
        };
        first.entry(kind).or_insert_with(|| words.clone());
    }
    first
}
