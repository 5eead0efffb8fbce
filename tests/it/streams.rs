//! Streams: the events reach the client in the bytes they came in, however those were cut on the way, each at once and
//! no faster than the client reads.

use std::io::{ErrorKind, Read};
use std::time::{Duration, Instant};

use super::support::client::Connection;
use super::support::eventually;
use super::support::process::{Gateway, model, tokenizer};
use super::support::recorder::{Recorder, Step, chunk, stream, stream_end, stream_head};

const CHAT: &str = "/v1/chat/completions";

/// A request for a stream; `options` are members that follow `stream`.
fn asking(options: &str) -> String {
    format!(r#"{{"model":"m","messages":[{{"role":"user","content":"hi"}}],"stream":true{options}}}"#)
}

/// Asks for usage as well, so that nothing is hidden and every byte passes.
fn asking_for_usage() -> String {
    asking(r#","stream_options":{"include_usage":true}"#)
}

/// One event of text.
fn text(index: u32, content: &str) -> String {
    format!(
        "data: {{\"id\":\"c\",\"choices\":[{{\"index\":{index},\"delta\":{{\"content\":\"{content}\"}},\"finish_reason\":null}}],\"usage\":null}}\n\n"
    )
}

/// The event with which a choice ends.
fn finish(index: u32) -> String {
    format!(
        "data: {{\"id\":\"c\",\"choices\":[{{\"index\":{index},\"delta\":{{}},\"finish_reason\":\"stop\"}}],\"usage\":null}}\n\n"
    )
}

const USAGE: &str = "data: {\"id\":\"c\",\"choices\":[],\"usage\":{\"prompt_tokens\":11,\"total_tokens\":13,\"completion_tokens\":2}}\n\n";
const DONE: &str = "data: [DONE]\n\n";

/// A whole answer as vLLM frames it, with characters of two, three and four bytes.
fn answer() -> String {
    let role = "data: {\"id\":\"c\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}],\"usage\":null}\n\n";
    [role, &text(0, "é 日"), &text(0, "\\ud83e\\udd80 🦀"), &finish(0), USAGE, DONE].concat()
}

/// What the client gets when the worker plays `pieces`, an HTTP chunk each.
fn relayed(gateway: &Gateway, recorder: &Recorder, request: &str, pieces: &[&[u8]]) -> String {
    recorder.play(stream(pieces));
    let mut connection = Connection::to(gateway.client);
    connection.post(CHAT, &[], request.as_bytes());
    let answer = connection.answer();
    assert_eq!((answer.status, answer.whole), (200, true), "{}", answer.text());
    assert_eq!(answer.header("content-type"), Some("text/event-stream; charset=utf-8"));
    assert_eq!(answer.header("cache-control"), Some("no-cache"));
    answer.text()
}

fn setting() -> (Gateway, Recorder) {
    let recorder = Recorder::start("m", vec![stream(&[])]);
    (Gateway::before(&[recorder.address]), recorder)
}

#[test]
fn a_stream_cut_anywhere_is_the_same_stream() {
    let (gateway, recorder) = setting();
    let whole = answer();
    let bytes = whole.as_bytes();
    let request = asking_for_usage();
    let mut connection = Connection::to(gateway.client);
    let mut passes = |pieces: &[&[u8]], what: &str| {
        recorder.play(stream(pieces));
        connection.post(CHAT, &[], request.as_bytes());
        let answer = connection.answer();
        assert_eq!((answer.status, answer.whole), (200, true), "{what}");
        assert_eq!(answer.text(), whole, "{what}");
    };
    for cut in 1..bytes.len() {
        let (before, after) = bytes.split_at(cut);
        passes(&[before, after], &format!("cut at {cut}"));
    }
    for size in [1, 2, 3, 7, 64, bytes.len()] {
        let pieces: Vec<&[u8]> = bytes.chunks(size).collect();
        passes(&pieces, &format!("pieces of {size}"));
    }
}

#[test]
fn every_line_end_of_the_standard_passes() {
    let (gateway, recorder) = setting();
    for end in ["\r\n", "\r"] {
        let other = answer().replace('\n', end);
        for size in [1, 5, other.len()] {
            let pieces: Vec<&[u8]> = other.as_bytes().chunks(size).collect();
            assert_eq!(relayed(&gateway, &recorder, &asking_for_usage(), &pieces), other, "{end:?}, pieces of {size}");
        }
    }
}

/// A byte order mark, comments, names, numbers, fields without a space, data over two lines: all passes as it is.
#[test]
fn unusual_events_pass_unread() {
    let (gateway, recorder) = setting();
    let unusual = [
        "\u{feff}: hello\n\nevent: chunk\nid: 7\n",
        &text(0, "a"),
        "\n\n: between\n\nretry: 10\n\nevent: ping\n\ndata:{\"choices\":[],\"error\":null,\"vendor\":{\"x\":1}}\n\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"b\"},\ndata: \"finish_reason\":\"stop\"}]}\n\n",
        ": after\n\n",
        DONE,
    ]
    .concat();
    // What precedes the first event is said before anything is sent, and has nothing for the client.
    let expected = unusual.strip_prefix("\u{feff}: hello\n\n").expect("the beginning");
    for size in [1, unusual.len()] {
        let pieces: Vec<&[u8]> = unusual.as_bytes().chunks(size).collect();
        assert_eq!(relayed(&gateway, &recorder, &asking_for_usage(), &pieces), expected, "pieces of {size}");
    }
}

#[test]
fn choices_interleave_and_each_must_finish() {
    let (gateway, recorder) = setting();
    let request = asking(r#","n":3,"stream_options":{"include_usage":true}"#);
    let events = [text(2, "a"), text(0, "b"), finish(2), text(1, "c"), finish(0), text(1, "d"), finish(1)].concat();
    for end in [[USAGE, DONE].concat(), USAGE.to_owned(), String::new()] {
        let sent = [events.as_str(), &end].concat();
        let got = relayed(&gateway, &recorder, &request, &[sent.as_bytes()]);
        let added = if end.ends_with(DONE) { "" } else { DONE };
        assert_eq!(got, [sent.as_str(), added].concat());
    }
    // Two prompts with two choices each are four choices.
    recorder.play(stream(&[(0..3).map(finish).collect::<String>().as_bytes()]));
    let body = r#"{"model":"m","prompt":["a","b"],"n":2,"stream":true}"#;
    let answer = gateway.post("/v1/completions", body);
    assert!(answer.text().contains("\"error\"") && !answer.text().contains("[DONE]"), "{}", answer.text());
}

#[test]
fn usage_that_only_the_gateway_asked_for_stays_with_it() {
    let (gateway, recorder) = setting();
    let plain = answer().replace(",\"usage\":null", "").replace(USAGE, "");
    let hidden =
        [asking(""), asking(r#","stream_options":{"include_usage":false}"#), asking(r#","stream_options":{}"#)];
    for request in &hidden {
        assert_eq!(relayed(&gateway, &recorder, request, &[answer().as_bytes()]), plain, "{request}");
    }
    // It is in the row all the same.
    recorder.play(stream(&[answer().as_bytes()]));
    let answered = gateway.post(CHAT, &hidden[0]);
    let row = gateway.row(answered.header("x-request-id").expect("a name"));
    assert_eq!((&row["prompt_tokens"], &row["output_tokens"]), (&11.into(), &2.into()), "{row}");
    assert_eq!((&row["output_tokens_from"], &row["outcome"]), (&"engine".into(), &"completed".into()), "{row}");
    // Wherever the member stands and however the event is framed, only it goes.
    for (sent, expected) in [
        ("data: {\"usage\":null,\"choices\":[]}\n\n", "data: {\"choices\":[]}\n\n"),
        ("data: {\"usage\":null}\n\n", "data: {}\n\n"),
        ("data:  { \"a\" : 1 , \"usage\" : null , \"b\":2}  \n\n", "data:  { \"a\" : 1  , \"b\":2}  \n\n"),
        (
            "event: chunk\r\nid: 9\r\ndata:{\"a\":1,\"usage\":null}\r\n\r\n",
            "event: chunk\r\nid: 9\r\ndata:{\"a\":1}\r\n\r\n",
        ),
        ("data: {\"a\":[],\ndata: \"usage\":null,\ndata: \"b\":{}}\n\n", "data: {\"a\":[],\ndata: \"b\":{}}\n\n"),
        // Each chunk with its usage (`continuous_usage_stats`).
        (
            "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":1}}\n\n",
            "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\n",
        ),
        // Somebody else's usage.
        ("data: {\"choices\":[],\"x\":{\"usage\":null}}\n\n", "data: {\"choices\":[],\"x\":{\"usage\":null}}\n\n"),
    ] {
        let stream = [text(0, "a").as_str(), sent, &finish(0), USAGE, DONE].concat();
        let expected = [text(0, "a").as_str(), "EXPECTED", &finish(0), DONE]
            .concat()
            .replace(",\"usage\":null", "")
            .replace("EXPECTED", expected);
        assert_eq!(relayed(&gateway, &recorder, &asking(""), &[stream.as_bytes()]), expected, "{sent:?}");
        // A client that asked for usage gets all of it.
        assert_eq!(relayed(&gateway, &recorder, &asking_for_usage(), &[stream.as_bytes()]), stream, "{sent:?}");
    }
}

#[test]
fn a_comment_is_no_first_token() {
    let (gateway, recorder) = setting();
    let first = text(0, "a");
    let comment = b": keep-alive\n\n";
    let head = stream_head();
    let rest = [finish(0).as_str(), DONE].concat();
    recorder.play(vec![
        head,
        chunk(comment),
        chunk(comment),
        Step::Gate,
        chunk(first.as_bytes()),
        chunk(comment),
        chunk(rest.as_bytes()),
        stream_end(),
    ]);
    let mut connection = Connection::to(gateway.client);
    connection.post(CHAT, &[], asking_for_usage().as_bytes());
    eventually("the comments to be written", || (recorder.written() > 130).then_some(()));
    // Not even the status line comes: a failure could still have its own.
    let silence = Duration::from_millis(300);
    connection.socket.set_read_timeout(Some(silence)).unwrap();
    let nothing = connection.socket.read(&mut [0; 64]);
    assert!(
        matches!(&nothing, Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)),
        "{nothing:?}"
    );
    recorder.go_on();
    let answer = connection.answer();
    assert_eq!(answer.text(), [first.as_str(), ": keep-alive\n\n", &rest].concat());
    let row = gateway.row(answer.header("x-request-id").expect("a name"));
    let ttft = row["ttft_ms"].as_f64().expect("a time to first token");
    assert!(ttft >= silence.as_secs_f64() * 1e3, "{row}");
}

#[test]
fn each_event_goes_on_before_the_next_comes() {
    let (gateway, recorder) = setting();
    let events: Vec<String> = (0..20).map(|n| text(0, &format!("word {n}"))).collect();
    let mut script = vec![stream_head()];
    for event in &events {
        script.extend([Step::Gate, chunk(event.as_bytes())]);
    }
    script.extend([chunk(finish(0).as_bytes()), stream_end()]);
    recorder.play(script);
    let mut connection = Connection::to(gateway.client);
    connection.post(CHAT, &[], asking_for_usage().as_bytes());
    let mut slowest = Duration::ZERO;
    for event in &events {
        // The worker writes the next one only now: had this one been kept back, it would never come.
        recorder.go_on();
        let asked = Instant::now();
        connection.until(event.as_bytes());
        slowest = slowest.max(asked.elapsed());
    }
    println!("slowest event: {slowest:?}");
    assert!(connection.answer().text().ends_with(DONE));
}

/// Chunks that came in one piece need not leave in as many as they were.
#[test]
fn events_that_lie_together_leave_together() {
    const EVENTS: usize = 64;
    let (gateway, recorder) = setting();
    let events: Vec<String> = (0..EVENTS).map(|n| text(0, &format!("word {n}"))).collect();
    let rest = [finish(0).as_str(), DONE].concat();
    let mut wire = Vec::new();
    let pieces: Vec<&[u8]> = events.iter().map(String::as_bytes).chain([rest.as_bytes()]).collect();
    for step in stream(&pieces) {
        let Step::Write(bytes) = step else { panic!("it is written") };
        wire.extend(bytes);
    }
    recorder.play(vec![Step::Write(wire)]);
    let mut connection = Connection::to(gateway.client);
    connection.post(CHAT, &[], asking_for_usage().as_bytes());
    let bytes = connection.until(b"\r\n0\r\n\r\n");
    let chunks = bytes.windows(7).filter(|window| *window == b"\r\ndata:").count();
    println!("{EVENTS} events in one piece leave in {chunks}");
    assert_eq!(connection.answer().text(), [events.concat(), rest].concat());
    assert!(chunks < EVENTS / 2, "{chunks} chunks");
}

/// A client that does not read makes the worker wait: nothing piles up in between.
#[test]
fn a_slow_client_slows_the_worker_down() {
    const EVENTS: usize = 8000;
    let recorder = Recorder::start("m", vec![stream(&[])]);
    // Slow is not silent: the clock for silence stands while nobody asks the worker for more.
    let gateway =
        Gateway::start(&model("m", &[recorder.address], &format!("tokenizer = {:?}\nidle_seconds = 1\n", tokenizer())));
    let event = text(0, &"x".repeat(8000));
    let Step::Write(bytes) = chunk(event.as_bytes()) else { panic!("a chunk is written") };
    let total = EVENTS * bytes.len();
    recorder.play(vec![stream_head(), Step::Repeat(bytes, EVENTS), chunk(finish(0).as_bytes()), stream_end()]);
    let mut connection = Connection::to(gateway.client);
    connection.post(CHAT, &[], asking_for_usage().as_bytes());
    connection.until(b"xxxx");
    // Until the writer has stood still for longer than the worker may be silent.
    let (mut seen, mut since) = (0, Instant::now());
    eventually("the worker to be held up", || {
        let written = recorder.written();
        if written != seen {
            (seen, since) = (written, Instant::now());
        }
        (since.elapsed() > Duration::from_millis(1500)).then_some(())
    });
    println!("held up after {} KiB of {} KiB", seen / 1024, total / 1024);
    assert!(seen < total / 2, "{seen} of {total} bytes went into a client that reads nothing");
    let answer = connection.answer();
    assert_eq!(answer.body.len(), EVENTS * event.len() + finish(0).len() + DONE.len());
    assert!(answer.text().ends_with(&[finish(0).as_str(), DONE].concat()));
}

/// A client of HTTP/1.0 knows no chunks: its stream ends with the connection.
#[test]
fn an_old_client_gets_the_same_stream() {
    let (gateway, recorder) = setting();
    recorder.play(stream(&[answer().as_bytes()]));
    let body = asking_for_usage();
    let head =
        format!("POST {CHAT} HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", body.len());
    let mut connection = Connection::to(gateway.client);
    connection.send(&[head.as_bytes(), body.as_bytes()].concat());
    let got = connection.answer();
    assert_eq!((got.status, got.text()), (200, answer()));
    assert_eq!(got.header("transfer-encoding"), None);
}
