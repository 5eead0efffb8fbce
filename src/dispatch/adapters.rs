//! LoRA adapters of a pool's model: what its workers have of them, and what the core has them load and unload.
//!
//! An adapter has one name, for clients and at the workers. What a worker lists is told to the core when it is probed, and
//! read again now and then, since others may load and unload there, too. Of a server with several data-parallel ranks an
//! adapter is all ranks', so that none is loaded or unloaded there at one rank's word; of one that several models share,
//! it is that model's which has it configured.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use forebay_backends::engines::{self, AdapterError, Load, ServedModel};
use forebay_scheduler::{AdapterChange, AdapterEnd, AdapterId, Event, PoolId, WorkerId};

use super::intake::Intake;
use super::workers::Worker;
use crate::routing::Adapter;

/// How often a worker's list is read without another reason.
pub(super) const LIST_EVERY: Duration = Duration::from_secs(30);
/// Adapters that a worker is given at once as long as neither configuration nor its engine says.
const PLACES_ASSUMED: u32 = 4;

/// What is known of how a worker takes adapters.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// As many as its engine says that one batch may have; 0: it has not said.
    said: AtomicU32,
    /// It was asked to load one, and cannot.
    unable: AtomicBool,
}

/// What the core has a worker do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    Load,
    Unload,
}

/// Whether an engine that lists an adapter says that it has it from elsewhere than configured: vLLM and SGLang do, of
/// adapters, which have a parent.
fn is_elsewhere(adapter: &Adapter, listed: &ServedModel) -> bool {
    let is_other = |(path, root): (&str, &str)| path.trim_end_matches('/') != root.trim_end_matches('/');
    !adapter.gone
        && listed.parent.is_some()
        && adapter.path.as_deref().zip(listed.root.as_deref()).is_some_and(is_other)
}

impl Intake {
    /// The worker was asked who it is, and listed these; it may be another process than before.
    pub(super) fn adapters_listed(&self, worker: &Worker, listed: &[ServedModel], load: Option<Load>) {
        worker.places.unable.store(false, Ordering::Relaxed);
        match load.and_then(|load| load.adapters_max) {
            Some(places) => self.places_said(worker, Some(places)),
            None => self.renew_places(worker),
        }
        self.tell_adapters(worker, listed);
    }

    /// Reads the worker's list again. One that was not asked yet who it is gives it then: what may be loaded there shows
    /// only then, too.
    pub(super) async fn list_adapters(&self, worker: &Worker) {
        if self.adapters(worker.pool).is_empty() || worker.identity.load().is_none() {
            return;
        }
        match engines::listed(&worker.channel).await {
            Ok(listed) => self.tell_adapters(worker, &listed),
            Err(error) => tracing::debug!(worker = &*worker.name, %error, "which adapters it has is not known"),
        }
    }

    fn tell_adapters(&self, worker: &Worker, listed: &[ServedModel]) {
        let adapters = self.adapters(worker.pool);
        if !adapters.is_empty() {
            let listed: HashMap<&str, &ServedModel> = listed.iter().map(|model| (model.id.as_str(), model)).collect();
            let has = adapters.iter().filter_map(|adapter| Some((adapter, *listed.get(&*adapter.name)?)));
            let has: Vec<(&Adapter, &ServedModel)> =
                has.filter(|(adapter, _)| !self.is_anothers(worker, adapter)).collect();
            let stale = has.iter().filter(|(adapter, listed)| is_elsewhere(adapter, listed));
            self.driver.tell(Event::AdaptersSeen {
                worker: worker.id,
                adapters: has.iter().map(|(adapter, _)| adapter.facts()).collect(),
                stale: stale.map(|(adapter, _)| adapter.id).collect(),
            });
        }
    }

    /// The engine says how many adapters one of its batches may have.
    pub(super) fn places_said(&self, worker: &Worker, places: Option<u32>) {
        worker.places.said.store(places.unwrap_or(0), Ordering::Relaxed);
        self.renew_places(worker);
    }

    /// Tells the core how many adapters a worker may be given, where that changed.
    fn renew_places(&self, worker: &Worker) {
        let Some(identity) = worker.identity.load_full() else { return };
        let loadable = self.adapters(worker.pool).iter().any(|adapter| adapter.path.is_some());
        let able = identity.engine.adapter_paths().is_some() && !worker.places.unable.load(Ordering::Relaxed);
        let said = Some(worker.places.said.load(Ordering::Relaxed)).filter(|said| *said > 0);
        let places = match self.places(worker.pool).or(said).unwrap_or(PLACES_ASSUMED) {
            places if loadable && able && worker.rank.is_none() => places,
            _ => 0,
        };
        if worker.spec.lock().adapters_max != places {
            self.respec(worker, |spec| spec.adapters_max = places);
        }
    }

    /// Has a worker load or unload an adapter, and tells the core what became of it.
    pub(super) fn change_adapter(self: &Arc<Self>, id: WorkerId, adapter: AdapterId, change: Change) {
        let (Some(gone), Some(worker)) = (self.gone(id), self.worker(id)) else { return };
        let intake = Arc::clone(self);
        self.tracker.spawn(gone.run_until_cancelled_owned(async move {
            let found = intake.adapters(worker.pool).iter().find(|known| known.id == adapter).cloned();
            let end = match found {
                Some(adapter) if change == Change::Unload && intake.is_anothers(&worker, &adapter) => AdapterEnd::Done,
                Some(adapter) => intake.changed_adapter(&worker, &adapter, change).await,
                // It left the configuration long ago, and is remembered no more.
                None if change == Change::Load => AdapterEnd::Refused,
                None => AdapterEnd::Done,
            };
            intake.driver.tell(Event::AdapterTurned { worker: id, adapter, end });
        }));
    }

    async fn changed_adapter(&self, worker: &Worker, adapter: &Adapter, change: Change) -> AdapterEnd {
        let Some(identity) = worker.identity.load_full() else { return AdapterEnd::Failed };
        let name = &*adapter.name;
        let changed = match (change, &adapter.path) {
            (Change::Load, Some(path)) => engines::load_adapter(&worker.channel, identity.engine, name, path).await,
            (Change::Load, None) => Err(AdapterError::Unable),
            (Change::Unload, _) => engines::unload_adapter(&worker.channel, identity.engine, name).await,
        };
        let worker_name = &*worker.name;
        match changed {
            Ok(()) => {
                tracing::info!(worker = worker_name, adapter = name, ?change, "the engine did it");
                AdapterEnd::Done
            }
            Err(error) => {
                tracing::warn!(worker = worker_name, adapter = name, ?change, %error, "the engine did not do it");
                match error {
                    AdapterError::Unable => {
                        worker.places.unable.store(true, Ordering::Relaxed);
                        self.renew_places(worker);
                        AdapterEnd::Refused
                    }
                    AdapterError::Refused(_) => AdapterEnd::Refused,
                    AdapterError::Failed(_) => AdapterEnd::Failed,
                }
            }
        }
    }

    /// The adapters of a pool are others now.
    pub(super) fn adapters_configured(self: &Arc<Self>, pool: PoolId, before: &[Adapter]) {
        let adapters = self.adapters(pool);
        for forgotten in before.iter().filter(|known| known.gone && adapters.iter().all(|now| now.id != known.id)) {
            let (adapter, change) = (forgotten.id, AdapterChange::Back);
            self.driver.tell(Event::AdapterChanged { pool, adapter, change });
        }
        for now in &*adapters {
            let Some(before) = before.iter().find(|before| before.id == now.id) else { continue };
            let change = match (before.gone, now.gone) {
                (false, true) => AdapterChange::Gone,
                (_, false) if now.path.is_some() && now.path != before.path => AdapterChange::Moved,
                (true, false) => AdapterChange::Back,
                (false, false) | (true, true) => continue,
            };
            tracing::info!(adapter = &*now.name, ?change, "an adapter is configured otherwise");
            self.driver.tell(Event::AdapterChanged { pool, adapter: now.id, change });
        }
        for worker in self.workers_of(pool) {
            let Some(gone) = self.gone(worker.id) else { continue };
            let intake = Arc::clone(self);
            self.tracker.spawn(gone.run_until_cancelled_owned(async move {
                intake.renew_places(&worker);
                intake.list_adapters(&worker).await;
            }));
        }
    }
}
