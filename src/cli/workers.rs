//! `forebay workers`: the workers of a running gateway, changes of them, and why a request went where it went.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use http::Method;
use serde_json::{Map, Value};

use super::WrongUse;
use super::ops::{Access, Ops};
use super::table::{Table, compact, shortened};
use crate::admin::wire::{Candidate, Decision, Explained, Gpu, Join, Worker, Workers};

/// Between two looks with --watch.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// Longest name of a worker in a table, so that eighty columns suffice.
const NAME_CHARS_MAX: usize = 24;
/// Moves the cursor to the upper left corner and clears what follows.
const CLEAR: &str = "\x1b[H\x1b[J";

/// Show or change the workers of a running gateway, or show why a request went where it went.
///
/// SENT are requests at the worker, LANE such that wait for it here; PROMISED are prompt tokens it still has to compute,
/// PREFILL is its speed in tokens a second (~ as long as it is a guess); RUN and WAIT are what the engine says itself.
/// Where its GPUs are known: UTIL, MEM and TEMP are the most that one of them shows (! while one is throttled or fails),
/// SHARE is the part of their time that others leave it.
///
/// Example: forebay workers --watch
///
/// Example: forebay workers --decision req_0123456789abcdef000000000001
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    access: Access,
    /// Print the gateway's answer as JSON.
    #[arg(long, global = true)]
    json: bool,
    /// Show how this request was placed: every candidate with each term of its score. The id is that of the answer's
    /// x-request-id header.
    #[arg(long, value_name = "REQUEST_ID")]
    decision: Option<String>,
    /// Look again every second until interrupted.
    #[arg(long, conflicts_with = "decision")]
    watch: bool,
    #[command(subcommand)]
    change: Option<Change>,
}

#[derive(Debug, clap::Subcommand)]
enum Change {
    /// Let a worker join a model; the gateway keeps it over restarts.
    ///
    /// Example: forebay workers add llama-3.1-8b http://gpu-c:8000 --name c engine=vllm
    Add {
        /// The model's configured name.
        model: String,
        /// The worker's address.
        address: String,
        /// Its name [default: host:port].
        #[arg(long)]
        name: Option<String>,
        /// Other keys of `[[model.worker]]`, as in engine=vllm; what is not JSON is a string.
        #[arg(value_name = "KEY=VALUE", value_parser = key_value)]
        keys: Vec<(String, Value)>,
    },
    /// Send nothing new to a worker; what it has goes on. Until the gateway ends, or it resumes.
    Drain { name: String },
    /// Send to a worker that drains again.
    Resume { name: String },
    /// Drain a worker that joined by call, and forget it once it has nothing any more.
    Remove { name: String },
}

fn key_value(text: &str) -> Result<(String, Value), String> {
    let (key, value) = text.split_once('=').ok_or("a key, `=` and a value are wanted, as in engine=vllm")?;
    Ok((key.to_owned(), serde_json::from_str(value).unwrap_or_else(|_| Value::from(value))))
}

pub(super) async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let ops = Ops::new(&arguments.access)?;
    if let Some(change) = arguments.change {
        if arguments.watch || arguments.decision.is_some() {
            return Err(WrongUse(
                "--watch and --decision show, and change no worker: ask for one after the other".to_owned(),
            )
            .into());
        }
        let leaves = match &change {
            Change::Remove { name } => Some(format!("{name} leaves as soon as it has nothing any more\n")),
            _ => None,
        };
        let answer = ask_for(&ops, change).await?;
        let text = match leaves {
            _ if arguments.json => format!("{answer:#}\n"),
            Some(leaves) => leaves,
            None => listing(&serde_json::from_value(answer)?),
        };
        print(&text, false);
        return Ok(());
    }
    let first = look(&ops, &arguments).await?;
    print(&first, arguments.watch);
    if !arguments.watch {
        return Ok(());
    }
    let watching = async {
        loop {
            tokio::time::sleep(WATCH_INTERVAL).await;
            // A gateway that restarts is waited for.
            let seen = look(&ops, &arguments).await;
            print(&seen.unwrap_or_else(|error| format!("forebay: {error:#}\n")), true);
        }
    };
    tokio::select! {
        () = watching => Ok(()),
        interrupted = tokio::signal::ctrl_c() => Ok(interrupted?),
    }
}

async fn ask_for(ops: &Ops, change: Change) -> anyhow::Result<Value> {
    let nothing = bytes::Bytes::new;
    match change {
        Change::Add { model, address, name, keys } => {
            let mut worker = Map::from_iter([("url".to_owned(), address.into())]);
            let name = name.map(|name| ("name".to_owned(), name.into()));
            for (key, value) in name.into_iter().chain(keys) {
                if worker.contains_key(&key) {
                    return Err(WrongUse(format!("`{key}` is given twice: which is meant?")).into());
                }
                worker.insert(key, value);
            }
            let body = serde_json::to_vec(&Join { model, worker })?;
            ops.ask(Method::POST, &["workers"], body.into()).await
        }
        Change::Drain { name } => ops.ask(Method::POST, &["workers", &name, "drain"], nothing()).await,
        Change::Resume { name } => ops.ask(Method::POST, &["workers", &name, "resume"], nothing()).await,
        Change::Remove { name } => ops.ask(Method::DELETE, &["workers", &name], nothing()).await,
    }
}

async fn look(ops: &Ops, arguments: &Arguments) -> anyhow::Result<String> {
    let answer = match &arguments.decision {
        Some(request) => ops.get(&["decisions", request]).await?,
        None => ops.get(&["workers"]).await?,
    };
    match (arguments.json, &arguments.decision) {
        (true, _) if arguments.watch => Ok(format!("{answer}\n")),
        (true, _) => Ok(format!("{}\n", serde_json::to_string_pretty(&answer)?)),
        (false, Some(_)) => Ok(explained(&serde_json::from_value(answer)?)),
        (false, None) => Ok(listing(&serde_json::from_value(answer)?)),
    }
}

fn print(text: &str, again: bool) {
    let mut out = std::io::stdout();
    let clear = if again && out.is_terminal() { CLEAR } else { "" };
    let _ = write!(out, "{clear}{text}").and_then(|()| out.flush());
}

/// A table for each model.
fn listing(answer: &Workers) -> String {
    if answer.workers.is_empty() {
        return "no workers\n".to_owned();
    }
    let mut models: Vec<&str> = Vec::new();
    for worker in &answer.workers {
        if !models.contains(&worker.model.as_str()) {
            models.push(&worker.model);
        }
    }
    let tables = models.into_iter().map(|model| {
        let mut table =
            Table::new().text("WORKER").text("ENGINE").text("HEALTH").number("SCORE").number("SENT").number("LANE");
        table = table.number("PROMISED").number("PREFILL").number("KV").number("RUN").number("WAIT");
        let workers = || answer.workers.iter().filter(|worker| worker.model == model);
        let with_gpus = workers().any(|worker| !worker.gpus.is_empty());
        if with_gpus {
            table = table.text("GPU").number("UTIL").number("MEM").number("TEMP").number("SHARE");
        }
        for worker in workers() {
            let gpus = with_gpus.then(|| gpu_cells(worker)).into_iter().flatten();
            table.row(cells(worker).into_iter().chain(gpus).collect());
        }
        format!("{model}\n{}", table.render(2))
    });
    tables.collect::<Vec<_>>().join("\n")
}

#[expect(clippy::cast_precision_loss, reason = "counts are shown with three digits")]
fn cells(worker: &Worker) -> Vec<String> {
    let said = |pick: fn(&crate::admin::wire::Reported) -> u32| {
        worker.reported.as_ref().map_or_else(|| "-".to_owned(), |reported| pick(reported).to_string())
    };
    let guess = if worker.rate_measured { "" } else { "~" };
    vec![
        shortened(&worker.name, NAME_CHARS_MAX),
        worker.engine.clone().unwrap_or_else(|| "-".to_owned()),
        standing(worker),
        format!("{:.2}", worker.health_score),
        worker.sent_requests.to_string(),
        worker.lane_requests.to_string(),
        compact(worker.promised_tokens as f64),
        format!("{guess}{}", compact(worker.prefill_tokens_per_second)),
        worker.kv_usage.map_or_else(|| "-".to_owned(), |share| format!("{:.0}%", share * 100.0)),
        said(|reported| reported.running),
        said(|reported| reported.waiting),
    ]
}

#[expect(clippy::cast_precision_loss, reason = "memory is far below 2^52 bytes")]
fn gpu_cells(worker: &Worker) -> [String; 5] {
    let most = |value: fn(&Gpu) -> Option<f64>| worker.gpus.iter().filter_map(value).reduce(f64::max);
    let percent = |share: Option<f64>| share.map_or_else(|| "-".to_owned(), |share| format!("{:.0}%", share * 100.0));
    let ill = worker.gpus.iter().any(|gpu| gpu.derate < 1.0 || gpu.fault.is_some());
    let names: Vec<&str> = worker.gpus.iter().map(|gpu| gpu.name.as_str()).collect();
    let name = match &names[..] {
        [] => "-".to_owned(),
        [one] => (*one).to_owned(),
        [first, rest @ ..] => format!("{first}+{}", rest.len()),
    };
    [
        shortened(&name, NAME_CHARS_MAX),
        percent(most(|gpu| gpu.utilization)),
        percent(most(|gpu| Some(gpu.memory_used_bytes? as f64 / gpu.memory_total_bytes?.max(1) as f64))),
        most(|gpu| gpu.temperature_celsius.map(f64::from))
            .map_or_else(|| "-".to_owned(), |celsius| format!("{celsius:.0}"))
            + if ill { "!" } else { "" },
        if names.is_empty() { "-".to_owned() } else { percent(Some(worker.gpu_share)) },
    ]
}

fn standing(worker: &Worker) -> String {
    let standing = match worker.health.as_str() {
        "open" if worker.gpu_fault => "gpu fault".to_owned(),
        "up" if worker.draining => return "draining".to_owned(),
        "up" if worker.busy_seconds > 0.0 => format!("busy {:.0}s", worker.busy_seconds.ceil()),
        "up" if worker.sleep.as_deref().is_some_and(|state| state != "awake") => {
            worker.sleep.as_deref().unwrap_or_default().replace('_', " ")
        }
        health => health.replace('_', "-"),
    };
    if worker.draining { format!("draining, {standing}") } else { standing }
}

fn explained(answer: &Explained) -> String {
    let model = answer.model.as_deref().unwrap_or("a model that is gone");
    let mut text = format!(
        "{}\n{} tokens for {model}, class {}, came {} ago, {}\n",
        answer.request,
        answer.prompt_tokens,
        answer.class,
        ago(answer.arrived.ago_seconds),
        answer.state.replace('_', " "),
    );
    if !answer.sent.is_empty() {
        text += &format!("sent to {}, {:.3} s in lanes\n", answer.sent.join(", then "), answer.queued_seconds);
    }
    if let Some(refusal) = &answer.refusal {
        let again = refusal.retry_after_seconds.map(|wait| format!(" (told to come again in {wait:.0} s)"));
        text += &format!("refused: {}{}\n", refusal.message, again.unwrap_or_default());
    }
    if answer.decisions.is_empty() {
        text += "no decision about it is kept\n";
    }
    for (number, decision) in answer.decisions.iter().enumerate() {
        let after = (answer.arrived.ago_seconds - decision.decided.ago_seconds).max(0.0);
        let rule = match decision.winner {
            Some(_) => "seconds, the lowest wins",
            None => "seconds; nobody can answer before the deadline",
        };
        text += &format!("\ndecision {}: {}, {after:.3} s after it came; {rule}\n", number + 1, decision.cause);
        text += &candidates(decision).render(0);
        if !decision.left_out.is_empty() {
            let left_out =
                decision.left_out.iter().map(|out| format!("{} ({})", out.worker, out.reason.replace('_', " ")));
            text += &format!("not weighed: {}\n", left_out.collect::<Vec<_>>().join(", "));
        }
    }
    text
}

/// Terms that are nothing for every candidate are left out.
fn candidates(decision: &Decision) -> Table {
    let mut table = Table::new().text("  WORKER").text("HEALTH\nNOW").number("MATCHED\nTOKENS");
    let mut names: Vec<&String> =
        decision.candidates.first().map(|first| first.terms.keys().collect()).unwrap_or_default();
    let counts =
        |name: &str| decision.candidates.iter().any(|candidate| candidate.terms.get(name) != Some(&0.0.into()));
    names.retain(|name| counts(name));
    for name in &names {
        table = table.number(&name.replacen('_', "\n", 1));
    }
    table = table.number("SCORE");
    for candidate in &decision.candidates {
        table.row(weighed(candidate, &names));
    }
    table
}

fn weighed(candidate: &Candidate, terms: &[&String]) -> Vec<String> {
    let mark = if candidate.winner { "*" } else { " " };
    let leg = if candidate.leg == "whole" { String::new() } else { format!(" ({})", candidate.leg) };
    // A gain of nothing is no negative number.
    let seconds = |seconds: f64| format!("{:.3}", (seconds * 1e3).round() / 1e3 + 0.0);
    let mut cells = vec![
        format!("{mark} {}{leg}", shortened(&candidate.worker, NAME_CHARS_MAX)),
        candidate.health.replace('_', "-"),
        candidate.matched_tokens.to_string(),
    ];
    let term = |name: &&String| candidate.terms.get(*name).and_then(Value::as_f64);
    cells.extend(terms.iter().map(|name| term(name).map_or_else(|| "-".to_owned(), seconds)));
    cells.push(seconds(candidate.seconds));
    cells
}

/// A time in the past, as coarse as people say it.
fn ago(seconds: f64) -> String {
    match seconds {
        ..100.0 => format!("{seconds:.1} s"),
        ..6000.0 => format!("{:.0} min", seconds / 60.0),
        _ => format!("{:.1} h", seconds / 3600.0),
    }
}
