//! `forebay agent`: tells gateways elsewhere what the GPUs of this machine say.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context;
use forebay_backends::signals::gpu::{self, agent};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Tell gateways what the GPUs of this machine say.
///
/// It reads NVML once a second (memory, utilization, temperature, power, clocks, errors, processes and the ports they
/// listen on) and serves that over gRPC, to be named as `agent` in a gateway's [[node]]. Nothing can be changed through
/// it; whoever reaches it may read. As root it sees the ports of every user's processes, else only its own user's.
///
/// Example: forebay agent --listen 10.0.0.5:7072
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Where gateways connect; port 0 takes a free one, which is printed.
    #[arg(long, default_value = "0.0.0.0:7072")]
    listen: SocketAddr,
    /// Certificate chain as PEM; gateways then say https.
    #[arg(long, requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Its key as PEM.
    #[arg(long, requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    #[command(flatten)]
    nvml: Nvml,
}

/// Where the driver's library is.
#[derive(Debug, clap::Args)]
pub(super) struct Nvml {
    /// The driver's library [default: libnvidia-ml.so.1 where the loader finds it].
    #[arg(long = "nvml-library", env = "FOREBAY_NVML_LIBRARY", hide = true)]
    pub(super) library: Option<PathBuf>,
}

pub(super) async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let read = |file: PathBuf| std::fs::read(&file).with_context(|| format!("cannot read {}", file.display()));
    let tls = match (arguments.tls_cert, arguments.tls_key) {
        (Some(certificate), Some(key)) => Some(agent::Tls { certificate: read(certificate)?, key: read(key)? }),
        _ => None,
    };
    let address = arguments.listen;
    let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    let stop = CancellationToken::new();
    let mut readings = gpu::read_here(arguments.nvml.library, stop.clone())?;
    let scheme = if tls.is_some() { "https" } else { "http" };
    say!("gateways: {scheme}://{}", listener.local_addr()?);
    let serving = agent::serve(listener, readings.clone(), tls, stop.clone());
    tokio::pin!(serving);
    let first = async {
        if let Ok(Some(snapshot)) = readings.wait_for(Option::is_some).await.map(|first| first.clone()) {
            match &snapshot.problem {
                Some(problem) => tracing::warn!(problem, "no GPU can be read; tried again from time to time"),
                None => tracing::info!(gpus = snapshot.gpus.len(), driver = snapshot.driver, "reading NVML"),
            }
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        ended = serving.as_mut() => return Ok(ended?),
        () = first => {}
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
    stop.cancel();
    Ok(serving.await?)
}
