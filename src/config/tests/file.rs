//! The file as a whole: what is in it, what is wrong with it, and what a new one changes.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use secrecy::ExposeSecret as _;

use super::*;

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
name = "second"
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
    assert_eq!(*second, Model::new(name("second"), second.workers.clone(), &config.server));
    assert_eq!(&*second.workers[0].name, "[::1]:8000");
    let [node] = &config.nodes[..] else { panic!("{config:?}") };
    assert_eq!((&*node.name, node.agent.as_ref().map(Url::as_str)), ("gpu-a", Some("http://gpu-a:7072/")));
    let gpus = ["0", "GPU-1"].map(|gpu| GpuName { node: name("gpu-a"), gpu: name(gpu) });
    assert_eq!((&second.workers[0].gpus[..], second.workers[0].is_here()), (&gpus[..], true));
    assert!(a.gpus.is_empty() && !a.is_here());
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
