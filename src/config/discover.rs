//! `[[model.discover]]`: what lists workers of a model.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use forebay_backends::discovery::{Behind, HAS_KUBERNETES, Port, Source, Workload};
use url::Url;

use super::mistake::quoted;
use super::model::{engine, name};
use super::tree::{Found, Raw, Refusal, Section};
use super::{Discover, Reader, secret};

/// The keys of which one says what lists the workers.
const LISTS: [&str; 4] = ["file", "dns", "srv", "kubernetes"];

/// How often a list is read where the file does not say.
const EVERY: Duration = Duration::from_secs(5);

pub(super) fn read_all(model: &mut Section<'_>, reader: &Reader) -> Vec<Discover> {
    model.tables("discover", "model.discover").into_iter().filter_map(|section| read(section, reader)).collect()
}

fn read(mut section: Section<'_>, reader: &Reader) -> Option<Discover> {
    let log = section.log;
    let file = section.read("file", |raw| Ok(Source::File(PathBuf::from(raw.text()?))));
    let dns = section.read("dns", |raw| lookup(raw, "http://vllm.models.svc:8000", &["http"]));
    let srv = section.read("srv", |raw| {
        let url = lookup(raw, "http://_http._tcp.vllm.models.svc", &["http", "https"])?;
        let own = url.port().map(|_| Refusal::new("must be without a port: each SRV record names its own"));
        own.map_or(Ok(url), Err)
    });
    let kubernetes = kubernetes(&mut section);
    let resolver = section.read("resolver", resolver);
    let every = section.seconds("every_seconds", 1, EVERY);
    let engine = section.read("engine", |raw| engine(raw, &reader.engines));
    let model = section.read("model", name);
    let api_key = section.read("api_key", |raw| secret::read(raw, &reader.environment));
    let http2 = section.boolean("http2", false);
    if let (Some(resolver), Some(_)) = (&resolver, file.as_ref().or(kubernetes.as_ref())) {
        log.refuse_absence(&resolver.at, quoted(&resolver.value.to_string()), "needs `dns` or `srv` beside it");
    }
    let resolver = resolver.map(|found| found.value);
    let named = |found: Option<Found<Url>>, source: fn(Url, Option<SocketAddr>) -> Source| {
        found.map(|Found { value, at }| Found { value: source(value, resolver), at })
    };
    let mut sources = [
        file,
        named(dns, |url, resolver| Source::Addresses { url, resolver }),
        named(srv, |url, resolver| Source::Services { url, resolver }),
        kubernetes,
    ]
    .into_iter()
    .flatten();
    let source = sources.next();
    for more in sources {
        log.refuse(&more.at, "beside another list", "must stand alone: write one `[[model.discover]]` for each list");
    }
    if !LISTS.iter().any(|key| section.holds(key)) {
        let remedy = format!("write what lists the workers: `{}`", LISTS.join("`, `"));
        log.refuse_absence(&section.here(), "no list", remedy);
    }
    section.finish(&[]);
    Some(Discover {
        source: source?.value,
        every,
        engine: engine.map(|found| found.value),
        model: model.map(|found| found.value),
        api_key: api_key.map(|found| found.value),
        http2,
    })
}

/// The address of a worker whose host is to be looked up.
fn lookup(raw: &Raw<'_>, example: &str, schemes: &[&str]) -> Result<Url, Refusal> {
    let text = raw.text()?;
    let url = Url::parse(text).ok().filter(|url| {
        let bare = url.username().is_empty() && url.password().is_none() && url.query().is_none();
        schemes.contains(&url.scheme()) && url.domain().is_some() && bare && url.fragment().is_none()
    });
    let shown = if text.contains(['@', '?', '#']) { "(redacted)".to_owned() } else { quoted(text) };
    let mut url = url.ok_or_else(|| {
        Refusal::showing(
            shown,
            format!("must begin with {}:// and a name that DNS knows, as in {example}", schemes.join(":// or ")),
        )
    })?;
    if url.port() == Some(0) {
        return Err(Refusal::new("must have a port that can be connected to"));
    }
    let path = url.path().trim_end_matches('/').to_owned();
    if path.ends_with("/v1") {
        return Err(Refusal::new("must not end in /v1: write the address in front of it"));
    }
    url.set_path(&path);
    Ok(url)
}

/// `kubernetes = { service = … }` or `{ pods = … }`.
fn kubernetes(discover: &mut Section<'_>) -> Option<Found<Source>> {
    let at = discover.at("kubernetes");
    let mut section = discover.optional_table("kubernetes", "model.discover.kubernetes")?;
    let log = section.log;
    if !HAS_KUBERNETES {
        let remedy =
            "build it with `cargo build --release --features kubernetes`, or use `dns` with a headless service";
        log.refuse(&at, "nothing that this program was built with", remedy);
    }
    let label = |raw: &Raw<'_>| kubernetes_name(raw, 63);
    let service = section.read("service", label);
    let pods = section.read("pods", selector);
    let namespace = section.read("namespace", label);
    let port = section.read("port", port);
    if service.is_some() && pods.is_some() {
        log.refuse(&section.at("pods"), "beside a service", "must stand alone: the service selects its pods itself");
    }
    if !section.holds("service") && !section.holds("pods") {
        let remedy = "write `service`, the name of a service, or `pods`, a label selector as in \"app=vllm\"";
        log.refuse_absence(&at, "without pods", remedy);
    }
    section.finish(&[]);
    let (behind, selector) = match (service, pods) {
        (Some(service), _) => (Behind::Service, service.value),
        (None, pods) => (Behind::Labels, pods?.value),
    };
    let (namespace, port) = (namespace.map(|found| found.value), port.map_or(Port::Only, |found| found.value));
    Some(Found { value: Source::Kubernetes(Workload { namespace, behind, selector, port }), at })
}

/// A label of DNS (RFC 1123), which the names of services, namespaces and ports are.
fn kubernetes_name(raw: &Raw<'_>, most: usize) -> Result<String, Refusal> {
    let text = raw.text()?;
    let inside = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let good =
        (1..=most).contains(&text.len()) && text.bytes().all(inside) && !text.starts_with('-') && !text.ends_with('-');
    let form =
        || Refusal::new(format!("must be 1 to {most} small letters, digits and hyphens, as Kubernetes names it"));
    good.then(|| text.to_owned()).ok_or_else(form)
}

/// What a label selector may hold is the cluster's to say; here it is a line of a URL's length.
fn selector(raw: &Raw<'_>) -> Result<String, Refusal> {
    const BYTES_MAX: usize = 1024;
    let text = raw.text()?;
    let good = !text.trim().is_empty() && text.len() <= BYTES_MAX && !text.chars().any(char::is_control);
    good.then(|| text.to_owned())
        .ok_or_else(|| Refusal::new("must be a label selector, as in \"app=vllm,model=llama\""))
}

fn port(raw: &Raw<'_>) -> Result<Port, Refusal> {
    if raw.text().is_ok() {
        return kubernetes_name(raw, 15).map(Port::Name);
    }
    let number = raw.whole(&(1..=u16::MAX.into()), "where the pods have but one")?;
    Ok(u16::try_from(number).map_or(Port::Only, Port::Number))
}

fn resolver(raw: &Raw<'_>) -> Result<SocketAddr, Refusal> {
    let form = "must be the address and port of a DNS server, as in 127.0.0.1:8600";
    raw.text()?.parse().map_err(|_| Refusal::new(form))
}
