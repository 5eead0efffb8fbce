//! The agent on a GPU's machine, over a stand-in for the driver's library: what it reads, and what goes wrong there.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command};
use std::time::Instant;

use forebay_backends::signals::gpu::{Gpu, Process, Standing};

use crate::support::gpus::{Agent, StandIn, identity, library};
use crate::support::process::{Gateway, model, tokenizer};
use crate::support::{PATIENCE, eventually};

/// A child that does nothing, ended with its test.
struct Idle(Child);

impl Idle {
    fn start() -> Self {
        Self(Command::new("sleep").arg("600").spawn().expect("a child"))
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// All that HTTP/2 wants before a call.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// Connections that an agent has at once.
const CONNECTIONS_MAX: usize = 256;

/// Whether the agent closed a connection, as far as the kernel knows now.
fn is_closed(mut client: &TcpStream) -> bool {
    client.set_nonblocking(true).expect("a socket");
    let over = loop {
        match client.read(&mut [0; 64]) {
            Ok(0) => break true,
            Ok(_) => {}
            Err(error) => break error.kind() != ErrorKind::WouldBlock,
        }
    };
    client.set_nonblocking(false).expect("a socket");
    over
}

#[test]
fn whoever_makes_no_call_is_let_go_and_keeps_nobody_out() {
    let directory = tempfile::tempdir().expect("a directory");
    let [certificate, key] = identity(directory.path());
    let flags = ["--tls-cert", &certificate, "--tls-key", &key];
    let secret = Agent::over(StandIn::new(1), library(&[]), "127.0.0.1:0", &flags);
    let open = Agent::start(1);
    let worker = model("m", &[([127, 0, 0, 1], 1).into()], &format!("tokenizer = {:?}\n", tokenizer()));
    let node = format!("[[node]]\nname = \"n\"\nagent = \"https://localhost:{}\"\n", secret.address.port());
    let gateway = Gateway::start_unready("", &(node + &worker), &[("SSL_CERT_FILE", &certificate)]);
    let heard = || gateway.metric("forebay_gpu_temperature_celsius{node=\"n\",gpu=\"0\"}") == 40.0;
    eventually("the gateway to hear", || heard().then_some(()));
    // A TLS record's type and no more; nothing, a byte, and all but the call.
    let stalled: Vec<_> = [(&secret, &b"\x16"[..]), (&secret, b""), (&open, b""), (&open, b"P"), (&open, PREFACE)]
        .into_iter()
        .cycle()
        .take(5 * 100)
        .map(|(agent, said)| {
            let mut client = TcpStream::connect(agent.address).expect("it listens");
            client.write_all(said).expect("it takes it");
            client
        })
        .collect();
    // This one comes last, and is let in when it is one of so many.
    let mut subscriber = open.watch();
    assert!(subscriber.next().is_some_and(|snapshot| snapshot.gpus.len() == 1));
    let gone = stalled.iter().enumerate().filter(|(at, client)| at % 5 > 1 && is_closed(client)).count();
    assert!(300 - gone < CONNECTIONS_MAX, "{gone} of 300 were closed");
    eventually("all to be closed", || stalled.iter().all(is_closed).then_some(()));
    assert!(open.process.err().contains("no more connections are served"), "{}", open.process.err());
    // A call stays for as long as it likes.
    assert!((0..3).all(|_| subscriber.next().is_some()));
    assert!(heard() && !gateway.process.err().contains("nothing is heard"), "{}", gateway.process.err());
}

#[test]
fn whoever_asks_and_takes_no_answer_is_let_go() {
    let agent = Agent::start(1);
    let mut client = TcpStream::connect(agent.address).expect("it listens");
    client.write_all(PREFACE).expect("it takes it");
    client.set_nonblocking(true).expect("a socket");
    // Each wants an answer as long as itself, until none fits the socket any more.
    let pings = b"\0\0\x08\x06\0\0\0\0\0ABCDEFGH".repeat(1000);
    let mut rest = &pings[..];
    eventually("it to be closed", || {
        loop {
            match client.write(rest) {
                Ok(taken) => rest = Some(&rest[taken..]).filter(|rest| !rest.is_empty()).unwrap_or(&pings),
                Err(error) => return (error.kind() != ErrorKind::WouldBlock).then_some(()),
            }
        }
    });
}

/// Makes a call, takes it back when it is answered, and answers all that the agent asks from then on. Whether the agent
/// closed the connection in time.
fn is_let_go_after_a_call(agent: &Agent) -> bool {
    let frame = |kind: u8, flags: u8, stream: u8, body: &[u8]| {
        [&[0, 0, u8::try_from(body.len()).expect("short"), kind, flags, 0, 0, 0, stream], body].concat()
    };
    let field = |name: &str, value: &str| {
        let text = |text: &str| [&[u8::try_from(text.len()).expect("short")], text.as_bytes()].concat();
        [vec![0], text(name), text(value)].concat()
    };
    let head = [
        field(":method", "POST"),
        field(":scheme", "http"),
        field(":path", "/forebay.telemetry.v1.Telemetry/Watch"),
        field(":authority", "agent"),
        field("content-type", "application/grpc"),
        field("te", "trailers"),
    ];
    let mut client = TcpStream::connect(agent.address).expect("it listens");
    client.set_read_timeout(Some(PATIENCE)).expect("a socket");
    let call = [PREFACE, &frame(1, 4, 1, &head.concat()), &frame(0, 1, 1, &[0; 5])].concat();
    client.write_all(&call).expect("it takes it");
    let (began, mut called) = (Instant::now(), false);
    while began.elapsed() < PATIENCE {
        let mut head = [0; 9];
        if let Err(error) = client.read_exact(&mut head) {
            return called && error.kind() != ErrorKind::WouldBlock;
        }
        let mut body = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        client.read_exact(&mut body).expect("the rest of a frame");
        let answer = match (head[3], head[4]) {
            (1, _) => {
                called = true;
                frame(3, 0, 1, &[0, 0, 0, 8])
            }
            (6, 0) => frame(6, 1, 0, &body),
            _ => continue,
        };
        let _ = client.write_all(&answer);
    }
    false
}

#[test]
fn whoever_takes_its_call_back_is_let_go() {
    let agent = Agent::start(1);
    let mut subscriber = agent.watch();
    assert!(is_let_go_after_a_call(&agent));
    assert!((0..3).all(|_| subscriber.next().is_some()));
}

#[test]
fn readings_come_as_the_driver_gives_them() {
    let agent = Agent::start(2);
    for (key, value) in [
        ("1.memory.used", "42"),
        ("1.utilization", "35"),
        ("1.temperature", "71"),
        ("1.power", "650000"),
        ("1.clock", "1500"),
        ("1.throttle", "0x44"),
        ("1.ecc.corrected", "3"),
        ("1.ecc.uncorrected", "1"),
        ("1.nvlinks", "4"),
        ("1.nvlinks.active", "3"),
        ("1.processes", "4000000:1000 4000001:-"),
        ("1.samples", "4000001:17"),
    ] {
        agent.gpus.set(key, value);
    }
    let mut watcher = agent.watch();
    let gpu =
        watcher.gpu(1, "the last value", |gpu| gpu.processes.iter().any(|process| process.sm_percent == Some(17)));
    assert_eq!((gpu.index.as_str(), gpu.uuid(), gpu.name()), ("1", "GPU-1", "Stand-in"));
    assert_eq!((gpu.memory_used_bytes, gpu.memory_total_bytes), (Some(42), Some(80 << 30)));
    assert_eq!(
        (gpu.utilization_percent, gpu.temperature_celsius, gpu.slowdown_celsius),
        (Some(35), Some(71), Some(90))
    );
    assert_eq!((gpu.power_milliwatts, gpu.power_limit_milliwatts), (Some(650_000), Some(700_000)));
    assert_eq!((gpu.sm_clock_mhz, gpu.sm_clock_max_mhz, gpu.throttle_reasons), (Some(1500), Some(2000), Some(0x44)));
    assert_eq!((gpu.ecc_corrected, gpu.ecc_uncorrected, gpu.nvlinks_active), (Some(3), Some(1), Some(3)));
    let process = |pid, memory_bytes, sm| Process { pid, memory_bytes, sm_percent: Some(sm), ..Process::default() };
    assert_eq!(gpu.processes, [process(4_000_000, Some(1000), 0), process(4_000_001, None, 17)]);
    let snapshot = watcher.next().expect("a snapshot");
    assert_eq!((snapshot.driver.as_deref(), snapshot.problem, snapshot.gpus.len()), (Some("570.1"), None, 2));
    assert!(!snapshot.host.is_empty());
    // What another GPU does not tell is not made up.
    assert_eq!((snapshot.gpus[0].ecc_uncorrected, snapshot.gpus[0].nvlinks_active), (None, None));
}

#[test]
fn a_process_is_found_on_the_ports_of_its_parents() {
    let agent = Agent::start(1);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let child = Idle::start();
    agent.gpus.set("0.processes", &format!("{}:1000", child.0.id()));
    let own = listener.local_addr().expect("an address").to_string();
    let gpu =
        agent.watch().gpu(0, "the port", |gpu| gpu.processes.iter().any(|process| process.listens.contains(&own)));
    assert_eq!(gpu.processes[0].name(), "sleep");
}

#[test]
fn instances_have_their_own_memory_and_processes_and_the_whole_ones_heat() {
    let agent = Agent::start(1);
    for (key, value) in [
        ("0.mig", "7"),
        ("0:2.uuid", "MIG-two"),
        ("0:2.memory.total", "1000"),
        ("0:2.memory.used", "10"),
        ("0:2.processes", "4000000:5"),
        ("0.processes", "4000000:5 4000001:7"),
        ("0.temperature", "66"),
        ("0.utilization", "!3"),
    ] {
        agent.gpus.set(key, value);
    }
    let (whole, instance) = agent.watch().until("the instance", |snapshot| match &snapshot.gpus[..] {
        [whole, instance] if instance.temperature_celsius == Some(66) => Some((whole.clone(), instance.clone())),
        _ => None,
    });
    assert_eq!((instance.index.as_str(), instance.uuid()), ("0:2", "MIG-two"));
    assert_eq!((instance.memory_total_bytes, instance.memory_used_bytes), (Some(1000), Some(10)));
    assert_eq!((instance.processes.len(), instance.utilization_percent), (1, None));
    // One process is told of both; the other is on no instance.
    let pids = |gpu: &Gpu| gpu.processes.iter().map(|process| process.pid).collect::<Vec<_>>();
    assert_eq!((pids(&whole), pids(&instance)), (vec![4_000_001], vec![4_000_000]));
}

#[test]
fn what_the_driver_refuses_is_absent_and_the_rest_is_there() {
    let agent = Agent::start(2);
    let mut watcher = agent.watch();
    // not supported, no permission, unknown
    for error in ["!3", "!4", "!999"] {
        for key in ["memory.used", "utilization", "power", "throttle", "processes", "temperature"] {
            agent.gpus.set(&format!("0.{key}"), error);
        }
        let gpu = watcher.gpu(0, error, |gpu| gpu.temperature_celsius.is_none());
        assert_eq!((gpu.standing(), gpu.uuid(), gpu.sm_clock_mhz), (Standing::Well, "GPU-0", Some(2000)));
        assert_eq!((gpu.memory_used_bytes, gpu.utilization_percent, gpu.throttle_reasons), (None, None, None));
        agent.gpus.set("0.temperature", "40");
        watcher.gpu(0, "the temperature", |gpu| gpu.temperature_celsius == Some(40));
    }
    assert_eq!(watcher.next().expect("a snapshot").gpus[1].temperature_celsius, Some(40));
}

#[test]
fn a_lost_gpu_is_said_to_be_lost_until_it_is_back() {
    let agent = Agent::start(2);
    let mut watcher = agent.watch();
    for (error, expect) in [("!15", Standing::Lost), ("!16", Standing::ResetRequired)] {
        watcher.gpu(0, "a first reading", |gpu| gpu.standing() == Standing::Well && gpu.uuid.is_some());
        agent.gpus.set("0.all", error);
        let gpu = watcher.gpu(0, error, |gpu| gpu.standing() != Standing::Well);
        assert_eq!((gpu.standing(), gpu.uuid(), gpu.memory_used_bytes), (expect, "GPU-0", None));
        let other = watcher.next().expect("a snapshot").gpus[1].clone();
        assert_eq!((other.standing(), other.temperature_celsius), (Standing::Well, Some(40)));
        agent.gpus.unset("0.all");
    }
    watcher.gpu(0, "it to be back", |gpu| gpu.standing() == Standing::Well && gpu.temperature_celsius.is_some());
}

#[test]
fn a_call_that_hangs_is_a_silent_gpu_and_no_silent_agent() {
    let agent = Agent::start(2);
    let mut watcher = agent.watch();
    watcher.gpu(0, "a first reading", |gpu| gpu.temperature_celsius.is_some());
    agent.gpus.set("0.hang", "1");
    let gpu = watcher.gpu(0, "silence", |gpu| gpu.standing() == Standing::Silent);
    assert_eq!((gpu.uuid(), gpu.temperature_celsius), ("GPU-0", None));
    agent.gpus.set("1.temperature", "55");
    watcher.gpu(1, "the other GPU", |gpu| gpu.temperature_celsius == Some(55));
    agent.gpus.unset("0.hang");
    watcher.gpu(0, "it to be back", |gpu| gpu.standing() == Standing::Well && gpu.temperature_celsius == Some(40));
}

#[test]
fn errors_that_the_driver_reports_are_told_with_their_age() {
    let agent = Agent::start(2);
    let mut watcher = agent.watch();
    watcher.gpu(1, "a first reading", |gpu| gpu.temperature_celsius.is_some() && gpu.xids.is_empty());
    agent.gpus.set("1.xid", "1 31");
    watcher.gpu(1, "the first error", |gpu| gpu.xids.iter().map(|xid| xid.code).eq([31]));
    agent.gpus.set("1.xid", "2 79");
    let gpu = watcher.gpu(1, "the second error", |gpu| gpu.xids.iter().map(|xid| xid.code).eq([31, 79]));
    assert!(gpu.xids[0].age_ms >= gpu.xids[1].age_ms, "{:?}", gpu.xids);
    let older = watcher.gpu(1, "it to age", |gpu| gpu.xids[1].age_ms > 0);
    assert_eq!(older.xids.len(), 2);
    assert!(watcher.next().expect("a snapshot").gpus[0].xids.is_empty());
}

#[test]
fn an_old_library_lacks_fields_and_a_missing_one_all_of_them() {
    let agent = Agent::over(StandIn::new(1), library(&["-DOLD"]), "127.0.0.1:0", &[]);
    let gpu = agent.watch().gpu(0, "a reading", |gpu| gpu.temperature_celsius == Some(40));
    assert_eq!((gpu.standing(), gpu.memory_total_bytes, gpu.utilization_percent), (Standing::Well, None, Some(0)));

    let agent = Agent::over(StandIn::new(1), Path::new("/nowhere/libnvidia-ml.so.1"), "127.0.0.1:0", &[]);
    let snapshot = agent.watch().next().expect("a snapshot");
    assert!(snapshot.gpus.is_empty() && snapshot.problem().contains("nowhere"), "{snapshot:?}");
}

#[test]
fn a_driver_that_comes_later_is_found() {
    let gpus = StandIn::new(1);
    gpus.set("init", "!9");
    let mut agent = Agent::over(gpus, library(&[]), "127.0.0.1:0", &[]);
    let mut watcher = agent.watch();
    let snapshot = watcher.next().expect("a snapshot");
    assert!(snapshot.gpus.is_empty() && snapshot.problem().contains("driver"), "{snapshot:?}");
    agent.gpus.unset("init");
    watcher.gpu(0, "the GPU", |gpu| gpu.temperature_celsius == Some(40));
    // It ends when it is told to, whoever listens, and the stream with it.
    agent.process.signal("TERM");
    assert!(agent.process.wait().success(), "{}", agent.process.err());
    while watcher.next().is_some() {}
}
