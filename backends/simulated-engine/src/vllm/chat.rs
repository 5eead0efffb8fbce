//! `/v1/chat/completions`.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::{
    Caller, FINGERPRINT,
    error::Failure,
    fields::Fields,
    logprobs, now_seconds, object, ok,
    request::{Common, Started, check_logprobs},
    stream::{self, Shape},
    tools::{self, Call, Say},
    usage::Usage,
};
use crate::{
    model::Conversation,
    output::{self, Finish, Token},
    server::{Answer, Service},
};

pub(crate) async fn answer(
    service: &Arc<Service>,
    body: &Map<String, Value>,
    caller: &Caller,
) -> Result<Answer, Failure> {
    let fields = Fields::body(body);
    let common = Common::read(&fields, &["max_completion_tokens", "max_tokens"])?;
    let messages = fields.list("messages")?.ok_or_else(|| fields.missing("messages"))?;
    let logprobs = fields.boolean("logprobs")?.unwrap_or_default();
    let top = fields.integer("top_logprobs")?;
    let say = tools::read(&fields, last_text(messages))?;
    common.check(service)?;
    let top = check_logprobs(top.unwrap_or_default())?;
    let prompt = prompt(service, &fields)?;

    let range = service.options.output_tokens.clone();
    let started = common.start(service, vec![prompt], u32::MAX, |prompt, seed, limits| match &say {
        Say::Prose => output::prose(&service.model, prompt, seed, &range, limits),
        Say::Text(text) => output::fixed(&service.model, "", text, limits),
        Say::Call(call) => output::fixed(&service.model, &call.lead(), &call.arguments, limits),
    })?;
    let chat = Chat {
        service: Arc::clone(service),
        id: caller.answer_id("chatcmpl", common.request_id.as_deref()),
        created: now_seconds(),
        model: common.answers_as(service),
        logprobs: logprobs.then_some(top),
        return_token_ids: common.return_token_ids,
        include_usage: common.include_usage,
        continuous_usage: common.include_usage && common.continuous_usage,
        call: match say {
            Say::Call(call) => Some(call),
            Say::Prose | Say::Text(_) => None,
        },
        call_ids: started.outputs.iter().map(|_| tools::new_call_id()).collect(),
    };
    if common.stream {
        return Ok(Answer::Events(stream::events(service, &common, started, chat)));
    }
    Ok(ok(&chat.whole(started).await))
}

/// Renders a conversation into the prompt's tokens. Also the chat form of `/tokenize`.
pub(crate) fn prompt(service: &Service, fields: &Fields<'_>) -> Result<Vec<u32>, Failure> {
    let list = fields.list("messages")?.map(Vec::as_slice).unwrap_or_default();
    if list.is_empty() {
        let message = "Cannot apply chat template to an empty conversation. Provide at least one message.";
        return Err(Failure::bad_request(message, None));
    }
    let parts = list.iter().filter_map(|message| message.get("content")?.as_array()).flatten();
    if parts.filter_map(|part| part.get("type")?.as_str()).any(|kind| kind != "text") {
        return Err(Failure::bad_request(&format!("{} is not a multimodal model", service.options.model), None));
    }
    let or_null = |name| fields.get(name).unwrap_or(&Value::Null);
    let conversation = Conversation {
        messages: or_null("messages"),
        tools: or_null("tools"),
        documents: or_null("documents"),
        kwargs: or_null("chat_template_kwargs"),
        reasoning_effort: fields.text("reasoning_effort")?,
        add_generation_prompt: fields.boolean("add_generation_prompt")?.unwrap_or(true),
        continue_final_message: fields.boolean("continue_final_message")?.unwrap_or_default(),
        add_special_tokens: fields.boolean("add_special_tokens")?.unwrap_or_default(),
    };
    service.model.chat(&conversation).map_err(|message| Failure::bad_request(&message, None))
}

/// The text of the last message, as far as it is a plain string.
fn last_text(messages: &[Value]) -> &str {
    messages.last().and_then(|message| message.get("content")?.as_str()).unwrap_or_default()
}

/// How the answers of one request are written.
struct Chat {
    service: Arc<Service>,
    id: String,
    created: u64,
    model: String,
    /// Alternatives to show for each token, when log probabilities were asked for.
    logprobs: Option<u32>,
    return_token_ids: bool,
    include_usage: bool,
    continuous_usage: bool,
    call: Option<Call>,
    /// One for each choice.
    call_ids: Vec<String>,
}

impl Chat {
    fn finish_reason(&self, finish: Finish) -> &'static str {
        match (finish, &self.call) {
            (Finish::Length, _) => "length",
            (Finish::Stop, Some(call)) => call.finish,
            (Finish::Stop, None) => "stop",
        }
    }

    async fn whole(&self, mut started: Started) -> Value {
        let progress = started.run.finished().await;
        let choices = started.outputs.iter().enumerate().map(|(index, output)| {
            json!({
                "index": index,
                "message": self.message(index, &output.text()),
                "logprobs": self.logprobs.map(|top| logprobs::chat(&self.service.model, &output.tokens, top)),
                "finish_reason": self.finish_reason(output.finish),
                "stop_reason": output.stop_reason,
                "token_ids": self.return_token_ids.then(|| output.ids()),
                "routed_experts": null,
            })
        });
        json!({
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": choices.collect::<Vec<_>>(),
            "service_tier": null,
            "system_fingerprint": FINGERPRINT,
            "usage": Usage::of(&self.service, &started, &progress).whole(&self.service, true),
            "prompt_logprobs": null,
            "prompt_token_ids": self.return_token_ids.then(|| started.prompt_of(0)),
            "prompt_text": null,
            "kv_transfer_params": null,
            "ec_transfer_params": null,
            "metrics": null,
        })
    }

    fn message(&self, index: usize, text: &str) -> Value {
        let mut message = json!({
            "role": "assistant",
            "content": text,
            "refusal": null,
            "annotations": null,
            "audio": null,
            "function_call": null,
        });
        let Some(message_object) = message.as_object_mut() else { return message };
        if let Some(call) = &self.call {
            let function = json!({"name": call.name, "arguments": text});
            let made = json!([{"id": self.call_ids.get(index), "type": "function", "function": function}]);
            let content = if call.content_null { Value::Null } else { "".into() };
            message_object.insert("content".to_owned(), content);
            message_object.insert("tool_calls".to_owned(), made);
        }
        message_object.insert("reasoning".to_owned(), Value::Null);
        message
    }

    fn chunk(&self, choices: Value) -> Map<String, Value> {
        object([
            ("id", self.id.as_str().into()),
            ("object", "chat.completion.chunk".into()),
            ("created", self.created.into()),
            ("model", self.model.as_str().into()),
            ("choices", choices),
        ])
    }

    /// The delta of a token: what it adds to the message. The last silent token of a tool call tells its name.
    fn delta(&self, index: usize, names_call: bool, token: &Token) -> Option<Value> {
        let call = |call: Value| json!({"content": null, "tool_calls": [call]});
        match &self.call {
            Some(made) if names_call => Some(call(json!({
                "id": self.call_ids.get(index),
                "type": "function",
                "index": 0,
                "function": {"name": made.name},
            }))),
            _ if token.text.is_empty() => None,
            Some(_) => Some(call(json!({"index": 0, "function": {"arguments": token.text}}))),
            None => Some(json!({"content": token.text})),
        }
    }
}

impl Shape for Chat {
    fn opening(&self, started: &Started) -> Vec<Value> {
        let prompt = started.prompt_of(0);
        let opening = (0..started.outputs.len()).map(|index| {
            let delta = json!({"role": "assistant", "content": ""});
            let choice = json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null});
            let mut chunk = self.chunk(json!([choice]));
            if self.continuous_usage {
                chunk.insert("usage".to_owned(), Usage::running(prompt.len(), 0));
            }
            chunk.insert("prompt_token_ids".to_owned(), json!(self.return_token_ids.then_some(prompt)));
            chunk.insert("prompt_text".to_owned(), Value::Null);
            Value::Object(chunk)
        });
        opening.collect()
    }

    fn token(&mut self, started: &Started, index: usize, at: usize) -> Option<Value> {
        let output = started.outputs.get(index)?;
        let token = output.tokens.get(at)?;
        let last = at + 1 == output.tokens.len();
        let delta = self.delta(index, at + 1 == output.lead, token);
        if delta.is_none() && !last {
            return None;
        }
        let scored = |top| logprobs::chat(&self.service.model, std::slice::from_ref(token), top);
        let mut choice = json!({
            "index": index,
            "delta": delta.unwrap_or_else(|| json!({})),
            "logprobs": self.logprobs.map(scored),
            "finish_reason": last.then(|| self.finish_reason(output.finish)),
        });
        if let Some(choice) = choice.as_object_mut() {
            if last {
                choice.insert("stop_reason".to_owned(), output.stop_reason.clone());
            }
            choice.insert("token_ids".to_owned(), json!(self.return_token_ids.then_some([token.id])));
        }
        let mut chunk = self.chunk(json!([choice]));
        if self.continuous_usage {
            chunk.insert("usage".to_owned(), Usage::running(started.prompt_of(index).len(), at + 1));
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
        true
    }
}
