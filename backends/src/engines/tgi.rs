//! Text Generation Inference (TGI 3.3), over its OpenAI routes; a server without them, over `/generate`.

mod native;
mod openai;

use forebay_proto::metrics_text::samples;
use serde_json::{Value, json};

use super::{
    Api, Asked, Engine, Form, Load, Mark, Members, Prepared, ServedModel, Totals, Translation, Unsupported, Ways,
    fields::{limit_completion, refuse_unheeded},
    require_text,
    tally::Tally,
};

pub(super) struct Tgi;

const NAME: &str = "tgi";

/// Of its OpenAI routes. `n` and `logit_bias` have a place in its schema and no effect.
const HEEDED: &[&str] = &["logprobs", "top_logprobs", "presence_penalty", "tool_choice", "response_format", "stop"];

impl Engine for Tgi {
    fn name(&self) -> &'static str {
        NAME
    }

    /// Its list of models names the model as its own owner.
    fn mark(&self) -> Mark {
        Mark::Path("/info", |answer| info(answer).is_some())
    }

    /// Tells whether the shards can still allocate. After a failed generation it runs a forward pass of its own.
    fn health_paths(&self) -> &'static [&'static str] {
        &["/health"]
    }

    fn details_path(&self) -> Option<&'static str> {
        Some("/info")
    }

    fn read_details(&self, body: &[u8], models: &mut Vec<ServedModel>) {
        let Some((id, length)) = info(body) else { return };
        if models.is_empty() {
            models.push(ServedModel { id: id.clone(), ..ServedModel::default() });
        }
        for model in models {
            model.root = Some(id.clone());
            model.max_model_len = Some(length);
        }
    }

    fn load_paths(&self) -> &'static [&'static str] {
        &["/metrics"]
    }

    fn read_load(&self, answer: &[u8]) -> Option<Load> {
        let [mut running, mut waiting, mut used, mut budget, mut prompt, mut generated] = [Tally::default(); 6];
        for sample in samples(answer) {
            match sample.name {
                "tgi_batch_current_size" => running.add(sample.value),
                "tgi_queue_size" => waiting.add(sample.value),
                "tgi_batch_current_max_tokens" => used.add(sample.value),
                "tgi_batch_max_total_tokens" => budget.add(sample.value),
                "tgi_request_input_length_sum" => prompt.add(sample.value),
                "tgi_request_generated_tokens_sum" => generated.add(sample.value),
                _ => {}
            }
        }
        let budget = budget.total().filter(|&tokens| tokens > 0);
        #[expect(clippy::cast_precision_loss, reason = "numbers of tokens are far below 2^52")]
        let usage = |used: u64, budget: u64| (used as f64 / budget as f64).min(1.0);
        Some(Load {
            running: running.count()?,
            waiting: waiting.count()?,
            // What the running requests may come to need, not what they hold: it admits by this.
            kv_usage: used.total().zip(budget).map(|(used, budget)| usage(used, budget)),
            block_tokens: None,
            kv_tokens: budget,
            sleeping: false,
            adapters_max: None,
            totals: Totals { prompt_tokens: prompt.total(), generation_tokens: generated.total(), ..Totals::default() },
        })
    }

    fn serves(&self, api: Api) -> bool {
        matches!(api, Api::ChatCompletions | Api::Completions)
    }

    fn form(&self, api: Api, server: &Ways) -> Form {
        if api == Api::ChatCompletions && !server.openai_routes { Form::Text } else { Form::AsAsked }
    }

    fn rewrites(&self) -> bool {
        true
    }

    fn adapt(&self, asked: Asked) -> Result<Prepared, Unsupported> {
        let body = asked.body.clone();
        let Some(mut members) = Members::read(&body) else { return Ok(Prepared::untouched(asked)) };
        require_text(NAME, &members)?;
        if !asked.server.openai_routes {
            return native::adapt(&asked, &members);
        }
        refuse_unheeded(NAME, &members, HEEDED)?;
        // It takes no object there, not even an empty one.
        members.remove("logit_bias");
        // Before 3.0 only this name; both are refused as one field given twice.
        members.rename("max_completion_tokens", "max_tokens");
        settle(&mut members);
        limit_completion(asked.api, &mut members);
        let translation = Some(Translation::new(openai::ToolCalls::default()));
        Ok(Prepared { body: members.write(&body), translation, ..Prepared::untouched(asked) })
    }
}

/// Values that it refuses, in the form in which it takes them; both of its routes are alike in these.
fn settle(members: &mut Members<'_>) {
    // Where OpenAI says "all of them" it wants no word.
    if members.get_as::<f64>("top_p") == Some(1.0) {
        members.remove("top_p");
    }
    if let Some(stop) = members.get_as::<String>("stop") {
        members.set("stop", &json!([stop]));
    }
    if let Some(format) = members.get_as::<Value>("response_format") {
        match grammar(&format) {
            Some(grammar) => members.set("response_format", &grammar),
            None => drop(members.remove("response_format")),
        }
    }
}

/// Its own form of a `response_format`. What is of its own form already stays.
fn grammar(format: &Value) -> Option<Value> {
    match format.get("type").and_then(Value::as_str) {
        Some("text") => None,
        _ if format.get("value").is_some() => Some(format.clone()),
        Some("json_schema") => Some(json!({"type": "json", "value": format.pointer("/json_schema/schema")})),
        Some("json_object") => Some(json!({"type": "json", "value": {"type": "object"}})),
        _ => Some(format.clone()),
    }
}

/// Model and context length, if this is TGI's `/info`.
fn info(answer: &[u8]) -> Option<(String, u32)> {
    let info: Value = serde_json::from_slice(answer).ok()?;
    // Older releases say `max_input_length`; this one all of them have, as does nobody else.
    let length = info.get("max_total_tokens")?.as_u64()?;
    Some((info.get("model_id")?.as_str()?.to_owned(), u32::try_from(length).ok()?))
}

fn finish_reason(own: &str) -> &'static str {
    // `eos_token` and `stop_sequence`.
    if own == "length" { "length" } else { "stop" }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapted(api: Api, body: &str) -> Result<Value, Option<String>> {
        let asked = Asked::new(api, body.to_owned().into(), false);
        let prepared = Tgi.adapt(asked).map_err(|unsupported| unsupported.param)?;
        Ok(serde_json::from_slice(&prepared.body).expect("JSON"))
    }

    #[test]
    fn what_it_would_refuse_is_written_as_it_takes_it() {
        let body = r#"{"model":"m","top_p":1,"stop":"x","max_completion_tokens":7,"logit_bias":{},"n":1,
            "response_format":{"type":"json_schema","json_schema":{"name":"a","schema":{"type":"object"}}}}"#;
        let expected = json!({"model": "m", "stop": ["x"], "max_tokens": 7, "n": 1,
            "response_format": {"type": "json", "value": {"type": "object"}}});
        assert_eq!(adapted(Api::ChatCompletions, body), Ok(expected));
        for (body, field) in [
            (r#"{"n":2}"#, "n"),
            (r#"{"logit_bias":{"1":2}}"#, "logit_bias"),
            (r#"{"top_k":5}"#, "top_k"),
            (r#"{"prompt":[1,2]}"#, "prompt"),
            (r#"{"prompt":[ [1]]}"#, "prompt"),
        ] {
            assert_eq!(adapted(Api::Completions, body), Err(Some(field.to_owned())), "{body}");
        }
        assert!(adapted(Api::Completions, r#"{"prompt":["a"],"top_p":0.9}"#).is_ok());
    }

    #[test]
    fn load() {
        let text = b"tgi_queue_size 4\ntgi_batch_current_size 3\ntgi_batch_current_max_tokens 500\n\
                     tgi_batch_max_total_tokens 2000\ntgi_request_input_length_sum 90\n";
        let load = Tgi.read_load(text).expect("a load");
        assert_eq!((load.running, load.waiting, load.kv_usage, load.kv_tokens), (3, 4, Some(0.25), Some(2000)));
        assert_eq!(load.totals.prompt_tokens, Some(90));
    }

    #[test]
    fn a_server_without_a_list_has_a_model_all_the_same() {
        let mut models = Vec::new();
        Tgi.read_details(br#"{"model_id":"org/m","max_total_tokens":4096,"version":"1.3.4"}"#, &mut models);
        assert_eq!((models[0].id.as_str(), models[0].max_model_len), ("org/m", Some(4096)));
    }
}
