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

use std::pin::Pin;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::response::Response;
use axum::routing::{any, get, post};
use http::Request;
use hyper::body::Incoming;
use tokio_util::sync::CancellationToken;
use tower::Service;

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

/// An answer in the making.
pub type Answering = Pin<Box<dyn Future<Output = Response> + Send>>;

/// Who answers the client listener's requests. Calls of models, which nearly all are, do not pass the router, which takes
/// some 5% of a small one's instructions.
pub fn answerer(api: Api) -> impl Fn(Request<Incoming>) -> Answering + Send + Sync {
    let api = Arc::new(api);
    let router = router(&api);
    move |request| match openai::kind_of(request.method(), request.uri().path()) {
        Some(kind) => {
            let api = Arc::clone(&api);
            Box::pin(async move { openai::serve(&api, request, kind).await })
        }
        None => {
            let answering = router.clone().call(request);
            Box::pin(async {
                match answering.await {
                    Ok(answer) => answer,
                    Err(never) => match never {},
                }
            })
        }
    }
}

fn router(api: &Arc<Api>) -> Router {
    // Other methods than POST come by here.
    let paths = openai::CALLS.iter().map(|(path, _)| *path);
    paths
        .fold(Router::new(), |router, path| router.route(path, post(method_not_allowed)))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/health", get(|| async {}))
        .method_not_allowed_fallback(method_not_allowed)
        .fallback(any(not_found))
        .with_state(Arc::clone(api))
}

/// What the HTTP library refuses by itself, in the shape of every refusal: header lines and a body for a status.
#[must_use]
pub fn unread(status: u16) -> (String, Vec<u8>) {
    errors::unread(status, &RequestName::fresh())
}

async fn not_found(request: axum::extract::Request) -> Response {
    let name = RequestName::from_client(headers::request_id(request.headers()));
    Error::UnknownPath { method: request.method().clone(), path: request.uri().path().to_owned() }.respond(&name)
}

async fn method_not_allowed(State(_): State<Arc<Api>>, request: axum::extract::Request) -> Response {
    let name = RequestName::from_client(headers::request_id(request.headers()));
    Error::Method { method: request.method().clone(), path: request.uri().path().to_owned() }.respond(&name)
}
