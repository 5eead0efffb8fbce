//! Going on with a stream that broke off: the client reads one answer, each character of it once, wherever it was cut.

use serde_json::{Value, json};

use crate::support::body::ANSWER;
use crate::support::client::{Answer, Connection};
use crate::support::eventually;
use crate::support::process::{Gateway, Worker, model, tokenizer};
use crate::support::recorder::{Received, Recorder, Step, chunk, json as whole, stream, stream_end, stream_head};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
/// Several bytes a character, several tokens a character, several characters a token.
const PIECES: [&str; 7] = ["Grü", "ße an", " die 世", "界! ", "🦀\n", " The water is", " let in."];
/// How the gateway asks for a rest, and nobody else here for anything.
const REST: &str = "\"prompt\":[";

/// Workers before which a stream goes on.
struct Setting {
    workers: Vec<Recorder>,
    gateway: Gateway,
}

impl Setting {
    fn new(workers: usize, extra: &str) -> Self {
        let workers: Vec<_> = (0..workers).map(|_| Recorder::start("m", vec![whole("200 OK", ANSWER)])).collect();
        let addresses: Vec<_> = workers.iter().map(|worker| worker.address).collect();
        let extra = format!("tokenizer = {:?}\ncontinue_streams = true\nidle_seconds = 1\n{extra}", tokenizer());
        let gateway = Gateway::start(&model("m", &addresses, &extra));
        for index in 0..workers.len() {
            let up = format!("forebay_worker_up{{worker=\"w{index}\"}}");
            eventually("the worker to be up", || (gateway.metric(&up) == 1.0).then_some(()));
        }
        Self { workers, gateway }
    }

    /// Whichever worker is asked for a stream begins it so, and whichever is asked for a rest plays that.
    fn play(&self, beginning: &[Step], rests: &[(String, Vec<Step>)]) {
        let mut scripts = rests.to_vec();
        scripts.push(("\"stream\":true".to_owned(), beginning.to_vec()));
        self.workers.iter().for_each(|worker| worker.answer_matching(scripts.clone()));
    }

    /// What the workers were asked from here on, in no order.
    fn asked(&self, before: &[usize]) -> Vec<Received> {
        self.workers.iter().zip(before).flat_map(|(worker, before)| worker.posts().split_off(*before)).collect()
    }

    fn counts(&self) -> Vec<usize> {
        self.workers.iter().map(|worker| worker.posts().len()).collect()
    }

    /// Good answers, so that nobody is left alone for what a test does to it.
    fn recover(&self) {
        for number in 0..6 {
            let body = json!({"model": "m", "messages": [{"role": "user", "content": format!("well {number}")}]});
            assert_eq!(self.gateway.post(CHAT, &body.to_string()).status, 200);
        }
    }

    fn token_ids(&self, text: &str) -> Vec<u64> {
        let body = json!({"model": "m", "prompt": text, "add_special_tokens": false});
        let answer = self.gateway.post("/tokenize", &body.to_string()).json();
        answer["tokens"].as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id")).collect()
    }
}

fn event(data: &Value) -> Vec<u8> {
    format!("data: {data}\n\n").into_bytes()
}

/// The events of an answer in these pieces, as an engine writes them.
fn events(chat: bool, id: &str, pieces: &[&str], usage: Value) -> Vec<Vec<u8>> {
    let object = if chat { "chat.completion.chunk" } else { "text_completion" };
    let told =
        |choices: Value| json!({"id": id, "object": object, "created": id.len(), "model": "m", "choices": choices});
    let choice = |text: &str, finish: Value| {
        let mut choice = json!({"index": 0, "logprobs": null, "finish_reason": finish});
        let (name, said) = if chat { ("delta", json!({"content": text})) } else { ("text", json!(text)) };
        choice[name] = said;
        told(json!([choice]))
    };
    let mut events: Vec<_> = pieces.iter().map(|piece| event(&choice(piece, Value::Null))).collect();
    if chat {
        let role = json!([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": null}]);
        events.insert(0, event(&told(role)));
    }
    events.push(event(&choice("", json!("stop"))));
    let mut last = told(json!([]));
    last["usage"] = usage;
    events.extend([event(&last), b"data: [DONE]\n\n".to_vec()]);
    events
}

fn usage(prompt: u64, completion: u64) -> Value {
    json!({"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion})
}

/// What the client reads, and that all of its chunks are of one answer.
fn read(chat: bool, answer: &Answer) -> String {
    assert_eq!((answer.status, answer.stream_end()), (200, Ok(())), "{}", answer.text());
    let events = answer.events();
    let (_, chunks) = events.split_last().expect("an end mark");
    let (mut text, mut finishes) = (String::new(), 0);
    for chunk in chunks {
        let chunk: Value = serde_json::from_str(chunk).expect("JSON");
        let object = if chat { "chat.completion.chunk" } else { "text_completion" };
        assert_eq!(
            (&chunk["id"], &chunk["object"], &chunk["created"]),
            (&json!("one"), &json!(object), &json!(3)),
            "{chunk}"
        );
        let choice = &chunk["choices"][0];
        let said = if chat { &choice["delta"]["content"] } else { &choice["text"] };
        text += said.as_str().unwrap_or_default();
        finishes += usize::from(choice["finish_reason"].is_string());
    }
    assert_eq!(finishes, 1, "{}", answer.text());
    text
}

fn request(chat: bool, more: &str) -> String {
    let prompt =
        if chat { r#""messages":[{"role":"user","content":"hello there"}]"# } else { r#""prompt":"hello there""# };
    format!(r#"{{"model":"m",{prompt},"stream":true,"max_tokens":40,"temperature":0.5,"top_k":3{more}}}"#)
}

fn path(chat: bool) -> &'static str {
    if chat { CHAT } else { COMPLETIONS }
}

/// How a stream breaks.
#[derive(Debug, Clone, Copy)]
enum Break {
    Reset,
    End,
    Silence,
    Error,
    Garbage,
}

impl Break {
    fn steps(self) -> Vec<Step> {
        match self {
            Self::Reset => vec![Step::Reset],
            Self::End => vec![stream_end()],
            Self::Silence => vec![Step::AwaitClose],
            Self::Error => {
                let error = br#"data: {"error":{"message":"EngineCore died","type":"InternalServerError","code":500}}"#;
                vec![chunk(&[&error[..], b"\n\ndata: [DONE]\n\n"].concat()), stream_end()]
            }
            Self::Garbage => vec![chunk(&b"data: nothing\n\n".repeat(8)), stream_end()],
        }
    }
}

/// A stream cut after `at` of its bytes, in this way.
fn broken(bytes: &[u8], at: usize, way: Break) -> Vec<Step> {
    [vec![stream_head(), chunk(&bytes[..at])], way.steps()].concat()
}

fn played(events: &[Vec<u8>]) -> Vec<Step> {
    stream(&events.iter().map(Vec::as_slice).collect::<Vec<_>>())
}

/// Cuts an answer at many places; each time the rest comes from elsewhere and the client sees nothing of it but the mark.
fn cut_anywhere(chat: bool, shows_usage: bool) {
    let setting = Setting::new(3, "");
    let all = PIECES.concat();
    let events_of_all = events(chat, "one", &PIECES, usage(7, 30));
    let bytes = events_of_all.concat();
    let ends: Vec<usize> = events_of_all
        .iter()
        .scan(0, |end, event| {
            Some(*{
                *end += event.len();
                end
            })
        })
        .collect();
    let spoken = usize::from(chat);
    let prompt = {
        let body = if chat {
            r#"{"model":"m","messages":[{"role":"user","content":"hello there"}]}"#
        } else {
            r#"{"model":"m","prompt":"hello there"}"#
        };
        setting.gateway.post("/tokenize", body).json()["count"].as_u64().expect("a count")
    };
    // Each end of an event with text, and a place within the next one; the budget for second tries allows as many at once.
    let places = ends[spoken..spoken + PIECES.len()].iter().enumerate();
    let places = places.flat_map(|(number, end)| [(*end, number), (*end + 2 + 11 * number, number)]);
    for (at, number) in places {
        let heard = ends.iter().filter(|end| **end <= at).count();
        let said = PIECES[..heard - spoken].concat();
        let whole_events = [Break::Reset, Break::Error, Break::End, Break::Garbage];
        let way = if ends.contains(&at) { whole_events[number % 4] } else { [Break::Reset, Break::End][number % 2] };
        let rest = events(false, "another", &PIECES[heard - spoken..], usage(50, 5));
        setting.play(&broken(&bytes, at, way), &[(REST.to_owned(), played(&rest))]);
        let before = setting.counts();
        let more = if shows_usage { r#","stream_options":{"include_usage":true}"# } else { "" };
        let answer = setting.gateway.post(path(chat), &request(chat, more));
        let what = format!("cut at {at} of {ends:?}, {way:?}, after {said:?}: {}", answer.text());
        assert_eq!(read(chat, &answer), all, "{what}");
        let posts = setting.asked(&before);
        assert_eq!(posts.len(), 2, "{what}");
        let asked = posts.iter().find(|post| String::from_utf8_lossy(&post.body).contains(REST)).expect("a rest");
        assert_eq!(asked.path(), COMPLETIONS);
        let asked: Value = serde_json::from_slice(&asked.body).expect("JSON");
        let of_text = setting.token_ids(&said);
        let ids: Vec<u64> = asked["prompt"].as_array().expect("ids").iter().filter_map(Value::as_u64).collect();
        assert_eq!(ids.len() as u64, prompt + of_text.len() as u64, "{what}");
        assert_eq!(ids[prompt as usize..], of_text[..], "{what}");
        let tokens = (of_text.len() as u64).max((heard - spoken) as u64);
        assert_eq!((asked["max_tokens"].as_u64(), &asked["temperature"]), (Some(40 - tokens), &json!(0.5)), "{what}");
        // The mark stands in what came from elsewhere, and nowhere else.
        let events = answer.events();
        let marked: Vec<bool> = events.iter().map(|event| event.contains(r#""forebay":{"continued":1"#)).collect();
        assert!(marked[..heard].iter().all(|marked| !marked), "{what}");
        assert!(marked[heard..marked.len() - 1].iter().all(|marked| *marked), "{what}");
        let told = events.iter().filter(|event| event.contains("\"usage\":{")).count();
        assert_eq!(told, usize::from(shows_usage), "{what}");
        if shows_usage {
            let last: Value = serde_json::from_str(&events[events.len() - 2]).expect("JSON");
            assert_eq!(last["usage"], usage(prompt, tokens + 5), "{what}");
        }
        let row = setting.gateway.row_of(&answer);
        assert_eq!((&row["outcome"], &row["attempts"]), (&json!("completed"), &json!(2)), "{row}");
        assert_eq!(
            (row["prompt_tokens"].as_u64(), row["output_tokens"].as_u64()),
            (Some(prompt), Some(tokens + 5)),
            "{row}"
        );
        setting.recover();
    }
}

#[test]
fn a_chat_goes_on_wherever_it_was_cut() {
    cut_anywhere(true, true);
}

#[test]
fn a_completion_goes_on_wherever_it_was_cut() {
    cut_anywhere(false, false);
}

/// One request before workers that play this; the answer, and how often workers were asked.
fn once(setting: &Setting, chat: bool, more: &str) -> (Answer, usize) {
    let before = setting.counts();
    let answer = setting.gateway.post(path(chat), &request(chat, more));
    (answer, setting.asked(&before).len())
}

#[test]
fn an_answer_that_said_nothing_yet_is_asked_for_anew() {
    let setting = Setting::new(2, "attempts_max = 3\n");
    // A role alone would not have reached the client.
    let empty = events(true, "one", &[""; 4], Value::Null)[..5].concat();
    let empty = [vec![stream_head(), chunk(&empty)], Break::Reset.steps()].concat();
    let all = played(&events(true, "another", &PIECES, usage(7, 30)));
    for number in 0..20 {
        // Until one that breaks off is asked first.
        setting.workers[number % 2].play(empty.clone());
        setting.workers[1 - number % 2].play(all.clone());
        let (answer, asked) = once(&setting, true, r#","stream_options":{"include_usage":true}"#);
        if asked == 1 {
            continue; // it went to the other one at once
        }
        assert_eq!(read(true, &answer), PIECES.concat());
        assert_eq!(answer.text().matches("\"role\"").count(), 1, "{}", answer.text());
        let last: Value = serde_json::from_str(&answer.events()[answer.events().len() - 2]).expect("JSON");
        assert_eq!((&last["usage"], &last["forebay"]["continued"]), (&usage(7, 30), &json!(1)));
        return;
    }
    panic!("nobody broke off");
}

#[test]
fn it_goes_on_as_often_as_it_may_be_tried() {
    let setting = Setting::new(3, "");
    let first = events(true, "one", &PIECES[..3], Value::Null).concat();
    let of_text = |pieces: usize| setting.token_ids(&PIECES[..pieces].concat()).len().max(pieces);
    let left = |pieces: usize| format!("\"max_tokens\":{}", 40 - of_text(pieces));
    let until =
        |events: Vec<Vec<u8>>, pieces: usize| broken(&events.concat(), events[..pieces].concat().len(), Break::Reset);
    let second = until(events(false, "two", &PIECES[3..5], Value::Null), 2);
    let third = played(&events(false, "three", &PIECES[5..], usage(60, 9)));
    let beginning = [
        vec![stream_head(), chunk(&first[..events(true, "one", &PIECES[..3], Value::Null)[..4].concat().len()])],
        Break::Reset.steps(),
    ]
    .concat();
    setting.play(&beginning, &[(left(3), second.clone()), (left(5), third)]);
    let (answer, asked) = once(&setting, true, r#","stream_options":{"include_usage":true}"#);
    assert_eq!((read(true, &answer), asked), (PIECES.concat(), 3));
    assert!(answer.text().contains(r#""forebay":{"continued":2"#));
    let last: Value = serde_json::from_str(&answer.events()[answer.events().len() - 2]).expect("JSON");
    assert_eq!(last["usage"]["completion_tokens"], json!(of_text(5) + 9));
    assert_eq!(setting.gateway.row_of(&answer)["attempts"], 3);
    let explained =
        setting.gateway.admin(&format!("decisions/{}", answer.header("x-request-id").expect("a name"))).json();
    assert_eq!(explained["sent"].as_array().map(Vec::len), Some(3), "{explained}");
    assert_eq!(explained["decisions"].as_array().map(Vec::len), Some(3), "{explained}");
    // Three attempts are all there may be, whoever is left.
    setting.recover();
    setting.play(&beginning, &[(left(3), second.clone()), (left(5), second)]);
    let (answer, asked) = once(&setting, true, "");
    answer.stream_end().expect_err("the third one broke off, too");
    assert_eq!((asked, &setting.gateway.row_of(&answer)["outcome"]), (3, &json!("cut")));
}

#[test]
fn what_ends_for_want_of_tokens_needs_nobody() {
    let setting = Setting::new(2, "");
    let pieces = &PIECES[..2];
    let tokens = setting.token_ids(&pieces.concat()).len().max(2);
    let begun = events(true, "one", pieces, Value::Null)[..3].concat();
    setting.play(&[vec![stream_head(), chunk(&begun)], Break::Reset.steps()].concat(), &[]);
    let before = setting.counts();
    let body = request(true, r#","stream_options":{"include_usage":true}"#)
        .replace("\"max_tokens\":40", &format!("\"max_tokens\":{tokens}"));
    let answer = setting.gateway.post(CHAT, &body);
    assert_eq!((read(true, &answer), setting.asked(&before).len()), (pieces.concat(), 1));
    assert!(answer.text().contains(r#""finish_reason":"length""#), "{}", answer.text());
    let row = setting.gateway.row_of(&answer);
    assert_eq!((&row["outcome"], &row["output_tokens"]), (&json!("completed"), &json!(tokens)), "{row}");
}

/// What ends with an error event although the model goes on with streams, and who else was asked.
fn ends(setting: &Setting, beginning: &[u8], way: Break, more: &str) -> usize {
    let rest = played(&events(false, "another", &PIECES, usage(50, 5)));
    setting.play(&[vec![stream_head(), chunk(beginning)], way.steps()].concat(), &[(REST.to_owned(), rest)]);
    let (answer, asked) = once(setting, true, more);
    answer.stream_end().expect_err("it is not gone on with");
    assert_eq!(setting.gateway.row_of(&answer)["outcome"], "cut", "{more}");
    setting.recover();
    asked
}

#[test]
fn what_could_not_be_gone_on_with_exactly_ends_as_ever() {
    let setting = Setting::new(2, "");
    let begun = events(true, "one", &PIECES[..2], Value::Null)[..3].concat();
    for more in [
        r#","tools":[{"type":"function","function":{"name":"f"}}]"#,
        r#","n":2"#,
        r#","logprobs":true"#,
        r#","stop":["turbine"]"#,
        r#","presence_penalty":1"#,
        r#","response_format":{"type":"json_object"}"#,
        r#","chat_template":"{{ messages }}""#,
        r#","made_up":1"#,
        r#","x":1,"x":2"#,
    ] {
        assert_eq!(ends(&setting, &begun, Break::Reset, more), 1, "{more}");
    }
    for said in [r#"{"reasoning":"hm"}"#, r#"{"tool_calls":[{"index":0,"function":{"name":"f"}}]}"#] {
        let chunk = format!("data: {{\"id\":\"one\",\"choices\":[{{\"index\":0,\"delta\":{said}}}]}}\n\n");
        assert_eq!(ends(&setting, &[begun.clone(), chunk.into_bytes()].concat(), Break::Reset, ""), 1, "{said}");
    }
    // The request is at fault.
    let refusal = b"data: {\"error\":{\"message\":\"no\",\"type\":\"BadRequestError\",\"code\":400}}\n\n";
    assert_eq!(ends(&setting, &[&begun[..], refusal].concat(), Break::End, ""), 1);
}

#[test]
fn without_another_worker_it_ends_as_ever() {
    let setting = Setting::new(1, "");
    let begun = events(true, "one", &PIECES[..2], Value::Null)[..3].concat();
    assert_eq!(ends(&setting, &begun, Break::Reset, ""), 1);
    assert_eq!(ends(&setting, &begun, Break::Silence, ""), 1);
}

#[test]
fn a_deadline_is_for_the_first_token_alone() {
    let setting = Setting::new(2, "");
    let begun = events(true, "one", &PIECES[..2], Value::Null)[..3].concat();
    let rest = played(&events(false, "another", &PIECES[2..], usage(50, 5)));
    // It has passed long before the silence is one.
    setting.play(&[vec![stream_head(), chunk(&begun)], Break::Silence.steps()].concat(), &[(REST.to_owned(), rest)]);
    let headers = ["x-forebay-deadline-ms: 500"];
    let answer = crate::support::client::post_with(setting.gateway.client, CHAT, &headers, &request(true, ""));
    assert_eq!(read(true, &answer), PIECES.concat());
}

#[test]
fn all_that_a_worker_had_under_way_go_on_when_it_dies() {
    let mut workers: Vec<_> = (0..3).map(|_| Worker::start(&["--model", "m", "--speed", "1"])).collect();
    let addresses: Vec<_> = workers.iter().map(|worker| worker.address).collect();
    let extra = format!("tokenizer = {:?}\ncontinue_streams = true\n", tokenizer());
    let gateway = Gateway::start(&model("m", &addresses, &extra));
    for index in 0..3 {
        let up = format!("forebay_worker_up{{worker=\"w{index}\"}}");
        eventually("the worker to be up", || (gateway.metric(&up) == 1.0).then_some(()));
    }
    let body = r#"{"model":"m","prompt":"hello","stream":true,"max_tokens":1000,"ignore_eos":true}"#;
    let mut clients: Vec<_> = (0..90)
        .map(|number| {
            let mut client = Connection::to(gateway.client);
            client.post(COMPLETIONS, &[&format!("x-request-id: stream-{number}")], body.as_bytes());
            client
        })
        .collect();
    clients.iter_mut().for_each(|client| _ = client.until(b"text_completion"));
    drop(workers.remove(0));
    workers.iter().for_each(|worker| worker.speed(100.0));
    for mut client in clients {
        assert_eq!(client.answer().stream_end(), Ok(()));
    }
    let continued = (0..90).filter(|number| gateway.row(&format!("stream-{number}"))["attempts"] == 2).count();
    assert!(continued > 20, "more than a quiet gateway may retry: {continued}");
    assert_eq!(gateway.metric("forebay_retries_denied_total"), 0.0);
}

#[test]
fn a_client_that_leaves_is_not_waited_for() {
    let setting = Setting::new(2, "");
    let begun = events(true, "one", &PIECES[..2], Value::Null)[..3].concat();
    let rest = vec![Step::Gate, Step::AwaitClose];
    setting.play(&[vec![stream_head(), chunk(&begun)], Break::Reset.steps()].concat(), &[(REST.to_owned(), rest)]);
    let mut client = Connection::to(setting.gateway.client);
    client.post(CHAT, &["x-request-id: leaves"], request(true, "").as_bytes());
    eventually("the rest to be asked for", || (setting.counts().iter().sum::<usize>() == 2).then_some(()));
    drop(client);
    let row = setting.gateway.row("leaves");
    assert_eq!((&row["outcome"], &row["attempts"]), (&json!("client_gone"), &json!(2)), "{row}");
    setting.workers.iter().for_each(Recorder::go_on);
}
