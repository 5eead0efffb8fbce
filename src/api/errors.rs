//! The one place that knows what a refusal looks like outside: status, `type`, `code`, message, `Retry-After`.

use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use forebay_proto::error::{ApiError, openai_body};
use forebay_proto::peek::Refusal as Unreadable;
use forebay_scheduler::{Failure, Refusal};
use http::header::{ACCEPT_ENCODING, CONNECTION, CONTENT_TYPE, HeaderName, RETRY_AFTER};
use http::{HeaderValue, Method, StatusCode};

use super::body::coding::{ACCEPTED, Coding, Undecodable, ZSTD_WINDOW_MAX};
use super::headers;
use crate::ids::RequestName;
use crate::ledger::{self, Outcome};
use crate::{dispatch, pipeline, prepare};

/// Official SDKs retry 5xx and 429 by themselves; this header says when they should not.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

const BUSY: &str = "Every worker of this model is at its limit.";

/// Of a request whose client named a deadline.
const DEADLINE_PASSED: &str = "The request's deadline passed before a worker began to answer.";

/// Everything that ends a request before its answer begins.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("no such path")]
    UnknownPath { method: Method, path: String },
    #[error("no such method here")]
    Method { method: Method, path: String },
    #[error("the body is not JSON by its content type")]
    ContentType,
    #[error("the body's encoding is not known")]
    ContentEncoding,
    #[error("the body cannot be decoded as {}", .0.name())]
    Undecodable(Coding, Undecodable),
    #[error("the body is over {bytes_max} bytes")]
    BodyTooLarge { bytes_max: usize },
    #[error("the body took too long to come")]
    BodyTimeout,
    #[error("the body is framed wrongly")]
    BodyBroken,
    /// It left in the middle of its body; nobody reads the answer.
    #[error("the body broke off")]
    ClientGone,
    #[error("header `{name}` must be {expected}")]
    Header { name: HeaderName, expected: &'static str },
    #[error("{}", .0.message)]
    Unreadable(Unreadable),
    #[error("the drain time is over")]
    Stopping,
    #[error(transparent)]
    Ledger(#[from] ledger::Full),
    #[error(transparent)]
    Pipeline(#[from] pipeline::Error),
}

impl From<Unreadable> for Error {
    fn from(unreadable: Unreadable) -> Self {
        Self::Unreadable(unreadable)
    }
}

/// A refusal's outside.
struct Shown {
    status: StatusCode,
    error: ApiError,
    retry_after: Option<Duration>,
}

fn shown(status: StatusCode, kind: &str, code: Option<&str>, param: Option<&str>, message: String) -> Shown {
    let error = ApiError { message, kind: kind.into(), param: param.map(Into::into), code: code.map(Into::into) };
    Shown { status, error, retry_after: None }
}

fn bad_request(status: StatusCode, code: Option<&str>, param: Option<&str>, message: String) -> Shown {
    shown(status, "invalid_request_error", code, param, message)
}

fn unavailable(code: &str, retry_after: Option<Duration>, message: &str) -> Shown {
    let status = StatusCode::SERVICE_UNAVAILABLE;
    let retry_after = retry_after.or(Some(Duration::from_secs(1)));
    Shown { retry_after, ..shown(status, "service_unavailable_error", Some(code), None, message.to_owned()) }
}

fn gateway(status: StatusCode, code: &str, message: &str) -> Shown {
    shown(status, "server_error", Some(code), None, message.to_owned())
}

impl Error {
    fn shown(&self) -> Shown {
        match self {
            Self::UnknownPath { method, path } => {
                bad_request(StatusCode::NOT_FOUND, None, None, format!("Invalid URL ({method} {path})"))
            }
            Self::Method { method, path } => {
                let message = format!("Not allowed to {method} on {path}");
                bad_request(StatusCode::METHOD_NOT_ALLOWED, None, None, message)
            }
            Self::ContentType => {
                let message = "Unsupported content type: send the body as 'application/json'.".to_owned();
                bad_request(StatusCode::UNSUPPORTED_MEDIA_TYPE, None, None, message)
            }
            Self::ContentEncoding => {
                let message =
                    format!("Unsupported content encoding: send the body uncompressed, or as one of {ACCEPTED}.");
                bad_request(StatusCode::UNSUPPORTED_MEDIA_TYPE, None, None, message)
            }
            Self::Undecodable(coding, why) => {
                let message = match why {
                    Undecodable::Invalid => format!("The request body is not valid {}.", coding.name()),
                    Undecodable::Window => format!(
                        "The request body is {} with a window of more than {} MiB: compress it with a smaller one.",
                        coding.name(),
                        ZSTD_WINDOW_MAX >> 20
                    ),
                };
                bad_request(StatusCode::BAD_REQUEST, None, None, message)
            }
            Self::BodyTooLarge { bytes_max } => {
                let message = format!("The request body is larger than the {bytes_max} bytes this server accepts.");
                bad_request(StatusCode::PAYLOAD_TOO_LARGE, Some("request_too_large"), None, message)
            }
            Self::BodyTimeout => {
                let message = "The request body did not arrive in time.".to_owned();
                bad_request(StatusCode::REQUEST_TIMEOUT, Some("request_timeout"), None, message)
            }
            Self::BodyBroken | Self::ClientGone => {
                let message = "The request body broke off or is framed wrongly.".to_owned();
                bad_request(StatusCode::BAD_REQUEST, None, None, message)
            }
            Self::Header { name, expected } => {
                let message = format!("Invalid header '{name}': expected {expected}.");
                bad_request(StatusCode::BAD_REQUEST, Some("invalid_value"), Some(name.as_str()), message)
            }
            Self::Unreadable(Unreadable { message, param, code }) => {
                bad_request(StatusCode::BAD_REQUEST, Some(code), param.as_deref(), message.clone())
            }
            Self::Stopping => unavailable("server_is_stopping", None, "The server is shutting down. Please try again."),
            Self::Ledger(ledger::Full) => {
                unavailable("server_is_overloaded", None, "The server cannot record more requests at the moment.")
            }
            Self::Pipeline(error) => shown_pipeline(error),
        }
    }

    /// The status for the row, where 499 is a client that left.
    pub(super) fn status(&self) -> u16 {
        match self {
            Self::ClientGone => 499,
            _ => self.shown().status.as_u16(),
        }
    }

    pub(super) fn outcome(&self) -> Outcome {
        match self {
            Self::Stopping => Outcome::Failed,
            Self::ClientGone => Outcome::ClientGone,
            Self::Pipeline(pipeline::Error::Dispatch(dispatch::Error::Engine { status, .. }))
                if status.is_client_error() =>
            {
                Outcome::EngineRefused
            }
            Self::Pipeline(pipeline::Error::Dispatch(
                dispatch::Error::Engine { .. }
                | dispatch::Error::Refused { reason: Refusal::AttemptsExhausted { .. }, .. },
            )) => Outcome::Failed,
            _ => Outcome::Refused,
        }
    }

    /// The answer that the client gets.
    pub(super) fn respond(&self, name: &RequestName) -> Response {
        let Shown { status, error, retry_after } = self.shown();
        let mut response = Response::new(Body::from(openai_body(&error)));
        *response.status_mut() = status;
        headers::identify(&mut response, name);
        let fields = response.headers_mut();
        fields.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(wait) = retry_after {
            fields.insert(RETRY_AFTER, HeaderValue::from(wait.as_secs_f64().ceil().max(1.0) as u64));
        }
        if matches!(self, Self::ContentEncoding) {
            fields.insert(ACCEPT_ENCODING, HeaderValue::from_static(ACCEPTED));
        }
        if self.is_final() {
            fields.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        if matches!(self, Self::BodyTooLarge { .. } | Self::BodyTimeout | Self::BodyBroken | Self::ClientGone) {
            // What is left of the body is not read: this connection cannot carry another request.
            fields.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    /// Whether trying the same again at once is useless although the status suggests it: our own attempts are spent.
    fn is_final(&self) -> bool {
        match self {
            Self::Pipeline(pipeline::Error::Deadline) => true,
            Self::Pipeline(pipeline::Error::Dispatch(dispatch::Error::Refused { reason, .. })) => match reason {
                // Nobody was there to take it, as in a restart: a client does well to come again.
                Refusal::AttemptsExhausted { last } => *last != Failure::Connect,
                reason => {
                    matches!(reason, Refusal::TimedOut | Refusal::DeadlinePassed | Refusal::DeadlineTooShort)
                }
            },
            // The last of several failures, in an engine's words.
            Self::Pipeline(pipeline::Error::Dispatch(dispatch::Error::Engine { status, .. })) => {
                !status.is_client_error()
            }
            _ => false,
        }
    }
}

/// The header lines and the body of a refusal by the HTTP library.
pub(super) fn unread(status: u16, name: &RequestName) -> (String, Vec<u8>) {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_REQUEST);
    let message = match status {
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => "The request's headers are too large.",
        StatusCode::URI_TOO_LONG => "The request's URL is too long.",
        _ => "The request is not HTTP that can be read.",
    };
    let shown = bad_request(status, None, None, message.to_owned());
    (
        format!("content-type: application/json\r\n{}: {}\r\n", headers::REQUEST_ID, name.as_str()),
        openai_body(&shown.error).into(),
    )
}

fn shown_pipeline(error: &pipeline::Error) -> Shown {
    match error {
        pipeline::Error::Route(unknown) if unknown.name.is_empty() => {
            let message = "Missing required parameter: 'model'.".to_owned();
            bad_request(StatusCode::BAD_REQUEST, Some("missing_required_parameter"), Some("model"), message)
        }
        pipeline::Error::Route(unknown) => {
            let name: String = unknown.name.chars().take(200).collect();
            let message = format!("The model `{name}` does not exist.");
            bad_request(StatusCode::NOT_FOUND, Some("model_not_found"), Some("model"), message)
        }
        pipeline::Error::Prepare(error) => shown_prepare(error),
        pipeline::Error::Dispatch(error) => shown_dispatch(error),
        pipeline::Error::Deadline => late(None, DEADLINE_PASSED),
    }
}

fn shown_prepare(error: &prepare::Error) -> Shown {
    match error {
        prepare::Error::TooLong { tokens, output, limit, param } => {
            let asked = tokens.saturating_add(*output);
            let message = format!(
                "This model's maximum context length is {limit} tokens. However, you requested {asked} tokens \
                 ({tokens} in the prompt, {output} in the completion). Please reduce the length of either one."
            );
            bad_request(StatusCode::BAD_REQUEST, Some("context_length_exceeded"), Some(param), message)
        }
        prepare::Error::Engine(error) => {
            Shown { status: StatusCode::BAD_REQUEST, error: error.clone(), retry_after: None }
        }
        prepare::Error::Template(message) => {
            bad_request(StatusCode::BAD_REQUEST, Some("invalid_value"), Some("messages"), message.clone())
        }
        prepare::Error::NoTokenizer => {
            let message = "No tokenizer is known for this model.".to_owned();
            shown(StatusCode::NOT_IMPLEMENTED, "server_error", Some("no_tokenizer"), None, message)
        }
        prepare::Error::NoAnswer => {
            gateway(StatusCode::BAD_GATEWAY, "upstream_error", "The engine that counts for this model does not answer.")
        }
        prepare::Error::Busy => {
            unavailable("server_is_overloaded", None, "Too many prompts wait to be counted at the moment.")
        }
    }
}

fn shown_dispatch(error: &dispatch::Error) -> Shown {
    match error {
        dispatch::Error::Refused { reason, retry_after } => shown_refusal(reason, *retry_after),
        dispatch::Error::Engine { status, error, retry_after } if status.is_client_error() => {
            Shown { status: *status, error: error.clone(), retry_after: *retry_after }
        }
        dispatch::Error::Engine { error, retry_after, .. } => {
            let error = ApiError { kind: "server_error".into(), code: Some("upstream_error".into()), ..error.clone() };
            Shown { status: StatusCode::BAD_GATEWAY, error, retry_after: *retry_after }
        }
    }
}

fn shown_refusal(reason: &Refusal, retry_after: Option<Duration>) -> Shown {
    match reason {
        Refusal::QueueFull => {
            unavailable("server_is_overloaded", retry_after, "The queue for this model is full. Please retry later.")
        }
        Refusal::NoWorker | Refusal::PoolUnknown => {
            unavailable("no_worker", retry_after, "No worker serves this model at the moment. Please retry later.")
        }
        Refusal::AdapterUnavailable => unavailable(
            "adapter_unavailable",
            retry_after,
            "No worker has the adapter that is asked for, and none can load it at the moment.",
        ),
        Refusal::Busy { .. } => unavailable("server_is_overloaded", retry_after, BUSY),
        Refusal::TimedOut => late(retry_after, "The request waited too long for a worker. Please retry later."),
        Refusal::DeadlinePassed => late(retry_after, DEADLINE_PASSED),
        Refusal::DeadlineInfeasible => late(
            retry_after,
            "No worker can begin to answer before the request's deadline: too much waits before it. Please retry later, \
             or allow more time.",
        ),
        Refusal::DeadlineTooShort => late(
            retry_after,
            "No worker can begin to answer before the request's deadline, even if nothing waits before it. Please allow \
             more time.",
        ),
        Refusal::TooLarge => {
            let message = "The request needs more KV cache than any worker of this model has.".to_owned();
            bad_request(StatusCode::BAD_REQUEST, Some("context_length_exceeded"), Some("messages"), message)
        }
        Refusal::AttemptsExhausted { last } => match last {
            Failure::Overloaded { .. } | Failure::Unavailable { .. } => {
                unavailable("server_is_overloaded", retry_after, BUSY)
            }
            Failure::Connect => {
                unavailable("no_worker", retry_after, "No worker of this model can be reached. Please retry later.")
            }
            Failure::Timeout => {
                gateway(StatusCode::GATEWAY_TIMEOUT, "upstream_timeout", "The workers of this model did not answer.")
            }
            _ => gateway(StatusCode::BAD_GATEWAY, "upstream_error", "The workers of this model failed to answer."),
        },
    }
}

fn late(retry_after: Option<Duration>, message: &str) -> Shown {
    Shown { retry_after, ..gateway(StatusCode::GATEWAY_TIMEOUT, "deadline_exceeded", message) }
}
