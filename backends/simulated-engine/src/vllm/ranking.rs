//! `/v1/rerank` and `/v1/score`: how near two texts' embeddings are, as a real vLLM with an embedding model answers.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::{
    Caller,
    embeddings::embed,
    error::Failure,
    fields::Fields,
    now_seconds, ok,
    request::{check_model, refusal, too_long},
};
use crate::{
    driver::{End, Job},
    kv_events::Content,
    server::{Answer, Service},
};

pub(crate) async fn rerank(
    service: &Arc<Service>,
    body: &Map<String, Value>,
    caller: &Caller,
) -> Result<Answer, Failure> {
    let fields = Fields::body(body);
    let query = fields.text("query")?.ok_or_else(|| fields.missing("query"))?;
    let documents = texts(&fields, "documents")?;
    let top = fields.integer("top_n")?.and_then(|top| usize::try_from(top).ok()).filter(|&top| top > 0);
    check_model(service, fields.text("model")?)?;
    let (scores, tokens) = compare(service, &[query], &documents).await?;
    let mut ranked: Vec<_> = scores.into_iter().zip(&documents).enumerate().collect();
    ranked.sort_by(|(_, (a, _)), (_, (b, _))| b.total_cmp(a));
    ranked.truncate(top.unwrap_or(documents.len()));
    let results = ranked.into_iter().map(|(index, (score, text))| {
        json!({"index": index, "document": {"text": text, "multi_modal": null}, "relevance_score": score})
    });
    Ok(ok(&json!({
        "id": caller.answer_id("score", None),
        "model": service.options.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "results": results.collect::<Vec<_>>(),
    })))
}

pub(crate) async fn score(
    service: &Arc<Service>,
    body: &Map<String, Value>,
    caller: &Caller,
) -> Result<Answer, Failure> {
    let fields = Fields::body(body);
    let named = |names: [&'static str; 2]| names.into_iter().find(|name| fields.get(name).is_some());
    let first = texts(&fields, named(["text_1", "queries"]).unwrap_or("text_1"))?;
    let second = texts(&fields, named(["text_2", "documents"]).unwrap_or("text_2"))?;
    check_model(service, fields.text("model")?)?;
    let (scores, tokens) = compare(service, &first, &second).await?;
    let data =
        scores.into_iter().enumerate().map(|(index, score)| json!({"index": index, "object": "score", "score": score}));
    Ok(ok(&json!({
        "id": caller.answer_id("score", None),
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

/// One text or several.
fn texts<'a>(fields: &Fields<'a>, name: &'static str) -> Result<Vec<&'a str>, Failure> {
    match fields.get(name) {
        Some(Value::String(text)) => Ok(vec![text]),
        Some(_) => Ok(fields.list(name)?.into_iter().flatten().filter_map(Value::as_str).collect()),
        None => Err(fields.missing(name)),
    }
}

/// The score of each pair, a single first text with each second one; and the tokens that it took. Each text is embedded
/// once.
async fn compare(service: &Service, first: &[&str], second: &[&str]) -> Result<(Vec<f64>, usize), Failure> {
    let ids: Vec<Vec<u32>> = first.iter().chain(second).map(|text| service.model.encode(text, true)).collect();
    let context = service.options.max_model_len;
    if ids.iter().any(|ids| ids.len() > context as usize) {
        return Err(too_long(context));
    }
    let jobs = ids.iter().map(|ids| Job {
        content: Content::default(),
        prompt_tokens: u32::try_from(ids.len()).unwrap_or(u32::MAX),
        output_tokens: 0,
        end: End::Stop,
    });
    service.call().await;
    let mut run = service.driver.start(jobs.collect()).map_err(refusal)?;
    run.finished().await;
    let size = service.options.embedding_dimensions;
    let vectors: Vec<Vec<f32>> = ids.iter().map(|ids| embed(ids, size, size)).collect();
    let (first, second) = vectors.split_at(first.len());
    let near = |(a, b): (&Vec<f32>, &Vec<f32>)| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    Ok((first.iter().cycle().zip(second).map(near).collect(), ids.iter().map(Vec::len).sum()))
}
