//! How a stream ends: whole, with `[DONE]` also where the engine left it out, or with one error event and nothing after
//! it; and a failure before the first event still has a status of its own.

use std::time::{Duration, Instant};

use super::support::client::{Answer, Connection, error_object};
use super::support::process::{Gateway, model, tokenizer};
use super::support::recorder::{Recorder, Step, chunk, stream, stream_end, stream_head};

const CHAT: &str = "/v1/chat/completions";
const ASK: &str = r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true}"#;
const TEXT: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"},\"finish_reason\":null}]}\n\n";
const FINISH: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"length\"}]}\n\n";
const USAGE: &str = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":4}}\n\n";
const DONE: &str = "data: [DONE]\n\n";
const ERROR: &str = "data: {\"error\":{\"message\":\"EngineCore died at http://10.0.0.7:8000/v1\",\"type\":\"InternalServerError\",\"param\":null,\"code\":500}}\n\n";

fn setting() -> (Gateway, Recorder) {
    let recorder = Recorder::start("m", vec![stream(&[])]);
    let models = model("m", &[recorder.address], &format!("tokenizer = {:?}\nidle_seconds = 1\n", tokenizer()));
    (Gateway::start(&models), recorder)
}

fn ask(gateway: &Gateway) -> Answer {
    gateway.post(CHAT, ASK)
}

/// Two good answers, so that the worker is not left alone for its failures.
fn recover(gateway: &Gateway, recorder: &Recorder) {
    recorder.play(stream(&[[TEXT, FINISH, DONE].concat().as_bytes()]));
    for _ in 0..2 {
        assert_eq!(ask(gateway).status, 200);
    }
}

/// What came before the one error event with which this stream must end, and the event's error.
fn broken(answer: &Answer) -> (String, serde_json::Value) {
    assert_eq!((answer.status, answer.whole), (200, true));
    let text = answer.text();
    assert!(!text.contains("[DONE]"), "{text}");
    let at = text.find("data: {\"error\"").unwrap_or_else(|| panic!("no error event: {text}"));
    let (before, last) = text.split_at(at);
    let data = last.strip_prefix("data: ").and_then(|rest| rest.strip_suffix("\n\n")).expect("one event");
    assert!(!data.contains('\n'), "something follows: {last}");
    (before.to_owned(), error_object(data.as_bytes()))
}

/// The outcome that the answer's row says.
fn outcome(gateway: &Gateway, answer: &Answer) -> String {
    let row = gateway.row(answer.header("x-request-id").expect("a name"));
    row["outcome"].as_str().expect("an outcome").to_owned()
}

#[test]
fn a_finished_answer_is_whole_with_or_without_its_last_events() {
    let (gateway, recorder) = setting();
    let whole = [TEXT, FINISH, DONE].concat();
    for sent in [
        [TEXT, FINISH, USAGE, DONE].concat(),
        [TEXT, FINISH, DONE].concat(),
        [TEXT, FINISH, USAGE].concat(),
        [TEXT, FINISH].concat(),
        // No blank line at the very end.
        [TEXT, FINISH, "data: [DONE]"].concat(),
        [TEXT, FINISH.trim_end()].concat(),
        // Half of an event that nobody needs any more.
        [TEXT, FINISH, "data: {\"choices\":[],\"usa"].concat(),
    ] {
        let broken_off = vec![stream_head(), chunk(sent.as_bytes())];
        for script in [stream(&[sent.as_bytes()]), broken_off] {
            // Bytes without their end are an event only where the body itself ended well.
            if script.len() == 2 && !sent.ends_with("\n\n") {
                continue;
            }
            recorder.play(script);
            let answer = ask(&gateway);
            assert_eq!((answer.status, answer.whole, answer.text().as_str()), (200, true, whole.as_str()), "{sent:?}");
            assert_eq!(outcome(&gateway, &answer), "completed", "{sent:?}");
        }
    }
    // An engine that forgets to end its stream is not waited for.
    recorder.play(vec![stream_head(), chunk([TEXT, FINISH].concat().as_bytes()), Step::AwaitClose]);
    assert_eq!(ask(&gateway).text(), whole);
    // What follows `[DONE]` has nobody to go to.
    recorder.play(stream(&[[TEXT, FINISH, DONE, TEXT, ERROR, DONE].concat().as_bytes()]));
    assert_eq!(ask(&gateway).text(), whole);
}

#[test]
fn an_unfinished_answer_ends_with_one_error_event() {
    let (gateway, recorder) = setting();
    let half = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"ha";
    let garbage = "data: garbage\n\n".repeat(8);
    let cases: Vec<(&str, Vec<Step>)> = vec![
        ("the end without a finish", stream(&[TEXT.as_bytes()])),
        ("`[DONE]` without a finish", stream(&[TEXT.as_bytes(), DONE.as_bytes()])),
        ("usage and `[DONE]` without a finish", stream(&[TEXT.as_bytes(), USAGE.as_bytes(), DONE.as_bytes()])),
        ("a cut body", vec![stream_head(), chunk(TEXT.as_bytes())]),
        ("a body cut within an event", vec![stream_head(), chunk([TEXT, half].concat().as_bytes())]),
        ("an end within an event", stream(&[[TEXT, half].concat().as_bytes()])),
        (
            "a cut within HTTP's framing",
            vec![stream_head(), chunk(TEXT.as_bytes()), Step::Write(b"ff\r\ndata: {\"cho".to_vec())],
        ),
        ("no framing at all", vec![stream_head(), chunk(TEXT.as_bytes()), Step::Write(b"hello\r\n".to_vec())]),
        ("garbage", stream(&[TEXT.as_bytes(), garbage.as_bytes(), FINISH.as_bytes(), DONE.as_bytes()])),
        ("an error event", stream(&[TEXT.as_bytes(), ERROR.as_bytes()])),
        ("an error event and `[DONE]`", stream(&[[TEXT, ERROR, DONE].concat().as_bytes()])),
        ("an error event and more", stream(&[[TEXT, ERROR, FINISH, USAGE, DONE].concat().as_bytes()])),
        ("silence", vec![stream_head(), chunk(TEXT.as_bytes()), Step::AwaitClose]),
        (
            "nothing but comments' beginning",
            vec![stream_head(), chunk([TEXT, ": keep"].concat().as_bytes()), Step::AwaitClose],
        ),
    ];
    for (what, script) in cases {
        recover(&gateway, &recorder);
        let before = recorder.posts().len();
        recorder.play(script);
        let answer = ask(&gateway);
        assert_eq!(recorder.posts().len(), before + 1, "{what}: after a beginning nothing is tried again");
        let (before, error) = broken(&answer);
        assert_eq!(before, TEXT, "{what}");
        assert_eq!(error["type"], "server_error", "{what}: {error}");
        assert!(error["code"].is_null() || error["code"].is_string(), "{what}: {error}");
        let message = error["message"].as_str().expect("a message");
        assert!(!message.contains("10.0.0.7"), "{what}: {error}");
        assert_eq!(message.contains("EngineCore died"), what.starts_with("an error event"), "{what}: {error}");
        assert_eq!(outcome(&gateway, &answer), "cut", "{what}");
    }
}

/// An error after every choice has finished is still an error.
#[test]
fn an_error_event_counts_to_the_very_end() {
    let (gateway, recorder) = setting();
    recorder.play(stream(&[[TEXT, FINISH, ERROR, DONE].concat().as_bytes()]));
    let answer = ask(&gateway);
    let (before, _) = broken(&answer);
    assert_eq!(before, [TEXT, FINISH].concat());
}

#[test]
fn a_lone_malformed_event_is_left_out() {
    let (gateway, recorder) = setting();
    for bad in [
        "data: {\"choices\":[{\"delta\n\n",
        "data: [1]\n\n",
        "data: {\"choices\":7}\n\n",
        "data:\n\n",
        "data: \u{fffd}\n\n",
    ] {
        let sent = [TEXT, bad, bad, TEXT, bad, FINISH, bad, DONE].concat();
        recorder.play(stream(&[sent.as_bytes()]));
        let answer = ask(&gateway);
        assert_eq!(answer.text(), [TEXT, TEXT, FINISH, DONE].concat(), "{bad:?}");
        assert_eq!(outcome(&gateway, &answer), "completed");
    }
}

/// Bytes that no engine writes tell of a damaged stream: clients would choke on them, and what else is lost nobody
/// knows.
#[test]
fn bytes_that_are_no_event_end_the_stream() {
    for bad in [
        &b"data: {\"choices\":[],\"x\":\"\xff\xfe\"}\n\n"[..],
        b"\x80\x81 no event\n\n",
        b"HTTP/1.1 500 Oops\n\n",
        b"no field\ndata: {\"choices\":[]}\n\n",
    ] {
        let (gateway, recorder) = setting();
        recorder.play(stream(&[TEXT.as_bytes(), bad, FINISH.as_bytes(), DONE.as_bytes()]));
        let answer = ask(&gateway);
        assert_eq!(answer.stream_end(), Err("the worker sent garbage".to_owned()), "{}", String::from_utf8_lossy(bad));
        assert!(answer.text().starts_with(TEXT) && !answer.text().contains(FINISH), "{}", answer.text());
        assert_eq!(outcome(&gateway, &answer), "cut");
    }
}

#[test]
fn an_event_without_end_is_given_up() {
    let (gateway, recorder) = setting();
    let piece = vec![b'x'; 64 << 10];
    let Step::Write(piece) = chunk(&piece) else { panic!("a chunk is written") };
    // 64 MiB, of which some 8 are taken.
    recorder.play(vec![
        stream_head(),
        chunk(TEXT.as_bytes()),
        chunk(b"data: {\"x\":\""),
        Step::Repeat(piece.clone(), 1024),
        stream_end(),
    ]);
    let (before, error) = broken(&ask(&gateway));
    assert_eq!(before, TEXT, "{error}");
    assert!(recorder.written() < 32 << 20, "{}", recorder.written());
    // As the first event it is a failed attempt.
    recorder.play(vec![stream_head(), chunk(b"data: {\"x\":\""), Step::Repeat(piece, 1024), stream_end()]);
    let answer = ask(&gateway);
    assert_eq!(answer.status, 502);
    assert_eq!(answer.error()["code"], "upstream_error");
}

#[test]
fn an_error_as_the_first_event_has_its_own_status() {
    let (gateway, recorder) = setting();
    let says = |code: &str, message: &str| {
        format!(
            ": ping\n\ndata: {{\"error\":{{\"message\":\"{message}\",\"type\":\"BadRequestError\",\"param\":null,\"code\":{code}}}}}\n\ndata: [DONE]\n\n"
        )
    };
    for (code, status) in [("400", 400), ("404", 404), ("422", 422)] {
        let before = recorder.posts().len();
        recorder.play(stream(&[says(code, "no such thing").as_bytes()]));
        let answer = ask(&gateway);
        assert_eq!(answer.status, status, "{}", answer.text());
        let error = answer.error();
        assert_eq!((&error["message"], &error["type"]), (&"no such thing".into(), &"invalid_request_error".into()));
        assert_eq!(recorder.posts().len(), before + 1, "a refusal is not tried again");
    }
    // A failure of the engine is a bad gateway where there is no other engine.
    recorder.play(stream(&[says("500", "EngineCore died").as_bytes()]));
    let answer = ask(&gateway);
    assert_eq!((answer.status, &answer.error()["message"]), (502, &"EngineCore died".into()));
}

#[test]
fn nothing_useful_at_first_is_tried_elsewhere() {
    let good = [TEXT, FINISH, DONE].concat();
    let firsts: [Vec<Step>; 6] = [
        stream(&[ERROR.as_bytes(), DONE.as_bytes()]),
        stream(&[DONE.as_bytes()]),
        stream(&[]),
        stream(&[b": ping\n\n: ping\n\n"]),
        stream(&[b"data: garbage\n\n"]),
        vec![stream_head(), chunk(b": ping\n\ndata: {\"choi"), Step::Reset],
    ];
    for (index, first) in firsts.into_iter().enumerate() {
        let bad = Recorder::start("m", vec![first]);
        let well = Recorder::start("m", vec![stream(&[good.as_bytes()])]);
        let gateway = Gateway::before(&[bad.address, well.address]);
        let mut asked = 0;
        while bad.posts().is_empty() {
            asked += 1;
            assert!(asked <= 50, "{index}: the first worker never gets a request");
            let answer = ask(&gateway);
            assert_eq!((answer.status, answer.text()), (200, good.clone()), "{index}");
            assert_eq!(answer.header("x-forebay-worker"), Some("w1"), "{index}");
            assert_eq!(well.posts().len(), asked, "{index}");
        }
    }
}

/// The connection to the client is as good as before: the stream's end is said in HTTP's framing.
#[test]
fn a_broken_stream_leaves_its_connection_usable() {
    let (gateway, recorder) = setting();
    let mut connection = Connection::to(gateway.client);
    for _ in 0..3 {
        recorder.play(vec![stream_head(), chunk(TEXT.as_bytes())]);
        connection.post(CHAT, &[], ASK.as_bytes());
        broken(&connection.answer());
        recorder.play(stream(&[[TEXT, FINISH, DONE].concat().as_bytes()]));
        connection.post(CHAT, &[], ASK.as_bytes());
        assert_eq!(connection.answer().text(), [TEXT, FINISH, DONE].concat());
    }
}

/// Keep-alive comments are no answer: an engine that sends nothing else is as silent as one that sends nothing.
#[test]
fn comments_alone_do_not_put_off_the_first_byte() {
    let recorder = Recorder::start("m", vec![stream(&[])]);
    let extra = format!("tokenizer = {:?}\nfirst_byte_seconds = 1\n", tokenizer());
    let gateway = Gateway::start(&model("m", &[recorder.address], &extra));
    let Step::Write(few) = chunk(b": keep-alive\n\n") else { panic!("a chunk is written") };
    let Step::Write(many) = chunk(&b": keep-alive\n\n".repeat(4096)) else { panic!("a chunk is written") };
    let now_and_then =
        (0..40).flat_map(|_| [Step::Write(few.clone()), Step::Pause(Duration::from_millis(100))]).collect();
    // Now and then, and without a pause.
    for comments in [now_and_then, vec![Step::Repeat(many, 1 << 20)]] {
        let began = Instant::now();
        recorder.play([vec![stream_head()], comments].concat());
        let answer = ask(&gateway);
        println!("given up after {:?}", began.elapsed());
        assert_eq!(answer.status, 504, "{}", answer.text());
        assert_eq!(answer.error()["code"], "upstream_timeout");
        assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    }
}

/// An engine that goes on and on after its last event keeps neither the client nor the gateway.
#[test]
fn what_follows_the_end_is_not_read_for_ever() {
    let (gateway, recorder) = setting();
    let Step::Write(piece) = chunk(&vec![b'x'; 64 << 10]) else { panic!("a chunk is written") };
    let whole = [TEXT, FINISH, DONE].concat();
    recorder.play(vec![stream_head(), chunk(whole.as_bytes()), Step::Repeat(piece, 1 << 20)]);
    let began = Instant::now();
    let answer = ask(&gateway);
    println!("let go after {:?}", began.elapsed());
    assert_eq!((answer.text(), answer.whole), (whole, true));
    assert_eq!(outcome(&gateway, &answer), "completed");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}
