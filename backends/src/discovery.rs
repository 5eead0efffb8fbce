//! Finding engines: those on this machine where nobody configured any ([`local`]), and lists of workers that change while
//! the gateway runs ([`Lister`]). A source is one file here and one line in `Reader`.
//!
//! A list that cannot be read, or that DNS has no word of, is no empty list: the last one stays, and its workers are
//! judged by how they answer.

mod dns;
mod file;
#[cfg(feature = "kubernetes")]
mod kubernetes;
pub mod local;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
#[cfg(feature = "kubernetes")]
use kubernetes::follow as follow_cluster;
use tokio::time::{Interval, MissedTickBehavior, interval};
use url::Url;

use crate::engines::Detected;

/// Workers of one list at most; the rest is left out, with a warning.
pub const PLACES_MAX: usize = 4096;

/// An engine that answered.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its address, as the configuration would have it.
    pub url: Url,
    pub detected: Detected,
}

/// A worker on a list.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// `http` or `https` with a host.
    pub url: Url,
    /// What to call it, where the list says so.
    pub name: Option<String>,
    /// What it calls the model, where the list says so.
    pub model: Option<String>,
    /// It is to get nothing new, and may finish what it has.
    pub draining: bool,
}

/// What lists workers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// A JSON array of addresses, or of objects with `url` and, if wanted, `name` and `model`.
    File(PathBuf),
    /// Each address of the URL's host is a worker.
    Addresses { url: Url, resolver: Option<SocketAddr> },
    /// Each SRV record of the URL's host names a worker's host and port.
    Services { url: Url, resolver: Option<SocketAddr> },
    /// What a Kubernetes cluster runs; only where [`HAS_KUBERNETES`].
    Kubernetes(Workload),
}

/// Whether this build can ask Kubernetes: the feature `kubernetes`.
pub const HAS_KUBERNETES: bool = cfg!(feature = "kubernetes");

/// Pods in a Kubernetes cluster.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Workload {
    /// `None`: that of the kubeconfig's context, or of this process.
    pub namespace: Option<String>,
    pub behind: Behind,
    /// A service's name, or a label selector.
    pub selector: String,
    pub port: Port,
}

/// What tells which pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Behind {
    Service,
    Labels,
}

/// A pod's port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Port {
    Number(u16),
    Name(String),
    /// The one it has.
    Only,
}

/// Why a list could not be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the file cannot be read: {0}")]
    File(#[from] std::io::Error),
    #[error("the file is no list of workers: {0}")]
    Json(#[from] serde_json::Error),
    #[error("`{0}` is no http or https address of a worker")]
    Address(String),
    #[error("the name cannot be resolved: {0}")]
    Dns(#[from] hickory_resolver::ResolveError),
    #[error("the cluster cannot be asked: {0}")]
    Cluster(Box<dyn std::error::Error + Send + Sync>),
}

/// Reads a list again and again.
pub struct Lister {
    source: Source,
    reader: Reader,
    looks: Interval,
    last: Option<Vec<Place>>,
    /// That it cannot be read was said.
    silent: bool,
}

impl Lister {
    /// Must be made within a runtime.
    #[must_use]
    pub fn new(source: Source, every: Duration) -> Self {
        let looks = every_so_often(every);
        Self { reader: Reader::new(&source, every), source, looks, last: None, silent: false }
    }

    /// Waits for a list that differs from the last one; in order and without doubles, [`PLACES_MAX`] at most.
    pub async fn next(&mut self) -> Vec<Place> {
        loop {
            if !matches!(self.reader, Reader::Told(_)) {
                self.looks.tick().await;
            }
            match self.reader.look().await {
                Ok(None) => self.silent = false,
                Ok(Some(mut places)) => {
                    self.silent = false;
                    places.sort();
                    places.dedup();
                    if places.len() > PLACES_MAX {
                        let (listed, taken) = (places.len(), PLACES_MAX);
                        tracing::warn!(source = ?self.source, listed, taken, "too many workers are listed");
                        places.truncate(PLACES_MAX);
                    }
                    if self.last.as_ref() != Some(&places) {
                        self.last = Some(places.clone());
                        return places;
                    }
                }
                Err(error) if !self.silent => {
                    self.silent = true;
                    tracing::warn!(source = ?self.source, %error, "workers cannot be listed, the last list stays");
                }
                Err(_) => {}
            }
        }
    }
}

fn every_so_often(every: Duration) -> Interval {
    let mut looks = interval(every.max(Duration::from_millis(10)));
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    looks
}

/// The configuration refuses it before.
#[cfg(not(feature = "kubernetes"))]
fn follow_cluster(_: &Workload, _: Duration) -> BoxStream<'static, Result<Vec<Place>, Error>> {
    let unbuilt = Error::Cluster("this program was built without the feature `kubernetes`".into());
    futures::stream::once(async { Err(unbuilt) }).chain(futures::stream::pending()).boxed()
}

/// A source with what is kept from one look to the next.
enum Reader {
    File(file::File),
    Dns(dns::Name),
    /// Tells by itself when there may be something new.
    Told(BoxStream<'static, Result<Vec<Place>, Error>>),
}

impl Reader {
    fn new(source: &Source, every: Duration) -> Self {
        match source {
            Source::File(path) => Self::File(file::File::new(path.clone())),
            Source::Addresses { url, resolver } => Self::Dns(dns::Name::new(url.clone(), *resolver, false)),
            Source::Services { url, resolver } => Self::Dns(dns::Name::new(url.clone(), *resolver, true)),
            Source::Kubernetes(workload) => Self::Told(follow_cluster(workload, every)),
        }
    }

    /// The list; `None`: as before.
    async fn look(&mut self) -> Result<Option<Vec<Place>>, Error> {
        match self {
            Self::File(file) => file.look().await,
            Self::Dns(name) => name.look().await.map(Some),
            Self::Told(told) => told.next().await.transpose(),
        }
    }
}

/// An address as `[[model.worker]]` would have it.
fn address(text: &str) -> Result<Url, Error> {
    let bad = || Error::Address(text.chars().take(200).collect());
    let mut url = Url::parse(text).map_err(|_| bad())?;
    let bare =
        url.username().is_empty() && url.password().is_none() && url.query().is_none() && url.fragment().is_none();
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() || url.port() == Some(0) || !bare {
        return Err(bad());
    }
    // As OpenAI's clients have it: the same worker as without.
    let path = url.path().trim_end_matches('/');
    let path = path.strip_suffix("/v1").unwrap_or(path).trim_end_matches('/').to_owned();
    url.set_path(&path);
    Ok(url)
}
