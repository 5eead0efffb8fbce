//! Workers that Kubernetes runs, told by a stand-in for its API server.

use serde_json::{Value, json};

use super::support::client::Connection;
use super::support::eventually;
use super::support::kubernetes::{ApiServer, Mood, NAMESPACE, PODS, SLICES};
use super::support::process::{Gateway, Worker};

const CHAT: &str = "/v1/chat/completions";

fn gateway(server: &ApiServer, kubernetes: &str) -> Gateway {
    let model = format!("[[model]]\nname = \"m\"\n[[model.discover]]\nevery_seconds = 1\nkubernetes = {kubernetes}\n");
    Gateway::start_unready("", &model, &[("KUBECONFIG", &server.kubeconfig())])
}

fn ask(tokens: u32) -> String {
    format!(
        r#"{{"model":"m","max_tokens":{tokens},"ignore_eos":true,"stream":true,"messages":[{{"role":"user","content":"a"}}]}}"#
    )
}

/// A slice of the service `vllm` with one pod.
fn slice(pod: &str, worker: &Worker, ready: bool, terminating: bool) -> Value {
    json!({
        "metadata": {"labels": {"kubernetes.io/service-name": "vllm"}},
        "addressType": "IPv4",
        "endpoints": [{
            "addresses": ["127.0.0.1"],
            "conditions": {"ready": ready, "serving": ready || terminating, "terminating": terminating},
            "targetRef": {"kind": "Pod", "name": pod, "namespace": NAMESPACE},
        }],
        "ports": [{"name": "metrics", "port": 1}, {"name": "http", "port": worker.address.port(), "protocol": "TCP"}],
    })
}

fn name(pod: &str, worker: &Worker) -> String {
    format!("{pod}.{NAMESPACE}:{}", worker.address.port())
}

/// Waits until these workers are there and no others, each up and with whether it drains.
fn until(gateway: &Gateway, workers: &[(&str, bool)]) {
    let mut wanted: Vec<_> = workers.iter().map(|(name, draining)| ((*name).to_owned(), *draining)).collect();
    wanted.sort();
    eventually("the workers to be as the cluster says", || {
        let json = gateway.admin("workers").json();
        let listed = json["workers"].as_array().expect("an array");
        let mut found: Vec<_> = listed
            .iter()
            .filter(|worker| worker["health"] == "up")
            .map(|worker| (worker["name"].as_str().expect("a name").to_owned(), worker["draining"] == true))
            .collect();
        found.sort();
        (found == wanted && listed.len() == wanted.len()).then_some(())
    });
}

#[test]
fn the_endpoints_of_a_service_come_drain_and_go() {
    let server = ApiServer::start();
    let [a, b] = [Worker::start(&["--speed", "0.05"]), Worker::start(&[])];
    let (first, second) = (name("a", &a), name("b", &b));
    server.put(SLICES, "vllm-1", slice("a", &a, true, false));
    server.put(
        SLICES,
        "other-1",
        json!({"metadata": {"labels": {"kubernetes.io/service-name": "other"}},
        "addressType": "IPv4", "endpoints": [{"addresses": ["127.0.0.1"]}], "ports": [{"name": "http", "port": 1}]}),
    );
    // Its other address is no second worker.
    let mut six = slice("a", &a, true, false);
    six["addressType"] = "IPv6".into();
    six["endpoints"][0]["addresses"] = json!(["::1"]);
    server.put(SLICES, "vllm-0", six);
    let gateway = gateway(&server, "{ service = \"vllm\", port = \"http\" }");
    until(&gateway, &[(&first, false)]);
    assert_eq!((server.asked().lists, server.asked().refused), (1, 0));
    server.remove(SLICES, "vllm-0");

    let mut running = Connection::to(gateway.client);
    running.post(CHAT, &[], ask(40).as_bytes());
    running.until(b"data:");
    server.put(SLICES, "vllm-2", slice("b", &b, true, false));
    until(&gateway, &[(&first, false), (&second, false)]);

    // It ends: what it has goes on, and nothing new is sent there.
    server.put(SLICES, "vllm-1", slice("a", &a, false, true));
    until(&gateway, &[(&first, true), (&second, false)]);
    for _ in 0..4 {
        let answer = gateway.post(CHAT, &ask(1));
        assert_eq!((answer.status, answer.header("x-forebay-worker")), (200, Some(&*second)));
    }
    a.speed(1000.0);
    running.until(b"data: [DONE]");
    server.remove(SLICES, "vllm-1");
    until(&gateway, &[(&second, false)]);

    // Not ready for a while: it is the same worker afterwards.
    server.put(SLICES, "vllm-2", slice("b", &b, false, false));
    until(&gateway, &[(&second, true)]);
    server.put(SLICES, "vllm-2", slice("b", &b, true, false));
    until(&gateway, &[(&second, false)]);
    assert_eq!(gateway.post(CHAT, &ask(1)).status, 200);
    // While a pod is moved it may stand in two slices.
    server.put(SLICES, "vllm-3", slice("b", &b, true, false));
    server.remove(SLICES, "vllm-2");
    server.put(SLICES, "vllm-1", slice("a", &a, true, false));
    until(&gateway, &[(&first, false), (&second, false)]);
    assert_eq!(server.asked().lists, 1, "all of it was watched");
    assert!(!gateway.process.err().contains("a worker is left out"), "{}", gateway.process.err());
}

#[test]
fn endpoints_that_are_no_pods_are_told_apart_by_their_addresses() {
    let server = ApiServer::start();
    let [a, b] = [Worker::start(&[]), Worker::start(&[])];
    let by_hand = |worker: &Worker, ready: bool| {
        let mut slice = slice("", worker, ready, false);
        slice["endpoints"][0].as_object_mut().expect("an endpoint").remove("targetRef");
        slice
    };
    server.put(SLICES, "vllm-1", by_hand(&a, true));
    server.put(SLICES, "vllm-2", by_hand(&b, true));
    // It stands in another slice, too, and takes requests if either says so.
    server.put(SLICES, "vllm-3", by_hand(&b, false));
    let gateway = gateway(&server, "{ service = \"vllm\", port = \"http\" }");
    let [first, second] = [a.address.to_string(), b.address.to_string()];
    until(&gateway, &[(&first, false), (&second, false)]);
    server.remove(SLICES, "vllm-1");
    until(&gateway, &[(&second, false)]);
}

#[test]
fn pods_are_found_by_their_labels() {
    let server = ApiServer::start();
    let worker = Worker::start(&[]);
    let pod = |app: &str, ready: &str| {
        json!({
            "metadata": {"labels": {"app": app, "model": "m"}},
            "spec": {"containers": [{"name": "engine", "ports": [{"containerPort": worker.address.port()}]}]},
            "status": {"phase": "Running", "podIP": "127.0.0.1", "conditions": [{"type": "Ready", "status": ready}]},
        })
    };
    server.put(PODS, "vllm-0", pod("vllm", "True"));
    server.put(PODS, "web-0", pod("web", "True"));
    let gateway = gateway(&server, "{ pods = \"app=vllm,model=m\", namespace = \"models\" }");
    let found = name("vllm-0", &worker);
    until(&gateway, &[(&found, false)]);
    let mut ending = pod("vllm", "True");
    ending["metadata"]["deletionTimestamp"] = "2026-01-02T03:04:05Z".into();
    server.put(PODS, "vllm-0", ending);
    until(&gateway, &[(&found, true)]);
    server.remove(PODS, "vllm-0");
    until(&gateway, &[]);
    server.put(PODS, "vllm-0", pod("vllm", "True"));
    until(&gateway, &[(&found, false)]);
    let mut over = pod("vllm", "False");
    over["status"]["phase"] = "Failed".into();
    server.put(PODS, "vllm-0", over);
    until(&gateway, &[]);
}

#[test]
fn an_api_server_that_fails_changes_nothing_and_is_taken_up_again() {
    let server = ApiServer::start();
    let [a, b] = [Worker::start(&[]), Worker::start(&[])];
    let (first, second) = (name("a", &a), name("b", &b));
    server.put(SLICES, "vllm-1", slice("a", &a, true, false));
    let gateway = gateway(&server, "{ service = \"vllm\", port = \"http\" }");
    until(&gateway, &[(&first, false)]);
    let refused_once_more = |what: &str| {
        let before = server.asked().refused;
        eventually(what, || (server.asked().refused > before + 1).then_some(()));
        assert_eq!(gateway.post(CHAT, &ask(1)).status, 200, "{what}");
    };

    // A watch that is cut goes on where it was, also after what it missed.
    server.be(Mood::Away);
    refused_once_more("it is away");
    server.put(SLICES, "vllm-2", slice("b", &b, true, false));
    until(&gateway, &[(&first, false)]);
    server.be(Mood::Well);
    until(&gateway, &[(&first, false), (&second, false)]);
    assert_eq!(server.asked().lists, 1, "{:?}", server.asked());
    let said = gateway.process.err();
    assert_eq!(said.matches("workers cannot be listed, the last list stays").count(), 1, "{said}");

    server.be(Mood::Forbids);
    refused_once_more("it forbids");
    assert!(gateway.process.err().contains("the test says Forbidden"), "{}", gateway.process.err());
    server.be(Mood::Well);

    // The token that was read is no longer good; the one that stands in the file now is.
    server.rotate("second");
    server.cut();
    server.remove(SLICES, "vllm-1");
    until(&gateway, &[(&second, false)]);
    assert_eq!(server.asked().lists, 1, "{:?}", server.asked());

    // What was missed is not remembered: all is listed anew, and what is gone is gone.
    server.put(SLICES, "vllm-1", slice("a", &a, true, false));
    server.be(Mood::Away);
    server.remove(SLICES, "vllm-2");
    server.forget();
    server.be(Mood::Well);
    until(&gateway, &[(&first, false)]);
    let listed = server.asked().lists;
    assert!(listed > 1, "{:?}", server.asked());
    // The same, told within the watch.
    server.expire();
    eventually("it to be listed anew", || (server.asked().lists > listed).then_some(()));
    server.put(SLICES, "vllm-2", slice("b", &b, true, false));
    until(&gateway, &[(&first, false), (&second, false)]);

    // A bookmark moves on what a watch is taken up from.
    let listed = server.asked().lists;
    server.bookmark(SLICES, "EndpointSlice");
    server.put(SLICES, "vllm-2", slice("b", &b, false, false));
    until(&gateway, &[(&first, false), (&second, true)]);
    server.bookmark(SLICES, "EndpointSlice");
    let watches = server.asked().watches;
    server.forget();
    server.cut();
    eventually("the watch to be taken up", || (server.asked().watches > watches).then_some(()));
    server.remove(SLICES, "vllm-2");
    until(&gateway, &[(&first, false)]);
    assert!(server.asked().lists <= listed + 1, "{:?}", server.asked());
}

#[test]
fn a_cluster_that_is_not_there_is_said() {
    let model = "[[model]]\nname = \"m\"\n[[model.discover]]\nkubernetes = { service = \"vllm\" }\n";
    let gateway = Gateway::start_unready("", model, &[("KUBECONFIG", "/nowhere/at/all")]);
    eventually("it to be said", || gateway.process.err().contains("the cluster cannot be asked").then_some(()));
    assert_eq!(gateway.post(CHAT, &ask(1)).status, 503);
}
