//! Fields of a request that change what is answered, and those that do not.
//!
//! Engines pass over what they do not know, so that a client could believe that it was heeded. Here each adapter says
//! what its engine heeds of what there is; the rest is refused by name unless its value asks for nothing.

use forebay_proto::peek::COMPLETION_TOKENS;
use serde_json::{Value, json};

use super::{Api, Unsupported, members::Members};

/// Fields, OpenAI's and those of other engines, that change the answer and that not every engine heeds.
const MEANINGFUL: [&str; 43] = [
    "n",
    "best_of",
    "echo",
    "suffix",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "presence_penalty",
    "reasoning_effort",
    "chat_template_kwargs",
    "parallel_tool_calls",
    "functions",
    "function_call",
    "tool_choice",
    "response_format",
    "stop",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "early_stopping",
    "use_beam_search",
    "stop_token_ids",
    "stop_regex",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "allowed_token_ids",
    "bad_words",
    "prompt_logprobs",
    "truncate_prompt_tokens",
    "continue_final_message",
    "chat_template",
    "documents",
    "thinking_token_budget",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "regex",
    "ebnf",
];

/// Gives a completion that names no limit OpenAI's and vLLM's, for engines that have another.
pub(super) fn limit_completion(api: Api, members: &mut Members<'_>) {
    if api == Api::Completions && members.get("max_tokens").is_none() {
        members.set("max_tokens", &COMPLETION_TOKENS.into());
    }
}

/// Refuses a field that the engine would pass over although it changes the answer. `heeded` are those that it does not
/// pass over.
pub(super) fn refuse_unheeded(engine: &'static str, members: &Members<'_>, heeded: &[&str]) -> Result<(), Unsupported> {
    let unheeded = |name: &&str| MEANINGFUL.contains(name) && !heeded.contains(name);
    let found = members.iter().find(|(name, value)| unheeded(name) && !asks_for_nothing(name, value));
    match found {
        Some((name, _)) => Err(Unsupported::field(engine, name)),
        None => Ok(()),
    }
}

/// Whether the value is what the engine does anyway.
fn asks_for_nothing(name: &str, json: &str) -> bool {
    let Ok(value) = serde_json::from_str::<Value>(json) else { return false };
    match &value {
        Value::Null => true,
        // It is what engines do anyway; to call one tool at a time has to be asked for.
        Value::Bool(wanted) => *wanted == (name == "parallel_tool_calls"),
        Value::Array(list) => list.is_empty(),
        Value::Object(object) => {
            object.is_empty() || name == "response_format" && object.get("type") == Some(&json!("text"))
        }
        Value::String(text) => match name {
            "tool_choice" => text == "auto",
            "function_call" => matches!(text.as_str(), "auto" | "none"),
            "reasoning_effort" => text == "none",
            _ => text.is_empty(),
        },
        Value::Number(number) => {
            let number = number.as_f64();
            let none = match name {
                "n" | "best_of" | "repetition_penalty" | "length_penalty" | "typical_p" => 1.0,
                "top_k" if number == Some(-1.0) => -1.0,
                _ => 0.0,
            };
            number == Some(none)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_asks_for_something_is_refused() {
        let refused = |body: &str| {
            let members = Members::read(body.as_bytes()).expect("an object");
            refuse_unheeded("x", &members, &["top_k"]).err().and_then(|refusal| refusal.param)
        };
        for idle in [
            r#"{"n":1,"best_of":1.0,"echo":false,"logit_bias":{},"stop":[],"min_p":0,"repetition_penalty":1.0}"#,
            r#"{"n":null,"suffix":"","tool_choice":"auto","response_format":{"type":"text"},"logprobs":false}"#,
            r#"{"top_k":7,"temperature":2,"made_up":true,"user":"u"}"#,
            r#"{"parallel_tool_calls":true,"functions":[],"function_call":"auto","presence_penalty":0.0,"chat_template_kwargs":{}}"#,
        ] {
            assert_eq!(refused(idle), None, "{idle}");
        }
        for (body, field) in [
            (r#"{"n":2}"#, "n"),
            (r#"{"min_p":0.1}"#, "min_p"),
            (r#"{"logit_bias":{"5":1}}"#, "logit_bias"),
            (r#"{"tool_choice":"required"}"#, "tool_choice"),
            (r#"{"guided_json":{"type":"object"}}"#, "guided_json"),
            (r#"{"logprobs":true}"#, "logprobs"),
            (r#"{"parallel_tool_calls":false}"#, "parallel_tool_calls"),
            (r#"{"functions":[{"name":"f"}]}"#, "functions"),
            (r#"{"presence_penalty":0.5}"#, "presence_penalty"),
            (r#"{"reasoning_effort":"high"}"#, "reasoning_effort"),
            (r#"{"\u006e":3}"#, "n"),
        ] {
            assert_eq!(refused(body).as_deref(), Some(field), "{body}");
        }
    }
}
