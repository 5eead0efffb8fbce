//! LoRA adapters: those a server began with, and `/v1/load_lora_adapter` and `/v1/unload_lora_adapter` as one has them that
//! was started with `VLLM_ALLOW_RUNTIME_LORA_UPDATING`. An adapter's files are there when its path is.
//!
//! Not here: that an adapter's blocks are its own (`request`).

use std::{
    collections::{BTreeMap, VecDeque},
    path::Path,
};

use http::{HeaderValue, StatusCode, header};
use parking_lot::Mutex;
use serde_json::{Map, Value, json};

use super::{Bytes, error::Failure, fields::Fields};
use crate::{
    options::Options,
    server::{Answer, Service},
};

/// Changes that are remembered.
const CHANGES_MAX: usize = 1024;

/// The adapters of one server.
#[derive(Debug, Default)]
pub(crate) struct Adapters {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Paths by name.
    loaded: BTreeMap<String, String>,
    /// What was loaded (true) or unloaded.
    changes: VecDeque<(String, bool)>,
    /// The most that were there at once.
    most: usize,
}

impl Adapters {
    pub(crate) fn new(options: &Options) -> Self {
        let loaded: BTreeMap<_, _> = options.adapters.iter().cloned().collect();
        Self { state: Mutex::new(State { most: loaded.len(), loaded, changes: VecDeque::new() }) }
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.state.lock().loaded.contains_key(name)
    }

    /// Names and paths.
    pub(crate) fn list(&self) -> Vec<(String, String)> {
        self.state.lock().loaded.iter().map(|(name, path)| (name.clone(), path.clone())).collect()
    }

    fn set(&self, name: &str, path: Option<&str>) {
        let mut state = self.state.lock();
        if state.changes.len() >= CHANGES_MAX {
            state.changes.pop_front();
        }
        state.changes.push_back((name.to_owned(), path.is_some()));
        match path {
            Some(path) => drop(state.loaded.insert(name.to_owned(), path.to_owned())),
            None => drop(state.loaded.remove(name)),
        }
        state.most = state.most.max(state.loaded.len());
    }

    /// For the log of what happened.
    pub(crate) fn describe(&self) -> Value {
        let state = self.state.lock();
        json!({"loaded": state.loaded, "changes": state.changes, "most": state.most})
    }
}

/// Loads an adapter, which takes its time.
pub(crate) async fn load(service: &Service, body: &Map<String, Value>) -> Result<Answer, Failure> {
    let fields = Fields::body(body);
    let (name, path) = (fields.text("lora_name")?.unwrap_or_default(), fields.text("lora_path")?.unwrap_or_default());
    if name.is_empty() || path.is_empty() {
        return Err(Failure::user_input("Both 'lora_name' and 'lora_path' must be provided."));
    }
    if service.adapters.has(name) {
        let message = format!(
            "The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set \
             'load_inplace' to True."
        );
        return Err(Failure::user_input(&message));
    }
    tokio::time::sleep(service.options.adapter_load_time).await;
    if !Path::new(path).exists() {
        return Err(Failure::unknown(&format!("Loading lora {name} failed: No adapter found for {path}")));
    }
    service.adapters.set(name, Some(path));
    Ok(text(format!("Success: LoRA adapter '{name}' added successfully.")))
}

pub(crate) fn unload(service: &Service, body: &Map<String, Value>) -> Result<Answer, Failure> {
    let name = Fields::body(body).text("lora_name")?.unwrap_or_default();
    if name.is_empty() {
        return Err(Failure::user_input("'lora_name' needs to be provided to unload a LoRA adapter."));
    }
    if !service.adapters.has(name) {
        return Err(Failure::unknown(&format!("The lora adapter '{name}' cannot be found.")));
    }
    service.adapters.set(name, None);
    Ok(text(format!("Success: LoRA adapter '{name}' removed successfully.")))
}

fn text(said: String) -> Answer {
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    Answer::Whole { status: StatusCode::OK, headers: vec![(header::CONTENT_TYPE, kind)], body: Bytes::from(said) }
}
