//! What `serve` and `demo` share: reading configuration, opening listeners, waiting for the end, reloading.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use forebay_backends::engines::ENGINES;
use tokio::net::{TcpListener, TcpSocket};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::app::Gateway;
use crate::config::{Config, Environment, Flag, Reader, Watch};

/// Connections that the kernel makes while none is accepted: thousands of clients that come back at once, after a balancer
/// moved them, say, are not refused. The kernel takes no more than its `somaxconn`, usually as many.
const BACKLOG: u32 = 4096;
/// How often the configuration file is looked at.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

pub(super) fn reader(flags: Vec<Flag>) -> Reader {
    Reader {
        environment: Environment::of_process(),
        flags,
        engines: ENGINES.iter().map(|engine| engine.name()).collect(),
    }
}

/// Opens a listener at `address`; with `or_next` at the next free port when that one is taken, which is said.
pub(super) fn listen(address: SocketAddr, or_next: bool) -> anyhow::Result<TcpListener> {
    let busy = match bind(address) {
        Ok(listener) => return Ok(listener),
        Err(error) => error,
    };
    if or_next && busy.kind() == std::io::ErrorKind::AddrInUse {
        for port in (1..=64).filter_map(|step| address.port().checked_add(step)) {
            if let Ok(listener) = bind(SocketAddr::new(address.ip(), port)) {
                say!("port {} is taken, using {port}", address.port());
                return Ok(listener);
            }
        }
    }
    Err(busy).with_context(|| format!("cannot listen on {address}"))
}

fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // A port whose last connections have not faded yet is free for a process that starts again.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Where a configuration comes from, for reading it again.
pub(super) struct Source {
    pub(super) reader: Reader,
    pub(super) path: PathBuf,
    /// Made before the file is read for the first time, so that no change is missed.
    pub(super) watch: Watch,
}

/// The signals a gateway acts on; made before anything that takes time, since until then they end the process.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

impl Signals {
    pub(super) fn install() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }
}

impl Source {
    /// Reads the file again and hands it to the gateway; a bad file changes nothing and says so.
    async fn reload(&self, gateway: &Gateway, running: &mut Config) {
        let mut config = match self.reader.load(&self.path) {
            Ok(config) => config,
            Err(mistakes) => {
                tracing::error!("the new configuration is not taken over, the old one stays:\n{mistakes}");
                return;
            }
        };
        for refused in config.keep_fixed(running) {
            tracing::warn!("{refused}");
        }
        if config == *running {
            return;
        }
        match gateway.apply(config.clone()).await {
            Ok(()) => {
                tracing::info!(file = %self.path.display(), "configuration reloaded");
                *running = config;
            }
            Err(error) => tracing::error!("the new configuration is not taken over, the old one stays: {error:#}"),
        }
    }
}

/// Waits for SIGTERM or SIGINT, reloading on SIGHUP and when the file changes; then drains. A second signal ends the
/// drain at once.
pub(super) async fn run(
    gateway: Gateway,
    mut config: Config,
    signals: Signals,
    mut source: Option<Source>,
) -> anyhow::Result<()> {
    let Signals { mut terminate, mut interrupt, mut hang_up } = signals;
    let mut interval = tokio::time::interval(WATCH_INTERVAL);
    loop {
        let reload = tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hang_up.recv() => true,
            _ = interval.tick() => source.as_mut().is_some_and(|source| source.watch.look()),
        };
        if let (true, Some(source)) = (reload, &source) {
            source.reload(&gateway, &mut config).await;
        }
    }
    tracing::info!(seconds = config.server.drain.as_secs_f64(), "stopping: letting answers under way finish");
    let mut hurried = false;
    gateway
        .shutdown(async {
            tokio::select! {
                () = tokio::time::sleep(config.server.drain) => {}
                _ = terminate.recv() => hurried = true,
                _ = interrupt.recv() => hurried = true,
            }
        })
        .await;
    anyhow::ensure!(!hurried, "stopped before the answers under way were finished");
    Ok(())
}
