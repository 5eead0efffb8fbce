//! `[[node]]`, and the names of GPUs that workers give.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use url::Url;

use super::defaults::MEMORY_GIB_LIMIT;
use super::log::At;
use super::mistake::quoted;
use super::tree::{Raw, Refusal, Section};
use super::{GpuName, Name, Node};

/// Where `forebay agent` listens unless it is told otherwise.
const AGENT_PORT: u16 = 7072;

/// Every node that could be read; what could not is in the log.
pub(super) fn read_all(root: &mut Section<'_>) -> Vec<Node> {
    let mut taken: BTreeMap<Name, At> = BTreeMap::new();
    let mut agents = BTreeMap::new();
    root.tables("node", "node").into_iter().filter_map(|section| read(section, &mut taken, &mut agents)).collect()
}

/// Host and port of agents that stand already, and where.
type Agents = BTreeMap<(String, Option<u16>), At>;

fn read(mut section: Section<'_>, taken: &mut BTreeMap<Name, At>, agents: &mut Agents) -> Option<Node> {
    let log = section.log;
    let name = section.required("name", "write the name by which workers' `gpus` call the machine", name);
    let gpu_memory_gib = section.optional_count("gpu_memory_gib", MEMORY_GIB_LIMIT, "to take what the agent says");
    let agent = match section.holds("gpu_memory_gib") {
        true => section.read("agent", agent),
        false => section.required(
            "agent",
            "write the address of the agent there, as in agent = \"http://gpu-a:7072\"",
            agent,
        ),
    };
    section.finish(&[]);
    if let Some(agent) = &agent {
        let address = (agent.value.host_str().unwrap_or_default().to_owned(), agent.value.port_or_known_default());
        match agents.entry(address) {
            Entry::Occupied(first) => {
                let remedy = format!("must be the agent of one node: {} has it already", log.mention(first.get()));
                log.refuse(&agent.at, quoted(agent.value.as_str()), remedy);
            }
            Entry::Vacant(place) => {
                place.insert(agent.at.clone());
            }
        }
    }
    let name = name?;
    match taken.entry(name.value.clone()) {
        Entry::Occupied(first) => {
            let remedy = format!("must be unique among nodes: {} has it already", log.mention(first.get()));
            log.refuse(&name.at, quoted(&name.value), remedy);
            return None;
        }
        Entry::Vacant(place) => {
            place.insert(name.at);
        }
    }
    Some(Node { name: name.value, agent: agent.map(|found| found.value), gpu_memory_gib })
}

fn name(raw: &Raw<'_>) -> Result<Name, Refusal> {
    Name::new(raw.text()?).map_err(|bad| Refusal::new(bad.to_string()))
}

fn agent(raw: &Raw<'_>) -> Result<Url, Refusal> {
    let mut url = grpc_address(raw, "http://gpu-a:7072")?;
    if url.port().is_none() && !names_port(raw.text()?) {
        // Never fails: the address has a host.
        let _ = url.set_port(Some(AGENT_PORT));
    }
    Ok(url)
}

/// Whether an address names its port, be it the one that its scheme implies.
fn names_port(address: &str) -> bool {
    let host = address.split_once("://").map_or(address, |(_, rest)| rest);
    let host = host.split('/').next().unwrap_or_default();
    let after_v6 = host.rsplit_once(']').map_or(host, |(_, rest)| rest);
    after_v6.contains(':')
}

/// Where a gRPC server is.
pub(super) fn grpc_address(raw: &Raw<'_>, example: &str) -> Result<Url, Refusal> {
    let text = raw.text()?;
    let url = Url::parse(text).ok().filter(|url| {
        let bare = url.username().is_empty() && url.password().is_none() && url.query().is_none();
        let whole = url.has_host() && url.path() == "/" && url.fragment().is_none();
        matches!(url.scheme(), "http" | "https") && bare && whole
    });
    let form = format!("must be http:// or https://, a host and its port, and nothing more, as in {example}");
    let shown = if text.contains(['@', '?', '#']) { "(redacted)".to_owned() } else { quoted(text) };
    url.ok_or_else(|| Refusal::showing(shown, form))
}

/// A GPU of one of `nodes`, or of this machine where there are none.
pub(super) fn gpu(raw: &Raw<'_>, nodes: &[Node]) -> Result<GpuName, Refusal> {
    let text = raw.text()?;
    let parts = text.rsplit_once('/').and_then(|(node, gpu)| Some((Name::new(node).ok()?, Name::new(gpu).ok()?)));
    let Some((node, gpu)) = parts else {
        return Err(Refusal::new("must be a node and a GPU's index or UUID there, as in \"gpu-a/0\""));
    };
    if nodes.iter().any(|known| known.name == node) || (nodes.is_empty() && &*node == GpuName::HERE) {
        return Ok(GpuName { node, gpu });
    }
    let known: Vec<&str> = nodes.iter().map(|node| node.name.as_str()).collect();
    Err(Refusal::new(match known.is_empty() {
        true => format!("must begin with a `[[node]]`'s name; without one with \"{}/\", this machine's", GpuName::HERE),
        false => format!("must begin with the name of a `[[node]]`: {}", known.join(", ")),
    }))
}
