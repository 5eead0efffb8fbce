//! Equal requests in flight as one call: who shares with whom, what each gets, and what happens to the others when one
//! is slow, leaves, or when the call fails.

use std::io::Read;
use std::net::SocketAddr;

use crate::support::body::{ANSWER, FINISH, chat, delta, held_stream};
use crate::support::client::{Answer, Connection};
use crate::support::eventually;
use crate::support::process::{Gateway, model, tokenizer};
use crate::support::recorder::{Recorder, Step, chunk, json, stream_end, stream_head};

fn gateway(workers: &[SocketAddr]) -> Gateway {
    Gateway::start(&model("m", workers, &format!("tokenizer = {:?}\ncoalesce = true\n", tokenizer())))
}

/// What always gets the same answer.
fn certain(text: &str) -> String {
    chat(text, r#","temperature":0"#)
}

fn certain_stream(text: &str) -> String {
    chat(text, r#","temperature":0.0,"stream":true"#)
}

fn ask(gateway: &Gateway, headers: &[&str], body: &str) -> Connection {
    let mut connection = Connection::to(gateway.client);
    connection.post("/v1/chat/completions", headers, body.as_bytes());
    connection
}

/// Waits until so many requests found an equal one in flight.
fn until_shared(gateway: &Gateway, count: usize) {
    eventually("requests to join another", || {
        let hits = gateway.metric("forebay_cache_lookups_total{kind=\"coalesce\",result=\"hit\"}");
        (hits as usize == count).then_some(())
    });
}

fn until_left(gateway: &Gateway, count: usize) {
    eventually("the rows of clients that left", || {
        let left = gateway.rows().into_iter().filter(|row| row["outcome"] == "client_gone").count();
        (left == count).then_some(())
    });
}

/// How an answer says that it was found: by the one whose call it is, and by the others.
fn found(answers: &[Answer]) -> Vec<&str> {
    answers.iter().map(|answer| answer.header("x-forebay-cache").expect("the header")).collect()
}

/// A gateway with one shared call that has not begun to be answered, and so many who wait for it.
fn waiting(clients: usize, script: Vec<Step>, body: &str) -> (Recorder, Gateway, Vec<Connection>) {
    let recorder = Recorder::start("m", vec![script]);
    let gateway = gateway(&[recorder.address]);
    let mut connections = vec![ask(&gateway, &[], body)];
    recorder.await_posts(1);
    connections.extend((1..clients).map(|_| ask(&gateway, &[], body)));
    until_shared(&gateway, clients - 1);
    (recorder, gateway, connections)
}

#[test]
fn equal_requests_are_one_call_and_each_has_its_row() {
    let script = [vec![Step::Gate], json("200 OK", ANSWER)].concat();
    let (recorder, gateway, mut clients) = waiting(4, script, &certain("hello"));
    recorder.go_on();
    let answers: Vec<Answer> = clients.iter_mut().map(Connection::answer).collect();
    for answer in &answers {
        assert_eq!((answer.status, answer.text().as_str(), answer.whole), (200, ANSWER, true));
        assert_eq!((answer.header("x-forebay-worker"), answer.header("x-forebay-model")), (Some("w0"), Some("m")));
    }
    assert_eq!(found(&answers), ["miss", "coalesced", "coalesced", "coalesced"]);
    let rows: Vec<_> = answers.iter().map(|answer| gateway.row_of(answer)).collect();
    for row in &rows {
        assert_eq!((&row["outcome"], &row["status"]), (&"completed".into(), &200.into()), "{row}");
        assert_eq!((&row["prompt_tokens"], &row["output_tokens"]), (&7.into(), &3.into()), "{row}");
    }
    let paid = rows.iter().filter(|row| row["cache"].is_null()).count();
    let coalesced = rows.iter().filter(|row| row["cache"] == "coalesced").count();
    assert_eq!((paid, coalesced, recorder.posts().len()), (1, 3, 1), "{rows:?}");
    let tokens = |kind: &str| gateway.metric(&format!("forebay_tokens_total{{model=\"m\",kind=\"{kind}\"}}"));
    assert_eq!((tokens("prompt"), tokens("output")), (7.0, 3.0), "the engine worked once");
    // What is over is not shared.
    recorder.go_on();
    assert_eq!(ask(&gateway, &[], &certain("hello")).answer().header("x-forebay-cache"), Some("miss"));
}

#[test]
fn a_stream_is_shared_from_its_beginning() {
    let recorder = Recorder::start("m", vec![held_stream()]);
    let gateway = gateway(&[recorder.address]);
    let body = certain_stream("hello");
    let mut first = ask(&gateway, &[], &body);
    first.until(b"first");
    let mut late = ask(&gateway, &[], &body);
    late.until(b"first");
    recorder.go_on();
    let answers = [first.answer(), late.answer()];
    assert_eq!(answers[0].text(), answers[1].text());
    assert_eq!(answers.each_ref().map(Answer::stream_end), [Ok(()), Ok(())]);
    assert_eq!((found(&answers), recorder.posts().len()), (vec!["miss", "coalesced"], 1));
    assert_eq!(answers[1].header("content-type"), Some("text/event-stream; charset=utf-8"));
    let rows = answers.each_ref().map(|answer| gateway.row_of(answer));
    assert!(rows.iter().all(|row| row["outcome"] == "completed" && row["stream"] == true), "{rows:?}");
    assert!(rows.iter().all(|row| row["ttft_ms"].as_f64() > Some(0.0)), "{rows:?}");
}

#[test]
fn only_what_must_be_equal_is_shared() {
    let recorder =
        Recorder::start("m", vec![[vec![Step::Gate], json("200 OK", ANSWER)].concat(), json("200 OK", ANSWER)]);
    let gateway = gateway(&[recorder.address]);
    let mut first = ask(&gateway, &[], &certain("hello"));
    recorder.await_posts(1);
    let tool = r#","temperature":0,"tools":[{"type":"function","function":{"name":"f","parameters":{}}}]"#;
    let others: Vec<(Vec<&str>, String, bool)> = vec![
        (vec![], certain("Hello"), true),
        (vec![], chat("hello", r#","temperature":0,"user":"another""#), true),
        (vec![], chat("hello", r#","temperature":0,"cache_salt":"theirs""#), true),
        (vec![], chat("hello", r#","temperature":1,"seed":7"#), true),
        (vec!["x-session-id: theirs"], certain("hello"), true),
        (vec!["x-forebay-priority: batch"], certain("hello"), true),
        (vec!["x-forebay-deadline-ms: 60000"], certain("hello"), false),
        (vec![], chat("hello", ""), false),
        (vec![], chat("hello", r#","temperature":0.1"#), false),
        (vec![], chat("hello", tool), false),
    ];
    for (at, (headers, body, may)) in others.iter().enumerate() {
        let answer = ask(&gateway, headers, body).answer();
        assert_eq!((answer.status, answer.header("x-forebay-cache")), (200, may.then_some("miss")), "{body}");
        assert_eq!(recorder.posts().len(), at + 2, "{body}");
    }
    recorder.go_on();
    assert_eq!(first.answer().status, 200);
    assert_eq!(gateway.metric("forebay_cache_lookups_total{kind=\"coalesce\",result=\"hit\"}"), 0.0);
}

#[test]
fn without_the_key_nothing_is_shared() {
    let recorder = Recorder::start("m", vec![[vec![Step::Gate], json("200 OK", ANSWER)].concat()]);
    let gateway = Gateway::before(&[recorder.address]);
    let mut clients = [(); 2].map(|()| ask(&gateway, &[], &certain("hello")));
    recorder.await_posts(2);
    recorder.go_on();
    recorder.go_on();
    let answers = clients.each_mut().map(Connection::answer);
    assert!(answers.iter().all(|answer| answer.status == 200 && answer.header("x-forebay-cache").is_none()));
}

#[test]
fn the_first_may_leave_and_the_others_go_on() {
    let (recorder, gateway, mut clients) = waiting(3, held_stream(), &certain_stream("hello"));
    for client in &mut clients {
        client.until(b"first");
    }
    drop(clients.remove(0));
    until_left(&gateway, 1);
    recorder.go_on();
    let answers: Vec<Answer> = clients.iter_mut().map(Connection::answer).collect();
    assert!(answers.iter().all(|answer| answer.stream_end() == Ok(())));
    assert_eq!(recorder.posts().len(), 1, "it was not asked again");
    let rows: Vec<_> = answers.iter().map(|answer| gateway.row_of(answer)).collect();
    let paid = rows.iter().filter(|row| row["cache"].is_null()).count();
    assert_eq!(paid, 1, "one of those who stay pays: {rows:?}");
    let left = gateway.rows().into_iter().find(|row| row["outcome"] == "client_gone").expect("a row");
    assert_eq!(left["cache"], "coalesced", "{left}");
}

#[test]
fn the_first_may_leave_before_there_is_an_answer() {
    let script = [vec![Step::Gate], json("200 OK", ANSWER)].concat();
    let (recorder, gateway, mut clients) = waiting(2, script, &certain("hello"));
    drop(clients.remove(0));
    until_left(&gateway, 1);
    recorder.go_on();
    let answer = clients[0].answer();
    assert_eq!((answer.status, answer.text().as_str()), (200, ANSWER));
    assert!(gateway.row_of(&answer)["cache"].is_null(), "it pays");
    assert_eq!(recorder.posts().len(), 1);
}

/// Two clients have left a call without its end, and their rows say what it has cost: the prompt, by our count.
fn one_pays(rows: &[serde_json::Value]) {
    for row in rows {
        let cost = (&row["attempts"], &row["worker"], &row["prompt_tokens"]);
        assert_eq!(cost, (&1.into(), &"w0".into(), &13.into()), "{row}");
    }
    let paid = rows.iter().filter(|row| row["cache"].is_null()).count();
    assert_eq!((rows.len(), paid), (2, 1), "{rows:?}");
}

#[test]
fn a_call_that_nobody_listens_to_ends() {
    for (script, seen) in [
        (vec![Step::AwaitClose], None),
        (vec![stream_head(), chunk(&delta("first")), Step::AwaitClose], Some(b"first")),
    ] {
        let (recorder, gateway, mut clients) = waiting(2, script, &certain_stream("hello"));
        if let Some(seen) = seen {
            clients.iter_mut().for_each(|client| drop(client.until(seen)));
        }
        drop(clients);
        recorder.closed(0);
        until_left(&gateway, 2);
        one_pays(&gateway.rows());
        assert_eq!(gateway.metric("forebay_worker_promised_tokens{worker=\"w0\"}"), 0.0);
    }
}

#[test]
fn errors_reach_all() {
    // A refusal, before there is an answer.
    let refusal = r#"{"error":{"message":"no such thing","type":"BadRequestError","param":null,"code":400}}"#;
    let script = [vec![Step::Gate], json("400 Bad Request", refusal)].concat();
    let (recorder, gateway, mut clients) = waiting(3, script, &certain("hello"));
    recorder.go_on();
    for client in &mut clients {
        let answer = client.answer();
        assert_eq!((answer.status, &answer.error()["message"]), (400, &"no such thing".into()));
        let row = gateway.row_of(&answer);
        assert_eq!((&row["outcome"], &row["attempts"]), (&"engine_refused".into(), &1.into()), "{row}");
    }
    assert_eq!(recorder.posts().len(), 1);

    // A stream that breaks off.
    let script = vec![stream_head(), chunk(&delta("first")), Step::Gate, Step::Reset];
    let (recorder, gateway, mut clients) = waiting(3, script, &certain_stream("hello"));
    recorder.go_on();
    for client in &mut clients {
        let answer = client.answer();
        assert!(answer.stream_end().is_err_and(|message| message.contains("broke")), "{}", answer.text());
        assert_eq!(gateway.row_of(&answer)["outcome"], "cut");
    }

    // A document that breaks off.
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9000000\r\n\r\n{\"a\":\"first";
    let script =
        vec![Step::Gate, Step::Write(head.into()), Step::Write(vec![b'x'; (1 << 20) + 1024]), Step::Gate, Step::Reset];
    let (recorder, gateway, mut clients) = waiting(2, script, &certain("hello"));
    recorder.go_on();
    clients.iter_mut().for_each(|client| drop(client.until(b"first")));
    recorder.go_on();
    for client in &mut clients {
        let answer = client.answer();
        assert!(answer.status == 200 && !answer.whole);
    }
    let cut = |rows: Vec<serde_json::Value>| rows.iter().filter(|row| row["outcome"] == "cut").count() == 2;
    eventually("two rows that say so", || cut(gateway.rows()).then_some(()));
}

#[test]
fn a_call_that_the_end_of_the_gateway_cuts_has_its_cost() {
    let recorder = Recorder::start("m", vec![vec![Step::AwaitClose]]);
    let models = model("m", &[recorder.address], &format!("tokenizer = {:?}\ncoalesce = true\n", tokenizer()));
    let mut gateway = Gateway::start_unready("drain_seconds = 1\n", &models, &[]);
    gateway.until_ready();
    let mut first = ask(&gateway, &[], &certain("hello"));
    recorder.await_posts(1);
    let mut second = ask(&gateway, &[], &certain("hello"));
    until_shared(&gateway, 1);
    gateway.process.signal("TERM");
    for client in [&mut first, &mut second] {
        assert_eq!(client.answer().refusal(503), "server_is_stopping");
    }
    assert_eq!(gateway.process.wait().code(), Some(0));
    let rows = gateway.rows();
    assert!(rows.iter().all(|row| row["outcome"] == "failed"), "{rows:?}");
    one_pays(&rows);
}

#[test]
fn all_are_told_who_failed_and_which_model_was_asked() {
    let broken = json("500 Internal Server Error", r#"{"error":{"message":"out of order","type":"e","code":500}}"#);
    for (script, status, failed) in [
        (json("200 OK", &ANSWER.replace(r#""model":"m""#, r#""model":"n""#)), 200, "w0=status, w0=status"),
        (broken.clone(), 502, "w0=status, w0=status, l=status, l=status"),
    ] {
        let small = Recorder::start("m", vec![[vec![Step::Gate], broken.clone()].concat(), broken.clone()]);
        let large = Recorder::start("n", vec![script]);
        let keys = format!("tokenizer = {:?}\n", tokenizer());
        let models = model("m", &[small.address], &format!("{keys}coalesce = true\n"))
            + "[[model.fallback]]\nto = \"n\"\non = [\"error\"]\n"
            + &model("n", &[large.address], &keys).replace("\"w0\"", "\"l\"");
        let gateway = Gateway::start(&models);
        for worker in ["w0", "l"] {
            let up = format!("forebay_worker_up{{worker={worker:?}}}");
            eventually("the worker to be up", || (gateway.metric(&up) == 1.0).then_some(()));
        }
        let mut first = ask(&gateway, &[], &certain("hello"));
        small.await_posts(1);
        let mut second = ask(&gateway, &[], &certain("hello"));
        until_shared(&gateway, 1);
        small.go_on();
        for client in [&mut first, &mut second] {
            let answer = client.answer();
            assert_eq!((answer.status, answer.header("x-forebay-attempts")), (status, Some(failed)));
            let row = gateway.row_of(&answer);
            assert_eq!((&row["model"], &row["worker"]), (&"n".into(), &"l".into()), "{row}");
        }
    }
}

/// An event of 60 KB in its HTTP chunk.
fn long_piece() -> Vec<u8> {
    let Step::Write(bytes) = chunk(&delta(&"x".repeat(60_000))) else { panic!("a chunk is written") };
    bytes
}

#[test]
fn a_slow_reader_stalls_nobody_and_is_cut() {
    // Far more than what is kept and what sockets hold.
    let pieces = 400;
    let mut script = vec![stream_head(), chunk(&delta("first")), Step::Gate, Step::Repeat(long_piece(), pieces)];
    script.extend([chunk(FINISH), stream_end()]);
    let (recorder, gateway, mut clients) = waiting(2, script, &certain_stream("hello"));
    clients.iter_mut().for_each(|client| drop(client.until(b"first")));
    recorder.go_on();
    let fast = clients.remove(0).answer();
    assert_eq!((fast.stream_end(), fast.events().len()), (Ok(()), pieces + 3));
    let slow = clients.remove(0).answer();
    let said = slow.stream_end().expect_err("it is cut");
    assert!(said.contains("too slowly"), "{said}");
    assert_eq!(gateway.row_of(&slow)["outcome"], "cut");
    assert_eq!(gateway.row_of(&fast)["outcome"], "completed");
}

#[test]
fn a_lone_slow_reader_holds_back_the_worker_as_ever() {
    let piece = long_piece();
    let mut script = vec![stream_head(), chunk(&delta("first")), Step::Repeat(piece, 400)];
    script.extend([chunk(FINISH), stream_end()]);
    let recorder = Recorder::start("m", vec![script]);
    let gateway = gateway(&[recorder.address]);
    let mut client = ask(&gateway, &[], &certain_stream("hello"));
    let mut some = [0; 1024];
    client.socket.read_exact(&mut some).expect("the beginning");
    let mut before = 0;
    eventually("the worker to be held back", || {
        std::thread::sleep(std::time::Duration::from_millis(300));
        let written = recorder.written();
        (std::mem::replace(&mut before, written) == written).then_some(())
    });
    assert!(before < 20 << 20, "{before} bytes were taken for a client that reads none");
    let mut rest = Vec::new();
    client.socket.set_read_timeout(Some(crate::support::PATIENCE)).expect("a socket");
    while !rest.windows(6).any(|window| window == b"[DONE]") {
        let mut piece = vec![0; 1 << 16];
        let length = client.socket.read(&mut piece).expect("bytes");
        assert!(length > 0, "the stream was cut");
        let keep = rest.len().saturating_sub(16);
        rest.drain(..keep);
        rest.extend_from_slice(&piece[..length]);
    }
}
