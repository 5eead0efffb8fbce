//! What a request costs on its way through Forebay, beside a plain nginx on the same way, in one run.
//!
//! A fast worker of canned answers, nginx and Forebay are started. Every path is asked in rounds, in each round directly
//! and through every proxy in turn, so that all of them meet the machine's moods alike; figures are medians over rounds,
//! the ratio to nginx that of the rounds' own ratios. Proxies have one core for themselves, clients and worker share
//! another. Forebay counts prompts with a tokenizer (`counted`) or guesses their length (`guessed`), which leaves
//! tokenization out of the figures; routing, scheduling, usage rows and metrics are on in both.
//!
//!     cargo bench --bench overhead
//!     cargo bench --bench overhead -- --only "small" --rounds 9 --forebay target/before --forebay target/release/forebay

mod http;
mod load;
mod machine;
mod proxy;
mod report;
mod upstream;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::load::{Form, Novelty, Question, drive};
use crate::proxy::Proxy;
use crate::report::{Round, Series};
use crate::upstream::MODELS;

/// Time to fill connection pools and branch predictors before each measurement.
const WARM_UP: Duration = Duration::from_millis(200);

#[derive(Parser)]
struct Arguments {
    /// Rounds for each path.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Length of one measurement.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Only the paths whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Only the targets whose name contains this, beside nginx and the worker itself.
    #[arg(long, default_value = "")]
    through: String,
    /// A Forebay to measure, may be repeated [default: the one built now].
    #[arg(long)]
    forebay: Vec<PathBuf>,
    /// What cargo adds.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A kind of request, and how many are under way at once.
struct Way {
    name: &'static str,
    connections: usize,
    question: Question,
}

const SMALL: Question = Question { bytes: 256, form: Form::Whole, novelty: Novelty::Everywhere };
const WAYS: [Way; 6] = [
    Way { name: "small request, c=1", connections: 1, question: SMALL },
    Way { name: "small request, c=32", connections: 32, question: SMALL },
    Way { name: "16 KiB body, c=32", connections: 32, question: Question { bytes: 16 << 10, ..SMALL } },
    Way {
        name: "16 KiB body seen before, c=32",
        connections: 32,
        question: Question { bytes: 16 << 10, novelty: Novelty::AtTheEnd, ..SMALL },
    },
    Way { name: "64-chunk stream, c=32", connections: 32, question: Question { form: Form::Stream, ..SMALL } },
    Way {
        name: "64-chunk stream, one each 10 ms, c=128 (latency: first event)",
        connections: 128,
        question: Question { form: Form::PacedStream, ..SMALL },
    },
];

/// Where requests are sent.
struct Target {
    name: String,
    address: SocketAddr,
    process: Option<u32>,
    model: &'static str,
}

fn main() -> anyhow::Result<()> {
    let mut arguments = Arguments::parse();
    if arguments.forebay.is_empty() {
        arguments.forebay.push(env!("CARGO_BIN_EXE_forebay").into());
    }
    let length = Duration::try_from_secs_f64(arguments.seconds).context("--seconds")?;
    if !machine::pin_this_process() {
        println!("cannot pin processes to cores (two cores and taskset are needed): figures are less steady\n");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let upstream = listener.local_addr()?;
        let mut background = JoinSet::new();
        background.spawn(upstream::run(listener));
        background.spawn(stay_awake());
        let (mut proxies, mut targets) = start(&arguments.forebay, upstream).await?;
        targets.retain(|target| {
            target.process.is_none() || target.name == report::NGINX || target.name.contains(&arguments.through)
        });
        println!("{}\n", machine::description());
        println!("{}", report::HEADER);
        for way in WAYS.iter().filter(|way| way.name.contains(&arguments.only)) {
            let measured = measure(way, &targets, arguments.rounds, length).await;
            let series = measured.with_context(|| proxies.iter().map(Proxy::log).collect::<String>())?;
            print!("{}", report::rows(way.name, &series));
        }
        println!("\nresident memory at the end:");
        for target in &targets {
            if let Some(process) = target.process {
                println!("- {}: {:.0} MiB", target.name, machine::resident_mib(process)?);
            }
        }
        proxies.clear();
        Ok(())
    })
}

/// Keeps this thread from ever going to sleep. Else each write of a proxy would also pay for waking it, which on a
/// virtual machine can cost more than the write, and the slower proxy would pay for it more often.
async fn stay_awake() -> std::io::Result<()> {
    loop {
        tokio::task::yield_now().await;
    }
}

/// All proxies, ready, and the targets they make.
async fn start(forebays: &[PathBuf], upstream: SocketAddr) -> anyhow::Result<(Vec<Proxy>, Vec<Target>)> {
    let [counted, guessed] = MODELS;
    let mut proxies = Vec::new();
    let mut targets = vec![Target { name: "direct".into(), address: upstream, process: None, model: guessed }];
    let mut add = |proxy: Proxy, names: &[(String, &'static str)]| {
        let (address, process) = (proxy.address, Some(proxy.process()));
        targets.extend(names.iter().map(|(name, model)| Target { name: name.clone(), address, process, model }));
        proxies.push(proxy);
    };
    match Proxy::nginx(upstream)? {
        Some(nginx) => add(nginx, &[(report::NGINX.to_owned(), guessed)]),
        None => println!("no nginx here (apt-get install nginx-light): nothing to compare with\n"),
    }
    for program in forebays {
        let of = if forebays.len() > 1 { format!(" ({})", program.display()) } else { String::new() };
        let names = [(format!("forebay, guessed{of}"), guessed), (format!("forebay, counted{of}"), counted)];
        add(Proxy::forebay(program, upstream)?, &names);
    }
    for proxy in &mut proxies {
        let address = proxy.address;
        proxy
            .ready(async || {
                for model in MODELS {
                    drive(address, model, SMALL, 1, Duration::ZERO).await?;
                }
                Ok(())
            })
            .await?;
    }
    Ok((proxies, targets))
}

/// Every target in turn, for all rounds; the order moves on by one each round.
async fn measure<'t>(
    way: &Way,
    targets: &'t [Target],
    rounds: usize,
    length: Duration,
) -> anyhow::Result<Vec<Series<'t>>> {
    let mut series: Vec<_> = targets.iter().map(|target| Series { target: &target.name, rounds: Vec::new() }).collect();
    for round in 0..rounds {
        for turn in 0..targets.len() {
            let at = (round + turn) % targets.len();
            let (Some(target), Some(series)) = (targets.get(at), series.get_mut(at)) else { continue };
            let ask = |length| drive(target.address, target.model, way.question, way.connections, length);
            ask(WARM_UP).await?;
            let before = target.process.map(machine::cpu_time).transpose()?;
            let latencies = ask(length).await?;
            let after = target.process.map(machine::cpu_time).transpose()?;
            let cpu = before.zip(after).map(|(before, after)| after.saturating_sub(before));
            series.rounds.push(Round::new(latencies, cpu, length));
        }
    }
    Ok(series)
}
