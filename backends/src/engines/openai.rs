//! Any other server with OpenAI's API.
//!
//! Only what that API itself promises is used, so of its load nothing is known but what was sent there.

use super::{Api, Engine, Mark};

pub(super) struct OpenAi;

impl Engine for OpenAi {
    fn name(&self) -> &'static str {
        "openai"
    }

    fn mark(&self) -> Mark {
        Mark::Any
    }

    /// The one path that all of them have. A `/health` may be missing or may wait for a generation of its own, and then
    /// fails on a worker that is merely busy.
    fn health_paths(&self) -> &'static [&'static str] {
        &["/v1/models"]
    }

    fn serves(&self, api: Api) -> bool {
        matches!(api, Api::ChatCompletions | Api::Completions | Api::Embeddings | Api::Rerank | Api::Score)
    }
}
