//! `GET /v1/models` and `GET /v1/models/{id}`: configured models, their aliases, those with a `*` left out, and their
//! adapters.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use http::HeaderMap;
use serde::Serialize;

use super::errors::Error;
use super::{Api, headers};
use crate::ids::RequestName;
use crate::pipeline;
use crate::routing::Model;

/// One entry, in OpenAI's shape with the three fields that vLLM adds and clients read.
#[derive(Serialize)]
struct Entry {
    id: Arc<str>,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// The model's own name where `id` is an alias.
    root: Arc<str>,
    /// The model that an adapter adapts.
    parent: Option<Arc<str>>,
    max_model_len: Option<u32>,
}

#[derive(Serialize)]
struct List {
    object: &'static str,
    data: Vec<Entry>,
}

fn entry(id: &Arc<str>, model: &Model) -> Entry {
    Entry {
        id: Arc::clone(id),
        object: "model",
        created: model.created,
        owned_by: "forebay",
        root: Arc::clone(&model.name),
        parent: model.adapter.as_ref().map(|adapter| Arc::clone(&adapter.base)),
        max_model_len: model.max_model_len,
    }
}

pub(super) async fn list(State(api): State<Arc<Api>>, request: HeaderMap) -> Response {
    let models = api.pipeline.routing.models();
    let data = models.iter().flat_map(|model| model.listed().map(|id| entry(id, model))).collect();
    named(Json(List { object: "list", data }).into_response(), &request)
}

pub(super) async fn one(
    State(api): State<Arc<Api>>,
    id: Result<Path<String>, PathRejection>,
    request: HeaderMap,
) -> Response {
    // What is not UTF-8 is no model's name.
    let Path(id) = id.unwrap_or(Path(String::from(char::REPLACEMENT_CHARACTER)));
    match api.pipeline.routing.route(&id) {
        Ok(route) => {
            let model = &route.model;
            let id = model.listed().find(|name| ***name == *id).unwrap_or(&model.name);
            named(Json(entry(id, model)).into_response(), &request)
        }
        Err(unknown) => Error::Pipeline(pipeline::Error::Route(unknown))
            .respond(&RequestName::from_client(headers::request_id(&request))),
    }
}

fn named(mut response: Response, request: &HeaderMap) -> Response {
    headers::identify(&mut response, &RequestName::from_client(headers::request_id(request)));
    response
}
