//! `/generate` and `/generate_stream`.

use std::sync::Arc;

use bytes::Bytes;
use http::StatusCode;
use serde_json::{Map, Value, json};

use super::{counted, validate, validation};
use crate::{
    output::{self, Finish, Output},
    server::{Answer, Service},
    vllm::{
        error::Failure,
        fields::Fields,
        request::{Common, Started},
        stream::{self, Shape},
        tools::{self, Say},
    },
};

pub(super) async fn answer(
    service: &Arc<Service>,
    body: &Map<String, Value>,
    streamed: bool,
) -> Result<Answer, Failure> {
    let Some(inputs) = body.get("inputs").and_then(Value::as_str) else {
        return Err(validation("missing field `inputs`"));
    };
    let empty = Map::new();
    let parameters = body.get("parameters").and_then(Value::as_object).unwrap_or(&empty);
    validate(parameters)?;
    if parameters.get("temperature").and_then(Value::as_f64) == Some(0.0) {
        return Err(validation("Input validation error: `temperature` must be strictly positive"));
    }
    if streamed && parameters.get("decoder_input_details") == Some(&true.into()) {
        return Err(validation(
            "Input validation error: `decoder_input_details` == true is not supported when streaming tokens",
        ));
    }
    let names =
        [("max_new_tokens", "max_tokens"), ("stop", "stop"), ("seed", "seed"), ("truncate", "truncate_prompt_tokens")];
    let mut own: Map<String, Value> =
        names.iter().filter_map(|(name, ours)| Some(((*ours).to_owned(), parameters.get(*name)?.clone()))).collect();
    if let Some(grammar) = parameters.get("grammar") {
        own.insert("structured_outputs".to_owned(), json!({"json": grammar.get("value")}));
    }
    let fields = Fields::body(&own);
    let common = Common::read(&fields, &["max_tokens"])?;
    let say = tools::read(&fields, "")?;
    let range = service.options.output_tokens.clone();
    let prompt = service.model.encode(inputs, true);
    let started = common.start(service, vec![prompt], u32::MAX, |prompt, seed, limits| match &say {
        Say::Text(text) => output::fixed(&service.model, "", text, limits),
        Say::Prose | Say::Call(_) => output::prose(&service.model, prompt, seed, &range, limits),
    })?;
    let details = parameters.get("details") == Some(&true.into());
    let prefill = parameters.get("decoder_input_details") == Some(&true.into());
    if streamed {
        return Ok(Answer::Events(stream::events(service, &common, started, Native)));
    }
    Ok(whole(started, details, prefill).await)
}

async fn whole(mut started: Started, details: bool, prefill: bool) -> Answer {
    started.run.finished().await;
    let prompt = started.prompt_of(0).to_vec();
    let Some(output) = started.outputs.first() else { return crate::vllm::empty(StatusCode::OK, Vec::new()) };
    let mut body = json!({"generated_text": output.text()});
    if let Some(body) = body.as_object_mut().filter(|_| details) {
        let tokens: Vec<Value> = (0..output.tokens.len()).map(|at| token(output, at)).collect();
        let prefill = if prefill { prompt.as_slice() } else { &[] };
        let prefill: Vec<Value> = prefill.iter().map(|id| json!({"id": id, "text": "", "logprob": null})).collect();
        body.insert(
            "details".to_owned(),
            json!({"finish_reason": reason(output), "generated_tokens": output.tokens.len(),
            "seed": null, "prefill": prefill, "tokens": tokens}),
        );
    }
    let headers = counted(prompt.len(), output.tokens.len());
    Answer::Whole { status: StatusCode::OK, headers, body: body.to_string().into() }
}

fn token(output: &Output, at: usize) -> Value {
    let Some(token) = output.tokens.get(at) else { return Value::Null };
    let ends = at + 1 == output.tokens.len() && output.finish == Finish::Stop && output.stop_reason.is_null();
    let text = if ends { "</s>" } else { token.text.as_str() };
    json!({"id": token.id, "text": text, "logprob": -0.5, "special": ends})
}

fn reason(output: &Output) -> &'static str {
    match output.finish {
        Finish::Length => "length",
        Finish::Stop if output.stop_reason.is_string() => "stop_sequence",
        Finish::Stop => "eos_token",
    }
}

/// One event a token, no end mark.
struct Native;

impl Shape for Native {
    fn opening(&self, _: &Started) -> Vec<Value> {
        Vec::new()
    }

    fn token(&mut self, started: &Started, index: usize, at: usize) -> Option<Value> {
        let output = started.outputs.get(index)?;
        let last = at + 1 == output.tokens.len();
        let details = json!({"finish_reason": reason(output), "generated_tokens": output.tokens.len(), "seed": null,
            "input_length": started.prompt_of(index).len()});
        Some(json!({"index": at + 1, "token": token(output, at), "generated_text": last.then(|| output.text()),
            "details": if last { details } else { Value::Null }}))
    }

    fn usage(&self, usage: Value) -> Value {
        usage
    }

    fn end(&self) -> Option<Bytes> {
        None
    }

    /// Without a space, as older releases write it.
    fn frame(&self, value: &Value) -> Bytes {
        Bytes::from(format!("data:{value}\n\n"))
    }

    fn is_chat(&self) -> bool {
        false
    }
}
