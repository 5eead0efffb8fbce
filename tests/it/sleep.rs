//! Models that take turns in the memory of a GPU: simulated vLLM servers with sleep mode, which refuse what comes while
//! they sleep and remember when they were awake, and an Ollama that unloads its model unasked.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::client::{Connection, post, post_with};
use crate::support::eventually;
use crate::support::gpus::Agent;
use crate::support::process::{Gateway, Worker, tokenizer};

/// Awake at least so long.
const RESIDENCY_SECONDS: u64 = 1;

/// So many models, each with a worker that sleeps and takes 30 GiB of the one GPU.
struct Fleet {
    workers: Vec<Worker>,
    gateway: Gateway,
}

impl Fleet {
    /// `node` are the keys of the node that has the GPU.
    fn start(models: usize, node: &str, flags: &[&str]) -> Self {
        let fleet = Self::of(models, node, &[&["--enable-sleep-mode", "--asleep"], flags].concat());
        (0..models).for_each(|model| fleet.until(model, "asleep"));
        fleet
    }

    fn of(models: usize, node: &str, flags: &[&str]) -> Self {
        let worker = |model: usize| {
            let name = format!("m{model}");
            let usual = ["--model", &name, "--wake-seconds", "0.2", "--sleep-seconds", "0.05"];
            Worker::start(&[&usual, flags].concat())
        };
        let workers: Vec<Worker> = (0..models).map(worker).collect();
        let mut file = format!("[[node]]\nname = \"n\"\n{node}\n");
        for (model, worker) in workers.iter().enumerate() {
            let url = format!("http://{}", worker.address);
            writeln!(file, "[[model]]\nname = \"m{model}\"\ntokenizer = {:?}", tokenizer()).unwrap();
            writeln!(file, "[[model.worker]]\nname = \"w{model}\"\nurl = \"{url}\"\ngpus = [\"n/0\"]").unwrap();
            writeln!(file, "sleep = true\nmemory_gib = 30\nawake_seconds_min = {RESIDENCY_SECONDS}").unwrap();
        }
        Self { workers, gateway: Gateway::start(&file) }
    }

    fn listed(&self, model: usize) -> Value {
        self.gateway.admin("workers").json()["workers"][model].clone()
    }

    fn until(&self, model: usize, state: &str) {
        eventually(state, || (self.listed(model)["sleep"] == state).then_some(()));
    }

    fn ask(&self, model: usize, headers: &[&str]) -> u16 {
        post_with(self.gateway.client, "/v1/completions", headers, &prompt(model, 1)).status
    }

    /// When each was awake, by its own account: from the beginning of its wake to the end of its falling asleep.
    fn awake(&self) -> Vec<(u64, u64)> {
        let mut spans = Vec::new();
        for worker in &self.workers {
            let log = worker.log();
            assert_eq!(log["sleep"]["refused"], 0, "a request came to a worker that slept");
            let mut from = None;
            for change in log["sleep"]["changes"].as_array().unwrap() {
                let at = change[0].as_u64().unwrap();
                match change[1].as_bool().unwrap() {
                    false => assert!(from.replace(at).is_none(), "it was woken twice"),
                    true => spans.push((from.take().expect("it was awake"), at)),
                }
            }
            spans.extend(from.map(|from| (from, u64::MAX)));
        }
        spans
    }
}

fn prompt(model: usize, number: usize) -> String {
    json!({"model": format!("m{model}"), "prompt": [10 + model, 20 + number % 900, 30], "max_tokens": 2}).to_string()
}

#[test]
fn three_models_on_a_gpu_that_fits_two_serve_all_that_is_asked() {
    const MODELS: usize = 3;
    let fleet = Fleet::start(MODELS, "gpu_memory_gib = 80", &["--speed", "100"]);
    let began = Instant::now();
    let client = fleet.gateway.client;
    let clients: Vec<_> = (0..MODELS * 2)
        .map(|number| {
            std::thread::spawn(move || {
                let mut connection = Connection::to(client);
                for turn in 0..60 {
                    // Each stays with a model for a while.
                    let model = (number + turn / 20) % MODELS;
                    connection.post("/v1/completions", &[], prompt(model, turn).as_bytes());
                    let answer = connection.answer();
                    assert_eq!(answer.status, 200, "{}", answer.text());
                    std::thread::sleep(Duration::from_millis(20));
                }
            })
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().expect("every request is answered"));
    let seconds = began.elapsed().as_secs();

    let spans = fleet.awake();
    for (from, _) in &spans {
        let together = spans.iter().filter(|(other, until)| other <= from && from < until).count();
        assert!(together <= 2, "{together} were awake at once");
    }
    // Two places, each with another model once a residency at most.
    let most = 2 + 2 * (seconds + 1) / RESIDENCY_SECONDS;
    println!("{} wakes in {seconds} s, {most} are the most", spans.len());
    assert!((3..=most).contains(&(spans.len() as u64)), "{} wakes in {seconds} s", spans.len());
    let wakes = |model| fleet.gateway.metric(&format!("forebay_worker_wakes_total{{worker=\"w{model}\"}}"));
    assert_eq!((0..MODELS).map(wakes).sum::<f64>(), spans.len() as f64);
    assert!((0..MODELS).all(|model| fleet.listed(model)["health"] == "up"));
}

#[test]
fn requests_for_a_model_that_sleeps_wake_it_once_and_the_decision_says_what_it_costs() {
    let fleet = Fleet::start(1, "gpu_memory_gib = 80", &["--speed", "100"]);
    assert_eq!(fleet.gateway.metric("forebay_worker_asleep{worker=\"w0\"}"), 1.0);
    let mut clients: Vec<_> = (0..8).map(|_| Connection::to(fleet.gateway.client)).collect();
    for client in &mut clients {
        client.post("/v1/completions", &["x-request-id: cold"], prompt(0, 1).as_bytes());
    }
    assert!(clients.iter_mut().all(|client| client.answer().status == 200));
    assert_eq!(fleet.awake().len(), 1);
    let explained = fleet.gateway.admin("decisions/cold").json();
    let wake = explained["decisions"][0]["candidates"][0]["terms"]["wake"].as_f64().unwrap();
    assert!((0.01..=5.0).contains(&wake), "{explained}");
    assert_eq!((&fleet.listed(0)["sleep"], &fleet.listed(0)["wakes"]), (&"awake".into(), &1.into()));
    assert_eq!(fleet.gateway.metric("forebay_worker_asleep{worker=\"w0\"}"), 0.0);
    assert_eq!(fleet.ask(0, &["x-request-id: warm"]), 200);
    let explained = fleet.gateway.admin("decisions/warm").json();
    assert_eq!(explained["decisions"][0]["candidates"][0]["terms"]["wake"], 0.0);
}

#[test]
fn a_model_that_sleeps_and_may_not_be_woken_is_told_of_once_each_time() {
    let worker = Worker::start(&["--model", "m", "--enable-sleep-mode", "--asleep"]);
    let file = format!(
        "[[model]]\nname = \"m\"\ntokenizer = {:?}\n[[model.worker]]\nname = \"w\"\nurl = \"http://{}\"\n",
        tokenizer(),
        worker.address
    );
    let gateway = Gateway::start_unready("", &file, &[]);
    let asleep = || gateway.metric("forebay_worker_asleep{worker=\"w\"}");
    let up = || gateway.metric("forebay_worker_up{worker=\"w\"}");
    for round in 1..=2 {
        eventually("it to be seen to sleep", || (asleep() == 1.0 && up() == 0.0).then_some(()));
        assert_eq!(post(worker.address, "/wake_up", "").status, 200);
        eventually("it to be up", || (up() == 1.0).then_some(()));
        assert_eq!(asleep(), 0.0);
        // A probe that found it asleep, and the one that found it awake, at least.
        let said = gateway.process.err();
        assert_eq!(said.matches("it sleeps, and may not be woken").count(), round, "{said}");
        assert_eq!(post(worker.address, "/sleep?level=1&mode=wait", "").status, 200);
    }
}

#[test]
fn memory_that_somebody_else_has_prevents_a_wake() {
    let agent = Agent::start(1);
    let used = |gib: u64| agent.gpus.set("0.memory.used", &(gib << 30).to_string());
    used(60);
    let fleet = Fleet::start(2, &format!("agent = \"http://{}\"", agent.address), &["--speed", "100"]);
    eventually("the GPU", || fleet.listed(0)["gpus"][0].is_object().then_some(()));
    let (mut early, mut late) = (Connection::to(fleet.gateway.client), Connection::to(fleet.gateway.client));
    early.post("/v1/completions", &["x-forebay-deadline-ms: 3000"], prompt(0, 1).as_bytes());
    late.post("/v1/completions", &[], prompt(0, 2).as_bytes());
    let refused = early.answer();
    assert_eq!(refused.status, 504, "{}", refused.text());
    assert_eq!(fleet.listed(0)["sleep"], "asleep");
    used(2);
    assert_eq!(late.answer().status, 200);
    assert_eq!(fleet.listed(0)["sleep"], "awake");
}

#[test]
fn a_server_that_cannot_be_woken_is_asked_again() {
    let fault = ["--speed", "100", "--fault", "status:code=500,path=/wake_up,first=1"];
    let fleet = Fleet::start(1, "gpu_memory_gib = 80", &fault);
    let began = Instant::now();
    assert_eq!(fleet.ask(0, &[]), 200);
    println!("served after {:?}", began.elapsed());
    assert_eq!(fleet.awake().len(), 1);
    let said = fleet.gateway.process.err();
    assert!(said.contains("the engine did not do it"), "{said}");
}

#[test]
fn a_model_that_sleeps_at_nobodys_word_is_seen_to_sleep_and_woken() {
    let blind = ["--enable-sleep-mode", "--fault", "status:code=404,path=/metrics"];
    for (flags, path, body) in [
        // As when its time to keep it is over.
        (&["--engine", "ollama"][..], "/api/generate", json!({"model": "m0", "keep_alive": 0})),
        // As another gateway does, to one that says nothing of it in metrics.
        (&blind, "/sleep?level=1&mode=wait", json!({})),
    ] {
        let fleet = Fleet::of(1, "gpu_memory_gib = 80", &[flags, &["--speed", "100"]].concat());
        let ask = |headers: &[&str]| {
            let body = json!({"model": "m0", "prompt": "one two", "max_tokens": 2}).to_string();
            post_with(fleet.gateway.client, "/v1/completions", headers, &body).status
        };
        assert_eq!((ask(&[]), &fleet.listed(0)["sleep"]), (200, &"awake".into()), "{path}");
        assert_eq!(post(fleet.workers[0].address, path, &body.to_string()).status, 200);
        fleet.until(0, "asleep");
        assert_eq!(fleet.gateway.metric("forebay_worker_asleep{worker=\"w0\"}"), 1.0);
        assert_eq!(ask(&["x-request-id: cold"]), 200);
        let explained = fleet.gateway.admin("decisions/cold").json();
        let wake = explained["decisions"][0]["candidates"][0]["terms"]["wake"].as_f64().unwrap();
        assert!(wake >= 0.01, "{explained}");
        assert_eq!((&fleet.listed(0)["sleep"], &fleet.listed(0)["wakes"]), (&"awake".into(), &1.into()), "{path}");
    }
}

#[test]
fn of_two_that_sleep_the_one_that_has_room_is_woken() {
    let agent = Agent::start(2);
    let used = |gpu: usize, gib: u64| agent.gpus.set(&format!("{gpu}.memory.used"), &(gib << 30).to_string());
    used(0, 60);
    let sleeper = || Worker::start(&["--model", "m0", "--enable-sleep-mode", "--asleep", "--speed", "100"]);
    let workers = [sleeper(), sleeper()];
    let mut file = format!("[[node]]\nname = \"n\"\nagent = \"http://{}\"\n", agent.address);
    writeln!(file, "[[model]]\nname = \"m0\"\ntokenizer = {:?}", tokenizer()).unwrap();
    for (at, worker) in workers.iter().enumerate() {
        writeln!(file, "[[model.worker]]\nname = \"w{at}\"\nurl = \"http://{}\"", worker.address).unwrap();
        writeln!(file, "gpus = [\"n/{at}\"]\nsleep = true\nmemory_gib = 30").unwrap();
    }
    let fleet = Fleet { workers: workers.into(), gateway: Gateway::start(&file) };
    (0..2).for_each(|worker| fleet.until(worker, "asleep"));
    // What a GPU says counts once it was read after that; who sees a second reading knows that the first was taken in.
    for celsius in [50, 51] {
        for worker in 0..2 {
            agent.gpus.set(&format!("{worker}.temperature"), &celsius.to_string());
            let said = || fleet.listed(worker)["gpus"][0]["temperature_celsius"] == celsius;
            eventually("a reading", || said().then_some(()));
        }
    }
    let winner = |id: &str| {
        assert_eq!(fleet.ask(0, &[&format!("x-request-id: {id}")]), 200);
        let explained = fleet.gateway.admin(&format!("decisions/{id}")).json();
        let decision = explained["decisions"][0].clone();
        let candidates = decision["candidates"].as_array().expect("a list");
        let named = |name: &str| candidates.iter().find(|candidate| candidate["worker"] == name);
        let terms = ["w0", "w1"].map(|name| named(name).expect("a candidate")["terms"]["wake"].as_f64().unwrap());
        (decision["winner"].as_str().expect("a winner").to_owned(), terms)
    };
    let (first, [taken, free]) = winner("first");
    assert!(first == "w1" && taken > free, "{taken} {free}");
    // All of the traffic, as long as that is so.
    assert!((0..20).all(|number| winner(&number.to_string()).0 == "w1"));
    assert_eq!((fleet.awake().len(), &fleet.listed(0)["sleep"]), (1, &"asleep".into()));
}
