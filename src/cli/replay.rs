//! `forebay replay`: a trace against a live endpoint, in real time.
//!
//! Arrivals are those of the trace whatever the endpoint does (an open loop): a request is sent when it is due, also
//! while others wait, and its times count from then. Only a bound on what is under way at once holds requests back, and
//! that is said.

mod call;
mod prompts;
mod report;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use forebay_backends::transport::{Channel, Endpoint, Timeouts, Transport};
use forebay_scheduler::Class;
use forebay_simulator::Trace;
use secrecy::SecretString;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use url::Url;

use self::prompts::Prompts;
use self::report::{Plan, Replayed, Report};
use super::{WrongUse, positive, trace};

/// The key of the endpoint, by the name that OpenAI's SDKs read.
const KEY_VARIABLE: &str = "OPENAI_API_KEY";
/// Requests that are made ready before they are due.
const READY_MAX: usize = 64;
/// How often progress is told.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);
/// Block size of a trace without ids; its prompts share nothing, so that it means nothing.
const BLOCK_TOKENS: u32 = 16;

/// Replay a trace against a live OpenAI endpoint in real time.
///
/// Requests go to /v1/completions when they are due, whatever became of the ones before; times to first token and to the
/// end count from then. Prompts with equal hash_ids have equal tokens. With --tokenizer they are text of exactly in_tokens
/// tokens; without it they are token ids, which vLLM, SGLang and TensorRT-LLM take. Each asks for out_tokens tokens
/// with ignore_eos. A key is taken from OPENAI_API_KEY.
///
/// Example: forebay replay --trace tests/fixtures/traces/synthetic.jsonl.gz --url http://127.0.0.1:7070 --model demo
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The trace, as for simulate.
    #[arg(long)]
    trace: PathBuf,
    /// The endpoint, with or without /v1.
    #[arg(long)]
    url: Url,
    /// The model's name there.
    #[arg(long)]
    model: String,
    /// Directory with the model's tokenizer.json.
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// Divide arrival times by this.
    #[arg(long, default_value_t = 1.0, value_parser = positive)]
    rate: f64,
    /// Seed of the jitter.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Spread arrivals that share a moment at random over so many milliseconds, before the rate applies.
    #[arg(long, default_value_t = 0)]
    jitter_ms: u64,
    /// Replay only the first so many rows.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rows: Option<u32>,
    /// Requests under way at once; one more is held back, and counted.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    concurrency: u32,
    /// Longest time to first token that counts as good.
    #[arg(long, default_value_t = 2000)]
    slo_ttft_ms: u64,
    /// Directory for report.json.
    #[arg(long)]
    report: Option<PathBuf>,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let channel = channel(&arguments.url)?;
    let mut trace = trace::read(&arguments.trace, BLOCK_TOKENS)?;
    trace.rows.truncate(arguments.rows.map_or(usize::MAX, |rows| rows as usize));
    let prompts = Prompts::new(arguments.tokenizer.as_deref())?;
    if let Some(directory) = &arguments.report {
        std::fs::create_dir_all(directory).with_context(|| format!("cannot make `{}`", directory.display()))?;
    }
    let plan = arguments.plan(&prompts, &channel);
    let (trace, held) = (Arc::new(trace), Held::new(arguments.concurrency as usize));
    let arrivals = trace.arrivals(plan.rate, Duration::from_millis(plan.jitter_ms), plan.seed);
    let ready = make_ready(Arc::clone(&trace), prompts, arguments.model.clone());
    let began = Instant::now();
    let (replayed, held_back) = replay(&channel, &arrivals, ready, began, &held).await?;
    let report = Report::of(plan, &trace, began, &replayed, held_back);
    let json = report.json()?;
    if arguments.json {
        say!("{}", json.trim_end());
    } else {
        say!("{}", report.text().trim_end());
    }
    if let Some(directory) = &arguments.report {
        write(&directory.join("report.json"), &json)?;
    }
    anyhow::ensure!(report.answered(), "no request was answered");
    Ok(())
}

impl Arguments {
    fn plan(&self, prompts: &Prompts, channel: &Channel) -> Plan {
        Plan {
            trace: self.trace.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            url: channel.endpoint().to_string(),
            model: self.model.clone(),
            prompts: prompts.name(),
            rate: self.rate,
            seed: self.seed,
            jitter_ms: self.jitter_ms,
            slo_ttft_ms: self.slo_ttft_ms,
            concurrency: self.concurrency as usize,
        }
    }
}

fn channel(url: &Url) -> anyhow::Result<Channel> {
    let key = std::env::var(KEY_VARIABLE).ok().filter(|key| !key.is_empty()).map(SecretString::from);
    let endpoint = Endpoint::new(url, key.as_ref()).map_err(|error| WrongUse(format!("--url {url}: {error}")))?;
    // How long an answer may take is the endpoint's to decide; what it does is what is measured.
    let timeouts = Timeouts { first_byte: None, idle: Duration::from_secs(600), ..Timeouts::default() };
    Ok(Transport::new(TaskTracker::new()).channel(endpoint, timeouts))
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write `{}`", path.display()))
}

/// A request that waits for its time.
struct Ready {
    class: Class,
    body: Bytes,
}

/// Makes the requests in their order, some ahead of their time, on a thread of its own.
fn make_ready(trace: Arc<Trace>, prompts: Prompts, model: String) -> mpsc::Receiver<anyhow::Result<Ready>> {
    let (sender, ready) = mpsc::channel(READY_MAX);
    tokio::task::spawn_blocking(move || {
        for (number, row) in trace.rows.iter().enumerate() {
            let body =
                prompts.of(&trace, number, row).and_then(|prompt| call::body(&model, &prompt, row.output_tokens));
            if sender.blocking_send(body.map(|body| Ready { class: row.class, body })).is_err() {
                return; // nobody replays any more
            }
        }
    });
    ready
}

/// The bound on what is under way.
struct Held {
    permits: Arc<Semaphore>,
    most: usize,
}

impl Held {
    fn new(most: usize) -> Self {
        Self { permits: Arc::new(Semaphore::new(most)), most }
    }

    fn under_way(&self) -> usize {
        self.most.saturating_sub(self.permits.available_permits())
    }
}

/// Sends every request when it is due and waits for all ends. Also tells how many were held back.
async fn replay(
    channel: &Channel,
    arrivals: &[Duration],
    mut ready: mpsc::Receiver<anyhow::Result<Ready>>,
    began: Instant,
    held: &Held,
) -> anyhow::Result<(Vec<Replayed>, u32)> {
    let mut calls = JoinSet::new();
    let mut held_back = 0;
    let mut told = began;
    for (number, after) in arrivals.iter().enumerate() {
        let Some(next) = ready.recv().await else { break };
        let Ready { class, body } = next?;
        let due = began + *after;
        tokio::time::sleep_until(due).await;
        let permit = match Arc::clone(&held.permits).try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => {
                if held_back == 0 {
                    eprintln!(
                        "{:.1} s: {} requests are under way, the next is held back",
                        after.as_secs_f64(),
                        held.most
                    );
                }
                held_back += 1;
                Arc::clone(&held.permits).acquire_owned().await?
            }
        };
        let channel = channel.clone();
        calls.spawn(async move {
            let _permit = permit;
            Replayed { number, due, outcome: call::call(&channel, body, class).await }
        });
        if told.elapsed() >= PROGRESS_INTERVAL {
            told = Instant::now();
            let (seconds, all) = (began.elapsed().as_secs_f64(), arrivals.len());
            eprintln!("{seconds:.0} s: {} of {all} sent, {} under way", number + 1, held.under_way());
        }
    }
    let mut replayed = calls.join_all().await;
    replayed.sort_by_key(|one| one.number);
    Ok((replayed, held_back))
}
