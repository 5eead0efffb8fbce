//! Every engine, asked the same things through the gateway: what works, works alike; what an engine cannot do is refused
//! by name. The table that comes out stands in `backends/ENGINES.md`.
//!
//! With `FOREBAY_WRITE_TABLE=1` the table there is written anew.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use super::support::client::{Answer, Connection};
use super::support::eventually;
use super::support::process::{Gateway, Worker, model, tokenizer};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
/// Asks a simulated engine to call its tool.
const CALL: &str = "Please call the tool.";

/// Rows: what a worker is started as, and the engine that is configured where it is not detected.
const ENGINES: [(&str, Option<&str>); 10] = [
    ("vllm", None),
    ("sglang", None),
    ("tgi", None),
    ("tgi-native", None),
    ("trtllm", None),
    ("llamacpp", None),
    ("ollama", None),
    ("triton", None),
    ("triton-ids", None),
    ("vllm", Some("openai")),
];

type Check = fn(&Setting) -> Cell;

const COLUMNS: [(&str, Check); 19] = [
    ("chat", chat),
    ("completions", completions),
    ("stream", stream),
    ("tools", tools),
    ("forced tool", forced_tool),
    ("n", choices),
    ("logprobs", logprobs),
    ("stop", stop),
    ("JSON schema", json_schema),
    ("embeddings", embeddings),
    ("rerank", rerank),
    ("score", score),
    ("pooling", pooling),
    ("classify", classify),
    ("errors", errors),
    ("abort", abort),
    ("usage", usage),
    ("long prompt", long_prompt),
    ("load signal", load_signal),
];

/// What came of asking.
enum Cell {
    Yes,
    /// Refused by name, or not to be had, and why.
    No(String),
}

struct Setting {
    gateway: Gateway,
    worker: Worker,
    row: (&'static str, Option<&'static str>),
}

impl Setting {
    /// `speed` as the worker takes it: at 50 nothing is waited for, at 0.1 an answer takes seconds.
    fn new(row: (&'static str, Option<&'static str>), speed: &str) -> Self {
        let (engine, configured) = row;
        let flags = ["--engine", engine, "--model", "m", "--max-model-len", "2048", "--speed", speed];
        let worker = Worker::start(&flags);
        let keys = configured.map(|name| format!("engine = {name:?}\n")).unwrap_or_default();
        // Which does not tell its context length, and has its metrics elsewhere.
        let grpc = engine.starts_with("triton");
        let length = if grpc { "max_model_len = 2048\n" } else { "" };
        let mut models = model("m", &[worker.address], &format!("tokenizer = {:?}\n{length}", tokenizer())) + &keys;
        if grpc {
            models = models.replace("http://", "grpc://") + &format!("metrics_port = {}\n", worker.address.port());
        }
        Self { gateway: Gateway::start(&models), worker, row }
    }

    fn name(&self) -> &'static str {
        self.row.1.unwrap_or(self.row.0)
    }

    fn ask(&self, path: &str, body: &Value) -> Result<Value, String> {
        let answer = self.gateway.post(path, &body.to_string());
        answered(&answer)?;
        Ok(answer.json())
    }

    /// The chunks of a stream that succeeds.
    fn stream(&self, path: &str, mut body: Value) -> Result<Vec<Value>, String> {
        body["stream"] = true.into();
        let answer = self.gateway.post(path, &body.to_string());
        answered(&answer)?;
        let mut events = answer.events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"), "{}: {}", self.name(), answer.text());
        Ok(events.iter().map(|event| serde_json::from_str(event).expect("JSON")).collect())
    }
}

/// The engine's limits are refused as such, everything else must work.
fn answered(answer: &Answer) -> Result<(), String> {
    if answer.status == 200 {
        return Ok(());
    }
    let error = answer.error();
    assert_eq!((answer.status, error["type"].as_str()), (400, Some("invalid_request_error")), "{error}");
    let code = if error["param"].is_null() { "unsupported_api" } else { "unsupported_parameter" };
    assert_eq!(error["code"], code, "{error}");
    Err(error["message"].as_str().expect("a message").to_owned())
}

fn cell(outcome: Result<(), String>) -> Cell {
    outcome.map_or_else(Cell::No, |()| Cell::Yes)
}

fn said(text: &str) -> Value {
    json!({"model": "m", "messages": [{"role": "user", "content": text}], "seed": 5, "max_tokens": 60})
}

fn with(mut body: Value, more: Value) -> Value {
    let Value::Object(more) = more else { panic!("fields") };
    body.as_object_mut().expect("an object").extend(more);
    body
}

fn text(answer: &Value) -> String {
    let choice = &answer["choices"][0];
    let text = choice["message"]["content"].as_str().or_else(|| choice["text"].as_str());
    text.unwrap_or_else(|| panic!("no text: {answer}")).to_owned()
}

/// The first choice's text of all chunks, and the finish reasons in them.
fn joined(chunks: &[Value]) -> (String, Vec<String>) {
    let choices = chunks.iter().filter_map(|chunk| chunk.pointer("/choices/0"));
    let piece =
        |choice: &Value| choice.pointer("/delta/content").or_else(|| choice.get("text"))?.as_str().map(str::to_owned);
    let text = choices.clone().filter_map(piece).collect();
    (text, choices.filter_map(|choice| choice["finish_reason"].as_str().map(str::to_owned)).collect())
}

fn chat(on: &Setting) -> Cell {
    cell(on.ask(CHAT, &with(said("hi"), json!({"top_p": 1.0, "temperature": 0, "user": "u"}))).map(|answer| {
        assert_eq!(
            (&answer["object"], &answer["choices"][0]["message"]["role"]),
            (&json!("chat.completion"), &json!("assistant"))
        );
        let finish = answer["choices"][0]["finish_reason"].as_str();
        assert!(!text(&answer).is_empty() && matches!(finish, Some("stop" | "length")), "{answer}");
        assert!(answer["id"].is_string() && answer["created"].is_u64() && answer["model"].is_string(), "{answer}");
    }))
}

fn completions(on: &Setting) -> Cell {
    // Without a limit it is OpenAI's, whatever the engine's own is.
    let asked = on.ask(COMPLETIONS, &json!({"model": "m", "prompt": "Once", "top_p": 1}));
    cell(asked.map(|answer| {
        assert_eq!(
            (&answer["object"], &answer["choices"][0]["finish_reason"]),
            (&json!("text_completion"), &json!("length"))
        );
        assert_eq!(answer["usage"]["completion_tokens"], 16, "{answer}");
    }))
}

/// A stream says what a whole answer says, wherever its events are cut.
fn stream(on: &Setting) -> Cell {
    let bodies = [
        (CHAT, said("Tell me more")),
        (COMPLETIONS, json!({"model": "m", "prompt": "Once", "seed": 5, "max_tokens": 60})),
    ];
    cell(bodies.into_iter().try_for_each(|(path, body)| {
        let whole = on.ask(path, &body)?;
        let (streamed, finish) = joined(&on.stream(path, body)?);
        assert_eq!(streamed, text(&whole), "{}", on.name());
        assert_eq!(finish, [whole["choices"][0]["finish_reason"].as_str().expect("a reason")]);
        Ok(())
    }))
}

fn tool() -> Value {
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]});
    json!([{"type": "function", "function": {"name": "weather", "description": "", "parameters": parameters}}])
}

fn check_call(call: &Value, arguments: &str, finish: Option<&str>) {
    assert!(call["id"].as_str().is_some_and(|id| id.len() > 8), "an id of its own: {call}");
    assert_eq!((&call["type"], &call["function"]["name"]), (&json!("function"), &json!("weather")));
    let arguments: Value = serde_json::from_str(arguments).unwrap_or_else(|error| panic!("{error}: {arguments}"));
    assert_eq!((&arguments, finish), (&json!({"city": "Paris"}), Some("tool_calls")));
}

fn tools(on: &Setting) -> Cell {
    let body = with(said(CALL), json!({"tools": tool(), "tool_choice": "auto"}));
    let asked = on.ask(CHAT, &body).and_then(|answer| {
        let choice = &answer["choices"][0];
        let call = &choice["message"]["tool_calls"][0];
        check_call(call, call["function"]["arguments"].as_str().expect("text"), choice["finish_reason"].as_str());
        on.stream(CHAT, body)
    });
    cell(asked.map(|chunks| {
        let deltas: Vec<&Value> =
            chunks.iter().filter_map(|chunk| chunk.pointer("/choices/0/delta/tool_calls/0")).collect();
        let arguments: String = deltas.iter().filter_map(|delta| delta["function"]["arguments"].as_str()).collect();
        // An SDK puts the pieces together: what comes twice stands there twice.
        assert!(deltas.iter().skip(1).all(|delta| delta.get("id").is_none_or(Value::is_null)), "{deltas:?}");
        let (_, finish) = joined(&chunks);
        assert_eq!(finish.len(), 1, "{chunks:?}");
        check_call(deltas[0], &arguments, finish.first().map(String::as_str));
    }))
}

fn forced_tool(on: &Setting) -> Cell {
    let body = with(said("hi"), json!({"tools": tool(), "tool_choice": "required"}));
    cell(on.ask(CHAT, &body).map(|answer| {
        assert_eq!(answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"], "weather", "{answer}");
    }))
}

fn choices(on: &Setting) -> Cell {
    cell(on.ask(CHAT, &with(said("hi"), json!({"n": 2}))).map(|answer| {
        assert_eq!(answer["choices"].as_array().map(Vec::len), Some(2), "{answer}");
    }))
}

fn logprobs(on: &Setting) -> Cell {
    cell(on.ask(CHAT, &with(said("hi"), json!({"logprobs": true, "top_logprobs": 2}))).map(|answer| {
        let content = answer["choices"][0]["logprobs"]["content"].as_array().expect("log probabilities");
        assert!(content.iter().all(|token| token["token"].is_string() && token["logprob"].is_number()), "{answer}");
    }))
}

fn stop(on: &Setting) -> Cell {
    let whole = match on.ask(CHAT, &said("hi")) {
        Ok(answer) => text(&answer),
        Err(reason) => return Cell::No(reason),
    };
    let word = whole.split(' ').nth(4).expect("words").to_owned();
    let body = with(said("hi"), json!({"stop": word}));
    cell(on.ask(CHAT, &body).and_then(|answer| {
        assert_eq!(text(&answer), whole[..whole.find(&word).expect("it is there")], "{}", on.name());
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        let (streamed, finish) = joined(&on.stream(CHAT, body)?);
        assert_eq!((streamed, finish), (text(&answer), vec!["stop".to_owned()]));
        Ok(())
    }))
}

fn json_schema(on: &Setting) -> Cell {
    let schema = json!({"type": "object", "properties": {"city": {"const": "Kyōto"}}, "required": ["city"]});
    let format = json!({"type": "json_schema", "json_schema": {"name": "place", "schema": schema}});
    cell(on.ask(CHAT, &with(said("hi"), json!({"response_format": format}))).map(|answer| {
        let said: Value = serde_json::from_str(&text(&answer)).unwrap_or_else(|_| panic!("no JSON: {answer}"));
        assert_eq!(said, json!({"city": "Kyōto"}), "{}", on.name());
    }))
}

fn embeddings(on: &Setting) -> Cell {
    cell(on.ask("/v1/embeddings", &json!({"model": "m", "input": ["a", "b"]})).map(|answer| {
        assert_eq!(answer["data"].as_array().map(Vec::len), Some(2), "{answer}");
    }))
}

fn rerank(on: &Setting) -> Cell {
    let body =
        json!({"model": "m", "query": "river water", "documents": ["a stone", "the water of a river"], "top_n": 2});
    cell(on.ask("/v1/rerank", &body).map(|answer| {
        let results = answer["results"].as_array().expect("a ranking");
        let score = |at: usize| results[at]["relevance_score"].as_f64().expect("a score");
        assert_eq!((results.len(), &results[0]["index"]), (2, &json!(1)), "{answer}");
        assert!(score(0) > score(1) && answer["usage"]["prompt_tokens"].as_u64() > Some(0), "{answer}");
    }))
}

fn score(on: &Setting) -> Cell {
    let body = json!({"model": "m", "text_1": "river", "text_2": ["a stone", "a river"]});
    cell(on.ask("/v1/score", &body).map(|answer| {
        assert_eq!(answer["data"].as_array().map(Vec::len), Some(2), "{answer}");
    }))
}

fn pooling(on: &Setting) -> Cell {
    cell(on.ask("/pooling", &json!({"model": "m", "input": ["a stone", "a river"]})).map(|answer| {
        let data = answer["data"].as_array().expect("a list");
        assert!(data.len() == 2 && data.iter().all(|item| item["data"].is_array()), "{answer}");
        assert!(answer["usage"]["prompt_tokens"].as_u64() > Some(0), "{answer}");
    }))
}

fn classify(on: &Setting) -> Cell {
    let body = json!({"model": "m", "input": ["a stone", "a river"]});
    let asked = ["/v1/classify", "/classify"].map(|path| on.ask(path, &body));
    cell(asked.into_iter().try_for_each(|answer| {
        let answer = answer?;
        let data = answer["data"].as_array().expect("a list");
        let is_class = |item: &Value| item["label"].is_string() && item["probs"].is_array();
        assert!(data.len() == 2 && data.iter().all(is_class), "{answer}");
        assert!(answer["usage"]["prompt_tokens"].as_u64() > Some(0), "{answer}");
        Ok(())
    }))
}

/// What the engine refuses has OpenAI's shape, and an engine that dies leaves one error event.
fn errors(on: &Setting) -> Cell {
    let refused = on.gateway.post(CHAT, &with(said("hi"), json!({"top_p": -1})).to_string());
    assert!(matches!(refused.status, 400 | 422), "{}: {}", on.name(), refused.text());
    assert_eq!(refused.error()["type"], "invalid_request_error");
    on.worker.faults(r#"[{"kind":{"error":{"after":4}}}]"#);
    let died = on.gateway.post(CHAT, &with(said("hi"), json!({"stream": true})).to_string());
    on.worker.faults("[]");
    assert_eq!(died.status, 200);
    let last = died.events().pop().expect("events");
    let error: Value = serde_json::from_str(&last).unwrap_or_else(|_| panic!("no error but {last}"));
    let error = &error["error"];
    assert!(error["message"].is_string() && error["code"].is_string(), "{}: {last}", on.name());
    // Two good answers, so that the worker is not left alone for its failure.
    (0..2).for_each(|_| assert_eq!(on.gateway.post(CHAT, &said("hi").to_string()).status, 200));
    Cell::Yes
}

/// A client that leaves frees its sequence, whether it waits for a stream or for a whole answer.
fn abort(on: &Setting) -> Cell {
    let slow = Setting::new(on.row, "0.1");
    for (streamed, aborted) in [(true, 1), (false, 2)] {
        let mut client = Connection::to(slow.gateway.client);
        client.post(CHAT, &[], with(said("hi"), json!({"stream": streamed})).to_string().as_bytes());
        let sequences = |what: &str| slow.worker.log()["sequences"][what].as_u64();
        eventually("the sequence to run", || (sequences("running") == Some(1)).then_some(()));
        drop(client);
        eventually("the sequence to be freed", || (sequences("aborted") == Some(aborted)).then_some(()));
    }
    Cell::Yes
}

/// Token counts are the gateway's own, in the answer, at the end of a stream, and in the journal.
fn usage(on: &Setting) -> Cell {
    let body = with(said("How many tokens?"), json!({"max_tokens": 7}));
    let counted = on.gateway.post("/tokenize", &json!({"model": "m", "messages": body["messages"]}).to_string());
    let prompt = counted.json()["count"].as_u64().expect("a count");
    let answer = on.gateway.post(CHAT, &body.to_string());
    let told = |usage: &Value| (usage["prompt_tokens"].as_u64(), usage["completion_tokens"].as_u64());
    assert_eq!(told(&answer.json()["usage"]), (Some(prompt), Some(7)), "{}: {}", on.name(), answer.text());
    let row = on.gateway.row_of(&answer);
    assert_eq!((&row["prompt_tokens"], &row["output_tokens"]), (&json!(prompt), &json!(7)), "{row}");
    let asked = with(body.clone(), json!({"stream_options": {"include_usage": true}}));
    let chunks = on.stream(CHAT, asked).expect("a stream");
    assert_eq!(told(&chunks.last().expect("chunks")["usage"]), (Some(prompt), Some(7)), "{}", on.name());
    // Who did not ask is not told.
    let chunks = on.stream(CHAT, body).expect("a stream");
    assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none_or(Value::is_null)), "{chunks:?}");
    Cell::Yes
}

fn long_prompt(on: &Setting) -> Cell {
    let body = with(said(&"long ".repeat(3000)), json!({"max_tokens": 10}));
    let refused = on.gateway.post(CHAT, &body.to_string());
    assert!(matches!(refused.status, 400 | 422), "{}: {}", on.name(), refused.text());
    assert_eq!(refused.error()["code"], "context_length_exceeded", "{}: {}", on.name(), refused.text());
    Cell::Yes
}

/// While a sequence runs the gateway hears of it by the engine's own word.
fn load_signal(on: &Setting) -> Cell {
    if matches!(on.name(), "ollama" | "openai") {
        return Cell::No(
            "The engine publishes nothing of its load; the gateway goes by what it sent there.".to_owned(),
        );
    }
    let slow = Setting::new(on.row, "0.1");
    let mut client = Connection::to(slow.gateway.client);
    client.post(CHAT, &[], with(said("hi"), json!({"stream": true})).to_string().as_bytes());
    let told = || (slow.gateway.metric("forebay_worker_running{") >= 1.0).then_some(());
    eventually("the engine to tell of a running sequence", told);
    Cell::Yes
}

#[test]
fn every_engine_does_it_alike_or_says_that_it_cannot() {
    let mut rows = Vec::new();
    let mut reasons: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for row in ENGINES {
        let on = Setting::new(row, "50");
        let mut cells = vec![on.name().to_owned()];
        for (column, check) in COLUMNS {
            cells.push(match check(&on) {
                Cell::Yes => "yes".to_owned(),
                Cell::No(reason) => {
                    // The reason is the same for all that have it: the engine's name is in the table.
                    let engine = on.name().trim_end_matches("-native").trim_end_matches("-ids");
                    let reason = reason.replace(&format!(" (the engine of this model is {engine})"), "");
                    let reason = reason.replace(&format!(" ({engine})"), "");
                    reasons.entry(format!("{column}: {reason}")).or_default().push(on.name().to_owned());
                    "no".to_owned()
                }
            });
        }
        rows.push(cells);
    }
    let table = written(&rows, &reasons);
    println!("{table}");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("backends/ENGINES.md");
    let page = std::fs::read_to_string(&path).expect("the page is there");
    let (before, rest) = page.split_once("<!-- table -->\n").expect("a place for the table");
    let (old, after) = rest.split_once("<!-- end of table -->").expect("an end of the table");
    if std::env::var_os("FOREBAY_WRITE_TABLE").is_some() {
        let page = format!("{before}<!-- table -->\n{table}<!-- end of table -->{after}");
        std::fs::write(&path, page).expect("the page is written");
    } else {
        assert_eq!(old, table, "FOREBAY_WRITE_TABLE=1 writes the table anew");
    }
}

#[test]
fn in_a_mixed_pool_those_are_asked_that_can() {
    let flags = |engine| ["--engine", engine, "--model", "m", "--max-model-len", "2048", "--speed", "50"];
    let workers = ["tgi", "vllm"].map(|engine| Worker::start(&flags(engine)));
    let addresses = workers.each_ref().map(|worker| worker.address);
    let gateway = Gateway::start(&model("m", &addresses, &format!("tokenizer = {:?}\n", tokenizer())));
    let all_up = || {
        let listed = gateway.admin("workers").json();
        (0..2).all(|at| listed["workers"][at]["health"] == "up").then_some(())
    };
    eventually("both workers to be up", all_up);
    for number in 0..12 {
        let body = json!({"model": "m", "input": format!("text {number}")});
        let answer = gateway.post("/v1/embeddings", &body.to_string());
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    assert!(all_up().is_some(), "it is nobody's fault: {}", gateway.admin("workers").text());
}

fn written(rows: &[Vec<String>], reasons: &BTreeMap<String, Vec<String>>) -> String {
    let mut table = String::from("| engine |");
    for (column, _) in COLUMNS {
        let _ = write!(table, " {column} |");
    }
    table += "\n|---|";
    table += &"---|".repeat(COLUMNS.len());
    for row in rows {
        let _ = write!(table, "\n| {} |", row.join(" | "));
    }
    table += "\n\n";
    for (reason, engines) in reasons {
        let _ = writeln!(table, "- {}: {reason}", engines.join(", "));
    }
    table
}
