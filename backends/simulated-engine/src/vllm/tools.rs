//! Tool calls and constrained answers: what the request asks for, as a text to say.
//!
//! A call that is forced by name ends with `stop`, any other with `tool_calls`, as seen in vLLM. With `auto`, which a
//! small model seldom uses, the last message has to ask for it in words: [`TRIGGER`].

use serde_json::{Map, Value};

use super::{error::Failure, fields::Fields, new_id};
use crate::schema;

/// In the last message, makes the model call its first tool though it is free not to.
pub(crate) const TRIGGER: &str = "call the tool";

/// What an answer has to be.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Say {
    Prose,
    /// This text: an instance of a schema, or one of a list of choices.
    Text(String),
    Call(Call),
}

/// A tool call.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Call {
    pub(crate) name: String,
    pub(crate) arguments: String,
    /// How an answer that ends by itself says that it ended.
    pub(crate) finish: &'static str,
    /// Whether the message has no content at all, instead of an empty one.
    pub(crate) content_null: bool,
}

impl Call {
    /// What a model writes before the arguments.
    pub(crate) fn lead(&self) -> String {
        format!("[{{\"name\": \"{}\", \"parameters\": ", self.name)
    }
}

pub(crate) fn new_call_id() -> String {
    format!("chatcmpl-tool-{}", new_id())
}

/// Reads what `tools`, `tool_choice`, `response_format` and `structured_outputs` ask for.
pub(crate) fn read(fields: &Fields<'_>, last_message: &str) -> Result<Say, Failure> {
    let tools = fields.list("tools")?.map(Vec::as_slice).unwrap_or_default();
    if let Some(call) = call(fields, tools, last_message)? {
        return Ok(Say::Call(call));
    }
    if let Some(format) = fields.object("response_format")? {
        return response_format(&Fields::at(format, "body.response_format"));
    }
    match fields.object("structured_outputs")? {
        Some(wanted) => structured(wanted),
        None => Ok(Say::Prose),
    }
}

fn call(fields: &Fields<'_>, tools: &[Value], last_message: &str) -> Result<Option<Call>, Failure> {
    let choice = fields.get("tool_choice");
    if choice.is_some_and(|choice| choice != "none") && tools.is_empty() {
        let message = "When using `tool_choice`, `tools` must be set. (parameter=tool_choice)";
        return Err(Failure::bad_request(message, Some("tool_choice")));
    }
    let forced = choice.and_then(|choice| choice.pointer("/function/name")).and_then(Value::as_str);
    let name_of = |tool: &Value| tool.pointer("/function/name").and_then(Value::as_str).map(str::to_owned);
    let chosen = match (forced, choice.and_then(Value::as_str)) {
        (Some(name), _) => match tools.iter().find(|tool| name_of(tool).as_deref() == Some(name)) {
            Some(tool) => Some(tool),
            None => {
                let message = "The tool specified in `tool_choice` does not match any of the specified `tools`";
                return Err(Failure::bad_request(message, Some("tool_choice")));
            }
        },
        (None, Some("required")) => tools.first(),
        (None, Some("auto") | None) if last_message.to_lowercase().contains(TRIGGER) => tools.first(),
        _ => None,
    };
    let Some(tool) = chosen else { return Ok(None) };
    let parameters = tool.pointer("/function/parameters").unwrap_or(&Value::Null);
    let arguments = if parameters.is_object() { schema::instance(parameters, "Paris") } else { Map::new().into() };
    Ok(Some(Call {
        name: name_of(tool).unwrap_or_default(),
        arguments: arguments.to_string(),
        finish: if forced.is_some() { "stop" } else { "tool_calls" },
        content_null: forced.is_none() && choice.is_none_or(|choice| choice == "auto"),
    }))
}

fn response_format(format: &Fields<'_>) -> Result<Say, Failure> {
    match format.text("type")? {
        Some("json_object") => Ok(Say::Text(r#"{"answer": "water"}"#.to_owned())),
        Some("json_schema") => {
            let Some(json_schema) = format.object("json_schema")? else {
                return Err(Failure::bad_request("`json_schema` must be set.", Some("response_format")));
            };
            from_schema(json_schema.get("schema").unwrap_or(&Value::Null))
        }
        _ => Ok(Say::Prose),
    }
}

fn structured(wanted: &Map<String, Value>) -> Result<Say, Failure> {
    if let Some(schema) = wanted.get("json").filter(|schema| !schema.is_null()) {
        return from_schema(schema);
    }
    let first = wanted.get("choice").and_then(|choices| choices.get(0)).and_then(Value::as_str);
    Ok(first.map_or(Say::Prose, |choice| Say::Text(choice.to_owned())))
}

fn from_schema(schema: &Value) -> Result<Say, Failure> {
    if let Some(name) = schema::unknown_type(schema) {
        return Err(Failure::bad_request(&format!("Grammar error: Invalid type: {name}"), None));
    }
    Ok(Say::Text(schema::instance(schema, "Paris").to_string()))
}
