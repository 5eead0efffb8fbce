//! The ops listener: metrics and health. Administration joins them here.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::StatusCode;
use http::header::CONTENT_TYPE;
use tokio_util::sync::CancellationToken;

use crate::dispatch::Dispatch;
use crate::telemetry::Registry;

/// What the handlers use.
pub struct Admin {
    pub registry: Registry,
    pub dispatch: Arc<Dispatch>,
    /// Cancelled as soon as this process wants no more traffic.
    pub stopping: CancellationToken,
}

/// The router of the ops listener.
pub fn router(admin: Admin) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(|| async { "ok\n" }))
        .route("/health", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(Arc::new(admin))
}

async fn metrics(State(admin): State<Arc<Admin>>) -> Response {
    admin.dispatch.publish();
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], admin.registry.render()).into_response()
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
