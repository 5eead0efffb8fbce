//! Streams: turns the progress of a request into events, one for each token that has something to say.
//!
//! Order: opening events of all choices with the first token of any, then tokens as they come, lower choices first, then
//! a usage event when asked for, then the end mark.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;
use futures::stream;
use serde_json::Value;

use super::{
    request::{Common, Started},
    usage::Usage,
};
use crate::{body::Events, driver::Progress, server::Service};

pub(crate) const DONE: Bytes = Bytes::from_static(b"data: [DONE]\n\n");

/// What an endpoint's events look like.
pub(crate) trait Shape: Send + 'static {
    /// Events before the first token of any choice.
    fn opening(&self, started: &Started) -> Vec<Value>;

    /// The event of one token of one choice; `None` when it has nothing to say.
    fn token(&mut self, started: &Started, choice: usize, at: usize) -> Option<Value>;

    fn usage(&self, usage: Value) -> Value;

    /// The end mark, where the wire has one.
    fn end(&self) -> Option<Bytes> {
        Some(DONE)
    }

    /// How one object is put on the wire.
    fn frame(&self, value: &Value) -> Bytes {
        event(value)
    }

    /// Whether usage has the details of a chat.
    fn is_chat(&self) -> bool;
}

/// Gives the events of a request.
pub(crate) fn events<S: Shape>(service: &Arc<Service>, common: &Common, started: Started, shape: S) -> Events {
    let shown = vec![0; started.outputs.len()];
    let service = Arc::clone(service);
    let writer = Writer {
        service,
        started,
        shape,
        shown,
        include_usage: common.include_usage,
        opened: false,
        ended: false,
        queue: VecDeque::new(),
    };
    Box::pin(stream::unfold(writer, |mut writer| async move { Some((writer.next().await?, writer)) }))
}

struct Writer<S> {
    service: Arc<Service>,
    started: Started,
    shape: S,
    /// Tokens of each choice that were turned into events.
    shown: Vec<usize>,
    include_usage: bool,
    opened: bool,
    ended: bool,
    queue: VecDeque<Bytes>,
}

impl<S: Shape> Writer<S> {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(event) = self.queue.pop_front() {
                return Some(event);
            }
            if self.ended {
                return None;
            }
            let progress = self.started.run.next().await?;
            self.advance(&progress);
        }
    }

    fn advance(&mut self, progress: &[Progress]) {
        if !self.opened {
            self.opened = true;
            let opening = self.shape.opening(&self.started);
            self.queue.extend(opening.iter().map(|value| self.shape.frame(value)));
        }
        for (choice, (shown, progress)) in self.shown.iter_mut().zip(progress).enumerate() {
            while *shown < progress.tokens as usize {
                let token = self.shape.token(&self.started, choice, *shown);
                self.queue.extend(token.as_ref().map(|token| self.shape.frame(token)));
                *shown += 1;
            }
        }
        if progress.iter().all(|progress| progress.finished) {
            self.ended = true;
            if self.include_usage {
                let usage = Usage::of(&self.service, &self.started, progress);
                let usage = usage.last(&self.service, self.shape.is_chat());
                self.queue.push_back(self.shape.frame(&self.shape.usage(usage)));
            }
            self.queue.extend(self.shape.end());
        }
    }
}

pub(super) fn event(value: &Value) -> Bytes {
    Bytes::from(format!("data: {value}\n\n"))
}
