//! The client listener's HTTP: which dialect is asked, what the body asks for, and how every refusal looks.
//!
//! A request's bytes are read here, checked where we act on them ([`forebay_proto::peek`]) and otherwise left alone.
//! Unknown paths are answered here and never passed on, since engines leave control routes unprotected.

mod body;
mod errors;
mod headers;
mod models;
mod openai;
mod tokenize;

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::{any, get, post};
use tokio_util::sync::CancellationToken;

use crate::ids::RequestName;
use crate::ledger::Ledger;
use crate::pipeline::Pipeline;
use crate::telemetry::Traces;
use errors::Error;

/// What the handlers use.
pub struct Api {
    pub pipeline: Pipeline,
    pub ledger: Ledger,
    /// Where there is a collector.
    pub traces: Option<Traces>,
    /// Largest request body, in bytes.
    pub body_bytes_max: usize,
    /// Cancelled when answers must end because the drain time is over.
    pub closing: CancellationToken,
}

/// The router of the client listener.
pub fn router(api: Api) -> Router {
    let call = |router: Router<Arc<Api>>, (path, kind): &'static (&'static str, openai::Kind)| {
        let serve = move |State(api): State<Arc<Api>>, request: Request| async move {
            openai::serve(&api, request, kind).await
        };
        router.route(path, post(serve))
    };
    openai::CALLS
        .iter()
        .fold(Router::new(), call)
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/health", get(|| async {}))
        .method_not_allowed_fallback(method_not_allowed)
        .fallback(any(not_found))
        .with_state(Arc::new(api))
}

/// What the HTTP library refuses by itself, in the shape of every refusal: header lines and a body for a status.
#[must_use]
pub fn unread(status: u16) -> (String, Vec<u8>) {
    errors::unread(status, &RequestName::fresh())
}

async fn not_found(request: Request) -> Response {
    let name = RequestName::from_client(headers::request_id(request.headers()));
    Error::UnknownPath { method: request.method().clone(), path: request.uri().path().to_owned() }.respond(&name)
}

async fn method_not_allowed(State(_): State<Arc<Api>>, request: Request) -> Response {
    let name = RequestName::from_client(headers::request_id(request.headers()));
    Error::Method { method: request.method().clone(), path: request.uri().path().to_owned() }.respond(&name)
}
