//! What it costs to know the GPUs: processor time of an agent that reads eight of them, and of a gateway that follows a
//! hundred agents, each second, without workers that run there and with eight on each, over a stand-in for the driver's
//! library.
//!
//!     cargo bench --bench agent -- --seconds 60

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a bench that cannot run fails"
)]

use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const GPUS: usize = 8;
/// The gateway hears one agent at so many addresses, which costs it the same.
const NODES: usize = 100;
/// Where a node's workers would be; none answers.
const PORTS: std::ops::Range<u16> = 20_000..20_008;
/// Linux counts processor time in these.
const TICKS_PER_SECOND: f64 = 100.0;

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process, and the address in the line in which it says where it listens.
fn start(arguments: &[&str], directory: &Path, stand_in: &str) -> (Process, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    command.args(arguments).current_dir(directory).env("FOREBAY_LOG", "error");
    command.env("STAND_IN_NVML", directory.join("gpus")).env("FOREBAY_NVML_LIBRARY", stand_in);
    let mut child = Process(command.stdout(Stdio::piped()).spawn().expect("forebay starts"));
    let mut lines = BufReader::new(child.0.stdout.take().expect("piped")).lines().map_while(Result::ok);
    let address = lines.find_map(|line| Some(line.split("http://").nth(1)?.split_whitespace().next()?.to_owned()));
    (child, address.expect("an address"))
}

/// Processor seconds of a process until now.
fn processor_seconds(process: &Process) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.0.id())).expect("it runs");
    let fields: Vec<&str> = stat.rsplit(')').next().expect("fields").split_whitespace().collect();
    let ticks: f64 = fields[11..13].iter().map(|ticks| ticks.parse::<f64>().expect("a number")).sum();
    ticks / TICKS_PER_SECOND
}

/// Share of a core over so many seconds.
fn share(process: &Process, seconds: u64) -> f64 {
    let before = processor_seconds(process);
    std::thread::sleep(Duration::from_secs(seconds));
    (processor_seconds(process) - before) / seconds as f64
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let given = arguments.iter().position(|argument| argument == "--seconds").and_then(|at| arguments.get(at + 1));
    let seconds = given.map_or(60, |seconds| seconds.parse().expect("--seconds wants a number"));
    let directory = tempfile::tempdir().expect("a directory");
    let library = directory.path().join("stand-in.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/support/stand_in_nvml.c");
    let built = Command::new("cc").args(["-O2", "-shared", "-fPIC", "-o"]).arg(&library).arg(source).status();
    assert!(built.expect("a C compiler").success());
    let own = std::process::id();
    let mut text = format!("gpus {GPUS}\ndriver 570.1\n");
    for gpu in 0..GPUS {
        for line in ["uuid GPU-", "name Stand-in", "memory.total 80000000000", "memory.used 1", "utilization 50"] {
            writeln!(text, "{gpu}.{line}{}", if line.ends_with('-') { gpu.to_string() } else { String::new() })
                .unwrap();
        }
        for line in ["temperature 50", "power 300000", "power.limit 700000", "clock 1500", "throttle 0"] {
            writeln!(text, "{gpu}.{line}").unwrap();
        }
        writeln!(text, "{gpu}.processes {own}:1000 4000000:1000\n{gpu}.samples {own}:50 4000000:1").unwrap();
    }
    std::fs::write(directory.path().join("gpus"), text).expect("a file");
    let library = library.to_str().expect("UTF-8");
    // The processes lead somewhere, as those of engines do.
    let _listening = TcpListener::bind("127.0.0.1:0").expect("a port");
    let (agent, address) = start(&["agent", "--listen", "0.0.0.0:0"], directory.path(), library);
    let port = address.rsplit(':').next().expect("a port");
    std::thread::sleep(Duration::from_secs(2));
    println!("agent, {GPUS} GPUs, nobody listens: {:.2} % of a core", 100.0 * share(&agent, seconds));

    let host = |node: usize| format!("127.0.1.{}", node + 1);
    let mut server =
        "[server]\nlisten = \"127.0.0.1:0\"\nops_listen = \"127.0.0.1:0\"\ndata_dir = \"data\"\n".to_owned();
    let one = "[[model]]\nname = \"m\"\n[[model.worker]]\nurl = \"http://127.0.0.1:1\"\n";
    let mut many = String::new();
    for node in 0..NODES {
        writeln!(many, "[[model]]\nname = \"m{node}\"").unwrap();
        for port in PORTS {
            writeln!(many, "[[model.worker]]\nname = \"w{node}-{port}\"\nurl = \"http://{}:{port}\"", host(node))
                .unwrap();
        }
    }
    let (no_agent, no_agent_many) = (server.clone() + one, server.clone() + &many);
    for node in 0..NODES {
        writeln!(server, "[[node]]\nname = \"n{node}\"\nagent = \"http://{}:{port}\"", host(node)).unwrap();
    }
    for (what, text) in [
        ("no agent", no_agent),
        ("100 agents", server.clone() + one),
        ("no agent, 800 workers that are down", no_agent_many),
        ("100 agents, 800 workers that are down", server + &many),
    ] {
        let file = directory.path().join("gateway.toml");
        std::fs::write(&file, text).expect("a file");
        let (gateway, _) = start(&["serve", "--config", file.to_str().expect("UTF-8")], directory.path(), "/nowhere");
        std::thread::sleep(Duration::from_secs(3));
        println!("gateway, idle, {what}: {:.2} % of a core", 100.0 * share(&gateway, seconds));
    }
}
