//! `forebay demo`: simulated workers, a gateway in front of them, and a few real requests through it.

use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use forebay_backends::transport::{Endpoint, Outgoing, Response, Timeouts, Transport};
use forebay_proto::sse::Splitter;
use forebay_simulated_engine::{Options, builtin_model};
use http::uri::PathAndQuery;
use http::{HeaderMap, Method, StatusCode};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use url::Url;

use super::gateway::{self, Signals};
use crate::app::{Gateway, Listeners};
use crate::config::{Config, Model, Name, Worker};
use crate::telemetry::Registry;

const MODEL: &str = "demo";
/// What a shared system prompt looks like: long enough to fill several KV blocks.
const SYSTEM: &str = "You answer questions about a power station on a river. Its forebay is the pool that holds water \
    right before the turbines and lets in exactly what they can take. Be brief, be friendly, and use plain words. \
    When you do not know something, say so. Never promise more water than the river carries.";

/// Show the gateway at work in front of simulated workers.
///
/// Starts simulated vLLM workers and a gateway on free ports, sends requests through it, says what happened, and stays
/// up so that you can send your own.
///
/// Example: forebay demo --workers 3
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// How many workers.
    #[arg(long, default_value = "2")]
    workers: NonZeroU16,
    /// Exit after the requests, with 0 when all was well.
    #[arg(long)]
    once: bool,
}

pub(super) async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let signals = Signals::install()?;
    let directory = Scratch::make()?;
    let stop = CancellationToken::new();
    let engines = TaskTracker::new();
    let ended = demo(&arguments, &directory.0, signals, &stop, &engines).await;
    stop.cancel();
    engines.close();
    let _ = tokio::time::timeout(Duration::from_secs(2), engines.wait()).await;
    ended
}

/// A directory that goes with the demo.
struct Scratch(PathBuf);

impl Scratch {
    fn make() -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join(format!("forebay-demo-{:016x}", rand::random::<u64>()));
        std::fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

async fn demo(
    arguments: &Arguments,
    directory: &Path,
    signals: Signals,
    stop: &CancellationToken,
    engines: &TaskTracker,
) -> anyhow::Result<()> {
    let tokenizer = directory.join("model");
    write_model(&tokenizer).context("cannot write the demo's tokenizer")?;
    let mut workers = Vec::new();
    for index in 0..arguments.workers.get() {
        let listener = listener().await?;
        let address = listener.local_addr()?;
        let name = format!("worker-{}", index + 1);
        say!("  {name}  simulated vLLM at http://{address}");
        let options =
            Options { model: MODEL.to_owned(), seed: u64::from(index), tokenizer: None, ..Options::default() };
        let bound = forebay_simulated_engine::bind(options, listener).await?;
        engines.spawn(forebay_simulated_engine::serve(bound, stop.clone()));
        workers.push(Worker::new(Name::new(&name)?, Url::parse(&format!("http://{address}"))?));
    }
    let reader = gateway::reader(Vec::new());
    let mut config = reader.without_file().map_err(|mistakes| anyhow::anyhow!("{mistakes}"))?;
    config.server.data_dir = directory.join("data");
    config.server.access_log = false;
    let model = Model::new(Name::new(MODEL)?, workers, &config.server);
    config.models = vec![Model { tokenizer: Some(tokenizer), ..model }];
    let listeners = Listeners { client: listener().await?, ops: listener().await? };
    let registry = Registry::install().context("cannot install the metrics recorder")?;
    let running = Gateway::start(config.clone(), reader, listeners, registry, None).await?;
    let (client, ops) = (running.client_address(), running.ops_address());
    say!("  gateway   http://{client}   (metrics: http://{ops}/metrics)\n");
    let shown = show(client, engines).await;
    if let Err(error) = shown {
        running.shutdown(tokio::time::sleep(Duration::from_secs(1))).await;
        return Err(error);
    }
    if arguments.once {
        say!("\nall was well");
        running.shutdown(tokio::time::sleep(Duration::from_secs(1))).await;
        return Ok(());
    }
    say!("\nThe gateway stays up. Try it (Ctrl-C ends it):\n\n{}\n", curl(client));
    let data = config.server.data_dir.display();
    say!("and, in the meantime: forebay workers --watch --url http://{ops} --data-dir {data}\n");
    stay(running, config, signals).await
}

/// The simulated engine's own model directory, as a real engine would have one on its disk.
fn write_model(directory: &Path) -> std::io::Result<()> {
    let model = builtin_model();
    std::fs::create_dir(directory)?;
    std::fs::write(directory.join("tokenizer.json"), model.tokenizer)?;
    std::fs::write(directory.join("tokenizer_config.json"), model.tokenizer_config)
}

async fn stay(running: Gateway, mut config: Config, signals: Signals) -> anyhow::Result<()> {
    config.server.drain = Duration::from_secs(1);
    gateway::run(running, config, signals, None).await
}

fn curl(client: SocketAddr) -> String {
    format!(
        "curl -N http://{client}/v1/chat/completions -H 'Content-Type: application/json' \\\n  \
         -d '{{\"model\":\"{MODEL}\",\"stream\":true,\"messages\":[{{\"role\":\"user\",\"content\":\"What is a forebay?\"}}]}}'"
    )
}

/// Sends the requests and prints what came of them.
async fn show(client: SocketAddr, tracker: &TaskTracker) -> anyhow::Result<()> {
    let endpoint = Endpoint::new(&Url::parse(&format!("http://{client}"))?, None)?;
    let transport = Transport::new(tracker.clone());
    let caller = Caller(transport.channel(endpoint, Timeouts::default()));

    say!("1. A chat, counted here before any worker sees it");
    let answer = caller.ask("/v1/chat/completions", &chat("What is a forebay?", false)).await?;
    let counted =
        caller.ask("/tokenize", &json!({ "model": MODEL, "messages": messages("What is a forebay?") })).await?;
    let (ours, theirs) = (number(&counted.json, "/count"), number(&answer.json, "/usage/prompt_tokens"));
    say!("   {} says: {}", answer.worker, text(&answer.json));
    say!("   prompt tokens: {ours} by the gateway, {theirs} by the engine");
    anyhow::ensure!(ours == theirs && ours > 0, "the gateway counted other tokens than the engine");

    say!("2. A stream, each event as soon as it is there");
    let stream = caller.stream(&chat("How many turbines are there?", true)).await?;
    say!(
        "   {}: first event after {} ms, {} events in {} ms, all of them finished",
        stream.worker,
        stream.first_ms,
        stream.events,
        stream.total_ms
    );

    say!("3. Eight questions of one conversation: they go where the prefix is cached");
    let mut placed: Vec<String> = Vec::new();
    for turn in 0..8 {
        let answer =
            caller.ask("/v1/chat/completions", &chat(&format!("Question {turn}: is the gate open?"), false)).await?;
        placed.push(answer.worker);
    }
    say!("   {}", placed.join(" "));

    say!("4. Thirty-two different questions at once: they spread");
    let asked: Vec<Value> = (0..32).map(|n| solo(&format!("{n} litres flow past gauge {}. Why?", n * 7))).collect();
    let answers = futures::future::join_all(asked.iter().map(|body| caller.ask("/v1/chat/completions", body))).await;
    let mut spread = std::collections::BTreeMap::<String, u32>::new();
    for answer in answers {
        *spread.entry(answer?.worker).or_default() += 1;
    }
    say!("   {}", spread.iter().map(|(worker, count)| format!("{worker}: {count}")).collect::<Vec<_>>().join(", "));

    say!("5. Embeddings");
    let answer = caller.ask("/v1/embeddings", &json!({ "model": MODEL, "input": ["water", "turbine"] })).await?;
    say!(
        "   {} vectors from {}",
        answer.json.pointer("/data").and_then(Value::as_array).map_or(0, Vec::len),
        answer.worker
    );

    say!("6. A prompt that is too long is refused before any worker sees it");
    let long = solo(&"water ".repeat(60_000));
    let refused = caller.send("/v1/chat/completions", &long).await?;
    let status = refused.status;
    let body: Value = serde_json::from_slice(&refused.body.collect(1 << 20).await?)?;
    say!("   {status}: {}", string(&body, "/error/message"));
    anyhow::ensure!(status == StatusCode::BAD_REQUEST, "expected status 400, got {status}");
    Ok(())
}

fn messages(question: &str) -> Value {
    json!([{ "role": "system", "content": SYSTEM }, { "role": "user", "content": question }])
}

fn chat(question: &str, stream: bool) -> Value {
    json!({ "model": MODEL, "messages": messages(question), "max_tokens": 32, "stream": stream })
}

fn solo(question: &str) -> Value {
    json!({ "model": MODEL, "messages": [{ "role": "user", "content": question }], "max_tokens": 16 })
}

fn text(answer: &Value) -> &str {
    string(answer, "/choices/0/message/content")
}

fn string<'a>(json: &'a Value, pointer: &str) -> &'a str {
    json.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn number(json: &Value, pointer: &str) -> u64 {
    json.pointer(pointer).and_then(Value::as_u64).unwrap_or_default()
}

struct Caller(forebay_backends::transport::Channel);

struct Answer {
    worker: String,
    json: Value,
}

struct Stream {
    worker: String,
    events: usize,
    first_ms: u128,
    total_ms: u128,
}

impl Caller {
    async fn send(&self, path: &'static str, body: &Value) -> anyhow::Result<Response> {
        let mut headers = HeaderMap::new();
        headers.insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
        let path = PathAndQuery::from_static(path);
        let body = serde_json::to_vec(body)?.into();
        Ok(self.0.send(Outgoing { method: Method::POST, path, headers, body }).await?)
    }

    async fn ask(&self, path: &'static str, body: &Value) -> anyhow::Result<Answer> {
        let response = self.send(path, body).await?;
        let (status, worker) = (response.status, worker(&response));
        let body = response.body.collect(16 << 20).await?;
        anyhow::ensure!(status.is_success(), "{path} answered {status}: {}", String::from_utf8_lossy(&body));
        Ok(Answer { worker, json: serde_json::from_slice(&body)? })
    }

    async fn stream(&self, body: &Value) -> anyhow::Result<Stream> {
        let began = Instant::now();
        let mut response = self.send("/v1/chat/completions", body).await?;
        let worker = worker(&response);
        let mut splitter = Splitter::new(1 << 20);
        let (mut events, mut first_ms, mut done) = (0, 0, false);
        while let Some(bytes) = response.body.next().await {
            splitter.push(bytes?);
            while let Some(event) = splitter.next()? {
                if events == 0 {
                    first_ms = began.elapsed().as_millis();
                }
                events += 1;
                done |= event.data.as_deref() == Some(b"[DONE]");
            }
        }
        anyhow::ensure!(done, "the stream ended without [DONE]");
        Ok(Stream { worker, events, first_ms, total_ms: began.elapsed().as_millis() })
    }
}

fn worker(response: &Response) -> String {
    let header = response.headers.get("x-forebay-worker").and_then(|value| value.to_str().ok());
    header.unwrap_or_default().to_owned()
}

async fn listener() -> anyhow::Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("cannot open a port on 127.0.0.1")
}
