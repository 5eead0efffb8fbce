//! The ops listener: metrics and health for machines, and `/admin/v1` for the owner.
//!
//! Metrics and health answer whoever reaches the listener. Everything under `/admin` asks for the owner's key as a
//! bearer token, on loopback too, and tells a caller without it nothing, not even which paths there are.

mod explain;
pub mod order;
pub mod wire;
mod workers;

use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, FromRequestParts, Path, Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use forebay_proto::error::{ApiError, openai_body};
use forebay_scheduler::HealthState;
use http::header::{AUTHORIZATION, CONTENT_TYPE, WWW_AUTHENTICATE};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, StatusCode};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::access::OwnerKey;
use crate::dispatch::Dispatch;
use crate::telemetry::Registry;

const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// What the handlers use.
pub struct Admin {
    pub registry: Registry,
    pub dispatch: Arc<Dispatch>,
    pub owner: OwnerKey,
    /// Who keeps the workers.
    pub orders: mpsc::Sender<order::Order>,
    /// Cancelled as soon as this process wants no more traffic.
    pub stopping: CancellationToken,
}

/// The router of the ops listener.
pub fn router(admin: Admin) -> Router {
    let admin = Arc::new(admin);
    let for_owner = Router::new()
        .route("/workers", get(workers::list).post(workers::join))
        .route("/workers/{name}", delete(workers::leave))
        .route("/workers/{name}/drain", post(workers::drain))
        .route("/workers/{name}/resume", post(workers::resume))
        .route("/decisions/{request}", get(explain::one))
        .method_not_allowed_fallback(async || {
            refuse(StatusCode::METHOD_NOT_ALLOWED, None, "This path is not for this method.")
        })
        .fallback(async || refuse(StatusCode::NOT_FOUND, Some("not_found"), "There is no such path."))
        .layer(DefaultBodyLimit::max(workers::JOIN_BYTES_MAX))
        .layer(from_fn_with_state(Arc::clone(&admin), authenticate));
    Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(|| async { "ok\n" }))
        .route("/health", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .nest("/admin/v1", for_owner)
        .with_state(admin)
}

async fn metrics(State(admin): State<Arc<Admin>>) -> Response {
    let told = admin.dispatch.publish();
    #[expect(clippy::cast_precision_loss, reason = "tasks are far below 2^52")]
    admin.registry.tasks.set(tokio::runtime::Handle::current().metrics().num_alive_tasks() as f64);
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], admin.registry.render() + &told).into_response()
}

/// Ready while some worker takes requests and the process is not stopping.
async fn ready(State(admin): State<Arc<Admin>>) -> Response {
    if admin.stopping.is_cancelled() {
        return (StatusCode::SERVICE_UNAVAILABLE, "stopping\n").into_response();
    }
    match admin.dispatch.workers_up() {
        0 => (StatusCode::SERVICE_UNAVAILABLE, "no worker is up\n").into_response(),
        _ => "ok\n".into_response(),
    }
}

/// Lets the owner through and nobody else.
async fn authenticate(State(admin): State<Arc<Admin>>, request: Request, next: Next) -> Response {
    let message = match bearer(request.headers()) {
        Some(key) if admin.owner.is(key) => return next.run(request).await,
        Some(_) => "This is not the owner key of this gateway. It stands in `owner.key` in its data directory.",
        None => {
            "Administration needs the owner key as a bearer token. It stands in `owner.key` in the gateway's data \
             directory."
        }
    };
    let mut response = refuse(StatusCode::UNAUTHORIZED, Some("invalid_api_key"), message);
    response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    response
}

fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let (scheme, key) = headers.get(AUTHORIZATION)?.as_bytes().split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
}

/// The name in the path.
struct Named(String);

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Response> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(name)) => Ok(Self(name)),
            Err(rejection) => Err(refuse(rejection.status(), None, rejection.body_text())),
        }
    }
}

/// A refusal in the shape that the client listener's have.
fn refuse(status: StatusCode, code: Option<&str>, message: impl Into<String>) -> Response {
    let kind = match status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        status if status.is_server_error() => "server_error",
        _ => "invalid_request_error",
    };
    let error = ApiError { message: message.into(), kind: kind.to_owned(), param: None, code: code.map(str::to_owned) };
    (status, [(CONTENT_TYPE, JSON)], openai_body(&error)).into_response()
}

/// To six decimals, which are microseconds where it is a time; and no negative zero.
fn rounded(number: f64) -> f64 {
    (number * 1e6).round() / 1e6 + 0.0
}

/// A worker's standing, as listings name it.
fn health(state: HealthState) -> &'static str {
    match state {
        HealthState::Unknown => "unknown",
        HealthState::Up => "up",
        HealthState::Down => "down",
        HealthState::Open => "open",
        HealthState::HalfOpen => "half_open",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bearer_tokens() {
        let check = |header: &str, expect: Option<&str>| {
            let headers = HeaderMap::from_iter([(AUTHORIZATION, header.parse().unwrap())]);
            assert_eq!(bearer(&headers), expect.map(str::as_bytes), "{header:?}");
        };
        check("Bearer fbo_1", Some("fbo_1"));
        check("bearer  fbo_1", Some("fbo_1"));
        check("Bearer ", Some(""));
        check("Bearer", None);
        check("Basic fbo_1", None);
        check("fbo_1", None);
        assert_eq!(bearer(&HeaderMap::new()), None);
    }
}
