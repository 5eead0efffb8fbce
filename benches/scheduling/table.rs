//! The tables in Markdown, and their place in `benches/README.md`.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context;

use crate::Contest;
use crate::verdict::{Against, Verdict};

const BEGIN: &str = "<!-- scheduling: written by cargo bench --bench scheduling -->";
const END: &str = "<!-- scheduling: end -->";

pub(crate) fn render(judged: &[(&Contest, Verdict<'_>)]) -> String {
    let mut text = String::from(
        "| trace | load (rate) | mean TTFT ms | best rival | p99 ms | best rival | within SLO | best rival | verdict |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    for (contest, verdict) in judged {
        let Some(ours) = verdict.standings.first() else { continue };
        let ms = |against: &Against<'_>| format!("{:.0} {}", against.best, against.rival);
        let _ = writeln!(
            text,
            "| {} | {:.2} ({}) | {:.0} | {} | {:.0} | {} | {:.1} % | {:.1} % {} | {} |",
            contest.trace,
            contest.load,
            contest.rate,
            ours.mean,
            ms(&verdict.mean),
            ours.p99,
            ms(&verdict.p99),
            ours.within_slo * 100.0,
            verdict.within_slo.best * 100.0,
            verdict.within_slo.rival,
            verdict.words(),
        );
    }
    text.push_str(
        "\n<details><summary>All policies</summary>\n\n\
         | trace | load | policy | mean TTFT ms | p50 | p99 | within SLO | hit ratio | preemptions |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    for (contest, verdict) in judged {
        for standing in &verdict.standings {
            let _ = writeln!(
                text,
                "| {} | {:.2} | {} | {:.0} | {:.0} | {:.0} | {:.1} % | {:.1} % | {:.0} |",
                contest.trace,
                contest.load,
                standing.policy,
                standing.mean,
                standing.p50,
                standing.p99,
                standing.within_slo * 100.0,
                standing.hit_ratio * 100.0,
                standing.preemptions,
            );
        }
    }
    text.push_str("\n</details>\n");
    text
}

/// Puts the tables between their markers.
pub(crate) fn write(path: &Path, tables: &str) -> anyhow::Result<()> {
    let name = path.display();
    let page = std::fs::read_to_string(path).with_context(|| format!("cannot read `{name}`"))?;
    let (before, rest) = page.split_once(BEGIN).with_context(|| format!("`{name}` has no line `{BEGIN}`"))?;
    let (_, after) = rest.split_once(END).with_context(|| format!("`{name}` has no line `{END}`"))?;
    let page = format!("{before}{BEGIN}\n{tables}{END}{after}");
    std::fs::write(path, page).with_context(|| format!("cannot write `{name}`"))
}
