//! Workers that Kubernetes runs: the endpoints of a service (EndpointSlices), or the pods that labels select.
//!
//! Listed once, then watched from where the list was; a watch that ends is taken up where it ended, and one whose past the
//! server has forgotten (410) begins with a new list. What is not ready or about to end stays listed as draining, so that
//! what it has may finish and what is known of it stays; what is gone is gone.
//!
//! The cluster is that of the kubeconfig (`KUBECONFIG`, `~/.kube/config`), else the one this process runs in. After any
//! failure the client is made anew, so that a token or a certificate authority that was replaced is read again.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::net::IpAddr;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::{BoxStream, unfold};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, ListParams, WatchEvent, WatchParams};
use kube::core::NamespaceResourceScope;
use kube::{Client, Config, Resource};
use serde::de::DeserializeOwned;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Interval, timeout};
use url::Url;

use super::{Behind, Error, PLACES_MAX, Place, Port, Workload, every_so_often};

/// In its own words.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Objects in one piece of a list.
const PAGE: u32 = 500;
/// For the list and the answer's head of the watch together.
const BEGIN: Duration = Duration::from_secs(30);
const CONNECT: Duration = Duration::from_secs(5);
/// How long the server is asked to keep a watch.
const WATCH: Duration = Duration::from_secs(240);
/// One that lasts longer is on a connection that died in silence.
const WATCH_MAX: Duration = Duration::from_secs(270);

/// The workers, whenever they may have changed; `pause` lies between one beginning and the next.
pub(super) fn follow(workload: &Workload, pause: Duration) -> BoxStream<'static, Result<Vec<Place>, Error>> {
    match workload.behind {
        Behind::Service => Objects::<EndpointSlice>::new(workload.clone(), pause).follow(),
        Behind::Labels => Objects::<Pod>::new(workload.clone(), pause).follow(),
    }
}

/// What tells of workers.
trait Tells: Resource<DynamicType = (), Scope = NamespaceResourceScope> {
    /// Which objects do.
    fn selector(workload: &Workload) -> String;

    /// The workers of one.
    fn places(&self, port: &Port) -> Vec<Place>;
}

/// The objects of one kind, as they are now.
struct Objects<K> {
    workload: Workload,
    /// Before each beginning.
    pause: Interval,
    api: Option<Api<K>>,
    /// A client in the making, and its namespace. One that takes longer than a beginning is waited for by the next.
    connecting: Option<JoinHandle<kube::Result<(Client, String)>>>,
    /// Up to where the objects are known; `None`: they must be listed.
    version: Option<String>,
    events: Option<BoxStream<'static, kube::Result<WatchEvent<K>>>>,
    /// By name.
    known: BTreeMap<String, Vec<Place>>,
}

impl<K: Tells + Clone + Debug + DeserializeOwned + Send + 'static> Objects<K> {
    fn new(workload: Workload, pause: Duration) -> Self {
        let pause = every_so_often(pause);
        Self { workload, pause, api: None, connecting: None, version: None, events: None, known: BTreeMap::new() }
    }

    fn follow(self) -> BoxStream<'static, Result<Vec<Place>, Error>> {
        let look = async |mut objects: Self| Some((objects.look().await.map_err(Error::Cluster), objects));
        unfold(self, look).boxed()
    }

    /// Waits until something may have changed.
    async fn look(&mut self) -> Result<Vec<Place>, Failure> {
        let Some(events) = &mut self.events else {
            self.pause.tick().await;
            let began = timeout(BEGIN, self.begin()).await.unwrap_or_else(|late| Err(late.into()));
            match began {
                // Nothing is wrong: all is listed anew.
                Err(error) if is_past(&error) => self.version = None,
                Err(error) => {
                    self.api = None;
                    return Err(error);
                }
                Ok(()) => {}
            }
            return Ok(self.places());
        };
        match timeout(WATCH_MAX, events.next()).await {
            Ok(Some(Ok(event))) => self.take(event),
            ended => {
                if let Ok(Some(Err(error))) = ended {
                    tracing::debug!(%error, "a watch broke off");
                }
                self.events = None;
            }
        }
        Ok(self.places())
    }

    async fn begin(&mut self) -> Result<(), Failure> {
        let api = match self.api.clone() {
            Some(api) => api,
            None => {
                let api = self.connect().await?;
                self.api.insert(api).clone()
            }
        };
        let selector = K::selector(&self.workload);
        let version = match self.version.clone() {
            Some(version) => version,
            None => self.list(&api, &selector).await?,
        };
        let seconds = u32::try_from(WATCH.as_secs()).unwrap_or(u32::MAX);
        let watched = WatchParams::default().labels(&selector).timeout(seconds);
        self.events = Some(api.watch(&watched, &version).await?.boxed());
        self.version = Some(version);
        Ok(())
    }

    async fn connect(&mut self) -> Result<Api<K>, Failure> {
        let connecting = match &mut self.connecting {
            Some(connecting) => connecting,
            None => {
                let mut config = Config::infer().await?;
                config.connect_timeout = Some(CONNECT);
                config.default_retry = false; // it is tried again anyway, after a pause
                let namespace = self.workload.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
                // It may run a program that fetches credentials; one that hangs must not become many.
                self.connecting.insert(spawn_blocking(move || Ok((Client::try_from(config)?, namespace))))
            }
        };
        let made = connecting.await;
        self.connecting = None;
        let (client, namespace) = made??;
        Ok(Api::namespaced(client, &namespace))
    }

    /// Lists all; gives the version from which to watch.
    async fn list(&mut self, api: &Api<K>, selector: &str) -> Result<String, Failure> {
        let (mut known, mut from) = (BTreeMap::new(), None);
        loop {
            let mut asked = ListParams::default().labels(selector).limit(PAGE);
            asked.continue_token = from;
            let list = api.list(&asked).await?;
            known.extend(
                list.items.iter().filter_map(|object| Some((name(object)?, object.places(&self.workload.port)))),
            );
            from = list.metadata.continue_.filter(|from| !from.is_empty());
            if from.is_none() || known.len() > PLACES_MAX {
                self.known = known;
                return Ok(list.metadata.resource_version.unwrap_or_default());
            }
        }
    }

    fn take(&mut self, event: WatchEvent<K>) {
        let version = match event {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                if let Some(name) =
                    name(&object).filter(|name| self.known.len() <= PLACES_MAX || self.known.contains_key(name))
                {
                    self.known.insert(name, object.places(&self.workload.port));
                }
                object.meta().resource_version.clone()
            }
            WatchEvent::Deleted(object) => {
                if let Some(name) = name(&object) {
                    self.known.remove(&name);
                }
                object.meta().resource_version.clone()
            }
            WatchEvent::Bookmark(mark) => Some(mark.metadata.resource_version),
            WatchEvent::Error(status) => {
                tracing::debug!(code = status.code, reason = status.reason, "the server ends a watch");
                (self.events, self.version) = (None, None);
                return;
            }
        };
        self.version = version.or(self.version.take());
    }

    /// One place a name: a pod may stand in two slices while it is moved, and has one of each family of addresses. What
    /// has no name is told apart by its address.
    fn places(&self) -> Vec<Place> {
        let mut places: Vec<Place> = self.known.values().flatten().take(2 * PLACES_MAX).cloned().collect();
        let who = |place: &Place| place.name.clone().unwrap_or_else(|| place.url.to_string());
        places.sort_by_cached_key(|place| {
            let family = place.url.host_str().is_some_and(|host| host.starts_with('['));
            (who(place), family, place.draining, place.url.to_string())
        });
        places.dedup_by_key(|place| who(place));
        places
    }
}

/// Whether the version to watch from is one that the server has forgotten.
fn is_past(failure: &Failure) -> bool {
    matches!(failure.downcast_ref(), Some(kube::Error::Api(status)) if status.code == 410)
}

fn name<K: Resource>(object: &K) -> Option<String> {
    object.meta().name.clone()
}

impl Tells for EndpointSlice {
    fn selector(workload: &Workload) -> String {
        format!("kubernetes.io/service-name={}", workload.selector)
    }

    fn places(&self, port: &Port) -> Vec<Place> {
        let ports = self.ports.iter().flatten().filter_map(|port| Some((port.name.as_deref(), port.port?)));
        let Some(port) = pick(port, ports) else { return Vec::new() };
        let namespace = self.metadata.namespace.as_deref();
        let endpoints = self.endpoints.iter().filter_map(|endpoint| {
            let address = endpoint.addresses.first()?;
            let (ready, ending) = endpoint.conditions.as_ref().map_or((true, false), |conditions| {
                (conditions.ready.unwrap_or(true), conditions.terminating.unwrap_or(false))
            });
            let pod = endpoint.target_ref.as_ref().and_then(|target| target.name.as_deref());
            place(address, port, pod.zip(namespace), !ready || ending)
        });
        endpoints.collect()
    }
}

impl Tells for Pod {
    fn selector(workload: &Workload) -> String {
        workload.selector.clone()
    }

    fn places(&self, port: &Port) -> Vec<Place> {
        let containers = self.spec.iter().flat_map(|spec| &spec.containers);
        let ports = containers.flat_map(|container| container.ports.iter().flatten());
        let Some(port) = pick(port, ports.map(|port| (port.name.as_deref(), port.container_port))) else {
            return Vec::new();
        };
        let Some(status) = &self.status else { return Vec::new() };
        let over = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        let Some(address) = status.pod_ip.as_deref().filter(|_| !over) else { return Vec::new() };
        let ready = status.conditions.iter().flatten().any(|said| said.type_ == "Ready" && said.status == "True");
        let ending = self.metadata.deletion_timestamp.is_some();
        let pod = self.metadata.name.as_deref().zip(self.metadata.namespace.as_deref());
        place(address, port, pod, !ready || ending).into_iter().collect()
    }
}

/// The port that is wanted; `None` where there is no such one, or which one is not said.
fn pick<'a>(wanted: &Port, mut ports: impl Iterator<Item = (Option<&'a str>, i32)>) -> Option<u16> {
    let found = match wanted {
        Port::Number(port) => return Some(*port),
        Port::Name(wanted) => ports.find(|(name, _)| *name == Some(wanted)),
        Port::Only => ports.next().filter(|_| ports.next().is_none()),
    };
    u16::try_from(found?.1).ok()
}

/// `pod` are its name and its namespace; two namespaces may have a pod of the same name.
fn place(address: &str, port: u16, pod: Option<(&str, &str)>, draining: bool) -> Option<Place> {
    let mut url = Url::parse("http://host").ok()?;
    url.set_ip_host(address.parse::<IpAddr>().ok()?).ok()?;
    url.set_port(Some(port)).ok()?;
    let name = pod.map(|(name, namespace)| format!("{name}.{namespace}:{port}"));
    Some(Place { url, name, model: None, draining })
}
