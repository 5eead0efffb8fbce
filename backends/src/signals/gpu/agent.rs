//! The agent: serves this machine's readings to whoever asks.
//!
//! Readings only; nothing can be changed through it. A subscriber that reads slowly gets the latest snapshot, not all.

use std::{future::ready, io, pin::Pin, time::Duration};

use futures::{Stream, StreamExt as _, stream};
use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Response, Status,
    transport::{Identity, Server, ServerTlsConfig, server::TcpIncoming},
};

use super::{
    node::{Readings, next},
    wire::{
        Snapshot, WatchRequest,
        telemetry_server::{Telemetry, TelemetryServer},
    },
};

/// After so long without a word a peer is asked whether it is still there, and after as long again it is not.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// How long connections may take to end: one that says nothing never would.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// A connection on which nothing was said for so long since it was made is closed.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// Connections that may be silent at once; others wait to be accepted.
const SILENT_MAX: usize = 64;
/// Calls at once on one connection.
const CALLS_MAX: u32 = 16;

/// Certificate chain and key, as PEM.
pub struct Tls {
    pub certificate: Vec<u8>,
    pub key: Vec<u8>,
}

/// Serves `readings` until `stop`.
///
/// # Errors
/// When certificate and key are none, or the listener fails.
pub async fn serve(
    listener: TcpListener,
    readings: Readings,
    tls: Option<Tls>,
    stop: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let mut server = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .max_concurrent_streams(CALLS_MAX);
    if let Some(Tls { certificate, key }) = tls {
        server = server.tls_config(ServerTlsConfig::new().identity(Identity::from_pem(certificate, key)))?;
    }
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let incoming = incoming.map(spoken).buffer_unordered(SILENT_MAX).filter_map(ready);
    let service = TelemetryServer::new(Agent { readings, stop: stop.clone() });
    let serving = server.add_service(service).serve_with_incoming_shutdown(incoming, stop.cancelled());
    tokio::select! {
        ended = serving => ended,
        () = async { stop.cancelled().await; tokio::time::sleep(LAST_WORDS).await } => Ok(()),
    }
}

/// A connection once its client said something; none where it did not.
async fn spoken(accepted: io::Result<TcpStream>) -> Option<io::Result<TcpStream>> {
    match accepted {
        Ok(connection) => {
            let said = timeout(SILENCE_MAX, connection.peek(&mut [0])).await;
            matches!(said, Ok(Ok(1))).then_some(Ok(connection))
        }
        failed => Some(failed),
    }
}

struct Agent {
    readings: Readings,
    stop: CancellationToken,
}

#[tonic::async_trait]
impl Telemetry for Agent {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<Snapshot, Status>> + Send>>;

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let mut readings = self.readings.clone();
        readings.mark_changed();
        let snapshots = stream::unfold(readings, |mut readings| async {
            let snapshot = next(&mut readings).await?;
            Some((Ok(Snapshot::clone(&snapshot)), readings))
        });
        Ok(Response::new(Box::pin(snapshots.take_until(self.stop.clone().cancelled_owned()))))
    }
}
