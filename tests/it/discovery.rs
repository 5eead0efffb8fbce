//! Workers that come and go while the gateway runs, by a file and by DNS.

use std::net::Ipv4Addr;
use std::path::Path;

use super::support::client::Connection;
use super::support::dns::{NameServer, Records};
use super::support::eventually;
use super::support::process::{Gateway, Worker};

const CHAT: &str = "/v1/chat/completions";

fn gateway(discover: &str) -> Gateway {
    Gateway::start_unready(
        "",
        &format!("[[model]]\nname = \"m\"\n[[model.discover]]\nevery_seconds = 1\n{discover}\n"),
        &[],
    )
}

fn listed_by(path: &Path, workers: &[&Worker]) {
    let urls: Vec<String> = workers.iter().map(|worker| format!("http://{}", worker.address)).collect();
    // As a careful program writes it, and in one step.
    let fresh = path.with_extension("new");
    std::fs::write(&fresh, serde_json::to_string(&urls).expect("JSON")).expect("written");
    std::fs::rename(fresh, path).expect("renamed");
}

/// The workers that take requests, by name, in order.
fn up(gateway: &Gateway) -> Vec<String> {
    let workers = gateway.admin("workers").json();
    let workers = workers["workers"].as_array().expect("an array");
    let up = workers.iter().filter(|worker| worker["health"] == "up");
    let mut names: Vec<String> = up.map(|worker| worker["name"].as_str().expect("a name").to_owned()).collect();
    names.sort();
    names
}

fn until_up(gateway: &Gateway, names: &[String]) {
    let mut names = names.to_vec();
    names.sort();
    eventually("the listed workers to be up", || (up(gateway) == names).then_some(()));
}

fn ask(tokens: u32) -> String {
    format!(
        r#"{{"model":"m","max_tokens":{tokens},"ignore_eos":true,"stream":true,"messages":[{{"role":"user","content":"a"}}]}}"#
    )
}

#[test]
fn a_file_lets_workers_join_and_leave_without_a_lost_request() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("workers.json");
    let [slow, other] = [Worker::start(&["--speed", "0.05"]), Worker::start(&[])];
    let gateway = gateway(&format!("file = {path:?}"));
    let refused = gateway.post(CHAT, &ask(1));
    assert_eq!(refused.status, 503, "nobody is listed yet: {}", refused.text());

    listed_by(&path, &[&slow]);
    until_up(&gateway, &[slow.address.to_string()]);
    let mut leaving = Connection::to(gateway.client);
    leaving.post(CHAT, &[], ask(40).as_bytes());
    leaving.until(b"data:");

    // It leaves the list in the middle of an answer, which goes on; new requests go to who is on it.
    listed_by(&path, &[&other]);
    until_up(&gateway, &[other.address.to_string()]);
    let answer = gateway.post(CHAT, &ask(1));
    assert_eq!(answer.header("x-forebay-worker"), Some(other.address.to_string().as_str()));
    slow.speed(1000.0);
    leaving.until(b"data: [DONE]");

    // A list that cannot be read changes nothing.
    std::fs::write(&path, "[\"http://").expect("written");
    eventually("the bad list to be noticed", || {
        gateway.process.err().contains("workers cannot be listed").then_some(())
    });
    assert_eq!(gateway.post(CHAT, &ask(1)).status, 200);
    listed_by(&path, &[&other, &slow]);
    until_up(&gateway, &[other.address.to_string(), slow.address.to_string()]);
}

#[test]
fn the_addresses_of_a_name_are_workers() {
    let server = NameServer::start();
    let worker = Worker::start(&[]);
    let port = worker.address.port();
    server.set("vllm.test", Records::Addresses(vec![Ipv4Addr::LOCALHOST]));
    let gateway = gateway(&format!("dns = \"http://vllm.test:{port}\"\nresolver = \"{}\"", server.address));
    until_up(&gateway, &[format!("127.0.0.1:{port}")]);
    assert_eq!(gateway.post(CHAT, &ask(1)).status, 200);

    let named = |names: &[&str]| {
        let mut names = names.to_vec();
        names.sort_unstable();
        eventually("the names to be known", || {
            let workers = gateway.admin("workers").json();
            let mut known: Vec<String> = workers["workers"]
                .as_array()?
                .iter()
                .map(|w| w["name"].as_str().unwrap_or_default().to_owned())
                .collect();
            known.sort();
            (known == names).then_some(())
        });
    };
    let [here, there] = [format!("127.0.0.1:{port}"), format!("127.0.0.9:{port}")];
    server.set("vllm.test", Records::Addresses(vec![Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0, 0, 9)]));
    named(&[&here, &there]);
    server.set("vllm.test", Records::Addresses(vec![Ipv4Addr::LOCALHOST]));
    named(&[&here]);
    // An answer of which a part fails says nothing of the workers.
    server.set("vllm.test", Records::HalfBroken);
    eventually("the failure to be noticed", || {
        gateway.process.err().contains("workers cannot be listed").then_some(())
    });
    named(&[&here]);
    assert_eq!(gateway.post(CHAT, &ask(1)).status, 200);
}

#[test]
fn the_services_of_the_best_priority_are_workers() {
    let server = NameServer::start();
    let workers = [Worker::start(&[]), Worker::start(&[])];
    let [one, two] = workers.each_ref().map(|worker| worker.address.port());
    server.set("a.test", Records::Addresses(vec![Ipv4Addr::LOCALHOST]));
    server.set("b.test", Records::Addresses(vec![Ipv4Addr::LOCALHOST]));
    server.set(
        "_http._tcp.test",
        Records::Services(vec![(2, 1, "a.test"), (1, one, "a.test"), (1, two, "b.test"), (1, 7, "gone.test")]),
    );
    let gateway = gateway(&format!("srv = \"http://_http._tcp.test\"\nresolver = \"{}\"", server.address));
    until_up(&gateway, &[format!("a.test:{one}"), format!("b.test:{two}")]);
    for _ in 0..8 {
        assert_eq!(gateway.post(CHAT, &ask(1)).status, 200);
    }
    assert!(workers.iter().all(|worker| worker.finished() > 0), "both work");
}
