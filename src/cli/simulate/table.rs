//! The figures on the terminal: one line a cell.

use forebay_simulator::{Cell, Offered, Settings, Spread};

pub(super) fn print<'a>(trace: &str, settings: &Settings, offered: &Offered, cells: impl Iterator<Item = &'a Cell>) {
    say!(
        "{trace}: {:.0} engine-seconds of work in {:.0} s ({} of {} prompt tokens uncached at best, {} output tokens, batch {:.0}); {} workers",
        offered.engine_seconds,
        offered.span_seconds,
        offered.uncached_tokens,
        offered.prompt_tokens,
        offered.output_tokens,
        offered.batch,
        settings.workers,
    );
    let (mut last, mut refused) = (None, 0);
    for cell in cells {
        let group = (cell.rate, cell.seed);
        if last.replace(group) != Some(group) {
            heading(cell, settings);
        }
        line(cell);
        refused = refused.max(cell.refused);
    }
    if refused > 0 {
        say!("\n{refused} requests fit no engine's KV memory and were refused, whatever the policy.");
    }
}

fn heading(cell: &Cell, settings: &Settings) {
    let load = cell.load.map_or("-".to_owned(), |load| format!("{load:.2}"));
    say!("\nload {load} (rate {:.3}), seed {}", cell.rate, cell.seed);
    say!(
        "{:<16} {:>8} {:>8} {:>8} {:>8} {:>7} {:>8} {:>6} {:>7} {:>6} {:>8} {:>6}",
        "policy",
        "ttft ms",
        "p50",
        "p90",
        "p99",
        format!("<={:.1}s", settings.slo_ttft.as_secs_f64()),
        "tpot ms",
        "hit",
        "preempt",
        "max/mn",
        "done",
        "lost"
    );
}

fn line(cell: &Cell) {
    let ttft = |part: fn(&Spread) -> f64| {
        cell.ttft_ms.as_ref().map_or("-".to_owned(), |spread| format!("{:.0}", part(spread)))
    };
    let optional =
        |value: Option<f64>, digits: usize| value.map_or("-".to_owned(), |value| format!("{value:.digits$}"));
    say!(
        "{:<16} {:>8} {:>8} {:>8} {:>8} {:>6.1}% {:>8} {:>6} {:>7} {:>6} {:>8} {:>6}",
        cell.policy,
        ttft(|spread| spread.mean),
        ttft(|spread| spread.p50),
        ttft(|spread| spread.p90),
        ttft(|spread| spread.p99),
        cell.within_slo * 100.0,
        optional(cell.tpot_ms.map(|spread| spread.mean), 1),
        optional(cell.hit_ratio_tokens.map(|ratio| ratio * 100.0), 1),
        cell.preemptions,
        optional(cell.load_max_over_mean, 2),
        cell.completed,
        cell.shed + cell.timed_out + cell.refused + cell.failed,
    );
}
