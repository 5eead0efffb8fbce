//! Means over the seeds, and what they say about ours.

use crate::{Cell, Contest};

const OURS: &str = "forebay";
/// How far behind the best ours may be, as a share of the best.
const MEAN_SLACK: f64 = 0.02;
const SLO_SLACK: f64 = 0.02;
const P99_SLACK: f64 = 0.05;

/// Misses that are meant: trace, load, figure, reason. They are shown, and fail nothing.
const MEANT: [(&str, f64, &str, &str); 1] = [(
    "servegen-large-tenants-30min",
    1.1,
    "p99",
    "tenants take turns, so that in overload those wait that ask for most, where rivals let all wait",
)];

/// One policy in one contest: means over the seeds.
pub(crate) struct Standing<'a> {
    pub(crate) policy: &'a str,
    pub(crate) mean: f64,
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) within_slo: f64,
    pub(crate) hit_ratio: f64,
    pub(crate) preemptions: f64,
}

/// Ours against the best rival of each figure.
pub(crate) struct Verdict<'a> {
    contest: &'a Contest,
    pub(crate) standings: Vec<Standing<'a>>,
    pub(crate) mean: Against<'a>,
    pub(crate) p99: Against<'a>,
    pub(crate) within_slo: Against<'a>,
}

pub(crate) struct Against<'a> {
    pub(crate) rival: &'a str,
    pub(crate) best: f64,
    /// By which share of the best ours is worse; below 0 it is better.
    pub(crate) worse: f64,
    slack: f64,
}

impl Against<'_> {
    pub(crate) fn kept(&self) -> bool {
        self.worse <= self.slack
    }
}

impl Verdict<'_> {
    /// Whether every miss is meant.
    pub(crate) fn kept(&self) -> bool {
        self.missed().all(|(name, _)| self.reason(name).is_some())
    }

    fn missed(&self) -> impl Iterator<Item = (&'static str, &Against<'_>)> {
        let figures = [("mean", &self.mean), ("p99", &self.p99), ("SLO share", &self.within_slo)];
        figures.into_iter().filter(|(_, against)| !against.kept())
    }

    fn reason(&self, figure: &str) -> Option<&'static str> {
        let here = |(trace, load, _, _): &&(&str, f64, &str, &str)| {
            *trace == self.contest.trace && (load - self.contest.load).abs() < 1e-9
        };
        MEANT.iter().filter(here).find(|(_, _, name, _)| *name == figure).map(|(_, _, _, reason)| *reason)
    }

    /// As it stands in the table.
    pub(crate) fn words(&self) -> String {
        let missed: Vec<_> = self
            .missed()
            .map(|(name, against)| {
                let reason = self.reason(name).map(|reason| format!(" ({reason})")).unwrap_or_default();
                format!("{name} {:.1} % worse{reason}", against.worse * 100.0)
            })
            .collect();
        match missed.is_empty() {
            false => format!("**missed**: {}", missed.join(", ")),
            true if self.mean.worse <= 0.0 && self.within_slo.worse <= 0.0 && self.p99.worse <= 0.0 => {
                "first".to_owned()
            }
            true => "kept".to_owned(),
        }
    }
}

pub(crate) fn of(contest: &Contest) -> Verdict<'_> {
    let mut policies: Vec<&str> = Vec::new();
    for cell in &contest.cells {
        if !policies.contains(&cell.policy.as_str()) {
            policies.push(&cell.policy);
        }
    }
    let standings: Vec<_> = policies.into_iter().map(|policy| standing(contest, policy)).collect();
    Verdict {
        contest,
        mean: against(&standings, |standing| standing.mean, MEAN_SLACK),
        p99: against(&standings, |standing| standing.p99, P99_SLACK),
        // More is better here.
        within_slo: against(&standings, |standing| -standing.within_slo, SLO_SLACK),
        standings,
    }
}

fn standing<'a>(contest: &'a Contest, policy: &'a str) -> Standing<'a> {
    let mean = |figure: fn(&Cell) -> f64| {
        let seeds = || contest.cells.iter().filter(|cell| cell.policy == policy).map(figure);
        seeds().sum::<f64>() / seeds().count().max(1) as f64
    };
    Standing {
        policy,
        mean: mean(|cell| cell.ttft_ms.mean),
        p50: mean(|cell| cell.ttft_ms.p50),
        p99: mean(|cell| cell.ttft_ms.p99),
        within_slo: mean(|cell| cell.within_slo),
        hit_ratio: mean(|cell| cell.hit_ratio_tokens),
        preemptions: mean(|cell| cell.preemptions),
    }
}

/// Less is better.
fn against<'a>(standings: &[Standing<'a>], figure: fn(&Standing<'_>) -> f64, slack: f64) -> Against<'a> {
    let ours = standings.iter().find(|standing| standing.policy == OURS).map_or(f64::NAN, figure);
    let rivals = standings.iter().filter(|standing| standing.policy != OURS);
    let best = rivals.min_by(|a, b| figure(a).total_cmp(&figure(b)));
    let (rival, best) = best.map_or(("", f64::NAN), |best| (best.policy, figure(best)));
    let worse = if ours == best { 0.0 } else { (ours - best) / best.abs() };
    Against { rival, best: best.abs(), worse, slack }
}
