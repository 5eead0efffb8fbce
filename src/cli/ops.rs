//! A client of a running gateway's ops listener, for the verbs that administer.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use forebay_backends::transport::{Channel, Endpoint, Outgoing, Timeouts, Transport};
use http::uri::PathAndQuery;
use http::{HeaderMap, Method};
use secrecy::SecretString;
use serde_json::Value;
use tokio_util::task::TaskTracker;
use url::Url;

use super::WrongUse;
use crate::access::OwnerKey;

/// Holds the key where the data directory is another machine's.
const KEY_VARIABLE: &str = "FOREBAY_ADMIN_KEY";
/// Listings answer at once; a gateway that does not is in trouble.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Which gateway, and how to be let in.
#[derive(Debug, clap::Args)]
pub(super) struct Access {
    /// Where the gateway's operators connect.
    #[arg(long, global = true, default_value = "http://127.0.0.1:7071")]
    url: Url,
    /// The gateway's data directory, for its owner.key; FOREBAY_ADMIN_KEY wins over it.
    #[arg(long, global = true, env = "FOREBAY_DATA_DIR", default_value = "./forebay-data")]
    data_dir: PathBuf,
}

/// The gateway's ops listener.
pub(super) struct Ops {
    channel: Channel,
    shown: String,
}

impl Ops {
    /// Connects with the first request.
    pub(super) fn new(access: &Access) -> anyhow::Result<Self> {
        let endpoint =
            |key| Endpoint::new(&access.url, key).map_err(|error| WrongUse(format!("--url {}: {error}", access.url)));
        // A wrong address is said before a missing key.
        endpoint(None)?;
        let endpoint = endpoint(Some(&key(&access.data_dir)?))?;
        let timeouts = Timeouts { first_byte: Some(ANSWER_TIMEOUT), idle: ANSWER_TIMEOUT, ..Timeouts::default() };
        let shown = endpoint.to_string();
        Ok(Self { channel: Transport::new(TaskTracker::new()).channel(endpoint, timeouts), shown })
    }

    /// The answer of `/admin/v1/` and these segments.
    pub(super) async fn get(&self, segments: &[&str]) -> anyhow::Result<Value> {
        self.ask(Method::GET, segments, bytes::Bytes::new()).await
    }

    /// The same, with another method and a body.
    pub(super) async fn ask(&self, method: Method, segments: &[&str], body: bytes::Bytes) -> anyhow::Result<Value> {
        let mut path = Url::parse("http://localhost/admin/v1")?;
        if let Ok(mut known) = path.path_segments_mut() {
            known.extend(segments);
        }
        let path = PathAndQuery::try_from(path.path())?;
        let asked = Outgoing { method, path, headers: HeaderMap::new(), body };
        let unreachable = |error| {
            // The transport's own words speak of a worker.
            let cause = anyhow::Error::from(error);
            anyhow::anyhow!("no gateway answers at {}: {}", self.shown, cause.root_cause())
        };
        let response = self.channel.send(asked).await.map_err(unreachable)?;
        let status = response.status;
        let body = response.body.collect(ANSWER_BYTES_MAX).await.map_err(unreachable)?;
        let json: Option<Value> = serde_json::from_slice(&body).ok();
        if status.is_success() {
            return json.with_context(|| format!("what answers at {} is not a gateway's ops listener", self.shown));
        }
        let message = json.as_ref().and_then(|json| json.pointer("/error/message")?.as_str());
        anyhow::bail!("{} answered {status}: {}", self.shown, message.unwrap_or("not a gateway's ops listener?"))
    }
}

fn key(data_dir: &Path) -> anyhow::Result<SecretString> {
    match std::env::var(KEY_VARIABLE) {
        Ok(key) if !key.trim().is_empty() => return Ok(key.trim().into()),
        Err(std::env::VarError::NotUnicode(_)) => return Err(WrongUse(format!("{KEY_VARIABLE} is no key")).into()),
        Ok(_) | Err(std::env::VarError::NotPresent) => {}
    }
    OwnerKey::load(data_dir).map(|owner| owner.secret().clone()).map_err(|error| {
        let how = format!("set {KEY_VARIABLE}, or name the gateway's data directory with --data-dir");
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
        WrongUse(format!("{error}{cause}; {how}")).into()
    })
}
