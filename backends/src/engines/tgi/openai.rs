//! Answers of TGI's OpenAI routes.
//!
//! Finish reasons are its own words, and tool calls are written in a way that OpenAI's SDK cannot put together: every
//! delta has the id again, which is always "0"; arguments of a whole answer may be an object; a stream that calls a tool
//! says `stop` or nothing at all at its end.

use bytes::Bytes;
use memchr::memmem;
use serde_json::{Value, json};

use crate::engines::{
    answer::{Translator, event},
    chunks::new_id,
    tidy::{Rule, Tidy},
};

const RULES: &[Rule] = &[Rule::Finish(r#""stop_sequence""#, r#""stop""#), Rule::Finish(r#""eos_token""#, r#""stop""#)];

#[derive(Debug, Default)]
pub(super) struct ToolCalls {
    /// The last chunk of a stream that calls a tool.
    last: Option<Value>,
    /// Calls that have their id.
    named: Vec<u64>,
    finished: bool,
}

impl Translator for ToolCalls {
    fn event(&mut self, data: &[u8], out: &mut Vec<u8>) -> bool {
        let calls = self.last.is_some() || has_calls(data);
        let chunk = if calls { serde_json::from_slice::<Value>(data).ok() } else { None };
        let Some(mut chunk) = chunk.filter(|chunk| chunk.get("error").is_none()) else {
            if data.trim_ascii() == b"[DONE]" {
                self.finish(out);
            }
            return Tidy(RULES).event(data, out);
        };
        let says = match chunk.pointer_mut("/choices/0") {
            Some(choice) => {
                if let Some(calls) = choice.pointer_mut("/delta/tool_calls") {
                    reshape(calls, &mut self.named);
                }
                if choice.get("finish_reason").is_some_and(|reason| !reason.is_null()) {
                    self.finished = true;
                    finish_reason(choice);
                }
                true
            }
            // Usage: everything has been said.
            None => {
                self.finish(out);
                false
            }
        };
        event(out, chunk.to_string());
        if says {
            self.last = Some(chunk);
        }
        true
    }

    fn whole(&mut self, body: &Bytes) -> Option<Bytes> {
        let answer = if has_calls(body) { serde_json::from_slice::<Value>(body).ok() } else { None };
        let Some(mut answer) = answer else { return Tidy(RULES).whole(body) };
        if let Some(choice) = answer.pointer_mut("/choices/0")
            && let Some(calls) = choice.pointer_mut("/message/tool_calls")
        {
            reshape(calls, &mut Vec::new());
            finish_reason(choice);
            if let Some(message) = choice.get_mut("message").and_then(Value::as_object_mut) {
                message.entry("content").or_insert(Value::Null);
            }
        }
        Some(answer.to_string().into())
    }
}

impl ToolCalls {
    /// Adds the end that a stream with a tool call left out.
    fn finish(&mut self, out: &mut Vec<u8>) {
        if let Some(chunk) = self.last.as_mut().filter(|_| !self.finished) {
            self.finished = true;
            chunk["choices"] = json!([{"index": 0, "delta": {}, "logprobs": null, "finish_reason": "tool_calls"}]);
            event(out, chunk.to_string());
        }
    }
}

fn has_calls(json: &[u8]) -> bool {
    memmem::find(json, br#""tool_calls""#).is_some_and(|at| {
        let rest = json.get(at + br#""tool_calls""#.len()..).unwrap_or_default().trim_ascii_start();
        let value = rest.strip_prefix(b":").unwrap_or_default().trim_ascii_start();
        value.starts_with(b"[") || value.starts_with(b"{")
    })
}

/// Releases before 2.4 write one call, not a list. `named`: the indexes of those whose id was given before.
fn reshape(calls: &mut Value, named: &mut Vec<u64>) {
    if calls.is_object() {
        *calls = json!([calls.take()]);
    }
    for (at, call) in (0..).zip(calls.as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut)) {
        let index = call.get("index").and_then(Value::as_u64).unwrap_or(at);
        if named.contains(&index) {
            call.remove("id");
            call.remove("type");
        } else {
            named.push(index);
            call.insert("id".to_owned(), new_id("call").into());
        }
        let Some(function) = call.get_mut("function").and_then(Value::as_object_mut) else { continue };
        if function.get("name").is_some_and(Value::is_null) {
            function.remove("name");
        }
        if let Some(arguments) = function.get_mut("arguments").filter(|arguments| !arguments.is_string()) {
            *arguments = arguments.to_string().into();
        }
    }
}

/// An answer that calls a tool and was not cut short ends for that.
fn finish_reason(choice: &mut Value) {
    if choice.get("finish_reason").and_then(Value::as_str) != Some("length") {
        choice["finish_reason"] = "tool_calls".into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engines::Translation;

    fn chunk(delta: &str, finish: &str) -> String {
        format!(r#"data: {{"id":"","model":"m","choices":[{{"index":0,"delta":{delta},"finish_reason":{finish}}}]}}"#)
            + "\n\n"
    }

    fn call(name: &str, arguments: &str) -> String {
        let function = json!({"name": serde_json::from_str::<Value>(name).expect("JSON"), "arguments": arguments});
        format!(
            r#"{{"role":"assistant","tool_calls":[{{"index":0,"id":"0","type":"function","function":{function}}}]}}"#
        )
    }

    /// The stream's chunks, when it comes in two pieces.
    fn read(stream: &str, cut: usize) -> Vec<Value> {
        let mut translation = Translation::new(ToolCalls::default());
        let bytes = Bytes::from(stream.to_owned());
        let mut all = Vec::new();
        for piece in [bytes.slice(..cut), bytes.slice(cut..)] {
            all.extend_from_slice(&translation.push(piece).expect("short events"));
        }
        all.extend_from_slice(&translation.finish(None));
        let text = String::from_utf8(all).expect("UTF-8");
        assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
        let data = text.split("\n\n").filter_map(|event| event.strip_prefix("data:")).map(str::trim);
        data.filter(|data| *data != "[DONE]").map(|data| serde_json::from_str(data).expect("JSON")).collect()
    }

    #[test]
    fn a_tool_call_can_be_put_together_and_ends() {
        let usage = "data:{\"choices\":[],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":2}}\n\n";
        let calls = [call("\"wetter\"", "{"), call("null", "\"ort\":\"Kyōto 🦀\""), call("null", "}")];
        let calls: String = calls.iter().map(|call| chunk(call, "null")).collect();
        for end in [usage, ""] {
            let stream = format!("{calls}{end}data: [DONE]\n\n");
            for cut in 0..=stream.len() {
                let chunks = read(&stream, cut);
                let call = |at: usize| &chunks[at]["choices"][0]["delta"]["tool_calls"][0];
                assert!(call(0)["id"].as_str().is_some_and(|id| id.len() > 20) && call(1).get("id").is_none());
                assert_eq!(
                    (call(0)["function"]["name"].as_str(), call(1)["function"].get("name")),
                    (Some("wetter"), None)
                );
                let text: String = (0..3).filter_map(|at| call(at)["function"]["arguments"].as_str()).collect();
                assert_eq!(text, r#"{"ort":"Kyōto 🦀"}"#);
                assert_eq!(chunks[3]["choices"][0]["finish_reason"], "tool_calls");
                assert_eq!(chunks.len(), if end.is_empty() { 4 } else { 5 });
            }
        }
        let stream = chunk(&call("\"f\"", "{}"), "\"eos_token\"") + "data: [DONE]\n\n";
        assert_eq!(read(&stream, 5)[0]["choices"][0]["finish_reason"], "tool_calls");

        let two = [call("\"f\"", "{}"), call("\"g\"", "{}").replace("\"index\":0", "\"index\":1")];
        let two: String = two.iter().map(|call| chunk(call, "null")).collect();
        let chunks = read(&(two + "data: [DONE]\n\n"), 0);
        let id = |at: usize| chunks[at]["choices"][0]["delta"]["tool_calls"][0]["id"].as_str();
        assert!(id(0).is_some() && id(1).is_some() && id(0) != id(1), "each call has its own");
    }

    #[test]
    fn finish_reasons_of_text() {
        for (own, expected) in [("stop_sequence", "stop"), ("eos_token", "stop"), ("length", "length")] {
            let stream = chunk(r#"{"content":"\"tool_calls\":["}"#, &format!("\"{own}\"")) + "data: [DONE]\n\n";
            assert_eq!(read(&stream, 1)[0]["choices"][0]["finish_reason"], expected);
        }
    }

    #[test]
    fn a_whole_tool_call() {
        let body = r#"{"choices":[{"message":{"role":"assistant","tool_calls":[{"id":"0","type":"function",
            "function":{"name":"f","arguments":{"a":1}}}]},"finish_reason":"stop"}]}"#;
        let answer = ToolCalls::default().whole(&Bytes::from_static(body.as_bytes())).expect("an answer");
        let answer: Value = serde_json::from_slice(&answer).expect("JSON");
        let choice = &answer["choices"][0];
        assert_eq!((&choice["finish_reason"], &choice["message"]["content"]), (&"tool_calls".into(), &Value::Null));
        assert_eq!(choice["message"]["tool_calls"][0]["function"]["arguments"], r#"{"a":1}"#);
    }
}
