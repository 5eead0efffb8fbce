//! One request's way through the rooms, in order: route, count, place; then its answer's way back ([`relay`]), which equal
//! requests may have in common ([`shared`]), and which may lead on from another worker ([`continuation`]).
//!
//! Until something is said to the client, another model may be asked for the one that is in trouble: it is counted and
//! placed anew.
//!
//! Nothing is released by hand: the entry of the ledger and the place at the worker move into the answer's body and
//! end when it is dropped, whether at its last byte or because the client left.

pub mod continuation;
pub mod relay;
pub mod shared;

use std::sync::Arc;

use bytes::Bytes;
use forebay_backends::engines::Api;
use forebay_scheduler::{Class, Failure, Refusal};
use http::HeaderMap;
use tokio::time::Instant;
use tracing::Instrument;

use crate::config::Trouble;
use crate::dispatch::{self, Dispatch, Job, Opened, Step};
use crate::ledger::Entry;
use crate::prepare::{self, Asked, Prepare};
use crate::routing::{Model, Route, Routing, UnknownModel};
use crate::telemetry::Registry;
use continuation::Continuation;
use shared::Shared;

/// A request as its room of arrival understood it.
#[derive(Debug)]
pub struct Call {
    pub asked: Asked,
    /// The client's body, to the byte; the spans in `asked` lie in it.
    pub body: Bytes,
    pub api: Api,
    pub class: Class,
    /// Latest first token.
    pub deadline: Option<Instant>,
    /// Headers that go to the engine as they came.
    pub headers: HeaderMap,
}

/// An answer that has begun, and who gives it.
pub struct Begun {
    pub route: Route,
    pub opened: Opened,
    /// For a stream that may be gone on with where it breaks off.
    pub continuation: Option<Box<Continuation>>,
}

/// Why a request got no answer from a worker.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Route(#[from] UnknownModel),
    #[error(transparent)]
    Prepare(#[from] prepare::Error),
    #[error(transparent)]
    Dispatch(#[from] dispatch::Error),
    #[error("the deadline passed before the prompt was counted")]
    Deadline,
}

/// The rooms a request passes.
#[derive(Clone)]
pub struct Pipeline {
    pub routing: Arc<Routing>,
    pub prepare: Arc<Prepare>,
    pub dispatch: Arc<Dispatch>,
    pub registry: Registry,
    pub shared: Arc<Shared>,
}

impl Pipeline {
    /// Brings a request to a worker and waits for the first event or byte of its answer. Where its model is in trouble,
    /// the models that are configured to answer for it are asked in turn.
    ///
    /// # Errors
    /// Nothing has been said to the client yet, and nothing is held any more. The last model's where several were asked.
    pub async fn open(&self, entry: &mut Entry, call: Call) -> Result<Begun, Error> {
        let mut route = self.routing.route(&call.asked.model().name)?;
        let Call { asked, body, api, class, deadline, headers } = call;
        let asked = Arc::new(asked);
        let call = Given { asked: &asked, body, api, class, deadline, headers };
        loop {
            let error = match self.at(entry, &call, &route.model).await {
                Ok(opened) => {
                    let rooms = (&self.dispatch, &self.prepare);
                    let continuation = Continuation::new(rooms, &call, (&route.model, &opened.worker), entry);
                    return Ok(Begun { route, opened, continuation });
                }
                Err(error) => error,
            };
            let Some((reason, next)) =
                error.trouble().and_then(|(reason, trouble)| Some((reason, self.routing.fall_back(&route, trouble)?)))
            else {
                return Err(error);
            };
            tracing::info!(from = &*route.model.name, to = &*next.model.name, reason, "another model is asked");
            self.registry.failed_over(reason);
            route = next;
        }
    }

    /// Brings it to a worker of this model.
    async fn at(&self, entry: &mut Entry, call: &Given<'_>, model: &Arc<Model>) -> Result<Opened, Error> {
        let Given { asked, body, api, class, deadline, headers } = call;
        entry.routed(&model.name, &model.metrics);
        let prompt = {
            let counting = std::pin::pin!(self.prepare.prompt(model, asked, body));
            let counting = counting.instrument(tracing::debug_span!("prepare"));
            match *deadline {
                Some(deadline) => match tokio::time::timeout_at(deadline, counting).await {
                    Ok(prompt) => prompt?,
                    Err(_) => {
                        self.dispatch.too_late(entry.name().clone(), model.pool, *class);
                        return Err(Error::Deadline);
                    }
                },
                None => counting.await?,
            }
        };
        entry.prompt(prompt.tokens, prompt.exact);
        let job = Job {
            name: entry.name().clone(),
            others: &[],
            trace: entry.trace_parent(),
            attempted: entry.row().attempts,
            model,
            prepare: &self.prepare,
            class: *class,
            deadline: *deadline,
            prompt,
            asked,
            body: body.clone(),
            api: *api,
            goes_on: false,
            headers: headers.clone(),
        };
        let opened = self.dispatch.open_or_join(job, |step| note(entry, step)).await?;
        entry.first_byte(&opened.worker.name, opened.matched_tokens);
        if opened.apportioned {
            entry.apportioned();
        }
        Ok(opened)
    }
}

fn note(entry: &mut Entry, step: Step) {
    match step {
        Step::Sent { worker, queued } => entry.sent(&worker.name, worker.engine(), queued),
        Step::Prefilled { worker, kept } => entry.prefilled(&worker.name, kept),
        Step::Failed { worker, reason } => entry.failed(&worker.name, reason),
    }
}

/// What every model that is asked is given.
struct Given<'a> {
    asked: &'a Arc<Asked>,
    body: Bytes,
    api: Api,
    class: Class,
    deadline: Option<Instant>,
    headers: HeaderMap,
}

impl Error {
    /// The trouble it is for the model, if another may do better, and its name.
    fn trouble(&self) -> Option<(&'static str, Trouble)> {
        let trouble = match self {
            Self::Prepare(prepare::Error::TooLong { .. }) => Trouble::ContextLength,
            Self::Dispatch(dispatch::Error::Engine { status, error, .. }) if status.is_client_error() => {
                match error.code.as_deref() {
                    Some("context_length_exceeded") => Trouble::ContextLength,
                    Some("content_filter" | "content_policy_violation") => Trouble::ContentFilter,
                    _ => return None,
                }
            }
            Self::Dispatch(dispatch::Error::Engine { .. }) => Trouble::Error,
            Self::Dispatch(dispatch::Error::Refused { reason, .. }) => match reason {
                Refusal::TooLarge => Trouble::ContextLength,
                Refusal::DeadlineInfeasible | Refusal::DeadlineTooShort => Trouble::Deadline,
                Refusal::DeadlinePassed => return None,
                Refusal::AttemptsExhausted { last } if last.left_alone().is_none() && *last != Failure::Connect => {
                    Trouble::Error
                }
                Refusal::AttemptsExhausted { .. }
                | Refusal::QueueFull
                | Refusal::TimedOut
                | Refusal::NoWorker
                | Refusal::AdapterUnavailable
                | Refusal::Busy { .. }
                | Refusal::PoolUnknown => Trouble::Unavailable,
            },
            Self::Route(_) | Self::Prepare(_) | Self::Deadline => return None,
        };
        Trouble::ALL.into_iter().find(|(_, known)| *known == trouble)
    }
}
