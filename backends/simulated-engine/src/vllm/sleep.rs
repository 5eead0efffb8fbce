//! Sleep mode, as a server with `--enable-sleep-mode` and `VLLM_SERVER_DEV_MODE=1` has it: `/sleep`, `/wake_up`,
//! `/is_sleeping`. One that sleeps answers `/health` as ever and refuses what runs the model.
//!
//! Not here: the KV cache that level 1 drops belongs to the engine (`driver`).

use std::{
    collections::VecDeque,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use http::StatusCode;
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::{error::Failure, ok, since_epoch};
use crate::server::{Answer, Service};

/// Changes that are remembered.
const CHANGES_MAX: usize = 1024;
/// Between two looks whether an engine that is to sleep has finished what it has.
const LOOK: Duration = Duration::from_millis(5);

/// Whether the model sleeps, and when that changed.
#[derive(Debug)]
pub(crate) struct Sleep {
    state: Mutex<State>,
    /// Requests that came while it slept.
    refused: AtomicU64,
}

#[derive(Debug)]
struct State {
    asleep: bool,
    /// Moments in Unix milliseconds at which it began to wake (false) or was asleep (true).
    changes: VecDeque<(u64, bool)>,
}

impl Sleep {
    pub(crate) fn new(asleep: bool) -> Self {
        Self { state: Mutex::new(State { asleep, changes: VecDeque::new() }), refused: AtomicU64::new(0) }
    }

    pub(crate) fn is_asleep(&self) -> bool {
        self.state.lock().asleep
    }

    /// Refuses what runs the model of an engine that sleeps.
    pub(super) fn require_awake(&self) -> Result<(), Failure> {
        if self.is_asleep() {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return Err(Failure::injected(StatusCode::SERVICE_UNAVAILABLE));
        }
        Ok(())
    }

    fn note(&self, asleep: bool) {
        let mut state = self.state.lock();
        if state.changes.len() >= CHANGES_MAX {
            state.changes.pop_front();
        }
        let at = u64::try_from(since_epoch().as_millis()).unwrap_or(u64::MAX);
        state.changes.push_back((at, asleep));
    }

    /// For the log of what happened.
    pub(crate) fn describe(&self) -> Value {
        let state = self.state.lock();
        let changes: Vec<Value> = state.changes.iter().map(|(at, asleep)| json!([at, asleep])).collect();
        json!({"asleep": state.asleep, "changes": changes, "refused": self.refused.load(Ordering::Relaxed)})
    }
}

/// Answers one of the three paths.
pub(super) async fn answer(service: &Service, path: &str) -> Result<Answer, Failure> {
    match path {
        "/is_sleeping" => Ok(ok(&json!({"is_sleeping": service.sleep.is_asleep()}))),
        "/sleep" => {
            fall_asleep(service).await;
            Ok(ok(&json!({"status": "sleeping", "level": 1})))
        }
        _ => {
            wake(service).await;
            Ok(ok(&json!({"status": "awake", "tags": null})))
        }
    }
}

/// Once what it has is finished.
pub(crate) async fn fall_asleep(service: &Service) {
    while service.driver.load().0.running + service.driver.load().0.waiting > 0 {
        tokio::time::sleep(LOOK).await;
    }
    tokio::time::sleep(service.options.sleep_time).await;
    service.driver.clear_cache(|publisher| publisher.cleared());
    service.sleep.state.lock().asleep = true;
    service.sleep.note(true);
}

/// Comes at once where it is awake.
pub(crate) async fn wake(service: &Service) {
    if service.sleep.is_asleep() {
        service.sleep.note(false);
        tokio::time::sleep(service.options.wake_time).await;
        service.sleep.state.lock().asleep = false;
    }
}
