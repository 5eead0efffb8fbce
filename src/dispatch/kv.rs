//! Follows what engines publish of their prefix caches, and tells the core in its own words.
//!
//! Reading and hashing run on one thread of their own, so that 5,000 events a second delay no request; the core hears of
//! them in pieces of at most [`BLOCKS_AT_ONCE`] blocks, which hold its lock for some 10 µs.
//!
//! Where to listen is configured, or asked of the worker each time it is met anew. How far the events can be relied on
//! decides how long guesses about the worker's cache are kept: a few seconds where all is told, two minutes where not.

mod rehash;

use std::sync::Arc;
use std::time::Duration;

use forebay_backends::engines::{self, Engine};
use forebay_backends::signals::kv_events::{KvEvents, KvSignal, KvSource, Standing};
use forebay_scheduler::{Event, KvEvent};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use self::rehash::Rehash;
use super::intake::{Fact, Intake};
use super::workers::Worker;

/// Blocks that the core hears of in one go.
const BLOCKS_AT_ONCE: usize = 128;

/// Between two questions to a worker that does not answer.
const ASK_AGAIN: Duration = Duration::from_secs(10);
/// How long what was told of a cache is believed without events. An engine that is busy has replaced much of it by then.
const AWAY_LIMIT: Duration = Duration::from_secs(30);

/// The thread that reads and hashes events.
pub(super) struct KvThread(Option<Runtime>);

impl KvThread {
    pub(super) fn start() -> std::io::Result<Self> {
        let runtime = Builder::new_multi_thread().worker_threads(1).thread_name("kv-events").enable_all().build()?;
        Ok(Self(Some(runtime)))
    }

    fn handle(&self) -> Option<&Handle> {
        self.0.as_ref().map(Runtime::handle)
    }
}

impl Drop for KvThread {
    /// Without waiting: a runtime must not be waited for on an async thread.
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl Intake {
    /// Follows one worker's events until it is gone.
    pub(super) fn follow_cache(
        self: &Arc<Self>,
        worker: &Arc<Worker>,
        gone: &CancellationToken,
        engine: &'static dyn Engine,
        configured: Option<KvSource>,
    ) {
        let (intake, worker) = (Arc::clone(self), Arc::clone(worker));
        self.tracker.spawn(gone.clone().run_until_cancelled_owned(async move {
            loop {
                let source = match &configured {
                    Some(source) => Ok(Some(source.clone())),
                    None => engines::kv_source(&worker.channel, engine, worker.rank).await,
                };
                match (source, intake.kv_thread.handle()) {
                    (Ok(Some(source)), Some(handle)) => {
                        tracing::info!(worker = &*worker.name, address = %source.events, "following KV-cache events");
                        let (following, worker, found) =
                            (Arc::clone(&intake), Arc::clone(&worker), configured.is_none());
                        let follow = async move { following.follow(&worker, source, found).await };
                        // Gone with this task, which waits for it.
                        let _ = AbortOnDropHandle::new(intake.tracker.spawn_on(follow, handle)).await;
                    }
                    // It may begin to when it comes back, as another process.
                    (Ok(_), _) => worker.returned.notified().await,
                    (Err(_), _) => {
                        let _ = tokio::time::timeout(ASK_AGAIN, worker.returned.notified()).await;
                    }
                }
            }
        }));
    }

    /// Follows a source: for ever, but one that was `found` until it is away, since it may be elsewhere then.
    async fn follow(&self, worker: &Worker, source: KvSource, found: bool) {
        let mut events = KvEvents::new(source);
        let mut view = View::new(Arc::clone(&worker.pool_model));
        while let Some(signal) = self.signal(worker, &mut events, &mut view, found).await {
            match signal {
                KvSignal::Events(events) => {
                    let identity = worker.identity.load();
                    let adapter = identity.as_ref().and_then(|identity| identity.adapter.as_deref());
                    let changes = view.rehash.apply(&events, (adapter, &self.adapters(worker.pool)));
                    self.changed(worker, &mut view, changes).await;
                    worker.metrics.kv_events.increment(events.len() as u64);
                }
                KvSignal::Forget(loss) => {
                    tracing::info!(worker = &*worker.name, ?loss, "what was known of its KV cache is void");
                    worker.metrics.kv_break(loss);
                    view.rehash.forget();
                    self.tell_cache(worker, KvEvent::Cleared);
                }
                KvSignal::Filled => worker.metrics.kv_filled(),
                KvSignal::Standing(standing) => {
                    tracing::debug!(worker = &*worker.name, ?standing, "KV-cache events");
                    worker.metrics.kv_standing(standing);
                    self.respec(worker, |spec| spec.kv_events = standing == Standing::Complete);
                    (view.away, view.given_up) = (standing == Standing::Away, false);
                    if !view.away {
                        self.changed(worker, &mut view, Vec::new()).await;
                    }
                }
            }
        }
        self.tell_cache(worker, KvEvent::Cleared);
    }

    /// The next signal; `None` when the worker is to be asked anew where it publishes. What was told of a cache is
    /// believed for a while after the events ceased, then no more.
    async fn signal(&self, worker: &Worker, events: &mut KvEvents, view: &mut View, found: bool) -> Option<KvSignal> {
        let mut next = std::pin::pin!(events.next());
        loop {
            tokio::select! {
                // Goes on where it was, as long as it is not dropped.
                signal = &mut next => return Some(signal),
                // Cancel-safe: the time starts again.
                () = tokio::time::sleep(AWAY_LIMIT), if view.away && !view.given_up => {
                    if found {
                        return None;
                    }
                    tracing::warn!(worker = &*worker.name, "nobody publishes KV events where this worker's are expected");
                    (view.given_up, view.in_use) = (true, false);
                    self.tell_cache(worker, KvEvent::Cleared);
                }
                // Cancel-safe: the next probe that it passes tells again.
                () = worker.returned.notified(), if view.away && found => return None,
            }
        }
    }

    /// Passes on changes of a cache, as far as its blocks are as large as those that prompts are hashed in.
    async fn changed(&self, worker: &Worker, view: &mut View, changes: Vec<KvEvent>) {
        let Some(block_tokens) = view.rehash.block_tokens() else { return };
        if view.told_block_tokens != Some(block_tokens) {
            view.told_block_tokens = Some(block_tokens);
            self.respec(worker, |spec| spec.block_tokens = block_tokens);
            if self.block_tokens(worker.pool) != Some(block_tokens) {
                self.tell(worker, Fact::BlockTokens(block_tokens)).await;
            }
        }
        let was_in_use = std::mem::replace(&mut view.in_use, self.block_tokens(worker.pool) == Some(block_tokens));
        match (was_in_use, view.in_use) {
            (true, true) => changes.into_iter().for_each(|change| self.tell_cache(worker, change)),
            (false, true) => self.tell_cache(worker, KvEvent::Stored { blocks: view.rehash.blocks() }),
            (true, false) => self.tell_cache(worker, KvEvent::Cleared),
            (false, false) => {}
        }
    }

    fn tell_cache(&self, worker: &Worker, change: KvEvent) {
        let tell = |change| self.driver.tell(Event::Kv { worker: worker.id, change });
        match change {
            KvEvent::Stored { blocks } => {
                blocks.chunks(BLOCKS_AT_ONCE).for_each(|blocks| tell(KvEvent::Stored { blocks: blocks.to_vec() }));
            }
            KvEvent::Removed { blocks } => {
                blocks.chunks(BLOCKS_AT_ONCE).for_each(|blocks| tell(KvEvent::Removed { blocks: blocks.to_vec() }));
            }
            KvEvent::Cleared => tell(KvEvent::Cleared),
        }
    }
}

/// One worker's cache as its events tell it.
struct View {
    rehash: Rehash,
    /// The size of its blocks, once the others were told.
    told_block_tokens: Option<u32>,
    /// Whether the core hears of it.
    in_use: bool,
    /// No events come.
    away: bool,
    /// For so long that nothing is believed any more.
    given_up: bool,
}

impl View {
    fn new(model: Arc<str>) -> Self {
        Self { rehash: Rehash::new(model), told_block_tokens: None, in_use: false, away: true, given_up: false }
    }
}
