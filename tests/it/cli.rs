//! The command line: help, mistakes, exit codes, `serve` without a configuration, and the demo.

use std::net::{SocketAddr, TcpListener};
use std::process::Command;

use crate::support::client;
use crate::support::eventually;
use crate::support::process::{Process, Worker, run};

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().expect("a directory")
}

#[test]
fn every_verb_has_help_with_an_example() {
    let here = directory();
    let (code, out, err) = run(&["--help"], here.path(), &[]);
    assert_eq!((code, err.as_str()), (0, ""));
    for verb in ["serve", "demo", "check", "simulate", "replay", "simulated-worker", "workers"] {
        assert!(out.contains(&format!("\n  {verb} ")), "{out}");
        let (code, out, err) = run(&[verb, "--help"], here.path(), &[]);
        assert_eq!((code, err.as_str()), (0, ""), "{verb}");
        assert!(out.contains(&format!("Example: forebay {verb} --")), "{out}");
    }
    let (code, out, _) = run(&["--version"], here.path(), &[]);
    assert_eq!((code, out.trim()), (0, concat!("forebay ", env!("CARGO_PKG_VERSION"))));
}

#[test]
fn wrong_use_exits_with_2_and_says_what_is_wrong() {
    let here = directory();
    for (arguments, says) in [
        (&[][..], "Usage: forebay"),
        (&["fly"], "fly"),
        (&["serve", "--fast"], "--fast"),
        (&["demo", "--workers", "0"], "--workers"),
        (&["simulated-worker", "--port", "70000"], "--port"),
        (&["workers", "--watch", "--decision", "x"], "--decision"),
        (&["workers", "--url", "ftp://here"], "--url"),
        (&["workers"], "FOREBAY_ADMIN_KEY"),
        (&["simulated-worker", "--fault", "explode"], "explode"),
        (&["serve", "--config", "absent.toml"], "absent.toml"),
        (&["serve", "--listen", "nowhere"], "--listen"),
        (&["check"], "forebay.toml"),
    ] {
        let (code, out, err) = run(arguments, here.path(), &[]);
        assert_eq!(code, 2, "{arguments:?}: {out}{err}");
        assert!(err.contains(says), "{arguments:?}: {err}");
    }
}

#[test]
fn check_names_every_mistake_with_its_place() {
    let here = directory();
    let file = here.path().join("forebay.toml");
    let good = "[server]\nlisten = \"127.0.0.1:0\"\n[[model]]\nname = \"m\"\n[[model.worker]]\nurl = \"http://gpu-a:8000\"\n\
                api_key = { env = \"WORKER_KEY\" }\n";
    std::fs::write(&file, good).expect("a file");
    for arguments in [&["check"][..], &["check", "--config", "forebay.toml"]] {
        let (code, out, err) = run(arguments, here.path(), &[("WORKER_KEY", "secret-1")]);
        assert_eq!((code, err.as_str()), (0, ""), "{out}");
        assert!(out.contains("no mistakes") && !out.contains("secret-1"), "{out}");
    }
    let bad = "[server]\nlisten = \"everywhere\"\nspeed = 9\n[[model]]\nname = \"m\"\nidle_seconds = 0\n\
               [[model.worker]]\nurl = \"gpu-a:8000\"\napi_key = { env = \"ABSENT_KEY\" }\n";
    std::fs::write(&file, bad).expect("a file");
    let (code, out, err) = run(&["check"], here.path(), &[]);
    assert_eq!((code, out.as_str()), (2, ""));
    let places = [
        "2:10: server.listen",
        "3:1: server.speed",
        "6:16: model[0].idle_seconds",
        "8:7: model[0].worker[0].url",
        "9:",
    ];
    for place in places {
        assert!(err.lines().any(|line| line.starts_with(&format!("forebay.toml:{place}"))), "no {place} in\n{err}");
    }
    assert!(err.lines().any(|line| line.starts_with("forebay.toml:9:") && line.contains("ABSENT_KEY")), "{err}");
    assert_eq!(err.lines().count(), places.len(), "each mistake once:\n{err}");
    // `serve` says the same and serves nothing.
    let (code, out, served) = run(&["serve"], here.path(), &[]);
    assert_eq!((code, out.as_str(), served.as_str()), (2, "", err.as_str()));
}

#[test]
fn a_busy_port_is_an_error_where_it_was_asked_for() {
    let here = directory();
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    let text = "[server]\nops_listen = \"127.0.0.1:0\"\n[[model]]\nname = \"m\"\n[[model.worker]]\nurl = \"http://127.0.0.1:1\"\n";
    std::fs::write(here.path().join("forebay.toml"), text).expect("a file");
    let (code, out, err) = run(&["serve", "--listen", &address], here.path(), &[]);
    assert_eq!(code, 1, "{out}{err}");
    assert!(err.contains(&format!("cannot listen on {address}")), "{err}");
    let port = address.rsplit(':').next().expect("a port");
    let events = format!("tcp://{address}");
    for flags in [&["--port", port][..], &["--port", "0", "--kv-events", &events]] {
        let (code, out, err) = run(&[&["simulated-worker"], flags].concat(), here.path(), &[]);
        assert_eq!((code, out.as_str()), (1, ""), "{err}");
        assert!(err.contains(&format!("cannot listen on {address}")), "{err}");
    }
}

#[test]
fn without_a_configuration_it_serves_what_it_finds() {
    // Somebody has the gateway's own port, or we take it.
    let _taken = TcpListener::bind("127.0.0.1:7070");
    let free =
        [8000, 30000, 3000, 8080, 11434].into_iter().find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok());
    let Some(port) = free else {
        println!("skipped: every usual port of an engine is taken on this machine");
        return;
    };
    let name = format!("found-{}", std::process::id());
    let worker = Worker::start_at(port, &["--model", &name]);
    assert_eq!(client::get(worker.address, "/health").status, 200, "it listens before it has loaded its tokenizer");
    let here = directory();
    let mut gateway = Process::start(&["serve"], here.path(), &[]);
    let client: SocketAddr =
        gateway.line(|line| line.split("clients: http://").nth(1)?.split(' ').next()?.parse().ok());
    let out = gateway.out();
    assert!(out.contains(&format!("found vllm at http://127.0.0.1:{port}/, serving {name}")), "{out}");
    assert!(out.contains("port 7070 is taken, using 707"), "{out}");
    assert_ne!(client.port(), 7070);
    eventually("an answer", || {
        let body = format!(r#"{{"model":"{name}","messages":[{{"role":"user","content":"hi"}}],"max_tokens":3}}"#);
        let answer = client::post(client, "/v1/chat/completions", &body);
        (answer.status == 200).then_some(())
    });
    gateway.signal("TERM");
    assert_eq!(gateway.wait().code(), Some(0));
    assert!(here.path().join("forebay-data/journal").is_dir());
}

#[test]
fn the_demo_shows_the_gateway_at_work() {
    let here = directory();
    let (code, out, err) = run(&["demo", "--once", "--workers", "3"], here.path(), &[]);
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains("worker-3") && out.trim_end().ends_with("all was well"), "{out}");
    assert!(!here.path().join("forebay-data").exists(), "it leaves nothing behind");
}

#[test]
fn the_demos_curl_line_works() {
    if Command::new("curl").arg("--version").output().is_err() {
        println!("skipped: no curl on this machine");
        return;
    }
    let here = directory();
    let mut demo = Process::start(&["demo"], here.path(), &[]);
    let first = demo.line(|line| line.starts_with("curl ").then(|| line.to_owned()));
    let second = demo.line(|line| Some(line.to_owned()));
    let output = Command::new("sh").arg("-c").arg(format!("{first}\n{second}")).output().expect("a shell");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert!(text.starts_with("data: {") && text.trim_end().ends_with("data: [DONE]"), "{text}");
    demo.signal("INT");
    assert_eq!(demo.wait().code(), Some(0));
}
