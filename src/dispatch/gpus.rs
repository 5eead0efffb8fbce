//! Which worker runs on which GPU, and what that GPU says: followed from each node, told to the core.
//!
//! A worker runs on the GPUs that its configuration names, or else on those whose processes listen where it is reached,
//! or descend from one that does. What was found stays until something else is: a process that dies leaves no trace.
//! Processes that lead to no worker are foreign; how much they use is told where each process on the GPU is accounted for.
//!
//! A node that falls silent needs no word to the core: what its GPUs said is a lease there.
//!
//! Not here: reading and reconnecting (`forebay_backends::signals::gpu`), what a report costs a request
//! (`forebay_scheduler`).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use forebay_backends::signals::gpu::{self, Follower, Gpu, NodeSignal, Snapshot, Source};
use forebay_backends::transport::Endpoint;
use forebay_scheduler::{Event, GpuId, GpuReport};
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Dispatch;
use super::intake::Intake;
use super::workers::Worker;
use crate::config::GpuName;
use crate::telemetry::GpuMetrics;

/// An error of a GPU counts for so long; then the core tries the worker again.
const FAULT_FRESH: Duration = Duration::from_secs(5);

/// A machine as configured.
#[derive(Debug, Clone)]
pub struct NodeSpec {
    pub name: Arc<str>,
    pub source: Source,
}

impl NodeSpec {
    fn is(&self, other: &Self) -> bool {
        let same = match (&self.source, &other.source) {
            (Source::Agent(a), Source::Agent(b)) => a == b,
            (Source::Here(_), Source::Here(_)) => true,
            _ => false,
        };
        same && self.name == other.name
    }

    /// Where its workers are reached, if they are reached as its agent is; `None`: it is this machine.
    fn host(&self) -> Option<&str> {
        match &self.source {
            Source::Agent(url) => url.host_str().map(|host| host.trim_matches(['[', ']'])),
            Source::Here(_) => None,
        }
    }
}

/// A GPU under some worker, as administration sees it.
#[derive(Debug, Clone)]
pub struct GpuStatus {
    /// As in `gpu-a/0`.
    pub name: String,
    pub said: Gpu,
    /// How long ago.
    pub ago: Duration,
    pub fault: Option<String>,
    /// Processes on it that belong to no worker.
    pub foreign_processes: usize,
}

/// All nodes that are followed.
#[derive(Default)]
pub(super) struct Nodes(Mutex<State>);

#[derive(Default)]
struct State {
    next: u32,
    nodes: Vec<Node>,
    /// Those that workers are configured to run on, whether anybody tells of them or not.
    named: Vec<(GpuName, GpuId)>,
}

struct Node {
    spec: NodeSpec,
    gone: CancellationToken,
    /// By UUID, or by index where that is not known.
    gpus: BTreeMap<String, Seen>,
}

/// One GPU.
struct Seen {
    id: GpuId,
    metrics: GpuMetrics,
    said: Gpu,
    at: Instant,
    /// When its count of uncorrected memory errors rose last.
    corrupted: Option<Instant>,
    fault: Option<String>,
    foreign_processes: usize,
}

/// For each GPU of a node and each of its processes: the workers that this leads to, by their places among the tenants.
type Led = Vec<Vec<Vec<usize>>>;

/// A worker, and where it says or is said to run.
pub(super) struct Tenant {
    pub(super) worker: Arc<Worker>,
    pub(super) configured: Vec<GpuName>,
}

impl Dispatch {
    /// Makes the nodes that are followed those of `specs`.
    pub fn follow_nodes(&self, specs: &[NodeSpec]) {
        let mut guard = self.intake.nodes.0.lock();
        let state = &mut *guard;
        let mut left: Vec<GpuId> = Vec::new();
        state.nodes.retain(|node| {
            let stays = specs.iter().any(|spec| spec.is(&node.spec));
            if !stays {
                node.gone.cancel();
                let named = |id: &GpuId| state.named.iter().any(|(_, named)| named == id);
                left.extend(node.gpus.values().map(|seen| seen.id).filter(|id| !named(id)));
            }
            stays
        });
        for spec in specs {
            if !state.nodes.iter().any(|node| node.spec.is(spec)) {
                let gone = CancellationToken::new();
                state.nodes.push(Node { spec: spec.clone(), gone: gone.clone(), gpus: BTreeMap::new() });
                let (intake, spec) = (Arc::clone(&self.intake), spec.clone());
                let following = async move { intake.follow_node(&spec).await };
                self.intake.tracker.spawn(gone.run_until_cancelled_owned(following));
            }
        }
        drop(guard);
        for Tenant { worker, .. } in self.intake.tenants() {
            let ran_there = worker.spec.lock().gpus.iter().any(|id| left.contains(id));
            if ran_there {
                self.intake.respec(&worker, |spec| spec.gpus.retain(|id| !left.contains(id)));
            }
        }
    }

    pub(super) fn stop_nodes(&self) {
        self.intake.nodes.0.lock().nodes.iter().for_each(|node| node.gone.cancel());
    }

    /// What is known of these GPUs.
    pub(super) fn gpu_statuses(&self, ids: &[GpuId]) -> Vec<GpuStatus> {
        let state = self.intake.nodes.0.lock();
        let all = state.nodes.iter().flat_map(|node| node.gpus.values().map(move |seen| (node, seen)));
        let found = all.filter(|(_, seen)| ids.contains(&seen.id)).map(|(node, seen)| GpuStatus {
            name: format!("{}/{}", node.spec.name, seen.said.index),
            said: seen.said.clone(),
            ago: seen.at.elapsed(),
            fault: seen.fault.clone(),
            foreign_processes: seen.foreign_processes,
        });
        found.collect()
    }
}

impl Nodes {
    /// The text of the GPUs' series.
    pub(super) fn publish(&self) -> String {
        GpuMetrics::render(self.0.lock().nodes.iter().flat_map(|node| node.gpus.values()).map(|seen| &seen.metrics))
    }

    /// The GPUs of these names, before anybody told of them: who shares one is known from the configuration alone.
    pub(super) fn named(&self, names: &[GpuName]) -> Vec<GpuId> {
        let State { next, nodes, named } = &mut *self.0.lock();
        let seen = |name: &GpuName| {
            let mut all = nodes.iter().flat_map(|node| node.gpus.values().map(move |seen| (&node.spec, seen)));
            all.find(|(node, seen)| is_named(name, node, &seen.said)).map(|(_, seen)| seen.id)
        };
        let mut ids = BTreeSet::new();
        for name in names {
            let known = seen(name).or_else(|| named.iter().find(|(known, _)| known == name).map(|(_, id)| *id));
            let id = known.unwrap_or_else(|| fresh(next));
            if !named.iter().any(|(known, _)| known == name) {
                named.push((name.clone(), id));
            }
            ids.insert(id);
        }
        ids.into_iter().collect()
    }
}

impl Intake {
    async fn follow_node(&self, spec: &NodeSpec) {
        let mut follower = Follower::new(spec.source.clone());
        let mut problem = None;
        loop {
            match follower.next().await {
                NodeSignal::Snapshot(snapshot) => {
                    if snapshot.problem != problem {
                        problem.clone_from(&snapshot.problem);
                        match (&problem, &spec.source) {
                            // A machine without GPUs is none whose GPUs fail.
                            (Some(problem), Source::Here(_)) => tracing::debug!(problem, "no GPU can be read here"),
                            (Some(problem), _) => {
                                tracing::warn!(node = &*spec.name, problem, "no GPU can be read there");
                            }
                            (None, _) => tracing::info!(node = &*spec.name, "its GPUs can be read now"),
                        }
                    }
                    self.gpus_read(spec, &snapshot);
                }
                NodeSignal::Lost => {
                    tracing::warn!(node = &*spec.name, "nothing is heard of its GPUs");
                    let state = self.nodes.0.lock();
                    state.nodes.iter().filter(|node| node.spec.is(spec)).for_each(Node::clear);
                }
            }
        }
    }

    fn gpus_read(&self, spec: &NodeSpec, snapshot: &Snapshot) {
        let tenants = self.tenants();
        let (joins, reports) = {
            let mut state = self.nodes.0.lock();
            let State { next, nodes, named } = &mut *state;
            let Some(node) = nodes.iter_mut().find(|node| node.spec.is(spec)) else { return };
            node.take_in((next, named), snapshot);
            let led = node.led(&tenants);
            let (found, reports) = (node.found(&tenants, &led), node.reports(&tenants, &led));
            let elsewhere = |id: &GpuId| {
                let others = nodes.iter().filter(|node| !node.spec.is(spec));
                others.flat_map(|node| node.gpus.values()).any(|seen| seen.id == *id)
            };
            let joins: Vec<_> = found
                .into_iter()
                .filter_map(|(at, found)| {
                    let tenant = tenants.get(at)?;
                    Some((tenant, joined(tenant, &found, elsewhere)?))
                })
                .collect();
            (joins, reports)
        };
        for (tenant, gpus) in joins {
            tracing::info!(worker = &*tenant.worker.name, node = &*spec.name, gpus = gpus.len(), "runs on these GPUs");
            self.respec(&tenant.worker, |spec| spec.gpus = gpus);
        }
        for (gpu, report) in reports {
            self.driver.tell(Event::Gpu { gpu, report });
        }
    }
}

impl Node {
    /// Says that nothing is known of its GPUs.
    fn clear(&self) {
        self.gpus.values().for_each(|seen| seen.metrics.clear());
    }

    fn take_in(&mut self, (next, named): (&mut u32, &[(GpuName, GpuId)]), snapshot: &Snapshot) {
        let now = Instant::now();
        let key = |gpu: &Gpu| gpu.uuid.clone().unwrap_or_else(|| gpu.index.clone());
        let keys: BTreeSet<String> = snapshot.gpus.iter().map(key).collect();
        self.gpus.retain(|known, _| keys.contains(known));
        for gpu in &snapshot.gpus {
            let seen = self.gpus.entry(key(gpu)).or_insert_with(|| {
                let metrics = GpuMetrics::new(&self.spec.name, &gpu.index);
                let known = named.iter().find(|(name, _)| is_named(name, &self.spec, gpu)).map(|(_, id)| *id);
                let id = known.unwrap_or_else(|| fresh(next));
                Seen { id, metrics, said: gpu.clone(), at: now, corrupted: None, fault: None, foreign_processes: 0 }
            });
            if seen.said.index != gpu.index {
                // A driver that starts again may count its GPUs in another order.
                seen.metrics = GpuMetrics::new(&self.spec.name, &gpu.index);
            }
            if gpu.ecc_uncorrected.zip(seen.said.ecc_uncorrected).is_some_and(|(new, old)| new > old) {
                seen.corrupted = Some(now);
            }
            let fresh = u64::try_from(FAULT_FRESH.as_millis()).unwrap_or(u64::MAX);
            let corrupted = seen.corrupted.filter(|at| now.duration_since(*at) < FAULT_FRESH);
            let fault = gpu::fault(gpu, fresh).or_else(|| corrupted.map(|_| "uncorrected memory errors".to_owned()));
            if fault != seen.fault {
                match &fault {
                    Some(fault) => tracing::warn!(node = &*self.spec.name, gpu = gpu.index, fault, "a GPU fails"),
                    None => tracing::info!(node = &*self.spec.name, gpu = gpu.index, "a GPU fails no more"),
                }
            }
            seen.metrics.set(gpu);
            (seen.fault, seen.said, seen.at) = (fault, gpu.clone(), now);
        }
    }

    /// Where each process of each GPU leads. Each worker is looked up once: there may be many of both.
    fn led(&self, tenants: &[Tenant]) -> Led {
        let mut led: Led = self.gpus.values().map(|seen| vec![Vec::new(); seen.said.processes.len()]).collect();
        let mut by_port: HashMap<u16, Vec<_>> = HashMap::new();
        for (gpu, seen) in self.gpus.values().enumerate() {
            for (at, process) in seen.said.processes.iter().enumerate() {
                for listen in process.listens.iter().filter_map(|listen| listen.parse::<SocketAddr>().ok()) {
                    by_port.entry(listen.port()).or_default().push((listen, gpu, at));
                }
            }
        }
        for (at, tenant) in tenants.iter().enumerate() {
            let endpoint = tenant.worker.channel.endpoint();
            let near = by_port.get(&endpoint.port()).into_iter().flatten();
            for (_, gpu, process) in near.filter(|(listen, ..)| reaches(endpoint, *listen, self.spec.host())) {
                if let Some(workers) = led.get_mut(*gpu).and_then(|processes| processes.get_mut(*process)) {
                    workers.push(at);
                }
            }
        }
        led
    }

    /// The GPUs under workers, by their places in `tenants`; nothing of those that have none here.
    fn found(&self, tenants: &[Tenant], led: &Led) -> BTreeMap<usize, BTreeSet<GpuId>> {
        let mut found: BTreeMap<usize, BTreeSet<GpuId>> = BTreeMap::new();
        for (seen, processes) in self.gpus.values().zip(led) {
            for at in processes.iter().flatten() {
                if tenants.get(*at).is_some_and(|tenant| tenant.configured.is_empty()) {
                    found.entry(*at).or_default().insert(seen.id);
                }
            }
        }
        for (at, tenant) in tenants.iter().enumerate() {
            for name in tenant.configured.iter().filter(|name| *name.node == *self.spec.name) {
                let named = self.gpus.values().filter(|seen| is_named(name, &self.spec, &seen.said));
                for seen in named {
                    found.entry(at).or_default().insert(seen.id);
                }
            }
        }
        found
    }

    /// What the core is to know of the GPUs that some worker runs on.
    fn reports(&mut self, tenants: &[Tenant], led: &Led) -> Vec<(GpuId, GpuReport)> {
        let mut users: HashMap<GpuId, Vec<usize>> = HashMap::new();
        for (at, tenant) in tenants.iter().enumerate() {
            for id in &tenant.worker.spec.lock().gpus {
                users.entry(*id).or_default().push(at);
            }
        }
        let mut reports = Vec::new();
        for (seen, led) in self.gpus.values_mut().zip(led) {
            let processes = &seen.said.processes;
            let users = users.get(&seen.id);
            // A worker whose process is not among them may be one of the others.
            let accounted = users.into_iter().flatten().all(|user| led.iter().any(|workers| workers.contains(user)));
            let measured = accounted && users.is_some() && processes.iter().all(|process| process.sm_percent.is_some());
            let others: Vec<_> = processes
                .iter()
                .zip(led)
                .filter(|(_, workers)| workers.is_empty())
                .map(|(process, _)| process)
                .collect();
            let share = || others.iter().filter_map(|process| process.sm_percent).sum::<u32>();
            let foreign = measured.then(|| f64::from(share()) / 100.0);
            seen.foreign_processes = if accounted { others.len() } else { 0 };
            if users.is_some() {
                reports.push((seen.id, report(seen, foreign)));
            }
        }
        reports
    }
}

/// All GPUs of a worker that has `found` on one node, where that is another set than the core knows.
fn joined(tenant: &Tenant, found: &BTreeSet<GpuId>, elsewhere: impl Fn(&GpuId) -> bool) -> Option<Vec<GpuId>> {
    let known: BTreeSet<GpuId> = tenant.worker.spec.lock().gpus.iter().copied().collect();
    // A worker that spans nodes is told of by each; what was found elsewhere by its port is not its any more.
    let rest = known.difference(found).filter(|id| !tenant.configured.is_empty() && elsewhere(id));
    let all: BTreeSet<GpuId> = found.iter().chain(rest).copied().collect();
    (all != known).then(|| all.into_iter().collect())
}

#[expect(clippy::cast_precision_loss, reason = "memory is far below 2^52 bytes")]
fn report(seen: &Seen, foreign: Option<f64>) -> GpuReport {
    let gpu = &seen.said;
    let memory = gpu.memory_used_bytes.zip(gpu.memory_total_bytes).filter(|(_, total)| *total > 0);
    GpuReport {
        derate: gpu::slowdown(gpu),
        fault: seen.fault.is_some(),
        utilization: gpu.utilization_percent.map(|percent| f64::from(percent) / 100.0),
        foreign,
        memory: memory.map(|(used, total)| used as f64 / total as f64),
        memory_bytes: memory.map(|(_, total)| total),
    }
}

fn fresh(next: &mut u32) -> GpuId {
    *next += 1;
    GpuId(*next)
}

/// Whether a node's GPU is the one that a worker names.
fn is_named(name: &GpuName, node: &NodeSpec, gpu: &Gpu) -> bool {
    *name.node == *node.name && (*name.gpu == *gpu.index || gpu.uuid.as_deref() == Some(&*name.gpu))
}

/// Whether a socket that listens on the node at `host` (none: here) is the one that `endpoint` reaches.
fn reaches(endpoint: &Endpoint, listen: SocketAddr, host: Option<&str>) -> bool {
    let is_here = |host: &str| {
        host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    };
    let worker = endpoint.host();
    let same_machine = match host {
        Some(host) => host.eq_ignore_ascii_case(worker) || (is_here(host) && is_here(worker)),
        None => is_here(worker),
    };
    let address = listen.ip();
    let by_address = worker.parse::<IpAddr>().is_ok_and(|worker| worker == address && !address.is_loopback());
    let by_machine = same_machine && (address.is_unspecified() || address.is_loopback() == is_here(worker));
    endpoint.port() == listen.port() && (by_address || by_machine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_bear_the_index_that_a_gpu_has_now() {
        let source = Source::Agent("http://gpu-a:7072".parse().unwrap());
        let spec = NodeSpec { name: "n".into(), source };
        let mut node = Node { spec, gone: CancellationToken::new(), gpus: BTreeMap::new() };
        let mut next = 0;
        for (uuids, expect) in [(["a", "b"], [10, 11]), (["b", "c"], [11, 12]), (["c", "b"], [12, 11])] {
            let gpus = (0..).zip(uuids).map(|(index, uuid): (u32, _)| Gpu {
                index: index.to_string(),
                uuid: Some(uuid.to_owned()),
                temperature_celsius: Some(u32::from_str_radix(uuid, 16).unwrap()),
                ..Gpu::default()
            });
            node.take_in((&mut next, &[]), &Snapshot { gpus: gpus.collect(), ..Snapshot::default() });
            let text = GpuMetrics::render(node.gpus.values().map(|seen| &seen.metrics));
            let said: Vec<_> = text.lines().filter(|line| line.starts_with("forebay_gpu_temperature")).collect();
            let line =
                |gpu: usize| format!("forebay_gpu_temperature_celsius{{node=\"n\",gpu=\"{gpu}\"}} {}", expect[gpu]);
            assert_eq!(said, [line(0), line(1)], "{uuids:?}");
        }
        assert_eq!(next, 3, "a GPU stays who it is");
    }

    #[test]
    fn workers_are_found_by_where_they_are_reached() {
        let check = |worker: &str, listen: &str, host: Option<&str>, expect: bool| {
            let endpoint = Endpoint::new(&worker.parse().unwrap(), None).unwrap();
            assert_eq!(reaches(&endpoint, listen.parse().unwrap(), host), expect, "{worker} {listen} {host:?}");
        };
        // on this machine
        check("http://127.0.0.1:8000", "0.0.0.0:8000", None, true);
        check("http://localhost:8000", "127.0.0.1:8000", None, true);
        check("http://localhost:8000", "[::]:8000", None, true);
        check("http://127.0.0.1:8000", "0.0.0.0:8001", None, false);
        check("http://127.0.0.1:8000", "10.0.0.5:8000", None, false);
        check("http://gpu-a:8000", "0.0.0.0:8000", None, false);
        // on a node, by the name of its agent
        check("http://gpu-a:8000", "0.0.0.0:8000", Some("GPU-A"), true);
        check("http://gpu-a:8000", "10.0.0.5:8000", Some("gpu-a"), true);
        check("http://gpu-a:8000", "127.0.0.1:8000", Some("gpu-a"), false);
        check("http://gpu-b:8000", "0.0.0.0:8000", Some("gpu-a"), false);
        check("http://127.0.0.1:8000", "127.0.0.1:8000", Some("localhost"), true);
        check("http://127.0.0.1:8000", "0.0.0.0:8000", Some("gpu-a"), false);
        // by the address of a container of its own
        check("http://10.42.0.7:8000", "10.42.0.7:8000", Some("gpu-a"), true);
        check("http://10.42.0.8:8000", "10.42.0.7:8000", Some("gpu-a"), false);
        check("http://10.0.0.5:8000", "0.0.0.0:8000", Some("10.0.0.5"), true);
    }
}
