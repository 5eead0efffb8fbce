//! Log probabilities: made up, but in the engine's shapes, always the same for the same token, and ordered.

use serde_json::{Map, Value, json};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::object;
use crate::{model::Model, output::Token};

/// A token and its log probability.
struct Scored {
    text: String,
    id: u32,
    logprob: f64,
}

/// The token itself, then others that are ever less likely, `top` in all.
fn alternatives(model: &Model, id: u32, top: u32) -> Vec<Scored> {
    let draw = xxh3_64_with_seed(&id.to_le_bytes(), 1);
    let mut logprob = -((draw % 2000) as f64) / 1024.0 - 1.0 / 1024.0;
    (0..top.max(1))
        .map(|rank| {
            let id = if rank == 0 { id } else { (id + rank * 97) % model.vocabulary() };
            let scored = Scored { text: model.decode(&[id]), id, logprob };
            logprob -= 0.5 + f64::from(rank) / 64.0;
            scored
        })
        .collect()
}

fn chat_entry(scored: &Scored) -> Map<String, Value> {
    object([
        ("token", scored.text.as_str().into()),
        ("logprob", scored.logprob.into()),
        ("bytes", scored.text.as_bytes().into()),
    ])
}

/// `logprobs` of a chat choice: `{"content": […]}`.
pub(crate) fn chat(model: &Model, tokens: &[Token], top: u32) -> Value {
    let content = tokens.iter().map(|token| {
        let scored = alternatives(model, token.id, top);
        let mut entry = scored.first().map(chat_entry).unwrap_or_default();
        let shown = scored.iter().take(top as usize).map(chat_entry).map(Value::Object);
        entry.insert("top_logprobs".to_owned(), shown.collect());
        Value::Object(entry)
    });
    json!({"content": content.collect::<Vec<_>>()})
}

/// `logprobs` of a completion choice. `offset` is where in the choice's text the first token begins, in characters. Ids of
/// an echoed prompt are given first; the very first of a text has no probability.
pub(crate) fn completion(model: &Model, echoed: &[u32], tokens: &[Token], top: u32, offset: usize) -> Value {
    let mut offsets = Vec::new();
    let mut logprobs = Vec::new();
    let mut texts = Vec::new();
    let mut tops = Vec::new();
    let mut at = offset;
    let ids = echoed.iter().copied().chain(tokens.iter().map(|token| token.id));
    for (position, id) in ids.enumerate() {
        let scored = alternatives(model, id, top);
        let text = scored.first().map(|first| first.text.clone()).unwrap_or_default();
        let unscored = position == 0 && !echoed.is_empty();
        offsets.push(at);
        at += text.chars().count();
        logprobs.push(if unscored { Value::Null } else { json!(scored.first().map(|first| first.logprob)) });
        texts.push(text);
        let map: Map<_, _> = scored.iter().map(|scored| (scored.text.clone(), json!(scored.logprob))).collect();
        tops.push(if unscored { Value::Null } else { Value::Object(map) });
    }
    json!({"text_offset": offsets, "token_logprobs": logprobs, "tokens": texts, "top_logprobs": tops})
}

/// `prompt_logprobs` of a completion: by token id, null for the first token.
pub(crate) fn prompt(model: &Model, ids: &[u32], top: u32) -> Value {
    let entries = ids.iter().enumerate().map(|(position, id)| {
        if position == 0 {
            return Value::Null;
        }
        let ranked = alternatives(model, *id, top).into_iter().enumerate();
        let map: Map<_, _> = ranked
            .map(|(rank, scored)| {
                let entry = json!({"logprob": scored.logprob, "rank": rank + 1, "decoded_token": scored.text});
                (scored.id.to_string(), entry)
            })
            .collect();
        Value::Object(map)
    });
    entries.collect()
}
