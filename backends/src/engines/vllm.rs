//! vLLM: releases 0.10 to 0.33, and older ones as far as their metrics' names are known.

use forebay_proto::metrics_text::{Sample, samples};

use bytes::Bytes;
use http::HeaderName;

use super::{AdapterPaths, Api, Asked, Dormant, Engine, Load, Mark, Prepared, Totals, Unsupported, tally::Tally};

pub(super) struct Vllm;

impl Engine for Vllm {
    fn name(&self) -> &'static str {
        "vllm"
    }

    fn mark(&self) -> Mark {
        Mark::Owner("vllm")
    }

    /// 503 once the engine process is dead, 200 also while it sleeps: [`Load::sleeping`] tells that.
    fn health_paths(&self) -> &'static [&'static str] {
        &["/health"]
    }

    fn version_path(&self) -> Option<&'static str> {
        Some("/version")
    }

    fn load_paths(&self) -> &'static [&'static str] {
        &["/metrics"]
    }

    fn read_load(&self, metrics: &[u8]) -> Option<Load> {
        read(metrics, |_| true)
    }

    fn read_load_of(&self, metrics: &[u8], rank: u32) -> Option<Load> {
        let rank = rank.to_string();
        read(metrics, |of| of.is_none_or(|of| of == rank))
    }

    fn rank_header(&self) -> Option<HeaderName> {
        Some(HeaderName::from_static("x-data-parallel-rank"))
    }

    fn kv_sources_path(&self) -> Option<&'static str> {
        Some("/kv_event_sources")
    }

    fn takes_ids(&self, api: Api) -> bool {
        api == Api::Completions
    }

    /// Level 1, weights to the host's memory: after level 2 they would have to be loaded by other means before an answer
    /// makes sense. It finishes what it has first, where releases know `mode`; we send nothing to one that is to sleep.
    fn dormant(&self) -> Option<Dormant> {
        Some(Dormant {
            sleep: |_| ("/sleep?level=1&mode=wait", Bytes::new()),
            wake: |_| ("/wake_up", Bytes::new()),
            asks: "/is_sleeping",
            reads: |answer, _| serde_json::from_slice::<serde_json::Value>(answer).ok()?.get("is_sleeping")?.as_bool(),
        })
    }

    /// Both are there only where the server was started with `VLLM_ALLOW_RUNTIME_LORA_UPDATING`.
    fn adapter_paths(&self) -> Option<AdapterPaths> {
        Some(AdapterPaths { load: "/v1/load_lora_adapter", unload: "/v1/unload_lora_adapter" })
    }

    fn serves(&self, _: Api) -> bool {
        true
    }

    fn merges(&self, api: Api) -> bool {
        matches!(api, Api::Embeddings | Api::Rerank | Api::Score | Api::Pooling | Api::Classify)
    }

    /// It has no `/v1/classify`.
    fn adapt(&self, asked: Asked) -> Result<Prepared, Unsupported> {
        let path = if asked.api == Api::Classify { "/classify" } else { asked.api.path() };
        Ok(Prepared { path, ..Prepared::untouched(asked) })
    }
}

/// The load of those ranks of which `counts` says so, by the label `engine`.
fn read(metrics: &[u8], counts: impl Fn(Option<&str>) -> bool) -> Option<Load> {
    let mut reading = Reading::default();
    for sample in samples(metrics).filter(|sample| counts(sample.labels.get("engine").as_deref())) {
        reading.take(&sample);
    }
    reading.load()
}

/// What is gathered from the text, over all ranks (label `engine`) of a data-parallel server.
#[derive(Default)]
struct Reading {
    running: Tally,
    waiting: Tally,
    kv_usage: Tally,
    block_tokens: Option<u32>,
    kv_tokens: Tally,
    sleeping: bool,
    adapters_max: Option<u32>,
    prompt_tokens: Tally,
    generation_tokens: Tally,
    preemptions: Tally,
    prefix_queries: Tally,
    prefix_hits: Tally,
    /// Before 0.10 the metrics of the cache said `gpu`; some releases export both names.
    old_prefix_queries: Tally,
    old_prefix_hits: Tally,
}

impl Reading {
    fn take(&mut self, sample: &Sample<'_>) {
        let tally = match sample.name {
            "vllm:num_requests_running" => &mut self.running,
            "vllm:num_requests_waiting" => &mut self.waiting,
            // A fraction, despite its name. Where both names stand they say the same, so the mean is right.
            "vllm:kv_cache_usage_perc" | "vllm:gpu_cache_usage_perc" => &mut self.kv_usage,
            "vllm:prompt_tokens_total" => &mut self.prompt_tokens,
            "vllm:generation_tokens_total" => &mut self.generation_tokens,
            "vllm:num_preemptions_total" => &mut self.preemptions,
            "vllm:prefix_cache_queries_total" => &mut self.prefix_queries,
            "vllm:prefix_cache_hits_total" => &mut self.prefix_hits,
            "vllm:gpu_prefix_cache_queries_total" => &mut self.old_prefix_queries,
            "vllm:gpu_prefix_cache_hits_total" => &mut self.old_prefix_hits,
            "vllm:engine_sleep_state" => {
                let awake = sample.labels.get("sleep_state").is_none_or(|state| state == "awake");
                self.sleeping |= !awake && sample.value > 0.0;
                return;
            }
            "vllm:lora_requests_info" => {
                let most = sample.labels.get("max_lora").and_then(|most| most.parse().ok());
                self.adapters_max = self.adapters_max.max(most);
                return;
            }
            "vllm:cache_config_info" => return self.take_cache(sample),
            _ => return,
        };
        tally.add(sample.value);
    }

    /// One series per rank, its labels are the fields of vLLM's cache configuration; unset ones say `None`.
    fn take_cache(&mut self, sample: &Sample<'_>) {
        let number = |label| sample.labels.get(label).and_then(|value| value.parse::<u32>().ok()).filter(|&n| n > 0);
        let block_tokens = number("block_size");
        self.block_tokens = self.block_tokens.or(block_tokens);
        // The first is right for hybrid models too, whose blocks do not each hold tokens of their own; older releases
        // have only the others.
        let tokens = number("kv_cache_size_tokens").map(f64::from);
        let blocks = || Some(f64::from(number("num_gpu_blocks")?) * f64::from(block_tokens?));
        if let Some(tokens) = tokens.or_else(blocks) {
            self.kv_tokens.add(tokens);
        }
    }

    /// `None` when the server was started with `--disable-log-stats`: then there are no metrics of the engine at all.
    fn load(self) -> Option<Load> {
        Some(Load {
            running: self.running.count()?,
            waiting: self.waiting.count()?,
            kv_usage: self.kv_usage.share(),
            block_tokens: self.block_tokens,
            kv_tokens: self.kv_tokens.total(),
            sleeping: self.sleeping,
            adapters_max: self.adapters_max.filter(|&most| most > 0),
            totals: Totals {
                prompt_tokens: self.prompt_tokens.total(),
                generation_tokens: self.generation_tokens.total(),
                prefix_queries: self.prefix_queries.total().or(self.old_prefix_queries.total()),
                prefix_hits: self.prefix_hits.total().or(self.old_prefix_hits.total()),
                preemptions: self.preemptions.total(),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn load(text: &str) -> Option<Load> {
        Vllm.read_load(text.as_bytes())
    }

    #[test]
    fn ranks_are_added_up_and_shares_averaged() {
        let load = load(
            r#"vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 0.0
vllm:num_requests_waiting{engine="1",model_name="m"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
vllm:engine_sleep_state{engine="0",sleep_state="awake"} 1.0
vllm:engine_sleep_state{engine="0",sleep_state="weights_offloaded"} 0.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 1e3
vllm:prompt_tokens_total{engine="1",model_name="m"} 500.0
vllm:cache_config_info{block_size="16",engine="0",kv_cache_size_tokens="None",num_gpu_blocks="100"} 1.0
vllm:cache_config_info{block_size="16",engine="1",kv_cache_size_tokens="1500",num_gpu_blocks="100"} 1.0
"#,
        )
        .expect("a load");
        assert_eq!((load.running, load.waiting, load.kv_usage), (7, 2, Some(0.5)));
        assert_eq!((load.block_tokens, load.kv_tokens, load.sleeping), (Some(16), Some(3100), false));
        assert_eq!((load.totals.prompt_tokens, load.totals.generation_tokens), (Some(1500), None));
    }

    #[test]
    fn one_rank_alone() {
        let text = "vllm:num_requests_running{engine=\"0\"} 3\nvllm:num_requests_running{engine=\"1\"} 4\n\
                    vllm:num_requests_waiting{engine=\"0\"} 0\nvllm:num_requests_waiting{engine=\"1\"} 2\n";
        let of = |rank| Vllm.read_load_of(text.as_bytes(), rank).map(|load| (load.running, load.waiting));
        assert_eq!([0, 1, 2].map(of), [Some((3, 0)), Some((4, 2)), None]);
    }

    #[test]
    fn old_names() {
        let text = "vllm:num_requests_running 1\nvllm:num_requests_waiting 2\nvllm:gpu_cache_usage_perc 0.5\n\
                    vllm:gpu_prefix_cache_queries_total 10\nvllm:gpu_prefix_cache_hits_total 4\n";
        let old = load(text).expect("a load");
        assert_eq!((old.kv_usage, old.totals.prefix_queries, old.totals.prefix_hits), (Some(0.5), Some(10), Some(4)));
        let both = format!("{text}vllm:prefix_cache_queries_total 10\nvllm:prefix_cache_hits_total 4\n");
        assert_eq!(load(&both).expect("a load").totals, old.totals);
    }

    #[test]
    fn a_server_asleep() {
        let text = "vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n\
                    vllm:engine_sleep_state{sleep_state=\"awake\"} 0.0\n\
                    vllm:engine_sleep_state{sleep_state=\"discard_all\"} 1.0\n";
        assert!(load(text).expect("a load").sleeping);
    }

    #[test]
    fn places_for_adapters() {
        let text = "vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n\
                    vllm:lora_requests_info{max_lora=\"4\",running_lora_adapters=\"\",waiting_lora_adapters=\"\"} 1.7e9\n\
                    vllm:lora_requests_info{max_lora=\"4\",running_lora_adapters=\"a\",waiting_lora_adapters=\"\"} 1.8e9\n";
        assert_eq!(load(text).expect("a load").adapters_max, Some(4));
        let none = text.replace("\"4\"", "\"0\"");
        assert_eq!(load(&none).expect("a load").adapters_max, None);
    }

    #[test]
    fn texts_that_do_not_tell() {
        for text in ["", "process_open_fds 54.0\n", "vllm:num_requests_running 1\n", "<html></html>"] {
            assert_eq!(load(text), None, "{text:?}");
        }
        let nan = "vllm:num_requests_running NaN\nvllm:num_requests_waiting 1\n";
        assert_eq!(load(nan), None);
    }

    #[test]
    fn strange_values_are_bounded() {
        let text = "vllm:num_requests_running 1e300\nvllm:num_requests_waiting 1\nvllm:kv_cache_usage_perc 7\n\
                    vllm:prompt_tokens_total +Inf\nvllm:cache_config_info{block_size=\"0\",num_gpu_blocks=\"-1\"} 1\n";
        let load = load(text).expect("a load");
        assert_eq!((load.running, load.kv_usage, load.totals.prompt_tokens), (u32::MAX, Some(1.0), None));
        assert_eq!((load.block_tokens, load.kv_tokens), (None, None));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = Vllm.read_load(&bytes);
        }
    }
}
