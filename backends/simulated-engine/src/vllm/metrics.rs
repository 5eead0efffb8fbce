//! `/metrics`: the series of vLLM that describe load, caches and latency, in Prometheus' text format.
//!
//! Not here: series of parts that the simulated engine does not have (KV transfer, speculative decoding, Python).

use std::fmt::Write as _;

use bytes::Bytes;
use http::{HeaderValue, StatusCode, header};

use crate::{
    driver::Histogram,
    server::{Answer, Service},
};

pub(crate) fn answer(service: &Service) -> Answer {
    let text = HeaderValue::from_static("text/plain; version=1.0.0; charset=utf-8");
    let body = Bytes::from(render(service));
    Answer::Whole { status: StatusCode::OK, headers: vec![(header::CONTENT_TYPE, text)], body }
}

fn render(service: &Service) -> String {
    let (load, stats) = service.driver.load();
    let asleep = service.sleep.is_asleep();
    let mut page = Page { text: String::new(), model: escape(&service.options.model) };
    page.gauge("num_requests_running", "Number of requests in model execution batches.", f64::from(load.running));
    page.gauge("num_requests_waiting", "Number of requests waiting to be processed.", f64::from(load.waiting));
    page.family("num_requests_waiting_by_reason", "gauge", "Number of waiting requests by reason.");
    page.sample("num_requests_waiting_by_reason", r#",reason="capacity""#, f64::from(load.waiting));
    page.sample("num_requests_waiting_by_reason", r#",reason="deferred""#, 0.0);
    page.family("engine_sleep_state", "gauge", "Engine sleep state; awake = 1 means engine is awake.");
    for (state, value) in [("awake", !asleep), ("weights_offloaded", asleep), ("discard_all", false)] {
        page.sample("engine_sleep_state", &format!(r#",sleep_state="{state}""#), f64::from(u8::from(value)));
    }
    if service.options.adapter_updates || !service.options.adapters.is_empty() {
        page.family("lora_requests_info", "gauge", "Running stats on lora requests.");
        let most = service.options.adapters_max;
        let adapters = r#"running_lora_adapters="",waiting_lora_adapters="""#;
        page.line(format_args!(r#"vllm:lora_requests_info{{max_lora="{most}",{adapters}}} 1.0"#));
    }
    page.gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", load.kv_usage);
    let queries = "Prefix cache queries, in terms of number of queried tokens.";
    page.counter("prefix_cache_queries_total", queries, load.prefix_queries_tokens);
    let hits = "Prefix cache hits, in terms of number of cached tokens.";
    page.counter("prefix_cache_hits_total", hits, load.prefix_hits_tokens);
    page.counter("num_preemptions_total", "Cumulative number of preemption from the engine.", load.preemptions);
    page.counter("prompt_tokens_total", "Number of prefill tokens processed.", load.prompt_tokens);
    page.counter("generation_tokens_total", "Number of generation tokens processed.", load.generation_tokens);
    page.family("request_success_total", "counter", "Count of successfully processed requests.");
    // vLLM does not count clients that left under `abort`.
    let reasons = [("stop", stats.stopped), ("length", stats.length), ("abort", 0), ("error", 0), ("repetition", 0)];
    for (reason, value) in reasons {
        page.success(reason, value);
    }
    page.family("admission_rejections_total", "counter", "Number of admission attempts rejected by a queue limit.");
    for (reason, value) in [("max_num_queued_reqs", stats.rejected), ("max_num_queued_tokens", 0)] {
        page.rejections(reason, value);
    }
    let ttft = "Histogram of time to first token in seconds.";
    page.histogram("time_to_first_token_seconds", ttft, &stats.ttft_seconds);
    page.histogram("inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", &stats.itl_seconds);
    let e2e = "Histogram of e2e request latency in seconds.";
    page.histogram("e2e_request_latency_seconds", e2e, &stats.e2e_seconds);
    page.cache_config(service);
    page.text
}

struct Page {
    text: String,
    /// The model's name, escaped for a label.
    model: String,
}

impl Page {
    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        // Writing to a string does not fail.
        let _ = self.text.write_fmt(line);
        self.text.push('\n');
    }

    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP vllm:{name} {help}"));
        self.line(format_args!("# TYPE vllm:{name} {kind}"));
    }

    /// Labels stand in alphabetical order; `more` come after the model's name.
    fn sample(&mut self, name: &str, more: &str, value: f64) {
        let model = self.model.clone();
        self.line(format_args!(r#"vllm:{name}{{engine="0",model_name="{model}"{more}}} {value:?}"#));
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.family(name, "gauge", help);
        self.sample(name, "", value);
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.family(name, "counter", help);
        self.sample(name, "", value as f64);
    }

    fn success(&mut self, reason: &str, value: u64) {
        let (model, value) = (self.model.clone(), value as f64);
        let name = "vllm:request_success_total";
        self.line(format_args!(r#"{name}{{engine="0",finished_reason="{reason}",model_name="{model}"}} {value:?}"#));
    }

    fn rejections(&mut self, reason: &str, value: u64) {
        let (model, value) = (self.model.clone(), value as f64);
        self.line(format_args!(
            r#"vllm:admission_rejections_total{{model_name="{model}",reason="{reason}"}} {value:?}"#
        ));
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.family(name, "histogram", help);
        let model = self.model.clone();
        let mut total = 0;
        let bounds = histogram.bounds.iter().map(|bound| format!("{bound:?}")).chain(["+Inf".to_owned()]);
        for (bound, count) in bounds.zip(&histogram.counts) {
            total += count;
            let value = total as f64;
            self.line(format_args!(r#"vllm:{name}_bucket{{engine="0",le="{bound}",model_name="{model}"}} {value:?}"#));
        }
        self.sample(&format!("{name}_count"), "", total as f64);
        self.sample(&format!("{name}_sum"), "", histogram.sum);
    }

    fn cache_config(&mut self, service: &Service) {
        let timing = &service.options.timing;
        let (block, blocks) = (timing.block_tokens.max(1), timing.kv_blocks);
        let tokens = u64::from(block) * u64::from(blocks);
        self.family("cache_config_info", "gauge", "Information of the LLMEngine CacheConfig");
        self.line(format_args!(
            "vllm:cache_config_info{{block_size=\"{block}\",cache_dtype=\"auto\",enable_prefix_caching=\"True\",\
             engine=\"0\",gpu_memory_utilization=\"0.92\",kv_cache_size_tokens=\"{tokens}\",num_cpu_blocks=\"None\",\
             num_gpu_blocks=\"{blocks}\",prefix_caching_hash_algo=\"sha256\"}} 1.0"
        ));
    }
}

fn escape(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
