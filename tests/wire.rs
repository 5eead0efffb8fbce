//! The ranking of placement policies on the wire is the one that virtual time gives.
//!
//! One trace with shared prefixes, once through `forebay simulate`, and once through real gateways in front of four
//! simulated engine processes each, with the same engine parameters. All policies run at once, so that whatever else
//! this machine does disturbs them alike; what is compared are ratios, at a point where they are far from 1. A test
//! binary of its own, since others beside it would share its clock.

#![allow(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    dead_code,
    reason = "a test that finds something else than it expects fails; not all that supports tests is used here"
)]

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

/// What the other wire tests stand on.
mod it {
    pub(crate) mod support;
}

use it::support::process::{Gateway, Process, Worker, model, run, tokenizer};

/// From the best to the worst, as virtual time has it.
const POLICIES: [&str; 3] = ["forebay", "least-requests", "round-robin"];
const WORKERS: usize = 4;
/// Its cache holds a third of the prefixes.
const ENGINE: [&str; 8] =
    ["--prefill-tokens-per-s", "4000", "--step-ms", "16", "--step-ms-per-seq", "0.4", "--kv-blocks", "2000"];
const BLOCK_TOKENS: u64 = 16;
/// Prefixes, and tokens of them. Every request adds tokens of its own.
const LONG: (u64, u64) = (16, 4096);
const SHORT: (u64, u64) = (20, 256);
/// Every fourth request is long, as when one program's work comes among people's: whoever takes the workers in turn
/// sends all of them to one, which keeps the gap wide whatever chance does.
const LONG_EVERY: u64 = 4;
const OWN_TOKENS: u64 = 64;
const REQUESTS: u64 = 200;
const REQUESTS_PER_SECOND: f64 = 10.0;
/// The least ratio of neighbours' mean times to first token that counts as a ranking.
const GAP_MIN: f64 = 1.2;
/// Replaying takes half a minute on an idle machine.
const REPLAY_PATIENCE: Duration = Duration::from_secs(120);

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Poisson arrivals, each a prefix drawn at random and a question of its own.
fn trace(seed: u64) -> String {
    let mut draws = Draws(seed);
    let (mut at_ms, mut text) = (0.0, String::new());
    for number in 0..REQUESTS {
        at_ms -= (1.0 - draws.unit()).ln() / REQUESTS_PER_SECOND * 1e3;
        let is_long = number.is_multiple_of(LONG_EVERY);
        let ((prefixes, tokens), first) = if is_long { (LONG, 0) } else { (SHORT, LONG.0) };
        let prefix = first + draws.next() % prefixes;
        let shared = (0..tokens / BLOCK_TOKENS).map(|block| prefix * 1_000 + block);
        let own = (0..OWN_TOKENS / BLOCK_TOKENS).map(|block| 1_000_000 + number * 1_000 + block);
        let ids: Vec<u64> = shared.chain(own).collect();
        // One prompt ends within a block, so that there is one block size only that fits.
        let in_tokens = tokens + OWN_TOKENS - u64::from(number == 0);
        let row = serde_json::json!({
            "t_ms": at_ms as u64, "in_tokens": in_tokens, "out_tokens": 8, "hash_ids": ids
        });
        writeln!(text, "{row}").expect("a string");
    }
    text
}

/// Mean times to first token by policy, in milliseconds, in virtual time.
fn simulated(trace: &Path) -> Vec<f64> {
    let workers = WORKERS.to_string();
    let mut arguments = vec!["simulate", "--json", "--workers", &workers, "--trace", trace.to_str().expect("UTF-8")];
    arguments.extend(ENGINE);
    arguments.extend(POLICIES.iter().flat_map(|policy| ["--policy", policy]));
    let (code, out, err) = run(&arguments, trace.parent().expect("a directory"), &[]);
    assert_eq!(code, 0, "{err}");
    let report: serde_json::Value = serde_json::from_str(&out).expect("a report");
    let cells = report["cells"].as_array().expect("cells");
    assert_eq!(cells.iter().map(|cell| cell["policy"].as_str().expect("a name")).collect::<Vec<_>>(), POLICIES);
    cells.iter().map(mean_ttft).collect()
}

fn mean_ttft(cell: &serde_json::Value) -> f64 {
    assert_eq!(cell["completed"].as_u64(), Some(REQUESTS), "{cell}");
    cell["ttft_ms"]["mean"].as_f64().expect("a mean")
}

/// A gateway with its engines, and the replay against it.
struct Cell {
    workers: Vec<Worker>,
    gateway: Gateway,
}

impl Cell {
    fn start(policy: &str) -> Self {
        let flags = [&["--model", "m", "--speed", "1"][..], &ENGINE].concat();
        let workers: Vec<Worker> = (0..WORKERS).map(|_| Worker::start(&flags)).collect();
        let addresses: Vec<_> = workers.iter().map(|worker| worker.address).collect();
        let extra = format!("tokenizer = {:?}\npolicy = {policy:?}\n", tokenizer());
        let gateway = Gateway::start(&model("m", &addresses, &extra));
        it::support::eventually("all workers", || {
            let up = |worker: usize| gateway.metric(&format!("forebay_worker_up{{worker=\"w{worker}\"}}"));
            ((0..WORKERS).map(up).sum::<f64>() as usize == WORKERS).then_some(())
        });
        Self { workers, gateway }
    }

    fn replay(&self, trace: &Path) -> Process {
        let url = format!("http://{}", self.gateway.client);
        let trace = trace.to_str().expect("UTF-8");
        let arguments = ["replay", "--json", "--model", "m", "--url", &url, "--trace", trace];
        Process::start(&arguments, self.gateway.directory.path(), &[])
    }
}

fn report(mut replay: Process) -> serde_json::Value {
    let began = Instant::now();
    while replay.exited().is_none() {
        assert!(began.elapsed() < REPLAY_PATIENCE, "a replay does not end: {}", replay.err());
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(replay.wait().success(), "{}{}", replay.out(), replay.err());
    serde_json::from_str(&replay.out()).expect("a report")
}

#[test]
fn the_wire_ranks_policies_as_virtual_time_does() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("trace.jsonl");
    std::fs::write(&file, trace(3)).expect("the trace is written");
    let virtual_time = simulated(&file);

    let cells = POLICIES.map(Cell::start);
    let replays: Vec<Process> = cells.iter().map(|cell| cell.replay(&file)).collect();
    let reports: Vec<serde_json::Value> = replays.into_iter().map(report).collect();
    let wire: Vec<f64> = reports.iter().map(|report| mean_ttft(&report["cells"][0])).collect();

    println!("{:<16} {:>12} {:>12} {:>10}", "mean ttft in ms", "virtual time", "wire", "wire hits");
    for (at, policy) in POLICIES.iter().enumerate() {
        let hits = reports[at]["cells"][0]["hit_ratio_tokens"].as_f64().expect("cached tokens") * 100.0;
        println!("{policy:<16} {:>12.0} {:>12.0} {hits:>9.1}%", virtual_time[at], wire[at]);
    }
    for (at, report) in reports.iter().enumerate() {
        assert_eq!((&report["held_back"], &report["prompt_tokens_off"]), (&0.into(), &0.into()), "{}", POLICIES[at]);
        assert_eq!(report["workers"].as_object().map(serde_json::Map::len), Some(WORKERS), "{report}");
    }
    for (what, means) in [("virtual time", &virtual_time), ("the wire", &wire)] {
        for (better, worse) in (0..).zip(1..means.len()) {
            let gap = means[worse] / means[better];
            assert!(gap >= GAP_MIN, "{what}: {} against {} is {gap:.2}: {means:?}", POLICIES[worse], POLICIES[better]);
        }
    }
}
