//! `forebay simulate`: a trace through the scheduler and its rivals in virtual time.
//!
//! Reading the trace, spreading cells over threads, and writing what came out live here; what happens in a cell is
//! `forebay-simulator`'s. Cells are independent, and what is written does not depend on which was done first.

mod events;
mod fault;
mod plot;
mod report;
mod table;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use forebay_scheduler::Config;
use forebay_simulator::{Cell, EngineConfig, Fault, Offered, Outcome, Policy, Settings, Trace};
use parking_lot::Mutex;

use super::{WRONG_USE, WrongUse, positive, trace};

/// Replay a trace through the scheduler, and through its rivals, in virtual time.
///
/// The trace has one JSON object a line, plain or gzip: t_ms, in_tokens, out_tokens, and optionally hash_ids (chained ids
/// of the prompt's blocks), tenant and class (interactive, default, batch). No policy sees out_tokens before the end.
/// Equal arguments give equal output, byte for byte; so decisions are timed only when asked for.
///
/// Load is the offered work over the fleet's capacity. The work of a request, in seconds of one engine:
/// uncached_tokens / prefill_tokens_per_s + out_tokens * (step_ms_per_seq + step_ms / B) / 1000, where uncached tokens
/// are counted against one infinite cache and B is the batch an engine can hold at the trace's mean context.
///
/// Example: forebay simulate --trace tests/fixtures/traces/synthetic.jsonl.gz --workers 4 --load 0.75 --report out
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The trace.
    #[arg(long)]
    trace: PathBuf,
    /// Simulated engines.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    workers: u32,
    /// Policy to run; may be repeated [default: all].
    #[arg(long, value_parser = policy)]
    policy: Vec<Policy>,
    /// Divide arrival times by this; several with commas [default: 1].
    #[arg(long, value_delimiter = ',', value_parser = positive, conflicts_with = "load")]
    rate: Vec<f64>,
    /// Scale arrivals so that the offered work is this share of the fleet's capacity; several with commas.
    #[arg(long, value_delimiter = ',', value_parser = positive)]
    load: Vec<f64>,
    /// Seed of jitter, polls and ties; may be repeated [default: 0].
    #[arg(long)]
    seed: Vec<u64>,
    /// Directory for report.json and plots.
    #[arg(long)]
    report: Option<PathBuf>,
    /// Write one JSONL file of events per cell too.
    #[arg(long, requires = "report")]
    events: bool,
    /// Print the report as JSON in place of the table.
    #[arg(long)]
    json: bool,
    /// Spread arrivals that share a moment at random over so many milliseconds, before the rate applies.
    #[arg(long, default_value_t = 0)]
    jitter_ms: u64,
    /// Longest time to first token that counts as good.
    #[arg(long, default_value_t = 2000)]
    slo_ttft_ms: u64,
    /// Keep the bounds and the time-out of the scheduler's queue; the rivals have no queue and never shed.
    #[arg(long)]
    shed: bool,
    /// Measure decisions by the wall clock; such reports differ from run to run.
    #[arg(long)]
    time_decisions: bool,
    /// Speeds of the workers against the engine model, over and over, as in 1.5,0.5.
    #[arg(long, value_delimiter = ',', value_parser = positive)]
    speed: Vec<f64>,
    /// Something that goes wrong, as crash@SECONDS:WORKER[:SECONDS] or slow=FACTOR@…; may be repeated.
    #[arg(long, value_parser = fault::parse)]
    fault: Vec<Fault>,
    /// Prompt tokens computed a second.
    #[arg(long, default_value_t = EngineConfig::default().prefill_tokens_per_s, value_parser = positive)]
    prefill_tokens_per_s: f64,
    /// Milliseconds of every step.
    #[arg(long, default_value_t = EngineConfig::default().step_ms, value_parser = positive)]
    step_ms: f64,
    /// Milliseconds that each decoding sequence adds to a step.
    #[arg(long, default_value_t = EngineConfig::default().step_ms_per_seq, value_parser = positive)]
    step_ms_per_seq: f64,
    /// KV memory in blocks of --block-tokens.
    #[arg(long, default_value_t = EngineConfig::default().kv_blocks, value_parser = clap::value_parser!(u32).range(1..))]
    kv_blocks: u32,
    /// Tokens in a KV block; a trace with larger blocks keeps its own, and the KV memory its size in tokens.
    #[arg(long, default_value_t = EngineConfig::default().block_tokens, value_parser = clap::value_parser!(u32).range(1..))]
    block_tokens: u32,
    /// Sequences that run at once.
    #[arg(long, default_value_t = EngineConfig::default().max_batch, value_parser = clap::value_parser!(u32).range(1..))]
    max_batch: u32,
    /// Tokens that one step computes.
    #[arg(long, default_value_t = EngineConfig::default().step_token_budget, value_parser = clap::value_parser!(u32).range(1..))]
    step_token_budget: u32,
}

/// One cell to run.
struct Task {
    settings: Settings,
    policy: Policy,
    seed: u64,
}

pub(super) fn run(arguments: &Arguments) -> ExitCode {
    match simulate(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<WrongUse>() => {
            eprintln!("forebay: {error}");
            ExitCode::from(WRONG_USE)
        }
        Err(error) => {
            eprintln!("forebay: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn simulate(arguments: &Arguments) -> anyhow::Result<()> {
    let trace = trace::read(&arguments.trace, arguments.block_tokens)?;
    let settings = arguments.settings(&trace);
    if let Some(fault) = settings.faults.iter().find(|fault| fault.worker >= settings.workers) {
        return Err(WrongUse(format!(
            "--fault: there is no worker {}, the last is {}",
            fault.worker,
            settings.workers - 1
        ))
        .into());
    }
    let offered = Offered::of(&trace, &settings);
    let tasks = arguments.tasks(&settings, &offered)?;
    if let Some(directory) = &arguments.report {
        std::fs::create_dir_all(directory).with_context(|| format!("cannot make `{}`", directory.display()))?;
    }
    let name = arguments.trace.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let outcomes = run_all(&trace, &tasks);
    let cells = outcomes.iter().map(|outcome| &outcome.cell);
    let report = report::render(&name, &settings, &offered, cells.clone())?;
    if arguments.json {
        say!("{report}");
    } else {
        table::print(&name, &settings, &offered, cells);
    }
    if let Some(directory) = &arguments.report {
        write(&directory.join("report.json"), &report)?;
        draw(directory, &name, &tasks, &outcomes)?;
        if arguments.events {
            for outcome in &outcomes {
                let cell = &outcome.cell;
                let path = directory.join(format!("events-{}-{}-{}.jsonl", cell.policy, cell.rate, cell.seed));
                write_events(&path, &trace, outcome)?;
            }
        }
    }
    let cells = outcomes.iter().map(|outcome| &outcome.cell);
    if let Some(cell) = cells.clone().next().filter(|_| cells.clone().all(|cell| cell.completed == 0)) {
        let Cell { requests, refused, shed, timed_out, failed, .. } = cell;
        bail!(
            "no request was answered: of {requests}, {refused} fit no engine, {shed} were shed, {timed_out} timed out, \
             {failed} failed"
        );
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write `{}`", path.display()))
}

fn write_events(path: &Path, trace: &Trace, outcome: &Outcome) -> anyhow::Result<()> {
    let whole = || -> std::io::Result<()> {
        let mut file = BufWriter::new(File::create(path)?);
        events::write(&mut file, trace, &outcome.log)?;
        file.flush()
    };
    whole().with_context(|| format!("cannot write `{}`", path.display()))
}

/// Three pictures a rate.
fn draw(directory: &Path, trace: &str, tasks: &[Task], outcomes: &[Outcome]) -> anyhow::Result<()> {
    let mut pairs = tasks.iter().zip(outcomes).peekable();
    while let Some((task, first)) = pairs.next() {
        let rate = task.settings.rate;
        let mut same = vec![first];
        while let Some((_, outcome)) = pairs.next_if(|(task, _)| task.settings.rate == rate) {
            same.push(outcome);
        }
        let load = first.cell.load.map_or(String::new(), |load| format!("load {load:.2}, "));
        let title = format!("{trace}, {} workers, {load}rate {rate}", task.settings.workers);
        let group = plot::Group { title, settings: &task.settings, outcomes: same };
        write(&directory.join(format!("ttft-{rate}.svg")), &plot::ttft(&group))?;
        write(&directory.join(format!("summary-{rate}.svg")), &plot::summary(&group))?;
        write(&directory.join(format!("waiting-{rate}.svg")), &plot::waiting(&group))?;
    }
    Ok(())
}

impl Arguments {
    fn settings(&self, trace: &Trace) -> Settings {
        let kv_tokens = u64::from(self.kv_blocks) * u64::from(self.block_tokens);
        Settings {
            workers: self.workers,
            engine: EngineConfig {
                prefill_tokens_per_s: self.prefill_tokens_per_s,
                step_ms: self.step_ms,
                step_ms_per_seq: self.step_ms_per_seq,
                kv_blocks: u32::try_from(kv_tokens / u64::from(trace.block_tokens)).unwrap_or(u32::MAX),
                block_tokens: trace.block_tokens,
                max_batch: self.max_batch,
                step_token_budget: self.step_token_budget,
                caches_late: false,
            },
            speeds: self.speed.clone(),
            rate: 1.0,
            jitter: Duration::from_millis(self.jitter_ms),
            slo_ttft: Duration::from_millis(self.slo_ttft_ms),
            shed: self.shed,
            scheduler: Config::default(),
            tenant_weights: Vec::new(),
            whole_answers: false,
            faults: self.fault.clone(),
            stopwatch: self.time_decisions.then_some(stopwatch),
        }
    }

    /// Cells in the order of the report: rates, then seeds, then policies.
    fn tasks(&self, settings: &Settings, offered: &Offered) -> anyhow::Result<Vec<Task>> {
        let rates = match (self.load.as_slice(), self.rate.as_slice()) {
            ([], []) => vec![1.0],
            ([], rates) => rates.to_vec(),
            (loads, _) => loads.iter().map(|load| round(offered.rate_for(settings, *load))).collect(),
        };
        if rates.iter().any(|rate| *rate <= 0.0 || !rate.is_finite()) {
            return Err(WrongUse(
                "--load: the requests of this trace arrive all at once, so no rate gives a load".into(),
            )
            .into());
        }
        let seeds = if self.seed.is_empty() { &[0] } else { self.seed.as_slice() };
        let policies = if self.policy.is_empty() { Policy::all() } else { self.policy.as_slice() };
        let mut tasks = Vec::new();
        for rate in rates {
            for seed in seeds {
                for policy in policies {
                    let settings = Settings { rate, ..settings.clone() };
                    tasks.push(Task { settings, policy: *policy, seed: *seed });
                }
            }
        }
        Ok(tasks)
    }
}

/// To four significant digits, so that what stands in names and titles is the rate itself.
fn round(rate: f64) -> f64 {
    let unit = 10_f64.powf(rate.log10().floor() - 3.0);
    let rounded = (rate / unit).round() * unit;
    // The shortest text of the product may have digits of its error.
    format!("{rounded:.9}").parse().ok().filter(|rate| *rate > 0.0).unwrap_or(rate)
}

/// Runs the cells on all cores; their order stays.
fn run_all(trace: &Trace, tasks: &[Task]) -> Vec<Outcome> {
    let done = Mutex::new(Vec::with_capacity(tasks.len()));
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get).min(tasks.len());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((at, task)) =
                    Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|at| Some((at, tasks.get(at)?)))
                {
                    let outcome = forebay_simulator::run(trace, &task.settings, task.policy, task.seed);
                    done.lock().push((at, outcome));
                }
            });
        }
    });
    let mut done = done.into_inner();
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, outcome)| outcome).collect()
}

/// Time since the first call.
fn stopwatch() -> Duration {
    static BEGAN: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    BEGAN.get_or_init(std::time::Instant::now).elapsed()
}

fn policy(name: &str) -> Result<Policy, String> {
    Policy::by_name(name).ok_or_else(|| {
        let names: Vec<_> = Policy::all().iter().map(Policy::name).collect();
        format!("there are {}", names.join(", "))
    })
}
