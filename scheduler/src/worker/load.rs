//! What the engine says of its load, corrected by what we know better.
//!
//! "The engine says" and "we promised" are never one field: our own counters are exact and come first; the report adds
//! what is there beyond them (requests that came past us, KV that outgrew its reservation). A report too old to use
//! leaves our counters alone, with a margin, and neither "full" nor "idle" is concluded from its absence.

use std::time::Duration;

use crate::{LoadReport, Tick};

/// How much more than ours a worker is assumed to hold when its reports stopped coming.
const UNREPORTED_MARGIN: f64 = 1.3;

#[derive(Debug, Default)]
pub(crate) struct Reported {
    last: Option<Report>,
    /// It has reported at some time.
    reports: bool,
}

#[derive(Debug, Clone, Copy)]
struct Report {
    at: Tick,
    load: LoadReport,
    /// Sequences there that are not ours, when the report came.
    foreign: u32,
    /// KV tokens in use beyond our own account when the report came; below 0 where prompts share blocks.
    kv_beyond: f64,
}

/// What holds now of what an engine said.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Said {
    /// It reported of late.
    pub(crate) fresh: bool,
    pub(crate) foreign: Option<Foreign>,
    /// Share of the KV cache in use when that was read, and the KV tokens beyond our own account.
    pub(crate) kv: Option<(f64, f64)>,
    /// By how much to mistrust our own counters.
    pub(crate) margin: f64,
}

/// What a report adds to our own counters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Foreign {
    /// Sequences that run there and are not ours.
    pub(crate) running: u32,
    /// Requests in the engine's queue that are not ours.
    pub(crate) waiting: u32,
    /// Age of this knowledge in seconds.
    pub(crate) age: f64,
}

impl Reported {
    /// `held` KV tokens should be in a cache of `capacity` by our account.
    pub(crate) fn observe(
        &mut self,
        now: Tick,
        load: LoadReport,
        sequences: u64,
        (held, capacity): (f64, Option<u64>),
    ) {
        let ours = u32::try_from(sequences).unwrap_or(u32::MAX);
        let foreign = load.running.saturating_add(load.waiting).saturating_sub(ours);
        let kv_usage = load.kv_usage.filter(|usage| usage.is_finite()).map(|usage| usage.clamp(0.0, 1.0));
        let used = kv_usage.zip(capacity).map(|(usage, capacity)| usage * capacity as f64);
        let kv_beyond = used.map_or(0.0, |used| used - held);
        self.last = Some(Report { at: now, load: LoadReport { kv_usage, ..load }, foreign, kv_beyond });
        self.reports = true;
    }

    pub(crate) fn lost(&mut self) {
        self.last = None;
    }

    /// The last report and its moment, as long as it can be used.
    pub(crate) fn fresh(&self, now: Tick, ttl: Duration) -> Option<(Tick, LoadReport)> {
        self.usable(now, ttl).map(|report| (report.at, report.load))
    }

    pub(crate) fn said(&self, now: Tick, ttl: Duration) -> Said {
        let Some(report) = self.usable(now, ttl) else {
            let margin = if self.reports { UNREPORTED_MARGIN } else { 1.0 };
            return Said { fresh: false, foreign: None, kv: None, margin };
        };
        // what waits is the youngest; ours are taken to run first
        let waiting = report.foreign.min(report.load.waiting);
        let foreign = Foreign { running: report.foreign - waiting, waiting, age: now.seconds_since(report.at) };
        Said {
            fresh: true,
            foreign: (report.foreign > 0).then_some(foreign),
            kv: report.load.kv_usage.map(|usage| (usage, report.kv_beyond)),
            margin: 1.0,
        }
    }

    fn usable(&self, now: Tick, ttl: Duration) -> Option<&Report> {
        self.last.as_ref().filter(|report| now.since(report.at) < ttl)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(15);

    fn load(running: u32, waiting: u32, kv_usage: f64) -> LoadReport {
        LoadReport { running, waiting, kv_usage: Some(kv_usage) }
    }

    #[test]
    fn only_what_is_beyond_ours_is_foreign() {
        for (running, waiting, ours, expect) in [
            (4, 0, 4, None),
            (4, 2, 9, None),
            (4, 2, 5, Some((0, 1))),
            (4, 2, 0, Some((4, 2))),
            (9, 1, 2, Some((7, 1))),
            (u32::MAX, u32::MAX, 0, Some((0, u32::MAX))),
        ] {
            let mut reported = Reported::default();
            reported.observe(Tick(0), load(running, waiting, 0.0), ours, (0.0, None));
            let foreign = reported.said(Tick(0), TTL).foreign.map(|f| (f.running, f.waiting));
            assert_eq!(foreign, expect, "{running} {waiting} {ours}");
        }
    }

    #[test]
    fn the_cache_is_known_beside_our_own_account_of_it() {
        let mut reported = Reported::default();
        reported.observe(Tick(0), load(1, 0, 0.5), 1, (300.0, Some(1000)));
        assert_eq!(reported.said(Tick(1), TTL).kv, Some((0.5, 200.0)));
        reported.observe(Tick(1), load(1, 0, 0.25), 1, (300.0, Some(1000)));
        assert_eq!(reported.said(Tick(1), TTL).kv, Some((0.25, -50.0)));
        reported.observe(Tick(2), load(1, 0, f64::NAN), 1, (300.0, Some(1000)));
        assert_eq!(reported.said(Tick(2), TTL).kv, None);
    }

    #[test]
    fn a_report_is_a_lease() {
        let mut reported = Reported::default();
        assert_eq!(reported.said(Tick(0), TTL).margin, 1.0, "never reported: nothing is missing");
        reported.observe(Tick(0), load(99, 99, 1.0), 0, (0.0, None));
        assert_eq!(reported.said(Tick(0), TTL).margin, 1.0);
        let later = Tick(0).after(TTL);
        assert_eq!((reported.said(later, TTL).foreign, reported.said(later, TTL).kv), (None, None));
        assert_eq!(reported.said(later, TTL).margin, UNREPORTED_MARGIN);
        reported.observe(Tick(1), load(0, 0, 0.0), 0, (0.0, None));
        reported.lost();
        assert_eq!(reported.said(Tick(1), TTL).margin, UNREPORTED_MARGIN);
    }
}
