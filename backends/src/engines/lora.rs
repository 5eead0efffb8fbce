//! Engines that take LoRA adapters while they run.

use std::time::Duration;

use bytes::Bytes;
use forebay_proto::error::from_engine;
use http::StatusCode;
use serde_json::{Value, json};

use super::{Engine, SMALL_BYTES_MAX, ServedModel, models};
use crate::{Error, transport::Channel};

/// Longest wait for an adapter to come: some GB from a slow disk.
const LOAD_LIMIT: Duration = Duration::from_secs(300);
/// An adapter leaves at once; a request under way may still have it.
const UNLOAD_LIMIT: Duration = Duration::from_secs(30);

/// Paths to which the name of an adapter, and where the engine finds its files, are posted.
#[derive(Clone, Copy, Debug)]
pub struct AdapterPaths {
    pub load: &'static str,
    pub unload: &'static str,
}

/// Why a worker has not loaded, or unloaded, an adapter.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// Neither this adapter nor another: the engine cannot, or not as it was started.
    #[error("its engine takes no adapters while it runs")]
    Unable,
    /// Not this adapter, in the engine's words.
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Failed(#[from] Error),
}

/// Has a worker load the adapter `name` from `path`; returns when that is done. One that it has already is loaded.
///
/// # Errors
/// See [`AdapterError`].
pub async fn load_adapter(channel: &Channel, engine: &dyn Engine, name: &str, path: &str) -> Result<(), AdapterError> {
    let Some(paths) = engine.adapter_paths() else { return Err(AdapterError::Unable) };
    let body = json!({"lora_name": name, "lora_path": path});
    match post(channel, (paths.load, &body), LOAD_LIMIT).await {
        // whatever it calls that, it is there
        Err(AdapterError::Refused(_)) if has(channel, name).await == Some(true) => Ok(()),
        ended => ended,
    }
}

/// Has a worker forget the adapter `name`. One that it does not have is forgotten.
///
/// # Errors
/// See [`AdapterError`].
pub async fn unload_adapter(channel: &Channel, engine: &dyn Engine, name: &str) -> Result<(), AdapterError> {
    let Some(paths) = engine.adapter_paths() else { return Err(AdapterError::Unable) };
    match post(channel, (paths.unload, &json!({"lora_name": name})), UNLOAD_LIMIT).await {
        Err(AdapterError::Refused(_)) if has(channel, name).await == Some(false) => Ok(()),
        ended => ended,
    }
}

/// All that a server lists: models, and the adapters that it has.
///
/// # Errors
/// When it does not answer with such a list.
pub async fn listed(channel: &Channel) -> Result<Vec<ServedModel>, Error> {
    models(channel).await
}

async fn has(channel: &Channel, name: &str) -> Option<bool> {
    let listed = models(channel).await.ok()?;
    Some(listed.iter().any(|model| model.id == name))
}

async fn post(channel: &Channel, (path, body): (&'static str, &Value), limit: Duration) -> Result<(), AdapterError> {
    let (status, answer) = channel.post(path, Bytes::from(body.to_string()), limit, SMALL_BYTES_MAX).await?;
    let said: Option<Value> = serde_json::from_slice(&answer).ok();
    let says = |key| said.as_ref().and_then(|said| said.get(key));
    match status {
        // SGLang may say so in a success.
        status if status.is_success() && says("success") != Some(&Value::Bool(false)) => Ok(()),
        // A path that is not there, as the web framework says it, or as a server behind which there is none.
        StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED if says("error").is_none() => Err(AdapterError::Unable),
        status if status.is_client_error() || status.is_success() => {
            let message = says("error_message").and_then(Value::as_str).map(str::to_owned);
            Err(AdapterError::Refused(message.unwrap_or_else(|| from_engine(status.as_u16(), &answer).message)))
        }
        status => Err(Error::Status { status }.into()),
    }
}
