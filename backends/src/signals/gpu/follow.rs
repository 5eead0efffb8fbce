//! Follows the readings of one machine, connecting again for as long as it takes.

use std::{sync::Arc, time::Duration};

use tokio::time::{sleep, timeout};
use tonic::{
    Streaming,
    transport::{ClientTlsConfig, Endpoint},
};
use url::Url;

use super::{
    node::{Readings, next},
    wire::{Snapshot, WatchRequest, telemetry_client::TelemetryClient},
};

/// Name lookup, TCP, TLS and the call together.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// An agent speaks every second; one that says nothing for so long is gone.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// First wait before another try; doubles up to [`RETRY_MAX`].
const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// Part of a wait by which it is shortened or lengthened at random, so that gateways do not come all at once.
const JITTER: f64 = 0.2;

/// Where a machine's readings come from.
#[derive(Debug, Clone)]
pub enum Source {
    /// The agent there, by its `http` or `https` address.
    Agent(Url),
    /// This very process.
    Here(Readings),
}

/// A fact about a machine's GPUs.
#[derive(Debug, Clone)]
pub enum NodeSignal {
    /// What they say now.
    Snapshot(Arc<Snapshot>),
    /// Nothing comes any more; what was said before is out of date.
    Lost,
}

/// The stream of one machine's readings. [`NodeSignal::Lost`] comes once when it breaks off, and again only after
/// something came in between.
pub struct Follower {
    source: Source,
    stream: Option<Streaming<Snapshot>>,
    retry: Duration,
    told_lost: bool,
}

impl Follower {
    #[must_use]
    pub fn new(source: Source) -> Self {
        Self { source, stream: None, retry: RETRY_FIRST, told_lost: false }
    }

    /// Waits for the next signal. Cancel-safe: what is cut short is begun again by the next call.
    pub async fn next(&mut self) -> NodeSignal {
        loop {
            if let Some(snapshot) = self.snapshot().await {
                (self.retry, self.told_lost) = (RETRY_FIRST, false);
                return NodeSignal::Snapshot(snapshot);
            }
            self.stream = None;
            if !std::mem::replace(&mut self.told_lost, true) {
                return NodeSignal::Lost;
            }
            sleep(self.retry.mul_f64(1.0 + rand::random_range(-JITTER..JITTER))).await;
            self.retry = (self.retry * 2).min(RETRY_MAX);
        }
    }

    /// The next snapshot; `None` when there is none for now.
    async fn snapshot(&mut self) -> Option<Arc<Snapshot>> {
        let url = match &mut self.source {
            Source::Here(readings) => {
                return timeout(SILENCE_MAX, next(readings)).await.ok().flatten();
            }
            Source::Agent(url) => url,
        };
        if self.stream.is_none() {
            let connected = timeout(CONNECT_LIMIT, connect(url)).await;
            self.stream = match connected {
                Ok(Ok(stream)) => Some(stream),
                Ok(Err(error)) => {
                    tracing::debug!(agent = %url, error = &*error, "the GPU agent cannot be reached");
                    None
                }
                Err(_) => None,
            };
        }
        let next = timeout(SILENCE_MAX, self.stream.as_mut()?.message()).await;
        next.ok()?.ok()?.map(Arc::new)
    }
}

async fn connect(url: &Url) -> Result<Streaming<Snapshot>, Box<dyn std::error::Error + Send + Sync>> {
    let mut endpoint = Endpoint::from_shared(url.to_string())?.tcp_nodelay(true);
    if url.scheme() == "https" {
        endpoint = endpoint.tls_config(ClientTlsConfig::new().with_native_roots())?;
    }
    let mut client = TelemetryClient::new(endpoint.connect().await?);
    Ok(client.watch(WatchRequest {}).await?.into_inner())
}
