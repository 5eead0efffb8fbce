//! The `usage` object in its variants.

use serde_json::{Map, Value, json};

use super::{object, request::Started};
use crate::{driver::Progress, server::Service};

/// Token counts of one answer or of all answers of a request.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub(crate) prompt: u64,
    pub(crate) completion: u64,
    cached: u64,
    /// Prompt tokens that this request left in the cache.
    created: u64,
}

impl Usage {
    /// Of a whole request; prompts count once, however many choices they have.
    pub(crate) fn of(service: &Service, started: &Started, progress: &[Progress]) -> Self {
        let block = u64::from(service.options.timing.block_tokens.max(1));
        let mut usage = Self::default();
        for (prompt, first) in started.prompts.iter().zip(progress.iter().step_by(started.choices.max(1))) {
            let tokens = prompt.len() as u64;
            let cached = u64::from(first.cached_tokens);
            usage.prompt += tokens;
            usage.cached += cached;
            usage.created += (tokens / block * block).saturating_sub(cached);
        }
        usage.completion = progress.iter().map(|progress| u64::from(progress.tokens)).sum();
        usage
    }

    fn counts(self) -> Map<String, Value> {
        object([
            ("prompt_tokens", self.prompt.into()),
            ("total_tokens", (self.prompt + self.completion).into()),
            ("completion_tokens", self.completion.into()),
        ])
    }

    /// In a whole answer.
    pub(crate) fn whole(self, service: &Service, chat: bool) -> Value {
        let mut usage = self.counts();
        let details = json!({
            "cached_tokens": self.cached,
            "created_cache_tokens": chat.then_some(self.created),
            "multimodal_tokens": null,
        });
        let shown = if service.options.prompt_tokens_details { details } else { Value::Null };
        usage.insert("prompt_tokens_details".to_owned(), shown);
        usage.insert("completion_tokens_details".to_owned(), Value::Null);
        Value::Object(usage)
    }

    /// In the usage chunk that ends a stream.
    pub(crate) fn last(self, service: &Service, chat: bool) -> Value {
        let mut usage = self.counts();
        if service.options.prompt_tokens_details {
            let mut details = object([("cached_tokens", self.cached.into())]);
            if chat {
                details.insert("created_cache_tokens".to_owned(), self.created.into());
            }
            usage.insert("prompt_tokens_details".to_owned(), details.into());
        }
        Value::Object(usage)
    }

    /// In every chunk of a stream with continuous usage: one choice so far.
    pub(crate) fn running(prompt: usize, completion: usize) -> Value {
        let mut usage = Self { prompt: prompt as u64, completion: completion as u64, ..Self::default() }.counts();
        usage.insert("completion_tokens_details".to_owned(), Value::Null);
        Value::Object(usage)
    }
}
