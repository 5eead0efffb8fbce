//! `GET /admin/v1/workers`: every worker as the core sees it.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use forebay_backends::signals::gpu::slowdown;
use forebay_scheduler::{Role, SleepState};

use super::wire::{Gpu, Reported, Worker, Workers};
use super::{Admin, health, rounded};
use crate::dispatch::{GpuStatus, WorkerStatus};

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
