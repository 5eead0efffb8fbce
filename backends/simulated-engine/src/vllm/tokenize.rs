//! `/tokenize` and `/detokenize`.

use serde_json::{Map, Value, json};

use super::{error::Failure, fields::Fields, ok, request::check_model};
use crate::server::{Answer, Service};

pub(crate) fn tokenize(service: &Service, body: &Map<String, Value>) -> Result<Answer, Failure> {
    let fields = Fields::body(body);
    check_model(service, fields.text("model")?)?;
    let strings = fields.boolean("return_token_strs")?.unwrap_or_default();
    let ids = match fields.text("prompt")? {
        Some(prompt) => service.model.encode(prompt, fields.boolean("add_special_tokens")?.unwrap_or(true)),
        None if fields.get("messages").is_some() => super::chat::prompt(service, &fields)?,
        None => return Err(fields.missing("prompt")),
    };
    let strings = strings.then(|| ids.iter().map(|id| service.model.token(*id)).collect::<Vec<_>>());
    Ok(ok(&json!({
        "count": ids.len(),
        "max_model_len": service.options.max_model_len,
        "tokens": ids,
        "token_strs": strings,
    })))
}

pub(crate) fn detokenize(service: &Service, body: &Map<String, Value>) -> Result<Answer, Failure> {
    let fields = Fields::body(body);
    check_model(service, fields.text("model")?)?;
    let Some(ids) = fields.ids("tokens")? else { return Err(fields.missing("tokens")) };
    Ok(ok(&json!({"prompt": service.model.decode(&ids)})))
}
