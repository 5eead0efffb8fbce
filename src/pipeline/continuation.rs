//! Going on with a streamed answer that broke off, at another worker of its model.
//!
//! Off unless the model says `continue_streams`; then the text of each answer that could be gone on with is kept as it
//! passes. [`forebay_proto::continuation`] says what is kept and asked for; `dispatch` places the rest as one more
//! attempt at the same request. One stream may break off more than once.
//!
//! Not here: what else becomes of a stream that broke off (`relay`).

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use forebay_backends::engines::Api;
use forebay_proto::continuation::{Asking, Said};
use forebay_proto::error::ApiError;
use forebay_proto::peek;
use forebay_proto::sse::Event;
use forebay_proto::trace_context::TraceParent;
use forebay_scheduler::{Class, End, Failure};
use futures::future::BoxFuture;
use http::HeaderMap;
use serde_json::json;
use tokio::sync::mpsc;

use super::{Given, note};
use crate::dispatch::{Dispatch, Job, Opened, Place, Reply, Step, Streamed, Worker};
use crate::ids::RequestName;
use crate::ledger::Entry;
use crate::prepare::{Asked, Prepare, Prompt, SaidIds};
use crate::routing::{Counting, Model};

/// What is told of one break at most: each attempt at the rest, and that it failed.
const STEPS_MAX: usize = 64;

/// What an answer needs to be gone on with.
pub struct Continuation {
    said: Said,
    origin: Origin,
    /// Who speaks now.
    worker: Arc<Worker>,
    /// How often it was gone on with.
    times: u32,
    seeking: Option<Seeking>,
}

/// The request as it was.
#[derive(Clone)]
struct Origin {
    dispatch: Arc<Dispatch>,
    prepare: Arc<Prepare>,
    model: Arc<Model>,
    asked: Arc<Asked>,
    body: Bytes,
    api: Api,
    class: Class,
    headers: HeaderMap,
    name: RequestName,
    trace: Option<TraceParent>,
}

/// The rest is being asked for.
struct Seeking {
    found: BoxFuture<'static, Option<Found>>,
    steps: mpsc::Receiver<Step>,
    /// What the client is told if nobody has it.
    broken: (ApiError, Failure),
}

/// Where the rest of an answer is.
enum Found {
    /// At another worker, after so many tokens of the prompt and of the answer, or from the beginning.
    There { opened: Box<Opened>, tokens: Option<[u32; 2]> },
    /// Nowhere: all tokens that were asked for are said.
    Nowhere { prompt_tokens: u32, said: u32 },
}

/// What comes next of an answer that broke off.
pub(super) enum Rest {
    Streamed(Place, Box<Streamed>),
    /// These events alone.
    Ended(VecDeque<Event>),
    /// Nobody has it.
    None(ApiError, Failure),
}

impl Continuation {
    /// For an answer that `worker` began; none where it could not be gone on with.
    pub(super) fn new(
        (dispatch, prepare): (&Arc<Dispatch>, &Arc<Prepare>),
        given: &Given<'_>,
        (model, worker): (&Arc<Model>, &Arc<Worker>),
        entry: &Entry,
    ) -> Option<Box<Self>> {
        let Given { asked, body, api, class, headers, .. } = given;
        if !model.continue_streams || !matches!(model.counting, Counting::Tokenizer(_)) || !may_break(asked) {
            return None;
        }
        let origin = Origin {
            dispatch: Arc::clone(dispatch),
            prepare: Arc::clone(prepare),
            model: Arc::clone(model),
            asked: Arc::clone(asked),
            body: body.clone(),
            api: *api,
            class: *class,
            headers: headers.clone(),
            name: entry.name().clone(),
            trace: entry.trace_parent(),
        };
        let (said, worker) = (Said::new(*api == Api::ChatCompletions), Arc::clone(worker));
        Some(Box::new(Self { said, origin, worker, times: 0, seeking: None }))
    }

    /// Takes note of an event on its way to the client; one of the rest is told as one of the whole.
    pub(super) fn hear(&mut self, event: &Event) -> Option<Event> {
        let data = event.data.as_deref().filter(|data| data.trim_ascii() != b"[DONE]")?;
        Some(written(&self.said.hear(data)?))
    }

    /// Tokens of the answer that came from workers before this one.
    pub(super) fn tokens_before(&self) -> u32 {
        self.said.before()
    }

    /// Looks for the rest of an answer that broke off, after so many attempts. The place comes back where there is none to
    /// look for.
    pub(super) fn seek(&mut self, place: Place, broken: (ApiError, Failure), attempted: u32) -> Result<(), Place> {
        let Some(text) = self.said.text() else { return Err(place) };
        let (told, steps) = mpsc::channel(STEPS_MAX);
        let (text, pieces) = (text.to_owned(), self.said.pieces());
        let broke = Broke { place, failure: broken.1, worker: Arc::clone(&self.worker), text, pieces, attempted };
        tracing::info!(worker = &*self.worker.name, failure = %broken.1, "an answer broke off, its rest is looked for");
        self.seeking = Some(Seeking { found: Box::pin(find(self.origin.clone(), broke, told)), steps, broken });
        Ok(())
    }

    /// What the search has come to; `entry` is told of attempts.
    pub(super) fn poll(&mut self, context: &mut Context<'_>, entry: &mut Entry) -> Poll<Option<Rest>> {
        let Some(seeking) = &mut self.seeking else { return Poll::Ready(None) };
        let found = Pin::new(&mut seeking.found).poll(context);
        while let Ok(step) = seeking.steps.try_recv() {
            note(entry, step);
        }
        let found = std::task::ready!(found);
        let Some(Seeking { broken: (error, failure), .. }) = self.seeking.take() else { return Poll::Ready(None) };
        Poll::Ready(Some(match found {
            Some(Found::There { opened, tokens }) => {
                let Opened { mut place, worker, reply, .. } = *opened;
                match reply {
                    Reply::Stream(streamed) => {
                        self.times += 1;
                        let mark = json!({"continued": self.times, "worker": &*worker.name});
                        self.said.goes_on(tokens, mark);
                        self.worker = worker;
                        Rest::Streamed(place, Box::new(streamed))
                    }
                    Reply::Whole(_) => {
                        place.ended(End::Failed(Failure::Malformed));
                        Rest::None(error, failure)
                    }
                }
            }
            Some(Found::Nowhere { prompt_tokens, said }) => {
                Rest::Ended(self.said.ending(prompt_tokens, said).iter().map(|data| written(data)).collect())
            }
            None => Rest::None(error, failure),
        }))
    }
}

/// Whether an answer to this is one stream of text.
fn may_break(asked: &Asked) -> bool {
    let plain = match asked {
        Asked::Chat(chat) => chat.tools.is_none() && chat.template.chat_template.is_none(),
        Asked::Completion(completion) => !completion.echo,
        Asked::Embedding(_) | Asked::Ranking(_) => false,
    };
    plain && asked.choices() == 1 && asked.streaming().is_some_and(|streaming| streaming.stream)
}

/// An attempt that broke off, and what had been said by then.
struct Broke {
    place: Place,
    failure: Failure,
    worker: Arc<Worker>,
    text: String,
    pieces: u32,
    attempted: u32,
}

async fn find(origin: Origin, broke: Broke, told: mpsc::Sender<Step>) -> Option<Found> {
    let Broke { mut place, failure, worker, text, pieces, attempted } = broke;
    let next = if text.is_empty() { Some(Next::Again) } else { rest(&origin, text, pieces).await };
    let ask = match next {
        Some(Next::Ask(ask)) => Some(ask),
        Some(Next::Again) => None,
        Some(Next::Nothing { prompt_tokens, said }) => {
            place.ended(End::Failed(failure));
            return Some(Found::Nowhere { prompt_tokens, said });
        }
        None => {
            place.ended(End::Failed(failure));
            return None;
        }
    };
    let tokens = ask.as_ref().map(|ask| ask.tokens);
    let goes_on = ask.is_some();
    let (asked, body, api) = match ask {
        Some(ask) => (Arc::new(ask.asked), ask.body, Api::Completions),
        None => (Arc::clone(&origin.asked), origin.body, origin.api),
    };
    let prompt_tokens = tokens.map_or(0, |tokens| tokens.iter().sum());
    let job = Job {
        name: origin.name,
        others: &[],
        trace: origin.trace,
        attempted,
        model: &origin.model,
        prepare: &origin.prepare,
        class: origin.class,
        // That was for the first token.
        deadline: None,
        // The core knows the request already, by its first prompt.
        prompt: Prompt { tokens: prompt_tokens, longest: prompt_tokens, exact: goes_on, blocks: Arc::default() },
        asked: &asked,
        body,
        api,
        goes_on,
        headers: origin.headers,
    };
    // There is room for every attempt.
    let tell = |step: Step| _ = told.try_send(step);
    let opened = origin.dispatch.go_on(job, place, (failure, &worker), tell).await;
    let opened = opened.inspect_err(|error| tracing::info!(%error, "nobody goes on with an answer")).ok()?;
    Some(Found::There { opened: Box::new(opened), tokens })
}

/// What is to be done for the rest of an answer.
enum Next {
    Ask(Box<Ask>),
    /// Nothing of it was said: the whole of it.
    Again,
    /// It is whole but for its end.
    Nothing {
        prompt_tokens: u32,
        said: u32,
    },
}

/// The request for a rest.
struct Ask {
    asked: Asked,
    body: Bytes,
    /// Of the prompt and of what was said.
    tokens: [u32; 2],
}

/// What follows `text`.
async fn rest(origin: &Origin, text: String, pieces: u32) -> Option<Next> {
    let Origin { prepare, model, asked, body, api, .. } = origin;
    let (whole, chat) = (body.clone(), *api == Api::ChatCompletions);
    let asking = prepare.apart(move || Asking::read(&whole, chat)).await.ok()??;
    let SaidIds { ids, prompt_tokens } = prepare.said(model, asked, body, text).await.ok()??;
    let [all, prompt_tokens] = [ids.len(), prompt_tokens].map(|tokens| u32::try_from(tokens).unwrap_or(u32::MAX));
    // Engines count at least one for each piece of text.
    let said = all.saturating_sub(prompt_tokens).max(pieces);
    let room = model.max_model_len.map(|all| all.saturating_sub(prompt_tokens));
    if asking.is_all(said, room) {
        return Some(Next::Nothing { prompt_tokens, said });
    }
    let written = move || {
        let body = Bytes::from(asking.rest(&ids, said, room)?);
        let asked = peek::Completion::peek(&body).ok().map(Asked::Completion)?;
        Some(Box::new(Ask { asked, body, tokens: [prompt_tokens, said] }))
    };
    prepare.apart(written).await.ok()?.map(Next::Ask)
}

/// An event with this data.
fn written(data: &[u8]) -> Event {
    let raw = Bytes::from([b"data: ", data, b"\n\n"].concat());
    Event { data: Some(raw.slice(6..raw.len() - 2)), raw, name: None, well_formed: true }
}
