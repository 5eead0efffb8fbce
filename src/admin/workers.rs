//! `/admin/v1/workers`: every worker as the core sees it; workers that join, drain and leave at the owner's word.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::{IntoResponse, Response};
use forebay_backends::signals::gpu::slowdown;
use forebay_scheduler::{AdapterState, Role, SleepState};
use http::StatusCode;

use super::order::{Change, Refused, bring};
use super::wire::{Gpu, Join, Reported, Worker, Workers};
use super::{Admin, Named, health, refuse, rounded};
use crate::dispatch::{GpuStatus, WorkerStatus};

/// Bytes of the call that lets a worker join.
pub(super) const JOIN_BYTES_MAX: usize = 64 << 10;

pub(super) async fn list(State(admin): State<Arc<Admin>>) -> Json<Workers> {
    Json(Workers { workers: admin.dispatch.worker_statuses().into_iter().map(worker).collect() })
}

/// Answers when the worker is kept and served, which is before it has been asked who it is.
pub(super) async fn join(State(admin): State<Arc<Admin>>, body: Result<Bytes, BytesRejection>) -> Response {
    let join = match body.map(|body| serde_json::from_slice::<Join>(&body)) {
        Ok(Ok(join)) => join,
        Ok(Err(error)) => {
            let message = format!(
                "The body must be {{\"model\": \"…\", \"worker\": {{\"url\": \"http://…\"}}}}, the worker with the keys \
                 of `[[model.worker]]`: {error}."
            );
            return refuse(StatusCode::BAD_REQUEST, None, message);
        }
        Err(rejection) if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE => {
            let message = format!("The body is larger than the {JOIN_BYTES_MAX} bytes that a worker may take.");
            return refuse(rejection.status(), Some("request_too_large"), message);
        }
        Err(rejection) => return refuse(rejection.status(), None, rejection.body_text()),
    };
    change(&admin, Change::Join { model: join.model, keys: join.worker }, StatusCode::CREATED).await
}

pub(super) async fn drain(State(admin): State<Arc<Admin>>, Named(name): Named) -> Response {
    change(&admin, Change::Drain(name), StatusCode::OK).await
}

pub(super) async fn resume(State(admin): State<Arc<Admin>>, Named(name): Named) -> Response {
    change(&admin, Change::Resume(name), StatusCode::OK).await
}

/// Answers when the worker drains: it leaves once it has nothing any more.
pub(super) async fn leave(State(admin): State<Arc<Admin>>, Named(name): Named) -> Response {
    change(&admin, Change::Leave(name), StatusCode::ACCEPTED).await
}

async fn change(admin: &Admin, change: Change, done: StatusCode) -> Response {
    match bring(&admin.orders, change).await {
        Ok(of_it) => (done, Json(Workers { workers: of_it.into_iter().map(worker).collect() })).into_response(),
        Err(refused) => {
            let (status, code) = match &refused {
                Refused::Wrong(_) => (StatusCode::BAD_REQUEST, None),
                Refused::Unknown(_) => (StatusCode::NOT_FOUND, Some("not_found")),
                Refused::Conflict(_) => (StatusCode::CONFLICT, Some("conflict")),
                Refused::Unkept(_) => (StatusCode::INTERNAL_SERVER_ERROR, Some("internal_error")),
            };
            refuse(status, code, refused.to_string())
        }
    }
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
        role: role(view.role).to_owned(),
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
        gpu_derate: rounded(view.gpu_derate),
        gpu_share: rounded(view.gpu_share),
        gpu_fault: view.gpu_fault,
        sleep: view.sleep.map(|state| sleep(state).to_owned()),
        wake_seconds: rounded(view.wake.as_secs_f64()),
        wakes: view.wakes,
        adapters: status.adapters.iter().map(|(name, state)| (name.to_string(), adapter(*state).to_owned())).collect(),
        gpus: status.gpus.into_iter().map(gpu).collect(),
    }
}

fn role(role: Role) -> &'static str {
    Role::NAMES.iter().find(|(_, known)| *known == role).map_or("both", |(name, _)| name)
}

fn sleep(state: SleepState) -> &'static str {
    match state {
        SleepState::Awake => "awake",
        SleepState::Leaving => "leaving",
        SleepState::FallingAsleep => "falling_asleep",
        SleepState::Asleep => "asleep",
        SleepState::Waking => "waking",
    }
}

fn adapter(state: AdapterState) -> &'static str {
    match state {
        AdapterState::Loading => "loading",
        AdapterState::Loaded => "loaded",
        AdapterState::Leaving => "leaving",
        AdapterState::Unloading => "unloading",
    }
}

fn gpu(status: GpuStatus) -> Gpu {
    let said = status.said;
    let watts = |milliwatts: Option<u32>| milliwatts.map(|milliwatts| f64::from(milliwatts) / 1000.0);
    Gpu {
        name: status.name,
        ago_seconds: rounded(status.ago.as_secs_f64()),
        utilization: said.utilization_percent.map(|percent| f64::from(percent) / 100.0),
        memory_used_bytes: said.memory_used_bytes,
        memory_total_bytes: said.memory_total_bytes,
        temperature_celsius: said.temperature_celsius,
        power_watts: watts(said.power_milliwatts),
        power_limit_watts: watts(said.power_limit_milliwatts),
        derate: rounded(slowdown(&said)),
        fault: status.fault,
        foreign_processes: status.foreign_processes,
        uuid: said.uuid,
        model: said.name,
    }
}
