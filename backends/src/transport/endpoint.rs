//! The address of a worker, checked once so that no request has to.

use std::fmt;

use http::{
    HeaderValue, Uri,
    uri::{Authority, Parts, PathAndQuery, Scheme},
};
use rustls::pki_types::ServerName;
use secrecy::{ExposeSecret, SecretString};
use url::{Host, Url};

/// Why an address cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    #[error("the scheme must be `http` or `https`")]
    Scheme,
    #[error("a host is missing or is not one that can be looked up")]
    Host,
    #[error("user name and password do not belong in the address; give the key as `api_key`")]
    Credentials,
    #[error("the address must end with its path: no `?` and no `#`")]
    Query,
    #[error("the key holds characters that a header cannot carry")]
    Key,
}

/// Where a worker listens, and the key it asks for. `Debug` and `Display` show the address, never the key.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// As a resolver wants it: an IPv6 address without brackets.
    host: String,
    port: u16,
    /// Path in front of every request's path; empty or `/…` without a slash at its end.
    prefix: String,
    /// Set for `https`.
    server_name: Option<ServerName<'static>>,
    authority: Authority,
    host_header: HeaderValue,
    authorization: Option<HeaderValue>,
    http2: bool,
    metrics_port: Option<u16>,
}

impl Endpoint {
    /// Reads `http(s)://host[:port][/prefix]`. A `/v1` at the end, as OpenAI clients write their base address, is taken
    /// off: the adapters' paths bring their own.
    ///
    /// # Errors
    /// When the address or the key cannot be used; the message says what to change.
    pub fn new(url: &Url, api_key: Option<&SecretString>) -> Result<Self, EndpointError> {
        let https = match url.scheme() {
            "http" => false,
            "https" => true,
            _ => return Err(EndpointError::Scheme),
        };
        if !url.username().is_empty() || url.password().is_some() {
            return Err(EndpointError::Credentials);
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(EndpointError::Query);
        }
        let (host, in_header) = match url.host().ok_or(EndpointError::Host)? {
            Host::Domain(name) => (name.to_owned(), name.to_owned()),
            Host::Ipv4(address) => (address.to_string(), address.to_string()),
            Host::Ipv6(address) => (address.to_string(), format!("[{address}]")),
        };
        let port = url.port_or_known_default().ok_or(EndpointError::Host)?;
        let authority = url.port().map_or_else(|| in_header.clone(), |port| format!("{in_header}:{port}"));
        let server_name =
            https.then(|| ServerName::try_from(host.clone())).transpose().map_err(|_| EndpointError::Host)?;
        let path = url.path().trim_end_matches('/');
        let prefix = path.strip_suffix("/v1").unwrap_or(path).to_owned();
        let authorization = api_key.map(bearer).transpose()?;
        let host_header = HeaderValue::try_from(&authority).map_err(|_| EndpointError::Host)?;
        let authority = Authority::try_from(authority).map_err(|_| EndpointError::Host)?;
        Ok(Self {
            host,
            port,
            prefix,
            server_name,
            authority,
            host_header,
            authorization,
            http2: false,
            metrics_port: None,
        })
    }

    /// Spoken to in HTTP/2 from the first byte where it is not behind TLS. Behind TLS the worker chooses by itself (ALPN).
    #[must_use]
    pub fn with_http2(self, http2: bool) -> Self {
        Self { http2, ..self }
    }

    /// Where its metrics are, of engines that have them at a port of their own; `None`: where they are by default.
    #[must_use]
    pub fn with_metrics_port(self, metrics_port: Option<u16>) -> Self {
        Self { metrics_port, ..self }
    }

    /// The same host at its metrics' port, in plain HTTP and without the key.
    pub(super) fn metrics(&self, default_port: u16) -> Self {
        let port = self.metrics_port.unwrap_or(default_port);
        let host = self.authority.host();
        let authority = Authority::try_from(format!("{host}:{port}")).unwrap_or_else(|_| self.authority.clone());
        let host_header = HeaderValue::try_from(authority.as_str()).unwrap_or_else(|_| self.host_header.clone());
        let host = self.host.clone();
        Self {
            host,
            port,
            prefix: String::new(),
            server_name: None,
            authority,
            host_header,
            authorization: None,
            http2: false,
            metrics_port: None,
        }
    }

    /// Host name or address, without brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    pub(super) fn server_name(&self) -> Option<&ServerName<'static>> {
        self.server_name.as_ref()
    }

    /// Whether it is spoken to in HTTP/2 from the first byte.
    #[must_use]
    pub fn speaks_http2(&self) -> bool {
        self.http2
    }

    /// The whole address of a path that [`Endpoint::join`] gave, as HTTP/2 wants it.
    pub(super) fn absolute(&self, path: PathAndQuery) -> Uri {
        let mut parts = Parts::default();
        parts.scheme = Some(if self.server_name.is_some() { Scheme::HTTPS } else { Scheme::HTTP });
        parts.authority = Some(self.authority.clone());
        parts.path_and_query = Some(path);
        Uri::from_parts(parts).unwrap_or_default()
    }

    pub(super) fn host_header(&self) -> &HeaderValue {
        &self.host_header
    }

    pub(super) fn authorization(&self) -> Option<&HeaderValue> {
        self.authorization.as_ref()
    }

    /// The path as this worker knows it. A prefix came out of a checked URL, so joining it cannot fail; should it, the
    /// bare path is asked and the worker says 404.
    pub(super) fn join(&self, path: PathAndQuery) -> PathAndQuery {
        if self.prefix.is_empty() {
            return path;
        }
        PathAndQuery::try_from(format!("{}{path}", self.prefix)).unwrap_or(path)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.server_name.is_some() { "https" } else { "http" };
        let host = self.host_header.to_str().unwrap_or(&self.host);
        write!(f, "{scheme}://{host}{}", self.prefix)
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Endpoint({self}{})", if self.authorization.is_some() { ", with a key" } else { "" })
    }
}

fn bearer(key: &SecretString) -> Result<HeaderValue, EndpointError> {
    let mut value = HeaderValue::try_from(format!("Bearer {}", key.expose_secret())).map_err(|_| EndpointError::Key)?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(url: &str) -> Result<Endpoint, EndpointError> {
        Endpoint::new(&url.parse().expect("a URL"), None)
    }

    #[test]
    fn addresses() {
        for (url, host, port, header, path) in [
            ("http://gpu-a:8000", "gpu-a", 8000, "gpu-a:8000", "/health"),
            ("http://gpu-a:8000/v1", "gpu-a", 8000, "gpu-a:8000", "/health"),
            ("http://gpu-a/", "gpu-a", 80, "gpu-a", "/health"),
            ("https://gpu-a", "gpu-a", 443, "gpu-a", "/health"),
            ("http://[::1]:8000/pool/7/", "::1", 8000, "[::1]:8000", "/pool/7/health"),
            ("https://10.0.0.1:8443/a/v1/", "10.0.0.1", 8443, "10.0.0.1:8443", "/a/health"),
        ] {
            let endpoint = endpoint(url).expect(url);
            assert_eq!((endpoint.host(), endpoint.port()), (host, port), "{url}");
            assert_eq!(endpoint.host_header(), header, "{url}");
            assert_eq!(endpoint.join(PathAndQuery::from_static("/health")), path, "{url}");
            assert_eq!(endpoint.server_name().is_some(), url.starts_with("https"), "{url}");
        }
    }

    #[test]
    fn refused_addresses() {
        for (url, error) in [
            ("ftp://gpu-a", EndpointError::Scheme),
            ("unix:/run/engine.sock", EndpointError::Scheme),
            ("http://user:secret@gpu-a", EndpointError::Credentials),
            ("http://gpu-a/?a=b", EndpointError::Query),
            ("http://gpu-a/#x", EndpointError::Query),
        ] {
            assert_eq!(endpoint(url).err(), Some(error), "{url}");
        }
        let key = SecretString::from("a\nb");
        let url = "http://gpu-a".parse().expect("a URL");
        assert_eq!(Endpoint::new(&url, Some(&key)).err(), Some(EndpointError::Key));
    }

    #[test]
    fn the_key_is_never_shown() {
        let key = SecretString::from("sk-very-secret");
        let endpoint = Endpoint::new(&"http://gpu-a:8000/x".parse().expect("a URL"), Some(&key)).expect("an endpoint");
        let shown = format!("{endpoint} {endpoint:?} {:?}", endpoint.authorization());
        assert!(!shown.contains("secret"), "{shown}");
        assert!(shown.contains("http://gpu-a:8000/x"), "{shown}");
        assert_eq!(endpoint.authorization().map(HeaderValue::as_bytes), Some(b"Bearer sk-very-secret".as_slice()));
    }
}
