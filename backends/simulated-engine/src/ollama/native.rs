//! `/api/chat`.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::{
    output::{self, Finish, Output},
    server::{Answer, Service},
    vllm::{
        chat,
        error::Failure,
        fields::Fields,
        ok,
        request::{Common, Started},
        stream::{self, Shape},
        tools::{self, Call, Say},
    },
};

pub(super) async fn answer(service: &Arc<Service>, body: &Map<String, Value>) -> Result<Answer, Failure> {
    let empty = Map::new();
    let options = body.get("options").and_then(Value::as_object).unwrap_or(&empty);
    let names = [("num_predict", "max_tokens"), ("stop", "stop"), ("seed", "seed"), ("temperature", "temperature")];
    let mut own: Map<String, Value> =
        names.iter().filter_map(|(name, ours)| Some(((*ours).to_owned(), options.get(*name)?.clone()))).collect();
    own.extend(["messages", "tools"].into_iter().filter_map(|name| Some((name.to_owned(), body.get(name)?.clone()))));
    match body.get("format") {
        Some(Value::String(_)) => drop(own.insert("response_format".to_owned(), json!({"type": "json_object"}))),
        Some(Value::Object(schema)) => drop(own.insert("structured_outputs".to_owned(), json!({"json": schema}))),
        _ => {}
    }
    let fields = Fields::body(&own);
    let mut common = Common::read(&fields, &["max_tokens"])?;
    common.strict = body.get("truncate") == Some(&false.into());
    let messages = fields.list("messages")?.map(Vec::as_slice).unwrap_or_default();
    let last = messages.last().and_then(|message| message.get("content")?.as_str()).unwrap_or_default();
    let say = tools::read(&fields, last)?;
    let prompt = chat::prompt(service, &fields)?;
    let range = service.options.output_tokens.clone();
    let started =
        common.start(service, vec![prompt], service.options.max_model_len / 2, |prompt, seed, limits| match &say {
            Say::Prose => output::prose(&service.model, prompt, seed, &range, limits),
            Say::Text(text) => output::fixed(&service.model, "", text, limits),
            Say::Call(call) => output::fixed(&service.model, &call.lead(), &call.arguments, limits),
        })?;
    let call = match say {
        Say::Call(call) => Some(call),
        Say::Prose | Say::Text(_) => None,
    };
    let native = Native { model: service.options.model.clone(), call };
    // It streams unless told not to.
    if body.get("stream") != Some(&false.into()) {
        return Ok(Answer::Lines(stream::events(service, &common, started, native)));
    }
    let mut started = started;
    started.run.finished().await;
    let Some(output) = started.outputs.first() else { return Err(Failure::engine_death()) };
    let text = if native.call.is_some() { String::new() } else { output.text() };
    Ok(ok(&native.line(&text, native.calls(output), Some((&started, output)))))
}

struct Native {
    model: String,
    call: Option<Call>,
}

impl Native {
    /// The tool call of a whole answer: its arguments come as an object, in one piece.
    fn calls(&self, output: &Output) -> Option<Value> {
        let call = self.call.as_ref()?;
        let arguments: Value = serde_json::from_str(&output.text()).unwrap_or_else(|_| json!({}));
        Some(json!([{"function": {"name": call.name, "arguments": arguments}}]))
    }

    fn line(&self, text: &str, calls: Option<Value>, ended: Option<(&Started, &Output)>) -> Value {
        let mut message = json!({"role": "assistant", "content": text});
        if let (Some(message), Some(calls)) = (message.as_object_mut(), calls) {
            message.insert("tool_calls".to_owned(), calls);
        }
        let mut line = json!({"model": self.model, "created_at": "2026-01-01T00:00:00Z", "message": message,
            "done": ended.is_some()});
        if let (Some(line), Some((started, output))) = (line.as_object_mut(), ended) {
            let reason = if output.finish == Finish::Length { "length" } else { "stop" };
            line.insert("done_reason".to_owned(), reason.into());
            line.insert("total_duration".to_owned(), 1_000_000.into());
            line.insert("prompt_eval_count".to_owned(), started.prompt_of(0).len().into());
            line.insert("eval_count".to_owned(), output.tokens.len().into());
        }
        line
    }
}

impl Shape for Native {
    fn opening(&self, _: &Started) -> Vec<Value> {
        Vec::new()
    }

    fn token(&mut self, started: &Started, index: usize, at: usize) -> Option<Value> {
        let output = started.outputs.get(index)?;
        let token = output.tokens.get(at)?;
        let last = at + 1 == output.tokens.len();
        let calls = if last { self.calls(output) } else { None };
        let text = if self.call.is_some() { "" } else { token.text.as_str() };
        if !last && text.is_empty() {
            return None;
        }
        Some(self.line(text, calls, last.then_some((started, output))))
    }

    fn usage(&self, usage: Value) -> Value {
        usage
    }

    fn end(&self) -> Option<Bytes> {
        None
    }

    fn frame(&self, value: &Value) -> Bytes {
        Bytes::from(format!("{value}\n"))
    }

    fn is_chat(&self) -> bool {
        true
    }
}
