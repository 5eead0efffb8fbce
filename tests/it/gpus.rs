//! What GPUs say moves the traffic: simulated workers that do what such a GPU does to its engine, agents over a stand-in
//! for the driver's library, and the gateway's own explanation.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::client::{self, Connection, post_with};
use crate::support::eventually;
use crate::support::gpus::{Agent, StandIn, identity, library};
use crate::support::process::{Gateway, Process, Worker, run, tokenizer};

/// An engine of a tenth of a second a prompt, so that clients keep it busy and its speed decides.
const ENGINE: [&str; 8] = ["--model", "m", "--speed", "1", "--prefill-tokens-per-s", "4000", "--step-ms", "2"];
const PROMPT_TOKENS: u32 = 400;
/// Clients that keep two such engines busy.
const MANY: u32 = 12;

/// Workers on a node, each on the GPU of its number as its process says.
struct Node {
    workers: Vec<Worker>,
    agent: Agent,
    gateway: Gateway,
}

impl Node {
    /// `of_worker` are more keys of each.
    fn start(gpu_of: &[usize], of_worker: &str) -> Self {
        let workers: Vec<Worker> = gpu_of.iter().map(|_| Worker::start(&ENGINE)).collect();
        let agent = Agent::start(gpu_of.iter().max().map_or(0, |gpu| gpu + 1));
        let on = |gpu: usize| {
            let pids = workers.iter().zip(gpu_of).filter(move |(_, of)| **of == gpu);
            pids.map(|(worker, _)| format!("{}:1000000 ", worker.process.id())).collect::<String>()
        };
        gpu_of.iter().for_each(|gpu| agent.gpus.set(&format!("{gpu}.processes"), &on(*gpu)));
        let node = format!("[[node]]\nname = \"n\"\nagent = \"http://{}\"\n", agent.address);
        let addresses: Vec<_> = workers.iter().map(|worker| worker.address).collect();
        let gateway = Gateway::start(&(node + &models(&addresses, of_worker)));
        let node = Self { workers, agent, gateway };
        (0..gpu_of.len()).for_each(|worker| node.until(worker, "its GPU", |worker| worker["gpus"][0].is_object()));
        node
    }

    /// Waits until a worker's entry in the listing is as wanted.
    fn until(&self, worker: usize, what: &str, is: impl Fn(&Value) -> bool) {
        until(&self.gateway, worker, what, is);
    }

    /// Why `loser` is not chosen while nothing else goes on: this term, beyond all others together.
    fn decided_by(&self, loser: &str, term: &str) {
        let id = format!("x-request-id: {term}");
        let answer = post_with(self.gateway.client, "/v1/completions", &[&id], &prompt(801, 0));
        assert_eq!(answer.status, 200, "{}", answer.text());
        let explained = self.gateway.admin(&format!("decisions/{term}")).json();
        let decision = &explained["decisions"][0];
        assert_ne!(decision["winner"], loser, "{explained}");
        let candidates = decision["candidates"].as_array().expect("a list");
        let named = |name: &str| candidates.iter().find(|candidate| candidate["worker"] == name).expect("a candidate");
        let seconds = named(loser)["terms"][term].as_f64().expect("seconds");
        assert!(2.0 * seconds > named(loser)["seconds"].as_f64().expect("seconds"), "{explained}");
        let winner = decision["winner"].as_str().expect("a winner");
        assert_eq!(named(winner)["terms"][term], 0.0, "{explained}");
    }
}

fn models(workers: &[SocketAddr], of_worker: &str) -> String {
    let mut text = format!("[[model]]\nname = \"m\"\ntokenizer = {:?}\n", tokenizer());
    for (index, address) in workers.iter().enumerate() {
        text += &format!("[[model.worker]]\nname = \"w{index}\"\nurl = \"http://{address}\"\n{of_worker}\n");
    }
    text
}

fn listed(gateway: &Gateway, worker: usize) -> Value {
    gateway.admin("workers").json()["workers"][worker].clone()
}

fn until(gateway: &Gateway, worker: usize, what: &str, is: impl Fn(&Value) -> bool) {
    eventually(what, || is(&listed(gateway, worker)).then_some(()));
}

/// A prompt that shares no prefix with one of another client or number.
fn prompt(client: u32, number: u32) -> String {
    let ids: Vec<u32> = (0..PROMPT_TOKENS).map(|at| 10 + (client * 31 + number * 7 + at) % 900).collect();
    let ids = [&[10 + client % 900, 10 + number % 900], &ids[2..]].concat();
    serde_json::json!({"model": "m", "prompt": ids, "max_tokens": 2, "stream": true}).to_string()
}

/// Clients that ask one after the other, until they are dropped.
struct Load {
    over: Arc<AtomicBool>,
    answers: Receiver<String>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    fn start(gateway: SocketAddr, clients: u32) -> Self {
        Self::paced(gateway, clients, Duration::ZERO)
    }

    /// Each client pauses for so long after an answer.
    fn paced(gateway: SocketAddr, clients: u32, pause: Duration) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let (told, answers) = channel();
        let over = Arc::new(AtomicBool::new(false));
        let ask = |client: u32| {
            let (told, over) = (told.clone(), Arc::clone(&over));
            std::thread::spawn(move || {
                let mut connection = Connection::to(gateway);
                while !over.load(Ordering::Relaxed) {
                    let body = prompt(client, NUMBER.fetch_add(1, Ordering::Relaxed));
                    connection.post("/v1/completions", &[], body.as_bytes());
                    let answer = connection.answer();
                    assert_eq!((answer.status, answer.stream_end()), (200, Ok(())));
                    let _ = told.send(answer.header("x-forebay-worker").expect("a worker").to_owned());
                    std::thread::sleep(pause);
                }
            })
        };
        Self { clients: (0..clients).map(ask).collect(), over, answers }
    }

    /// The share of a worker in the next so many answers.
    fn share(&self, worker: &str, of: usize) -> f64 {
        self.answers.try_iter().for_each(drop);
        let next = self.answers.iter().take(of).filter(|name| name == worker).count();
        next as f64 / of as f64
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let ended: Vec<_> = self.clients.drain(..).map(JoinHandle::join).collect();
        assert!(std::thread::panicking() || ended.iter().all(Result::is_ok), "a client failed");
    }
}

#[track_caller]
fn about(share: f64, expect: f64) {
    println!("a share of {share:.2} where {expect:.2} is in proportion");
    assert!((share - expect).abs() < 0.13, "a share of {share}, not {expect}");
}

#[test]
fn a_gpu_that_throttles_loses_traffic_in_proportion_and_gets_it_back() {
    let node = Node::start(&[0, 1], "");
    let load = Load::start(node.gateway.client, MANY);
    load.share("w0", 30);
    about(load.share("w0", 60), 0.5);

    // A quarter of its clocks, and the engine feels it.
    for (key, value) in [("0.clock", "500"), ("0.throttle", "0x40"), ("0.temperature", "91")] {
        node.agent.gpus.set(key, value);
    }
    node.workers[0].speed(0.25);
    let began = Instant::now();
    node.until(0, "the throttling", |worker| worker["gpu_derate"] == 0.25);
    println!("known after {:?}", began.elapsed());
    load.share("w0", 2 * MANY as usize);
    about(load.share("w0", 60), 0.2);
    drop(load);
    node.decided_by("w0", "gpu_throttle");
    assert_eq!(node.gateway.metric("forebay_gpu_throttled{node=\"n\",gpu=\"0\"}"), 1.0);

    node.agent.gpus.set("0.throttle", "0");
    node.agent.gpus.set("0.temperature", "70");
    node.agent.gpus.set("0.clock", "2000");
    node.workers[0].speed(1.0);
    node.until(0, "its recovery", |worker| worker["gpu_derate"] == 1.0);
    let load = Load::start(node.gateway.client, MANY);
    load.share("w0", 30);
    about(load.share("w0", 60), 0.5);
}

#[test]
fn an_xid_ejects_and_time_and_a_trial_bring_back() {
    let node = Node::start(&[0, 1], "");
    let load = Load::start(node.gateway.client, 2);
    load.share("w0", 10);
    // Usually an application's own fault: nothing happens.
    node.agent.gpus.set("0.xid", "1 13");
    let mut watcher = node.agent.watch();
    watcher.gpu(0, "the first error", |gpu| !gpu.xids.is_empty());
    node.agent.gpus.set("0.xid", "2 79");
    node.until(0, "the fault", |worker| worker["gpu_fault"] == true);
    let out = listed(&node.gateway, 0);
    assert_eq!((&out["health"], &out["takes_requests"]), (&"open".into(), &false.into()), "{out}");
    assert_eq!(out["gpus"][0]["fault"], "xid 79", "{out}");
    load.share("w0", 4);
    assert_eq!(load.share("w0", 20), 0.0);
    let answer = post_with(node.gateway.client, "/v1/completions", &["x-request-id: without"], &prompt(7, 7));
    assert_eq!(answer.header("x-forebay-worker"), Some("w1"));
    let explained = node.gateway.admin("decisions/without").json();
    let left_out = &explained["decisions"][0]["left_out"];
    assert_eq!(*left_out, serde_json::json!([{"worker": "w0", "reason": "gpu_fault"}]), "{explained}");
    let said = terminal(&node.gateway, &["--decision", "without"]);
    assert!(said.contains("not weighed: w0 (gpu fault)"), "{said}");

    node.until(0, "its return", |worker| worker["health"] == "up");
    eventually("traffic", || (load.share("w0", 10) > 0.0).then_some(()));
    assert_eq!(listed(&node.gateway, 0)["gpu_fault"], false);
    assert_eq!(listed(&node.gateway, 1)["health"], "up");
}

#[test]
fn a_gpu_that_is_lost_ejects_until_it_is_back() {
    let node = Node::start(&[0, 1], "");
    for gpu in ["0", "1"] {
        node.agent.gpus.set(&format!("{gpu}.ecc.uncorrected"), "3");
    }
    node.until(0, "nothing to be wrong", |worker| worker["takes_requests"] == true);
    node.agent.gpus.set("0.all", "!15");
    node.until(0, "the loss", |worker| worker["gpus"][0]["fault"] == "lost" && worker["health"] == "open");
    let answer = post_with(node.gateway.client, "/v1/completions", &[], &prompt(1, 1));
    assert_eq!(answer.header("x-forebay-worker"), Some("w1"));
    node.agent.gpus.unset("0.all");
    let load = Load::start(node.gateway.client, 2);
    node.until(0, "its return", |worker| worker["health"] == "up" && worker["gpus"][0]["fault"].is_null());
    // Memory errors that could not be corrected, and were not there before.
    node.agent.gpus.set("1.ecc.uncorrected", "4");
    node.until(1, "the fault", |worker| worker["gpus"][0]["fault"] == "uncorrected memory errors");
    node.until(1, "the ejection", |worker| worker["takes_requests"] == false);
    drop(load);
}

#[test]
fn a_foreign_process_shifts_load() {
    let node = Node::start(&[0, 1], "");
    let load = Load::start(node.gateway.client, MANY);
    load.share("w0", 30);
    about(load.share("w0", 60), 0.5);
    // Four fifths of the GPU, and the engine gets the rest.
    let own = node.workers[0].process.id();
    node.agent.gpus.set("0.utilization", "100");
    node.agent.gpus.set("0.processes", &format!("{own}:1000000 4000000:2000000"));
    node.agent.gpus.set("0.samples", &format!("{own}:20 4000000:80"));
    node.workers[0].speed(0.2);
    node.until(0, "the other's share", |worker| worker["gpu_share"].as_f64() < Some(0.25));
    assert_eq!(listed(&node.gateway, 0)["gpus"][0]["foreign_processes"], 1);
    load.share("w0", 2 * MANY as usize);
    about(load.share("w0", 60), 1.0 / 6.0);
    drop(load);
    node.decided_by("w0", "gpu_share");
    // It ends.
    node.agent.gpus.set("0.processes", &format!("{own}:1000000"));
    node.workers[0].speed(1.0);
    node.until(0, "its end", |worker| worker["gpu_share"] == 1.0 && worker["gpus"][0]["foreign_processes"] == 0);
    let load = Load::start(node.gateway.client, MANY);
    load.share("w0", 30);
    about(load.share("w0", 60), 0.5);
}

#[test]
fn an_engine_without_metrics_is_balanced_by_utilization() {
    // Known as a server of which nothing but the API is known: nothing tells its load.
    let node = Node::start(&[0, 1], "engine = \"openai\"\nmodel = \"m\"");
    assert!(listed(&node.gateway, 0)["reported"].is_null());
    // Most of the time nothing of ours is there: else nothing can be told.
    node.workers.iter().for_each(|worker| worker.speed(4.0));
    let load = Load::paced(node.gateway.client, 4, Duration::from_millis(400));
    let even = |share: f64| assert!((0.2..=0.8).contains(&share), "{share}");
    load.share("w0", 20);
    even(load.share("w0", 30));
    // Others use it, past us.
    node.agent.gpus.set("0.utilization", "90");
    node.until(0, "its load", |worker| worker["gpu_share"].as_f64() < Some(0.3));
    load.share("w0", 4);
    let share = load.share("w0", 30);
    assert!(share < 0.1, "{share}");
    drop(load);
    node.decided_by("w0", "gpu_share");
    node.agent.gpus.set("0.utilization", "0");
    node.until(0, "its end", |worker| worker["gpu_share"] == 1.0);
    let load = Load::paced(node.gateway.client, 4, Duration::from_millis(400));
    even(load.share("w0", 30));
    drop(load);
    // Memory that it took since it had least is its cache, as far as anybody can tell.
    let used = 70_u64 << 30;
    node.agent.gpus.set("0.memory.used", &used.to_string());
    node.until(0, "its memory", |worker| worker["gpus"][0]["memory_used_bytes"] == used);
    node.decided_by("w0", "kv_pressure");
}

#[test]
fn workers_on_one_gpu_share_its_capacity() {
    let node = Node::start(&[0, 0, 1], "");
    node.workers[0].speed(0.5);
    node.workers[1].speed(0.5);
    let load = Load::start(node.gateway.client, MANY);
    load.share("w2", 40);
    node.until(0, "the neighbour", |worker| worker["gpu_share"] == 0.5);
    about(load.share("w2", 80), 0.5);
    assert_eq!(listed(&node.gateway, 2)["gpu_share"], 1.0);
}

#[test]
fn telemetry_that_stops_is_a_lease_that_ends_and_an_agent_that_returns_is_heard() {
    let node = Node::start(&[0, 1], "");
    node.agent.gpus.set("0.throttle", "0x40");
    node.agent.gpus.set("0.clock", "1000");
    node.until(0, "the throttling", |worker| worker["gpu_derate"] == 0.5);
    let Node { agent, gateway, workers } = node;
    let Agent { process, address, gpus } = agent;
    drop(process);
    until(&gateway, 0, "the end of the lease", |worker| worker["gpu_derate"] == 1.0);
    let silent = listed(&gateway, 0);
    assert_eq!((&silent["health"], &silent["takes_requests"]), (&"up".into(), &true.into()), "{silent}");
    let told = || client::get(gateway.ops, "/metrics").text().matches("node=\"n\"").count();
    assert_eq!(told(), 0, "what is not known is not told");
    let _agent = Agent::over(gpus, library(&[]), &address.to_string(), &[]);
    until(&gateway, 0, "the agent", |worker| worker["gpu_derate"] == 0.5);
    assert_eq!(told(), 2 * 6);
    let addresses: Vec<_> = workers.iter().map(|worker| worker.address).collect();
    gateway.configure("", &models(&addresses, ""));
    gateway.process.signal("HUP");
    eventually("the node's series to go", || (told() == 0).then_some(()));
}

#[test]
fn a_gateway_on_a_gpus_machine_reads_it_itself() {
    let worker = Worker::start(&["--model", "m"]);
    let gpus = StandIn::new(2);
    gpus.set("1.processes", &format!("{}:1000", worker.process.id()));
    gpus.set("1.power", "250500");
    gpus.set("1.utilization", "25");
    let environment = gpus.environment(library(&[]));
    let environment = environment.each_ref().map(|(name, value)| (*name, value.as_str()));
    let gateway = Gateway::start_unready("", &models(&[worker.address], ""), &environment);
    gateway.until_ready();
    until(&gateway, 0, "the GPU", |worker| worker["gpus"][0]["name"] == "local/1");
    let gpu = listed(&gateway, 0)["gpus"][0].clone();
    assert_eq!((&gpu["uuid"], &gpu["model"], &gpu["fault"]), (&"GPU-1".into(), &"Stand-in".into(), &Value::Null));
    assert_eq!((&gpu["power_watts"], &gpu["power_limit_watts"]), (&250.5.into(), &700.0.into()), "{gpu}");
    let label = "{node=\"local\",gpu=\"1\"}";
    for (name, expect) in [
        ("memory_used_bytes", (1_u64 << 30) as f64),
        ("memory_total_bytes", (80_u64 << 30) as f64),
        ("utilization_ratio", 0.25),
        ("temperature_celsius", 40.0),
        ("power_watts", 250.5),
        ("throttled", 0.0),
    ] {
        assert_eq!(gateway.metric(&format!("forebay_gpu_{name}{label}")), expect, "{name}");
    }
    let said = terminal(&gateway, &[]);
    assert!(said.contains("GPU      UTIL  MEM  TEMP  SHARE"), "{said}");
    assert!(said.contains("local/1   25%   1%    40"), "{said}");
}

/// What `forebay workers` says to the owner.
fn terminal(gateway: &Gateway, more: &[&str]) -> String {
    let url = format!("http://{}", gateway.ops);
    let arguments = [&["workers", "--url", &url], more].concat();
    let key = gateway.owner_key();
    let (code, out, err) = run(&arguments, gateway.directory.path(), &[("FOREBAY_ADMIN_KEY", &key)]);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    out
}

#[test]
fn a_worker_may_name_its_gpus_and_an_agent_may_be_behind_tls() {
    let directory = tempfile::tempdir().expect("a directory");
    let [certificate, key] = identity(directory.path());
    let flags = ["--tls-cert", &certificate, "--tls-key", &key];
    let agent = Agent::over(StandIn::new(2), library(&[]), "127.0.0.1:0", &flags);
    let worker = Worker::start(&["--model", "m"]);
    let node = format!("[[node]]\nname = \"n\"\nagent = \"https://localhost:{}\"\n", agent.address.port());
    let named = models(&[worker.address], "gpus = [\"n/GPU-1\", \"n/0\"]");
    let gateway = Gateway::start_unready("", &(node.clone() + &named), &[("SSL_CERT_FILE", &certificate)]);
    let names = |worker: &Value| -> Vec<String> {
        let gpus = worker["gpus"].as_array().cloned().unwrap_or_default();
        gpus.iter().filter_map(|gpu| gpu["name"].as_str().map(str::to_owned)).collect()
    };
    until(&gateway, 0, "both GPUs", |worker| names(worker) == ["n/0", "n/1"]);
    // The slowest of them counts.
    agent.gpus.set("1.throttle", "0x8");
    agent.gpus.set("1.clock", "500");
    until(&gateway, 0, "the slower one", |worker| worker["gpu_derate"] == 0.25);
    // The file changes: another GPU.
    gateway.configure("", &(node + &models(&[worker.address], "gpus = [\"n/0\"]")));
    gateway.process.signal("HUP");
    until(&gateway, 0, "the other GPU", |worker| names(worker) == ["n/0"] && worker["gpu_derate"] == 1.0);
    // Whoever does not trust the certificate hears nothing.
    let untrusting = Gateway::start_unready(
        "",
        &format!("[[node]]\nname = \"n\"\nagent = \"https://localhost:{}\"\n{named}", agent.address.port()),
        &[("FOREBAY_LOG", "debug")],
    );
    eventually("the refusal", || untrusting.process.err().contains("the GPU agent cannot be reached").then_some(()));
    assert_eq!(listed(&untrusting, 0)["gpus"], serde_json::json!([]));
}

#[test]
fn an_agent_is_used_rightly_or_not_at_all() {
    let directory = tempfile::tempdir().expect("a directory");
    let check = |arguments: &[&str], code: i32, part: &str| {
        let (status, out, err) = run(arguments, directory.path(), &[]);
        assert!(status == code && err.contains(part), "{arguments:?}: {status} {out} {err}");
    };
    check(&["agent", "--tls-cert", "x"], 2, "--tls-key");
    check(&["agent", "--listen", "gpu-a"], 2, "gpu-a");
    check(&["agent", "--listen", "127.0.0.1:0", "--tls-cert", "x", "--tls-key", "y"], 1, "cannot read x");
    let mut taken = Process::start(&["agent", "--listen", "127.0.0.1:0"], Path::new("."), &[]);
    let address: SocketAddr = taken.line(|line| line.split("://").nth(1)?.trim().parse().ok());
    check(&["agent", "--listen", &address.to_string()], 1, "cannot listen on");
}
