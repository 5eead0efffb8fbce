//! Refusals in vLLM's shapes.
//!
//! Three shapes: `{"error": {message, type, param, code}}` with an integer code for what vLLM itself refuses, `{"detail"}`
//! for what its web framework refuses, and `{"error": "Unauthorized"}` for a wrong key.

use http::{HeaderValue, Method, StatusCode, header};
use serde_json::{Value, json};

use super::{empty, json_answer};
use crate::server::Answer;

/// A refused request, ready to be answered.
#[derive(Debug)]
pub(crate) struct Failure {
    status: StatusCode,
    headers: Vec<(header::HeaderName, HeaderValue)>,
    /// Null for an empty body.
    body: Value,
}

impl Failure {
    pub(crate) fn status(&self) -> StatusCode {
        self.status
    }

    /// What it says, for engines that say it in another shape.
    pub(crate) fn message(&self) -> &str {
        let said = [self.body.pointer("/error/message"), self.body.get("detail"), self.body.get("error")];
        said.into_iter().flatten().find_map(Value::as_str).unwrap_or_default()
    }

    /// A refusal in these words, for engines that have no other.
    pub(crate) fn plain(status: StatusCode, message: &str) -> Self {
        Self::error(status, "BadRequestError", message, None)
    }

    pub(crate) fn into_answer(self) -> Answer {
        if self.body.is_null() {
            return empty(self.status, self.headers);
        }
        let mut answer = json_answer(self.status, &self.body);
        if let Answer::Whole { headers, .. } = &mut answer {
            headers.extend(self.headers);
        }
        answer
    }

    fn new(status: StatusCode, body: Value) -> Self {
        Self { status, headers: Vec::new(), body }
    }

    fn error(status: StatusCode, kind: &str, message: &str, param: Option<&str>) -> Self {
        let error = json!({"message": message, "type": kind, "param": param, "code": status.as_u16()});
        Self::new(status, json!({"error": error}))
    }

    /// A request that reads well but cannot be done.
    pub(crate) fn bad_request(message: &str, param: Option<&str>) -> Self {
        Self::error(StatusCode::BAD_REQUEST, "BadRequestError", message, param)
    }

    /// What an administrator gave is wrong.
    pub(crate) fn user_input(message: &str) -> Self {
        Self::error(StatusCode::BAD_REQUEST, "InvalidUserInput", message, None)
    }

    /// Something that was named is not there.
    pub(crate) fn unknown(message: &str) -> Self {
        Self::error(StatusCode::NOT_FOUND, "NotFoundError", message, None)
    }

    /// A value out of range, named in the message as vLLM does.
    pub(crate) fn out_of_range(message: &str, param: &str, value: &str) -> Self {
        Self::bad_request(&format!("{message} (parameter={param}, value={value})"), Some(param))
    }

    /// A field of the wrong type or missing, in the words of vLLM's validation library.
    pub(crate) fn invalid(kind: &str, location: &str, message: &str, input: &str) -> Self {
        let message = format!(
            "1 validation error:\n  {{'type': '{kind}', 'loc': '{location}', 'msg': '{message}', 'input': '{input}'}}"
        );
        Self::error(StatusCode::BAD_REQUEST, "Bad Request", &message, Some(location))
    }

    pub(crate) fn invalid_json(position: usize) -> Self {
        let location = format!("body.{position}");
        let message = format!(
            "1 validation error:\n  {{'type': 'json_invalid', 'loc': '{location}', 'msg': 'JSON decode error', \
             'input': '<dict of 0 items>', 'ctx': {{'error': 'Expecting value'}}}}"
        );
        Self::error(StatusCode::BAD_REQUEST, "Bad Request", &message, Some(&location))
    }

    pub(crate) fn unsupported_media_type() -> Self {
        let message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed";
        Self::error(StatusCode::BAD_REQUEST, "Bad Request", message, None)
    }

    /// `aliases` are named by the generating endpoints alone.
    pub(crate) fn unknown_model(model: &str, aliases: Option<&str>) -> Self {
        let message = format!("The model `{model}` does not exist.");
        let message = aliases.map_or_else(|| message.clone(), |names| format!("{message} Valid aliases: {names}."));
        Self::error(StatusCode::NOT_FOUND, "NotFoundError", &message, aliases.map(|_| "model"))
    }

    pub(crate) fn full() -> Self {
        let message = "The server is overloaded: the limit of queued requests is reached. Please retry later.";
        Self::error(StatusCode::SERVICE_UNAVAILABLE, "Service Unavailable", message, None)
    }

    pub(crate) fn engine_death() -> Self {
        let message = "EngineCore encountered an issue. See stack trace (above) for the root cause.";
        Self::error(StatusCode::INTERNAL_SERVER_ERROR, "InternalServerError", message, None)
    }

    /// The answer of a status fault.
    pub(crate) fn injected(status: StatusCode) -> Self {
        let kind = match status {
            StatusCode::TOO_MANY_REQUESTS => "RateLimitError",
            StatusCode::SERVICE_UNAVAILABLE => "ServiceUnavailableError",
            status if status.is_server_error() => "InternalServerError",
            _ => "BadRequestError",
        };
        Self::error(status, kind, "This failure was asked for.", None)
    }

    pub(crate) fn not_found() -> Self {
        Self::new(StatusCode::NOT_FOUND, json!({"detail": "Not Found"}))
    }

    pub(crate) fn unreadable() -> Self {
        Self::new(StatusCode::BAD_REQUEST, json!({"detail": "There was an error parsing the body"}))
    }

    pub(crate) fn method_not_allowed(allowed: &Method) -> Self {
        let mut failure = Self::new(StatusCode::METHOD_NOT_ALLOWED, json!({"detail": "Method Not Allowed"}));
        failure.headers.extend(HeaderValue::from_str(allowed.as_str()).map(|value| (header::ALLOW, value)));
        failure
    }

    pub(crate) fn unauthorized() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, json!({"error": "Unauthorized"}))
    }

    pub(crate) fn redirect(location: &str) -> Self {
        let mut failure = Self::new(StatusCode::TEMPORARY_REDIRECT, Value::Null);
        failure.headers.extend(HeaderValue::from_str(location).map(|value| (header::LOCATION, value)));
        failure
    }
}
