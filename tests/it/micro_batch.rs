//! Embeddings, rankings, scores and the like of several clients as one call: what the worker is asked, what each client
//! gets, and who is spared whose trouble.

use std::net::SocketAddr;
use std::thread::JoinHandle;

use serde_json::{Value, json};

use crate::support::client::{self, Answer, Connection, post};
use crate::support::eventually;
use crate::support::process::{Gateway, Worker, model, tokenizer};
use crate::support::recorder::{Received, Recorder, Step, json};

/// A gateway where nobody leaves a lot because of the time; `tokens` are what fits into one call.
fn patient(worker: SocketAddr, tokens: u32) -> Gateway {
    let batch = format!("[model.micro_batch]\nmax_delay_ms = 10000\nmax_tokens = {tokens}\n");
    Gateway::start(&model("m", &[worker], &format!("tokenizer = {:?}\n{batch}", tokenizer())))
}

fn slow_worker() -> Worker {
    Worker::start(&["--model", "m", "--speed", "0.02"])
}

fn embedding(input: &str) -> String {
    format!(r#"{{"model":"m","input":{input:?}}}"#)
}

/// Asks in a thread of its own.
fn ask(gateway: &Gateway, path: &'static str, body: String) -> JoinHandle<Answer> {
    let address = gateway.client;
    std::thread::spawn(move || post(address, path, &body))
}

fn connection(gateway: &Gateway, headers: &[&str], body: &str) -> Connection {
    let mut connection = Connection::to(gateway.client);
    connection.post("/v1/embeddings", headers, body.as_bytes());
    connection
}

/// Calls that ran the model.
fn calls(worker: &Worker) -> u64 {
    worker.log()["requests"]["begun"].as_u64().expect("a count")
}

/// The text of an answer's list of items, as it stands there.
fn items(answer: &Answer, list: &str) -> String {
    assert_eq!(answer.status, 200, "{}", answer.text());
    let text = answer.text();
    let mark = format!("\"{list}\":");
    let start = text.find(&mark).unwrap_or_else(|| panic!("no {list}: {text}")) + mark.len();
    let mut values = serde_json::Deserializer::from_str(&text[start..]).into_iter::<&serde_json::value::RawValue>();
    values.next().expect("a value").expect("JSON").get().to_owned()
}

/// An embedding for each of so many inputs, as an engine would write it.
fn embeddings(count: usize) -> Vec<Step> {
    let items: Vec<String> = (0..count)
        .map(|index| format!(r#"{{"object":"embedding","index":{index},"embedding":[0.{index}0]}}"#))
        .collect();
    let body = format!(
        r#"{{"object":"list","data":[{}],"model":"m","usage":{{"prompt_tokens":{count},"total_tokens":{count}}}}}"#,
        items.join(",")
    );
    json("200 OK", &body)
}

fn inputs(post: &Received) -> Value {
    let body: Value = serde_json::from_slice(&post.body).expect("JSON");
    body["input"].clone()
}

#[test]
fn thirty_two_clients_are_two_calls_and_get_what_they_would_have_got() {
    let worker = slow_worker();
    let gateway = patient(worker.address, 8192);
    let texts: Vec<String> = (0..32).map(|at| format!("water {at} through turbine {}", at * 7)).collect();
    let before = calls(&worker);
    let answers: Vec<_> = texts.iter().map(|text| ask(&gateway, "/v1/embeddings", embedding(text))).collect();
    let answers: Vec<Answer> = answers.into_iter().map(|answer| answer.join().expect("an answer")).collect();
    let made = calls(&worker) - before;
    assert!(made * 8 <= 32, "{made} calls for 32 clients");

    worker.speed(1000.0);
    for (text, answer) in texts.iter().zip(&answers) {
        let alone = post(worker.address, "/v1/embeddings", &embedding(text));
        assert_eq!(items(answer, "data"), items(&alone, "data"), "{text}");
        assert_eq!(answer.json()["usage"], alone.json()["usage"], "{text}");
        let row = gateway.row_of(answer);
        assert_eq!(row["prompt_tokens"], alone.json()["usage"]["prompt_tokens"], "{row}");
        assert_eq!((&row["attempts"], &row["worker"]), (&1.into(), &"w0".into()), "{row}");
        assert_eq!(row["prompt_tokens_from"], "engine", "{row}");
        let explained = gateway.admin(&format!("decisions/{}", answer.header("x-request-id").unwrap()));
        assert_eq!(explained.status, 200, "{}", explained.text());
    }
    assert_eq!(gateway.rows().len(), 32);
    let size = |part: &str| gateway.metric(&format!("forebay_micro_batch_size_{part}{{kind=\"embeddings\"}}"));
    assert_eq!((size("count") as u64, size("sum") as u64), (made, 32));
}

#[test]
fn what_differs_in_its_inputs_alone_merges() {
    for (path, list, body) in [
        ("/pooling", "data", r#"{"model":"m","input":DOCS}"#),
        ("/classify", "data", r#"{"model":"m","input":DOCS}"#),
        ("/v1/rerank", "results", r#"{"model":"m","query":"water","documents":DOCS}"#),
        ("/v1/score", "data", r#"{"model":"m","text_1":"water","text_2":DOCS}"#),
    ] {
        let worker = slow_worker();
        let gateway = patient(worker.address, 8192);
        let before = calls(&worker);
        let bodies: Vec<String> = (0..16)
            .map(|at| {
                body.replace("DOCS", &json!([format!("the water {at}"), "dry sand", format!("{at}")]).to_string())
            })
            .collect();
        let answers: Vec<_> = bodies.iter().map(|body| ask(&gateway, path, body.clone())).collect();
        let answers: Vec<Answer> = answers.into_iter().map(|answer| answer.join().expect("an answer")).collect();
        let made = calls(&worker) - before;
        assert!(made * 4 <= 16, "{made} calls for 16 clients of {path}");
        worker.speed(1000.0);
        for (body, answer) in bodies.iter().zip(&answers) {
            assert_eq!(items(answer, list), items(&post(worker.address, path, body), list), "{body}");
            assert_eq!(gateway.row_of(answer)["prompt_tokens"], answer.json()["usage"]["prompt_tokens"]);
        }
    }
}

#[test]
fn a_bad_input_fails_alone() {
    let worker = slow_worker();
    let gateway = patient(worker.address, 8192);
    let body = |id: u32| format!(r#"{{"model":"m","input":[[{id},2,3]]}}"#);
    let asked = [4, 5, 4_000_000, 6, 7];
    let before = calls(&worker);
    let answers: Vec<_> = asked.into_iter().map(|id| ask(&gateway, "/v1/embeddings", body(id))).collect();
    let answers: Vec<Answer> = answers.into_iter().map(|answer| answer.join().expect("an answer")).collect();
    worker.speed(1000.0);
    for (id, answer) in asked.into_iter().zip(&answers) {
        let alone = post(worker.address, "/v1/embeddings", &body(id));
        assert_eq!(answer.status, alone.status, "{id}");
        if alone.status == 200 {
            assert_eq!(items(answer, "data"), items(&alone, "data"), "{id}");
        } else {
            assert_eq!(answer.error()["message"], alone.json()["error"]["message"], "{id}");
            assert_eq!(gateway.row_of(answer)["outcome"], "engine_refused");
        }
    }
    let made = calls(&worker) - before - 5;
    assert!(made <= 5 + 2, "each is asked apart once: {made}");
}

/// A request of three tokens.
fn three(id: u32) -> String {
    format!(r#"{{"model":"m","input":[{id},{id},{id}]}}"#)
}

/// A gateway whose worker is busy with a request of [`three`] tokens until it may go on; two more fill a call.
fn busy() -> (Recorder, Gateway, Connection) {
    let recorder = Recorder::start("m", vec![[vec![Step::Gate], embeddings(1)].concat()]);
    let gateway = patient(recorder.address, 6);
    let first = connection(&gateway, &[], &three(1));
    recorder.await_posts(1);
    (recorder, gateway, first)
}

fn until_left(gateway: &Gateway, count: usize) {
    eventually("the rows of clients that left", || {
        let left = gateway.rows().into_iter().filter(|row| row["outcome"] == "client_gone").count();
        (left == count).then_some(())
    });
}

#[test]
fn an_answer_that_does_not_fit_is_asked_for_apart() {
    let (recorder, gateway, mut first) = busy();
    recorder.play(embeddings(1));
    let clients = [4, 5].map(|id| connection(&gateway, &[], &three(id)));
    for mut client in clients {
        let answer = client.answer();
        assert_eq!(items(&answer, "data"), r#"[{"object":"embedding","index":0,"embedding":[0.00]}]"#);
        assert_eq!(gateway.row_of(&answer)["attempts"], 2, "together, and by itself");
        assert_eq!(answer.header("x-forebay-attempts"), Some("w0=merged"));
    }
    recorder.go_on();
    assert_eq!((first.answer().status, recorder.posts().len()), (200, 4));
}

#[test]
fn counts_that_are_divided_say_so() {
    let (recorder, gateway, mut first) = busy();
    recorder.play(embeddings(2));
    let clients = [4, 5].map(|id| connection(&gateway, &[], &three(id)));
    for mut client in clients {
        let answer = client.answer();
        let row = gateway.row_of(&answer);
        let (count, from) = (&row["prompt_tokens"], &row["prompt_tokens_from"]);
        assert_eq!((count, from), (&1.into(), &"apportioned".into()), "the engine counts 2 of what we count 6: {row}");
    }
    recorder.go_on();
    let row = gateway.row_of(&first.answer());
    assert_eq!(row["prompt_tokens_from"], "engine", "{row}");
}

#[test]
fn an_input_that_an_engine_fails_of_fails_alone() {
    let (recorder, gateway, mut first) = busy();
    let failed = json("500 Internal Server Error", r#"{"error":{"message":"out of order","type":"e","code":500}}"#);
    recorder.answer_matching(vec![("[4,4,4]".to_owned(), failed)]);
    recorder.play(embeddings(1));
    let [mut bad, mut good] = [4, 5].map(|id| connection(&gateway, &[], &three(id)));
    let (bad, good) = (bad.answer(), good.answer());
    assert_eq!((bad.status, &bad.error()["message"]), (502, &"out of order".into()));
    assert_eq!(items(&good, "data"), r#"[{"object":"embedding","index":0,"embedding":[0.00]}]"#);
    assert_eq!(good.header("x-forebay-attempts"), Some("w0=status, w0=status"));
    recorder.go_on();
    // A call and its second try, then one of the good input and two of the bad one.
    assert_eq!((first.answer().status, recorder.posts().len()), (200, 6));
}

#[test]
fn who_leaves_while_gathering_is_not_asked_for() {
    let (recorder, gateway, mut first) = busy();
    let mut leaving = connection(&gateway, &["expect: 100-continue"], &three(9));
    leaving.until(b"100 Continue");
    drop(leaving);
    until_left(&gateway, 1);
    recorder.play(embeddings(2));
    let [mut a, mut b] = [4, 5].map(|id| connection(&gateway, &[], &three(id)));
    assert_eq!((a.answer().status, b.answer().status), (200, 200));
    let posts = recorder.posts();
    let mut asked: Vec<Value> = inputs(&posts[1]).as_array().expect("a list").clone();
    asked.sort_by_key(ToString::to_string);
    assert_eq!((asked, posts.len()), (vec![json!([4, 4, 4]), json!([5, 5, 5])], 2));
    recorder.go_on();
    assert_eq!(first.answer().status, 200);
}

#[test]
fn who_leaves_a_call_under_way_hurts_nobody() {
    let (recorder, gateway, mut first) = busy();
    recorder.play([vec![Step::Gate], embeddings(2)].concat());
    let [a, mut b] = [4, 5].map(|id| connection(&gateway, &[], &three(id)));
    recorder.await_posts(2);
    drop(a);
    until_left(&gateway, 1);
    recorder.go_on();
    recorder.go_on();
    let answer = b.answer();
    let second = inputs(&recorder.posts()[1])[1] == json!([5, 5, 5]);
    let own = if second { "[0.10]" } else { "[0.00]" };
    assert_eq!(items(&answer, "data"), format!(r#"[{{"object":"embedding","index":0,"embedding":{own}}}]"#));
    assert_eq!((first.answer().status, recorder.posts().len()), (200, 2));
    let left = gateway.rows().into_iter().find(|row| row["outcome"] == "client_gone").expect("a row");
    assert_eq!((&left["attempts"], &left["worker"]), (&1.into(), &"w0".into()), "{left}");
}

#[test]
fn a_call_that_nobody_waits_for_ends() {
    let (recorder, gateway, mut first) = busy();
    recorder.play(vec![Step::AwaitClose]);
    let clients = [4, 5].map(|id| connection(&gateway, &[], &three(id)));
    recorder.await_posts(2);
    drop(clients);
    recorder.closed(1);
    until_left(&gateway, 2);
    recorder.go_on();
    assert_eq!(first.answer().status, 200);
}

#[test]
fn a_deadline_is_kept_among_others() {
    let (recorder, gateway, mut first) = busy();
    let answer = client::post_with(gateway.client, "/v1/embeddings", &["x-forebay-deadline-ms: 200"], &three(4));
    assert_eq!(answer.refusal(504), "deadline_exceeded");
    assert_eq!(gateway.row_of(&answer)["outcome"], "refused");
    recorder.play([vec![Step::Gate], embeddings(2)].concat());
    let mut patient = connection(&gateway, &[], &three(5));
    let answer = client::post_with(gateway.client, "/v1/embeddings", &["x-forebay-deadline-ms: 200"], &three(6));
    assert_eq!(answer.refusal(504), "deadline_exceeded");
    recorder.go_on();
    recorder.go_on();
    assert_eq!((first.answer().status, patient.answer().status), (200, 200));
}

#[test]
fn only_equals_leave_together() {
    let recorder = Recorder::start("m", vec![[vec![Step::Gate], embeddings(1)].concat(), embeddings(1)]);
    let gateway = patient(recorder.address, 8192);
    let mut first = connection(&gateway, &[], &three(1));
    recorder.await_posts(1);
    let with = |more: &str| format!(r#"{{"model":"m","input":[4,4,4]{more}}}"#);
    let long: Vec<u32> = (0..100).collect();
    let others: Vec<(Vec<&str>, String)> = vec![
        (vec![], with(r#","dimensions":8"#)),
        (vec![], with(r#","dimensions":16"#)),
        (vec![], with(r#","encoding_format":"base64""#)),
        (vec![], with(r#","user":"somebody""#)),
        (vec![], with(r#","cache_salt":"theirs""#)),
        (vec![], with(r#","truncate_prompt_tokens":2"#)),
        (vec![], with(r#","nobody_knows":{"a":1}"#)),
        (vec![], format!(r#"{{"model":"m","input":{}}}"#, json!(long))),
        (vec![], embedding("a text among ids")),
        (vec!["x-forebay-priority: batch"], with("")),
        (vec!["x-session-id: theirs"], with("")),
    ];
    // The first of its kind finds no call of its kind before it, and leaves at once.
    for (at, (headers, body)) in others.iter().enumerate() {
        let mut client = connection(&gateway, headers, body);
        assert_eq!(client.answer().status, 200, "{body}");
        let posts = recorder.await_posts(at + 2);
        assert_eq!((posts.len(), String::from_utf8_lossy(&posts[at + 1].body).as_ref()), (at + 2, body.as_str()));
    }
    recorder.go_on();
    assert_eq!(first.answer().status, 200);
}

#[test]
fn nobody_waits_long_and_nobody_waits_where_it_is_off() {
    for batch in ["", "[model.micro_batch]\nmax_tokens = 0\nmax_delay_ms = 10000\n"] {
        let recorder = Recorder::start("m", vec![[vec![Step::Gate], embeddings(1)].concat()]);
        let extra = format!("tokenizer = {:?}\n{batch}", tokenizer());
        let gateway = Gateway::start(&model("m", &[recorder.address], &extra));
        let mut clients = [1, 2].map(|id| connection(&gateway, &[], &three(id)));
        recorder.await_posts(2);
        recorder.go_on();
        recorder.go_on();
        for client in &mut clients {
            assert_eq!(client.answer().status, 200);
        }
    }
}
