//! Typed reading of request fields, refusing wrong types in the words of vLLM's validation library (pydantic, lax mode).
//!
//! A null field counts as absent. Unknown fields are ignored, as vLLM does.

use serde_json::{Map, Value};

use super::error::Failure;

/// A JSON object of a request and where in the body it stands.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    object: &'a Map<String, Value>,
    location: &'a str,
}

impl<'a> Fields<'a> {
    pub(crate) fn body(object: &'a Map<String, Value>) -> Self {
        Self { object, location: "body" }
    }

    pub(crate) fn at(object: &'a Map<String, Value>, location: &'a str) -> Self {
        Self { object, location }
    }

    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    fn wrong(&self, name: &str, kind: &str, message: &str, value: &Value) -> Failure {
        Failure::invalid(kind, &format!("{}.{name}", self.location), message, &shown(value))
    }

    pub(crate) fn missing(&self, name: &str) -> Failure {
        let location = format!("{}.{name}", self.location);
        Failure::invalid("missing", &location, "Field required", &format!("<dict of {} items>", self.object.len()))
    }

    pub(crate) fn text(&self, name: &str) -> Result<Option<&'a str>, Failure> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let wrong = || self.wrong(name, "string_type", "Input should be a valid string", value);
        value.as_str().map(Some).ok_or_else(wrong)
    }

    pub(crate) fn list(&self, name: &str) -> Result<Option<&'a Vec<Value>>, Failure> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let wrong = || self.wrong(name, "list_type", "Input should be a valid list", value);
        value.as_array().map(Some).ok_or_else(wrong)
    }

    pub(crate) fn object(&self, name: &str) -> Result<Option<&'a Map<String, Value>>, Failure> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let wrong = || self.wrong(name, "dict_type", "Input should be a valid dictionary", value);
        value.as_object().map(Some).ok_or_else(wrong)
    }

    pub(crate) fn boolean(&self, name: &str) -> Result<Option<bool>, Failure> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value {
            Value::Bool(value) => Ok(Some(*value)),
            Value::String(text) if text == "true" => Ok(Some(true)),
            Value::String(text) if text == "false" => Ok(Some(false)),
            Value::Number(number) if number.as_u64().is_some_and(|n| n < 2) => Ok(Some(number.as_u64() == Some(1))),
            _ => {
                let message = "Input should be a valid boolean, unable to interpret input";
                Err(self.wrong(name, "bool_parsing", message, value))
            }
        }
    }

    pub(crate) fn number(&self, name: &str) -> Result<Option<f64>, Failure> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value {
            Value::Number(number) => Ok(number.as_f64()),
            Value::String(text) => text.trim().parse().map(Some).map_err(|_| {
                let message = "Input should be a valid number, unable to parse string as a number";
                self.wrong(name, "float_parsing", message, value)
            }),
            _ => Err(self.wrong(name, "float_type", "Input should be a valid number", value)),
        }
    }

    pub(crate) fn integer(&self, name: &str) -> Result<Option<i64>, Failure> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value {
            Value::Number(number) => {
                let whole = number.as_f64().filter(|n| n.fract() == 0.0 && n.abs() < 9e15).map(|n| n as i64);
                let message = "Input should be a valid integer, got a number with a fractional part";
                number.as_i64().or(whole).map(Some).ok_or_else(|| self.wrong(name, "int_from_float", message, value))
            }
            Value::String(text) => text.trim().parse().map(Some).map_err(|_| {
                let message = "Input should be a valid integer, unable to parse string as an integer";
                self.wrong(name, "int_parsing", message, value)
            }),
            _ => Err(self.wrong(name, "int_type", "Input should be a valid integer", value)),
        }
    }

    /// A list of token ids.
    pub(crate) fn ids(&self, name: &str) -> Result<Option<Vec<u32>>, Failure> {
        let Some(list) = self.list(name)? else { return Ok(None) };
        let wrong = |value| self.wrong(name, "int_type", "Input should be a valid integer", value);
        list.iter().map(|value| id(value).ok_or_else(|| wrong(value))).collect::<Result<_, _>>().map(Some)
    }
}

/// A token id.
pub(crate) fn id(value: &Value) -> Option<u32> {
    u32::try_from(value.as_u64()?).ok()
}

/// A value as vLLM shows it in messages.
pub(crate) fn shown(value: &Value) -> String {
    match value {
        Value::Null => "None".to_owned(),
        Value::Bool(value) => if *value { "True" } else { "False" }.to_owned(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => text.clone(),
        Value::Array(list) => format!("<list of {} items>", list.len()),
        Value::Object(object) => format!("<dict of {} items>", object.len()),
    }
}
