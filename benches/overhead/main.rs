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
//!     cargo bench --bench overhead -- --instructions 2000
//!     cargo bench --bench overhead -- --streams 10000

mod http;
mod instructions;
mod load;
mod machine;
mod proxy;
mod report;
mod streams;
mod upstream;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::load::{Enough, Form, Novelty, Question, drive};
use crate::machine::CpuTime;
use crate::proxy::Proxy;
use crate::report::{Round, Series};
use crate::upstream::{MODELS, PACE};

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
    /// Count instructions over so many requests instead, under valgrind.
    #[arg(long)]
    instructions: Option<u32>,
    /// Hold many paced streams at once instead: CPU of an event and memory, from a hundred streams to so many.
    #[arg(long)]
    streams: Option<u32>,
    /// Be the worker, in a process of its own.
    #[arg(long, hide = true)]
    upstream: bool,
    /// What cargo adds.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A kind of request, and how many are under way at once.
struct Way {
    name: &'static str,
    connections: u32,
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
        question: Question { form: Form::PacedStream(PACE), ..SMALL },
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
    let arguments = Arguments::parse();
    // Before there is any other thread, since it is threads that are pinned.
    if !machine::pin_this_process() {
        println!("cannot pin processes to cores (two cores and taskset are needed): figures are less steady\n");
    }
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(run(&arguments))
}

async fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let length = Duration::try_from_secs_f64(arguments.seconds).context("--seconds")?;
    if arguments.upstream {
        return streams::upstream().await;
    }
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let upstream = listener.local_addr()?;
    let mut background = JoinSet::new();
    background.spawn(upstream::run(listener));
    let programs = match arguments.forebay.as_slice() {
        [] => vec![PathBuf::from(env!("CARGO_BIN_EXE_forebay"))],
        given => given.to_vec(),
    };
    if let Some(most) = arguments.streams {
        for program in &programs {
            streams::measure(program, most).await?;
        }
        return Ok(());
    }
    if let Some(requests) = arguments.instructions {
        for program in &programs {
            instructions::count(program, upstream, arguments, requests).await?;
        }
        return Ok(());
    }
    background.spawn(stay_awake());

    let proxies = start(&programs, upstream).await?;
    let mut targets = targets(upstream, &proxies);
    targets.retain(|target| {
        target.process.is_none() || target.name == report::NGINX || target.name.contains(&arguments.through)
    });
    println!("{}\n\n{}", machine::description(), report::HEADER);
    for way in WAYS.iter().filter(|way| way.name.contains(&arguments.only)) {
        let measured = measure(way, &targets, arguments.rounds, length).await;
        let series = measured.with_context(|| proxies.iter().map(Proxy::log).collect::<String>())?;
        print!("{}", report::rows(way.name, &series));
    }
    println!("\nresident memory at the end:");
    for proxy in &proxies {
        println!("- {}: {:.0} MiB", proxy.name, machine::resident_mib(proxy.process())?);
    }
    Ok(())
}

/// Keeps this thread from ever going to sleep. Else each write of a proxy would also pay for waking it, which on a
/// virtual machine can cost more than the write, and the slower proxy would pay for it more often.
async fn stay_awake() -> std::io::Result<()> {
    loop {
        tokio::task::yield_now().await;
    }
}

/// All proxies, ready.
async fn start(forebays: &[PathBuf], upstream: SocketAddr) -> anyhow::Result<Vec<Proxy>> {
    let mut proxies = Vec::from_iter(Proxy::nginx(upstream)?);
    if proxies.is_empty() {
        println!("no nginx here (apt-get install nginx-light): nothing to compare with\n");
    }
    for program in forebays {
        let command = machine::pinned(machine::PROXY_CORE, program);
        proxies.push(Proxy::forebay(&program.display().to_string(), command, &[upstream])?);
    }
    for proxy in &mut proxies {
        answers(proxy).await?;
    }
    Ok(proxies)
}

/// Waits until a proxy answers for both models.
async fn answers(proxy: &mut Proxy) -> anyhow::Result<()> {
    let address = proxy.address;
    let ask = async || {
        for model in MODELS {
            drive(address, model, SMALL, 1, Enough::Requests(1)).await?;
        }
        Ok(())
    };
    proxy.ready(ask).await
}

/// The worker itself, nginx, and Forebay with each way of counting.
fn targets(upstream: SocketAddr, proxies: &[Proxy]) -> Vec<Target> {
    let [counted, guessed] = MODELS;
    let mut targets =
        vec![Target { name: report::DIRECT.to_owned(), address: upstream, process: None, model: guessed }];
    for proxy in proxies {
        let target = |name, model| Target { name, address: proxy.address, process: Some(proxy.process()), model };
        if proxy.name == report::NGINX {
            targets.push(target(proxy.name.clone(), guessed));
        } else {
            targets.extend([guessed, counted].map(|model| target(format!("{}, {model}", proxy.name), model)));
        }
    }
    targets
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
            let ask =
                |length| drive(target.address, target.model, way.question, way.connections, Enough::After(length));
            ask(WARM_UP).await?;
            let before = target.process.map(CpuTime::of).transpose()?;
            let began = Instant::now();
            let latencies = ask(length).await?.into_iter().map(|sample| sample.latency).collect();
            let length = began.elapsed();
            let after = target.process.map(CpuTime::of).transpose()?;
            let cpu = before.zip(after).map(|(before, after)| after.since(&before));
            series.rounds.push(Round::new(latencies, cpu, length));
        }
    }
    Ok(series)
}
