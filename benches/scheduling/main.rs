//! The scheduler beside its rivals on every trace there is: the table of `benches/README.md`, and whether ours keeps its
//! targets.
//!
//! Runs `forebay simulate` as a user would, reads its JSON, and judges each trace and load by the means over the seeds: ours
//! has to be first or within 2 % on mean TTFT and on the share within the SLO, and its 99th percentile at most 5 % above
//! the best. Nothing may be shed or lost in these cells. Time is virtual: the machine plays no part.
//!
//!     cargo bench --bench scheduling                 every shared trace; writes benches/README.md
//!     cargo bench --bench scheduling -- --quick      some of them, one minute; exit 1 when a target is missed

mod table;
mod verdict;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, ensure};
use clap::Parser;
use serde::Deserialize;

const WORKERS: &str = "8";
const LOADS: [f64; 3] = [0.30, 0.75, 1.10];
const SEEDS: [&str; 3] = ["1", "2", "3"];
/// Recorded in steps of 3 s; the other traces keep their arrivals.
const JITTERED: (&str, &str) = ("mooncake", "3000");
/// Shared traces of the quick part: one with prefixes of real conversations, one with real tenants.
const QUICK: [&str; 2] = ["mooncake-conversation-0-30min", "servegen-large-tenants-30min"];

#[derive(Parser)]
struct Arguments {
    /// Only the shipped trace and two shared ones; write nothing.
    #[arg(long)]
    quick: bool,
    /// Only traces whose name contains this; write nothing.
    #[arg(long)]
    only: Option<String>,
    /// What cargo adds.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What is read of a report.
#[derive(Deserialize)]
struct Report {
    cells: Vec<Cell>,
}

#[derive(Clone, Deserialize)]
struct Cell {
    policy: String,
    rate: f64,
    requests: u32,
    completed: u32,
    ttft_ms: Ttft,
    within_slo: f64,
    hit_ratio_tokens: f64,
    preemptions: f64,
}

#[derive(Clone, Deserialize)]
struct Ttft {
    mean: f64,
    p50: f64,
    p99: f64,
}

/// One trace at one load: a cell for each policy and seed.
struct Contest {
    trace: String,
    load: f64,
    rate: f64,
    cells: Vec<Cell>,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut contests = Vec::new();
    for trace in traces(root, &arguments)? {
        contests.extend(run(&trace)?);
    }
    let judged: Vec<_> = contests.iter().map(|contest| (contest, verdict::of(contest))).collect();
    let text = table::render(&judged);
    println!("{text}");
    if !arguments.quick && arguments.only.is_none() {
        table::write(&root.join("benches/README.md"), &text)?;
    }
    let missed = judged.iter().filter(|(_, verdict)| !verdict.kept()).count();
    println!("{missed} of {} contests miss a target", judged.len());
    Ok(if missed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The shipped trace, and the shared ones where they are.
fn traces(root: &Path, arguments: &Arguments) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = vec![root.join("tests/fixtures/traces/synthetic.jsonl.gz")];
    let shared = std::env::var_os("FOREBAY_SHARED_DIR").map_or_else(|| root.join("../shared"), PathBuf::from);
    let shared = shared.join("traces");
    match std::fs::read_dir(&shared) {
        Ok(entries) => {
            for entry in entries {
                found.push(entry.with_context(|| format!("cannot read `{}`", shared.display()))?.path());
            }
        }
        Err(_) => println!("skipped: {} not found", shared.display()),
    }
    let wanted = |path: &PathBuf| {
        let name = name_of(path);
        let quick = !arguments.quick || name == "synthetic" || QUICK.contains(&name.as_str());
        let only = arguments.only.as_ref().is_none_or(|only| name.contains(only));
        path.to_string_lossy().ends_with(".jsonl.gz") && quick && only
    };
    found.retain(wanted);
    found.sort();
    Ok(found)
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().trim_end_matches(".jsonl.gz").to_owned()
}

fn run(trace: &Path) -> anyhow::Result<Vec<Contest>> {
    let name = name_of(trace);
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    command.args(["simulate", "--json", "--workers", WORKERS, "--trace"]).arg(trace);
    command.args(["--load", &LOADS.map(|load| load.to_string()).join(",")]);
    command.args(SEEDS.iter().flat_map(|seed| ["--seed", seed]));
    if name.starts_with(JITTERED.0) {
        command.args(["--jitter-ms", JITTERED.1]);
    }
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    ensure!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    let report: Report = serde_json::from_slice(&output.stdout).with_context(|| format!("{name}: not a report"))?;
    for Cell { policy, requests, completed, .. } in &report.cells {
        ensure!(requests == completed, "{name}: {policy} completed {completed} of {requests} requests");
    }
    let contests = report.cells.chunk_by(|a, b| a.rate == b.rate);
    Ok(contests
        .zip(LOADS)
        .map(|(cells, load)| Contest {
            trace: name.clone(),
            load,
            rate: cells.first().map_or(0.0, |cell| cell.rate),
            cells: cells.to_vec(),
        })
        .collect())
}
