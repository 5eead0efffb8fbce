//! Why a request is not taken, in the manner of OpenAI's own messages. The status is 400 throughout.

use std::fmt;

use super::field::{Kind, kind};
use crate::error::ApiError;

/// A refused request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// For the client. Holds at most a few bytes of the client's own values.
    pub message: String,
    /// The offending field, as in `messages[2].role`.
    pub param: Option<String>,
    /// `invalid_json`, `missing_required_parameter`, `invalid_type`, `invalid_value` or `duplicate_parameter`.
    pub code: &'static str,
}

impl Refusal {
    pub(super) fn json(problem: fmt::Arguments<'_>) -> Self {
        Self {
            message: format!("We could not parse the JSON body of your request: {problem}."),
            param: None,
            code: "invalid_json",
        }
    }

    pub(super) fn missing(name: &str) -> Self {
        Self {
            message: format!("Missing required parameter: '{name}'."),
            param: Some(name.to_owned()),
            code: "missing_required_parameter",
        }
    }

    pub(super) fn doubled(name: &str) -> Self {
        Self {
            message: format!("Duplicate parameter: '{name}' is given more than once."),
            param: Some(name.to_owned()),
            code: "duplicate_parameter",
        }
    }

    /// `expected` and the type of `text`, each with its article.
    pub(super) fn wrong_type(name: &str, expected: &str, text: &str) -> Self {
        let got = match kind(text) {
            Kind::Null => "null",
            Kind::Boolean => "a boolean",
            Kind::Number if text.bytes().any(|b| matches!(b, b'.' | b'e' | b'E')) => "a decimal number",
            Kind::Number => "an integer",
            Kind::String => "a string",
            Kind::Array => "an array",
            Kind::Object => "an object",
        };
        Self {
            message: format!("Invalid type for '{name}': expected {expected}, but got {got} instead."),
            param: Some(name.to_owned()),
            code: "invalid_type",
        }
    }

    pub(super) fn value(name: &str, problem: fmt::Arguments<'_>) -> Self {
        Self { message: format!("Invalid '{name}': {problem}."), param: Some(name.to_owned()), code: "invalid_value" }
    }

    pub(super) fn out_of_range(name: &str, side: &str, relation: &str, bound: i64, text: &str) -> Self {
        const ECHO_MAX: usize = 24;
        let got = if text.len() <= ECHO_MAX { text } else { "a number of many digits" };
        Self::value(name, format_args!("integer {side}. Expected a value {relation} {bound}, but got {got} instead"))
    }

    /// A value that is JSON by its shape and still cannot be read, such as half a surrogate pair.
    pub(super) fn text(name: &str, error: &serde_json::Error) -> Self {
        let mut refusal = Self::json(format_args!("the value of '{name}' is not valid: {error}"));
        refusal.param = Some(name.to_owned());
        refusal
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        Self {
            message: refusal.message,
            kind: "invalid_request_error".to_owned(),
            param: refusal.param,
            code: Some(refusal.code.to_owned()),
        }
    }
}
