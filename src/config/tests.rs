//! The whole room from the outside: text in, exact lines or a value out.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use forebay_backends::discovery::{Behind, HAS_KUBERNETES, Port, Workload};
use secrecy::ExposeSecret as _;

use super::*;

mod properties;

fn reader<const N: usize>(variables: [(&str, &str); N]) -> Reader {
    Reader { environment: variables.into_iter().collect(), flags: Vec::new(), engines: vec!["vllm", "openai"] }
}

/// A model that is well, for tests of what stands around it.
const MODEL: &str = "[[model]]\nname = 'm'\n[[model.worker]]\nurl = 'http://w:1'\n";

fn check(text: &str, expect: &[&str]) {
    check_with(&reader([]), text, expect);
}

fn check_with(reader: &Reader, text: &str, expect: &[&str]) {
    let lines = match reader.text("f.toml", text) {
        Ok(_) => String::new(),
        Err(mistakes) => mistakes.to_string(),
    };
    assert_eq!(lines, expect.join("\n"), "\nin\n{text}");
}

/// As `check`, for `[server]` keys with a good model below.
fn check_server(keys: &str, expect: &[&str]) {
    check(&format!("[server]\n{keys}\n{MODEL}"), expect);
}

/// As `check`, for keys of a model whose name is line 2, its first worker following.
fn check_model(keys: &str, expect: &[&str]) {
    check(&format!("[[model]]\nname = 'm'\n{keys}\n[[model.worker]]\nurl = 'http://w:1'\n"), expect);
}

/// As `check`, for keys of a worker that begin on line 4.
fn check_worker(keys: &str, expect: &[&str]) {
    check(&format!("[[model]]\nname = 'm'\n[[model.worker]]\n{keys}\n"), expect);
}

#[test]
fn a_full_file_becomes_values() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    let text = format!(
        r#"
[server]
listen     = "0.0.0.0:7070"
ops_listen = "[::1]:7071"
data_dir   = "/var/lib/forebay"
allow_unauthenticated = true
body_bytes_max = 1_048_576
max_connections = 0x10
drain_seconds = 5
access_log = false

[[model]]
name          = "llama-3.1-8b"
aliases       = ["llama", "gpt-4o-mini"]
tokenizer     = "{}"
max_model_len = 131072
queue_requests_max = 10
policy = "least-requests"
queue_tokens_max = 1_000
worker_grace_seconds = 0
queue_bytes_max = 2_000_000
queue_seconds_max = 7
attempts_max = 2
first_byte_seconds = 8
idle_seconds = 9
coalesce = true
continue_streams = true

[model.classes]
batch = 0.25

[model.micro_batch]
max_tokens = 100
max_delay_ms = 0

[[model.worker]]
name   = "gpu-a:8000"
url    = "http://gpu-a:8000/"
engine = "vllm"
model  = "meta-llama/Llama-3.1-8B-Instruct"
api_key = {{ env = "VLLM_KEY" }}
kv_events = "tcp://gpu-a:5557"
kv_events_replay = "tcp://[fd00::1]:5558"

[[model.worker]]
url = "https://gpu-b/engine/"

[[model]]
name = "other"
worker = [{{ url = "http://[::1]:8000", gpus = ["gpu-a/0", "gpu-a/GPU-1"] }}]

[[node]]
name  = "gpu-a"
agent = "http://gpu-a:7072"
"#,
        dir.path().display()
    );
    let config = reader([("VLLM_KEY", "k-1\n")]).text("f.toml", &text).unwrap();
    assert_eq!(
        config.server,
        Server {
            listen: "0.0.0.0:7070".parse().unwrap(),
            ops_listen: "[::1]:7071".parse().unwrap(),
            data_dir: PathBuf::from("/var/lib/forebay"),
            allow_unauthenticated: true,
            body_bytes_max: 1 << 20,
            max_connections: NonZeroU32::new(16).unwrap(),
            stall_max: Duration::from_secs(60),
            otlp: None,
            trace_share: 1.0,
            drain: Duration::from_secs(5),
            access_log: false,
        }
    );
    let [first, second] = &config.models[..] else { panic!("{config:?}") };
    let name = |text: &str| Name::new(text).unwrap();
    assert_eq!((&*first.name, &first.aliases), ("llama-3.1-8b", &vec![name("llama"), name("gpt-4o-mini")]));
    assert_eq!(first.tokenizer.as_deref(), Some(dir.path()));
    assert_eq!(first.max_model_len, NonZeroU32::new(131_072));
    assert_eq!((first.queue_requests_max.get(), first.queue_bytes_max), (10, 2_000_000));
    assert_eq!(first.attempts_max.get(), 2);
    assert_eq!(first.class_shares, [0.0, 0.1, 0.25]);
    assert_eq!(
        (first.policy, first.queue_tokens_max, first.worker_grace),
        (Policy::LeastRequests, 1_000, Duration::ZERO)
    );
    let times = [first.queue_wait_max, first.first_byte_timeout, first.idle_timeout];
    assert_eq!(times, [7, 8, 9].map(Duration::from_secs));
    let [a, b] = &first.workers[..] else { panic!("{first:?}") };
    assert_eq!((&*a.name, a.url.as_str(), a.engine), ("gpu-a:8000", "http://gpu-a:8000/", Some("vllm")));
    assert_eq!(a.model, Some(name("meta-llama/Llama-3.1-8B-Instruct")));
    assert_eq!(a.api_key.as_ref().unwrap().inner().expose_secret(), "k-1");
    assert_eq!((&*b.name, b.url.as_str(), b.engine), ("gpu-b:443", "https://gpu-b/engine", None));
    let kv_events = a.kv_events.as_ref().unwrap();
    assert_eq!(kv_events.events.to_string(), "tcp://gpu-a:5557");
    assert_eq!(kv_events.replay.as_ref().unwrap().to_string(), "tcp://[fd00::1]:5558");
    assert_eq!((&b.model, &b.api_key, &b.kv_events), (&None, &None, &None));
    let batch = MicroBatch { max_tokens: NonZeroU32::new(100).unwrap(), max_delay: Duration::ZERO };
    assert_eq!((first.micro_batch, first.coalesce, first.continue_streams), (Some(batch), true, true));
    assert_eq!(*second, Model::new(name("other"), second.workers.clone(), &config.server));
    assert_eq!(&*second.workers[0].name, "[::1]:8000");
    let [node] = &config.nodes[..] else { panic!("{config:?}") };
    assert_eq!((&*node.name, node.agent.as_ref().map(Url::as_str)), ("gpu-a", Some("http://gpu-a:7072/")));
    let gpus = ["0", "GPU-1"].map(|gpu| GpuName { node: name("gpu-a"), gpu: name(gpu) });
    assert_eq!((&second.workers[0].gpus[..], second.workers[0].is_here()), (&gpus[..], true));
    assert!(a.gpus.is_empty() && !a.is_here());
}

#[test]
fn models_that_take_turns_in_a_gpu() {
    let text = "[[node]]\nname = 'a'\ngpu_memory_gib = 80\n[[node]]\nname = 'b'\nagent = 'http://b'\n\
                [[model]]\nname = 'm'\n[[model.worker]]\nurl = 'http://a:1'\ngpus = ['a/0', 'a/1']\nsleep = true\n\
                memory_gib = 40\nawake_seconds_min = 5\n[[model.worker]]\nurl = 'http://a:2'";
    let config = reader([]).text("f.toml", text).unwrap_or_else(|mistakes| panic!("{mistakes}"));
    let [a, b] = &config.nodes[..] else { panic!("{config:?}") };
    assert_eq!((&a.agent, a.gpu_memory_gib), (&None, NonZeroU32::new(80)));
    assert_eq!(b.agent.as_ref().map(Url::as_str), Some("http://b:7072/"), "an agent's usual port");
    let [turns, stays] = &config.models[0].workers[..] else { panic!("{config:?}") };
    assert_eq!((turns.sleep, turns.memory_gib, turns.awake_min), (true, NonZeroU32::new(40), Duration::from_secs(5)));
    assert_eq!((stays.sleep, stays.memory_gib, stays.awake_min), (false, None, Duration::from_secs(30)));
    let refuse = |text: &str, expect: &str| {
        let said = reader([]).text("f.toml", text).unwrap_err().to_string();
        assert!(said.contains(expect), "{said}");
    };
    let model = "[[model]]\nname = 'm'\n[[model.worker]]\nurl = 'http://a:1'\n";
    let ranks = format!("{model}kv_events = 'tcp://a:5557'\ndata_parallel = 2");
    refuse(&ranks, "data_parallel is 2: cannot stand beside `sleep`, nor beside `kv_events`");
    let node = "[[node]]\nname = 'a'\nagent = 'http://a:7072'\n";
    refuse(&format!("{model}sleep = true"), "sleep is true: needs `gpus` beside it");
    // Neither of these stands in the way of another.
    let many = format!("[[node]]\nname = 'a'\ngpu_memory_gib = 0\n{model}gpus = ['a/0', 'b/0']\nsleep = true");
    let bad_gpus = format!("{node}{model}gpus = ['b/0']\nsleep = true\nmemory_gib = 0");
    let bad_sleep = format!("{model}sleep = 1\nawake_seconds_min = 5");
    for (text, keys) in [
        (many, &["node[0].gpu_memory_gib", "model[0].worker[0].gpus[1]"][..]),
        (bad_gpus, &["model[0].worker[0].gpus[0]", "model[0].worker[0].memory_gib"]),
        (bad_sleep, &["model[0].worker[0].sleep"]),
    ] {
        let mistakes = reader([]).text("f.toml", &text).unwrap_err();
        assert_eq!(mistakes.iter().map(|mistake| &mistake.key[..]).collect::<Vec<_>>(), keys, "{mistakes}");
    }
    refuse(&format!("{node}{model}gpus = []\nsleep = true"), "sleep is true: needs `gpus` beside it");
    for sleep in ["", "sleep = false\n"] {
        let idle = format!("{node}{model}gpus = ['a/0']\n{sleep}awake_seconds_min = 5");
        refuse(&idle, "awake_seconds_min is without effect: needs `sleep = true` beside it");
    }
    let sized = |node: &str, gib: u32| format!("[[node]]\nname = '{node}'\ngpu_memory_gib = {gib}\n");
    let (big, small) = (sized("big", 80), sized("small", 24));
    let large = format!("{big}{small}{model}gpus = ['big/0', 'small/0']\nmemory_gib = ");
    assert!(reader([]).text("f.toml", &format!("{large}24")).is_ok());
    let remedy = "must be at most 24, the `gpu_memory_gib` of node small";
    refuse(&format!("{large}25"), &format!("f.toml:12:14: model[0].worker[0].memory_gib is 25: {remedy}"));
    let twice = format!("{node}{model}gpus = ['a/0', 'a/1', 'a/0']");
    refuse(&twice, "gpus[2] is \"a/0\": must name each GPU once");
    let same = format!("{node}[[node]]\nname = 'b'\nagent = 'http://a'\n{model}");
    refuse(&same, "must be the agent of one node: ");
    refuse(&format!("[[node]]\nname = 'a'\n{model}"), "node[0].agent is missing");
    let kept = reader([]).text("f.toml", &format!("[[node]]\nname = 'a'\nagent = 'http://a:80'\n{model}")).unwrap();
    assert_eq!(kept.nodes[0].agent.as_ref().and_then(Url::port_or_known_default), Some(80), "as it was written");
}

#[test]
fn adapters_of_a_model() {
    let worker = "[[model.worker]]\nurl = 'http://a:1'\n";
    let text = format!(
        "[[model]]\nname = 'm'\nadapters_max = 3\n{worker}[[model.adapter]]\nname = 'sql'\npath = '/a/sql'\nmemory_mib = 64\n\
         [[model.adapter]]\nname = 'law'\n[[model]]\nname = 'n'\n[[model.fallback]]\nto = 'sql'\n[[model.worker]]\nurl = 'http://a:2'"
    );
    let config = reader([]).text("f.toml", &text).unwrap_or_else(|mistakes| panic!("{mistakes}"));
    let model = &config.models[0];
    let [sql, law] = &model.adapters[..] else { panic!("{config:?}") };
    assert_eq!((&*sql.name, sql.path.as_deref(), sql.memory_mib), ("sql", Some("/a/sql"), NonZeroU32::new(64)));
    assert_eq!((&*law.name, law.path.as_deref(), model.adapters_max), ("law", None, NonZeroU32::new(3)));
    let refuse = |adapter: &str, expect: &str| {
        let text = format!("[[model]]\nname = 'm'\naliases = ['b']\n{worker}[[model.adapter]]\n{adapter}");
        let said = reader([]).text("f.toml", &text).unwrap_err().to_string();
        assert!(said.contains(expect), "{said}");
    };
    refuse("path = '/a'", "adapter[0].name is missing");
    refuse("name = 'b'", "must be unique among names and aliases");
    refuse("name = 'x*'", "must be a whole name");
    refuse("name = 'x'\npath = ''", "must say where workers find the adapter");
    refuse("name = 'x'\nmemory_mib = 1", "memory_mib is without effect: needs `path` beside it");
    refuse("name = 'x'\nrank = 1", "adapter[0].rank");
}

#[test]
fn the_example_file_is_good() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/examples/forebay.toml");
    let config = reader([]).load(&path).unwrap_or_else(|mistakes| panic!("{mistakes}"));
    assert_eq!(config.server, Server::default(), "the example shows the defaults");
    let model = &config.models[0];
    let plain = Model::new(model.name.clone(), model.workers.clone(), &config.server);
    assert_eq!(*model, Model { aliases: model.aliases.clone(), ..plain }, "the example shows the defaults");
}

#[test]
fn without_a_file_the_defaults_hold() {
    let config = reader([]).without_file().unwrap();
    assert_eq!(config, Config { server: Server::default(), nodes: Vec::new(), models: Vec::new() });
    let lines = reader([("FOREBAY__SERVER__LISTEN", "nowhere")]).without_file().unwrap_err().to_string();
    assert_eq!(
        lines,
        "FOREBAY__SERVER__LISTEN: server.listen is \"nowhere\": must be an IP address and a port, as in \"127.0.0.1:7070\" or \"[::1]:7070\""
    );
}

#[test]
fn server_values() {
    let address = "must be an IP address and a port, as in \"127.0.0.1:7070\" or \"[::1]:7070\"";
    check_server("listen = 'localhost:0'", &[]);
    check_server("listen = '[::ffff:127.0.0.1]:1'", &[]);
    check_server("listen = '7070'", &[&format!("f.toml:2:10: server.listen is \"7070\": {address}")]);
    check_server("listen = 'gpu-a:7070'", &[&format!("f.toml:2:10: server.listen is \"gpu-a:7070\": {address}")]);
    check_server("listen = 7070", &["f.toml:2:10: server.listen is 7070: must be a string in quotes"]);
    check_server(
        "listen = '0.0.0.0:1'\nops_listen = '[::]:2'",
        &[
            "f.toml:2:10: server.listen is \"0.0.0.0:1\": must be a loopback address such as 127.0.0.1 while callers are not authenticated (or set server.allow_unauthenticated = true)",
            "f.toml:3:14: server.ops_listen is \"[::]:2\": must be a loopback address such as 127.0.0.1 while callers are not authenticated (or set server.allow_unauthenticated = true)",
        ],
    );
    check_server("allow_unauthenticated = true\nlisten = '0.0.0.0:1'", &[]);
    check_server(
        "listen = '127.0.0.1:7071'",
        &[
            "f.toml:2:10: server.listen is \"127.0.0.1:7071\": the two listeners must differ (server.listen 127.0.0.1:7071, server.ops_listen 127.0.0.1:7071)",
        ],
    );
    check_server(
        "allow_unauthenticated = true\nlisten = '0.0.0.0:1'\nops_listen = '127.0.0.1:1'",
        &[
            "f.toml:4:14: server.ops_listen is \"127.0.0.1:1\": the two listeners must differ (server.listen 0.0.0.0:1, server.ops_listen 127.0.0.1:1)",
        ],
    );
    check_server("listen = '127.0.0.1:0'\nops_listen = '127.0.0.1:0'", &[]);
    check_server(
        "data_dir = ''",
        &[
            "f.toml:2:12: server.data_dir is \"\": must be the path of a directory (omit the key for the default ./forebay-data)",
        ],
    );
    check_server("access_log = 'off'", &["f.toml:2:14: server.access_log is \"off\": must be true or false"]);
    check_server(
        "body_bytes_max = 0\nmax_connections = -1\ndrain_seconds = 1.5\n",
        &[
            "f.toml:2:18: server.body_bytes_max is 0: must be at least 1024 (omit the key for the default 33554432)",
            "f.toml:3:19: server.max_connections is -1: must be at least 1 (omit the key for the default 20000)",
            "f.toml:4:17: server.drain_seconds is 1.5: must be a whole number from 0 to 86400 (omit the key for the default 30)",
        ],
    );
    check_server(
        "drain_seconds = 99999999999999999999999999999999999999999999",
        &[
            "f.toml:2:17: server.drain_seconds is 99999999999999999999999999999999999999999999: must be at most 86400 (omit the key for the default 30)",
        ],
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().display();
    check_server(
        &format!("data_dir = '{path}'"),
        &[&format!(
            "f.toml:2:12: server.data_dir is \"{path}\": must be a directory, or a path where one can be made: a file is there"
        )],
    );
}

#[test]
fn unknown_keys() {
    check_server("lisen = 'secret'", &["f.toml:2:1: server.lisen is not a known key: did you mean `listen`?"]);
    check_server(
        "cluster = true",
        &[
            "f.toml:2:1: server.cluster is not a known key: known here: listen, ops_listen, data_dir, allow_unauthenticated, body_bytes_max, max_connections, stall_seconds_max, otlp, trace_share, drain_seconds, access_log",
        ],
    );
    check_server(
        "\"\\n\" = 1\nlisten.x = 1",
        &[
            "f.toml:2:1: server.\"\\n\" is not a known key: known here: listen, ops_listen, data_dir, allow_unauthenticated, body_bytes_max, max_connections, stall_seconds_max, otlp, trace_share, drain_seconds, access_log",
            "f.toml:3:1: server.listen is a table: must be a string in quotes",
        ],
    );
    check(&format!("sever.listen = 'x'\n{MODEL}"), &["f.toml:1:1: sever is not a known key: did you mean `server`?"]);
    check_worker(
        "url = 'http://w:1'\nmax_model_len = 5",
        &[
            "f.toml:5:1: model[0].worker[0].max_model_len is not a known key: it is a key of `model[0]`: move it above the header of `model[0].worker[0]`",
        ],
    );
}

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
    for (key, value) in [("sleep", "true"), ("data_parallel", "2"), ("token_ids", "true")] {
        check_with(&reader, &worker("vllm", &format!("{key} = {value}")), &[]);
        let said = format!("model[0].worker[0].{key} is beyond what tgi can: omit the key for this engine");
        let at = format!("f.toml:7:{}", key.len() + 4);
        check_with(&reader, &worker("tgi", &format!("{key} = {value}")), &[&format!("{at}: {said}")]);
    }
    check_with(&reader, &worker("tgi", "sleep = false\ndata_parallel = 1\ntoken_ids = false"), &[]);
}

#[test]
fn nodes_and_the_gpus_that_workers_name() {
    let url = "url = 'http://w:1'\n";
    check_worker(&format!("{url}gpus = ['local/0', 'local/MIG-1']"), &[]);
    check_worker(
        &format!("{url}gpus = ['0', 'gpu-a/0']"),
        &[
            "f.toml:5:9: model[0].worker[0].gpus[0] is \"0\": must be a node and a GPU's index or UUID there, as in \"gpu-a/0\"",
            "f.toml:5:14: model[0].worker[0].gpus[1] is \"gpu-a/0\": must begin with a `[[node]]`'s name; without one with \"local/\", this machine's",
        ],
    );
    let form = "must be http:// or https://, a host and its port, and nothing more, as in http://gpu-a:7072";
    check(
        &format!(
            "[[node]]\nname = 'a'\nagent = 'http://a:7072'\n[[node]]\nname = 'a'\nagent = 'http://u:p@b:7072'\n[[node]]\nagent = 'b:7072'\n{MODEL}gpus = ['local/0']\n"
        ),
        &[
            "f.toml:5:8: node[1].name is \"a\": must be unique among nodes: `node[0].name` (f.toml:2:8) has it already",
            &format!("f.toml:6:9: node[1].agent is (redacted): {form}"),
            "f.toml:7:1: node[2].name is missing: write the name by which workers' `gpus` call the machine",
            &format!("f.toml:8:9: node[2].agent is \"b:7072\": {form}"),
            "f.toml:13:9: model[0].worker[0].gpus[0] is \"local/0\": must begin with the name of a `[[node]]`: a",
        ],
    );
}

#[test]
fn the_collector_of_traces() {
    let form = "must be http:// or https://, a host and its port, and nothing more, as in http://127.0.0.1:4317";
    for (address, shown) in
        [("http://h:4318/v1/traces", "\"http://h:4318/v1/traces\""), ("http://u:p@h:4317", "(redacted)")]
    {
        check(
            &format!("[server]\notlp = '{address}'\n{MODEL}"),
            &[&format!("f.toml:2:8: server.otlp is {shown}: {form}")],
        );
    }
}

#[test]
fn parts_that_come_later_are_refused() {
    check(
        &format!("{MODEL}[model.overflow]\nto = 'cloud'\n[[provider]]\nname = 'cloud'\n"),
        &[
            "f.toml:5:8: model[0].overflow is not supported by this version (table): remove it",
            "f.toml:7:3: provider is not supported by this version (array): remove it",
        ],
    );
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
fn model_values() {
    check(
        "",
        &[
            "f.toml:1:1: model is missing: add a `[[model]]` and its workers (engines are looked for only where there is no file)",
        ],
    );
    check(
        "\n[[model]]\n",
        &[
            "f.toml:2:1: model[0].name is missing: write the name that clients ask for",
            "f.toml:2:1: model[0].worker is missing: add a `[[model.worker]]` with its `url` below the model, or a `[[model.discover]]`",
        ],
    );
    check(
        "model = []",
        &[
            "f.toml:1:1: model is missing: add a `[[model]]` and its workers (engines are looked for only where there is no file)",
        ],
    );
    check(
        "[model]\nname = 'm'\n[[model.worker]]\nurl = 'http://w:1'",
        &["f.toml:1:1: model[0] is a table: must be a list of tables: write `[[model]]`"],
    );
    check("model = [1]", &["f.toml:1:10: model[0] is 1: must be a list of tables: write `[[model]]`"]);
    check_model(
        "queue_requests_max = 0\nmax_model_len = '8k'\nattempts_max = 17\nidle_seconds = 0\nqueue_bytes_max = 1",
        &[
            "f.toml:3:22: model[0].queue_requests_max is 0: must be at least 1 (omit the key for the default 4096)",
            "f.toml:4:17: model[0].max_model_len is \"8k\": must be a whole number from 1 to 4294967295 (omit the key to take what the workers report)",
            "f.toml:5:16: model[0].attempts_max is 17: must be at most 16 (omit the key for the default 3)",
            "f.toml:6:16: model[0].idle_seconds is 0: must be at least 1 (omit the key for the default 60)",
            "f.toml:7:19: model[0].queue_bytes_max is 1: must be at least 33554432 (omit the key for the default 268435456)",
        ],
    );
    check_model(
        "policy = 'random'\nqueue_tokens_max = 0\nworker_grace_seconds = -1",
        &[
            "f.toml:3:10: model[0].policy is \"random\": must be one of forebay, round-robin, least-requests (omit the key for forebay)",
            "f.toml:4:20: model[0].queue_tokens_max is 0: must be at least 1 (omit the key for the default 16777216)",
            "f.toml:5:24: model[0].worker_grace_seconds is -1: must be at least 0 (omit the key for the default 2)",
        ],
    );
    check(
        "[[model]]\nname = 'm'\n[model.classes]\ndefault = 1.5\nbatch = 'some'\nbulk = 0.1\n[[model.worker]]\nurl = 'http://w:1'",
        &[
            "f.toml:4:11: model[0].classes.default is 1.5: must be a number from 0 to 1 (omit the key for the default 0.1)",
            "f.toml:5:9: model[0].classes.batch is \"some\": must be a number from 0 to 1 (omit the key for the default 0.02)",
            "f.toml:6:1: model[0].classes.bulk is not a known key: known here: interactive, default, batch",
        ],
    );
    check(
        "[[model]]\nname = 'm'\n[model.classes]\ninteractive = 1\n[[model.worker]]\nurl = 'http://w:1'",
        &["f.toml:3:1: model[0].classes is 1.12: the shares of the classes must be at most 1 together"],
    );
    check_model("classes = 1", &["f.toml:3:11: model[0].classes is 1: must be a table: write `[model.classes]`"]);
    check_model(
        "micro_batch = { max_tokens = 2_000_000, max_delay_ms = 0.5, delay = 1 }",
        &[
            "f.toml:3:30: model[0].micro_batch.max_tokens is 2_000_000: must be at most 1048576 (omit the key for the default 8192)",
            "f.toml:3:56: model[0].micro_batch.max_delay_ms is 0.5: must be a whole number from 0 to 10000 (omit the key for the default 5)",
            "f.toml:3:61: model[0].micro_batch.delay is not a known key: known here: max_tokens, max_delay_ms",
        ],
    );
    let off = format!("{MODEL}micro_batch.max_tokens = 0\n").replace("[[model.worker]]\nurl = 'http://w:1'\n", "");
    let off = reader([]).text("f.toml", &format!("{off}[[model.worker]]\nurl = 'http://w:1'\n")).unwrap();
    assert_eq!(off.models[0].micro_batch, None);
    let bad_name = "must be 1 to 256 bytes long, without control characters and without spaces at its ends";
    check_model(
        "aliases = ['é', '', 3]",
        &[
            &format!("f.toml:3:17: model[0].aliases[1] is \"\": {bad_name}"),
            "f.toml:3:21: model[0].aliases[2] is 3: must be a string in quotes",
        ],
    );
    check_model("aliases = 'a'", &["f.toml:3:11: model[0].aliases is \"a\": must be a list in square brackets"]);
}

#[test]
fn one_model_is_the_default_and_names_are_whole() {
    let model =
        |name: &str| format!("[[model]]\nname = '{name}'\ndefault = true\n[[model.worker]]\nurl = 'http://{name}:1'\n");
    check(
        &(model("a") + &model("b")),
        &[
            "f.toml:8:11: model[1].default is true: must stand at one model only: `model[0].default` (f.toml:3:11) is it already",
        ],
    );
    check(
        "[[model]]\nname = 'gpt-*'\n[[model.worker]]\nurl = 'http://w:1'\n",
        &["f.toml:2:8: model[0].name is \"gpt-*\": must be a whole name: write what holds a `*` among `aliases`"],
    );
    check_model("aliases = ['*', 'gpt-*']", &[]);
}

#[test]
fn fallbacks_and_hedges() {
    let config = reader([])
        .text(
            "f.toml",
            "[[model]]\nname = 'a'\nhedge_after_ms = 250\nfirst_token_seconds = 3\n\
             fallback = [{ to = 'big', on = ['context_length'] }, { to = 'c' }]\n[[model.worker]]\nurl = 'http://w:1'\n\
             [[model]]\nname = 'b'\naliases = ['big']\n[[model.fallback]]\nto = 'a'\n[[model.worker]]\nurl = 'http://w:2'\n\
             [[model]]\nname = 'c'\n[[model.worker]]\nurl = 'http://w:3'\n",
        )
        .unwrap();
    let [a, b, c] = &config.models[..] else { panic!("{config:?}") };
    let name = |text: &str| Name::new(text).unwrap();
    let usual = vec![Trouble::ContextLength, Trouble::Unavailable, Trouble::Error, Trouble::Deadline];
    let [first, second] = &a.fallbacks[..] else { panic!("{a:?}") };
    assert_eq!(*first, Fallback { to: name("big"), on: vec![Trouble::ContextLength] });
    assert_eq!(*second, Fallback { to: name("c"), on: usual });
    assert_eq!(
        (a.hedge_after, a.first_token_timeout),
        (Some(Duration::from_millis(250)), Some(Duration::from_secs(3)))
    );
    assert_eq!((b.fallbacks.len(), b.hedge_after, c.fallbacks.len()), (1, None, 0));

    let one_of =
        "one of context_length, unavailable, error, deadline, content_filter (omit `on` for all but content_filter)";
    check(
        "[[model]]\nname = 'a'\naliases = ['x']\nhedge_after_ms = 0\n\
         [[model.fallback]]\nto = 'x'\n[[model.fallback]]\nto = 'nobody'\non = ['errors']\n[[model.fallback]]\non = []\n\
         [[model.fallback]]\nto = 'b'\nmodel = 'b'\n[[model.fallback]]\nto = 'b'\n[[model.worker]]\nurl = 'http://w:1'\n\
         [[model]]\nname = 'b'\n[[model.worker]]\nurl = 'http://w:2'\n",
        &[
            "f.toml:4:18: model[0].hedge_after_ms is 0: must be at least 1 (omit the key to never ask twice)",
            "f.toml:6:6: model[0].fallback[0].to is \"x\": must be another model: this one leads back to itself",
            "f.toml:8:6: model[0].fallback[1].to is \"nobody\": must be a model of this file: a, b, x",
            &format!("f.toml:9:7: model[0].fallback[1].on[0] is \"errors\": must be {one_of}"),
            "f.toml:10:1: model[0].fallback[2].to is missing: write the name of the model that is to answer",
            &format!("f.toml:11:6: model[0].fallback[2].on is nothing: must name {one_of}"),
            "f.toml:14:1: model[0].fallback[3].model is not a known key: known here: to, on",
            "f.toml:16:6: model[0].fallback[4].to is \"b\": must stand once in a model: `model[0].fallback[3].to` (f.toml:13:6) leads there, too",
        ],
    );
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
fn lists_of_workers() {
    let model = |keys: &str| format!("[[model]]\nname = 'm'\n[[model.discover]]\n{keys}\n");
    let source =
        |keys: &str| reader([]).text("f.toml", &model(keys)).unwrap().models.remove(0).discover.remove(0).source;
    let url = |text| Url::parse(text).unwrap();
    assert_eq!(source("file = '/w.json'"), Source::File("/w.json".into()));
    assert_eq!(
        source("dns = 'http://w.svc:8000/x/'\nresolver = '127.0.0.1:8600'"),
        Source::Addresses { url: url("http://w.svc:8000/x"), resolver: Some("127.0.0.1:8600".parse().unwrap()) }
    );
    assert_eq!(
        source("srv = 'https://_http._tcp.w'"),
        Source::Services { url: url("https://_http._tcp.w"), resolver: None }
    );
    let form = "and a name that DNS knows, as in";
    let cases = [
        ("every_seconds = 5", "f.toml:3:1: model[0].discover[0] is no list: write what lists the workers: `file`, `dns`, `srv`, `kubernetes`".to_owned()),
        ("file = 'a'\nsrv = 'http://w'", "f.toml:5:7: model[0].discover[0].srv is beside another list: must stand alone: write one `[[model.discover]]` for each list".to_owned()),
        ("file = 'a'\nresolver = '127.0.0.1:1'", "f.toml:5:12: model[0].discover[0].resolver is \"127.0.0.1:1\": needs `dns` or `srv` beside it".to_owned()),
        ("dns = 'https://w'", format!("f.toml:4:7: model[0].discover[0].dns is \"https://w\": must begin with http:// {form} http://vllm.models.svc:8000")),
        ("dns = 'http://10.0.0.1'", format!("f.toml:4:7: model[0].discover[0].dns is \"http://10.0.0.1\": must begin with http:// {form} http://vllm.models.svc:8000")),
        ("srv = 'http://u:p@w'", format!("f.toml:4:7: model[0].discover[0].srv is (redacted): must begin with http:// or https:// {form} http://_http._tcp.vllm.models.svc")),
        ("srv = 'http://_http._tcp.w:8000'", "f.toml:4:7: model[0].discover[0].srv is \"http://_http._tcp.w:8000\": must be without a port: each SRV record names its own".to_owned()),
        ("dns = 'http://w:8000/x/v1/'", "f.toml:4:7: model[0].discover[0].dns is \"http://w:8000/x/v1/\": must not end in /v1: write the address in front of it".to_owned()),
        ("dns = 'http://w:0'", "f.toml:4:7: model[0].discover[0].dns is \"http://w:0\": must have a port that can be connected to".to_owned()),
        ("file = 'a'\nresolver = 'x'", "f.toml:5:12: model[0].discover[0].resolver is \"x\": must be the address and port of a DNS server, as in 127.0.0.1:8600".to_owned()),
        ("file = 'a'\nevery_seconds = 0", "f.toml:5:17: model[0].discover[0].every_seconds is 0: must be at least 1 (omit the key for the default 5)".to_owned()),
    ];
    for (keys, expect) in cases {
        check(&model(keys), &[&expect]);
    }
}

#[test]
fn what_kubernetes_runs() {
    let of = |keys: &str| format!("[[model]]\nname = 'm'\n[[model.discover]]\nkubernetes = {keys}\n");
    let built = "f.toml:4:14: model[0].discover[0].kubernetes is nothing that this program was built with: build it with \
                 `cargo build --release --features kubernetes`, or use `dns` with a headless service";
    let check = |keys: &str, expect: &[&str]| {
        let built = (!HAS_KUBERNETES).then_some(built);
        check(&of(keys), &built.iter().chain(expect).copied().collect::<Vec<_>>());
    };
    check("{ service = 'vllm' }", &[]);
    check("{ pods = 'app in (vllm, sglang),tier!=x', namespace = 'models', port = 'http' }", &[]);
    let prefix = "model[0].discover[0].kubernetes";
    let name = |most: u32| format!("must be 1 to {most} small letters, digits and hyphens, as Kubernetes names it");
    check(
        "{ service = 'a.b', port = 0 }",
        &[
            &format!("f.toml:4:26: {prefix}.service is \"a.b\": {}", name(63)),
            &format!("f.toml:4:40: {prefix}.port is 0: must be at least 1 (omit the key where the pods have but one)"),
        ],
    );
    check(
        "{ pods = ' ', namespace = 'A', port = 'of-too-many-letters' }",
        &[
            &format!("f.toml:4:23: {prefix}.pods is \" \": must be a label selector, as in \"app=vllm,model=llama\""),
            &format!("f.toml:4:40: {prefix}.namespace is \"A\": {}", name(63)),
            &format!("f.toml:4:52: {prefix}.port is \"of-too-many-letters\": {}", name(15)),
        ],
    );
    check(
        "{ service = 'a', pods = 'b=c' }",
        &[&format!(
            "f.toml:4:38: {prefix}.pods is beside a service: must stand alone: the service selects its pods itself"
        )],
    );
    check(
        "{ port = 1 }",
        &[&format!(
            "f.toml:4:14: {prefix} is without pods: write `service`, the name of a service, or `pods`, a label selector as in \"app=vllm\""
        )],
    );
    if HAS_KUBERNETES {
        let config = reader([]).text("f.toml", &of("{ pods = 'a=b', port = 8000 }")).unwrap();
        let workload =
            Workload { namespace: None, behind: Behind::Labels, selector: "a=b".to_owned(), port: Port::Number(8000) };
        assert_eq!(config.models[0].discover[0].source, Source::Kubernetes(workload));
    }
}

#[test]
fn a_version_has_a_model_and_is_not_the_latest() {
    for name in ["llama@", "@2", "llama@latest"] {
        let expect = format!(
            "f.toml:2:8: model[0].name is {name:?}: must have a name before its last `@`, and behind it a version (`latest` \
             means the newest of them)"
        );
        check(&format!("[[model]]\nname = '{name}'\n[[model.worker]]\nurl = 'http://w'\n"), &[&expect]);
    }
    check("[[model]]\nname = 'a@b@2'\naliases = ['a@latest']\n[[model.worker]]\nurl = 'http://w'\n", &[]);
}

#[test]
fn names_are_unique() {
    check(
        "[[model]]\nname = 'a'\naliases = ['b', 'b']\n[[model.worker]]\nurl = 'http://w:1'\n\
         [[model]]\nname = 'b'\naliases = ['a']\n[[model.worker]]\nname = 'w:1'\nurl = 'http://w:2'\n",
        &[
            "f.toml:3:17: model[0].aliases[1] is \"b\": must be unique among names and aliases: `model[0].aliases[0]` (f.toml:3:12) has it already",
            "f.toml:7:8: model[1].name is \"b\": must be unique among names and aliases: `model[0].aliases[0]` (f.toml:3:12) has it already",
            "f.toml:8:12: model[1].aliases[0] is \"a\": must be unique among names and aliases: `model[0].name` (f.toml:2:8) has it already",
            "f.toml:10:8: model[1].worker[0].name is \"w:1\": must be unique among the names of workers, which are host:port where `name` is omitted: `model[0].worker[0].url` (f.toml:5:7) has it already",
        ],
    );
    check_worker(
        "url = 'http://w:1'\n[[model.worker]]\nname = 'other'\nurl = 'http://w:1/'\n",
        &[
            "f.toml:7:7: model[0].worker[1].url is \"http://w:1/\": must stand once in a model: `model[0].worker[0].url` (f.toml:4:7) is the same",
        ],
    );
    check_worker(
        "url = 'http://w:1'\nmodel = 'x'\n[[model.worker]]\nname = 'other'\nmodel = 'y'\nurl = 'http://w:1'\n",
        &[],
    );
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

#[test]
fn secrets_are_read_and_never_shown() {
    let dir = tempfile::tempdir().unwrap();
    let [key, empty, absent] = ["key", "empty", "absent"].map(|name| dir.path().join(name).display().to_string());
    std::fs::write(&key, "hunter2\n").unwrap();
    std::fs::write(&empty, "\n").unwrap();
    let reader = reader([("KEY", "hunter2"), ("EMPTY", ""), ("TWO_LINES", "hunter2\nhunter3")]);
    let text =
        |api_key: &str| format!("[[model]]\nname = 'm'\n[[model.worker]]\nurl = 'http://w:1'\napi_key = {api_key}\n");

    let from = |api_key: &str| reader.text("f.toml", &text(api_key)).unwrap();
    let (a, b) = (from("{ env = 'KEY' }"), from(&format!("{{ file = '{key}' }}")));
    assert_eq!(a, b);
    assert_eq!(a.models[0].workers[0].api_key.as_ref().unwrap().inner().expose_secret(), "hunter2");
    assert!(format!("{a:?}").contains("api_key: Some((redacted))"));
    assert!(!format!("{a:?} {reader:?}").contains("hunter"));

    let check = |api_key: &str, shown: &str, remedy: &str| {
        check_with(
            &reader,
            &text(api_key),
            &[&format!("f.toml:5:11: model[0].worker[0].api_key is {shown}: {remedy}")],
        );
    };
    let (form, holds) = (
        "must be { env = \"NAME\" } or { file = \"PATH\" }",
        "must hold a key: one line of printable ASCII, not empty",
    );
    let unset = "must name a variable that is set in the environment of this process";
    check("'hunter2'", "(redacted)", form);
    check("5", "(redacted)", form);
    check("{ key = 'hunter2' }", "(redacted)", form);
    check("{ env = 'KEY', file = 'hunter2' }", "(redacted)", form);
    check("{}", "(redacted)", form);
    check("{ env = 'NONE' }", "{ env = \"NONE\" }", unset);
    check("{ env = 'hunter2' }", "{ env = (redacted) }", unset);
    check("{ env = 'EMPTY' }", "{ env = \"EMPTY\" }", holds);
    check("{ env = 'TWO_LINES' }", "{ env = \"TWO_LINES\" }", holds);
    check(
        "{ file = 'hunter2' }",
        "{ file = (redacted) }",
        "must name a file that this process can read (entity not found)",
    );
    check(
        &format!("{{ file = '{absent}' }}"),
        &format!("{{ file = \"{absent}\" }}"),
        "must name a file that this process can read (entity not found)",
    );
    check(&format!("{{ file = '{empty}' }}"), &format!("{{ file = \"{empty}\" }}"), holds);
}

#[test]
fn tokenizers_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let make = |path: &str, text: &str| {
        let path = dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    make("hub/models--org--main/refs/main", "c2\n");
    make("hub/models--org--main/snapshots/c1/tokenizer.json", "{}");
    make("hub/models--org--main/snapshots/c2/tokenizer.json", "{}");
    make("hub/models--org--loose/snapshots/c1/tokenizer.json", "{}");
    make("hub/models--org--none/snapshots/c1/config.json", "{}");
    make("plain/config.json", "{}");
    let root = dir.path().display().to_string();
    let hub = dir.path().join("hub");
    let found = |variables: &[(&str, &str)], repository: &str| {
        variables.iter().copied().collect::<Environment>().cached_tokenizer(repository)
    };
    let home = [("HF_HOME", &*root)];
    assert_eq!(found(&home, "org/main"), Some(hub.join("models--org--main/snapshots/c2")));
    assert_eq!(found(&home, "org/loose"), Some(hub.join("models--org--loose/snapshots/c1")));
    let cache = hub.display().to_string();
    assert!(found(&[("HF_HUB_CACHE", &cache), ("HF_HOME", "/nowhere")], "org/loose").is_some());
    assert_eq!(found(&[], "org/main"), None);
    for absent in ["org/none", "org/unknown", "", "/", "org/", "../x", "a/b/c", "org/..", "org/ma in"] {
        assert_eq!(found(&home, absent), None, "{absent:?}");
    }

    let check = |tokenizer: &str, remedy: &str| {
        let text = format!("[[model]]\nname = 'm'\ntokenizer = '{tokenizer}'\n[[model.worker]]\nurl = 'http://w:1'\n");
        check_with(&reader(home), &text, &[&format!("f.toml:3:13: model[0].tokenizer is \"{tokenizer}\": {remedy}")]);
    };
    check(&format!("{root}/absent"), "must be a directory that exists, or hf:org/name");
    check(&format!("{root}/plain"), "must be a directory that holds tokenizer.json");
    check(&format!("{root}/plain/config.json"), "must be a directory that exists, or hf:org/name");
    check(
        "hf:org/none",
        "must be hf:org/name of a repository in the local cache with its tokenizer.json: fetch it with `hf download org/name`, or write the path of a directory",
    );
}

#[test]
fn broken_toml_hides_no_other_mistake() {
    // Several syntax errors, and a value mistake after them; the blanked lines are not called missing.
    check(
        "[server]\nlisten = 0.0.0.0:7070\ndata_dir = \"/tmp\n[[model]]\nname = m\nidle_seconds = 0\n[[model.worker]]\nurl = 'http://w:1'\n",
        &[
            "f.toml:2:13: the text is not valid TOML: invalid float, expected nothing",
            "f.toml:3:17: the text is not valid TOML: invalid basic string, expected `\"`",
            "f.toml:5:8: the text is not valid TOML: string values must be quoted, expected literal string",
            "f.toml:6:16: model[0].idle_seconds is 0: must be at least 1 (omit the key for the default 60)",
        ],
    );
    check(&format!("{MODEL}url = 'http://w:2'\n"), &["f.toml:5:1: the text is not valid TOML: duplicate key"]);
    // A broken header: what stands below would seem to belong elsewhere.
    check(
        "[[model]\nname = 'm'\nidle_seconds = 0\n",
        &["f.toml:1:9: the text is not valid TOML: unclosed array table, expected `]`"],
    );
    // The secret of a broken line is not repeated.
    check(
        "[[model]]\nname = 'm'\n[[model.worker]]\nurl = 'http://w:1'\napi_key = \"hunter2\nmodel = hunter2",
        &[
            "f.toml:5:19: the text is not valid TOML: invalid basic string, expected `\"`",
            "f.toml:6:9: the text is not valid TOML: string values must be quoted, expected literal string",
        ],
    );
    // Columns count characters.
    check(
        "'é' = 1 1",
        &["f.toml:1:7: the text is not valid TOML: string values must be quoted, expected literal string"],
    );
    check(
        "\u{feff}'é' = 1 1\r\nx = y\r\n",
        &[
            "f.toml:1:7: the text is not valid TOML: string values must be quoted, expected literal string",
            "f.toml:2:5: the text is not valid TOML: string values must be quoted, expected literal string",
        ],
    );
}

#[test]
fn a_queue_takes_the_longest_body() {
    let config = reader([]).text("f.toml", &format!("[server]\nbody_bytes_max = 1_073_741_824\n{MODEL}")).unwrap();
    assert_eq!(config.models[0].queue_bytes_max, 1 << 30);
}

#[test]
fn files_that_cannot_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f.toml");
    let shown = path.display();
    let lines = || reader([]).load(&path).unwrap_err().to_string();
    assert_eq!(
        lines(),
        format!(
            "{shown}: the file is not readable (No such file or directory (os error 2)): check the path and its permissions"
        )
    );
    std::fs::write(&path, b"\n[server]\n# \xff\n").unwrap();
    assert_eq!(lines(), format!("{shown}:3:3: the text is not UTF-8 here: save the file as UTF-8"));
    std::fs::write(&path, MODEL).unwrap();
    assert!(reader([]).load(&path).is_ok());
}

#[test]
fn environment_and_flags_override_the_file() {
    let flag = |value: &str| Flag { name: "--listen", key: "listen", value: value.to_owned() };
    let text = format!("[server]\nlisten = '127.0.0.1:1'\ndata_dir = 'file'\ndrain_seconds = 1\n{MODEL}");
    let mut reader = reader([
        ("FOREBAY__SERVER__LISTEN", "127.0.0.1:2"),
        ("FOREBAY__SERVER__DRAIN_SECONDS", "1_0"),
        ("FOREBAY__SERVER__ACCESS_LOG", "false"),
        ("FOREBAY_DATA_DIR", "variable"),
        ("FOREBAY_PORT", "tcp://10.0.0.1:80"),
        ("FOREBAY_SERVICE_HOST", "10.0.0.1"),
    ]);
    let server = reader.text("f.toml", &text).unwrap().server;
    assert_eq!((server.listen.port(), server.drain.as_secs(), server.access_log), (2, 10, false));
    assert_eq!(server.data_dir, Path::new("variable"));
    reader.flags.push(flag("127.0.0.1:3"));
    assert_eq!(reader.text("f.toml", &text).unwrap().server.listen.port(), 3);
    reader.flags.push(flag("0.0.0.0:3"));
    check_with(
        &reader,
        &text,
        &[
            "--listen: server.listen is \"0.0.0.0:3\": must be a loopback address such as 127.0.0.1 while callers are not authenticated (or set server.allow_unauthenticated = true)",
        ],
    );
}

#[test]
fn mistakes_in_the_environment() {
    let reader = reader([
        ("FOREBAY__SERVER__LISEN", "x"),
        ("FOREBAY__SERVER__DRAIN_SECONDS", "soon"),
        ("FOREBAY__MODEL__0__NAME", "x"),
    ]);
    // The file's own value is checked although the flag wins.
    let flags = vec![Flag { name: "--ops-listen", key: "ops_listen", value: "127.0.0.1:9".to_owned() }];
    check_with(
        &Reader { flags, ..reader },
        &format!("server.ops_listen = 'x'\n{MODEL}"),
        &[
            "f.toml:1:21: server.ops_listen is \"x\": must be an IP address and a port, as in \"127.0.0.1:7070\" or \"[::1]:7070\"",
            "FOREBAY__MODEL__0__NAME: model.0.name is not for the environment: write it in the config file (variables give the keys of one table, `FOREBAY__SERVER__…`)",
            "FOREBAY__SERVER__DRAIN_SECONDS: server.drain_seconds is \"soon\": must be a whole number from 0 to 86400 (omit the key for the default 30)",
            "FOREBAY__SERVER__LISEN: server.lisen is not a known key: did you mean `listen`?",
        ],
    );
}

#[test]
fn a_variable_that_is_no_text() {
    use std::os::unix::ffi::OsStringExt as _;
    let value = std::ffi::OsString::from_vec(vec![0xff]);
    let environment = [("FOREBAY_DATA_DIR", value)].into_iter().collect();
    check_with(
        &Reader { environment, ..reader([]) },
        MODEL,
        &["FOREBAY_DATA_DIR: server.data_dir is not UTF-8: must be readable text"],
    );
}

#[test]
fn a_reload_keeps_what_a_running_gateway_cannot_change() {
    let read = |keys: &str| reader([]).text("f.toml", &format!("[server]\n{keys}\n{MODEL}")).unwrap();
    let running =
        read("allow_unauthenticated = true\nlisten = '0.0.0.0:1'\ndata_dir = 'a'\nbody_bytes_max = 1_000_000_000");
    let mut new = read(
        "listen = '127.0.0.1:1'\nops_listen = '127.0.0.1:9'\ndata_dir = 'b'\ndrain_seconds = 1\nmax_connections = 7\naccess_log = false",
    );
    assert_eq!(
        new.keep_fixed(&running),
        [
            "server.listen stays 0.0.0.0:1: 127.0.0.1:1 needs a restart",
            "server.ops_listen stays 127.0.0.1:7071: 127.0.0.1:9 needs a restart",
            "server.data_dir stays \"a\": \"b\" needs a restart",
            "server.allow_unauthenticated stays true: false needs a restart",
            "server.body_bytes_max stays 1000000000: 33554432 needs a restart",
            "server.max_connections stays 20000: 7 needs a restart",
            "server.access_log stays true: false needs a restart",
        ]
    );
    assert_eq!(new.models[0].queue_bytes_max, 1_000_000_000);
    assert_eq!(new.server, Server { drain: Duration::from_secs(1), ..running.server.clone() });
    assert_eq!(new.keep_fixed(&running), Vec::<String>::new());
}

#[test]
fn a_text_full_of_mistakes_stays_readable() {
    let text = (0..5000).fold(String::new(), |mut text, n| {
        writeln!(text, "key{n} = {n}").unwrap();
        text
    });
    let mistakes = reader([]).text("f.toml", &text).unwrap_err();
    assert_eq!(mistakes.iter().count(), 200);
    assert!(mistakes.to_string().ends_with("\nand 4801 more"), "{mistakes}");
}
