//! What a simulated engine is started with. Plain values: command line and tests fill them.

use std::{ops::RangeInclusive, path::PathBuf, time::Duration};

use forebay_simulator::EngineConfig;

use crate::{faults::Fault, kv_events::KvEventOptions};

/// Whose wire the server speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineKind {
    /// vLLM 0.32.0's OpenAI-compatible server.
    #[default]
    Vllm,
    /// SGLang 0.5.
    Sglang,
    /// TGI 3.3.
    Tgi,
    /// TGI before it had OpenAI's routes.
    TgiNative,
    /// TensorRT-LLM's `trtllm-serve`.
    Trtllm,
    /// llama.cpp's server.
    Llamacpp,
    /// Ollama 0.33.
    Ollama,
    /// Triton with TensorRT-LLM: a model that takes and gives text.
    Triton,
    /// The same with one that takes and gives token ids.
    TritonIds,
}

/// Settings of one server.
#[derive(Clone, Debug)]
pub struct Options {
    pub engine: EngineKind,
    /// The name it serves its model under.
    pub model: String,
    /// Directory with `tokenizer.json` and `tokenizer_config.json`; `None` is the built-in model.
    pub tokenizer: Option<PathBuf>,
    /// Context length: prompt and output, in tokens.
    pub max_model_len: u32,
    pub timing: EngineConfig,
    /// Equal seeds give equal texts for equal prompts.
    pub seed: u64,
    /// Says one text to everybody, and goes on with it where a prompt ends within it.
    pub recite: bool,
    /// How many times faster than the timing model says the server runs; more than zero.
    pub speed: f64,
    /// How long an answer is that nothing else bounds, end token included.
    pub output_tokens: RangeInclusive<u32>,
    /// Length of an embedding.
    pub embedding_dimensions: u32,
    /// What the server itself takes for each call for embeddings, rankings or scores before the engine sees it, one call
    /// after the other: a real one parses, tokenizes and answers in one Python thread.
    pub call_ms: f64,
    /// Accepted bearer tokens; none means that no key is asked for.
    pub api_keys: Vec<String>,
    /// vLLM's `--max-num-queued-reqs`: more running and waiting sequences than this are refused with 503.
    pub max_queued_requests: Option<u32>,
    /// vLLM's `--enable-prompt-tokens-details`: tells cached tokens in `usage`.
    pub prompt_tokens_details: bool,
    /// vLLM's `--sse-keep-alive-interval`: silence in a stream after which a comment is sent.
    pub stream_keep_alive: Option<Duration>,
    /// Silence after which an idle connection is closed. vLLM's default is 5 s.
    pub connection_keep_alive: Duration,
    /// vLLM's `--kv-events-config`: whether and where changes of the prefix cache are published.
    pub kv_events: Option<KvEventOptions>,
    /// vLLM's `--enable-sleep-mode`, with the routes that a server in development mode has.
    pub sleep_mode: bool,
    /// It sleeps at the start.
    pub asleep: bool,
    /// Time to wake.
    pub wake_time: Duration,
    /// Time to fall asleep.
    pub sleep_time: Duration,
    /// vLLM's `--lora-modules`: names and paths of the LoRA adapters that it begins with.
    pub adapters: Vec<(String, String)>,
    /// vLLM's `VLLM_ALLOW_RUNTIME_LORA_UPDATING`: whether it loads and unloads others when asked.
    pub adapter_updates: bool,
    /// Time to load one.
    pub adapter_load_time: Duration,
    /// vLLM's `--max-loras`: adapters that one batch may have.
    pub adapters_max: u32,
    pub faults: Vec<Fault>,
    /// Refuses connections for this long after the start.
    pub refuse_at_start: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            engine: EngineKind::default(),
            model: "forebay-simulated".to_owned(),
            tokenizer: None,
            max_model_len: 32_768,
            timing: EngineConfig::default(),
            seed: 0,
            recite: false,
            speed: 1.0,
            output_tokens: 20..=120,
            embedding_dimensions: 32,
            call_ms: 0.0,
            api_keys: Vec::new(),
            max_queued_requests: None,
            prompt_tokens_details: true,
            stream_keep_alive: None,
            connection_keep_alive: Duration::from_secs(5),
            kv_events: None,
            sleep_mode: false,
            asleep: false,
            wake_time: Duration::ZERO,
            sleep_time: Duration::ZERO,
            adapters: Vec::new(),
            adapter_updates: false,
            adapter_load_time: Duration::ZERO,
            adapters_max: 1,
            faults: Vec::new(),
            refuse_at_start: None,
        }
    }
}
