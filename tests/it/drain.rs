//! The end of the process: answers under way are finished, nobody new is let in, every row is written.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::support::body::{chat, endless_stream, held, held_stream, streamed, wide};
use crate::support::client::{self, Connection};
use crate::support::eventually;
use crate::support::process::{Gateway, model, tokenizer};
use crate::support::recorder::{Recorder, Step};

fn start(server: &str, recorder: &Recorder) -> Gateway {
    let models = model("m", &[recorder.address], &format!("tokenizer = {:?}\n", tokenizer()));
    let gateway = Gateway::start_unready(server, &models, &[]);
    gateway.until_ready();
    gateway
}

fn until_stopping(gateway: &Gateway) {
    eventually("no new connections", || TcpStream::connect(gateway.client).is_err().then_some(()));
}

#[test]
fn answers_under_way_are_finished() {
    let recorder = Recorder::start("m", vec![held_stream(), held()]);
    let mut gateway = start("", &recorder);
    let mut stream = Connection::to(gateway.client);
    stream.post("/v1/chat/completions", &[], streamed("hello").as_bytes());
    stream.until(b"first");
    let mut whole = Connection::to(gateway.client);
    whole.post("/v1/chat/completions", &[], chat("whole", "").as_bytes());
    recorder.await_posts(2);
    let mut queued = Connection::to(gateway.client);
    queued.post("/v1/completions", &[], wide("queued").as_bytes());
    gateway.until_queued(1);
    let mut idle = Connection::to(gateway.client);
    idle.send(b"GET /health HTTP/1.1\r\nhost: test\r\n\r\n");
    assert_eq!(idle.answer().status, 200);

    gateway.process.signal("TERM");
    until_stopping(&gateway);
    let ready = client::get(gateway.ops, "/readyz");
    assert_eq!((ready.status, ready.text().as_str()), (503, "stopping\n"));
    assert_eq!(client::get(gateway.ops, "/livez").status, 200);
    assert!(idle.closes_within(Duration::from_secs(5)), "an idle connection is closed");
    assert!(gateway.process.exited().is_none(), "answers are under way");

    (0..3).for_each(|_| recorder.go_on());
    assert_eq!(stream.answer().stream_end(), Ok(()));
    assert_eq!(whole.answer().status, 200);
    assert_eq!(queued.answer().status, 200, "what waited is served, too");
    assert_eq!(gateway.process.wait().code(), Some(0));
    let rows = gateway.rows();
    assert_eq!(rows.len(), 3);
    assert!(rows.iter().all(|row| row["outcome"] == "completed"), "{rows:?}");
}

#[test]
fn the_drain_time_ends_what_does_not_end() {
    let mid_body = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9000000\r\n\r\n{\"a\":\"first";
    let scripts = vec![
        endless_stream(),
        vec![Step::Write(mid_body.into()), Step::Write(vec![b'x'; 2 << 20]), Step::AwaitClose],
        vec![Step::AwaitClose],
    ];
    let recorder = Recorder::start("m", scripts);
    let mut gateway = start("drain_seconds = 1\n", &recorder);
    let mut stream = Connection::to(gateway.client);
    stream.post("/v1/chat/completions", &[], streamed("hello").as_bytes());
    stream.until(b"first");
    let mut body = Connection::to(gateway.client);
    body.post("/v1/chat/completions", &[], chat("hello", "").as_bytes());
    body.until(b"first");
    let mut silent = Connection::to(gateway.client);
    silent.post("/v1/chat/completions", &[], chat("silent", "").as_bytes());
    recorder.await_posts(3);
    let mut queued = Connection::to(gateway.client);
    queued.post("/v1/completions", &[], wide("queued").as_bytes());
    gateway.until_queued(1);

    let began = Instant::now();
    gateway.process.signal("TERM");
    let answer = stream.answer();
    assert!(answer.stream_end().expect_err("it is cut").contains("shutting down"), "{}", answer.text());
    assert!(began.elapsed() >= Duration::from_secs(1), "not before the drain time is over");
    assert!(!body.answer().whole, "the client sees that this is not all");
    for connection in [&mut silent, &mut queued] {
        let answer = connection.answer();
        assert_eq!(answer.refusal(503), "server_is_stopping");
        assert!(answer.header("retry-after").is_some(), "{:?}", answer.headers);
    }
    assert_eq!(gateway.process.wait().code(), Some(0));
    println!("stopped {:?} after SIGTERM, with a drain time of 1 s", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    let rows = gateway.rows();
    let mut ends: Vec<_> = rows.iter().map(|row| (row["outcome"].as_str().unwrap(), row["status"].as_u64())).collect();
    ends.sort_unstable();
    assert_eq!(
        ends,
        [("cut", Some(200)), ("cut", Some(200)), ("failed", Some(503)), ("failed", Some(503))],
        "{rows:?}"
    );
    for index in 0..3 {
        recorder.closed(index);
    }
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let recorder = Recorder::start("m", vec![endless_stream()]);
    for name in ["TERM", "INT"] {
        let mut gateway = start("", &recorder);
        let mut stream = Connection::to(gateway.client);
        stream.post("/v1/chat/completions", &[], streamed("hello").as_bytes());
        stream.until(b"first");
        gateway.process.signal("TERM");
        until_stopping(&gateway);
        let began = Instant::now();
        gateway.process.signal(name);
        assert_eq!(gateway.process.wait().code(), Some(1));
        println!("SIG{name} as the second signal: ended after {:?}", began.elapsed());
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        let rows = gateway.rows();
        assert_eq!(rows.len(), 1, "{rows:?}");
        assert_eq!(rows[0]["outcome"], "cut", "{rows:?}");
    }
}

#[test]
fn a_killed_process_leaves_the_rows_of_what_was_finished() {
    let recorder = Recorder::start("m", vec![held().split_off(1)]);
    let mut gateway = start("", &recorder);
    for number in 0..20 {
        assert_eq!(gateway.post("/v1/chat/completions", &chat(&format!("{number}"), "")).status, 200);
    }
    eventually("the rows", || (gateway.rows().len() == 20).then_some(()));
    recorder.play(endless_stream());
    let mut stream = Connection::to(gateway.client);
    stream.post("/v1/chat/completions", &[], streamed("hello").as_bytes());
    stream.until(b"first");
    gateway.process.signal("KILL");
    assert_eq!(gateway.process.wait().code(), None);
    assert!(gateway.journal().iter().all(|file| file.ends_with('\n')), "every line is whole");
    assert_eq!(gateway.rows().len(), 20);
}
