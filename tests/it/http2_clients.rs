//! Clients that speak HTTP/2: served as all others, and within bounds whatever they do.

use super::support::body::{ANSWER, FINISH, chat, delta, streamed};
use super::support::eventually;
use super::support::http2::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, Http2, RST_STREAM, SETTINGS, frame, post,
};
use super::support::process::{Gateway, model, tokenizer};
use super::support::recorder::{Recorder, Step, chunk, json, stream, stream_head};

const CHAT: &str = "/v1/chat/completions";
const REFUSED_STREAM: u32 = 7;
const ENHANCE_YOUR_CALM: u32 = 11;

fn setting() -> (Gateway, Recorder) {
    let recorder = Recorder::start("m", vec![json("200 OK", ANSWER)]);
    (Gateway::before(&[recorder.address]), recorder)
}

/// Status and body of the next answer on this connection.
fn answer(client: &mut Http2) -> (u16, String) {
    let status = client.until(HEADERS).status();
    let mut body = Vec::new();
    loop {
        let data = client.until(DATA);
        body.extend(&data.payload);
        if data.flags & END_STREAM != 0 {
            return (status, String::from_utf8(body).expect("UTF-8"));
        }
    }
}

#[test]
fn they_are_served_as_all_others() {
    let (gateway, recorder) = setting();
    recorder.answer_streams(stream(&[&delta("one"), FINISH]));
    let mut client = Http2::to(gateway.client, &[]);
    client.post(1, CHAT, chat("hello", "").as_bytes());
    assert_eq!(answer(&mut client), (200, ANSWER.to_owned()));
    client.post(3, CHAT, streamed("hello").as_bytes());
    assert_eq!(answer(&mut client), (200, String::from_utf8([&delta("one"), FINISH].concat()).expect("UTF-8")));
    client.post(5, "/nowhere", b"{}");
    assert_eq!(answer(&mut client).0, 404);
    client.post(7, CHAT, b"[]");
    assert_eq!(answer(&mut client).0, 400);
}

#[test]
fn what_was_answered_holds_up_no_end() {
    let (mut gateway, _recorder) = setting();
    let mut client = Http2::to(gateway.client, &[]);
    client.post(1, CHAT, chat("hello", "").as_bytes());
    assert_eq!(answer(&mut client).0, 200);
    drop(client);
    gateway.process.signal("TERM");
    assert_eq!(gateway.process.wait().code(), Some(0));
    let log = gateway.process.err();
    assert!(!log.contains("drain time is over"), "{log}");
}

#[test]
fn streams_at_once_are_bounded() {
    let (gateway, recorder) = setting();
    recorder.play(vec![Step::AwaitClose]);
    let mut client = Http2::to(gateway.client, &[]);
    let settings = client.until(SETTINGS).payload;
    let value = |id: u16| {
        let found = settings.chunks(6).find(|setting| setting[..2] == id.to_be_bytes()).expect("a setting");
        u32::from_be_bytes(found[2..].try_into().expect("four bytes"))
    };
    assert_eq!((value(3), value(6)), (256, 65_536), "streams and header bytes");
    for number in 0..256 {
        client.post(2 * number + 1, CHAT, chat("hello", "").as_bytes());
    }
    client.post(513, CHAT, chat("one more", "").as_bytes());
    let refused = client.until(RST_STREAM);
    assert_eq!((refused.stream, refused.code()), (513, REFUSED_STREAM));
}

/// CVE-2023-44487: requests that are taken back at once.
#[test]
fn rapid_resets_end_the_connection() {
    let (gateway, recorder) = setting();
    let mut client = Http2::to(gateway.client, &[]);
    let once = |stream: u32| {
        let head = frame(HEADERS, END_HEADERS, stream, &post(CHAT));
        [head, frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes())].concat()
    };
    let all: Vec<u8> = (0..20_000).flat_map(|number| once(2 * number + 1)).collect();
    client.send(&all);
    assert_eq!(client.until(GOAWAY).code(), ENHANCE_YOUR_CALM);
    assert!(recorder.posts().is_empty());
    assert_eq!(gateway.post(CHAT, &chat("others", "")).status, 200);
}

/// CVE-2024-27316: a head that goes on for ever.
#[test]
fn endless_heads_end_the_connection() {
    let (gateway, recorder) = setting();
    let mut client = Http2::to(gateway.client, &[]);
    let mut field = vec![0x00, 1, b'a', 0x7f, 0x81, 0x1e];
    field.extend([b'b'; 4000]);
    client.send(&frame(HEADERS, END_STREAM, 1, &post(CHAT)));
    for _ in 0..4000 {
        client.send(&frame(CONTINUATION, 0, 1, &field));
    }
    // It is refused, or its connection ends; what it may not do is to be taken.
    while let Some(found) = client.next() {
        match found.kind {
            HEADERS => assert_ne!(found.status(), 200),
            GOAWAY | RST_STREAM => assert_ne!(found.code(), 0),
            _ => {}
        }
    }
    assert!(recorder.posts().is_empty());
    assert_eq!(gateway.post(CHAT, &chat("others", "")).status, 200);
}

/// A head that its compression makes large: many references to one large field.
#[test]
fn heads_that_unfold_are_refused() {
    let (gateway, recorder) = setting();
    let mut client = Http2::to(gateway.client, &[]);
    let mut block = post(CHAT);
    block.extend([0x40, 1, b'a', 0x7f, 0x81, 0x1e]);
    block.extend([b'b'; 4000]);
    block.extend([0xbe; 8000]); // 32 MB
    client.send(&frame(HEADERS, END_STREAM | END_HEADERS, 1, &block));
    let found = loop {
        let found = client.next().expect("an answer");
        if found.kind != SETTINGS {
            break found;
        }
    };
    match found.kind {
        HEADERS => assert_eq!(found.status(), 431),
        _ => assert_ne!(found.code(), 0),
    }
    assert!(recorder.posts().is_empty());
    assert_eq!(gateway.post(CHAT, &chat("others", "")).status, 200);
}

/// The connection lives and answers pings; one of its streams is not read.
#[test]
fn a_stream_that_is_not_read_is_given_up() {
    let Step::Write(event) = chunk(&delta(&"x".repeat(8000))) else { panic!("a chunk is written") };
    let recorder = Recorder::start("m", vec![vec![stream_head(), Step::Repeat(event, 1 << 20), Step::AwaitClose]]);
    let models = model("m", &[recorder.address], &format!("tokenizer = {:?}\n", tokenizer()));
    let gateway = Gateway::start_unready("stall_seconds_max = 1\n", &models, &[]);
    gateway.until_ready();
    // Room for 1000 bytes of each stream.
    let mut client = Http2::to(gateway.client, &[(4, 1000)]);
    client.post(1, CHAT, streamed("hello").as_bytes());
    assert_eq!(client.until(HEADERS).status(), 200);
    recorder.closed(0);
    let row = eventually("its row", || gateway.rows().pop());
    assert_eq!(row["outcome"], "client_gone", "{row}");
    // The others on the connection go on.
    recorder.play(json("200 OK", ANSWER));
    client.post(3, CHAT, chat("next", "").as_bytes());
    while client.until(HEADERS).stream != 3 {}
    assert!(client.until(DATA).payload.starts_with(b"{"));
}
