//! Workers that fail: before the first byte another one answers, afterwards the client is told, and nobody answers twice.

use std::time::{Duration, Instant};

use crate::support::body::{ANSWER, chat, long, streamed};
use crate::support::client::{Answer, Connection};
use crate::support::process::{Gateway, Worker, model, tokenizer};
use crate::support::recorder::{Recorder, Step, json, json_with};
use crate::support::{PATIENCE, eventually, within};

fn gateway(extra: &str, workers: &[std::net::SocketAddr]) -> Gateway {
    let extra = format!("tokenizer = {:?}\n{extra}", tokenizer());
    let gateway = Gateway::start(&model("m", workers, &extra));
    for index in 0..workers.len() {
        until_up(&gateway, index);
    }
    gateway
}

fn until_up(gateway: &Gateway, worker: usize) {
    let up = format!("forebay_worker_up{{worker=\"w{worker}\"}}");
    eventually("the worker to be up", || (gateway.metric(&up) == 1.0).then_some(()));
}

/// Which worker answered.
fn worker(answer: &Answer) -> usize {
    let name = answer.header("x-forebay-worker").expect("a worker's name");
    name.strip_prefix('w').and_then(|index| index.parse().ok()).expect("a worker of this test")
}

/// Has some worker answer this prompt, which is long; the next request with it goes to the same one.
fn warm(gateway: &Gateway, text: &str) -> usize {
    let answer = gateway.post("/v1/chat/completions", &chat(text, r#","max_tokens":2"#));
    assert_eq!(answer.status, 200, "{}", answer.text());
    worker(&answer)
}

fn pair(extra: &str) -> ([Worker; 2], Gateway) {
    let workers = [(); 2].map(|()| Worker::start(&["--model", "m"]));
    let gateway = gateway(extra, &[workers[0].address, workers[1].address]);
    (workers, gateway)
}

/// One worker has `fault`; the other one answers, and the client sees nothing of it.
fn goes_elsewhere(fault: &str, reason: &str, extra: &str, streaming: &[bool]) {
    let (workers, gateway) = pair(extra);
    for stream in streaming {
        let text = long(&format!("{fault} {stream}"));
        let ill = warm(&gateway, &text);
        let well = 1 - ill;
        workers[ill].faults(&format!("[{fault}]"));
        let retries = format!("forebay_retries_total{{reason=\"{reason}\"}}");
        let before = (gateway.metric(&retries), workers[well].finished(), workers[ill].log());

        let body = chat(&text, &format!(r#","max_tokens":8,"stream":{stream}"#));
        let answer = gateway.post("/v1/chat/completions", &body);
        assert_eq!(answer.status, 200, "{fault}: {}", answer.text());
        assert_eq!(worker(&answer), well, "{fault}");
        if *stream {
            assert_eq!(answer.stream_end(), Ok(()));
            let finishes = answer.events().iter().filter(|event| event.contains(r#""finish_reason":""#)).count();
            assert_eq!(finishes, 1, "one answer: {}", answer.text());
        } else {
            assert!(answer.whole && answer.json()["choices"][0]["finish_reason"].is_string());
        }
        let row = gateway.row_of(&answer);
        assert_eq!((&row["outcome"], &row["attempts"]), (&"completed".into(), &2.into()), "{fault}: {row}");
        assert_eq!(row["worker"], format!("w{well}"));
        assert_eq!(gateway.metric(&retries), before.0 + 1.0, "{fault}");
        assert_eq!(workers[well].finished(), before.1 + 1, "{fault}");
        let begun = |log: &serde_json::Value| log["requests"]["begun"].as_u64();
        assert_eq!(begun(&workers[ill].log()), begun(&before.2).map(|begun| begun + 1), "tried there once: {fault}");
        workers[ill].faults("[]");
    }
}

#[test]
fn error_statuses_are_had_elsewhere() {
    goes_elsewhere(r#"{"kind":{"status":{"code":500}}}"#, "status", "", &[true, false]);
    goes_elsewhere(r#"{"kind":{"error":{}}}"#, "status", "", &[true, false]);
}

#[test]
fn overload_is_had_elsewhere() {
    goes_elsewhere(r#"{"kind":{"status":{"code":503}}}"#, "overloaded", "", &[true]);
    goes_elsewhere(r#"{"kind":{"status":{"code":429}}}"#, "overloaded", "", &[false]);
    // Half a minute is longer than any request of this test waits.
    goes_elsewhere(r#"{"kind":{"status":{"code":429,"retry_after":30}}}"#, "overloaded", "", &[true]);
}

/// vLLM ends what it lets go of like an answer, with a reason of its own. Its chats begin with a role even then.
#[test]
fn what_an_engine_gives_up_is_had_elsewhere() {
    goes_elsewhere(r#"{"kind":{"abort":{}}}"#, "overloaded", "", &[true]);
    goes_elsewhere(r#"{"kind":{"abort":{}}}"#, "overloaded", "", &[false]);
    goes_elsewhere(r#"{"kind":{"abort":{"after":1}}}"#, "overloaded", "", &[true]);
}

#[test]
fn silence_is_left() {
    goes_elsewhere(r#"{"kind":{"hang":{}}}"#, "timeout", "first_byte_seconds = 1\n", &[true, false]);
    goes_elsewhere(r#"{"kind":{"stall":{}}}"#, "timeout", "first_byte_seconds = 1\nidle_seconds = 1\n", &[true, false]);
}

#[test]
fn broken_answers_are_had_elsewhere() {
    goes_elsewhere(r#"{"kind":{"cut":{}}}"#, "reset", "", &[true, false]);
    goes_elsewhere(r#"{"kind":{"cut":{"reset":true}}}"#, "reset", "", &[true, false]);
    goes_elsewhere(r#"{"kind":{"garbage":{}}}"#, "malformed", "", &[true]);
}

/// What no simulated engine sends: bytes that are no HTTP, and answers long enough to be cut in different places.
#[test]
fn recorded_oddities() {
    let sized = |sent: usize| {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 3000000\r\n\r\n";
        vec![Step::Write(head.into()), Step::Write(vec![b' '; sent]), Step::Reset]
    };
    for (name, script, elsewhere) in [
        ("no status line", vec![Step::Write(b"\x16\x03\x01 hello\r\n\r\n".to_vec()), Step::Reset], true),
        (
            "endless head",
            vec![Step::Write(b"HTTP/1.1 200 OK\r\nx: ".to_vec()), Step::Repeat(vec![b'x'; 4096], 64)],
            true,
        ),
        ("no byte", vec![Step::Reset], true),
        ("half a head", vec![Step::Write(b"HTTP/1.1 200 OK\r\ncontent-le".to_vec()), Step::Reset], true),
        ("below the limit", sized(1_000_000), true),
        ("above the limit", sized(2_000_000), false),
        ("a redirect", json_with("307 Temporary Redirect", "location: http://127.0.0.1:1/\r\n", "{}"), true),
        ("a bad key", json("401 Unauthorized", r#"{"error":"no"}"#), true),
    ] {
        let recorders = [(); 2].map(|()| Recorder::start("m", vec![json("200 OK", ANSWER)]));
        let gateway = gateway("", &[recorders[0].address, recorders[1].address]);
        let text = long(name);
        let ill = warm(&gateway, &text);
        let asked = [0, 1].map(|index: usize| recorders[index].posts().len());
        recorders[ill].play(script);
        let answer = gateway.post("/v1/chat/completions", &chat(&text, ""));
        assert_eq!(
            answer.status,
            200,
            "{name}: {}",
            String::from_utf8_lossy(&answer.body[..answer.body.len().min(500)])
        );
        let row = gateway.row_of(&answer);
        if elsewhere {
            assert_eq!((worker(&answer), answer.text().as_str()), (1 - ill, ANSWER), "{name}");
            assert_eq!((&row["attempts"], &row["outcome"]), (&2.into(), &"completed".into()), "{name}: {row}");
        } else {
            assert!(!answer.whole && answer.body.len() <= 2_000_000, "{name}: {}", answer.body.len());
            assert_eq!((&row["attempts"], &row["outcome"]), (&1.into(), &"cut".into()), "{name}: {row}");
        }
        let more = [0, 1].map(|index: usize| recorders[index].posts().len() - asked[index]);
        // A connection that had served before may have been closed as idle: asked once more before it is left.
        let asked = if name == "no byte" { 2 } else { 1 };
        assert_eq!((more[ill], more[1 - ill]), (asked, usize::from(elsewhere)), "{name}");
    }
}

/// After the first byte nothing is tried again: one error event, and the other worker hears nothing.
#[test]
fn a_stream_that_breaks_is_not_begun_again() {
    let (mut workers, gateway) = pair("idle_seconds = 1\n");
    for fault in [
        r#"{"kind":{"cut":{"after":3}}}"#,
        r#"{"kind":{"cut":{"after":3,"reset":true}}}"#,
        r#"{"kind":{"stall":{"after":3}}}"#,
        r#"{"kind":{"error":{"after":3}}}"#,
        r#"{"kind":{"abort":{"after":3}}}"#,
        "kill",
    ] {
        let text = long(fault);
        let ill = warm(&gateway, &text);
        let begun = workers[1 - ill].log()["requests"]["begun"].clone();
        let mut client = Connection::to(gateway.client);
        if fault == "kill" {
            workers[ill].faults(r#"[{"kind":{"stall":{"after":3}}}]"#);
        } else {
            workers[ill].faults(&format!("[{fault}]"));
        }
        client.post("/v1/chat/completions", &[], streamed(&text).as_bytes());
        if fault == "kill" {
            client.until(b"\"content\":\"");
            workers[ill].process.signal("KILL");
        }
        let answer = client.answer();
        assert_eq!((answer.status, worker(&answer)), (200, ill), "{fault}");
        let message = answer.stream_end().expect_err("the stream is not complete");
        assert!(!message.contains("127.0.0.1"), "{message}");
        let row = gateway.row_of(&answer);
        assert_eq!((&row["outcome"], &row["attempts"]), (&"cut".into(), &1.into()), "{fault}: {row}");
        assert!(row["output_tokens"].as_u64() > Some(0) && row["output_tokens_from"] == "events", "{fault}: {row}");
        assert_eq!(workers[1 - ill].log()["requests"]["begun"], begun, "{fault}");
        if fault == "kill" {
            // What was killed comes back at the same place.
            let again = gateway.post("/v1/chat/completions", &chat(&text, ""));
            assert_eq!((again.status, worker(&again)), (200, 1 - ill), "{}", again.text());
            let down = format!("forebay_worker_up{{worker=\"w{ill}\"}}");
            eventually("the dead worker to be noticed", || (gateway.metric(&down) == 0.0).then_some(()));
            assert!(workers[ill].process.wait().code().is_none(), "it died of a signal");
            workers[ill] = Worker::start_at(workers[ill].address.port(), &["--model", "m"]);
            let began = Instant::now();
            until_up(&gateway, ill);
            println!("up again {:?} after the restart", began.elapsed());
            // Trust in it comes back over some 20 s, in which an idle other is preferred.
            within(3 * PATIENCE, "an answer from the worker that returned", || {
                let answer = gateway.post("/v1/chat/completions", &chat("hello", r#","max_tokens":1"#));
                assert_eq!(answer.status, 200, "{}", answer.text());
                (worker(&answer) == ill).then_some(())
            });
        } else {
            workers[ill].faults("[]");
        }
    }
}

/// With nobody else to ask, the client learns what happened: status, shape, and whether trying again makes sense.
#[test]
fn one_worker_that_fails() {
    for (fault, extra, status, code, outcome, retry_after) in [
        (r#"{"kind":{"status":{"code":500}}}"#, "", 502, "upstream_error", "failed", false),
        (r#"{"kind":{"error":{}}}"#, "", 502, "upstream_error", "failed", false),
        (r#"{"kind":{"status":{"code":503}}}"#, "", 503, "server_is_overloaded", "failed", true),
        (r#"{"kind":{"status":{"code":429,"retry_after":1}}}"#, "", 503, "server_is_overloaded", "failed", true),
        (r#"{"kind":{"hang":{}}}"#, "first_byte_seconds = 1\n", 504, "upstream_timeout", "failed", false),
        (r#"{"kind":{"cut":{}}}"#, "", 502, "upstream_error", "failed", false),
    ] {
        let ill = Worker::start(&["--model", "m"]);
        let gateway = gateway(extra, &[ill.address]);
        ill.faults(&format!("[{fault}]"));
        for stream in [false, true] {
            let began = Instant::now();
            let answer = gateway.post("/v1/chat/completions", &chat("hello", &format!(r#","stream":{stream}"#)));
            let took = began.elapsed();
            assert_eq!(answer.refusal(status), code, "{fault}");
            assert_eq!(answer.header("retry-after").is_some(), retry_after, "{fault}: {:?}", answer.headers);
            assert_eq!(answer.header("x-should-retry"), Some("false"), "{fault}: our attempts are spent");
            assert!(answer.header("x-forebay-worker").is_none(), "nobody answered");
            let row = gateway.row_of(&answer);
            assert_eq!((&row["status"], &row["outcome"]), (&status.into(), &outcome.into()), "{fault}: {row}");
            // An overloaded worker is asked three times, never sooner than it said or, where it said nothing, 1 s.
            if retry_after {
                assert!(took >= Duration::from_secs(2), "{fault}: {took:?}");
            }
        }
        if retry_after {
            assert_eq!(ill.log()["requests"]["begun"], 6);
        }
    }
}

#[test]
fn an_overloaded_worker_is_asked_again_when_it_said() {
    let busy = Worker::start(&["--model", "m", "--fault", "status:code=429,retry_after=2,first=1"]);
    let gateway = gateway("", &[busy.address]);
    let began = Instant::now();
    let answer = gateway.post("/v1/chat/completions", &chat("hello", ""));
    let took = began.elapsed();
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!((2000..5000).contains(&took.as_millis()), "{took:?}");
    let row = gateway.row_of(&answer);
    assert_eq!(row["attempts"], 2, "{row}");
    assert!(row["queue_ms"].as_f64() > Some(1900.0), "it waited here: {row}");
}

#[test]
fn one_worker_that_is_gone() {
    let gone = Worker::start(&["--model", "m"]);
    let gateway = gateway("", &[gone.address]);
    assert_eq!(gateway.post("/v1/chat/completions", &chat("hello", "")).status, 200);
    gone.refuse(4000);
    // A connection that broke may tell of it first; the next one is refused.
    let answer = eventually("it to be known", || {
        let answer = gateway.post("/v1/chat/completions", &chat("hello", ""));
        (answer.status != 502).then_some(answer)
    });
    assert_eq!(answer.refusal(503), "no_worker");
    assert_eq!(answer.header("x-should-retry"), None, "it may be back soon");
    assert!(answer.header("retry-after").is_some(), "{:?}", answer.headers);
    let began = Instant::now();
    until_up(&gateway, 0);
    println!("up again {:?} after the last refusal", began.elapsed());
    assert_eq!(gateway.post("/v1/chat/completions", &chat("hello", "")).status, 200);
}

#[test]
fn connections_that_are_refused_go_elsewhere() {
    let (workers, gateway) = pair("");
    let text = long("refused");
    let gone = warm(&gateway, &text);
    workers[gone].refuse(4000);
    let up = format!("forebay_worker_up{{worker=\"w{gone}\"}}");
    eventually("the worker to be known as gone", || {
        let answer = gateway.post("/v1/chat/completions", &streamed(&text));
        assert_eq!((answer.status, worker(&answer), answer.stream_end()), (200, 1 - gone, Ok(())));
        (gateway.metric(&up) == 0.0).then_some(())
    });
    until_up(&gateway, gone);
    assert_eq!(workers[gone].finished(), 1, "only the one before");
}

/// What an engine says of itself is no condition for work.
#[test]
fn a_worker_without_metrics_serves() {
    let quiet = Worker::start(&["--model", "m", "--fault", "status:code=500,path=/metrics"]);
    let silent = Worker::start(&["--model", "m", "--fault", "hang:path=/metrics"]);
    let gateway = gateway("", &[quiet.address, silent.address]);
    let mut answered = [0; 2];
    eventually("answers from both", || {
        let answer = gateway.post("/v1/chat/completions", &chat("hello", r#","max_tokens":1"#));
        assert_eq!(answer.status, 200, "{}", answer.text());
        answered[worker(&answer)] += 1;
        (answered[0] > 0 && answered[1] > 0).then_some(())
    });
}

#[test]
fn the_breaker_opens_and_closes() {
    let (workers, gateway) = pair("");
    workers[0].faults(r#"[{"kind":{"status":{"code":500}}}]"#);
    let open = "forebay_breaker_open{worker=\"w0\"}";
    let mut asked = 0;
    let mut ask = || {
        asked += 1;
        let answer = gateway.post("/v1/chat/completions", &chat(&format!("{asked} times"), r#","max_tokens":1"#));
        assert_eq!(answer.status, 200, "{}", answer.text());
        worker(&answer)
    };
    eventually("the breaker to open", || {
        assert_eq!(ask(), 1);
        (gateway.metric(open) == 1.0).then_some(())
    });
    let opened = Instant::now();
    let begun = workers[0].log()["requests"]["begun"].as_u64().expect("a count");
    assert!(begun >= 5, "it takes some volume: {begun}");
    assert_eq!(gateway.metric("forebay_worker_up{worker=\"w0\"}"), 0.0);
    for _ in 0..10 {
        assert_eq!(ask(), 1);
    }
    if opened.elapsed() < Duration::from_secs(4) {
        assert_eq!(workers[0].log()["requests"]["begun"], begun, "it is left alone");
    }
    workers[0].faults("[]");
    // It is left alone for 5 s.
    eventually("the worker to be tried and taken back", || (ask() == 0).then_some(()));
    assert!(opened.elapsed() >= Duration::from_secs(4), "{:?}", opened.elapsed());
    assert_eq!(gateway.metric(open), 0.0);
    assert_eq!(gateway.metric("forebay_worker_up{worker=\"w0\"}"), 1.0);
}
