//! `/v1/embeddings`, `/pooling` and `/classify`. A real vLLM serves them from models of their own; this one from every
//! model.
//!
//! A vector is the sum of a random direction for each token, of unit length: equal inputs give equal vectors, and
//! inputs that share words are near each other. A pooler gives the vector; classes are its first numbers.

use std::{cmp::Ordering, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Map, Value, json};

use super::{
    Caller,
    completions::{check_ids, prompts},
    error::Failure,
    fields::Fields,
    now_seconds, object, ok,
    request::{refusal, too_long},
};
use crate::{
    driver::{End, Job},
    kv_events::Content,
    output::Draw,
    server::{Answer, Service},
};

/// Classes that every model has.
const CLASSES: u32 = 3;

/// What becomes of an input's ids.
type Pooled = fn(&[u32], Wanted<'_>) -> Map<String, Value>;

/// In which form vectors are wanted.
#[derive(Clone, Copy)]
struct Wanted<'a> {
    format: &'a str,
    /// All dimensions, and those asked for.
    size: u32,
    wanted: u32,
}

impl Wanted<'_> {
    fn vector(self, ids: &[u32]) -> Value {
        let vector = embed(ids, self.size, self.wanted);
        match self.format {
            "base64" => STANDARD.encode(vector.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()).into(),
            _ => json!(vector),
        }
    }
}

pub(crate) async fn answer(
    service: &Arc<Service>,
    body: &Map<String, Value>,
    caller: &Caller,
) -> Result<Answer, Failure> {
    let pooled: Pooled = |ids, wanted| object([("object", "embedding".into()), ("embedding", wanted.vector(ids))]);
    each(service, body, caller.answer_id("embd", request_id(body)), pooled).await
}

/// `/pooling`.
pub(crate) async fn pool(
    service: &Arc<Service>,
    body: &Map<String, Value>,
    caller: &Caller,
) -> Result<Answer, Failure> {
    let pooled: Pooled = |ids, wanted| object([("object", "pooling".into()), ("data", wanted.vector(ids))]);
    each(service, body, caller.answer_id("pool", request_id(body)), pooled).await
}

/// `/classify`.
pub(crate) async fn classify(
    service: &Arc<Service>,
    body: &Map<String, Value>,
    caller: &Caller,
) -> Result<Answer, Failure> {
    let pooled: Pooled = |ids, wanted| {
        let scores = embed(ids, wanted.size, CLASSES).into_iter().map(f32::exp).collect::<Vec<_>>();
        let all: f32 = scores.iter().sum();
        let probs: Vec<f32> = scores.iter().map(|score| score / all).collect();
        let best = (0..probs.len()).max_by(|a, b| probs.get(*a).partial_cmp(&probs.get(*b)).unwrap_or(Ordering::Equal));
        let label = format!("LABEL_{}", best.unwrap_or(0));
        object([("label", label.into()), ("num_classes", probs.len().into()), ("probs", json!(probs))])
    };
    each(service, body, caller.answer_id("classify", request_id(body)), pooled).await
}

fn request_id(body: &Map<String, Value>) -> Option<&str> {
    body.get("request_id").and_then(Value::as_str)
}

/// Pools each input.
async fn each(
    service: &Arc<Service>,
    body: &Map<String, Value>,
    id: String,
    pooled: Pooled,
) -> Result<Answer, Failure> {
    let fields = Fields::body(body);
    let format = fields.text("encoding_format")?.unwrap_or("float");
    let dimensions = fields.integer("dimensions")?;
    let truncate = fields.integer("truncate_prompt_tokens")?;
    let model = fields.text("model")?;
    let input = fields.get("input").ok_or_else(|| fields.missing("input"))?;
    if !matches!(format, "float" | "base64") {
        let message = "Input should be \\'float\\' or \\'base64\\'";
        return Err(Failure::invalid("literal_error", "body.encoding_format", message, format));
    }
    if let Some(model) = model.filter(|model| *model != service.options.model) {
        return Err(Failure::unknown_model(model, None));
    }
    if input.as_array().is_some_and(Vec::is_empty) {
        return Err(Failure::bad_request("You must pass at least one prompt", None));
    }
    let Some(mut inputs) = prompts(service, Some(input), true) else {
        return Err(Failure::invalid(
            "string_type",
            "body.input",
            "Input should be a valid string",
            &super::fields::shown(input),
        ));
    };
    check_ids(service, &inputs)?;
    let size = service.options.embedding_dimensions;
    let wanted = dimensions.map_or(Some(size), |d| u32::try_from(d).ok().filter(|d| (1..=size).contains(d)));
    let Some(wanted) = wanted else {
        let message = format!("dimensions must be between 1 and {size}, got {}.", dimensions.unwrap_or_default());
        return Err(Failure::bad_request(&message, None));
    };
    let context = service.options.max_model_len;
    if let Some(most) = truncate {
        // Any negative number asks for what the context holds.
        let most = usize::try_from(most).unwrap_or(context as usize);
        inputs.iter_mut().for_each(|ids| ids.truncate(most));
    }
    if inputs.iter().any(|ids| ids.len() > context as usize) {
        return Err(too_long(context));
    }

    let jobs = inputs.iter().map(|ids| Job {
        content: Content::default(),
        prompt_tokens: u32::try_from(ids.len()).unwrap_or(u32::MAX),
        output_tokens: 0,
        end: End::Stop,
    });
    service.call().await;
    let mut run = service.driver.start(jobs.collect()).map_err(refusal)?;
    run.finished().await;
    let data = inputs.iter().enumerate().map(|(index, ids)| {
        let mut item = object([("index", index.into())]);
        item.extend(pooled(ids, Wanted { format, size, wanted }));
        Value::Object(item)
    });
    let tokens: usize = inputs.iter().map(Vec::len).sum();
    Ok(ok(&json!({
        "id": id,
        "object": "list",
        "created": now_seconds(),
        "model": service.options.model,
        "data": data.collect::<Vec<_>>(),
        "usage": {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": null,
            "completion_tokens_details": null,
        },
    })))
}

/// The first `wanted` of `size` dimensions, scaled to unit length.
pub(crate) fn embed(ids: &[u32], size: u32, wanted: u32) -> Vec<f32> {
    let mut sum = vec![0f64; size as usize];
    for id in ids {
        let mut draw = Draw(u64::from(*id) << 32);
        for value in &mut sum {
            *value += draw.below(2001) as f64 - 1000.0;
        }
    }
    sum.truncate(wanted as usize);
    let length = sum.iter().map(|x| x * x).sum::<f64>().sqrt().max(1.0);
    sum.into_iter().map(|x| (x / length) as f32).collect()
}
