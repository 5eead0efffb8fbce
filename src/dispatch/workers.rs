//! The workers as the shell knows them: name, connection, engine, and what it calls the model.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use arc_swap::{ArcSwap, ArcSwapOption};
use foldhash::HashMap;
use forebay_backends::engines::{Api, Engine, Ways};
use forebay_backends::signals::Traffic;
use forebay_backends::transport::Channel;
use forebay_scheduler::{HealthState, PoolId, SleepState, WorkerId, WorkerSpec};
use http::HeaderValue;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::adapters::Places;
use super::driver::{Driver, takes_requests};
use crate::routing::Model;
use crate::telemetry::{ModelMetrics, WorkerMetrics};

/// One engine instance.
pub struct Worker {
    pub id: WorkerId,
    pub pool: PoolId,
    /// The model's configured name.
    pub(super) pool_model: Arc<str>,
    pub name: Arc<str>,
    /// The name as `x-forebay-worker` shows it.
    pub header: HeaderValue,
    pub channel: Channel,
    /// Of a server with several data-parallel ranks, the one that this is.
    pub(super) rank: Option<u32>,
    /// Longest wait for an answer's first event or byte.
    pub(super) first_byte: std::time::Duration,
    /// The same, of an answer that is streamed.
    pub(super) first_token: std::time::Duration,
    pub(super) identity: ArcSwapOption<Identity>,
    /// What the core knows of it; held while the core is told.
    pub(super) spec: Mutex<WorkerSpec>,
    pub(super) places: Places,
    /// It answered a probe.
    pub(super) returned: Notify,
    /// Tells the polls of its load that requests go there.
    pub(super) traffic: Traffic,
    /// Its model sleeps, and is not ours to wake.
    pub(super) sleeps: AtomicBool,
    pub(super) metrics: WorkerMetrics,
}

impl Worker {
    /// The engine's name; as unknown as the worker where it was not asked yet.
    #[must_use]
    pub fn engine(&self) -> &'static str {
        self.identity.load().as_ref().map_or("unknown", |identity| identity.engine.name())
    }

    /// Notes whether its model sleeps, which we may not wake.
    pub(super) fn sleeps_for_itself(&self, sleeps: bool) {
        if !self.sleeps.swap(sleeps, Relaxed) && sleeps {
            tracing::warn!(worker = &*self.name, "it sleeps, and may not be woken (`sleep = true`)");
        }
    }
}

/// What is known once the worker has been asked.
pub(super) struct Identity {
    pub(super) engine: &'static dyn Engine,
    /// How its server is set up.
    pub(super) server: Ways,
    /// What it calls the model.
    pub(super) model: String,
    /// The same name, where that is a LoRA adapter's, so that the pool's only model is one.
    pub(super) adapter: Option<String>,
    /// All names that it lists of its models, of files and adapters, too; none where any name may stand in its answers.
    pub(super) names: Vec<String>,
}

impl Identity {
    /// What a request for this model calls it.
    pub(super) fn name_of(&self, model: &Model) -> Cow<'_, str> {
        match &model.adapter {
            Some(adapter) => self.engine.adapter_name(&self.model, &adapter.name).into(),
            None => self.model.as_str().into(),
        }
    }

    /// Whether an answer that names this model is none of the worker's as it is known: then another engine stands where
    /// it stood.
    ///
    /// Engines answer with the name they were asked by, with the first of several, or with their files'; some add a tag
    /// or a date.
    pub(super) fn is_stranger(&self, model: &str) -> bool {
        let last = |name: &str| name.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_lowercase();
        let said = last(model);
        let is = |known: &String| {
            let known = last(known);
            said.strip_prefix(&*known).is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', ':', '@', '.']))
                || known.strip_prefix(&*said).is_some_and(|rest| rest.starts_with(['-', ':', '@', '.']))
        };
        !self.names.is_empty() && !said.is_empty() && !self.names.iter().chain([&self.model]).any(is)
    }
}

/// All workers and the models' queue gauges, as a snapshot.
#[derive(Default)]
pub(super) struct Workers {
    table: ArcSwap<HashMap<WorkerId, Arc<Worker>>>,
    pools: ArcSwap<Vec<(PoolId, Arc<ModelMetrics>)>>,
}

impl Workers {
    pub(super) fn get(&self, id: WorkerId) -> Option<Arc<Worker>> {
        self.table.load().get(&id).cloned()
    }

    /// How many workers a pool has, if it has any and the engines of all are known to gain from calls with the inputs of
    /// several requests.
    pub(super) fn merging(&self, pool: PoolId, api: Api) -> Option<u32> {
        let table = self.table.load();
        let mut count = 0;
        for worker in table.values().filter(|worker| worker.pool == pool) {
            if !worker.identity.load().as_ref().is_some_and(|identity| identity.engine.merges(api)) {
                return None;
            }
            count += 1;
        }
        (count > 0).then_some(count)
    }

    pub(super) fn of(&self, pool: PoolId) -> Vec<Arc<Worker>> {
        self.table.load().values().filter(|worker| worker.pool == pool).cloned().collect()
    }

    pub(super) fn apply(&self, workers: &[Arc<Worker>], pools: Vec<(PoolId, Arc<ModelMetrics>)>) {
        let table: HashMap<_, _> = workers.iter().map(|worker| (worker.id, Arc::clone(worker))).collect();
        self.table.store(Arc::new(table));
        self.pools.store(Arc::new(pools));
    }

    /// Brings the gauges up to date; gives the text of the models' series, `other` among them, and of the workers'.
    pub(super) fn publish(&self, driver: &Driver, other: &ModelMetrics) -> String {
        let (table, pools) = (self.table.load(), self.pools.load());
        driver.read(|core, now| {
            for view in core.worker_views(now) {
                if let Some(worker) = table.get(&view.worker) {
                    let gauges = &worker.metrics;
                    gauges.up.set(flag(takes_requests(&view)));
                    gauges.health_score.set(view.health_score);
                    gauges.breaker_open.set(flag(view.health == HealthState::Open));
                    let asleep = view.sleep == Some(SleepState::Asleep) || worker.sleeps.load(Relaxed);
                    gauges.asleep.set(flag(asleep));
                    gauges.wakes.absolute(view.wakes);
                    #[expect(clippy::cast_precision_loss, reason = "token counts are far below 2^52")]
                    gauges.promised_tokens.set(view.promised_tokens as f64);
                }
            }
            for (pool, metrics) in pools.iter() {
                if let Some(view) = core.pool_view(*pool) {
                    for (class, waiting) in view.queued_requests.iter().enumerate() {
                        metrics.queue_depth(class, *waiting as usize);
                    }
                    metrics.prefix_index(view.index_blocks, view.index_bytes);
                    metrics.scale(core.scale_view(now, *pool));
                }
            }
        });
        let models = pools.iter().map(|(_, metrics)| &**metrics).chain([other]);
        ModelMetrics::render(models) + &WorkerMetrics::render(table.values().map(|worker| &worker.metrics))
    }
}

fn flag(set: bool) -> f64 {
    f64::from(u8::from(set))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers() {
        let names = ["base", "/models/Base-7B.gguf", "sql-lora", "org/Other-Name"].map(str::to_owned).to_vec();
        let engine = forebay_backends::engines::by_name("vllm").unwrap();
        let identity = Identity { engine, server: Ways::default(), model: "alias".to_owned(), adapter: None, names };
        for known in [
            "alias",
            "ALIAS",
            "base",
            "sql-lora",
            "Base-7B.gguf",
            "base-7b",
            "elsewhere/base-7b.gguf",
            "Other-Name",
            "org/other-name",
            "base:latest",
            "base-2026-01-02",
            "",
        ] {
            assert!(!identity.is_stranger(known), "{known}");
        }
        for other in ["another", "baseline", "lora", "m"] {
            assert!(identity.is_stranger(other), "{other}");
        }
        let unlisted = Identity { names: Vec::new(), ..identity };
        assert!(!unlisted.is_stranger("other"), "nothing to go by");
    }
}
