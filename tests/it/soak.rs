//! What ten minutes of coming and going leave behind: nothing.
//!
//! Not part of a usual run; `FOREBAY_SOAK_SECONDS` sets another length:
//!
//!     cargo test --release --test it soak -- --ignored --nocapture

use std::io::Read as _;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::support::body::{chat, streamed};
use super::support::client::Connection;
use super::support::eventually;
use super::support::process::{Gateway, Worker, model, tokenizer};

const CHAT: &str = "/v1/chat/completions";
const WORKERS: usize = 3;
const CLIENTS: u64 = 24;
/// Different prompts: few enough that what remembers them is full before the measuring begins.
const PROMPTS: u64 = 200;
const WORKER_DIES_EVERY: Duration = Duration::from_secs(7);
const WORKER_IS_GONE_FOR: Duration = Duration::from_secs(1);
const RELOAD_EVERY: Duration = Duration::from_secs(3);
const SAMPLE_EVERY: Duration = Duration::from_millis(500);

fn length() -> Duration {
    let seconds = std::env::var("FOREBAY_SOAK_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(seconds.unwrap_or(600))
}

/// What a process holds.
const HELD: [&str; 4] = ["resident MiB", "open files", "threads", "tasks"];

fn held(gateway: &Gateway) -> [f64; HELD.len()] {
    let process = format!("/proc/{}", gateway.process.id());
    let entries = |of: &str| std::fs::read_dir(format!("{process}/{of}")).expect("Linux").count() as f64;
    let status = std::fs::read_to_string(format!("{process}/status")).expect("Linux");
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("resident memory");
    let resident = resident.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") / 1024.0;
    [resident, entries("fd"), entries("task"), gateway.metric("forebay_tasks")]
}

/// Mean of `values`, and how much more they are at the end than at the beginning by the line that fits them best.
fn mean_and_growth(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let middle = (count - 1.0) / 2.0;
    let offsets = || (0..values.len()).map(|at| at as f64 - middle);
    let slope = offsets().zip(values).map(|(offset, value)| offset * (value - mean)).sum::<f64>();
    (mean, slope / offsets().map(|offset| offset * offset).sum::<f64>() * count)
}

/// Clients that ask, read some of it or all, leave and come back.
struct Clients {
    gateway: SocketAddr,
    end: Instant,
    whole: AtomicU64,
    failed: AtomicU64,
    left: AtomicU64,
}

impl Clients {
    fn run(&self, seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        let mut connection = Connection::to(self.gateway);
        while Instant::now() < self.end {
            let prompt = format!("{} {}", random.random_range(0..PROMPTS), "turbine by turbine; ".repeat(50));
            let choice = random.random_range(0..10);
            let body = if choice < 2 { chat(&prompt, "") } else { streamed(&prompt) };
            connection.post(CHAT, &[], body.as_bytes());
            match choice {
                // At once, and in the middle of the answer.
                0 | 2 => {}
                3..5 => drop(connection.socket.read(&mut [0; 512])),
                _ => {
                    let answer = connection.answer();
                    let good = answer.status == 200 && answer.whole && (choice < 2 || answer.stream_end().is_ok());
                    let count = if good { &self.whole } else { &self.failed };
                    count.fetch_add(1, Ordering::Relaxed);
                    if good {
                        continue;
                    }
                }
            }
            self.left.fetch_add(1, Ordering::Relaxed);
            connection = Connection::to(self.gateway);
        }
    }
}

/// What was held meanwhile, how many workers were killed, and how often the configuration was changed.
type Course = (Vec<[f64; HELD.len()]>, usize, usize);

/// Kills one worker after the other and starts it again at its address, reloads with one worker fewer or all, and looks
/// at what is held.
fn churn(
    gateway: &Gateway,
    workers: &mut Vec<Worker>,
    end: Instant,
    configuration: impl Fn(usize) -> String,
) -> Course {
    let now = Instant::now();
    let (mut next_death, mut next_reload) = (now + WORKER_DIES_EVERY, now + RELOAD_EVERY);
    let (mut samples, mut deaths, mut reloads) = (Vec::new(), 0, 0);
    while Instant::now() < end {
        if Instant::now() >= next_death {
            let port = workers.remove(0).address.port(); // killed here
            std::thread::sleep(WORKER_IS_GONE_FOR);
            workers.push(Worker::start_at(port, FLAGS));
            deaths += 1;
            next_death += WORKER_DIES_EVERY;
        }
        if Instant::now() >= next_reload {
            reloads += 1;
            gateway.configure("", &configuration(WORKERS - reloads % 2));
            gateway.process.signal("HUP");
            next_reload += RELOAD_EVERY;
        }
        std::thread::sleep(SAMPLE_EVERY);
        samples.push(held(gateway));
    }
    gateway.configure("", &configuration(WORKERS));
    gateway.process.signal("HUP");
    eventually("the last configuration", || (gateway.metric("forebay_worker_up{worker=\"w2\"}") > 0.0).then_some(()));
    (samples, deaths, reloads)
}

const FLAGS: &[&str] = &["--model", "m", "--speed", "20"];

#[test]
#[ignore = "ten minutes"]
fn nothing_piles_up() {
    assert_eq!(mean_and_growth(&[1.0, 2.0, 3.0, 4.0]), (2.5, 4.0));
    let mut workers: Vec<Worker> = (0..WORKERS).map(|_| Worker::start(FLAGS)).collect();
    let addresses: Vec<SocketAddr> = workers.iter().map(|worker| worker.address).collect();
    let configuration = |workers| model("m", &addresses[..workers], &format!("tokenizer = {:?}\n", tokenizer()));
    let gateway = Gateway::start(&configuration(WORKERS));
    let [_, files, threads, tasks] = held(&gateway);
    let clients = Clients {
        gateway: gateway.client,
        end: Instant::now() + length(),
        whole: AtomicU64::new(0),
        failed: AtomicU64::new(0),
        left: AtomicU64::new(0),
    };
    let (samples, deaths, reloads) = std::thread::scope(|scope| {
        let clients = &clients;
        for seed in 0..CLIENTS {
            scope.spawn(move || clients.run(seed));
        }
        churn(&gateway, &mut workers, clients.end, configuration)
    });
    let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
    let (whole, failed, left) = (count(&clients.whole), count(&clients.failed), count(&clients.left));
    println!("{:?}: {whole} answers read, {failed} failed, {left} connections left", length());
    println!("{deaths} workers killed, {reloads} configurations");
    // What remembers prompts and requests fills up first.
    let settled = &samples[samples.len() / 3..];
    let mut growing = Vec::new();
    for (at, name) in HELD.into_iter().enumerate() {
        let values: Vec<f64> = settled.iter().map(|held| held[at]).collect();
        let (mean, growth) = mean_and_growth(&values);
        println!("{name}: {mean:.1}, {growth:+.1} in the last two thirds");
        if growth > 0.1 * mean + 2.0 {
            growing.push(name);
        }
    }
    assert!(growing.is_empty(), "{growing:?}");
    assert!(whole > 100 && failed * 20 < whole, "{whole} answers, {failed} failures");
    // The connections to workers that idle go when they are next looked at.
    let more = || {
        let now = held(&gateway);
        [now[1] - files, now[2] - threads, now[3] - tasks]
    };
    let rest = eventually("what was held at the beginning", || {
        let more = more();
        (more[0] < 8.0 && more[1] < 3.0 && more[2] < 8.0).then_some(more)
    });
    println!("at rest: {rest:?} more files, threads and tasks than at the beginning");
}
