//! `[[model.discover]]`: what lists workers of a model.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use forebay_backends::discovery::Source;
use url::Url;

use super::mistake::quoted;
use super::model::{engine, name};
use super::tree::{Found, Raw, Refusal, Section};
use super::{Discover, Reader, secret};

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
    let resolver = section.read("resolver", resolver);
    let every = section.seconds("every_seconds", 1, EVERY);
    let engine = section.read("engine", |raw| engine(raw, &reader.engines));
    let model = section.read("model", name);
    let api_key = section.read("api_key", |raw| secret::read(raw, &reader.environment));
    let http2 = section.boolean("http2", false);
    if let (Some(resolver), Some(_)) = (&resolver, &file) {
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
    ]
    .into_iter()
    .flatten();
    let source = sources.next();
    for more in sources {
        log.refuse(&more.at, "beside another list", "must stand alone: write one `[[model.discover]]` for each list");
    }
    if !["file", "dns", "srv"].iter().any(|key| section.holds(key)) {
        let remedy = "write what lists the workers: `file`, `dns` or `srv`";
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

fn resolver(raw: &Raw<'_>) -> Result<SocketAddr, Refusal> {
    let form = "must be the address and port of a DNS server, as in 127.0.0.1:8600";
    raw.text()?.parse().map_err(|_| Refusal::new(form))
}
