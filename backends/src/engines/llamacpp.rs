//! llama.cpp's `llama-server` (b11434, and the build of October 2026 whose bytes the tests read).

use forebay_proto::metrics_text::samples;

use super::{
    Api, Asked, Engine, Load, Mark, Members, Prepared, Totals, Translation, Unsupported, fields::limit_completion,
    tally::Tally, tidy,
};

pub(super) struct LlamaCpp;

impl Engine for LlamaCpp {
    fn name(&self) -> &'static str {
        "llamacpp"
    }

    fn mark(&self) -> Mark {
        Mark::Owner("llamacpp")
    }

    /// 503 while the model loads.
    fn health_paths(&self) -> &'static [&'static str] {
        &["/health"]
    }

    /// There only with `--metrics`.
    fn load_paths(&self) -> &'static [&'static str] {
        &["/metrics"]
    }

    fn read_load(&self, metrics: &[u8]) -> Option<Load> {
        let [mut running, mut waiting, mut prompt, mut cached, mut generated] = [Tally::default(); 5];
        for sample in samples(metrics) {
            match sample.name {
                "llamacpp:requests_processing" => running.add(sample.value),
                "llamacpp:requests_deferred" => waiting.add(sample.value),
                "llamacpp:prompt_tokens_total" => prompt.add(sample.value),
                "llamacpp:prompt_tokens_cached_total" => cached.add(sample.value),
                "llamacpp:tokens_predicted_total" => generated.add(sample.value),
                _ => {}
            }
        }
        // Its counter of prompt tokens leaves out those found in the cache.
        let asked = prompt.total().map(|prompt| prompt.saturating_add(cached.total().unwrap_or(0)));
        Some(Load {
            running: running.count()?,
            waiting: waiting.count()?,
            kv_usage: None,
            block_tokens: None,
            kv_tokens: None,
            sleeping: false,
            adapters_max: None,
            totals: Totals {
                prompt_tokens: asked,
                generation_tokens: generated.total(),
                prefix_queries: cached.total().and(asked),
                prefix_hits: cached.total(),
                preemptions: None,
            },
        })
    }

    /// Its `/tokenize` and `/detokenize` have a shape of their own (`content`), and answer vLLM's with an empty list.
    fn serves(&self, api: Api) -> bool {
        matches!(api, Api::ChatCompletions | Api::Completions | Api::Embeddings | Api::Rerank)
    }

    fn merges(&self, api: Api) -> bool {
        api == Api::Embeddings
    }

    fn adapt(&self, asked: Asked) -> Result<Prepared, Unsupported> {
        match asked.api {
            Api::ChatCompletions => {
                let translation = Some(Translation::new(tidy::Tidy(&[tidy::THINKING])));
                Ok(Prepared { translation, ..Prepared::untouched(asked) })
            }
            Api::Completions => {
                let body = asked.body.clone();
                let Some(mut members) = Members::read(&body) else { return Ok(Prepared::untouched(asked)) };
                limit_completion(asked.api, &mut members);
                Ok(Prepared { body: members.write(&body), ..Prepared::untouched(asked) })
            }
            _ => Ok(Prepared::untouched(asked)),
        }
    }

    fn rewrites(&self) -> bool {
        true
    }
}
