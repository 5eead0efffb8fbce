//! `[server]`.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use url::Url;

use super::Server;
use super::defaults::{BODY_BYTES, MAX_CONNECTIONS_LIMIT};
use super::mistake::quoted;
use super::node::grpc_address;
use super::tree::{Found, Raw, Refusal, Section};

pub(super) fn read(mut section: Section<'_>) -> Server {
    let default = Server::default();
    let listen = section.read("listen", address);
    let ops_listen = section.read("ops_listen", address);
    let data_dir = section.read("data_dir", data_dir).map_or(default.data_dir, |found| found.value);
    let allow_unauthenticated = section.boolean("allow_unauthenticated", default.allow_unauthenticated);
    for listener in listen.iter().chain(&ops_listen).filter(|_| !allow_unauthenticated) {
        check_exposure(&section, listener);
    }
    let (client, ops) = (given(&listen, default.listen), given(&ops_listen, default.ops_listen));
    if let Some(listener) = ops_listen.or(listen).filter(|_| same_place(client, ops)) {
        let remedy = format!("the two listeners must differ (server.listen {client}, server.ops_listen {ops})");
        section.log.refuse(&listener.at, quoted(&listener.value.to_string()), remedy);
    }
    let server = Server {
        listen: client,
        ops_listen: ops,
        data_dir,
        allow_unauthenticated,
        body_bytes_max: section.bytes("body_bytes_max", BODY_BYTES, default.body_bytes_max),
        max_connections: section.count("max_connections", MAX_CONNECTIONS_LIMIT, default.max_connections),
        stall_max: section.seconds("stall_seconds_max", 1, default.stall_max),
        otlp: section.read("otlp", collector).map(|found| found.value),
        trace_share: section.share("trace_share", default.trace_share),
        drain: section.seconds("drain_seconds", 0, default.drain),
        access_log: section.boolean("access_log", default.access_log),
    };
    section.finish(&[]);
    server
}

fn given(found: &Option<Found<SocketAddr>>, default: SocketAddr) -> SocketAddr {
    found.as_ref().map_or(default, |found| found.value)
}

fn address(raw: &Raw<'_>) -> Result<SocketAddr, Refusal> {
    let text = raw.text()?;
    let local = text.strip_prefix("localhost:").and_then(|port| port.parse().ok());
    match (text.parse(), local) {
        (Ok(address), _) => Ok(address),
        (Err(_), Some(port)) => Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, port))),
        (Err(_), None) => {
            Err(Refusal::new("must be an IP address and a port, as in \"127.0.0.1:7070\" or \"[::1]:7070\""))
        }
    }
}

fn check_exposure(section: &Section<'_>, listener: &Found<SocketAddr>) {
    if !listener.value.ip().to_canonical().is_loopback() {
        let remedy = "must be a loopback address such as 127.0.0.1 while callers are not authenticated \
                      (or set server.allow_unauthenticated = true)";
        section.log.refuse_absence(&listener.at, quoted(&listener.value.to_string()), remedy);
    }
}

/// Whether two listeners would want the same port of the same interface.
fn same_place(a: SocketAddr, b: SocketAddr) -> bool {
    let overlap = a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified();
    a.port() != 0 && a.port() == b.port() && overlap
}

fn collector(raw: &Raw<'_>) -> Result<Url, Refusal> {
    grpc_address(raw, "http://127.0.0.1:4317")
}

fn data_dir(raw: &Raw<'_>) -> Result<PathBuf, Refusal> {
    let path = PathBuf::from(raw.text()?);
    if path.as_os_str().is_empty() {
        return Err(Refusal::new("must be the path of a directory (omit the key for the default ./forebay-data)"));
    }
    if path.exists() && !path.is_dir() {
        return Err(Refusal::new("must be a directory, or a path where one can be made: a file is there"));
    }
    Ok(path)
}
