//! One request's way through the rooms, in order: route, count, place; then its answer's way back ([`relay`]), which equal requests may
//! have in common ([`shared`]).
//!
//! Nothing is released by hand: the entry of the ledger and the place at the worker move into the answer's body and
//! end when it is dropped, whether at its last byte or because the client left.

pub mod relay;
pub mod shared;

use std::sync::Arc;

use bytes::Bytes;
use forebay_backends::engines::Api;
use forebay_scheduler::Class;
use http::HeaderMap;
use tokio::time::Instant;
use tracing::Instrument;

use crate::dispatch::{self, Dispatch, Job, Opened};
use crate::ledger::Entry;
use crate::prepare::{self, Asked, Prepare};
use crate::routing::{Route, Routing, UnknownModel};
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
    pub shared: Arc<Shared>,
}

impl Pipeline {
    /// Brings a request to a worker and waits for the first event or byte of its answer.
    ///
    /// # Errors
    /// Nothing has been said to the client yet, and nothing is held any more.
    pub async fn open(&self, entry: &mut Entry, call: Call) -> Result<(Route, Opened), Error> {
        let Call { asked, body, api, class, deadline, headers } = call;
        let route = self.routing.route(&asked.model().name)?;
        let model = &route.model;
        entry.routed(&model.name, &model.metrics);
        let asked = Arc::new(asked);
        let prompt = {
            let counting = self.prepare.prompt(model, &asked, &body).instrument(tracing::debug_span!("prepare"));
            let counting = std::pin::pin!(counting);
            match deadline {
                Some(deadline) => match tokio::time::timeout_at(deadline, counting).await {
                    Ok(prompt) => prompt?,
                    Err(_) => {
                        self.dispatch.too_late(entry.name().clone(), model.pool, class);
                        return Err(Error::Deadline);
                    }
                },
                None => counting.await?,
            }
        };
        entry.prompt(prompt.tokens, prompt.exact);
        let name = entry.name().clone();
        let trace = entry.trace_parent();
        let prepare = &self.prepare;
        let job = Job {
            name,
            others: &[],
            trace,
            model,
            prepare,
            class,
            deadline,
            prompt,
            asked: &asked,
            body,
            api,
            headers,
        };
        let opened =
            self.dispatch.open_or_join(job, |worker, queued| entry.sent(&worker.name, worker.engine(), queued)).await?;
        entry.first_byte(opened.matched_tokens);
        Ok((route, opened))
    }
}
