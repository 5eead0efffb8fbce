//! Requests that two workers do together: one computes the prompt, the other fetches its cache and generates.

use std::fmt::Write as _;
use std::net::SocketAddr;

use serde_json::{Value, json};

use crate::support::body::{ANSWER, FINISH, chat, delta, long};
use crate::support::client::{Answer, Connection, post};
use crate::support::eventually;
use crate::support::process::{Gateway, Worker, tokenizer};
use crate::support::recorder::{Received, Recorder, Step, json, stream};

const CHAT: &str = "/v1/chat/completions";
/// Spaced as nobody of ours would space it.
const PARAMS: &str = r#"{"do_remote_prefill": true,"do_remote_decode":false,  "remote_block_ids":[[1,2]],"x":1.50}"#;

/// A gateway before workers of these roles, all up; they are called by role and number, as in `prefill0`.
fn gateway(workers: &[(&str, SocketAddr)], extra: &str) -> Gateway {
    let mut file = format!("[[model]]\nname = \"m\"\ntokenizer = {:?}\n{extra}\n", tokenizer());
    let mut names = Vec::new();
    for (role, address) in workers {
        let number = names.iter().filter(|name: &&String| name.starts_with(role)).count();
        names.push(format!("{role}{number}"));
        let name = names.last().unwrap();
        writeln!(file, "[[model.worker]]\nname = {name:?}\nurl = \"http://{address}\"\nrole = {role:?}").unwrap();
    }
    let gateway = Gateway::start(&file);
    for name in names {
        let up = format!("forebay_worker_up{{worker={name:?}}}");
        eventually("the worker to be up", || (gateway.metric(&up) == 1.0).then_some(()));
    }
    gateway
}

fn simulated(role: &str, flags: &[&str]) -> Worker {
    Worker::start(&[&["--model", "m", "--role", role], flags].concat())
}

/// The answer to a prompt alone, with something to fetch.
fn kept() -> Vec<Step> {
    json("200 OK", &ANSWER.replacen('{', &format!("{{\"kv_transfer_params\":{PARAMS},"), 1))
}

fn recorders(count: usize, script: &[Step]) -> Vec<Recorder> {
    (0..count).map(|_| Recorder::start("m", vec![script.to_vec()])).collect()
}

/// Workers of raw sockets: for prompts and for what follows.
struct Setting {
    prefill: Vec<Recorder>,
    decode: Vec<Recorder>,
    gateway: Gateway,
}

impl Setting {
    fn new(prefill: usize, decode: usize) -> Self {
        let (prefill, decode) = (recorders(prefill, &kept()), recorders(decode, &json("200 OK", ANSWER)));
        let first = prefill.iter().map(|worker| ("prefill", worker.address));
        let workers: Vec<_> = first.chain(decode.iter().map(|worker| ("decode", worker.address))).collect();
        Self { gateway: gateway(&workers, ""), prefill, decode }
    }

    fn ask(&self, text: &str) -> Answer {
        self.gateway.post(CHAT, &chat(&long(text), ""))
    }

    /// Which of these was asked, and what: all of it.
    fn asked(workers: &[Recorder]) -> Vec<(usize, Received)> {
        let all = workers.iter().enumerate();
        all.flat_map(|(at, worker)| worker.posts().into_iter().map(move |post| (at, post))).collect()
    }

    /// Nothing is promised to anybody.
    fn assert_nothing_held(&self) {
        let held = || {
            let workers = self.gateway.admin("workers").json();
            let nothing = |worker: &Value| {
                worker["sent_requests"] == 0 && worker["reserved_tokens"] == 0 && worker["promised_tokens"] == 0
            };
            workers["workers"].as_array().unwrap().iter().all(nothing).then_some(())
        };
        eventually("every promise to be given back", held);
    }
}

fn body(received: &Received) -> Value {
    serde_json::from_slice(&received.body).unwrap()
}

#[test]
fn two_workers_answer_as_one_would() {
    let (alone, prefill, decode) =
        (Worker::start(&["--model", "m"]), simulated("prefill", &[]), simulated("decode", &[]));
    let gateway = gateway(&[("prefill", prefill.address), ("decode", decode.address)], "");
    let mut asked = 0;
    for (path, member) in
        [(CHAT, json!([{"role": "user", "content": long("chat")}])), ("/v1/completions", json!(long("text")))]
    {
        for streamed in [false, true] {
            let mut body = json!({"model": "m", "max_tokens": 7, "min_tokens": 3, "stream": streamed});
            body[if path == CHAT { "messages" } else { "prompt" }] = member.clone();
            body["cache_salt"] = json!(format!("{asked}"));
            let body = body.to_string();
            let (theirs, ours) = (post(alone.address, path, &body), gateway.post(path, &body));
            assert_eq!((ours.status, ours.header("x-forebay-worker")), (200, Some("decode0")), "{}", ours.text());
            assert_eq!(said(&ours), said(&theirs), "{path} {streamed}");
            asked += 1;
            let row = gateway.row_of(&ours);
            assert_eq!((&row["prefill_worker"], &row["worker"]), (&"prefill0".into(), &"decode0".into()), "{row}");
            assert_eq!((&row["attempts"], &row["outcome"]), (&2.into(), &"completed".into()), "{row}");
            assert_eq!((&row["output_tokens"], &row["output_tokens_from"]), (&7.into(), &"engine".into()), "{row}");
            assert!(row["cached_tokens"].as_u64() > Some(1000), "it was fetched: {row}");
            let (gave, took) = (prefill.log()["pairs"].clone(), decode.log()["pairs"].clone());
            assert_eq!((&gave["given"], &took["fetched"]), (&asked.into(), &asked.into()));
            let metric = |name: &str| gateway.metric(&format!("forebay_handovers_total{{given={name:?}}}"));
            assert_eq!((metric("cache"), metric("nothing")), (f64::from(asked), 0.0));

            let explained = gateway.admin(&format!("decisions/{}", ours.header("x-request-id").unwrap())).json();
            assert_eq!(explained["sent"], json!(["prefill0", "decode0"]), "{explained}");
            let decision = &explained["decisions"][0];
            let winners = (&decision["winner"], &decision["decode_winner"]);
            assert_eq!(winners, (&"prefill0".into(), &"decode0".into()), "{explained}");
            let legs = decision["candidates"].as_array().unwrap().iter().map(|one| (&one["worker"], &one["leg"]));
            let expected = [(&json!("decode0"), &json!("decode")), (&json!("prefill0"), &json!("prefill"))];
            let mut legs: Vec<_> = legs.collect();
            legs.sort_by_key(|(worker, _)| worker.as_str());
            assert_eq!(legs, expected, "each with its own score: {explained}");
        }
    }
    assert_eq!(
        gateway.metric("forebay_tokens_total{model=\"m\",kind=\"output\"}"),
        28.0,
        "the first token is nobody's"
    );
}

/// What the model says, in whichever form.
fn said(answer: &Answer) -> String {
    let documents: Vec<Value> = if answer.header("content-type").unwrap().starts_with("text/event-stream") {
        assert_eq!(answer.stream_end(), Ok(()));
        answer.events().iter().filter_map(|event| serde_json::from_str(event).ok()).collect()
    } else {
        vec![answer.json()]
    };
    let text = |document: &Value| {
        let choice = &document["choices"][0];
        let texts = [&choice["message"]["content"], &choice["delta"]["content"], &choice["text"]];
        texts.into_iter().find_map(Value::as_str).unwrap_or_default().to_owned()
    };
    documents.iter().map(text).collect()
}

#[test]
fn what_goes_from_one_to_the_other_is_moved_to_the_byte() {
    let setting = Setting::new(1, 1);
    setting.prefill[0].play([vec![Step::Gate], kept()].concat());
    setting.decode[0].play(stream(&[&delta("ok"), FINISH]));
    let mut client = Connection::to(setting.gateway.client);
    let asked =
        chat(&long("gate"), r#","stream":true,"stop" : ["x"],"max_tokens":9,"stream_options":{"include_usage":true}"#);
    client.post(CHAT, &[], asked.as_bytes());
    let first = &setting.prefill[0].await_posts(1)[0];
    let alone = body(first);
    assert_eq!(
        (&alone["stream"], &alone["max_tokens"], &alone["max_completion_tokens"]),
        (&false.into(), &1.into(), &1.into())
    );
    assert_eq!((&alone["stream_options"], &alone["stop"]), (&Value::Null, &json!(["x"])));
    assert_eq!(alone["kv_transfer_params"]["do_remote_decode"], true);
    let workers = setting.gateway.admin("workers").json();
    let held: Vec<_> = workers["workers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|worker| (&worker["role"], &worker["sent_requests"]))
        .collect();
    assert_eq!(held, [(&json!("prefill"), &json!(1)), (&json!("decode"), &json!(1))], "both are promised it");
    assert!(workers["workers"][0]["promised_tokens"].as_u64() > Some(1000), "{workers}");
    assert_eq!(workers["workers"][1]["promised_tokens"], 0, "{workers}");
    assert!(workers["workers"][1]["reserved_tokens"].as_u64() > Some(1000), "{workers}");

    setting.prefill[0].go_on();
    let answer = client.answer();
    assert_eq!((answer.status, answer.stream_end()), (200, Ok(())), "{}", answer.text());
    let second = &setting.decode[0].posts()[0];
    let text = String::from_utf8(second.body.clone()).unwrap();
    assert!(text.ends_with(&format!(",\"kv_transfer_params\":{PARAMS}}}")), "{text}");
    let mut rest = body(second);
    rest.as_object_mut().unwrap().remove("kv_transfer_params");
    assert_eq!(rest, serde_json::from_str::<Value>(&asked).unwrap());
    assert_eq!(first.header("x-request-id"), second.header("x-request-id"), "one name for both");
    setting.assert_nothing_held();
}

#[test]
fn what_gains_nothing_from_two_goes_to_one() {
    let setting = Setting::new(1, 1);
    for (why, request) in [("short", chat("short", "")), ("several answers", chat(&long("several"), r#","n":2"#))] {
        let answer = setting.gateway.post(CHAT, &request);
        assert_eq!((answer.status, answer.header("x-forebay-worker")), (200, Some("decode0")), "{why}");
    }
    let own = chat(&long("own"), &format!(r#","kv_transfer_params":{PARAMS}"#));
    assert_eq!(setting.gateway.post(CHAT, &own).status, 200);
    assert_eq!(setting.decode[0].posts()[2].body, own.as_bytes(), "who brings a cache keeps it");
    assert_eq!(setting.prefill[0].posts().len(), 0);
    setting.assert_nothing_held();
}

#[test]
fn a_prompt_that_fails_is_computed_by_another_or_by_whoever_answers() {
    let setting = Setting::new(2, 1);
    let broken = || json("500 Internal Server Error", r#"{"error":{"message":"out of memory","code":500}}"#);
    setting.prefill.iter().for_each(|worker| worker.play_all(vec![broken(), kept()]));
    let answer = setting.ask("one fails");
    let asked: Vec<usize> = Setting::asked(&setting.prefill).iter().map(|(at, _)| *at).collect();
    assert_eq!((answer.status, asked.as_slice()), (200, &[0, 1][..]), "{}", answer.text());
    assert_eq!(failed(&answer), ["prefill0=status", "prefill1=status"], "both, then one does all");
    assert_eq!(body(&setting.decode[0].posts()[0])["kv_transfer_params"], Value::Null);

    setting.prefill[0].play(broken());
    let answer = setting.ask("one of two");
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(["prefill0=status"].starts_with(&failed(&answer)), "{:?}", failed(&answer));
    assert_ne!(body(&setting.decode[0].posts()[1])["kv_transfer_params"], Value::Null);
    setting.assert_nothing_held();
}

/// The attempts that brought nothing, sorted.
fn failed(answer: &Answer) -> Vec<&str> {
    let mut failed: Vec<_> =
        answer.header("x-forebay-attempts").into_iter().flat_map(|list| list.split(", ")).collect();
    failed.sort_unstable();
    failed
}

#[test]
fn what_cannot_be_begun_is_begun_elsewhere_from_the_same_cache() {
    const FULL: &str = r#"{"error":{"message":"full","type":"overloaded","param":null,"code":429}}"#;
    let full = json("429 Too Many Requests", FULL);
    let half =
        format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{{", ANSWER.len());
    let broken = vec![Step::Write(half.into_bytes()), Step::Reset];
    for (reason, failing, prompts) in [("overloaded", full, 1), ("reset", broken, 2)] {
        let setting = Setting::new(1, 2);
        let first = setting.ask(reason);
        let ill = usize::from(first.header("x-forebay-worker") == Some("decode1"));
        setting.decode[ill].play(failing);
        // it goes on where the beginning is
        let more = chat(&(long(reason) + &long("more")), "");
        let answer = setting.gateway.post(CHAT, &more);
        assert_eq!(answer.status, 200, "{reason}: {}", answer.text());
        assert_eq!(failed(&answer), [format!("decode{ill}={reason}")], "{reason}");
        assert_eq!(setting.prefill[0].posts().len(), 1 + prompts, "{reason}: the prompt is computed anew or not");
        let tried = setting.decode[ill].posts().pop().unwrap();
        let went_on = setting.decode[1 - ill].posts().pop().unwrap();
        let names = [&tried, &went_on].map(|post| post.header("x-request-id").unwrap().to_owned());
        assert_eq!(names[0] == names[1], prompts == 1, "{reason}");
        assert!([tried, went_on].iter().all(|post| !body(post)["kv_transfer_params"].is_null()), "{reason}");
        setting.assert_nothing_held();
    }
}

#[test]
fn a_client_that_leaves_while_its_prompt_is_computed_gives_both_places_back() {
    let setting = Setting::new(1, 1);
    setting.prefill[0].play(vec![Step::AwaitClose]);
    let mut client = Connection::to(setting.gateway.client);
    client.post(CHAT, &[], chat(&long("leaves"), "").as_bytes());
    setting.prefill[0].await_posts(1);
    drop(client);
    setting.prefill[0].closed(0);
    setting.assert_nothing_held();
    assert_eq!(setting.decode[0].posts().len(), 0);
    assert_eq!(eventually("its row", || setting.gateway.rows().pop())["outcome"], "client_gone");
}

#[test]
fn where_there_is_nothing_to_fetch_one_does_all() {
    const REFUSAL: &str = r#"{"error":{"message":"not alone","type":"BadRequestError","param":null,"code":400}}"#;
    for (name, said) in [("no word of it", json("200 OK", ANSWER)), ("a refusal", json("400 Bad Request", REFUSAL))] {
        let setting = Setting::new(2, 1);
        setting.prefill.iter().for_each(|worker| worker.play(said.clone()));
        let answer = setting.ask(name);
        assert_eq!((answer.status, answer.header("x-forebay-attempts")), (200, None), "{name}: {}", answer.text());
        assert_eq!(Setting::asked(&setting.prefill).len(), 1, "{name}: nobody else is asked for it");
        let posts = setting.decode[0].posts();
        assert_eq!((posts.len(), &body(&posts[0])["kv_transfer_params"]), (1, &Value::Null), "{name}");
        assert_eq!(setting.gateway.metric("forebay_handovers_total{given=\"nothing\"}"), 1.0, "{name}");
        assert!(setting.gateway.row_of(&answer)["prefill_worker"].is_null(), "{name}");
        setting.assert_nothing_held();
    }
}

#[test]
fn a_cache_that_is_gone_is_computed_again_by_whoever_answers() {
    let (prefill, decode) = (simulated("prefill", &["--kv-lease-seconds", "0"]), simulated("decode", &[]));
    let gateway = gateway(&[("prefill", prefill.address), ("decode", decode.address)], "");
    for streamed in [false, true] {
        let answer = gateway.post(CHAT, &chat(&long(&format!("{streamed}")), &format!(r#","stream":{streamed}"#)));
        assert_eq!(
            (answer.status, answer.header("x-forebay-attempts")),
            (200, Some("decode0=status")),
            "{}",
            answer.text()
        );
        assert!(!said(&answer).is_empty());
    }
    assert_eq!(decode.log()["pairs"]["fetched"], 0);
}

#[test]
fn whoever_is_left_serves_as_far_as_it_can() {
    let (mut prefill, mut decode) = (simulated("prefill", &[]), simulated("decode", &[]));
    let gateway = gateway(&[("prefill", prefill.address), ("decode", decode.address)], "worker_grace_seconds = 0");
    prefill.process.signal("KILL");
    prefill.process.wait();
    let answer = gateway.post(CHAT, &chat(&long("decode alone"), ""));
    assert_eq!((answer.status, answer.header("x-forebay-worker")), (200, Some("decode0")), "{}", answer.text());
    decode.process.signal("KILL");
    decode.process.wait();
    let answer = gateway.post(CHAT, &chat(&long("nobody"), ""));
    assert_eq!(answer.status, 503, "{}", answer.text());
}
