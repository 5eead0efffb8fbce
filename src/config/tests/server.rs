//! `[server]`, and what else the whole gateway has.

use secrecy::ExposeSecret as _;

use super::*;

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
fn a_queue_takes_the_longest_body() {
    let config = reader([]).text("f.toml", &format!("[server]\nbody_bytes_max = 1_073_741_824\n{MODEL}")).unwrap();
    assert_eq!(config.models[0].queue_bytes_max, 1 << 30);
}
