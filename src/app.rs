//! Builds each room, hands it what it uses, and hands `server` who answers; then receives new configuration.
//!
//! Order of the end: stop accepting, say not ready, let answers finish until the drain time is over, cut what is left,
//! write the last row.

mod catalog;
mod joined;
mod lists;
mod tokenizers;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use forebay_backends::signals::gpu::Readings;
use forebay_backends::transport::{Endpoint, Timeouts, Transport};
use secrecy::SecretString;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::access::OwnerKey;
use crate::admin::{self, Admin};
use crate::api::{self, Api};
use crate::config::{Config, Reader};
use crate::dispatch::Dispatch;
use crate::ledger::{Journal, Ledger};
use crate::pipeline::Pipeline;
use crate::pipeline::shared::Shared;
use crate::prepare::Prepare;
use crate::routing::Routing;
use crate::server::{self, Bounds, Server};
use crate::telemetry::{Registry, Traces};
use catalog::Catalog;
use joined::Joined;
use lists::Lists;

/// How often recorded metrics are folded into their histograms.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);
/// Connections of the ops listener: scrapers and people.
const OPS_CONNECTIONS_MAX: usize = 256;

/// Changes of workers that wait for one another.
const ORDERS_MAX: usize = 16;

/// Time for error events and closing handshakes once the drain time is over.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Time for the last rows at the end, should the disk refuse them.
const JOURNAL_CLOSE: Duration = Duration::from_secs(10);

/// What connections are accepted on.
pub struct Listeners {
    pub client: TcpListener,
    pub ops: TcpListener,
}

/// A running gateway.
pub struct Gateway {
    client: SocketAddr,
    ops: SocketAddr,
    fresh_key: Option<SecretString>,
    catalog: Arc<Catalog>,
    dispatch: Arc<Dispatch>,
    transport: Transport,
    journal: Journal,
    /// Connections and their requests.
    serving: TaskTracker,
    /// Everything else: the core's tasks, worker connections.
    tracker: TaskTracker,
    stopping: CancellationToken,
    closing: CancellationToken,
    abort: CancellationToken,
    background: CancellationToken,
}

impl Gateway {
    /// Starts a gateway that serves `config` on `listeners`; `reader` reads what workers say that join by call. `here` are
    /// this machine's GPUs, gone by where no node is configured.
    ///
    /// # Errors
    /// When a tokenizer cannot be loaded, the data directory cannot be written or holds a spoilt owner key
    /// or file of workers, or the system refuses a thread.
    pub async fn start(
        config: Config,
        reader: Reader,
        listeners: Listeners,
        registry: Registry,
        here: Option<Readings>,
    ) -> anyhow::Result<Self> {
        let (serving, tracker) = (TaskTracker::new(), TaskTracker::new());
        let [stopping, closing, abort, background] = std::array::from_fn(|_| CancellationToken::new());
        let settings = &config.server;
        let directory = settings.data_dir.join("journal");
        let owner = OwnerKey::load_or_make(&settings.data_dir)?;
        let fresh_key = owner.fresh().cloned();
        let other = Arc::clone(&registry.other_models);
        let (ledger, journal) = Ledger::start(&directory, settings.access_log, other)
            .with_context(|| format!("cannot write the usage journal in {}", directory.display()))?;
        let transport = Transport::new(tracker.clone());
        let (dispatch, learned) = Dispatch::start(registry.clone(), transport.clone(), &tracker, background.clone())
            .context("cannot start the thread for KV-cache events")?;
        let routing = Arc::new(Routing::default());
        let prepare = Arc::new(Prepare::start().context("cannot start the counting threads")?);
        let server_traces = match &settings.otlp {
            Some(url) => {
                let endpoint = Endpoint::new(url, None).context("server.otlp")?.with_http2(true);
                Some(Traces::new(transport.channel(endpoint, Timeouts::default()), settings.trace_share))
            }
            None => None,
        };
        let stall_max = settings.stall_max;
        let bounds = |connections_max| Bounds { connections_max, stall_max };
        let (body_bytes_max, connections_max) = (settings.body_bytes_max, settings.max_connections.get() as usize);
        let joined = Joined::load(&settings.data_dir, reader)?;
        let (lists, listed) = Lists::new(tracker.clone());
        let catalog = Arc::new(Catalog::new(Arc::clone(&routing), Arc::clone(&dispatch), here, lists, joined));
        let (orders, ordered) = mpsc::channel(ORDERS_MAX);
        catalog.apply(config).await?;
        let following = Arc::clone(&catalog);
        tracker.spawn(
            background
                .clone()
                .run_until_cancelled_owned(async move { following.follow(learned, listed, ordered).await }),
        );
        let upkeep = registry.clone();
        tracker.spawn(background.clone().run_until_cancelled_owned(async move {
            let mut interval = tokio::time::interval(METRICS_UPKEEP);
            loop {
                interval.tick().await;
                upkeep.upkeep();
            }
        }));
        let shared = Arc::new(Shared::new(tracker.clone(), closing.clone()));
        let pipeline =
            Pipeline { routing, prepare, dispatch: Arc::clone(&dispatch), shared, registry: registry.clone() };
        let traces = server_traces.map(|(traces, sending)| {
            tracker.spawn(sending);
            traces
        });
        let api = Api { pipeline, ledger, traces, body_bytes_max, closing: closing.clone() };
        let answerer = Box::new(api::answerer(api));
        let client = Server::new(listeners.client, answerer, bounds(connections_max), api::unread)?;
        let admin = Admin { registry, dispatch: Arc::clone(&dispatch), owner, orders, stopping: stopping.clone() };
        let answerer = server::routed(admin::router(admin));
        let ops = Server::new(listeners.ops, answerer, bounds(OPS_CONNECTIONS_MAX), api::unread)?;
        let addresses = (client.address(), ops.address());
        serving.spawn(client.run(serving.clone(), stopping.clone(), abort.clone()));
        // The ops listener answers until the very end, so that a drain can be watched.
        tracker.spawn(ops.run(tracker.clone(), background.clone(), background.clone()));
        Ok(Self {
            client: addresses.0,
            ops: addresses.1,
            fresh_key,
            catalog,
            dispatch,
            transport,
            journal,
            serving,
            tracker,
            stopping,
            closing,
            abort,
            background,
        })
    }

    /// Where clients connect.
    #[must_use]
    pub fn client_address(&self) -> SocketAddr {
        self.client
    }

    /// Where operators connect.
    #[must_use]
    pub fn ops_address(&self) -> SocketAddr {
        self.ops
    }

    /// The owner's key, when this start made it: to be told once.
    #[must_use]
    pub fn fresh_owner_key(&self) -> Option<&SecretString> {
        self.fresh_key.as_ref()
    }

    /// Takes over new configuration; requests under way keep what they began with.
    ///
    /// # Errors
    /// When a tokenizer of it cannot be loaded; then the old configuration stays whole.
    pub async fn apply(&self, config: Config) -> anyhow::Result<()> {
        self.catalog.apply(config).await
    }

    /// Ends: no new connections, answers under way may finish until `over`, then everything stops.
    pub async fn shutdown(self, over: impl Future<Output = ()>) {
        self.stopping.cancel();
        self.serving.close();
        let finished = tokio::select! {
            () = self.serving.wait() => true,
            () = over => false,
        };
        if !finished {
            tracing::warn!("the drain time is over, cutting the answers that are left");
            self.closing.cancel();
            // Streams still get their error event; a connection whose client does not read it is dropped.
            let _ = tokio::time::timeout(LAST_WORDS, self.serving.wait()).await;
            self.abort.cancel();
            let _ = tokio::time::timeout(LAST_WORDS, self.serving.wait()).await;
        }
        self.dispatch.stop();
        self.background.cancel();
        self.transport.close();
        self.tracker.close();
        let _ = tokio::time::timeout(LAST_WORDS, self.tracker.wait()).await;
        drop((self.catalog, self.dispatch));
        let journal = self.journal;
        let closing = tokio::task::spawn_blocking(move || journal.close());
        if tokio::time::timeout(JOURNAL_CLOSE, closing).await.is_err() {
            tracing::error!("the usage journal takes no more rows, the last ones are lost");
        }
    }
}
