//! OpenAI's inference calls: chat, completions, embeddings; and vLLM's rerank, score, pooling and classify, which go the
//! same way.

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use forebay_backends::engines;
use forebay_proto::peek::{self, Refusal};
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderValue, Method, Request};
use hyper::body::Incoming;
use tracing::Instrument;

use super::errors::Error;
use super::{Api, body, headers};
use crate::dispatch::{Opened, Reply};
use crate::ids::RequestName;
use crate::ledger::Entry;
use crate::pipeline::relay::{StreamRelay, WholeRelay};
use crate::pipeline::shared::{Head, Joined};
use crate::pipeline::{self, Begun, Call};
use crate::prepare::Asked;
use crate::telemetry::metrics::Api as ApiName;

/// One of the calls: its name in metrics, what engines are asked for, its fields.
pub(super) struct Kind {
    name: ApiName,
    api: engines::Api,
    peek: fn(&[u8]) -> Result<Asked, Refusal>,
}

/// The paths, and what is asked there.
pub(super) static CALLS: [(&str, Kind); 8] = [
    ("/v1/chat/completions", kind(ApiName::Chat, engines::Api::ChatCompletions, chat)),
    ("/v1/completions", kind(ApiName::Completions, engines::Api::Completions, completion)),
    ("/v1/embeddings", kind(ApiName::Embeddings, engines::Api::Embeddings, embedding)),
    ("/v1/rerank", kind(ApiName::Rerank, engines::Api::Rerank, ranking)),
    ("/v1/score", kind(ApiName::Score, engines::Api::Score, score)),
    ("/pooling", kind(ApiName::Pooling, engines::Api::Pooling, embedding)),
    ("/v1/classify", CLASSIFY),
    ("/classify", CLASSIFY),
];
const CLASSIFY: Kind = kind(ApiName::Classify, engines::Api::Classify, embedding);

const fn kind(name: ApiName, api: engines::Api, peek: fn(&[u8]) -> Result<Asked, Refusal>) -> Kind {
    Kind { name, api, peek }
}

fn chat(body: &[u8]) -> Result<Asked, Refusal> {
    peek::Chat::peek(body).map(Asked::Chat)
}

fn completion(body: &[u8]) -> Result<Asked, Refusal> {
    peek::Completion::peek(body).map(Asked::Completion)
}

fn embedding(body: &[u8]) -> Result<Asked, Refusal> {
    peek::Embedding::peek(body).map(Asked::Embedding)
}

fn ranking(body: &[u8]) -> Result<Asked, Refusal> {
    peek::Ranking::rerank(body).map(Asked::Ranking)
}

fn score(body: &[u8]) -> Result<Asked, Refusal> {
    peek::Ranking::score(body).map(Asked::Ranking)
}

/// What a request asks for, if it is one of the calls.
pub(super) fn kind_of(method: &Method, path: &str) -> Option<&'static Kind> {
    let found = CALLS.iter().find(|(own, _)| *own == path).map(|(_, kind)| kind);
    found.filter(|_| *method == Method::POST)
}

pub(super) async fn serve(api: &Api, request: Request<Incoming>, kind: &Kind) -> Response {
    let name = RequestName::from_client(headers::request_id(request.headers()));
    let mut entry = match api.ledger.open(name.clone(), kind.name) {
        Ok(entry) => entry,
        Err(full) => return Error::Ledger(full).respond(&name),
    };
    if let Some(traces) = &api.traces {
        entry.trace(traces.begin(headers::trace_parent(request.headers())));
    }
    let span = tracing::debug_span!("request", id = name.as_str(), api = kind.name.name());
    let answered = {
        let answering = std::pin::pin!(answer(api, &mut entry, request, kind));
        tokio::select! {
            answered = answering.instrument(span) => answered,
            () = api.closing.cancelled() => Err(Error::Stopping),
        }
    };
    match answered {
        Ok(open) => open.respond(api, entry, &name),
        Err(error) => {
            entry.end(error.outcome(), error.status());
            let mut response = error.respond(&name);
            headers::attempts(&mut response, entry.failures());
            response
        }
    }
}

/// An answer whose first event or byte is here.
enum Open {
    Own(Box<Own>),
    Shared(Box<Joined>),
}

/// One of its own.
struct Own {
    begun: Begun,
    choices: u32,
    hide_usage: bool,
}

async fn answer(api: &Api, entry: &mut Entry, request: Request<Incoming>, kind: &Kind) -> Result<Open, Error> {
    let headers::Said { class, deadline, forwarded } = headers::read(request.headers(), entry.arrived())?;
    let body: Bytes = body::read(api, request).await?;
    let asked = api.pipeline.prepare.read(&body, kind.peek).await.map_err(pipeline::Error::from)??;
    let choices = asked.choices();
    let hide_usage = asked.hides_usage();
    entry.streaming(asked.streaming().is_some_and(|streaming| streaming.stream));
    let call = Call { asked, body, api: kind.api, class, deadline, headers: forwarded };
    let call = match api.pipeline.share(entry, call) {
        Ok(sharing) => return Ok(Open::Shared(Box::new(sharing.begin(entry).await?))),
        Err(call) => *call,
    };
    let begun = api.pipeline.open(entry, call).await?;
    Ok(Open::Own(Box::new(Own { begun, choices, hide_usage })))
}

impl Open {
    fn respond(self, api: &Api, entry: Entry, name: &RequestName) -> Response {
        let mut response = Response::new(Body::empty());
        response.headers_mut().reserve(headers::ANSWER_FIELDS);
        headers::identify(&mut response, name);
        headers::attempts(&mut response, entry.failures());
        match self {
            Self::Own(own) => own.respond(response, api, entry),
            Self::Shared(joined) => {
                let Head { route, worker, queued, predicted_wait, content_type, .. } = &joined.head;
                headers::describe(&mut response, route, worker, (*queued, *predicted_wait));
                let found = HeaderValue::from_static(if joined.first { "miss" } else { "coalesced" });
                response.headers_mut().insert(headers::CACHE, found);
                content(&mut response, content_type.clone());
                *response.body_mut() = Body::new(joined.relay(entry));
                response
            }
        }
    }
}

impl Own {
    fn respond(self, mut response: Response, api: &Api, entry: Entry) -> Response {
        let Begun { route, opened, continuation } = self.begun;
        let Opened { place, worker, queued, predicted_wait, reply, .. } = opened;
        headers::describe(&mut response, &route, &worker, (queued, predicted_wait));
        let closing = api.closing.clone();
        match reply {
            Reply::Stream(streamed) => {
                content(&mut response, None);
                let relay = StreamRelay::new(entry, place, streamed, self.choices, self.hide_usage, closing);
                *response.body_mut() = Body::new(relay.going_on(continuation));
            }
            Reply::Whole(whole) => {
                content(&mut response, Some(whole.content_type.clone()));
                *response.body_mut() = Body::new(WholeRelay::new(entry, place, whole, closing));
            }
        }
        response
    }
}

/// What kind of answer it is: a document of this type, else a stream.
fn content(response: &mut Response, document: Option<HeaderValue>) {
    let fields = response.headers_mut();
    if document.is_none() {
        fields.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    }
    fields.insert(CONTENT_TYPE, document.unwrap_or(HeaderValue::from_static("text/event-stream; charset=utf-8")));
}
