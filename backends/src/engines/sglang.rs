//! SGLang (0.5.23), over its OpenAI routes.

use bytes::Bytes;
use forebay_proto::metrics_text::{Sample, samples};
use serde_json::{Value, json};

use super::{
    AdapterPaths, Api, Asked, Engine, Load, Mark, Members, Prepared, ServedModel, Totals, Translation, Unsupported,
    answer::Translator,
    chunks::new_id,
    fields::refuse_unheeded,
    tally::Tally,
    tidy::{THINKING, Tidy},
};

pub(super) struct SgLang;

const HEEDED: &[&str] = &[
    "n",
    "echo",
    "suffix",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "presence_penalty",
    "reasoning_effort",
    "chat_template_kwargs",
    "parallel_tool_calls",
    "tool_choice",
    "response_format",
    "stop",
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop_token_ids",
    "stop_regex",
    "ignore_eos",
    "min_tokens",
    "continue_final_message",
    "regex",
    "ebnf",
];

/// Below this, blocks of our own do: its radix cache may have a grain of one token, and nobody
/// gains from hashes that fine.
const BLOCK_TOKENS_MIN: u32 = 16;

impl Engine for SgLang {
    fn name(&self) -> &'static str {
        "sglang"
    }

    fn mark(&self) -> Mark {
        Mark::Owner("sglang")
    }

    /// `/health` runs a generation of its own and is late on a busy server; releases without `/ready` have only the list
    /// of models beside it.
    fn health_paths(&self) -> &'static [&'static str] {
        &["/ready", "/v1/models"]
    }

    fn details_path(&self) -> Option<&'static str> {
        Some("/model_info")
    }

    /// The list's `root` is the served name over again.
    fn read_details(&self, body: &[u8], models: &mut Vec<ServedModel>) {
        let Ok(info) = serde_json::from_slice::<Value>(body) else { return };
        let text = |key| info.get(key).and_then(Value::as_str);
        if let Some(root) = text("tokenizer_path").or_else(|| text("model_path")) {
            models
                .iter_mut()
                .filter(|model| model.parent.is_none())
                .for_each(|model| model.root = Some(root.to_owned()));
        }
    }

    /// The first only with `--enable-metrics`; the second is always there in recent releases.
    fn load_paths(&self) -> &'static [&'static str] {
        &["/metrics", "/v1/loads"]
    }

    fn read_load(&self, answer: &[u8]) -> Option<Load> {
        if answer.trim_ascii_start().starts_with(b"{") { from_loads(answer) } else { from_metrics(answer) }
    }

    fn takes_ids(&self, api: Api) -> bool {
        api == Api::Completions
    }

    /// Its tree gets a chunk after the step that computes it; and what waits is looked up when it is admitted, first come,
    /// first served.
    fn caches_late(&self) -> bool {
        true
    }

    /// Refused where the server was started without `--enable-lora`.
    fn adapter_paths(&self) -> Option<AdapterPaths> {
        Some(AdapterPaths { load: "/load_lora_adapter", unload: "/unload_lora_adapter" })
    }

    fn adapter_name(&self, model: &str, adapter: &str) -> String {
        format!("{model}:{adapter}")
    }

    fn serves(&self, api: Api) -> bool {
        // Its `/v1/score` asks for the probability of labels; its `/tokenize` refuses a chat.
        matches!(api, Api::ChatCompletions | Api::Completions | Api::Embeddings | Api::Rerank | Api::Classify)
    }

    fn merges(&self, api: Api) -> bool {
        api == Api::Embeddings
    }

    fn rewrites(&self) -> bool {
        true
    }

    fn adapt(&self, asked: Asked) -> Result<Prepared, Unsupported> {
        match asked.api {
            Api::ChatCompletions | Api::Completions => {}
            Api::Rerank => {
                let translation = Some(Translation::new(Ranked));
                return Ok(Prepared { translation, ..Prepared::untouched(asked) });
            }
            _ => return Ok(Prepared::untouched(asked)),
        }
        let body = asked.body.clone();
        let Some(mut members) = Members::read(&body) else { return Ok(Prepared::untouched(asked)) };
        members.rename("include_stop_str_in_output", "no_stop_trim");
        refuse_unheeded(self.name(), &members, HEEDED)?;
        let translation = Some(Translation::new(Tidy(&[THINKING])));
        Ok(Prepared { body: members.write(&body), translation, ..Prepared::untouched(asked) })
    }
}

/// Its ranking is a bare list; vLLM's, as Jina's and Cohere's, has it under `results`.
struct Ranked;

impl Translator for Ranked {
    fn event(&mut self, _: &[u8], _: &mut Vec<u8>) -> bool {
        false
    }

    fn whole(&mut self, body: &Bytes) -> Option<Bytes> {
        let answer: Value = serde_json::from_slice(body).ok()?;
        let Some(list) = answer.as_array() else { return Some(body.clone()) };
        let tokens = |item: &Value| item.pointer("/meta_info/prompt_tokens").and_then(Value::as_u64);
        let total: u64 = list.iter().filter_map(tokens).fold(0, u64::saturating_add);
        let results = list.iter().map(|item| {
            let document = item.get("document").filter(|text| text.is_string()).map(|text| json!({"text": text}));
            json!({"index": item.get("index"), "document": document, "relevance_score": item.get("score")})
        });
        let results: Vec<Value> = results.collect();
        let usage = json!({"prompt_tokens": total, "total_tokens": total});
        Some(json!({"id": new_id("rerank"), "results": results, "usage": usage}).to_string().into())
    }
}

/// `/v1/loads`: an object for each data-parallel rank.
fn from_loads(answer: &[u8]) -> Option<Load> {
    let answer: Value = serde_json::from_slice(answer).ok()?;
    let [mut running, mut waiting, mut usage, mut capacity] = [Tally::default(); 4];
    for rank in answer.get("loads")?.as_array()? {
        let add = |tally: &mut Tally, key| tally.add(rank.get(key).and_then(Value::as_f64).unwrap_or(f64::NAN));
        add(&mut running, "num_running_reqs");
        add(&mut waiting, "num_waiting_reqs");
        add(&mut usage, "token_usage");
        add(&mut capacity, "max_total_num_tokens");
    }
    Some(Load {
        running: running.count()?,
        waiting: waiting.count()?,
        kv_usage: usage.share(),
        block_tokens: None,
        kv_tokens: capacity.total(),
        sleeping: false,
        adapters_max: None,
        totals: Totals::default(),
    })
}

fn from_metrics(text: &[u8]) -> Option<Load> {
    let [mut running, mut waiting, mut usage, mut capacity] = [Tally::default(); 4];
    let [mut prompt, mut generated, mut cached] = [Tally::default(); 3];
    let (mut block_tokens, mut adapters_max) = (None, None);
    for sample in samples(text).filter(is_whole) {
        match sample.name {
            "sglang:num_running_reqs" => running.add(sample.value),
            "sglang:num_queue_reqs" => waiting.add(sample.value),
            "sglang:token_usage" => usage.add(sample.value),
            "sglang:max_total_num_tokens" => capacity.add(sample.value),
            "sglang:prompt_tokens_total" => prompt.add(sample.value),
            "sglang:generation_tokens_total" => generated.add(sample.value),
            "sglang:cached_tokens_total" => cached.add(sample.value),
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "such casts saturate")]
            "sglang:page_size" => block_tokens = Some(sample.value as u32).filter(|&page| page >= BLOCK_TOKENS_MIN),
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "such casts saturate")]
            "sglang:lora_pool_slots_total" => adapters_max = Some(sample.value as u32).filter(|&slots| slots > 0),
            _ => {}
        }
    }
    Some(Load {
        running: running.count()?,
        waiting: waiting.count()?,
        kv_usage: usage.share(),
        block_tokens,
        kv_tokens: capacity.total(),
        sleeping: false,
        adapters_max,
        totals: Totals {
            prompt_tokens: prompt.total(),
            generation_tokens: generated.total(),
            prefix_queries: cached.total().and(prompt.total()),
            prefix_hits: cached.total(),
            preemptions: None,
        },
    })
}

/// Whether a series is a rank's own: each process of a tensor- or pipeline-parallel rank says the same again, and under
/// priority scheduling the series without a priority is the sum of the others.
fn is_whole(sample: &Sample<'_>) -> bool {
    let first = |label| sample.labels.get(label).is_none_or(|rank| rank == "0");
    first("tp_rank") && first("pp_rank") && sample.labels.get("priority").is_none_or(|priority| priority.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_added_up_but_not_their_processes() {
        let text = br#"sglang:num_running_reqs{dp_rank="0",tp_rank="0",priority=""} 3
sglang:num_running_reqs{dp_rank="0",tp_rank="0",priority="5"} 3
sglang:num_running_reqs{dp_rank="0",tp_rank="1"} 3
sglang:num_running_reqs{dp_rank="1",tp_rank="0"} 4
sglang:num_queue_reqs{tp_rank="0"} 2
sglang:token_usage{dp_rank="0",tp_rank="0"} 0.5
sglang:token_usage{dp_rank="1",tp_rank="0"} 0.25
sglang:max_total_num_tokens{tp_rank="0"} 1000
sglang:page_size{tp_rank="0"} 1
"#;
        let load = SgLang.read_load(text).expect("a load");
        assert_eq!((load.running, load.waiting, load.kv_usage), (7, 2, Some(0.375)));
        assert_eq!((load.kv_tokens, load.block_tokens), (Some(1000), None));
        let paged = SgLang.read_load(b"sglang:num_running_reqs 0\nsglang:num_queue_reqs 0\nsglang:page_size 64\n");
        assert_eq!(paged.expect("a load").block_tokens, Some(64));
    }

    #[test]
    fn loads_without_metrics() {
        let answer = br#"{"version":"0.5.23","loads":[
            {"dp_rank":0,"num_running_reqs":2,"num_waiting_reqs":1,"token_usage":0.5,"max_total_num_tokens":100},
            {"dp_rank":1,"num_running_reqs":1,"num_waiting_reqs":0,"token_usage":0.1,"max_total_num_tokens":100}]}"#;
        let load = SgLang.read_load(answer).expect("a load");
        assert_eq!((load.running, load.waiting, load.kv_usage, load.kv_tokens), (3, 1, Some(0.3), Some(200)));
        for none in [&b"{}"[..], br#"{"loads":[]}"#, br#"{"loads":[{}]}"#, b"{"] {
            assert_eq!(SgLang.read_load(none), None);
        }
    }
}
