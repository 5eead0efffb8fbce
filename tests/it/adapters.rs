//! LoRA adapters: simulated vLLM and SGLang servers that load and unload them when asked, and remember what they did.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::client::{self, Answer, Connection, post_with};
use crate::support::eventually;
use crate::support::gpus::Agent;
use crate::support::process::{Gateway, Worker, model, tokenizer};

const COMPLETIONS: &str = "/v1/completions";

/// A simulated server of model `m` that takes adapters.
fn worker(flags: &[&str]) -> Worker {
    Worker::start(&[&["--model", "m", "--allow-lora-updating", "--max-loras", "2"], flags].concat())
}

/// Keys of a model with these adapters, whose files are where this path is.
fn adapters(names: &[&str], path: Option<&Path>) -> String {
    let path = path.map_or_else(String::new, |path| format!("path = {path:?}\n"));
    let table = |name: &&str| format!("[[model.adapter]]\nname = {name:?}\n{path}");
    format!("tokenizer = {:?}\n{}", tokenizer(), names.iter().map(table).collect::<String>())
}

fn gateway(workers: &[&Worker], keys: &str) -> Gateway {
    let addresses: Vec<SocketAddr> = workers.iter().map(|worker| worker.address).collect();
    let gateway = Gateway::start(&model("m", &addresses, keys));
    let up =
        || gateway.admin("workers").json()["workers"].as_array().map(|all| all.iter().all(|w| w["health"] == "up"));
    eventually("all workers to be up", || up().filter(|up| *up));
    gateway
}

fn prompt(model: &str) -> String {
    json!({"model": model, "prompt": [1, 2, 3], "max_tokens": 2}).to_string()
}

fn ask(gateway: &Gateway, model: &str) -> Answer {
    let answer = gateway.post(COMPLETIONS, &prompt(model));
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer
}

fn by(answer: &Answer) -> String {
    answer.header("x-forebay-worker").expect("a worker").to_owned()
}

/// What workers loaded (true) and unloaded, in order.
fn changes(worker: &Worker) -> Vec<(String, bool)> {
    serde_json::from_value(worker.log()["adapters"]["changes"].clone()).expect("changes")
}

fn loaded(names: &[&str]) -> Vec<(String, bool)> {
    names.iter().map(|name| ((*name).to_owned(), true)).collect()
}

/// The adapters of the workers as the gateway knows them.
fn known(gateway: &Gateway) -> Vec<BTreeMap<String, String>> {
    let workers = gateway.admin("workers").json();
    let workers = workers["workers"].as_array().expect("an array").clone();
    workers.iter().map(|worker| serde_json::from_value(worker["adapters"].clone()).expect("names")).collect()
}

fn loads_for(name: &str, candidate: &Value) -> f64 {
    candidate["terms"]["adapter_load"].as_f64().unwrap_or_else(|| panic!("{name}: {candidate}"))
}

#[test]
fn an_adapter_is_loaded_when_it_is_asked_for_and_stays_with_its_worker() {
    let workers = [worker(&["--lora-load-seconds", "0.2"]), worker(&["--lora-load-seconds", "0.2"])];
    let gateway = gateway(&workers.each_ref(), &adapters(&["sql", "law"], Some(&tokenizer())));
    let mut clients: Vec<_> = (0..8).map(|_| Connection::to(gateway.client)).collect();
    for client in &mut clients {
        client.post(COMPLETIONS, &["x-request-id: cold"], prompt("sql").as_bytes());
    }
    let answers: Vec<Answer> = clients.iter_mut().map(Connection::answer).collect();
    assert!(answers.iter().all(|answer| answer.status == 200), "{}", answers[0].text());
    assert!(answers.iter().all(|answer| answer.json()["model"] == "sql"));
    let at = usize::from(!changes(&workers[1]).is_empty());
    assert_eq!((changes(&workers[at]), changes(&workers[1 - at])), (loaded(&["sql"]), vec![]), "once, for all");
    let explained = gateway.admin("decisions/cold").json();
    let seconds = loads_for("cold", &explained["decisions"][0]["candidates"][0]);
    assert!((0.01..=1.0).contains(&seconds), "{explained}");

    for _ in 0..10 {
        assert_eq!(by(&ask(&gateway, "sql")), format!("w{at}"));
    }
    let warm = post_with(gateway.client, COMPLETIONS, &["x-request-id: warm"], &prompt("sql"));
    let row = gateway.row_of(&warm);
    assert_eq!((&row["model"], row["status"].as_u64()), (&"sql".into(), Some(200)), "{row}");
    let explained = gateway.admin("decisions/warm").json();
    let candidates = explained["decisions"][0]["candidates"].as_array().expect("candidates").clone();
    let here = candidates.iter().find(|candidate| candidate["winner"] == true).expect("a winner");
    let there = candidates.iter().find(|candidate| candidate["winner"] == false).expect("a loser");
    assert_eq!(loads_for("here", here), 0.0);
    assert!((0.1..1.0).contains(&loads_for("there", there)), "as long as it took: {there}");

    // Another adapter, and the model itself, on the same servers.
    ask(&gateway, "law");
    assert_eq!(ask(&gateway, "m").json()["model"], "m");
    let list = client::get(gateway.client, "/v1/models").json();
    let listed: Vec<_> =
        list["data"].as_array().expect("a list").iter().map(|m| (m["id"].clone(), m["parent"].clone())).collect();
    assert_eq!(listed, [("m".into(), Value::Null), ("sql".into(), "m".into()), ("law".into(), "m".into())]);
    let unknown = gateway.post(COMPLETIONS, &prompt("other"));
    assert_eq!((unknown.status, unknown.error()["code"].clone()), (404, "model_not_found".into()));
}

#[test]
fn more_adapters_than_places_take_turns_and_none_is_unloaded_in_use() {
    const NAMES: [&str; 4] = ["a", "b", "c", "d"];
    let workers = [worker(&["--lora-load-seconds", "0.02"])];
    let gateway = gateway(&workers.each_ref(), &adapters(&NAMES, Some(&tokenizer())));
    let client = gateway.client;
    let clients: Vec<_> = NAMES
        .iter()
        .flat_map(|name| [name, name])
        .map(|name| {
            std::thread::spawn(move || {
                let mut connection = Connection::to(client);
                for _ in 0..15 {
                    connection.post(COMPLETIONS, &[], prompt(name).as_bytes());
                    let answer = connection.answer();
                    assert_eq!((answer.status, &answer.json()["model"]), (200, &json!(name)), "{}", answer.text());
                }
            })
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().expect("every request is answered"));
    let log = workers[0].log();
    assert_eq!(log["adapters"]["most"], 2, "as many as its engine says that a batch may have");
    assert!(changes(&workers[0]).iter().any(|(_, loads)| !loads));
    assert_eq!(gateway.metric("forebay_retries_total{reason=\"no_adapter\"}"), 0.0);
}

#[test]
fn what_a_worker_began_with_is_served_there_alone() {
    let began = |flag: &str| Worker::start(&["--model", "m", "--lora-module", flag]);
    let workers = [began("sql=/adapters/sql"), began("law=/adapters/law")];
    let keys =
        adapters(&["sql", "law", "none"], None) + "[[model.adapter]]\nname = \"late\"\npath = \"/adapters/late\"\n";
    let gateway = gateway(&workers.each_ref(), &keys);
    for _ in 0..5 {
        assert_eq!((by(&ask(&gateway, "sql")), by(&ask(&gateway, "law"))), ("w0".to_owned(), "w1".to_owned()));
    }
    let lists = |name: &str| BTreeMap::from([(name.to_owned(), "loaded".to_owned())]);
    assert_eq!(known(&gateway), [lists("sql"), lists("law")]);
    // Nobody has it; and these servers were started without the endpoints to load one.
    for name in ["none", "late", "late"] {
        let refused = gateway.post(COMPLETIONS, &prompt(name));
        assert_eq!((refused.status, refused.error()["code"].clone()), (503, "adapter_unavailable".into()), "{name}");
        assert!(refused.header("retry-after").is_some());
    }
    let refusals = || gateway.process.err().matches("takes no adapters while it runs").count();
    eventually("both to be asked", || (refusals() >= 2).then_some(()));
    assert_eq!(refusals(), 2, "each was asked once");
    ask(&gateway, "m");
}

#[test]
fn an_adapter_without_files_is_refused_after_all_were_asked_and_hurts_nobody() {
    let workers = [worker(&[]), worker(&[])];
    let gone = "[[model.adapter]]\nname = \"gone\"\npath = \"/nowhere/gone\"\n";
    let keys = adapters(&["sql"], Some(&tokenizer())) + gone;
    let gateway = gateway(&workers.each_ref(), &keys);
    for _ in 0..3 {
        let refused = gateway.post(COMPLETIONS, &prompt("gone"));
        assert_eq!((refused.status, refused.error()["code"].clone()), (503, "adapter_unavailable".into()));
        assert!(!refused.text().contains("nowhere"), "a path is nobody's to see: {}", refused.text());
    }
    let said = gateway.process.err();
    assert_eq!(said.matches("Loading lora gone failed").count(), 2, "each was asked once: {said}");
    ask(&gateway, "sql");
    assert!(["w0", "w1"].iter().all(|w| gateway.metric(&format!("forebay_worker_up{{worker=\"{w}\"}}")) == 1.0));
}

#[test]
fn an_adapter_that_somebody_else_unloaded_is_loaded_again() {
    let workers = [worker(&[])];
    let gateway = gateway(&workers.each_ref(), &adapters(&["sql"], Some(&tokenizer())));
    ask(&gateway, "sql");
    let forgotten = client::post(workers[0].address, "/v1/unload_lora_adapter", r#"{"lora_name":"sql"}"#);
    assert_eq!(forgotten.status, 200);
    let answer = ask(&gateway, "sql");
    assert_eq!(answer.header("x-forebay-attempts").map(|told| told.contains("no_adapter")), Some(true));
    assert_eq!(changes(&workers[0]).len(), 3);
    // One that somebody loaded is not loaded again.
    let path = tokenizer();
    let body = json!({"lora_name": "late", "lora_path": path}).to_string();
    assert_eq!(client::post(workers[0].address, "/v1/load_lora_adapter", &body).status, 200);
    gateway.configure("", &model("m", &[workers[0].address], &adapters(&["sql", "late"], None)));
    eventually("the adapter to be known", || known(&gateway)[0].get("late").map(|_| ()));
    ask(&gateway, "late");
    assert_eq!(changes(&workers[0]).len(), 4);
}

/// A request for the adapter whose answer takes its time, once it has begun.
fn begin_long(gateway: &Gateway, adapter: &str) -> Connection {
    let body = json!({"model": adapter, "prompt": [1, 2, 3], "max_tokens": 4000, "ignore_eos": true, "stream": true});
    let mut client = Connection::to(gateway.client);
    client.post(COMPLETIONS, &[], body.to_string().as_bytes());
    eventually("the answer to begin", || {
        (gateway.metric("forebay_worker_running{worker=\"w0\"}") == 1.0).then_some(())
    });
    client
}

fn until_changes(worker: &Worker, count: usize) {
    eventually("the worker to be told", || (changes(worker).len() >= count).then_some(()));
}

#[test]
fn an_adapter_taken_out_is_unloaded_once_its_requests_ended() {
    let workers = [worker(&["--speed", "1"])];
    let keys = |names: &[&str]| model("m", &[workers[0].address], &adapters(names, Some(&tokenizer())));
    let gateway = gateway(&workers.each_ref(), &adapters(&["sql", "law"], Some(&tokenizer())));
    ask(&gateway, "law");
    let client = begin_long(&gateway, "sql");
    gateway.configure("", &keys(&[]));
    gateway.process.signal("HUP");
    // The one that nobody uses goes at once; the other is asked for no more, and goes when its request has ended.
    until_changes(&workers[0], 3);
    assert_eq!(changes(&workers[0])[2], ("law".to_owned(), false));
    assert_eq!(gateway.post(COMPLETIONS, &prompt("sql")).error()["code"], "model_not_found");
    assert_eq!(known(&gateway)[0].keys().collect::<Vec<_>>(), ["sql"]);
    drop(client);
    until_changes(&workers[0], 4);
    assert_eq!(changes(&workers[0])[3], ("sql".to_owned(), false));
    let listed = client::get(workers[0].address, "/v1/models").json();
    assert_eq!(listed["data"].as_array().map(Vec::len), Some(1), "{listed}");
    // One that comes back is loaded when it is asked for.
    gateway.configure("", &keys(&["sql"]));
    gateway.process.signal("HUP");
    eventually("it to be served", || (gateway.post(COMPLETIONS, &prompt("sql")).status == 200).then_some(()));
    assert_eq!(changes(&workers[0])[4..], loaded(&["sql"]));
}

#[test]
fn of_many_that_were_taken_out_those_that_left_first_are_forgotten() {
    let workers = [worker(&[])];
    let keys = |names: &[&str]| model("m", &[workers[0].address], &adapters(names, Some(&tokenizer())));
    let many: Vec<String> = (0..256).map(|number| format!("a{number}")).collect();
    // The first that was ever configured is the last to leave.
    let all: Vec<&str> = std::iter::once("sql").chain(many.iter().map(String::as_str)).collect();
    let gateway = gateway(&workers.each_ref(), &adapters(&all, Some(&tokenizer())));
    ask(&gateway, "sql");
    for left in [&["sql"][..], &[]] {
        gateway.configure("", &keys(left));
        gateway.process.signal("HUP");
        let listed = || client::get(gateway.client, "/v1/models").json()["data"].as_array().map(Vec::len);
        eventually("the others to be gone", || (listed() == Some(1 + left.len())).then_some(()));
    }
    until_changes(&workers[0], 2);
    assert_eq!(changes(&workers[0])[1], ("sql".to_owned(), false));
}

#[test]
fn an_adapter_whose_path_changes_is_loaded_from_there_once_its_requests_ended() {
    let workers = [worker(&["--speed", "1"])];
    let other = tempfile::tempdir().expect("a directory");
    let gateway = gateway(&workers.each_ref(), &adapters(&["sql"], Some(&tokenizer())));
    let busy = begin_long(&gateway, "sql");
    gateway.configure("", &model("m", &[workers[0].address], &adapters(&["sql"], Some(other.path()))));
    gateway.process.signal("HUP");
    eventually("it to leave", || (known(&gateway)[0].get("sql")? == "leaving").then_some(()));
    let mut waits = Connection::to(gateway.client);
    waits.post(COMPLETIONS, &[], prompt("sql").as_bytes());
    gateway.until_queued(1);
    assert_eq!(changes(&workers[0]), loaded(&["sql"]), "its request is under way");
    drop(busy);
    assert_eq!(waits.answer().status, 200);
    let told: Vec<_> = changes(&workers[0]).into_iter().map(|(_, loads)| loads).collect();
    assert_eq!(told, [true, false, true]);
    assert!(gateway.process.err().contains("Moved"));
    let listed = client::get(workers[0].address, "/v1/models").json();
    let root = listed["data"][1]["root"].as_str().map(Path::new);
    assert_eq!(root, Some(other.path()), "{listed}");
}

/// Where a worker says that it has its adapter from.
fn root(worker: &Worker) -> Option<String> {
    let listed = client::get(worker.address, "/v1/models").json();
    Some(listed["data"].get(1)?["root"].as_str()?.to_owned())
}

#[test]
fn an_adapter_that_came_from_another_path_than_configured_is_loaded_from_there() {
    let workers = [worker(&[])];
    let (first, second) = (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
    // As a gateway with another path left it.
    let body = json!({"lora_name": "sql", "lora_path": first.path()}).to_string();
    assert_eq!(client::post(workers[0].address, "/v1/load_lora_adapter", &body).status, 200);
    let gateway = gateway(&workers.each_ref(), &adapters(&["sql"], Some(second.path())));
    ask(&gateway, "sql");
    assert_eq!(root(&workers[0]).as_deref(), second.path().to_str());
    assert_eq!(changes(&workers[0]).len(), 3);
    // The path and the worker's keys at once: it is another worker to the scheduler.
    let config = model("m", &[workers[0].address], &adapters(&["sql"], Some(first.path())));
    gateway.configure("", &(config + "token_ids = true\n"));
    gateway.process.signal("HUP");
    until_changes(&workers[0], 4);
    assert_eq!(changes(&workers[0])[3], ("sql".to_owned(), false));
    eventually("it to be served", || (gateway.post(COMPLETIONS, &prompt("sql")).status == 200).then_some(()));
    assert_eq!(root(&workers[0]).as_deref(), first.path().to_str());
    assert_eq!(changes(&workers[0]).len(), 5);
}

#[test]
fn an_adapter_that_goes_to_another_model_of_the_same_server_stays_there() {
    let workers = [worker(&[])];
    let shared = |sql_at: &str| {
        let names = |model: &str| if model == sql_at { vec!["sql"] } else { Vec::new() };
        let keys = |model: &str| adapters(&names(model), Some(&tokenizer()));
        let at = workers[0].address;
        let second = format!("[[model.worker]]\nname = \"x0\"\nurl = \"http://{at}\"\nmodel = \"m\"\n");
        model("m", &[workers[0].address], &keys("m")) + &model("two", &[], &keys("two")) + &second
    };
    let gateway = Gateway::start(&shared("m"));
    eventually("it to be served", || (gateway.post(COMPLETIONS, &prompt("sql")).status == 200).then_some(()));
    gateway.configure("", &shared("two"));
    gateway.process.signal("HUP");
    let has = |at: &str| {
        let (none, loaded) = (BTreeMap::new(), BTreeMap::from([("sql".to_owned(), "loaded".to_owned())]));
        let has = if at == "two" { [none, loaded] } else { [none.clone(), none] };
        eventually("the workers to have changed", || (known(&gateway) == has).then_some(()));
    };
    has("two");
    assert_eq!(by(&ask(&gateway, "sql")), "x0");
    assert_eq!(changes(&workers[0]), loaded(&["sql"]), "the first model had it, and leaves it to the second");
    gateway.configure("", &shared("none"));
    gateway.process.signal("HUP");
    has("none");
    assert_eq!(changes(&workers[0])[1..], [("sql".to_owned(), false)]);
}

#[test]
fn a_server_that_fails_to_load_is_asked_again() {
    let workers = [worker(&["--fault", "status:code=500,path=/v1/load_lora_adapter,first=1"])];
    let gateway = gateway(&workers.each_ref(), &adapters(&["sql"], Some(&tokenizer())));
    ask(&gateway, "sql");
    assert!(gateway.process.err().contains("the engine did not do it"));
}

#[test]
fn a_server_whose_load_hangs_keeps_nobody_from_another() {
    let workers = [worker(&["--fault", "hang:path=/v1/load_lora_adapter"]), worker(&[])];
    let gateway = gateway(&workers.each_ref(), &adapters(&["sql"], Some(&tokenizer())));
    assert_eq!(gateway.order("POST", "workers/w1/drain", "").status, 200);
    let mut clients: Vec<_> = (0..4).map(|_| Connection::to(gateway.client)).collect();
    for client in &mut clients {
        client.post(COMPLETIONS, &[], prompt("sql").as_bytes());
    }
    eventually("the load to hang", || (known(&gateway)[0].get("sql")? == "loading").then_some(()));
    assert_eq!(gateway.order("POST", "workers/w1/resume", "").status, 200);
    for client in &mut clients {
        let answer = client.answer();
        assert_eq!((answer.status, by(&answer)), (200, "w1".to_owned()), "{}", answer.text());
    }
    assert_eq!((by(&ask(&gateway, "sql")), changes(&workers[1])), ("w1".to_owned(), loaded(&["sql"])));
    assert_eq!(known(&gateway)[0]["sql"], "loading", "it still hangs");
}

#[test]
fn where_a_gpu_is_full_another_adapter_leaves_before_one_comes() {
    const GIB: u64 = 1 << 30;
    let workers = [worker(&[])];
    let agent = Agent::start(1);
    agent.gpus.set("0.processes", &format!("{}:1000", workers[0].process.id()));
    let takes = |bytes: u64| agent.gpus.set("0.memory.used", &bytes.to_string());
    takes(77 * GIB);
    let node = format!("[[node]]\nname = \"n\"\nagent = \"http://{}\"\n", agent.address);
    let table =
        |name: &str| format!("[[model.adapter]]\nname = {name:?}\npath = {:?}\nmemory_mib = 2048\n", tokenizer());
    let keys = adapters(&[], None) + &table("a") + &table("b");
    let gateway = Gateway::start(&(node + &model("m", &[workers[0].address], &keys)));
    let says = |bytes: u64| {
        let gpu = || gateway.admin("workers").json()["workers"][0]["gpus"][0].clone();
        eventually("the GPU to say so", || (gpu()["memory_used_bytes"] == bytes).then_some(()));
    };
    says(77 * GIB);
    ask(&gateway, "a");
    takes(79 * GIB);
    says(79 * GIB);
    let mut client = Connection::to(gateway.client);
    client.post(COMPLETIONS, &[], prompt("b").as_bytes());
    until_changes(&workers[0], 2);
    assert_eq!(changes(&workers[0])[1], ("a".to_owned(), false));
    takes(77 * GIB);
    assert_eq!(client.answer().status, 200);
    assert_eq!(changes(&workers[0])[2..], loaded(&["b"]), "places were free all along");
}

#[test]
fn sglang_is_asked_in_its_own_words() {
    let workers = [worker(&["--engine", "sglang"])];
    let gateway = gateway(&workers.each_ref(), &adapters(&["sql"], Some(&tokenizer())));
    for _ in 0..2 {
        assert_eq!(ask(&gateway, "sql").json()["model"], "m:sql", "its answers name what it was asked for");
    }
    assert_eq!(changes(&workers[0]), loaded(&["sql"]));
    assert_eq!(ask(&gateway, "m").json()["model"], "m");
}

#[test]
fn blocks_of_an_adapter_attract_only_its_own_prompts() {
    let flags = ["--kv-events", "tcp://127.0.0.1:0", "--kv-events-replay", "tcp://127.0.0.1:0"];
    let flags = [&flags[..], &["--lora-module", "sql=/adapters/sql"]].concat();
    let workers = [worker(&flags), worker(&flags)];
    let gateway = gateway(&workers.each_ref(), &adapters(&["sql"], None));
    let long = |model: &str, first: u32| {
        json!({"model": model, "prompt": (first..first + 1604).collect::<Vec<_>>(), "max_tokens": 1}).to_string()
    };
    let blocks = |count: f64| {
        let series = "forebay_prefix_index_blocks{model=\"m\"}";
        eventually("blocks to be known", || (gateway.metric(series) >= count).then_some(()));
    };
    for (number, at) in [(0, 1), (1, 0), (2, 1)] {
        assert_eq!(client::post(workers[at].address, COMPLETIONS, &long("sql", number * 7)).status, 200);
        blocks(100.0 * f64::from(number + 1));
        let answer = gateway.post(COMPLETIONS, &long("sql", number * 7));
        let row = gateway.row_of(&answer);
        let told = (by(&answer), row["matched_tokens"].as_u64(), row["cached_tokens"].as_u64());
        assert_eq!(told, (format!("w{at}"), Some(1600), Some(1600)));
    }
    let row = gateway.row_of(&gateway.post(COMPLETIONS, &long("m", 0)));
    assert_eq!((row["matched_tokens"].as_u64(), row["cached_tokens"].as_u64()), (Some(0), Some(0)), "another cache");
}
