//! What micro-batches gain and cost: embeddings of 32 clients through a gateway that merges them and through one that does
//! not, before the same simulated worker, and one client's latency both ways. Rounds alternate; read the ratios.
//!
//!     cargo bench --bench micro_batch -- --seconds 4 --rounds 5 --call-ms 4

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a bench that cannot run fails"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const CLIENTS: usize = 32;
/// A small encoder on a GPU: the time of a step, and of each token. What the server does itself for each call (`--call-ms`)
/// is what vLLM 0.32 was seen to take in its HTTP process on a shared core of these machines: 4.8 ms of processor time for a
/// call with one input, 0.9 for each of 32 in one.
const STEP_MS: &str = "2";
const TOKENS_PER_S: &str = "40000";

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process, and the first address in the line in which it says where it listens.
fn start(arguments: &[&str], directory: &Path) -> (Process, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    command.args(arguments).current_dir(directory).env("FOREBAY_LOG", "error");
    let mut child = Process(command.stdout(Stdio::piped()).spawn().expect("forebay starts"));
    let mut lines = BufReader::new(child.0.stdout.take().expect("piped")).lines().map_while(Result::ok);
    let address = lines.find_map(|line| Some(line.split("http://").nth(1)?.split_whitespace().next()?.to_owned()));
    (child, address.expect("an address"))
}

fn gateway(directory: &Path, worker: &str, max_tokens: u32) -> (Process, String) {
    let name = format!("tokens-{max_tokens}");
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("backends/simulated-engine/model");
    let config = format!(
        "[server]\nlisten = \"127.0.0.1:0\"\nops_listen = \"127.0.0.1:0\"\ndata_dir = \"{name}\"\naccess_log = false\n\
         [[model]]\nname = \"m\"\ntokenizer = {tokenizer:?}\n[model.micro_batch]\nmax_tokens = {max_tokens}\n\
         [[model.worker]]\nurl = \"http://{worker}\"\n"
    );
    let file = directory.join(format!("{name}.toml"));
    std::fs::write(&file, config).expect("a file");
    start(&["serve", "--config", file.to_str().expect("UTF-8")], directory)
}

/// One client with a connection of its own.
struct Client {
    socket: BufReader<TcpStream>,
    request: Vec<u8>,
}

impl Client {
    fn new(address: &str, number: usize) -> Self {
        let socket = TcpStream::connect(address).expect("it listens");
        socket.set_nodelay(true).expect("a socket");
        let body = format!(r#"{{"model":"m","input":"water number {number} runs through turbine {}"}}"#, number * 7);
        let request = format!(
            "POST /v1/embeddings HTTP/1.1\r\nhost: b\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        Self { socket: BufReader::new(socket), request: request.into_bytes() }
    }

    fn ask(&mut self) -> Duration {
        let began = Instant::now();
        self.socket.get_mut().write_all(&self.request).expect("it reads");
        let (mut length, mut line) = (0, String::new());
        loop {
            line.clear();
            self.socket.read_line(&mut line).expect("a head");
            let lower = line.to_ascii_lowercase();
            assert!(!lower.starts_with("http/1.1") || lower.contains(" 200 "), "{line}");
            if let Some(value) = lower.strip_prefix("content-length:") {
                length = value.trim().parse().expect("a length");
            }
            if line == "\r\n" {
                break;
            }
        }
        let mut body = vec![0; length];
        self.socket.read_exact(&mut body).expect("a body");
        began.elapsed()
    }
}

/// Requests a second of so many clients that each ask again at once, and the median of their latencies in milliseconds.
fn load(address: &str, clients: usize, time: Duration) -> (f64, f64) {
    let end = Instant::now() + time;
    let threads: Vec<_> = (0..clients)
        .map(|number| {
            let mut client = Client::new(address, number);
            std::thread::spawn(move || {
                let mut took = Vec::new();
                while Instant::now() < end {
                    took.push(client.ask().as_secs_f64() * 1e3);
                }
                took
            })
        })
        .collect();
    let mut took: Vec<f64> = threads.into_iter().flat_map(|thread| thread.join().expect("a client")).collect();
    (took.len() as f64 / time.as_secs_f64(), median(&mut took))
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let given = |name: &str, default: f64| {
        let at = arguments.iter().position(|argument| argument == name).and_then(|at| arguments.get(at + 1));
        at.map_or(default, |value| value.parse().expect("a number"))
    };
    let seconds = Duration::from_secs_f64(given("--seconds", 4.0));
    let call_ms = given("--call-ms", 4.0).to_string();
    let directory = tempfile::tempdir().expect("a directory");
    let flags = ["--model", "m", "--step-ms", STEP_MS, "--prefill-tokens-per-s", TOKENS_PER_S, "--call-ms", &call_ms];
    let (_worker, worker) = start(&[&["simulated-worker", "--port", "0"][..], &flags].concat(), directory.path());
    let gateways = [0, 8192].map(|max_tokens| gateway(directory.path(), &worker, max_tokens));
    std::thread::sleep(Duration::from_secs(2));
    // By gateway: throughput and latency at 32 clients, latency at one.
    let mut rounds: [[Vec<f64>; 3]; 2] = Default::default();
    for _ in 0..given("--rounds", 5.0) as usize {
        for ((_, address), [rate, p50, alone]) in gateways.iter().zip(&mut rounds) {
            let (requests, latency) = load(address, CLIENTS, seconds);
            rate.push(requests);
            p50.push(latency);
            alone.push(load(address, 1, seconds).1);
        }
    }
    let medians = rounds.each_mut().map(|round| round.each_mut().map(|values| median(values)));
    println!("worker: {call_ms} ms for each call, {STEP_MS} ms a step, {TOKENS_PER_S} tokens/s");
    for (what, [rate, p50, alone]) in ["a call each", "merged"].iter().zip(medians) {
        println!("{what:<12} c={CLIENTS}: {rate:.0} requests/s, p50 {p50:.1} ms; c=1: p50 {alone:.3} ms");
    }
    let [apart, merged] = medians;
    println!("merged / a call each: throughput x{:.2}, p50 at c=1 x{:.3}", merged[0] / apart[0], merged[2] / apart[2]);
}
