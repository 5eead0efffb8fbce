//! What chat and completion requests have in common: sampling fields, limits, and putting the answers into the engine.
//!
//! Types are checked first and ranges second, as in vLLM: a wrong type is refused before an unknown model, a value out of
//! range after it.

use std::sync::Arc;

use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{error::Failure, fields::Fields};
use crate::{
    EngineKind,
    driver::{End, Job, Refused, Run},
    kv_events::Content,
    output::{Finish, Limits, Output},
    server::Service,
};

/// vLLM's `--max-logprobs` default.
const LOGPROBS_MAX: i64 = 20;

/// Most choices of one prompt, as in vLLM.
const CHOICES_MAX: i64 = 16_384;

/// Most tokens that all choices of one request may have. Not vLLM's: all tokens of an answer are in memory here.
const TOKENS_MAX: u64 = 4 << 20;

/// The common fields, types checked.
#[derive(Debug)]
pub(crate) struct Common {
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) continuous_usage: bool,
    pub(crate) return_token_ids: bool,
    pub(crate) request_id: Option<String>,
    model: Option<String>,
    stream_options: bool,
    n: i64,
    tokens_max: Option<i64>,
    tokens_min: i64,
    ignore_end: bool,
    include_stop: bool,
    stop: Vec<String>,
    stop_ids: Vec<u32>,
    seed: i64,
    temperature: f64,
    top_p: f64,
    cache_salt: Option<String>,
    /// Ollama's `truncate: false`; else a prompt that leaves no room there loses its beginning.
    pub(crate) strict: bool,
}

impl Common {
    /// Reads the fields; `limits` names those that may hold the number of tokens, the stronger first.
    pub(crate) fn read(fields: &Fields<'_>, limits: &[&str]) -> Result<Self, Failure> {
        let mut tokens_max = None;
        for name in limits {
            tokens_max = tokens_max.or(fields.integer(name)?);
        }
        let stream_options = fields.object("stream_options")?;
        let option = |name| match stream_options {
            Some(object) => Fields::at(object, "body.stream_options").boolean(name).map(Option::unwrap_or_default),
            None => Ok(false),
        };
        let stop = match fields.get("stop") {
            Some(Value::String(text)) => vec![text.clone()],
            Some(_) => {
                let list = fields.list("stop")?.into_iter().flatten();
                list.filter_map(Value::as_str).map(str::to_owned).collect()
            }
            None => Vec::new(),
        };
        // Read for their types alone.
        for name in ["presence_penalty", "frequency_penalty", "repetition_penalty", "min_p"] {
            fields.number(name)?;
        }
        for name in ["top_k", "priority"] {
            fields.integer(name)?;
        }
        Ok(Self {
            stream: fields.boolean("stream")?.unwrap_or_default(),
            include_usage: option("include_usage")?,
            continuous_usage: option("continuous_usage_stats")?,
            return_token_ids: fields.boolean("return_token_ids")?.unwrap_or_default(),
            request_id: fields.text("request_id")?.map(str::to_owned),
            model: fields.text("model")?.map(str::to_owned),
            stream_options: stream_options.is_some(),
            n: fields.integer("n")?.unwrap_or(1),
            tokens_max,
            tokens_min: fields.integer("min_tokens")?.unwrap_or_default(),
            ignore_end: fields.boolean("ignore_eos")?.unwrap_or_default(),
            include_stop: fields.boolean("include_stop_str_in_output")?.unwrap_or_default(),
            stop,
            stop_ids: fields.ids("stop_token_ids")?.unwrap_or_default(),
            seed: fields.integer("seed")?.unwrap_or_default(),
            temperature: fields.number("temperature")?.unwrap_or(1.0),
            top_p: fields.number("top_p")?.unwrap_or(1.0),
            cache_salt: fields.text("cache_salt")?.map(str::to_owned),
            strict: false,
        })
    }

    /// The name that the answer bears.
    pub(crate) fn answers_as(&self, service: &Service) -> String {
        self.adapter(service).unwrap_or(&service.options.model).to_owned()
    }

    /// The adapter that is asked for.
    fn adapter(&self, service: &Service) -> Option<&str> {
        self.model.as_deref().filter(|model| *model != service.options.model)
    }

    /// Refuses what vLLM refuses for its value.
    pub(crate) fn check(&self, service: &Service) -> Result<(), Failure> {
        check_model(service, self.model.as_deref())?;
        if self.stream_options && !self.stream {
            let message = "Stream options can only be defined when `stream=True`. (parameter=stream_options)";
            return Err(Failure::bad_request(message, Some("stream_options")));
        }
        if self.n < 1 {
            return Err(Failure::bad_request(&format!("n must be at least 1, got {}.", self.n), None));
        }
        if self.n > CHOICES_MAX {
            let message = format!("n must be at most {CHOICES_MAX}, got {}.", self.n);
            return Err(Failure::bad_request(&message, None));
        }
        if self.temperature < 0.0 {
            let message = format!("temperature must be non-negative, got {:?}.", self.temperature);
            return Err(Failure::out_of_range(&message, "temperature", &format!("{:?}", self.temperature)));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            let message = format!("top_p must be in (0, 1], got {:?}.", self.top_p);
            return Err(Failure::out_of_range(&message, "top_p", &format!("{:?}", self.top_p)));
        }
        if let Some(max) = self.tokens_max {
            let context = service.options.max_model_len;
            if max < 1 {
                let message = format!("max_tokens must be at least 1, got {max}.");
                return Err(Failure::out_of_range(&message, "max_tokens", &max.to_string()));
            }
            if max > i64::from(context) {
                let message = format!(
                    "max_tokens={max} cannot be greater than max_model_len={context}. Please request fewer output tokens."
                );
                return Err(Failure::out_of_range(&message, "max_tokens", &max.to_string()));
            }
        }
        Ok(())
    }

    /// The limits of an answer to a prompt of this length; `default_max` bounds one that names no limit.
    fn limits(&self, service: &Service, prompt_tokens: u32, default_max: u32) -> Result<Limits, Failure> {
        let context = service.options.max_model_len;
        let left = context.checked_sub(prompt_tokens).filter(|left| *left > 0);
        let Some(left) = left else { return Err(too_long(context)) };
        let asked = self.tokens_max.and_then(|max| u32::try_from(max).ok());
        if let Some(asked) = asked.filter(|asked| *asked > left) {
            let total = u64::from(prompt_tokens) + u64::from(asked);
            let message = format!(
                "This model's maximum context length is {context} tokens. However, you requested {asked} output tokens \
                 and your prompt contains at least {prompt_tokens} input tokens, for a total of at least {total} tokens. \
                 Please reduce the length of the input prompt or the number of requested output tokens."
            );
            return Err(Failure::out_of_range(&message, "input_tokens", &prompt_tokens.to_string()));
        }
        Ok(Limits {
            tokens_max: asked.unwrap_or_else(|| default_max.min(left)),
            tokens_min: u32::try_from(self.tokens_min).unwrap_or_default(),
            ignore_end: self.ignore_end,
            stop: self.stop.clone(),
            stop_ids: self.stop_ids.clone(),
            include_stop: self.include_stop,
        })
    }

    /// Decides all answers and starts them. `say` gives the answer to a prompt under a seed.
    pub(crate) fn start(
        &self,
        service: &Arc<Service>,
        mut prompts: Vec<Vec<u32>>,
        default_max: u32,
        say: impl Fn(&[u32], u64, &Limits) -> Output,
    ) -> Result<Started, Failure> {
        let mut outputs = Vec::new();
        let mut jobs = Vec::new();
        let mut tokens = 0;
        if service.options.engine == EngineKind::Ollama && !self.strict {
            let room = service.options.max_model_len as usize / 2;
            prompts.iter_mut().for_each(|prompt| drop(prompt.drain(..prompt.len().saturating_sub(room))));
        }
        for prompt in &prompts {
            let prompt_tokens = u32::try_from(prompt.len()).unwrap_or(u32::MAX);
            let limits = self.limits(service, prompt_tokens, default_max)?;
            for choice in 0..self.n {
                let seed = service.options.seed ^ (self.seed as u64).rotate_left(32) ^ choice as u64;
                let output = say(prompt, seed, &limits);
                tokens += output.tokens.len() as u64;
                if tokens > TOKENS_MAX {
                    let message = format!("A simulated answer has at most {TOKENS_MAX} tokens in all its choices.");
                    return Err(Failure::bad_request(&message, None));
                }
                let end = if output.finish == Finish::Stop { End::Stop } else { End::Length };
                let output_tokens = u32::try_from(output.tokens.len()).unwrap_or(u32::MAX);
                let kept_apart = (self.cache_salt.clone(), self.adapter(service).map(str::to_owned));
                let content = content(service, (prompt, &output), kept_apart);
                jobs.push(Job { content, prompt_tokens, output_tokens, end });
                outputs.push(output);
            }
        }
        let run = service.driver.start(jobs).map_err(refusal)?;
        let choices = usize::try_from(self.n).unwrap_or(1);
        Ok(Started { prompts, outputs, choices, run })
    }
}

/// Answers under way.
pub(crate) struct Started {
    pub(crate) prompts: Vec<Vec<u32>>,
    /// Prompt by prompt, choice by choice.
    pub(crate) outputs: Vec<Output>,
    /// Choices of each prompt.
    pub(crate) choices: usize,
    pub(crate) run: Run,
}

impl Started {
    pub(crate) fn prompt_of(&self, choice: usize) -> &[u32] {
        self.prompts.get(choice / self.choices.max(1)).map_or(&[], Vec::as_slice)
    }
}

pub(crate) fn check_model(service: &Service, model: Option<&str>) -> Result<(), Failure> {
    match model {
        Some(model) if model != service.options.model && !service.adapters.has(model) => {
            Err(Failure::unknown_model(model, Some(&service.options.model)))
        }
        _ => Ok(()),
    }
}

pub(crate) fn check_logprobs(count: i64) -> Result<u32, Failure> {
    if count > LOGPROBS_MAX {
        let message =
            format!("Requested sample logprobs of {count}, which is greater than max allowed: {LOGPROBS_MAX}");
        return Err(Failure::out_of_range(&message, "logprobs", &count.to_string()));
    }
    u32::try_from(count).map_err(|_| {
        Failure::out_of_range(&format!("logprobs must be non-negative, got {count}."), "logprobs", &count.to_string())
    })
}

/// The refusal of a prompt that leaves no room for an answer. As in vLLM the number it tells is only a lower bound.
pub(crate) fn too_long(context: u32) -> Failure {
    let least = u64::from(context) + 1;
    let message = format!(
        "This model's maximum context length is {context} tokens. However, your prompt contains at least {least} input \
         tokens, which exceeds this limit even without any output tokens. Please reduce the length of the input prompt."
    );
    Failure::out_of_range(&message, "input_tokens", &least.to_string())
}

pub(crate) fn refusal(refused: Refused) -> Failure {
    match refused {
        Refused::Full => Failure::full(),
        Refused::TooLarge => Failure::bad_request("The request is larger than the KV cache.", None),
    }
}

/// The full blocks of prompt and answer with their chained hashes. A salt makes the first, and so all, differ; and so does
/// an adapter.
fn content(
    service: &Service,
    (prompt, output): (&[u32], &Output),
    (salt, adapter): (Option<String>, Option<String>),
) -> Content {
    let size = service.options.timing.block_tokens.max(1) as usize;
    let mut ids: Vec<u32> = prompt.iter().copied().chain(output.tokens.iter().map(|token| token.id)).collect();
    ids.truncate(ids.len() - ids.len() % size);
    let of_adapter = xxh3_64_with_seed(adapter.as_deref().unwrap_or_default().as_bytes(), 0);
    let mut parent = xxh3_64_with_seed(salt.as_deref().unwrap_or_default().as_bytes(), of_adapter);
    let chained = ids.chunks_exact(size).map(|block| {
        parent = crate::output::hash(block, parent);
        parent
    });
    Content { blocks: chained.collect(), ids, salt, adapter }
}
