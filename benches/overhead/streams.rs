//! Many streams at once: what an event costs, and how much memory they take.
//!
//! Whatever their number, the worker sends so many events a second, each stream's the more rarely the more there are: an
//! event should cost the same.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::load::{Enough, Form, Question, drive};
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

/// Prints a row for a hundred streams, and for ten times as many each time, up to `most`.
pub(crate) async fn measure(program: &Path, most: u32) -> anyhow::Result<()> {
    let [_, guessed] = MODELS;
    // One worker with many addresses, which is as many workers.
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    let port = listener.local_addr()?.port();
    let mut background = JoinSet::new();
    background.spawn(upstream::run(listener));
    println!("{}; {}\n", machine::description(), program.display());
    println!("| streams at once | CPU µs an event | resident at most, MiB | first event p50 µs | p99 µs |");
    println!("| --- | --- | --- | --- | --- |");
    let mut streams = 100;
    while streams <= most {
        let workers = (0..=streams / STREAMS_A_WORKER).map(|at| Ipv4Addr::from(u32::from(Ipv4Addr::LOCALHOST) + at));
        let workers: Vec<SocketAddr> = workers.map(|address| SocketAddr::from((address, port))).collect();
        let command = machine::pinned(machine::PROXY_CORE, program);
        let mut proxy = Proxy::forebay("forebay", command, &workers)?;
        answers(&mut proxy).await?;
        let pace = Duration::from_secs(1) * streams / EVENTS_A_SECOND;
        let question = Question { form: Form::PacedStream(pace), ..SMALL };
        let held = (pace * EVENTS * 3 / 2).max(HELD_MIN);
        let before = CpuTime::of(proxy.process())?;
        let mut firsts = drive(proxy.address, guessed, question, streams, Enough::After(held)).await?;
        let cpu = CpuTime::of(proxy.process())?.since(&before);
        let events = firsts.len() as f64 * f64::from(EVENTS);
        firsts.sort_unstable();
        let micros = |percent: usize| firsts.get(firsts.len() * percent / 100).map_or(0, Duration::as_micros);
        let (cost, peak) = (cpu.as_secs_f64() * 1e6 / events, machine::peak_mib(proxy.process())?);
        println!("| {streams} | {cost:.1} | {peak:.0} | {} | {} |", micros(50), micros(99));
        streams *= 10;
    }
    Ok(())
}
