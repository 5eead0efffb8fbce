//! The agent: serves this machine's readings to whoever asks.
//!
//! Readings only; nothing can be changed through it. A subscriber that reads slowly gets the latest snapshot, not all.

mod connection;

use std::{io, pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, StreamExt as _, stream};
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Response, Status,
    transport::{Identity, Server, ServerTlsConfig, server::TcpIncoming},
};

use self::connection::{Calls, Connection};
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
/// Connections at once; others wait to be accepted.
const CONNECTIONS_MAX: usize = 256;
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
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut was_full = false;
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true)).then(move |accepted| {
        let full = places.available_permits() == 0;
        if full && !was_full {
            tracing::warn!(connections = CONNECTIONS_MAX, "no more connections are served until one of these ends");
        }
        was_full = full;
        let place = Arc::clone(&places).acquire_owned();
        async { Ok::<_, io::Error>(Connection::new(accepted?, place.await.map_err(io::Error::other)?)) }
    });
    let service = TelemetryServer::new(Agent { readings, stop: stop.clone() });
    let serving = server.add_service(service).serve_with_incoming_shutdown(incoming, stop.cancelled());
    tokio::select! {
        ended = serving => ended,
        () = async { stop.cancelled().await; tokio::time::sleep(LAST_WORDS).await } => Ok(()),
    }
}

struct Agent {
    readings: Readings,
    stop: CancellationToken,
}

#[tonic::async_trait]
impl Telemetry for Agent {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<Snapshot, Status>> + Send>>;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let call = request.extensions().get::<Calls>().map(Calls::begin);
        let mut readings = self.readings.clone();
        readings.mark_changed();
        let snapshots = stream::unfold((readings, call), |(mut readings, call)| async {
            let snapshot = next(&mut readings).await?;
            Some((Ok(Snapshot::clone(&snapshot)), (readings, call)))
        });
        Ok(Response::new(Box::pin(snapshots.take_until(self.stop.clone().cancelled_owned()))))
    }
}
