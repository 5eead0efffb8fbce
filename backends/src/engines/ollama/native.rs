//! `/api/chat`: lines of JSON, options in an object of their own, arguments of tools as objects.

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::{NAME, OPTIONS};
use crate::engines::{
    Asked, Members, Prepared, Translation, Unsupported,
    answer::{Translator, Wire, event},
    chunks::{Chunks, Cost, Piece, new_id},
};

/// Options that have the names that OpenAI has for them.
const SAME: [&str; 5] = ["temperature", "top_p", "seed", "presence_penalty", "frequency_penalty"];

pub(super) fn adapt(asked: &Asked, members: &Members<'_>) -> Result<Prepared, Unsupported> {
    let get = |name: &str| members.get_as::<Value>(name);
    let messages = get("messages").unwrap_or_default();
    let messages = messages.as_array().into_iter().flatten().map(message).collect::<Result<Vec<_>, _>>()?;
    let mut options = Map::new();
    let named = SAME.map(|name| (name, name)).into_iter().chain(OPTIONS).chain([("max_tokens", "num_predict")]);
    for (name, own) in named {
        options.extend(get(name).map(|value| (own.to_owned(), value)));
    }
    match get("stop") {
        Some(Value::String(stop)) => drop(options.insert("stop".to_owned(), json!([stop]))),
        Some(list) => drop(options.insert("stop".to_owned(), list)),
        None => {}
    }
    let model: String = members.get_as("model").unwrap_or_default();
    // A prompt that is too long is refused, not shortened.
    let mut body =
        json!({"model": model, "messages": messages, "stream": asked.streamed, "truncate": false, "options": options});
    if let Some(body) = body.as_object_mut() {
        let format = get("response_format").and_then(|format| match format.get("type")?.as_str()? {
            "json_object" => Some("json".into()),
            "json_schema" => format.pointer("/json_schema/schema").cloned(),
            _ => None,
        });
        let think = get("reasoning_effort").map(|effort| if effort == "none" { false.into() } else { effort });
        let fields = [("tools", get("tools")), ("format", format), ("think", think)];
        let logprobs = [("logprobs", get("logprobs")), ("top_logprobs", get("top_logprobs"))];
        let given = fields.into_iter().chain(logprobs);
        body.extend(given.filter_map(|(name, value)| Some((name.to_owned(), value?))));
    }
    let translation = Some(Translation::new(Native { chunks: Chunks::new(asked.api, model), calls: 0 }));
    Ok(Prepared { path: "/api/chat", headers: &[], body: body.to_string().into(), translation })
}

/// A message with its text as one string, its images beside it, and the arguments of its calls as objects.
fn message(message: &Value) -> Result<Value, Unsupported> {
    let refused = |what| Unsupported::value(NAME, "messages", what);
    let mut own = message.clone();
    let Some(object) = own.as_object_mut() else { return Err(refused("each must be an object")) };
    let (mut text, mut images) = (String::new(), Vec::new());
    match message.get("content") {
        Some(Value::String(content)) => text.push_str(content),
        Some(Value::Array(parts)) => {
            for part in parts {
                let of = |pointer| part.pointer(pointer).and_then(Value::as_str);
                match (of("/type"), of("/text"), of("/image_url/url")) {
                    (Some("text"), Some(piece), _) => text.push_str(piece),
                    (Some("image_url"), _, Some(url)) => match url.split_once(";base64,") {
                        Some((_, data)) => images.push(data.to_owned()),
                        None => return Err(refused("an image must be in the request itself, as base64")),
                    },
                    _ => return Err(refused("only texts and images are taken")),
                }
            }
        }
        _ => {}
    }
    object.insert("content".to_owned(), text.into());
    if !images.is_empty() {
        object.insert("images".to_owned(), images.into());
    }
    for call in object.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(arguments) = call.pointer_mut("/function/arguments") {
            let parsed = arguments.as_str().and_then(|text| serde_json::from_str::<Value>(text).ok());
            *arguments =
                parsed.or_else(|| arguments.is_object().then(|| arguments.clone())).unwrap_or_else(|| json!({}));
        }
    }
    Ok(own)
}

struct Native {
    chunks: Chunks,
    /// Tool calls so far.
    calls: usize,
}

impl Native {
    fn piece(&mut self, own: &Value) -> Piece {
        let text = |pointer| own.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
        let calls = own.pointer("/message/tool_calls").and_then(Value::as_array);
        let tool_calls: Vec<Value> = calls
            .into_iter()
            .flatten()
            .enumerate()
            .map(|(at, call)| {
                let function = call.get("function");
                let arguments =
                    function.and_then(|function| function.get("arguments")).map_or_else(String::new, Value::to_string);
                let name = function.and_then(|function| function.get("name"));
                json!({"index": self.calls + at, "id": new_id("call"), "type": "function",
                "function": {"name": name, "arguments": arguments}})
            })
            .collect();
        self.calls += tool_calls.len();
        let done = own.get("done").and_then(Value::as_bool).unwrap_or_default();
        let finish = match own.get("done_reason").and_then(Value::as_str) {
            Some("length") => "length",
            _ if self.calls > 0 => "tool_calls",
            _ => "stop",
        };
        let logprobs = own.get("logprobs").filter(|logprobs| logprobs.is_array());
        Piece {
            text: text("/message/content"),
            thinking: text("/message/thinking"),
            tool_calls,
            logprobs: logprobs.map(|content| json!({"content": content})),
            finish: done.then_some(finish),
        }
    }
}

fn cost(own: &Value) -> Cost {
    let count = |key| own.get(key).and_then(Value::as_u64).unwrap_or_default();
    Cost { prompt_tokens: count("prompt_eval_count"), output_tokens: count("eval_count") }
}

impl Translator for Native {
    fn event(&mut self, data: &[u8], out: &mut Vec<u8>) -> bool {
        let Ok(own) = serde_json::from_slice::<Value>(data) else { return false };
        if own.get("error").is_some() {
            event(out, data);
            return true;
        }
        let piece = self.piece(&own);
        let done = piece.finish.is_some();
        self.chunks.piece(piece, out);
        if done {
            self.chunks.end(cost(&own), out);
        }
        true
    }

    fn whole(&mut self, body: &Bytes) -> Option<Bytes> {
        let own: Value = serde_json::from_slice(body).ok()?;
        let piece = Some(self.piece(&own)).filter(|piece| piece.finish.is_some())?;
        Some(self.chunks.whole(piece, cost(&own)))
    }

    fn wire(&self) -> Wire {
        Wire::Lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engines::Api;

    fn native() -> Native {
        Native { chunks: Chunks::new(Api::ChatCompletions, "m".to_owned()), calls: 0 }
    }

    #[test]
    fn requests() {
        let body = r#"{"model":"m","messages":[
            {"role":"user","content":[{"type":"text","text":"a"},
                {"type":"image_url","image_url":{"url":"data:image/png;base64,AA=="}}]},
            {"role":"assistant","content":null,"tool_calls":[{"function":{"name":"f","arguments":"{\"x\":1}"}}]}],
            "top_k":4,"repetition_penalty":1.1,"max_tokens":9,"stop":"z","reasoning_effort":"none",
            "response_format":{"type":"json_object"}}"#;
        let members = Members::read(body.as_bytes()).expect("an object");
        let asked = Asked::new(Api::ChatCompletions, Bytes::new(), true);
        let prepared = adapt(&asked, &members).expect("it can");
        let sent: Value = serde_json::from_slice(&prepared.body).expect("JSON");
        let expected = json!({"model": "m", "stream": true, "truncate": false, "format": "json", "think": false,
            "options": {"top_k": 4, "repeat_penalty": 1.1, "num_predict": 9, "stop": ["z"]},
            "messages": [{"role": "user", "content": "a", "images": ["AA=="]},
                {"role": "assistant", "content": "",
                    "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}]});
        assert_eq!(sent, expected);
    }

    #[test]
    fn streams_wherever_they_are_cut() {
        let lines = r#"{"message":{"role":"assistant","content":"","thinking":"hm 🦀"},"done":false}
{"message":{"role":"assistant","content":"Kyōto"},"done":false}
{"message":{"content":"","tool_calls":[{"function":{"name":"f","arguments":{"ort":"大阪"}}}]},"done":false}
{"message":{"content":""},"done":true,"done_reason":"stop","prompt_eval_count":4,"eval_count":6}"#;
        let bytes = Bytes::from_static(lines.as_bytes());
        for cut in 0..=bytes.len() {
            let mut translation = Translation::new(native());
            let mut out = translation.push(bytes.slice(..cut)).expect("short").to_vec();
            out.extend_from_slice(&translation.push(bytes.slice(cut..)).expect("short"));
            out.extend_from_slice(&translation.finish(None));
            let text = String::from_utf8(out).expect("UTF-8");
            let events: Vec<&str> = text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
            assert_eq!(events.len(), 6, "{text}");
            let choice = |at: usize| serde_json::from_str::<Value>(events[at]).expect("JSON")["choices"][0].clone();
            assert_eq!(choice(0)["delta"]["reasoning"], "hm 🦀");
            assert_eq!(choice(1)["delta"]["content"], "Kyōto");
            let call = &choice(2)["delta"]["tool_calls"][0];
            assert_eq!((&call["function"]["arguments"], &call["index"]), (&r#"{"ort":"大阪"}"#.into(), &0.into()));
            assert_eq!(choice(3)["finish_reason"], "tool_calls");
            assert!(events[4].contains(r#""total_tokens":10"#));
            assert_eq!(events[5], "[DONE]");
        }
    }

    #[test]
    fn errors_and_whole_answers() {
        let mut translation = Translation::new(native());
        let out = translation.push(Bytes::from_static(b"{\"error\":\"out of memory\"}\nnoise\n")).expect("short");
        assert_eq!(out, "data: {\"error\":\"out of memory\"}\n\ndata: noise\n\n");
        let body =
            br#"{"message":{"role":"assistant","content":"hi"},"done":true,"done_reason":"length","eval_count":1}"#;
        let answer: Value =
            serde_json::from_slice(&native().whole(&Bytes::from_static(body)).expect("whole")).expect("JSON");
        assert_eq!(
            (&answer["choices"][0]["message"]["content"], &answer["choices"][0]["finish_reason"]),
            (&"hi".into(), &"length".into())
        );
        for none in [&b"{}"[..], b"", br#"{"message":{"content":"x"},"done":false}"#] {
            assert!(native().whole(&Bytes::copy_from_slice(none)).is_none());
        }
    }
}
