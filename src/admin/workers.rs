//! `GET /admin/v1/workers`: every worker as the core sees it.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;

use super::wire::{Reported, Worker, Workers};
use super::{Admin, health, rounded};
use crate::dispatch::WorkerStatus;

pub(super) async fn list(State(admin): State<Arc<Admin>>) -> Json<Workers> {
    Json(Workers { workers: admin.dispatch.worker_statuses().into_iter().map(worker).collect() })
}

fn worker(status: WorkerStatus) -> Worker {
    let view = status.view;
    let reported = view.reported.map(|(ago, load)| Reported {
        ago_seconds: rounded(ago.as_secs_f64()),
        running: load.running,
        waiting: load.waiting,
        kv_usage: load.kv_usage,
    });
    Worker {
        name: status.name.to_string(),
        model: status.model.to_string(),
        engine: status.engine.map(str::to_owned),
        engine_model: status.engine_model,
        url: status.url,
        takes_requests: status.takes_requests,
        health: health(view.health).to_owned(),
        health_score: rounded(view.health_score),
        draining: view.draining,
        busy_seconds: rounded(view.busy.as_secs_f64()),
        sent_requests: view.sent_requests,
        sent_sequences: view.sent_sequences,
        lane_requests: view.lane_requests,
        promised_tokens: view.promised_tokens,
        reserved_tokens: view.reserved_tokens,
        kv_tokens: view.kv_tokens,
        kv_usage: view.kv_usage.map(rounded),
        prefill_tokens_per_second: rounded(view.prefill_rate),
        rate_measured: view.rate_measured,
        reported,
    }
}
