//! A chat request's conversation, and how vLLM reshapes it before it renders the model's template.
//!
//! The reshaping is that of vLLM 0.32 and 0.33 (`entrypoints/chat_utils.py`, and the pydantic models that read a
//! request): contents become text or parts as the template wants them, tool calls carry parsed arguments, messages
//! keep only the fields vLLM knows, tools are written out in vLLM's order of fields.
//!
//! Not here: refusing what an engine would refuse. What is not understood (an image, an unknown part) is left out and
//! the result marked as no exact count.

use std::time::SystemTime;

use serde_json::{Map, Value};

use crate::error::Error;
use crate::template::ContentFormat;

/// A conversation to render: fields of the request as the client sent them.
#[derive(Debug, Clone, Copy)]
pub struct Chat<'a> {
    /// JSON array of messages.
    pub messages: &'a [u8],
    /// JSON array of tools; JSON `null` is none.
    pub tools: Option<&'a [u8]>,
    /// JSON array of documents; JSON `null` is none.
    pub documents: Option<&'a [u8]>,
    /// JSON object of further template variables (`chat_template_kwargs`); JSON `null` is none.
    pub kwargs: Option<&'a [u8]>,
    /// Passed to the template under this name, over `kwargs`.
    pub reasoning_effort: Option<&'a str>,
    /// A template of the request's own, or the name of one of the model's. Whether a client may send one is the
    /// caller's decision.
    pub chat_template: Option<&'a str>,
    /// vLLM's default is true.
    pub add_generation_prompt: bool,
    pub continue_final_message: bool,
    /// Whether the tokenizer adds its own special tokens (BOS) to the rendered text. vLLM's default for chats is
    /// false, since templates write them out.
    pub add_special_tokens: bool,
    /// What `strftime_now` writes, in UTC.
    pub now: SystemTime,
}

impl<'a> Chat<'a> {
    /// A chat with vLLM's defaults.
    #[must_use]
    pub fn new(messages: &'a [u8], now: SystemTime) -> Self {
        Self {
            messages,
            tools: None,
            documents: None,
            kwargs: None,
            reasoning_effort: None,
            chat_template: None,
            add_generation_prompt: true,
            continue_final_message: false,
            add_special_tokens: false,
            now,
        }
    }
}

/// Variables of the template that `chat_template_kwargs` may not set: the conversation itself, and the two arguments
/// of `apply_chat_template` that vLLM refuses.
const RESERVED: [&str; 3] = ["messages", "chat_template", "tokenize"];

/// A [`Chat`] after parsing.
#[derive(Debug)]
pub(crate) struct Parsed {
    pub(crate) messages: Vec<Value>,
    pub(crate) tools: Option<Vec<Value>>,
    pub(crate) documents: Option<Vec<Value>>,
    pub(crate) kwargs: Map<String, Value>,
    pub(crate) add_generation_prompt: bool,
    pub(crate) continue_final_message: bool,
    pub(crate) now: SystemTime,
}

impl Parsed {
    pub(crate) fn new(chat: &Chat<'_>) -> Result<Self, Error> {
        let mut kwargs = match chat.kwargs {
            Some(json) => parse::<Option<Map<_, _>>>("chat_template_kwargs", json)?.unwrap_or_default(),
            None => Map::new(),
        };
        if let Some(name) = RESERVED.iter().find(|name| kwargs.contains_key(**name)) {
            return Err(Error::field(format!("chat_template_kwargs.{name}"), "cannot be set there"));
        }
        if let Some(effort) = chat.reasoning_effort {
            kwargs.insert("reasoning_effort".to_owned(), effort.into());
        }
        Ok(Self {
            messages: objects("messages", parse("messages", chat.messages)?)?,
            tools: optional_objects("tools", chat.tools)?,
            documents: optional_objects("documents", chat.documents)?,
            kwargs,
            add_generation_prompt: chat.add_generation_prompt,
            continue_final_message: chat.continue_final_message,
            now: chat.now,
        })
    }

    /// Reshapes the conversation as vLLM does. Gives back whether all of it was understood, so that the rendered text
    /// is exactly the engine's.
    pub(crate) fn normalize(&mut self, format: ContentFormat) -> Result<bool, Error> {
        let mut exact = true;
        for (index, message) in self.messages.iter_mut().enumerate() {
            let Value::Object(fields) = message else { continue };
            *message = Value::Object(normalize_message(index, std::mem::take(fields), format, &mut exact)?);
        }
        for tool in self.tools.iter_mut().flatten() {
            if let Value::Object(fields) = tool {
                *tool = Value::Object(normalize_tool(std::mem::take(fields)));
            }
        }
        Ok(exact)
    }
}

fn parse<T: serde::de::DeserializeOwned>(field: &str, json: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(json).map_err(|error| Error::field(field, format!("cannot be read: {error}")))
}

fn optional_objects(field: &str, json: Option<&[u8]>) -> Result<Option<Vec<Value>>, Error> {
    let parsed = json.map(|json| parse::<Option<Vec<Value>>>(field, json)).transpose()?.flatten();
    parsed.map(|list| objects(field, list)).transpose()
}

fn objects(field: &str, list: Vec<Value>) -> Result<Vec<Value>, Error> {
    match list.iter().position(|value| !value.is_object()) {
        Some(index) => Err(Error::field(format!("{field}[{index}]"), "must be an object")),
        None => Ok(list),
    }
}

/// vLLM's `_parse_chat_message_content` and `_postprocess_messages` for one message.
fn normalize_message(
    index: usize,
    mut fields: Map<String, Value>,
    format: ContentFormat,
    exact: &mut bool,
) -> Result<Map<String, Value>, Error> {
    let role = match fields.remove("role") {
        // vLLM 0.32 takes `developer` as `system` before it renders
        Some(Value::String(role)) if role == "developer" => "system".to_owned(),
        Some(Value::String(role)) => role,
        _ => return Err(Error::field(format!("messages[{index}].role"), "must be a string")),
    };
    let parts = parts(index, fields.remove("content"), exact)?;
    let content = match format {
        ContentFormat::Parts if role != "tool" || parts.iter().any(|part| !matches!(part, Part::Text(_))) => {
            Value::Array(parts.into_iter().map(Part::into_json).collect())
        }
        ContentFormat::Parts => Value::String(joined(parts, |_| true)),
        ContentFormat::Text => Value::String(joined(parts, |text| !text.is_empty())),
    };
    let mut message = Map::new();
    message.insert("role".to_owned(), Value::String(role.clone()));
    message.insert("content".to_owned(), content);
    match role.as_str() {
        "assistant" => {
            // the older name of the field is accepted, and both are given to the template
            let named = ["reasoning", "reasoning_content"].into_iter().filter_map(|name| fields.remove(name));
            if let Some(reasoning) = named.into_iter().find(|value| !value.is_null()) {
                message.insert("reasoning".to_owned(), reasoning.clone());
                message.insert("reasoning_content".to_owned(), reasoning);
            }
            if let Some(Value::Array(calls)) = fields.remove("tool_calls")
                && !calls.is_empty()
            {
                let calls = calls.into_iter().map(normalize_tool_call).collect();
                message.insert("tool_calls".to_owned(), Value::Array(calls));
            }
        }
        "tool" => keep(&mut fields, &mut message, "tool_call_id", |_| true),
        _ => {}
    }
    keep(&mut fields, &mut message, "name", Value::is_string);
    Ok(message)
}

fn joined(parts: Vec<Part>, wanted: impl Fn(&str) -> bool) -> String {
    parts.into_iter().filter_map(Part::into_text).filter(|text| wanted(text)).collect::<Vec<_>>().join("\n")
}

fn keep(from: &mut Map<String, Value>, to: &mut Map<String, Value>, name: &str, wanted: impl Fn(&Value) -> bool) {
    if let Some(value) = from.remove(name).filter(wanted) {
        to.insert(name.to_owned(), value);
    }
}

/// A part of a message's content, as far as templates see it.
enum Part {
    Text(String),
    /// `{"type": "image"}` and the like, in templates that take parts.
    Media(&'static str),
}

impl Part {
    fn into_text(self) -> Option<String> {
        match self {
            Self::Text(text) => Some(text),
            Self::Media(_) => None,
        }
    }

    fn into_json(self) -> Value {
        match self {
            Self::Text(text) => serde_json::json!({"type": "text", "text": text}),
            Self::Media(kind) => serde_json::json!({"type": kind}),
        }
    }
}

fn parts(index: usize, content: Option<Value>, exact: &mut bool) -> Result<Vec<Part>, Error> {
    match content {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::String(text)) => Ok(vec![Part::Text(text)]),
        Some(Value::Array(list)) => Ok(list.into_iter().filter_map(|value| part(value, exact)).collect()),
        Some(_) => Err(Error::field(format!("messages[{index}].content"), "must be text or an array of parts")),
    }
}

/// One content part, or nothing where vLLM leaves it out.
fn part(value: Value, exact: &mut bool) -> Option<Part> {
    let mut fields = match value {
        Value::String(text) => return Some(Part::Text(text)),
        Value::Object(fields) => fields,
        _ => {
            *exact = false;
            return None;
        }
    };
    let kind = match fields.get("type") {
        Some(Value::String(kind)) => kind.clone(),
        // without a type, the field that is there tells
        _ => ["image_url", "audio_url", "input_audio", "video_url"]
            .into_iter()
            .find(|name| fields.contains_key(*name))
            .unwrap_or_default()
            .to_owned(),
    };
    let text_field = match kind.as_str() {
        "text" | "input_text" | "output_text" => "text",
        "refusal" => "refusal",
        "thinking" => "thinking",
        _ => {
            *exact = false;
            return media(&kind).map(Part::Media);
        }
    };
    match fields.remove(text_field) {
        Some(Value::String(text)) => Some(Part::Text(text)),
        Some(Value::Null) | None => None,
        Some(_) => {
            *exact = false;
            None
        }
    }
}

/// What vLLM calls a part that is not text, in templates that take parts.
fn media(kind: &str) -> Option<&'static str> {
    match kind {
        "image_url" | "input_image" | "image_pil" | "image_embeds" => Some("image"),
        "audio_url" | "input_audio" | "audio_embeds" => Some("audio"),
        "video_url" => Some("video"),
        _ => None,
    }
}

/// A call's arguments become an object, from the JSON text in which they travel; text that is no JSON becomes an
/// empty object. Fields stand in the order of OpenAI's types, and others are dropped, as pydantic does it.
fn normalize_tool_call(call: Value) -> Value {
    let Value::Object(mut call) = call else { return call };
    let mut ordered = Map::new();
    keep(&mut call, &mut ordered, "id", |_| true);
    if let Some(Value::Object(mut function)) = call.remove("function") {
        let arguments = match function.remove("arguments") {
            Some(Value::String(text)) => serde_json::from_str(&text).unwrap_or_else(|_| Value::Object(Map::new())),
            Some(whole @ (Value::Object(_) | Value::Array(_))) => whole,
            _ => Value::Object(Map::new()),
        };
        let mut inner = Map::new();
        inner.insert("arguments".to_owned(), arguments);
        keep(&mut function, &mut inner, "name", |_| true);
        ordered.insert("function".to_owned(), Value::Object(inner));
    }
    keep(&mut call, &mut ordered, "type", |_| true);
    Value::Object(ordered)
}

/// A tool as vLLM's own model of it is written out again (`ChatCompletionToolsParam.model_dump()`): its known fields
/// first, absent ones as `null`, then what else the client sent.
fn normalize_tool(mut tool: Map<String, Value>) -> Map<String, Value> {
    let mut ordered = Map::new();
    ordered.insert("type".to_owned(), tool.remove("type").unwrap_or_else(|| "function".into()));
    let function = match tool.remove("function") {
        Some(Value::Object(mut function)) => {
            let mut inner = Map::new();
            for name in ["name", "description", "parameters"] {
                inner.insert(name.to_owned(), function.remove(name).unwrap_or_default());
            }
            inner.extend(function);
            Some(Value::Object(inner))
        }
        other => other,
    };
    ordered.extend(function.map(|function| ("function".to_owned(), function)));
    ordered.extend(tool);
    ordered
}

#[cfg(test)]
mod tests;
