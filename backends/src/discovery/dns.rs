//! Workers that DNS lists: the addresses of a name (A and AAAA), or its services (SRV, RFC 2782).
//!
//! Of the services, those of the best priority are taken; their weights are left aside, since load is ours to spread. A service's
//! host is resolved here, too, by the same resolver; only over TLS its name stays, which its certificate is for.

use std::net::{IpAddr, SocketAddr};

use hickory_resolver::config::{NameServerConfig, ResolverConfig};
use hickory_resolver::name_server::TokioConnectionProvider;
use hickory_resolver::proto::xfer::Protocol;
use hickory_resolver::{TokioResolver, config::LookupIpStrategy};
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
        let mut builder = match self.server {
            None => TokioResolver::builder_tokio()?,
            Some(address) => {
                let mut config = ResolverConfig::new();
                config.add_name_server(NameServerConfig::new(address, Protocol::Udp));
                config.add_name_server(NameServerConfig::new(address, Protocol::Tcp));
                TokioResolver::builder_with_config(config, TokioConnectionProvider::default())
            }
        };
        builder.options_mut().ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
        Ok(builder.build())
    }

    async fn addresses(&self, resolver: &TokioResolver, host: &str) -> Result<Vec<Place>, Error> {
        let addresses = resolver.lookup_ip(host).await?;
        Ok(addresses.iter().filter_map(|address| self.place(address, self.url.port(), None)).collect())
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
                    places.push(Place { url, name: None, model: None });
                }
                continue;
            }
            // One host that cannot be resolved is no reason to do without the others.
            match resolver.lookup_ip(format!("{target}.")).await {
                Ok(addresses) => {
                    let name = Some(format!("{target}:{port}"));
                    places.extend(addresses.iter().take(1).filter_map(|to| self.place(to, Some(port), name.clone())));
                }
                Err(error) => tracing::warn!(service = target, %error, "a listed worker cannot be resolved"),
            }
        }
        Ok(places)
    }

    fn place(&self, address: IpAddr, port: Option<u16>, name: Option<String>) -> Option<Place> {
        let mut url = self.url.clone();
        (url.set_ip_host(address).is_ok() && url.set_port(port).is_ok()).then_some(Place { url, name, model: None })
    }
}
