//! The simulated engine's own endpoints, which no real engine has: faults of a running server, and what it saw.
//!
//! - `GET /simulated/faults` gives `{"faults": […]}`, see [`Fault`]; `POST` replaces them, and with `"refuse_ms": n` also
//!   closes the listener and every connection for that long, as a process that died and is started again; with
//!   `"speed": x` it runs so many times faster than its timing model from now on, as a GPU that is throttled or shared.
//! - `POST /simulated/kv_events` with any of `{"clear": true, "drop_next": n, "disconnect": true, "restart": true}` empties
//!   the prefix cache, loses the next batches on their way, cuts the subscribers off, or does what the end of the engine's
//!   process does to its publisher and cache.
//! - `GET /simulated/log` gives counters since the start.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::{
    faults::Fault,
    kv_events::Publisher,
    server::{Answer, SPEED_MIN, Service},
};

const BODY_BYTES_MAX: usize = 1 << 20;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    #[serde(default)]
    faults: Option<Vec<Fault>>,
    #[serde(default)]
    refuse_ms: Option<u64>,
    #[serde(default)]
    speed: Option<f64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KvChange {
    #[serde(default)]
    clear: bool,
    #[serde(default)]
    drop_next: u32,
    #[serde(default)]
    disconnect: bool,
    #[serde(default)]
    restart: bool,
}

/// Whether `path` is one of these endpoints.
pub(crate) fn owns(path: &str) -> bool {
    path.starts_with("/simulated/")
}

pub(crate) async fn answer(service: &Arc<Service>, request: Request<Incoming>) -> Answer {
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/simulated/faults") => json_answer(StatusCode::OK, &json!({"faults": service.faults.get()})),
        (&Method::GET, "/simulated/log") => json_answer(StatusCode::OK, &log(service)),
        (&Method::POST, "/simulated/faults") => match change(service, request).await {
            Ok(()) => json_answer(StatusCode::OK, &json!({"faults": service.faults.get()})),
            Err(message) => json_answer(StatusCode::BAD_REQUEST, &json!({"error": message})),
        },
        (&Method::POST, "/simulated/kv_events") => match change_kv(service, request).await {
            Ok(()) => json_answer(StatusCode::OK, &json!({})),
            Err(message) => json_answer(StatusCode::BAD_REQUEST, &json!({"error": message})),
        },
        _ => json_answer(StatusCode::NOT_FOUND, &json!({"error": "no such endpoint"})),
    }
}

async fn read<T: DeserializeOwned>(request: Request<Incoming>) -> Result<T, String> {
    let body = Limited::new(request.into_body(), BODY_BYTES_MAX).collect().await.map_err(|error| error.to_string())?;
    serde_json::from_slice(&body.to_bytes()).map_err(|error| error.to_string())
}

async fn change_kv(service: &Service, request: Request<Incoming>) -> Result<(), String> {
    let KvChange { clear, drop_next, disconnect, restart } = read(request).await?;
    let publisher = service.driver.publisher().ok_or("no KV events are published")?;
    publisher.drop_next(drop_next);
    let then = if restart { Publisher::restart } else { Publisher::cleared };
    if (clear || restart) && !service.driver.clear_cache(then) {
        return Err("sequences hold blocks".to_owned());
    }
    if disconnect {
        publisher.disconnect();
    }
    Ok(())
}

async fn change(service: &Service, request: Request<Incoming>) -> Result<(), String> {
    let change: Change = read(request).await?;
    if let Some(speed) = change.speed {
        if !(speed.is_finite() && speed >= SPEED_MIN) {
            return Err(format!("speed must be at least {SPEED_MIN}"));
        }
        service.driver.set_speed(speed);
    }
    if let Some(faults) = change.faults {
        service.faults.set(faults);
    }
    if let Some(ms) = change.refuse_ms {
        service.outage.send_replace(Some(Duration::from_millis(ms)));
    }
    Ok(())
}

fn log(service: &Service) -> Value {
    let log = &service.log;
    let (load, stats) = service.driver.load();
    let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    json!({
        "connections": read(&log.connections),
        "sleep": service.sleep.describe(),
        "adapters": service.adapters.describe(),
        "bytes_received": read(&log.bytes_received),
        "requests": {"begun": read(&log.begun), "finished": read(&log.finished), "aborted": read(&log.aborted)},
        "sequences": {
            "running": load.running,
            "waiting": load.waiting,
            "finished": stats.stopped + stats.length,
            "aborted": stats.aborted,
        },
    })
}

fn json_answer(status: StatusCode, value: &Value) -> Answer {
    let json = http::HeaderValue::from_static("application/json");
    Answer::Whole { status, headers: vec![(header::CONTENT_TYPE, json)], body: Bytes::from(value.to_string()) }
}
