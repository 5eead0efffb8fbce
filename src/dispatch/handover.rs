//! A prompt that one worker computes and another goes on from: the first one's part.
//!
//! It is asked for the prompt alone and its answer is read whole; what that says of the cache goes to the second with the
//! client's own request. Both know the request by one name. A client that leaves meanwhile closes the connection, and what
//! is computed by then the engine lets go when its own lease ends.

use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use forebay_backends::engines::{Prepared, handover};
use forebay_scheduler::Failure;
use http::HeaderValue;
use tracing::Instrument;

use super::attempt::{self, Failed, INLINE_BODY_BYTES_MAX};
use super::{Job, Worker};
use crate::ids::RequestName;

/// The longest answer to a prompt alone: one token, and the numbers of the blocks that hold the cache of millions.
const ANSWER_BYTES_MAX: usize = 4 << 20;

/// What goes from one worker to another.
pub(super) struct Handed {
    /// What both call the request.
    pub(super) name: HeaderValue,
    kept: handover::Kept,
}

impl Handed {
    /// How long it is kept, from the answer on.
    pub(super) fn time(&self) -> Duration {
        self.kept.time
    }

    /// The request with it.
    pub(super) async fn go_on(&self, body: Bytes) -> Result<Bytes, Failed> {
        let kept = self.kept.clone();
        let written = aside(body.len(), move || handover::go_on(&body, &kept)).await?;
        written.ok_or(Failed::elsewhere(Failure::Malformed))
    }
}

/// Has `worker` compute the job's prompt. None where the other has to do all by itself: the answer tells of nothing to
/// fetch, or the request cannot be divided.
pub(super) async fn prompt_alone(worker: &Worker, job: &Job<'_>, number: u32) -> Result<Option<Handed>, Failed> {
    worker.traffic.note();
    let span = tracing::debug_span!("attempt", worker = &*worker.name, number);
    let answered = std::pin::pin!(ask(worker, job, number));
    let answered = tokio::time::timeout(worker.first_token, answered.instrument(span));
    answered.await.unwrap_or(Err(Failed::elsewhere(Failure::Timeout)))
}

async fn ask(worker: &Worker, job: &Job<'_>, number: u32) -> Result<Option<Handed>, Failed> {
    let Prepared { path, headers, body, .. } = attempt::prepared(worker, job).await?;
    if !worker.identity.load().as_ref().is_some_and(|identity| identity.engine.hands_over()) {
        let message = "The engine of this worker computes no prompts for others.".to_owned();
        return Err(attempt::unsupported(message, None));
    }
    let api = job.api;
    let alone = aside(body.len(), move || handover::prompt_alone(api, &body)).await?;
    let (Some(body), Some(name)) = (alone, RequestName::fresh_header()) else { return Ok(None) };
    let mut response = attempt::answered((worker, job, number), (path, headers, Some(&name)), body).await?;
    let mut answer = BytesMut::new();
    while let Some(bytes) = response.body.next().await {
        answer.extend_from_slice(&bytes?);
        if answer.len() > ANSWER_BYTES_MAX {
            return Ok(None);
        }
    }
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let kept = aside(answer.len(), move || handover::kept(&answer, since_epoch)).await?;
    Ok(kept.map(|kept| Handed { name, kept }))
}

/// Reads or writes so much JSON: where it is, or elsewhere if it takes long.
async fn aside<T: Send + 'static>(bytes: usize, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Failed> {
    if bytes <= INLINE_BODY_BYTES_MAX {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work).await.map_err(|_| Failed::elsewhere(Failure::Malformed))
}
