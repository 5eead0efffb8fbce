//! Engines whose model can leave the memory of its GPUs and come back while the server stays.

use std::time::Duration;

use bytes::Bytes;

use super::{ANSWER_LIMIT, Engine, SMALL_BYTES_MAX, require_success};
use crate::{Error, transport::Channel};

/// Longest wait for a model to come or go: an engine that is asked to sleep finishes first what came past us.
const TURN_LIMIT: Duration = Duration::from_secs(300);

/// The questions that an engine understands. Each is given the model's name there.
#[derive(Clone, Copy)]
pub struct Dormant {
    /// Path and JSON that take the model out of memory; the answer comes when that is done.
    pub sleep: fn(&str) -> (&'static str, Bytes),
    /// The same to bring it back.
    pub wake: fn(&str) -> (&'static str, Bytes),
    /// Path whose answer tells whether it sleeps, and how to read it.
    pub asks: &'static str,
    pub reads: fn(&[u8], &str) -> Option<bool>,
}

/// Whether a worker's model sleeps; `None` where that cannot be told.
///
/// # Errors
/// When it does not answer.
pub async fn is_asleep(channel: &Channel, engine: &dyn Engine, model: &str) -> Result<Option<bool>, Error> {
    let Some(Dormant { asks, reads, .. }) = engine.dormant() else { return Ok(None) };
    let (status, body) = channel.get(asks, ANSWER_LIMIT, SMALL_BYTES_MAX).await?;
    Ok(reads(&body, model).filter(|_| status.is_success()))
}

/// Puts a worker's model to sleep, or wakes it; returns when that is done.
///
/// # Errors
/// When it cannot, or does not answer. A vLLM server that was not started in development mode answers 404.
pub async fn set_asleep(channel: &Channel, engine: &dyn Engine, model: &str, asleep: bool) -> Result<(), Error> {
    let Some(dormant) = engine.dormant() else { return Err(Error::Unreadable) };
    let (path, body) = if asleep { (dormant.sleep)(model) } else { (dormant.wake)(model) };
    let (status, _) = channel.post(path, body, TURN_LIMIT, SMALL_BYTES_MAX).await?;
    require_success(status)
}
