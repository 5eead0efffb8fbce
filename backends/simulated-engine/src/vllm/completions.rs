//! `/v1/completions`.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::{
    Caller, FINGERPRINT,
    error::Failure,
    fields::{self, Fields},
    logprobs, now_seconds, object, ok,
    request::{Common, Started, check_logprobs},
    stream::{self, Shape},
    tools::{self, Say},
    usage::Usage,
};
use crate::{
    output::{self, Finish, Output},
    server::{Answer, Service},
};

/// vLLM's (and OpenAI's) `max_tokens` for completions that name none.
const TOKENS_DEFAULT: u32 = 16;

pub(crate) async fn answer(
    service: &Arc<Service>,
    body: &Map<String, Value>,
    caller: &Caller,
) -> Result<Answer, Failure> {
    let fields = Fields::body(body);
    let common = Common::read(&fields, &["max_tokens"])?;
    let top = fields.integer("logprobs")?;
    let echo = fields.boolean("echo")?.unwrap_or_default();
    let say = tools::read(&fields, "")?;
    common.check(service)?;
    let top = top.map(check_logprobs).transpose()?;
    let special = fields.boolean("add_special_tokens")?.unwrap_or(true);
    let Some(prompts) = prompts(service, fields.get("prompt"), special) else {
        let message = "Either prompt or prompt_embeds must be provided and non-empty.";
        return Err(Failure::bad_request(message, Some("prompt")));
    };
    check_ids(service, &prompts)?;

    let range = service.options.output_tokens.clone();
    let started = common.start(service, prompts, TOKENS_DEFAULT, |prompt, seed, limits| match &say {
        Say::Text(text) => output::fixed(&service.model, "", text, limits),
        Say::Prose | Say::Call(_) => output::prose(&service.model, prompt, seed, &range, limits),
    })?;
    let completion = Completion {
        service: Arc::clone(service),
        id: caller.answer_id("cmpl", common.request_id.as_deref()),
        created: now_seconds(),
        model: common.answers_as(service),
        logprobs: top,
        echo,
        return_token_ids: common.return_token_ids,
        include_usage: common.include_usage,
        continuous_usage: common.include_usage && common.continuous_usage,
        offsets: vec![0; started.outputs.len()],
    };
    if common.stream {
        return Ok(Answer::Events(stream::events(service, &common, started, completion)));
    }
    Ok(ok(&completion.whole(started).await))
}

/// The token ids of a prompt or of several: text, ids, or a list of either. `None` when there is none.
pub(crate) fn prompts(service: &Service, value: Option<&Value>, special: bool) -> Option<Vec<Vec<u32>>> {
    let encode = |text: &str| service.model.encode(text, special);
    match value? {
        Value::String(text) => Some(vec![encode(text)]),
        Value::Array(list) if list.first().is_some_and(Value::is_number) => {
            Some(vec![list.iter().map(fields::id).collect::<Option<_>>()?])
        }
        Value::Array(list) if !list.is_empty() => {
            let prompt = |item: &Value| match item {
                Value::String(text) => Some(encode(text)),
                Value::Array(ids) if !ids.is_empty() => ids.iter().map(fields::id).collect(),
                _ => None,
            };
            list.iter().map(prompt).collect()
        }
        _ => None,
    }
}

/// Refuses ids that the vocabulary does not have.
pub(crate) fn check_ids(service: &Service, prompts: &[Vec<u32>]) -> Result<(), Failure> {
    let size = service.model.vocabulary();
    match prompts.iter().flatten().find(|id| **id >= size) {
        Some(id) => Err(Failure::bad_request(&format!("Token id {id} is out of vocabulary"), None)),
        None => Ok(()),
    }
}

/// How the answers of one request are written.
struct Completion {
    service: Arc<Service>,
    id: String,
    created: u64,
    model: String,
    logprobs: Option<u32>,
    echo: bool,
    return_token_ids: bool,
    include_usage: bool,
    continuous_usage: bool,
    /// Characters of each choice that were streamed.
    offsets: Vec<usize>,
}

fn reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
    }
}

impl Completion {
    async fn whole(&self, mut started: Started) -> Value {
        let progress = started.run.finished().await;
        let choices = started.outputs.iter().enumerate().map(|(index, output)| self.choice(&started, index, output));
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices.collect::<Vec<_>>(),
            "service_tier": null,
            "system_fingerprint": FINGERPRINT,
            "usage": Usage::of(&self.service, &started, &progress).whole(&self.service, false),
            "kv_transfer_params": null,
            "ec_transfer_params": null,
            "metrics": null,
        })
    }

    fn choice(&self, started: &Started, index: usize, output: &Output) -> Value {
        let model = &self.service.model;
        let prompt = started.prompt_of(index);
        let echoed = if self.echo { prompt } else { &[] };
        let text = model.decode(echoed) + &output.text();
        json!({
            "index": index,
            "text": text,
            "logprobs": self.logprobs.map(|top| logprobs::completion(model, echoed, &output.tokens, top, 0)),
            "finish_reason": reason(output.finish),
            "stop_reason": output.stop_reason,
            "token_ids": self.return_token_ids.then(|| output.ids()),
            "prompt_logprobs": self.logprobs.filter(|_| self.echo).map(|top| logprobs::prompt(model, prompt, top)),
            "prompt_token_ids": self.return_token_ids.then_some(prompt),
            "routed_experts": null,
        })
    }

    fn chunk(&self, choices: Value) -> Map<String, Value> {
        object([
            ("id", self.id.as_str().into()),
            ("object", "text_completion".into()),
            ("created", self.created.into()),
            ("model", self.model.as_str().into()),
            ("choices", choices),
        ])
    }
}

impl Shape for Completion {
    fn opening(&self, _: &Started) -> Vec<Value> {
        Vec::new()
    }

    fn token(&mut self, started: &Started, index: usize, at: usize) -> Option<Value> {
        let output = started.outputs.get(index)?;
        let token = output.tokens.get(at)?;
        let model = &self.service.model;
        let last = at + 1 == output.tokens.len();
        let prompt = started.prompt_of(index);
        let echoed = if self.echo && at == 0 { prompt } else { &[] };
        let text = model.decode(echoed) + &token.text;
        let offset = self.offsets.get_mut(index)?;
        let before = *offset;
        *offset += text.chars().count();
        let scored = |top| logprobs::completion(model, echoed, std::slice::from_ref(token), top, before);
        let mut chunk = self.chunk(json!([{
            "index": index,
            "text": text,
            "logprobs": self.logprobs.map(scored),
            "finish_reason": last.then(|| reason(output.finish)),
            "stop_reason": last.then_some(&output.stop_reason),
            "prompt_token_ids": (self.return_token_ids && at == 0).then_some(prompt),
            "token_ids": self.return_token_ids.then_some([token.id]),
        }]));
        if self.continuous_usage {
            chunk.insert("usage".to_owned(), Usage::running(prompt.len(), at + 1));
        }
        if last && !self.include_usage {
            chunk.insert("system_fingerprint".to_owned(), FINGERPRINT.into());
        }
        Some(Value::Object(chunk))
    }

    fn usage(&self, usage: Value) -> Value {
        let mut chunk = self.chunk(json!([]));
        chunk.insert("usage".to_owned(), usage);
        chunk.insert("system_fingerprint".to_owned(), FINGERPRINT.into());
        Value::Object(chunk)
    }

    fn is_chat(&self) -> bool {
        false
    }
}
