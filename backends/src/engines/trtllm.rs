//! TensorRT-LLM's `trtllm-serve` (the 1.3 and 1.4 line), over HTTP.

use forebay_proto::peek::HARMLESS;
use serde_json::Value;

use super::{
    Api, Asked, Engine, Load, Mark, Members, Prepared, Totals, Translation, Unsupported,
    tidy::{THINKING, Tidy},
};

pub(super) struct TrtLlm;

impl Engine for TrtLlm {
    fn name(&self) -> &'static str {
        "trtllm"
    }

    fn mark(&self) -> Mark {
        Mark::Owner("tensorrt_llm")
    }

    fn health_paths(&self) -> &'static [&'static str] {
        &["/health"]
    }

    fn version_path(&self) -> Option<&'static str> {
        Some("/version")
    }

    /// Needs `enable_iter_perf_stats: true`. Its Prometheus page is fed from the same queue, only when requests end.
    fn load_paths(&self) -> &'static [&'static str] {
        &["/metrics"]
    }

    /// Each reading takes the entries away, and waits up to 2 s where there are none.
    fn load_drains(&self) -> bool {
        true
    }

    /// The last entry is the state now. None at all: nothing ran since the last reading, or nothing is recorded.
    fn read_load(&self, answer: &[u8]) -> Option<Load> {
        let entries: Vec<Value> = serde_json::from_slice(answer).ok()?;
        let last = entries.last()?;
        let number = |object: Option<&Value>, key| object?.get(key)?.as_u64();
        let count = |key| number(Some(last), key).map(|count| u32::try_from(count).unwrap_or(u32::MAX));
        let cache = last.get("kvCacheStats");
        let (blocks, used) =
            (number(cache, "maxNumBlocks").filter(|&blocks| blocks > 0), number(cache, "usedNumBlocks"));
        let block_tokens =
            number(cache, "tokensPerBlock").and_then(|tokens| u32::try_from(tokens).ok()).filter(|&n| n > 0);
        #[expect(clippy::cast_precision_loss, reason = "numbers of blocks are far below 2^52")]
        let usage = |used: u64, blocks: u64| (used as f64 / blocks as f64).min(1.0);
        Some(Load {
            running: count("numActiveRequests")?,
            waiting: count("numQueuedRequests")?,
            kv_usage: used.zip(blocks).map(|(used, blocks)| usage(used, blocks)),
            block_tokens,
            kv_tokens: blocks.zip(block_tokens).map(|(blocks, tokens)| blocks.saturating_mul(tokens.into())),
            sleeping: false,
            adapters_max: None,
            totals: Totals::default(),
        })
    }

    fn takes_ids(&self, api: Api) -> bool {
        api == Api::Completions
    }

    fn serves(&self, api: Api) -> bool {
        matches!(api, Api::ChatCompletions | Api::Completions | Api::Embeddings)
    }

    fn rewrites(&self) -> bool {
        true
    }

    /// It refuses every field that it does not know, by name; those that only say who asks are taken out before.
    fn adapt(&self, asked: Asked) -> Result<Prepared, Unsupported> {
        let body = asked.body.clone();
        let Some(mut members) = Members::read(&body) else { return Ok(Prepared::untouched(asked)) };
        for name in HARMLESS {
            members.remove(name);
        }
        // It takes one of the two names.
        if members.get("max_completion_tokens").is_some() {
            members.remove("max_tokens");
        }
        if !asked.streamed {
            members.remove("stream_options");
        }
        let translation = (asked.api == Api::ChatCompletions).then(|| Translation::new(Tidy(&[THINKING])));
        Ok(Prepared { body: members.write(&body), translation, ..Prepared::untouched(asked) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_entry_is_now() {
        let answer = br#"[{"iter":1,"numActiveRequests":9,"numQueuedRequests":9},
            {"iter":2,"numActiveRequests":3,"numQueuedRequests":1,"gpuMemUsage":1,
             "kvCacheStats":{"maxNumBlocks":100,"freeNumBlocks":75,"usedNumBlocks":25,"tokensPerBlock":32}}]"#;
        let load = TrtLlm.read_load(answer).expect("a load");
        assert_eq!((load.running, load.waiting, load.kv_usage), (3, 1, Some(0.25)));
        assert_eq!((load.block_tokens, load.kv_tokens), (Some(32), Some(3200)));
        for none in [&b"[]"[..], b"[{}]", b"{}", b"", br#"[{"numActiveRequests":1}]"#] {
            assert_eq!(TrtLlm.read_load(none), None);
        }
        let bare = TrtLlm.read_load(br#"[{"numActiveRequests":1,"numQueuedRequests":0,"kvCacheStats":null}]"#);
        assert_eq!(bare.expect("a load").kv_usage, None);
    }
}
