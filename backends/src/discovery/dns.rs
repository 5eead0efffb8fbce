//! Workers that DNS lists: the addresses of a name (A and AAAA), or its services (SRV, RFC 2782).
//!
//! Of the services, those of the best priority are taken; their weights are left aside, since load is ours to spread. A
//! service's host is resolved here, too, by the same resolver; only over TLS its name stays, which its certificate is for.
//! An answer of which a part fails is none: half a list would take well workers out.

use std::net::{IpAddr, SocketAddr};

use hickory_resolver::config::{NameServerConfig, ResolverConfig};
use hickory_resolver::name_server::TokioConnectionProvider;
use hickory_resolver::proto::ProtoErrorKind;
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::xfer::Protocol;
use hickory_resolver::{ResolveError, TokioResolver};
use url::Url;

use super::{Error, Place};

pub(super) struct Name {
    /// Its host is what is asked for.
    url: Url,
    /// Who is asked; `None`: those of `/etc/resolv.conf`.
    server: Option<SocketAddr>,
    services: bool,
}

impl Name {
    pub(super) fn new(url: Url, server: Option<SocketAddr>, services: bool) -> Self {
        Self { url, server, services }
    }

    pub(super) async fn look(&self) -> Result<Vec<Place>, Error> {
        let resolver = self.resolver()?;
        let host = self.url.host_str().unwrap_or_default();
        if self.services { self.services(&resolver, host).await } else { self.addresses(&resolver, host).await }
    }

    /// Made for each look: what `/etc/resolv.conf` says may change, and nothing is to be remembered.
    fn resolver(&self) -> Result<TokioResolver, Error> {
        let builder = match self.server {
            None => TokioResolver::builder_tokio()?,
            Some(address) => {
                let mut config = ResolverConfig::new();
                config.add_name_server(NameServerConfig::new(address, Protocol::Udp));
                config.add_name_server(NameServerConfig::new(address, Protocol::Tcp));
                TokioResolver::builder_with_config(config, TokioConnectionProvider::default())
            }
        };
        Ok(builder.build())
    }

    async fn addresses(&self, resolver: &TokioResolver, host: &str) -> Result<Vec<Place>, Error> {
        let addresses = resolve(resolver, host).await?;
        Ok(addresses.into_iter().filter_map(|address| self.place(address, self.url.port(), None)).collect())
    }

    async fn services(&self, resolver: &TokioResolver, host: &str) -> Result<Vec<Place>, Error> {
        let services = resolver.srv_lookup(host).await?;
        let best = services.iter().map(|service| service.priority()).min();
        let mut places = Vec::new();
        for service in services.iter().filter(|service| Some(service.priority()) == best).take(super::PLACES_MAX) {
            let target = service.target().to_utf8();
            let (target, port) = (target.trim_end_matches('.'), service.port());
            if self.url.scheme() == "https" {
                let mut url = self.url.clone();
                if url.set_host(Some(target)).is_ok() && url.set_port(Some(port)).is_ok() {
                    places.push(Place { url, name: None, model: None, draining: false });
                }
                continue;
            }
            match resolve(resolver, &format!("{target}.")).await {
                Ok(addresses) => {
                    let name = Some(format!("{target}:{port}"));
                    let first = addresses.into_iter().take(1);
                    places.extend(first.filter_map(|to| self.place(to, Some(port), name.clone())));
                }
                // It has none any more.
                Err(error) if says_none(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(places)
    }

    fn place(&self, address: IpAddr, port: Option<u16>, name: Option<String>) -> Option<Place> {
        let mut url = self.url.clone();
        (url.set_ip_host(address).is_ok() && url.set_port(port).is_ok()).then_some(Place {
            url,
            name,
            model: None,
            draining: false,
        })
    }
}

/// All addresses of a host, IPv4 first. Both families must answer, if only that there is none.
async fn resolve(resolver: &TokioResolver, host: &str) -> Result<Vec<IpAddr>, ResolveError> {
    let (four, six) = tokio::join!(resolver.ipv4_lookup(host), resolver.ipv6_lookup(host));
    match (four, six) {
        (Err(error), Err(other)) => Err(if says_none(&error) { other } else { error }),
        (Err(error), Ok(_)) | (Ok(_), Err(error)) if !says_none(&error) => Err(error),
        (four, six) => {
            let four = four.iter().flat_map(|lookup| lookup.iter().map(|a| IpAddr::V4(a.0)));
            let six = six.iter().flat_map(|lookup| lookup.iter().map(|aaaa| IpAddr::V6(aaaa.0)));
            Ok(four.chain(six).collect())
        }
    }
}

/// Whether the servers said that there is no such record, and not that they do not know.
fn says_none(error: &ResolveError) -> bool {
    let kind = error.proto().map(|error| error.kind());
    let Some(ProtoErrorKind::NoRecordsFound { response_code, .. }) = kind else { return false };
    matches!(response_code, ResponseCode::NoError | ResponseCode::NXDomain)
}
