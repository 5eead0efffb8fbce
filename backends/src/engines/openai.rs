//! Any other server with OpenAI's API: SGLang, TGI, TensorRT-LLM, Ollama and what may come.
//!
//! Only what that API itself promises is used, so of its load nothing is known but what was sent there.

use super::{Api, Engine, Load, ServedModel};

pub(super) struct OpenAi;

impl Engine for OpenAi {
    fn name(&self) -> &'static str {
        "openai"
    }

    fn recognises(&self, _: &[ServedModel]) -> bool {
        true
    }

    /// The one path that all of them have. A `/health` may be missing (Ollama) or may wait for a generation of its own
    /// (SGLang, TGI), and then fails on a worker that is merely busy.
    fn health_path(&self) -> &'static str {
        "/v1/models"
    }

    fn version_path(&self) -> Option<&'static str> {
        None
    }

    fn metrics_path(&self) -> Option<&'static str> {
        None
    }

    fn read_load(&self, _: &[u8]) -> Option<Load> {
        None
    }

    fn serves(&self, api: Api) -> bool {
        match api {
            Api::ChatCompletions | Api::Completions | Api::Embeddings => true,
            Api::Tokenize | Api::Detokenize => false,
        }
    }

    /// OpenAI's own API does; TGI and Ollama refuse them.
    fn takes_token_ids(&self) -> bool {
        false
    }
}
