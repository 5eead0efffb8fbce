//! Replays what was sent to a real vLLM 0.32.0 and compares what comes back with what it answered then.

use std::path::Path;

use forebay_simulated_engine::{EngineConfig, Options};
use serde_json::Value;

use crate::client::{Ended, Reply, Server, shared};

/// Recorded exchanges that are not replayed, by the beginning of their name, and why.
const LEFT_OUT: [(&str, &str); 10] = [
    ("anthropic-", "not this engine's dialect"),
    ("responses-api", "not simulated"),
    ("chat-options-preflight", "no CORS"),
    ("error-malformed-http", "answered by the HTTP library"),
    ("error-http10", "answered as HTTP/1.0"),
    ("disconnect", "never read to its end"),
    ("metrics", "compared by its own test"),
    ("embeddings-unsupported", "every simulated model has embeddings"),
    ("embeddings-dimensions", "simulated vectors may be shortened"),
    ("error-chat-on-embedding-model", "every simulated model chats"),
];

/// The shape of a value: keys in order, and what kind of thing stands under each. Of a list, that of its first element.
fn shape(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) => "bool".to_owned(),
        Value::Number(_) => "number".to_owned(),
        Value::String(_) => "text".to_owned(),
        Value::Array(list) => format!("[{}]", list.first().map(shape).unwrap_or_default()),
        Value::Object(object) => {
            let fields: Vec<String> = object.iter().map(|(key, value)| format!("{key}: {}", shape(value))).collect();
            format!("{{{}}}", fields.join(", "))
        }
    }
}

/// Distinct shapes of events, in the order of their first appearance, without those of the ends of text: where an answer
/// stops differs.
fn event_shapes(reply: &Reply) -> Vec<String> {
    let mut shapes = Vec::new();
    for event in reply.events() {
        let shape = shape(&event);
        if !shapes.contains(&shape) {
            shapes.push(shape);
        }
    }
    shapes
}

fn sample(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

/// Header names that both sides should have.
fn header_names(reply: &Reply) -> Vec<&str> {
    let mut names: Vec<&str> = reply.headers.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    names
}

/// Compares one exchange; gives what differs.
fn compare(name: &str, real: &Reply, ours: &Reply) -> Vec<String> {
    let mut differences = Vec::new();
    let mut differ = |what: &str, real: String, ours: String| {
        if real != ours {
            differences.push(format!("{name}: {what}\n  real {real}\n  ours {ours}"));
        }
    };
    differ("status", real.status.to_string(), ours.status.to_string());
    differ("headers", format!("{:?}", header_names(real)), format!("{:?}", header_names(ours)));
    for header in ["content-type", "server", "allow", "vary"] {
        differ(header, format!("{:?}", real.header(header)), format!("{:?}", ours.header(header)));
    }
    if real.header("content-type").is_some_and(|kind| kind.starts_with("text/event-stream")) {
        differ("event shapes", event_shapes(real).join("\n"), event_shapes(ours).join("\n"));
        let framing = |reply: &Reply| {
            reply.chunks.iter().all(|chunk| {
                let chunk = String::from_utf8_lossy(chunk);
                chunk.starts_with("data: ") && chunk.ends_with("\n\n") && chunk.matches("\n\n").count() == 1
            })
        };
        differ("one event a chunk", framing(real).to_string(), framing(ours).to_string());
        differ("end", real.is_done().to_string(), ours.is_done().to_string());
        return differences;
    }
    let fixed = real.status >= 400 || name.contains("tokenize") || ["version", "load"].contains(&name);
    if fixed && name != "error-no-input" {
        differ("body", real.text(), ours.text());
    } else if real.body().is_empty() {
        differ("body", String::new(), ours.text());
    } else {
        differ("shape", shape(&real.json()), shape(&ours.json()));
        let prompt = |reply: &Reply| reply.json().pointer("/usage/prompt_tokens").cloned().unwrap_or_default();
        differ("prompt tokens", prompt(real).to_string(), prompt(ours).to_string());
    }
    differences
}

async fn replay(folder: &str, options: Options, wanted: impl Fn(&str) -> bool) {
    let Some(samples) = shared(folder) else { return };
    let server = Server::start(options).await;
    let mut names: Vec<String> = std::fs::read_dir(&samples)
        .unwrap()
        .filter_map(|entry| Some(entry.unwrap().file_name().to_str()?.strip_suffix(".request.http")?.to_owned()))
        .filter(|name| wanted(name) && !LEFT_OUT.iter().any(|(left_out, _)| name.starts_with(left_out)))
        .collect();
    names.sort();
    let mut differences = Vec::new();
    for name in &names {
        let real = Reply::parse(&sample(&samples.join(format!("{name}.response.http"))), Ended::Closed);
        if !real.whole && !["models-head"].contains(&name.as_str()) && name != "chat-keep-alive-two-requests" {
            panic!("{name}: the sample is not whole");
        }
        let ours = server.send(&sample(&samples.join(format!("{name}.request.http")))).await.reply().await;
        if name == "chat-keep-alive-two-requests" {
            let answers = ours.text().matches("HTTP/1.1 200 OK").count();
            assert_eq!((ours.status, answers), (200, 1), "the second answer follows the first");
            continue;
        }
        differences.extend(compare(name, &real, &ours));
    }
    let (count, compared) = (differences.len(), names.len());
    assert!(count == 0, "{count} differences in {compared} exchanges:\n{}", differences.join("\n"));
    assert!(compared > 0);
}

/// The engine that was recorded: blocks of 128 tokens, a context of 2048.
fn recorded_engine() -> EngineConfig {
    EngineConfig { block_tokens: 128, kv_blocks: 364, max_batch: 16, ..EngineConfig::default() }
}

#[tokio::test]
async fn answers_like_the_recorded_engine() {
    let Some(tokenizer) = shared("tokenizers/smollm2") else { return };
    let options = |length| Options {
        model: "smollm2".to_owned(),
        tokenizer: Some(tokenizer.clone()),
        max_model_len: 2048,
        timing: recorded_engine(),
        speed: 100.0,
        // As long as the recorded answers, so that the same ones run into `max_tokens`.
        output_tokens: length..=length,
        ..Options::default()
    };
    let folder = "real-engines/samples/vllm";
    replay(folder, options(8), |name| name != "chat-unicode-stream").await;
    replay(folder, options(100), |name| name == "chat-unicode-stream").await;
}

#[tokio::test]
async fn embeds_like_the_recorded_engine() {
    let Some(tokenizer) = shared("tokenizers/minilm") else { return };
    let options = Options {
        model: "minilm".to_owned(),
        tokenizer: Some(tokenizer),
        max_model_len: 256,
        embedding_dimensions: 384,
        speed: 100.0,
        ..Options::default()
    };
    replay("real-engines/samples/vllm-embed", options, |_| true).await;
}

/// Names and label names of series, from a metrics page.
fn series(page: &str) -> Vec<String> {
    let mut series: Vec<String> = page
        .lines()
        .filter(|line| line.starts_with("vllm:"))
        .map(|line| {
            let (name, labels) = line.split_once('{').unwrap();
            let labels = labels.rsplit_once('}').unwrap().0;
            let names = labels.split("\",").map(|label| label.split_once('=').unwrap().0);
            format!("{name} {}", names.collect::<Vec<_>>().join(","))
        })
        .collect();
    series.dedup();
    series
}

#[tokio::test]
async fn metrics_are_series_of_the_recorded_engine() {
    let Some(samples) = shared("real-engines/samples/vllm") else { return };
    let real = Reply::parse(&sample(&samples.join("metrics-busy.response.http")), Ended::Closed);
    let server = Server::start(crate::client::fast()).await;
    let ours = server.get("/metrics").await;
    assert_eq!(ours.header("content-type"), real.header("content-type"));
    let (real, ours) = (series(&real.text()), series(&ours.text()));
    for series in &ours {
        // The cache configuration has a label for each of its many fields; the simulated one has some of them.
        if !series.starts_with("vllm:cache_config_info") {
            assert!(real.contains(series), "{series} is not a series of vLLM");
        }
    }
    assert!(ours.len() > 20, "{ours:?}");
}
