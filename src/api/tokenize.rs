//! `POST /tokenize` and `POST /detokenize` in vLLM's shapes, answered here with the model's own
//! tokenizer, or by an engine that has it when this machine has not.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use forebay_proto::peek;
use http::header::CONTENT_TYPE;
use serde::Serialize;

use super::errors::Error;
use super::{Api, body, headers};
use crate::ids::RequestName;
use crate::ledger::{Entry, Outcome};
use crate::pipeline;
use crate::prepare::{Answered, Tokenized};
use crate::routing::Route;
use crate::telemetry::metrics::Api as ApiName;

#[derive(Serialize)]
struct Tokens {
    count: usize,
    max_model_len: Option<u32>,
    tokens: Vec<u32>,
    token_strs: Option<Vec<String>>,
}

#[derive(Serialize)]
struct Text {
    prompt: String,
}

pub(super) async fn tokenize(State(api): State<Arc<Api>>, request: Request) -> Response {
    serve(&api, request, ApiName::Tokenize, async |entry, request| {
        let body = body::read(&api, request).await?;
        let asked = peek::Tokenize::peek(&body)?;
        let route = find(&api, &asked.model, entry)?;
        let max_model_len = route.model.max_model_len;
        let answered = api.pipeline.prepare.tokenize(&route.model, asked, body).await.map_err(pipeline::Error::from)?;
        Ok(respond(answered, |Tokenized { ids: tokens, strings: token_strs }| Tokens {
            count: tokens.len(),
            max_model_len,
            tokens,
            token_strs,
        }))
    })
    .await
}

pub(super) async fn detokenize(State(api): State<Arc<Api>>, request: Request) -> Response {
    serve(&api, request, ApiName::Detokenize, async |entry, request| {
        let body = body::read(&api, request).await?;
        let asked = peek::Detokenize::peek(&body)?;
        let route = find(&api, &asked.model, entry)?;
        let answered =
            api.pipeline.prepare.detokenize(&route.model, asked, body).await.map_err(pipeline::Error::from)?;
        Ok(respond(answered, |prompt| Text { prompt }))
    })
    .await
}

fn respond<T, J: Serialize>(answered: Answered<T>, shape: impl FnOnce(T) -> J) -> Response {
    match answered {
        Answered::Here(answer) => Json(shape(answer)).into_response(),
        Answered::Engine(json) => ([(CONTENT_TYPE, "application/json")], json).into_response(),
    }
}

/// vLLM takes a missing model as its own; we do so where there is only one.
fn find(api: &Api, model: &peek::Model, entry: &mut Entry) -> Result<Route, Error> {
    let routing = &api.pipeline.routing;
    let route =
        routing.route(&model.name).or_else(|unknown| if model.name.is_empty() { routing.only() } else { Err(unknown) });
    let route = route.map_err(pipeline::Error::from)?;
    entry.routed(&route.model.name, &route.model.metrics);
    Ok(route)
}

async fn serve(
    api: &Api,
    request: Request,
    kind: ApiName,
    handle: impl AsyncFnOnce(&mut Entry, Request) -> Result<Response, Error>,
) -> Response {
    let name = RequestName::from_client(headers::request_id(request.headers()));
    let mut entry = match api.ledger.open(name.clone(), kind) {
        Ok(entry) => entry,
        Err(full) => return Error::Ledger(full).respond(&name),
    };
    match handle(&mut entry, request).await {
        Ok(mut response) => {
            entry.end(Outcome::Completed, 200);
            headers::identify(&mut response, &name);
            response
        }
        Err(error) => {
            entry.end(error.outcome(), error.status());
            error.respond(&name)
        }
    }
}
