//! `forebay simulated-worker`: one simulated engine server on loopback.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::ValueEnum;
use forebay_simulated_engine::{
    EngineConfig, EngineKind, Fault, KvAddress, KvEventForm, KvEventOptions, Options, PairRole,
};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Run one simulated engine server on loopback.
///
/// It speaks the engine's wire and takes the time that a GPU of the given speed would take; what it says is made up.
/// A fault is `kind:key=value,…`: status, delay, hang, stall, cut, garbage, error; with every=, first=, probability=,
/// path=. POST /simulated/faults changes the faults of a running worker.
///
/// Example: forebay simulated-worker --engine vllm --port 8000 --model demo --fault status:code=503,every=10
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Whose wire it speaks.
    #[arg(long, value_enum, default_value_t = Wire::Vllm)]
    engine: Wire,
    /// Port on 127.0.0.1; 0 takes a free one, which is printed.
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// The model's name.
    #[arg(long, default_value = "demo")]
    model: String,
    /// Directory with tokenizer.json [default: a small one that is built in].
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// Context length in tokens.
    #[arg(long, default_value_t = 32_768)]
    max_model_len: u32,
    /// Accept only requests with this bearer token; may be repeated.
    #[arg(long)]
    api_key: Vec<String>,
    /// Seed of what it says.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Say one text to everybody, and go on with it where a prompt ends within it.
    #[arg(long)]
    recite: bool,
    /// How many times faster than its timing model it runs.
    #[arg(long, default_value_t = 1.0)]
    speed: f64,
    /// Prompt tokens computed a second.
    #[arg(long, default_value_t = EngineConfig::default().prefill_tokens_per_s)]
    prefill_tokens_per_s: f64,
    /// Milliseconds of every step.
    #[arg(long, default_value_t = EngineConfig::default().step_ms)]
    step_ms: f64,
    /// Milliseconds that each sequence adds to a step.
    #[arg(long, default_value_t = EngineConfig::default().step_ms_per_seq)]
    step_ms_per_seq: f64,
    /// KV memory in blocks.
    #[arg(long, default_value_t = EngineConfig::default().kv_blocks)]
    kv_blocks: u32,
    /// Tokens in a KV block.
    #[arg(long, default_value_t = EngineConfig::default().block_tokens)]
    block_tokens: u32,
    /// Sequences that run at once.
    #[arg(long, default_value_t = EngineConfig::default().max_batch)]
    max_batch: u32,
    /// Tokens that one step computes.
    #[arg(long, default_value_t = EngineConfig::default().step_token_budget)]
    step_token_budget: u32,
    /// Milliseconds of the server's own work for each call for embeddings, rankings or scores, one call at a time.
    #[arg(long, default_value_t = 0.0)]
    call_ms: f64,
    /// Refuse requests with 503 when this many run or wait.
    #[arg(long)]
    max_num_queued_reqs: Option<u32>,
    /// Seconds of silence in a stream after which a comment is sent.
    #[arg(long)]
    sse_keep_alive_interval: Option<f64>,
    /// Publish what the prefix cache holds on this ZeroMQ socket, as in tcp://127.0.0.1:5557.
    #[arg(long)]
    kv_events: Option<KvAddress>,
    /// Repeat the last of these events on this socket.
    #[arg(long, requires = "kv_events")]
    kv_events_replay: Option<KvAddress>,
    /// Steps whose events are kept to be repeated.
    #[arg(long, default_value_t = 10_000)]
    kv_events_buffer_steps: usize,
    /// Write these events as vLLM's releases before 0.32 did.
    #[arg(long)]
    kv_events_arrays: bool,
    /// Do this part of requests that two servers do together.
    #[arg(long, value_enum)]
    role: Option<Part>,
    /// Seconds for which a prompt is kept for the server that goes on from it.
    #[arg(long, default_value_t = 30.0)]
    kv_lease_seconds: f64,
    /// Have vLLM's sleep mode.
    #[arg(long)]
    enable_sleep_mode: bool,
    /// Sleep at the start.
    #[arg(long, requires = "enable_sleep_mode")]
    asleep: bool,
    /// Seconds to wake.
    #[arg(long)]
    wake_seconds: Option<f64>,
    /// Seconds to fall asleep.
    #[arg(long)]
    sleep_seconds: Option<f64>,
    /// Begin with this LoRA adapter, as in sql=/adapters/sql; may be repeated.
    #[arg(long, value_parser = adapter)]
    lora_module: Vec<(String, String)>,
    /// Load and unload LoRA adapters when asked.
    #[arg(long)]
    allow_lora_updating: bool,
    /// Seconds to load one.
    #[arg(long)]
    lora_load_seconds: Option<f64>,
    /// LoRA adapters that one batch may have.
    #[arg(long, default_value_t = 1)]
    max_loras: u32,
    /// Go wrong this way; may be repeated.
    #[arg(long)]
    fault: Vec<Fault>,
    /// Refuse connections for the first so many seconds.
    #[arg(long)]
    refuse_seconds: Option<f64>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Part {
    Prefill,
    Decode,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Wire {
    Vllm,
    Sglang,
    Tgi,
    /// TGI before it had OpenAI's routes.
    TgiNative,
    Trtllm,
    Llamacpp,
    Ollama,
    /// A text-level model of Triton's.
    Triton,
    /// A token-level one.
    TritonIds,
}

pub(super) async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, arguments.port));
    let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    let serves =
        format!("simulated {:?} serving {} at http://{}", arguments.engine, arguments.model, listener.local_addr()?);
    let bound = forebay_simulated_engine::bind(options(arguments)?, listener).await?;
    say!("{serves}");
    let stop = CancellationToken::new();
    let serving = forebay_simulated_engine::serve(bound, stop.clone());
    tokio::pin!(serving);
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        ended = serving.as_mut() => return Ok(ended?),
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
    stop.cancel();
    Ok(serving.await?)
}

fn options(arguments: Arguments) -> anyhow::Result<Options> {
    let seconds = |value: Option<f64>, flag| {
        value.map(Duration::try_from_secs_f64).transpose().with_context(|| format!("{flag} must be 0 or more"))
    };
    anyhow::ensure!(arguments.call_ms >= 0.0, "--call-ms must be 0 or more");
    anyhow::ensure!(arguments.speed > 0.0, "--speed must be more than 0");
    Ok(Options {
        engine: match arguments.engine {
            Wire::Vllm => EngineKind::Vllm,
            Wire::Sglang => EngineKind::Sglang,
            Wire::Tgi => EngineKind::Tgi,
            Wire::TgiNative => EngineKind::TgiNative,
            Wire::Trtllm => EngineKind::Trtllm,
            Wire::Llamacpp => EngineKind::Llamacpp,
            Wire::Ollama => EngineKind::Ollama,
            Wire::Triton => EngineKind::Triton,
            Wire::TritonIds => EngineKind::TritonIds,
        },
        model: arguments.model,
        tokenizer: arguments.tokenizer,
        max_model_len: arguments.max_model_len,
        timing: EngineConfig {
            prefill_tokens_per_s: arguments.prefill_tokens_per_s,
            step_ms: arguments.step_ms,
            step_ms_per_seq: arguments.step_ms_per_seq,
            kv_blocks: arguments.kv_blocks,
            block_tokens: arguments.block_tokens,
            max_batch: arguments.max_batch,
            step_token_budget: arguments.step_token_budget,
            caches_late: matches!(arguments.engine, Wire::Sglang),
        },
        seed: arguments.seed,
        recite: arguments.recite,
        speed: arguments.speed,
        call_ms: arguments.call_ms,
        api_keys: arguments.api_key,
        max_queued_requests: arguments.max_num_queued_reqs,
        stream_keep_alive: seconds(arguments.sse_keep_alive_interval, "--sse-keep-alive-interval")?,
        kv_events: arguments.kv_events.map(|events| KvEventOptions {
            events,
            replay: arguments.kv_events_replay,
            form: if arguments.kv_events_arrays { KvEventForm::Arrays } else { KvEventForm::Maps },
            buffer_steps: arguments.kv_events_buffer_steps,
        }),
        faults: arguments.fault,
        pair_role: match arguments.role {
            None => PairRole::None,
            Some(Part::Prefill) => PairRole::Prefill,
            Some(Part::Decode) => PairRole::Decode,
        },
        kv_lease: seconds(Some(arguments.kv_lease_seconds), "--kv-lease-seconds")?.unwrap_or_default(),
        sleep_mode: arguments.enable_sleep_mode,
        asleep: arguments.asleep,
        wake_time: seconds(arguments.wake_seconds, "--wake-seconds")?.unwrap_or_default(),
        sleep_time: seconds(arguments.sleep_seconds, "--sleep-seconds")?.unwrap_or_default(),
        adapters: arguments.lora_module,
        adapter_updates: arguments.allow_lora_updating,
        adapter_load_time: seconds(arguments.lora_load_seconds, "--lora-load-seconds")?.unwrap_or_default(),
        adapters_max: arguments.max_loras,
        refuse_at_start: seconds(arguments.refuse_seconds, "--refuse-seconds")?,
        ..Options::default()
    })
}

/// A name and a path.
fn adapter(text: &str) -> Result<(String, String), String> {
    let (name, path) =
        text.split_once('=').filter(|(name, path)| !name.is_empty() && !path.is_empty()).ok_or("must be name=path")?;
    Ok((name.to_owned(), path.to_owned()))
}
