//! Many streams at once: what an event costs, how long one waits, and how much memory they take.
//!
//! Whatever their number, the worker sends so many events a second, each stream's the more rarely the more there are: an
//! event should cost the same. Gateway, clients and worker are processes of their own, since each stream takes a file
//! descriptor of the clients and the worker, and two of the gateway.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context;
use tokio::net::TcpListener;

use crate::load::{Enough, Form, Question, Sample, drive};
use crate::machine::CpuTime;
use crate::proxy::Proxy;
use crate::upstream::{EVENTS, MODELS};
use crate::{SMALL, answers, machine, upstream};

/// Of all streams together.
const EVENTS_A_SECOND: u32 = 20_000;
/// A worker gets no more sequences at once than an engine usually runs.
const STREAMS_A_WORKER: u32 = 200;
/// The shortest time that streams are held.
const HELD_MIN: Duration = Duration::from_secs(10);
/// What a gateway has open beside its streams' connections.
const OTHER_FILES: u32 = 500;

/// Prints a row for a hundred streams, and for ten times as many each time, up to `most` or what may be open.
pub(crate) async fn measure(program: &Path, most: u32) -> anyhow::Result<()> {
    let possible = machine::files_max()?.saturating_sub(OTHER_FILES) / 2;
    let most = most.min(possible);
    let worker = Worker::start()?;
    println!("{}; {}; {possible} streams may be open\n", machine::description(), program.display());
    println!(
        "| streams at once | through | CPU µs an event | resident at most, MiB | first event p50 ms | p99 | longest \
         silence beyond the pace p50 ms | p99 | most |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    let mut streams = 100.min(most);
    loop {
        let pace = Duration::from_secs(1) * streams / EVENTS_A_SECOND;
        let direct = hold((Ipv4Addr::LOCALHOST, worker.port).into(), streams, pace).await?;
        row(streams, "direct", ["", ""].map(str::to_owned), &direct, pace);

        // One worker with many addresses, which is as many workers.
        let workers = (0..=streams / STREAMS_A_WORKER).map(|at| Ipv4Addr::from(u32::from(Ipv4Addr::LOCALHOST) + at));
        let workers: Vec<SocketAddr> = workers.map(|address| (address, worker.port).into()).collect();
        let command = machine::pinned(machine::PROXY_CORE, program);
        let mut proxy = Proxy::forebay("forebay", command, &workers)?;
        answers(&mut proxy).await?;
        let before = CpuTime::of(proxy.process())?;
        let samples = hold(proxy.address, streams, pace).await.with_context(|| proxy.log())?;
        let cpu = CpuTime::of(proxy.process())?.since(&before);
        let cost = cpu.as_secs_f64() * 1e6 / (samples.len() as f64 * f64::from(EVENTS));
        let peak = machine::peak_mib(proxy.process())?;
        row(streams, "forebay", [format!("{cost:.1}"), format!("{peak:.0}")], &samples, pace);
        if streams == most {
            return Ok(());
        }
        streams = (streams * 10).min(most);
    }
}

/// So many streams, each for half as long again as one answer takes at least.
async fn hold(address: SocketAddr, streams: u32, pace: Duration) -> anyhow::Result<Vec<Sample>> {
    let [_, guessed] = MODELS;
    let question = Question { form: Form::PacedStream(pace), ..SMALL };
    let held = (pace * EVENTS * 3 / 2).max(HELD_MIN);
    drive(address, guessed, question, streams, Enough::After(held)).await
}

fn row(streams: u32, through: &str, [cost, peak]: [String; 2], samples: &[Sample], pace: Duration) {
    let quantiles = |mut of: Vec<Duration>| {
        of.sort_unstable();
        [50, 99, 100].map(|percent| {
            let at = (of.len() * percent / 100).min(of.len().saturating_sub(1));
            of.get(at).map_or(0.0, |time| time.as_secs_f64() * 1e3)
        })
    };
    let [first, first_p99, _] = quantiles(samples.iter().map(|sample| sample.latency).collect());
    let beyond = samples.iter().map(|sample| sample.silence.saturating_sub(pace)).collect();
    let [silence, silence_p99, most] = quantiles(beyond);
    println!(
        "| {streams} | {through} | {cost} | {peak} | {first:.2} | {first_p99:.1} | {silence:.1} | {silence_p99:.1} | \
         {most:.0} |"
    );
}

/// The worker in a process of its own.
struct Worker {
    child: Child,
    port: u16,
}

impl Worker {
    fn start() -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        let mut child = command.arg("--upstream").stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("its output")?).read_line(&mut line)?;
        let port = line.trim().parse().context("the worker's port")?;
        Ok(Self { child, port })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Both fail only when it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the worker's process does.
pub(crate) async fn upstream() -> anyhow::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    println!("{}", listener.local_addr()?.port());
    Ok(upstream::run(listener).await?)
}
