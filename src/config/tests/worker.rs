//! `[[model.worker]]`.

use super::*;

#[test]
fn no_worker_is_called_as_a_rank_of_another() {
    let ranks = |name: &str, count: u32| {
        format!("[[model.worker]]\nname = '{name}'\nurl = 'http://{name}:1'\ndata_parallel = {count}\n")
    };
    let named = |name: &str| format!("[[model.worker]]\nname = '{name}'\nurl = 'http://other'\n");
    let of = |workers: [String; 2]| format!("[[model]]\nname = 'm'\n{}", workers.concat());
    check(&of([ranks("w", 2), named("w/2")]), &[]);
    let rule = "must be unique among the names of workers,";
    let takes = "`model[0].worker[0].name` (f.toml:4:8) has it already";
    let plain = format!("{rule} which are host:port where `name` is omitted: {takes}");
    check(&of([ranks("w", 2), named("w/1")]), &[&format!("f.toml:8:8: model[0].worker[1].name is \"w/1\": {plain}")]);
    check(
        &of([named("w/0"), ranks("w", 3)]),
        &[&format!("f.toml:7:8: model[0].worker[1].name is \"w/0\": {rule} each rank being one of its own: {takes}")],
    );
    check(&of([ranks("w", 2), named("w")]), &[&format!("f.toml:8:8: model[0].worker[1].name is \"w\": {plain}")]);
}

#[test]
fn nothing_is_asked_of_a_named_engine_that_it_cannot() {
    let reader = Reader { engines: vec!["vllm", "tgi"], ..reader([]) };
    let worker = |engine: &str, keys: &str| format!("{MODEL}engine = '{engine}'\ngpus = ['local/0']\n{keys}\n");
    for (key, value) in [("sleep", "true"), ("data_parallel", "2"), ("token_ids", "true"), ("role", "'decode'")] {
        check_with(&reader, &worker("vllm", &format!("{key} = {value}")), &[]);
        let said = format!("model[0].worker[0].{key} is beyond what tgi can: omit the key for this engine");
        let at = format!("f.toml:7:{}", key.len() + 4);
        check_with(&reader, &worker("tgi", &format!("{key} = {value}")), &[&format!("{at}: {said}")]);
    }
    check_with(&reader, &worker("tgi", "sleep = false\ndata_parallel = 1\ntoken_ids = false"), &[]);
}

#[test]
fn prefill_and_decode_apart() {
    let worker = |number: u32, keys: &str| format!("[[model.worker]]\nurl = 'http://a:{number}'\n{keys}\n");
    let of = |workers: &[String]| format!("[[model]]\nname = 'm'\nsplit_tokens_min = 100\n{}", workers.concat());
    let pair = of(&[worker(1, "role = 'prefill'"), worker(2, "role = 'decode'"), worker(3, "")]);
    let config = reader([]).text("f.toml", &pair).unwrap_or_else(|mistakes| panic!("{mistakes}"));
    let roles: Vec<_> = config.models[0].workers.iter().map(|worker| worker.role).collect();
    assert_eq!(roles, [Role::Prefill, Role::Decode, Role::Both]);
    assert_eq!(config.models[0].split_tokens_min.get(), 100);
    let refuse = |workers: &[String], expect: &str| {
        let said = reader([]).text("f.toml", &of(workers)).unwrap_err().to_string();
        assert!(said.contains(expect), "{said}");
    };
    refuse(&[worker(1, "role = 'prefill'"), worker(2, "")], "add a worker with `role = \"decode\"`");
    refuse(&[worker(1, "role = 'both ways'")], "must be one of both, prefill, decode");
    refuse(&[worker(1, "role = 'decode'\nsleep = true")], "sleep is true: cannot stand beside a `role`");
}

#[test]
fn addresses_of_kv_events() {
    let remedy = "must be the address of the worker's ZeroMQ socket as seen from here, as in tcp://gpu-a:5557";
    for address in
        ["tcp://*:5557", "tcp://gpu-a", "tcp://gpu-a:0", "tcp://gpu-a:5557/x", "http://gpu-a:1", "ipc:///x", "x"]
    {
        let line = format!("f.toml:5:13: model[0].worker[0].kv_events is \"{address}\": {remedy}");
        check_worker(&format!("url = 'http://w:1'\nkv_events = '{address}'"), &[&line]);
    }
    check_worker(
        "url = 'http://w:1'\nkv_events_replay = 'tcp://gpu-a:5558'",
        &["f.toml:5:20: model[0].worker[0].kv_events_replay is \"tcp://gpu-a:5558\": needs `kv_events` beside it"],
    );
    check_worker("url = 'http://w:1'\nkv_events = 'tcp://gpu-a:5557'\nkv_events_replay = 'tcp://gpu-a:5558'", &[]);
}

#[test]
fn grpc_is_spoken_to_triton_alone() {
    check_worker(
        "url = 'grpc://w:8001'\nengine = 'vllm'",
        &[
            "f.toml:5:10: model[0].worker[0].engine is \"vllm\": must be triton where the address is grpc://: others are spoken to in HTTP",
        ],
    );
    check_worker("url = 'grpc://w:8001'", &[]);
}

#[test]
fn an_address_of_grpc_is_one_of_http2() {
    let text = |url: &str| format!("[[model]]\nname = 'm'\n[[model.worker]]\nurl = '{url}'\nmetrics_port = 9002\n");
    for (url, plain, http2) in [
        ("grpc://w:8001", "http://w:8001/", true),
        ("grpcs://w:443", "https://w/", true),
        ("http://w:8001", "http://w:8001/", false),
    ] {
        let config = reader([]).text("f.toml", &text(url)).unwrap_or_else(|mistakes| panic!("{mistakes}"));
        let worker = &config.models[0].workers[0];
        assert_eq!((worker.url.as_str(), worker.http2, worker.metrics_port), (plain, http2, Some(9002)), "{url}");
    }
}

#[test]
fn worker_values() {
    let form = "must begin with http://, https://, grpc:// or grpcs:// and name a host, as in http://gpu-a:8000";
    let check_url = |shown: &str, url: &str, remedy: &str| {
        check_worker(
            &format!("url = \"{url}\""),
            &[&format!("f.toml:4:7: model[0].worker[0].url is {shown}: {remedy}")],
        );
    };
    check_worker(
        "name = 'w'",
        &[
            "f.toml:3:1: model[0].worker[0].url is missing: write the worker's address, as in url = \"http://gpu-a:8000\"",
        ],
    );
    check_url("\"gpu-a:8000\"", "gpu-a:8000", form);
    check_url("\"10.0.0.1:8000\"", "10.0.0.1:8000", form);
    check_url("\"http://\"", "http://", form);
    check_url("\"tcp://w:1\"", "tcp://w:1", form);
    check_url("\"http://w:0\"", "http://w:0", form);
    check_url("\"http://w:99999\"", "http://w:99999", form);
    check_url("\"http://w:1/v1/\"", "http://w:1/v1/", "must not end in /v1: write the address in front of it");
    check_url(
        "(redacted)",
        "http://user:hunter2@w:1",
        "must not hold a user or a password: give an `api_key` to the worker",
    );
    check_url("(redacted)", "http://user:hunter2@w:xx", form);
    check_url("(redacted)", "http://w:1?key=hunter2", "must end before `?` or `#`");
    check_worker(
        "url = 'http://w:1'\nengine = 'vlm'",
        &[
            "f.toml:5:10: model[0].worker[0].engine is \"vlm\": must be one of vllm, openai (omit the key to have it detected)",
        ],
    );
}
