//! Ollama (0.33), over its OpenAI routes; a chat that asks for what they cannot, over `/api/chat`.
//!
//! It says nothing of its load, and a prompt longer than its context it shortens without a word: the gateway refuses
//! such a prompt where it can count, and its own route does where it is used.

mod native;

use bytes::Bytes;
use serde_json::{Value, json};

use super::{
    Api, Asked, Dormant, Engine, Mark, Members, Prepared, ServedModel, Unsupported,
    fields::{limit_completion, refuse_unheeded},
    require_text,
};

pub(super) struct Ollama;

const NAME: &str = "ollama";

const HEEDED: &[&str] =
    &["logprobs", "top_logprobs", "presence_penalty", "reasoning_effort", "response_format", "stop", "suffix"];

/// Sampling fields that only its own route has, and their names there.
const OPTIONS: [(&str, &str); 4] =
    [("top_k", "top_k"), ("min_p", "min_p"), ("typical_p", "typical_p"), ("repetition_penalty", "repeat_penalty")];

impl Engine for Ollama {
    fn name(&self) -> &'static str {
        NAME
    }

    /// Its list of models names whose namespace each is from.
    fn mark(&self) -> Mark {
        Mark::Path("/api/version", |answer| {
            serde_json::from_slice::<Value>(answer)
                .is_ok_and(|answer| answer.get("version").is_some_and(Value::is_string))
        })
    }

    fn health_paths(&self) -> &'static [&'static str] {
        &["/api/version"]
    }

    fn version_path(&self) -> Option<&'static str> {
        Some("/api/version")
    }

    /// What is loaded now; the context of the others is decided when they are.
    fn details_path(&self) -> Option<&'static str> {
        Some("/api/ps")
    }

    fn read_details(&self, body: &[u8], models: &mut Vec<ServedModel>) {
        let Ok(answer) = serde_json::from_slice::<Value>(body) else { return };
        for loaded in answer.get("models").and_then(Value::as_array).into_iter().flatten() {
            let name = loaded.get("name").and_then(Value::as_str);
            let length =
                loaded.get("context_length").and_then(Value::as_u64).and_then(|length| u32::try_from(length).ok());
            for model in models.iter_mut().filter(|model| Some(model.id.as_str()) == name) {
                model.max_model_len = length.filter(|&length| length > 0).or(model.max_model_len);
            }
        }
    }

    /// A model that only embeds is loaded by the second path alone, and unloaded by the first alone.
    fn dormant(&self) -> Option<Dormant> {
        Some(Dormant {
            sleep: |model| ("/api/generate", kept(model, 0)),
            wake: |model| ("/api/embed", kept(model, -1)),
            asks: "/api/ps",
            reads: |answer, model| {
                let answer: Value = serde_json::from_slice(answer).ok()?;
                let loaded = answer.get("models")?.as_array()?;
                let names = loaded.iter().filter_map(|loaded| loaded.get("name")?.as_str());
                Some(!names.map(|name| name.strip_suffix(":latest").unwrap_or(name)).any(|name| name == bare(model)))
            },
        })
    }

    fn serves(&self, api: Api) -> bool {
        matches!(api, Api::ChatCompletions | Api::Completions | Api::Embeddings)
    }

    fn rewrites(&self) -> bool {
        true
    }

    fn adapt(&self, asked: Asked) -> Result<Prepared, Unsupported> {
        let body = asked.body.clone();
        let Some(mut members) = Members::read(&body) else { return Ok(Prepared::untouched(asked)) };
        require_text(NAME, &members)?;
        members.rename("max_completion_tokens", "max_tokens");
        if let Some(choice) = members.remove("tool_choice") {
            match choice.as_str() {
                r#""auto""# => {}
                r#""none""# => drop(members.remove("tools")),
                _ => return Err(Unsupported::value(NAME, "tool_choice", "a tool cannot be forced")),
            }
        }
        if let Some([only]) = members.get_as::<[String; 1]>("prompt") {
            members.set("prompt", &json!(only));
        }
        if members.get("prompt").is_some_and(|prompt| prompt.starts_with('[')) {
            return Err(Unsupported::value(NAME, "prompt", "one text is taken, no list"));
        }
        let heeded = if asked.api == Api::Completions { &["presence_penalty", "stop", "suffix"] } else { HEEDED };
        limit_completion(asked.api, &mut members);
        let Err(unheeded) = refuse_unheeded(NAME, &members, heeded) else {
            return Ok(Prepared { body: members.write(&body), ..Prepared::untouched(asked) });
        };
        if asked.api != Api::ChatCompletions {
            return Err(unheeded);
        }
        let own = OPTIONS.map(|(name, _)| name);
        refuse_unheeded(NAME, &members, &[HEEDED, &own].concat())?;
        native::adapt(&asked, &members)
    }
}

/// A model's name without the tag that may be left out.
fn bare(model: &str) -> &str {
    model.strip_suffix(":latest").unwrap_or(model)
}

/// A request for nothing but that the model stays for so many seconds; for ever where that is negative.
fn kept(model: &str, seconds: i32) -> Bytes {
    json!({"model": model, "keep_alive": seconds, "stream": false}).to_string().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapted(api: Api, body: &str) -> Result<(&'static str, Value), Option<String>> {
        let asked = Asked::new(api, body.to_owned().into(), false);
        let prepared = Ollama.adapt(asked).map_err(|unsupported| unsupported.param)?;
        Ok((prepared.path, serde_json::from_slice(&prepared.body).expect("JSON")))
    }

    #[test]
    fn a_model_sleeps_that_is_not_loaded() {
        let Dormant { sleep, wake, reads, .. } = Ollama.dormant().expect("it can");
        let loaded = br#"{"models":[{"name":"m:latest","size":1},{"name":"n:8b"}]}"#;
        for (model, asleep) in [("m", false), ("m:latest", false), ("n:8b", false), ("n", true), ("o", true)] {
            assert_eq!(reads(loaded, model), Some(asleep), "{model}");
        }
        assert_eq!((reads(b"{\"models\":[]}", "m"), reads(b"{}", "m"), reads(b"?", "m")), (Some(true), None, None));
        let kept = |(path, body): (&'static str, Bytes)| (path, serde_json::from_slice::<Value>(&body).expect("JSON"));
        let expected = |seconds: i32| json!({"model": "m", "keep_alive": seconds, "stream": false});
        assert_eq!(kept(sleep("m")), ("/api/generate", expected(0)));
        assert_eq!(kept(wake("m")), ("/api/embed", expected(-1)));
    }

    #[test]
    fn what_it_would_pass_over_is_mapped_or_refused() {
        let chat = |rest: &str| adapted(Api::ChatCompletions, &format!(r#"{{"model":"m","messages":[]{rest}}}"#));
        let expected = json!({"model": "m", "messages": [], "max_tokens": 5});
        for same in [
            r#","max_completion_tokens":5"#,
            r#","max_tokens":5,"tool_choice":"auto""#,
            r#","max_tokens":5,"tools":[{}],"tool_choice":"none""#,
        ] {
            assert_eq!(chat(same), Ok(("/v1/chat/completions", expected.clone())), "{same}");
        }
        for (rest, field) in [
            (r#","n":2"#, "n"),
            (r#","tool_choice":"required""#, "tool_choice"),
            (r#","tool_choice":{"type":"function","function":{"name":"f"}}"#, "tool_choice"),
            (r#","logit_bias":{"1":1}"#, "logit_bias"),
        ] {
            assert_eq!(chat(rest), Err(Some(field.to_owned())), "{rest}");
        }
        assert_eq!(chat(r#","top_k":3"#).expect("its own route").0, "/api/chat");
        let completion = |rest: &str| adapted(Api::Completions, &format!(r#"{{"model":"m",{rest}}}"#));
        assert_eq!(completion(r#""prompt":["a"]"#).expect("one text").1["prompt"], "a");
        for (rest, field) in [
            (r#""prompt":["a","b"]"#, "prompt"),
            (r#""prompt":[1]"#, "prompt"),
            (r#""prompt":"a","logprobs":2"#, "logprobs"),
            (r#""prompt":"a","top_k":2"#, "top_k"),
        ] {
            assert_eq!(completion(rest), Err(Some(field.to_owned())), "{rest}");
        }
    }

    #[test]
    fn the_context_of_what_is_loaded() {
        let model = |id: &str| ServedModel { id: id.to_owned(), ..ServedModel::default() };
        let mut models = vec![model("a:latest"), model("b")];
        Ollama.read_details(br#"{"models":[{"name":"a:latest","context_length":4096},{"name":7}]}"#, &mut models);
        assert_eq!((models[0].max_model_len, models[1].max_model_len), (Some(4096), None));
    }
}
