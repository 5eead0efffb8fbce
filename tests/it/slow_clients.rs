//! Clients that take their time: what is held for them is bounded, and so is how long.

use std::time::{Duration, Instant};

use super::support::body::{ANSWER, chat, streamed};
use super::support::client::{self, Connection};
use super::support::eventually;
use super::support::process::{Gateway, model, tokenizer};
use super::support::recorder::{Recorder, Step, chunk, json, stream_head};

const CHAT: &str = "/v1/chat/completions";

fn start(server: &str, recorder: &Recorder) -> Gateway {
    let models = model("m", &[recorder.address], &format!("tokenizer = {:?}\n", tokenizer()));
    let gateway = Gateway::start_unready(server, &models, &[]);
    gateway.until_ready();
    gateway
}

/// One event, over and over.
fn event() -> Vec<u8> {
    let content = "x".repeat(8000);
    format!(
        "data: {{\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{content}\"}},\"finish_reason\":null}}]}}\n\n"
    )
    .into_bytes()
}

/// An answer without end, as a chunk that repeats.
fn endless() -> Vec<Step> {
    let Step::Write(bytes) = chunk(&event()) else { panic!("a chunk is written") };
    vec![stream_head(), Step::Repeat(bytes, 1 << 20), Step::AwaitClose]
}

#[test]
fn one_that_reads_nothing_is_let_go() {
    let recorder = Recorder::start("m", vec![endless()]);
    let gateway = start("stall_seconds_max = 1\n", &recorder);
    let mut stalled = Connection::to(gateway.client);
    stalled.post(CHAT, &[], streamed("stalled").as_bytes());
    stalled.until(b"xxxx");
    let began = Instant::now();
    recorder.closed(0);
    println!("let go {:?} after its last byte was taken", began.elapsed());
    let row = eventually("its row", || gateway.rows().pop());
    assert_eq!((&row["outcome"], &row["status"]), (&"client_gone".into(), &200.into()), "{row}");
    // Its place is another's.
    recorder.play(json("200 OK", ANSWER));
    assert_eq!(gateway.post(CHAT, &chat("next", "")).status, 200);
}

/// Slow is not stalled: as long as some bytes are taken now and then, it goes on.
#[test]
fn one_that_reads_slowly_is_served() {
    let recorder = Recorder::start("m", vec![endless()]);
    let gateway = start("stall_seconds_max = 2\n", &recorder);
    let mut slow = Connection::to(gateway.client);
    slow.post(CHAT, &[], streamed("slow").as_bytes());
    let mut taken = Vec::new();
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(5) {
        // More than a receiver must have room for before it says so.
        let mut piece = vec![0; 128 << 10];
        std::io::Read::read_exact(&mut slow.socket, &mut piece).expect("bytes");
        taken.append(&mut piece);
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(recorder.posts()[0].closed.is_none());
    drop(slow);
    recorder.closed(0);
}

/// The most memory that a gateway's process ever had, in MiB.
fn peak_mib(gateway: &Gateway) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", gateway.process.id())).expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") / 1024
}

#[test]
fn slow_readers_hold_only_their_buffers() {
    const READERS: usize = 64;
    let recorder = Recorder::start("m", vec![endless()]);
    let gateway = start("", &recorder);
    let before = peak_mib(&gateway);
    let mut readers: Vec<Connection> = (0..READERS).map(|_| Connection::to(gateway.client)).collect();
    for (number, reader) in readers.iter_mut().enumerate() {
        reader.post(CHAT, &[], streamed(&format!("reader {number}")).as_bytes());
    }
    readers.iter_mut().for_each(|reader| drop(reader.until(b"xxxx")));
    // Until the worker could not write any more for a while.
    let mut seen = (0, Instant::now());
    eventually("all writers to be held up", || {
        let written = recorder.written();
        if written != seen.0 {
            seen = (written, Instant::now());
        }
        (seen.1.elapsed() > Duration::from_millis(500)).then_some(())
    });
    let held = peak_mib(&gateway) - before;
    println!("{READERS} readers that stand still: {held} MiB, {} MiB went in", seen.0 >> 20);
    // An answer's read-ahead of 128 KiB, its write buffer of 64, and what belongs to a connection.
    assert!(held < 32, "{held} MiB");
}

#[test]
fn bodies_of_a_hundred_megabytes_pass_where_they_may() {
    const SIZE: usize = 100_000_000;
    let recorder = Recorder::start("m", vec![json("200 OK", ANSWER)]);
    let gateway = start("body_bytes_max = 134_217_728\n", &recorder);
    let before = peak_mib(&gateway);
    let body = chat("hello", &format!(r#","attachment":"{}""#, "y".repeat(SIZE)));
    let answer = gateway.post(CHAT, &body);
    assert_eq!(answer.status, 200, "{}", answer.text());
    let mut posts = recorder.posts();
    assert!(posts.pop().expect("a request").body == body.as_bytes(), "it arrives as it was written");
    let request = peak_mib(&gateway) - before;
    println!("a request of 100 MB: {request} MiB");
    assert!(request < 130, "one copy is held for other workers, no more: {request} MiB");

    // The answer is held nowhere.
    let recorder = Recorder::start("m", vec![json("200 OK", ANSWER)]);
    let gateway = start("", &recorder);
    let before = peak_mib(&gateway);
    let head = format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", SIZE + 2);
    let piece = vec![b'z'; 1_000_000];
    recorder.play(vec![
        Step::Write([head.as_bytes(), b"\""].concat()),
        Step::Repeat(piece, SIZE / 1_000_000),
        Step::Write(b"\"".to_vec()),
    ]);
    let answer = client::post(gateway.client, CHAT, &chat("hello", ""));
    assert!(answer.whole && answer.body.len() == SIZE + 2, "{}", answer.body.len());
    let answered = peak_mib(&gateway) - before;
    println!("an answer of 100 MB: {answered} MiB");
    assert!(answered < 16, "{answered} MiB");
}
