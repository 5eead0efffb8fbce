//! What a client meets when workers fail, case by case, on workers of raw sockets: their logs show who was asked, how
//! often, and that nobody answered twice.

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use crate::support::body::{ANSWER, FINISH, chat, delta, endless_stream, held_stream, long};
use crate::support::client::{Answer, Connection, post_with};
use crate::support::eventually;
use crate::support::process::{Gateway, model, tokenizer};
use crate::support::recorder::{Recorder, Step, chunk, json, json_with, stream, stream_head};

const CHAT: &str = "/v1/chat/completions";
const FULL: &str = r#"{"error":{"message":"full","type":"overloaded","param":null,"code":null}}"#;

/// Workers that are up, and a gateway before them.
struct Setting {
    workers: Vec<Recorder>,
    gateway: Gateway,
}

impl Setting {
    fn new(workers: usize, extra: &str) -> Self {
        let workers: Vec<_> = (0..workers).map(|_| Recorder::start("m", vec![good(false)])).collect();
        let addresses: Vec<_> = workers.iter().map(|worker| worker.address).collect();
        let gateway = Gateway::start(&model("m", &addresses, &format!("tokenizer = {:?}\n{extra}", tokenizer())));
        for index in 0..workers.len() {
            let up = format!("forebay_worker_up{{worker=\"w{index}\"}}");
            eventually("the worker to be up", || (gateway.metric(&up) == 1.0).then_some(()));
        }
        Self { workers, gateway }
    }

    /// The worker that the next request with this text goes to first.
    fn warm(&self, text: &str) -> usize {
        self.workers.iter().for_each(|worker| worker.play(good(false)));
        let answer = self.gateway.post(CHAT, &chat(text, ""));
        assert_eq!(answer.status, 200, "{}", answer.text());
        self.gateway.row_of(&answer);
        worker(&answer)
    }

    fn asked(&self) -> Vec<usize> {
        self.workers.iter().map(|worker| worker.posts().len()).collect()
    }
}

/// What a well worker answers.
fn good(streamed: bool) -> Vec<Step> {
    if streamed { stream(&[&delta("ok"), FINISH]) } else { json("200 OK", ANSWER) }
}

fn worker(answer: &Answer) -> usize {
    let name = answer.header("x-forebay-worker").expect("a worker's name");
    name.strip_prefix('w').and_then(|index| index.parse().ok()).expect("a worker of this test")
}

/// Exactly one whole answer, whichever way it was asked for.
fn assert_good(answer: &Answer, streamed: bool, what: &str) {
    assert_eq!((answer.status, answer.whole), (200, true), "{what}: {}", answer.text());
    if streamed {
        assert_eq!(answer.stream_end(), Ok(()), "{what}");
        assert_eq!(answer.events().len(), 3, "{what}: {}", answer.text());
    } else {
        assert_eq!(answer.text().replace(r#""model":"n""#, r#""model":"m""#), ANSWER, "{what}");
    }
}

/// One of two workers plays `fault`; the other one answers, and the first was asked so often.
fn elsewhere(name: &str, extra: &str, fault: &[Step], reason: &str, asked: RangeInclusive<usize>) {
    for streamed in [false, true] {
        let setting = Setting::new(2, extra);
        let text = long(name);
        let ill = setting.warm(&text);
        let well = 1 - ill;
        let before = setting.asked();
        setting.workers[ill].play(fault.to_vec());
        setting.workers[well].play(good(streamed));
        let answer = setting.gateway.post(CHAT, &chat(&text, &format!(r#","stream":{streamed}"#)));
        assert_good(&answer, streamed, name);
        assert_eq!(worker(&answer), well, "{name}");
        assert_eq!(answer.header("x-forebay-attempts"), Some(format!("w{ill}={reason}").as_str()), "{name}");
        let after = setting.asked();
        assert!(asked.contains(&(after[ill] - before[ill])), "{name}: {before:?} {after:?}");
        assert_eq!(after[well] - before[well], 1, "{name}, stream {streamed}");
        let row = setting.gateway.row_of(&answer);
        assert_eq!((&row["outcome"], &row["attempts"]), (&"completed".into(), &2.into()), "{name}: {row}");
    }
}

/// A worker that is alone plays these; the answer, how often it was asked, and how long that took.
fn alone(name: &str, extra: &str, scripts: Vec<Vec<Step>>, streamed: bool) -> (Answer, usize, Duration) {
    let setting = Setting::new(1, extra);
    setting.workers[0].play_all(scripts);
    let began = Instant::now();
    let answer = setting.gateway.post(CHAT, &chat(name, &format!(r#","stream":{streamed}"#)));
    (answer, setting.asked()[0], began.elapsed())
}

fn busy(status: &str, retry_after: &str) -> Vec<Step> {
    json_with(status, retry_after, FULL)
}

const LATER: &str = "retry-after: 30\r\n";

#[test]
fn f01_what_asks_to_be_left_alone_is_not_asked_sooner() {
    elsewhere("429", "", &busy("429 Too Many Requests", LATER), "overloaded", 1..=1);
    for streamed in [false, true] {
        for header in ["retry-after: 1\r\n", "retry-after: 9\r\nretry-after-ms: 1000\r\n"] {
            let scripts = vec![busy("429 Too Many Requests", header), good(streamed)];
            let (answer, asked, took) = alone("in a second", "", scripts, streamed);
            assert_good(&answer, streamed, header);
            assert!(asked == 2 && took >= Duration::from_secs(1), "{asked} times in {took:?}");
        }
    }
    // Longer than it may wait here: said at once, also to who comes next.
    let setting = Setting::new(1, "queue_seconds_max = 5\n");
    setting.workers[0].play(busy("429 Too Many Requests", LATER));
    for _ in 0..3 {
        let answer = setting.gateway.post(CHAT, &chat("hello", ""));
        assert_eq!(answer.refusal(503), "server_is_overloaded");
        let wait: u64 = answer.header("retry-after").expect("a time").parse().expect("seconds");
        assert!((6..=30).contains(&wait), "{wait}");
        assert_eq!(answer.header("x-should-retry"), None);
    }
    assert_eq!(setting.asked(), [1], "never sooner");
}

#[test]
fn f02_what_is_full_without_a_word_on_when_is_asked_later_and_later() {
    elsewhere("429", "", &busy("429 Too Many Requests", ""), "overloaded", 1..=1);
    for streamed in [false, true] {
        let full = busy("429 Too Many Requests", "");
        let scripts = vec![full.clone(), full.clone(), good(streamed)];
        let (answer, asked, took) = alone("twice full", "", scripts, streamed);
        assert_good(&answer, streamed, "twice full");
        assert!(asked == 3 && took >= Duration::from_secs(3), "{asked} times in {took:?}: a second, then two");
        let (answer, asked, _) = alone("always full", "", vec![full], streamed);
        assert_eq!(answer.refusal(503), "server_is_overloaded");
        assert_eq!(asked, 3, "bounded");
    }
}

#[test]
fn f03_an_error_is_tried_once_more() {
    let error = json("500 Internal Server Error", r#"{"error":{"message":"boom","type":"InternalServerError"}}"#);
    elsewhere("500", "", &error, "status", 1..=1);
    for streamed in [false, true] {
        let (answer, asked, _) = alone("once", "", vec![error.clone(), good(streamed)], streamed);
        assert_good(&answer, streamed, "once");
        assert_eq!((asked, answer.header("x-forebay-attempts")), (2, Some("w0=status")));
        let (answer, asked, _) = alone("always", "", vec![error.clone()], streamed);
        assert_eq!((answer.refusal(502).as_str(), asked), ("upstream_error", 2));
        assert_eq!(answer.error()["message"], "boom");
    }
}

#[test]
fn f04_what_cannot_serve_now_is_asked_more_slowly_and_then_left_alone() {
    for status in ["503 Service Unavailable", "529 Overloaded"] {
        elsewhere(status, "", &busy(status, ""), "overloaded", 1..=1);
        let (answer, asked, took) = alone(status, "", vec![busy(status, ""), good(false)], false);
        assert_good(&answer, false, status);
        assert!(asked == 2 && took >= Duration::from_secs(1), "{asked} times in {took:?}");
    }
    // Nothing else comes of it: the breaker opens.
    let setting = Setting::new(2, "");
    let text = long("breaker");
    let ill = setting.warm(&text);
    let before = setting.asked();
    let mut clients: Vec<_> = (0..12).map(|_| Connection::to(setting.gateway.client)).collect();
    setting.workers[ill].play([vec![Step::Gate], busy("503 Service Unavailable", "")].concat());
    for (number, client) in clients.iter_mut().enumerate() {
        client.post(CHAT, &[], chat(&text, "").as_bytes());
        setting.workers[ill].await_posts(before[ill] + number + 1);
    }
    (0..12).for_each(|_| setting.workers[ill].go_on());
    for client in &mut clients {
        assert_good(&client.answer(), false, "breaker");
    }
    assert_eq!(setting.gateway.metric(&format!("forebay_breaker_open{{worker=\"w{ill}\"}}")), 1.0);
    assert_eq!(setting.asked()[1 - ill] - before[1 - ill], 12, "one answer each");
}

#[test]
fn f05_a_reset_before_the_head_is_tried_elsewhere() {
    // Its connection had served before and may have been closed as idle: a new one tells.
    let half = [Step::Write(b"HTTP/1.1 200 OK\r\ncont".to_vec()), Step::Reset];
    elsewhere("reset", "", &[Step::Reset], "reset", 1..=2);
    elsewhere("half a head", "", &half, "reset", 1..=2);
    let (answer, asked, _) = alone("alone", "", vec![vec![Step::Reset]], false);
    assert_eq!(answer.refusal(502), "upstream_error");
    assert!(asked <= 2, "it may have begun: not asked again");
    assert_eq!(answer.header("x-forebay-attempts"), Some("w0=reset"));
}

#[test]
fn f06_who_says_nothing_is_left_and_not_asked_again() {
    elsewhere("silence", "first_byte_seconds = 1\n", &[Step::AwaitClose], "timeout", 1..=1);
    for streamed in [false, true] {
        let (answer, asked, _) = alone("alone", "first_byte_seconds = 1\n", vec![vec![Step::AwaitClose]], streamed);
        assert_eq!((answer.refusal(504).as_str(), asked), ("upstream_timeout", 1));
        assert_eq!(answer.header("x-forebay-attempts"), Some("w0=timeout"));
    }
}

#[test]
fn f07_a_slow_first_token_is_left_for_another_worker() {
    let setting = Setting::new(2, "first_token_seconds = 1\n");
    let text = long("slow");
    let ill = setting.warm(&text);
    // Alive, and yet without a token.
    setting.workers[ill].play(vec![stream_head(), chunk(b": keep-alive\n\n"), Step::AwaitClose]);
    setting.workers[1 - ill].play(good(true));
    let answer = setting.gateway.post(CHAT, &chat(&text, r#","stream":true"#));
    assert_good(&answer, true, "slow");
    assert_eq!(
        (worker(&answer), answer.header("x-forebay-attempts")),
        (1 - ill, Some(format!("w{ill}=timeout").as_str()))
    );
    // An answer that comes whole has no first token to wait for.
    let slow = [vec![Step::Pause(Duration::from_millis(1300))], good(false)].concat();
    let (answer, asked, _) = alone("whole", "first_token_seconds = 1\n", vec![slow], false);
    assert_good(&answer, false, "whole");
    assert_eq!(asked, 1);
}

/// The stream that was begun ends with an error event, and nobody else is asked.
fn cut(extra: &str, fault: Vec<Step>) {
    let setting = Setting::new(2, extra);
    let text = long("cut");
    let ill = setting.warm(&text);
    let before = setting.asked();
    setting.workers[ill].play(fault);
    let answer = setting.gateway.post(CHAT, &chat(&text, r#","stream":true"#));
    assert_eq!((answer.status, worker(&answer)), (200, ill));
    answer.stream_end().expect_err("it is not complete");
    let after = setting.asked();
    assert_eq!((after[ill] - before[ill], after[1 - ill] - before[1 - ill]), (1, 0));
    let row = setting.gateway.row_of(&answer);
    assert_eq!((&row["outcome"], &row["output_tokens"]), (&"cut".into(), &2.into()), "{row}");
}

#[test]
fn f08_a_stream_that_is_cut_ends_with_an_error_event() {
    cut("", vec![stream_head(), chunk(&delta("one")), chunk(&delta("two")), Step::Reset]);
}

#[test]
fn f09_a_stream_that_stalls_ends_with_an_error_event() {
    cut("idle_seconds = 1\n", vec![stream_head(), chunk(&delta("one")), chunk(&delta("two")), Step::AwaitClose]);
}

#[test]
fn f10_an_event_that_cannot_be_read_is_left_out_when_it_is_alone() {
    let bad = b"data: {\"choices\":[{\"delta\n\n";
    for script in [stream(&[bad, &delta("ok"), FINISH]), stream(&[&delta("ok"), bad, FINISH])] {
        let setting = Setting::new(1, "");
        setting.workers[0].play(script);
        let answer = setting.gateway.post(CHAT, &chat("hello", r#","stream":true"#));
        assert_good(&answer, true, "one bad event");
        assert_eq!(setting.asked(), [1]);
        eventually("a line in the log", || {
            setting.gateway.process.err().contains("skipped a stream event").then_some(())
        });
    }
    let many = bad.repeat(9);
    let (answer, asked, _) = alone("nothing else", "", vec![stream(&[&many])], true);
    assert_eq!((answer.refusal(502).as_str(), asked), ("upstream_error", 1));
    let (answer, asked, _) = alone("nothing else after", "", vec![stream(&[&delta("ok"), &many, FINISH])], true);
    assert_eq!((answer.stream_end(), asked), (Err("the worker sent garbage".to_owned()), 1));
}

#[test]
fn f11_a_finished_stream_needs_no_end_mark() {
    let unmarked = FINISH.strip_suffix(b"data: [DONE]\n\n").expect("an end mark");
    let (answer, asked, _) = alone("unmarked", "", vec![stream(&[&delta("ok"), unmarked])], true);
    assert_good(&answer, true, "unmarked");
    assert_eq!(asked, 1);
    let (answer, asked, _) = alone("unfinished", "", vec![stream(&[&delta("ok"), b"data: [DONE]\n\n"])], true);
    answer.stream_end().expect_err("without a finish reason it is cut");
    assert_eq!(asked, 1);
}

/// Two workers, and what one of them refuses; nobody else is asked.
fn refused(body: &str, code: &str) {
    let setting = Setting::new(2, "");
    for streamed in [false, true] {
        setting.workers.iter().for_each(|worker| worker.play(json("400 Bad Request", body)));
        let before = setting.asked();
        let answer = setting.gateway.post(CHAT, &chat("hello", &format!(r#","stream":{streamed}"#)));
        assert_eq!(answer.refusal(400), code);
        assert_eq!(setting.asked().iter().sum::<usize>(), before.iter().sum::<usize>() + 1);
        let row = setting.gateway.row_of(&answer);
        assert_eq!((&row["outcome"], &row["output_tokens"]), (&"engine_refused".into(), &0.into()), "{row}");
    }
}

const TOO_LONG: &str = r#"{"error":{"message":"This model's maximum context length is 16 tokens. However, you requested 40 tokens.","type":"BadRequestError","param":"messages","code":400}}"#;
const FILTERED: &str = r#"{"error":{"message":"The content was filtered.","type":"invalid_request_error","param":null,"code":"content_filter"}}"#;

#[test]
fn f12_what_is_too_long_is_not_tried_again_at_the_same_model() {
    refused(TOO_LONG, "context_length_exceeded");
}

#[test]
fn f13_a_refusal_for_the_content_is_not_routed_round() {
    refused(FILTERED, "content_filter");
}

#[test]
fn f14_who_flaps_is_left_alone_and_tried_singly() {
    let setting = Setting::new(2, "");
    let text = long("flapping");
    let ill = setting.warm(&text);
    let open = format!("forebay_breaker_open{{worker=\"w{ill}\"}}");
    setting.workers[ill].play(json_with("200 OK", "content-encoding: br\r\n", "x"));
    eventually("the breaker to open", || {
        assert_good(&setting.gateway.post(CHAT, &chat(&text, "")), false, "the other one answers");
        (setting.gateway.metric(&open) == 1.0).then_some(())
    });
    // It is tried with one request at a time, and taken back when that works.
    setting.workers[ill].play([vec![Step::Gate], good(false)].concat());
    let asked = setting.asked()[ill];
    let mut trial = eventually("a trial", || {
        let before = setting.asked();
        let mut client = Connection::to(setting.gateway.client);
        client.post(CHAT, &[], chat(&text, "").as_bytes());
        eventually("someone to be asked", || (setting.asked() != before).then_some(()));
        if setting.asked()[ill] > asked {
            return Some(client);
        }
        assert_good(&client.answer(), false, "the other one answers");
        None
    });
    for _ in 0..5 {
        assert_eq!(worker(&setting.gateway.post(CHAT, &chat(&text, ""))), 1 - ill, "one at a time");
    }
    assert_eq!(setting.asked()[ill], asked + 1);
    setting.workers[ill].go_on();
    assert_eq!(worker(&trial.answer()), ill);
    eventually("the breaker to close", || (setting.gateway.metric(&open) == 0.0).then_some(()));
}

#[test]
fn f15_the_answer_names_who_answered_and_only_that_is_billed() {
    let setting = Setting::new(2, "attempts_max = 2\n");
    let text = long("billed");
    let ill = setting.warm(&text);
    let error = json("500 Internal Server Error", "{}");
    let prompt = "forebay_tokens_total{model=\"m\",kind=\"prompt\"}";
    let before = setting.gateway.metric(prompt);
    setting.workers[ill].play(error.clone());
    let answer = setting.gateway.post(CHAT, &chat(&text, ""));
    assert_eq!((answer.header("x-forebay-model"), worker(&answer)), (Some("m"), 1 - ill));
    let row = setting.gateway.row_of(&answer);
    assert_eq!((&row["prompt_tokens"], &row["output_tokens"]), (&7.into(), &3.into()), "one attempt's: {row}");
    eventually("one attempt in the sum", || (setting.gateway.metric(prompt) == before + 7.0).then_some(()));
    setting.workers.iter().for_each(|worker| worker.play(error.clone()));
    let answer = setting.gateway.post(CHAT, &chat(&text, ""));
    let row = setting.gateway.row_of(&answer);
    assert_eq!((&row["outcome"], &row["output_tokens"]), (&"failed".into(), &0.into()), "{row}");
    assert_eq!(setting.gateway.metric(prompt), before + 7.0, "what failed is not billed");
    // What was produced before a stream was cut is (f08).
}

#[test]
fn f16_the_most_useful_error_and_who_was_asked() {
    let setting = Setting::new(3, "first_byte_seconds = 1\n");
    let text = long("all of them");
    let first = setting.warm(&text);
    let words = r#"{"error":{"message":"CUDA error at 10.0.0.7","type":"InternalServerError"}}"#;
    for worker in &setting.workers {
        worker.play(vec![Step::AwaitClose]);
    }
    setting.workers[first].play(json("500 Internal Server Error", words));
    let answer = setting.gateway.post(CHAT, &chat(&text, ""));
    assert_eq!(answer.refusal(502), "upstream_error");
    let message = answer.error()["message"].as_str().expect("a message").to_owned();
    assert!(message.contains("CUDA error") && !message.contains("10.0.0.7"), "the engine's words: {message}");
    let attempts = answer.header("x-forebay-attempts").expect("who was asked");
    let listed: Vec<_> = attempts.split(", ").collect();
    assert_eq!((listed.len(), listed[0]), (3, format!("w{first}=status").as_str()), "{attempts}");
    assert!(listed[1..].iter().all(|attempt| attempt.ends_with("=timeout")), "{attempts}");
    assert_eq!(answer.header("x-should-retry"), Some("false"));
}

#[test]
fn f17_who_leaves_is_not_worked_for() {
    for (body, script) in [
        (chat("hello", ""), vec![Step::AwaitClose]),
        (chat("hello", r#","stream":true"#), vec![Step::AwaitClose]),
        (chat("hello", r#","stream":true"#), endless_stream()),
    ] {
        let setting = Setting::new(2, "");
        setting.workers.iter().for_each(|worker| worker.play(script.clone()));
        let mut client = Connection::to(setting.gateway.client);
        client.post(CHAT, &[], body.as_bytes());
        let at = eventually("a request", || setting.asked().iter().position(|asked| *asked == 1));
        drop(client);
        setting.workers[at].closed(0);
        let rows = eventually("its row", || Some(setting.gateway.rows()).filter(|rows| rows.len() == 1));
        assert_eq!(rows[0]["outcome"], "client_gone", "{rows:?}");
        assert_eq!(setting.asked().iter().sum::<usize>(), 1, "nobody else was asked");
    }
}

#[test]
fn f18_streams_under_way_are_finished_at_the_end() {
    let mut setting = Setting::new(1, "");
    setting.workers[0].play(held_stream());
    let mut client = Connection::to(setting.gateway.client);
    client.post(CHAT, &[], chat("hello", r#","stream":true"#).as_bytes());
    client.until(b"first");
    setting.gateway.process.signal("TERM");
    let address = setting.gateway.client;
    eventually("no new connections", || std::net::TcpStream::connect(address).is_err().then_some(()));
    setting.workers[0].go_on();
    assert_eq!(client.answer().stream_end(), Ok(()));
    assert_eq!(setting.gateway.process.wait().code(), Some(0));
    assert_eq!(setting.gateway.rows().len(), 1);
}

/// The client's deadline bounds all of it: waits, attempts and retries.
#[test]
fn the_deadline_bounds_every_retry() {
    for script in [vec![Step::AwaitClose], busy("429 Too Many Requests", LATER), busy("503 Service Unavailable", "")] {
        let setting = Setting::new(2, "");
        setting.workers.iter().for_each(|worker| worker.play(script.clone()));
        let answer = post_with(setting.gateway.client, CHAT, &["x-forebay-deadline-ms: 700"], &chat("hello", ""));
        assert!(matches!(answer.status, 503 | 504), "{}", answer.text());
        let asked = setting.asked();
        assert!(asked.iter().all(|asked| *asked <= 1), "{asked:?}");
    }
}

/// Engines in trouble are not asked all the more for it.
#[test]
fn retries_are_a_share_of_the_traffic() {
    let setting = Setting::new(2, "");
    // No illness and no wait, so that only the budget bounds it.
    setting.workers.iter().for_each(|worker| worker.play(busy("429 Too Many Requests", "retry-after: 0\r\n")));
    let began = Instant::now();
    for number in 0..60 {
        let answer = setting.gateway.post(CHAT, &chat(&format!("request {number}"), ""));
        assert_eq!(answer.refusal(503), "server_is_overloaded");
    }
    let retries = setting.asked().iter().sum::<usize>() - 60;
    let allowed = 20 + 6 + began.elapsed().as_secs() as usize + 1;
    assert!((20..=allowed).contains(&retries), "{retries} of {allowed}");
    assert_eq!(setting.gateway.metric("forebay_retries_total{reason=\"overloaded\"}"), retries as f64);
    assert!(setting.gateway.metric("forebay_retries_denied_total") > 20.0);
}

fn promised(gateway: &Gateway) -> f64 {
    (0..2).map(|worker| gateway.metric(&format!("forebay_worker_promised_tokens{{worker=\"w{worker}\"}}"))).sum()
}

#[test]
fn a_hedged_request_is_answered_once_by_whoever_begins_first() {
    let setting = Setting::new(2, "hedge_after_ms = 100\n");
    let hedges = "forebay_retries_total{reason=\"hedge\"}";
    let streamed = |text: &str| chat(text, r#","stream":true"#);

    // The second one begins first; the first is withdrawn.
    let text = long("second");
    let slow = setting.warm(&text);
    let before = setting.asked();
    setting.workers[slow].play(vec![Step::AwaitClose]);
    setting.workers[1 - slow].play(good(true));
    let answer = setting.gateway.post(CHAT, &streamed(&text));
    assert_good(&answer, true, "second");
    assert_eq!(worker(&answer), 1 - slow);
    setting.workers[slow].closed(before[slow]);
    let row = setting.gateway.row_of(&answer);
    assert_eq!((&row["attempts"], &row["worker"]), (&2.into(), &format!("w{}", 1 - slow).into()), "{row}");
    assert_eq!(setting.gateway.metric(hedges), 1.0);
    eventually("both places to be given back", || (promised(&setting.gateway) == 0.0).then_some(()));

    // The first one begins after all; the second is withdrawn.
    let text = long("first");
    let slow = setting.warm(&text);
    let before = setting.asked();
    setting.workers[slow].play([vec![Step::Gate], good(true)].concat());
    setting.workers[1 - slow].play(vec![Step::AwaitClose]);
    let mut client = Connection::to(setting.gateway.client);
    client.post(CHAT, &[], streamed(&text).as_bytes());
    setting.workers[1 - slow].await_posts(before[1 - slow] + 1);
    setting.workers[slow].go_on();
    let answer = client.answer();
    assert_good(&answer, true, "first");
    assert_eq!(worker(&answer), slow);
    setting.workers[1 - slow].closed(before[1 - slow]);
    assert_eq!(setting.gateway.row_of(&answer)["worker"], format!("w{slow}"));

    // One fails, the other goes on.
    let text = long("fails");
    let slow = setting.warm(&text);
    let before = setting.asked();
    setting.workers[slow].play([vec![Step::Gate], json("500 Internal Server Error", "{}")].concat());
    setting.workers[1 - slow].play([vec![Step::Gate], good(true)].concat());
    let mut client = Connection::to(setting.gateway.client);
    client.post(CHAT, &[], streamed(&text).as_bytes());
    setting.workers[1 - slow].await_posts(before[1 - slow] + 1);
    setting.workers[slow].go_on();
    setting.workers[1 - slow].go_on();
    let answer = client.answer();
    assert_good(&answer, true, "fails");
    assert_eq!(worker(&answer), 1 - slow);
    assert_eq!(setting.gateway.row_of(&answer)["attempts"], 2);

    // A generated answer that comes whole is silent to its end, and batch work has time.
    let text = long("whole");
    let slow = setting.warm(&text);
    let before = setting.asked();
    setting.workers[slow].play([vec![Step::Pause(Duration::from_millis(400))], good(false)].concat());
    assert_good(&setting.gateway.post(CHAT, &chat(&text, "")), false, "whole");
    setting.workers[slow].play([vec![Step::Pause(Duration::from_millis(400))], good(true)].concat());
    let batch = ["x-forebay-priority: batch"];
    assert_good(&post_with(setting.gateway.client, CHAT, &batch, &streamed(&text)), true, "batch");
    assert_eq!(setting.asked()[1 - slow], before[1 - slow]);
    assert_eq!(setting.gateway.metric(hedges), 3.0);
}

#[test]
fn a_hedged_request_is_tried_no_more_often_than_any_other() {
    let setting = Setting::new(2, "hedge_after_ms = 50\nattempts_max = 3\n");
    let fault = [vec![Step::Pause(Duration::from_millis(200))], json("500 Internal Server Error", "{}")].concat();
    setting.workers.iter().for_each(|worker| worker.play(fault.clone()));
    let answer = setting.gateway.post(CHAT, &chat("hedged", r#","stream":true"#));
    assert_eq!(answer.status, 502, "{}", answer.text());
    let row = setting.gateway.row_of(&answer);
    assert_eq!(setting.asked().iter().sum::<usize>(), 3, "{row}");
    assert_eq!(row["attempts"], 3, "{row}");
}

/// What the large model answers when the small one answers this.
fn of_the_large(script: Vec<Step>) -> Vec<Step> {
    let named = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8").replace(r#""model":"m""#, r#""model":"n""#);
    let step = |step| if let Step::Write(bytes) = step { Step::Write(named(bytes).into()) } else { step };
    script.into_iter().map(step).collect()
}

/// A small model and a large one, one worker each: `s` and `l`.
fn pair(rules: &str) -> (Recorder, Recorder, Gateway) {
    let [small, large] = ["m", "n"].map(|name| Recorder::start(name, vec![good(false)]));
    let tokenizer = format!("tokenizer = {:?}\n", tokenizer());
    let of = |name: &str, keys: &str, worker: &Recorder, called: &str| {
        model(name, &[worker.address], &format!("{tokenizer}{keys}")).replace("\"w0\"", &format!("{called:?}"))
    };
    let models = of("m", "max_model_len = 64\nworker_grace_seconds = 0\nfirst_byte_seconds = 1\n", &small, "s")
        + rules
        + &of("n", "aliases = [\"large\"]\n", &large, "l");
    let gateway = Gateway::start(&models);
    for worker in ["s", "l"] {
        let up = format!("forebay_worker_up{{worker={worker:?}}}");
        eventually("the worker to be up", || (gateway.metric(&up) == 1.0).then_some(()));
    }
    (small, large, gateway)
}

/// Every trouble leads to the model that is configured for it, which is named in the answer; others do not.
#[test]
fn another_model_answers_in_the_trouble_that_is_named() {
    let boom = json("500 Internal Server Error", "{}");
    let cases = [
        ("context_length", long("too long"), good(false), 0),
        ("context_length", "what only the engine knows".to_owned(), json("400 Bad Request", TOO_LONG), 1),
        ("unavailable", "busy".to_owned(), busy("429 Too Many Requests", "retry-after: 90\r\n"), 1),
        ("error", "broken".to_owned(), boom, 2),
        ("error", "silent".to_owned(), vec![Step::AwaitClose], 1),
        ("content_filter", "filtered".to_owned(), json("400 Bad Request", FILTERED), 1),
    ];
    for (trouble, text, script, asked) in cases {
        for streamed in [false, true] {
            let (small, large, gateway) = pair(&format!("[[model.fallback]]\nto = \"large\"\non = [{trouble:?}]\n"));
            small.play(script.clone());
            large.play(of_the_large(good(streamed)));
            let answer = gateway.post(CHAT, &chat(&text, &format!(r#","max_tokens":8,"stream":{streamed}"#)));
            assert_good(&answer, streamed, &text);
            assert_eq!((answer.header("x-forebay-model"), answer.header("x-forebay-worker")), (Some("n"), Some("l")));
            assert_eq!((small.posts().len(), large.posts().len()), (asked, 1), "{text}");
            assert!(String::from_utf8_lossy(&large.posts()[0].body).contains(r#""model":"n""#), "called by its name");
            let row = gateway.row_of(&answer);
            assert_eq!((&row["model"], &row["outcome"]), (&"n".into(), &"completed".into()), "{row}");
            assert_eq!(gateway.metric(&format!("forebay_failovers_total{{reason={trouble:?}}}")), 1.0, "{text}");
        }
        // Not in other trouble, and a content filter only where it is named.
        let other = if trouble == "deadline" { "error" } else { "deadline" };
        let rules = match trouble {
            "content_filter" => "[[model.fallback]]\nto = \"n\"\n".to_owned(),
            _ => format!("[[model.fallback]]\nto = \"n\"\non = [{other:?}]\n"),
        };
        let (small, large, gateway) = pair(&rules);
        small.play(script);
        let answer = gateway.post(CHAT, &chat(&text, r#","max_tokens":8"#));
        assert!(answer.status >= 400 && large.posts().is_empty(), "{text}: {}", answer.text());
    }
}

/// Each model of the list is asked once, its own list does not count, and the last error is told.
#[test]
fn a_chain_of_models_ends() {
    let rules = "[[model.fallback]]\nto = \"n\"\n";
    let back = "[[model.fallback]]\nto = \"m\"\n";
    let (small, large, gateway) = {
        let [small, large] = ["m", "n"].map(|name| Recorder::start(name, vec![good(false)]));
        let of = |name: &str, worker: &Recorder| {
            model(name, &[worker.address], &format!("tokenizer = {:?}\n", tokenizer()))
                .replace("\"w0\"", &format!("\"{name}0\""))
        };
        let gateway = Gateway::start(&(of("m", &small) + rules + &of("n", &large) + back));
        for worker in ["m0", "n0"] {
            let up = format!("forebay_worker_up{{worker={worker:?}}}");
            eventually("the worker to be up", || (gateway.metric(&up) == 1.0).then_some(()));
        }
        (small, large, gateway)
    };
    let says = |words: &str| json("500 Internal Server Error", &format!(r#"{{"error":{{"message":{words:?}}}}}"#));
    small.play(says("the small one broke"));
    large.play(says("the large one broke"));
    let answer = gateway.post(CHAT, &chat("hello", ""));
    assert_eq!(answer.refusal(502), "upstream_error");
    assert_eq!(answer.error()["message"], "the large one broke");
    assert_eq!(answer.header("x-forebay-attempts"), Some("m0=status, m0=status, n0=status, n0=status"));
    assert_eq!((small.posts().len(), large.posts().len()), (2, 2));
    let row = gateway.row_of(&answer);
    assert_eq!((&row["attempts"], &row["outcome"], &row["model"]), (&4.into(), &"failed".into(), &"n".into()), "{row}");
}

/// An answer of a model that nobody asked for is none, as when another engine has taken a worker's address.
#[test]
fn an_answer_of_another_model_is_not_passed_on() {
    let stranger = |streamed: bool| {
        if streamed {
            let first = String::from_utf8(delta("ok")).expect("UTF-8").replace("\"m\"", "\"another\"");
            stream(&[first.as_bytes(), FINISH])
        } else {
            json("200 OK", &ANSWER.replace("\"m\"", "\"another\""))
        }
    };
    for streamed in [false, true] {
        let setting = Setting::new(2, "");
        let text = long("another");
        let ill = setting.warm(&text);
        setting.workers[ill].play(stranger(streamed));
        setting.workers[1 - ill].play(good(streamed));
        let answer = setting.gateway.post(CHAT, &chat(&text, &format!(r#","stream":{streamed}"#)));
        assert_good(&answer, streamed, "another");
        assert_eq!(answer.header("x-forebay-attempts"), Some(format!("w{ill}=other_model").as_str()));
        let (answer, asked, _) = alone("another", "", vec![stranger(streamed)], streamed);
        assert_eq!((answer.refusal(502).as_str(), asked), ("upstream_error", 1));
    }
    // A dated name of the same one is no other.
    let dated = json("200 OK", &ANSWER.replace("\"m\"", "\"m-2026-01-02\""));
    assert_eq!(alone("dated", "", vec![dated], false).0.status, 200);
}
