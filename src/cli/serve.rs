//! `forebay serve`: runs the gateway.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use forebay_backends::discovery::{Found, local};
use forebay_backends::signals::gpu;
use forebay_backends::transport::Transport;
use secrecy::ExposeSecret;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::WrongUse;
use super::agent::Nvml;
use super::gateway::{self, Signals, Source};
use crate::access::OwnerKey;
use crate::app::{Gateway, Listeners};
use crate::config::{Config, Flag, Model, Name, Server, Watch, Worker};
use crate::telemetry::Registry;

/// What is read when nothing names a file.
const DEFAULT_FILE: &str = "forebay.toml";

/// Run the gateway.
///
/// Without a configuration file (--config, FOREBAY_CONFIG, ./forebay.toml) it asks the usual local ports for engines
/// and serves what it finds.
///
/// Example: forebay serve --config forebay.toml --listen 127.0.0.1:7070
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Configuration file [default: ./forebay.toml where it exists].
    #[arg(long, env = "FOREBAY_CONFIG")]
    config: Option<PathBuf>,
    /// Where clients connect, over server.listen [default: 127.0.0.1:7070].
    #[arg(long)]
    listen: Option<String>,
    /// Where operators connect, over server.ops_listen [default: 127.0.0.1:7071].
    #[arg(long)]
    ops_listen: Option<String>,
    #[command(flatten)]
    nvml: Nvml,
}

pub(super) async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let signals = Signals::install()?;
    let flag = |name, key, value: Option<String>| value.map(|value| Flag { name, key, value });
    let flags =
        [flag("--listen", "listen", arguments.listen), flag("--ops-listen", "ops_listen", arguments.ops_listen)];
    let reader = gateway::reader(flags.into_iter().flatten().collect());
    let joining = reader.clone();
    let default = Path::new(DEFAULT_FILE).is_file().then(|| DEFAULT_FILE.into());
    let wrong = |mistakes: crate::config::Mistakes| WrongUse(mistakes.to_string());
    let (config, source) = match arguments.config.or(default) {
        Some(path) => {
            let watch = Watch::new(path.clone());
            (reader.load(&path).map_err(wrong)?, Some(Source { reader, path, watch }))
        }
        None => (reader.without_file().map_err(wrong)?, None),
    };
    let probing = source.is_none();
    let client = gateway::listen(config.server.listen, probing)?;
    let ops = gateway::listen(config.server.ops_listen, probing)?;
    let own = [client.local_addr()?.port(), ops.local_addr()?.port()];
    let config = if probing { probe(config, &own).await? } else { config };
    let registry = Registry::install().context("cannot install the metrics recorder")?;
    // An agent tells more than one gateway; without any, what runs on this machine can be looked at from here.
    let is_here = config.nodes.is_empty() && config.models.iter().flat_map(|model| &model.workers).any(Worker::is_here);
    let here = is_here.then(|| gpu::read_here(arguments.nvml.library, CancellationToken::new())).transpose()?;
    let gateway = Gateway::start(config.clone(), joining, Listeners { client, ops }, registry, here).await?;
    say!("clients: http://{}   operators: http://{}", gateway.client_address(), gateway.ops_address());
    if let Some(key) = gateway.fresh_owner_key() {
        let file = OwnerKey::path(&config.server.data_dir);
        say!("owner key, shown this once and kept in {}: {}", file.display(), key.expose_secret());
    }
    for model in &config.models {
        let named = model.workers.iter().map(|worker| worker.name.as_str());
        let workers: Vec<_> =
            named.chain((!model.discover.is_empty()).then_some("those that its lists name")).collect();
        say!("model {} on {}", model.name.as_str(), workers.join(", "));
    }
    gateway::run(gateway, config, signals, source).await
}

/// Fills an empty configuration with what listens on this machine.
async fn probe(mut config: Config, own: &[u16]) -> anyhow::Result<Config> {
    say!("no configuration file: asking the usual local ports for engines");
    let tracker = TaskTracker::new();
    let transport = Transport::new(tracker);
    let found = local::probe_local(&transport, &local::USUAL_PORTS, own).await;
    transport.close();
    for engine in &found {
        let models: Vec<_> = engine.detected.models.iter().map(|model| model.id.as_str()).collect();
        say!("found {} at {}, serving {}", engine.detected.engine.name(), engine.url, models.join(", "));
    }
    config.models = models(&found, &config.server)?;
    anyhow::ensure!(
        !config.models.is_empty(),
        "no engine answers on a usual local port ({}); start one, or write a forebay.toml, or try `forebay demo`",
        local::USUAL_PORTS.map(|port| port.to_string()).join(", ")
    );
    Ok(config)
}

/// One model a served name, its workers being all engines that serve it.
fn models(found: &[Found], server: &Server) -> anyhow::Result<Vec<Model>> {
    let mut workers: BTreeMap<&str, Vec<Worker>> = BTreeMap::new();
    for engine in found {
        for model in engine.detected.models.iter().filter(|model| !model.alternative) {
            let place = format!("127.0.0.1:{}", engine.url.port_or_known_default().unwrap_or_default());
            // A server of several models is a worker of each.
            let several = engine.detected.models.len() > 1;
            let name = if several { format!("{place}/{}", model.id) } else { place };
            let worker = Worker {
                engine: Some(engine.detected.engine.name()),
                model: Some(Name::new(&model.id)?),
                ..Worker::new(Name::new(&name)?, engine.url.clone())
            };
            workers.entry(&model.id).or_default().push(worker);
        }
    }
    workers.into_iter().map(|(name, workers)| Ok(Model::new(Name::new(name)?, workers, server))).collect()
}
