//! What a Triton server says of itself.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use http::StatusCode;

use super::{
    NAME, Tensors,
    tensors::is_true,
    wire::{
        ModelConfig, ModelConfigRequest, ModelConfigResponse, RepositoryIndexRequest, RepositoryIndexResponse,
        ServerMetadataRequest, ServerMetadataResponse, ServerReadyRequest, ServerReadyResponse,
    },
};
use crate::{
    Error,
    engines::{Detected, Engine, ServedModel},
    transport::Channel,
};

pub(super) const READY: &str = "/inference.GRPCInferenceService/ServerReady";
const METADATA: &str = "/inference.GRPCInferenceService/ServerMetadata";
const INDEX: &str = "/inference.GRPCInferenceService/RepositoryIndex";
const CONFIG: &str = "/inference.GRPCInferenceService/ModelConfig";

const LIMIT: Duration = Duration::from_secs(3);
/// A model's configuration: some 10 KB.
const BYTES_MAX: usize = 1 << 20;
/// Models of one server that are asked for their configuration.
const MODELS_MAX: usize = 64;
/// What TensorRT-LLM's repository of models calls the ways to its one engine, the simplest for whoever asks first.
const WAYS: [&str; 3] = ["ensemble", "tensorrt_llm_bls", "tensorrt_llm"];

/// What is there, if it is Triton.
pub(in crate::engines) async fn detect(channel: &Channel, engine: &'static dyn Engine) -> Result<Detected, Error> {
    let metadata: ServerMetadataResponse = channel.call(METADATA, &ServerMetadataRequest {}, LIMIT, BYTES_MAX).await?;
    if metadata.name != NAME {
        return Err(Error::Unreadable);
    }
    let ready = RepositoryIndexRequest { ready: true, ..Default::default() };
    let index: RepositoryIndexResponse = channel.call(INDEX, &ready, LIMIT, BYTES_MAX).await?;
    let mut configs = Vec::new();
    for name in names(index).into_iter().take(MODELS_MAX) {
        let question = ModelConfigRequest { name, ..Default::default() };
        let answer: ModelConfigResponse = channel.call(CONFIG, &question, LIMIT, BYTES_MAX).await?;
        configs.extend(answer.config);
    }
    let models = models(&configs);
    if models.is_empty() {
        return Err(Error::Unreadable);
    }
    let version = Some(metadata.version).filter(|version| !version.is_empty());
    Ok(Detected { engine, models, version, openai_routes: false })
}

/// Whether it takes requests.
pub(in crate::engines) async fn ready(channel: &Channel) -> Result<(), Error> {
    let answer: ServerReadyResponse = channel.call(READY, &ServerReadyRequest {}, LIMIT, BYTES_MAX).await?;
    if answer.ready { Ok(()) } else { Err(Error::Status { status: StatusCode::SERVICE_UNAVAILABLE }) }
}

/// An index has an entry for each version, in any order.
fn names(index: RepositoryIndexResponse) -> BTreeSet<String> {
    index.models.into_iter().map(|model| model.name).collect()
}

/// Those that generate text.
fn models(configs: &[ModelConfig]) -> Vec<ServedModel> {
    // The step before the engine tells how a text becomes ids.
    let parameter = |name| configs.iter().find_map(|config| config.parameters.get(name));
    let root = parameter("tokenizer_dir").map(|directory| directory.string_value.clone());
    let adds_special = parameter("add_special_tokens")
        // Left as the template has it, it is the default.
        .is_none_or(|value| is_true(&value.string_value) || value.string_value.starts_with('$'));
    let served = |config: &ModelConfig| {
        Some(ServedModel {
            id: config.name.clone(),
            owned_by: Some(NAME.to_owned()),
            root: root.clone(),
            tensors: Some(Arc::new(Tensors::of(config, adds_special)?)),
            ..ServedModel::default()
        })
    };
    let mut models: Vec<ServedModel> = configs.iter().filter_map(served).collect();
    let way = |model: &ServedModel| WAYS.iter().position(|way| *way == model.id).unwrap_or(0);
    models.sort_by_key(way);
    let mut found = false;
    for model in &mut models {
        if WAYS.contains(&model.id.as_str()) {
            model.alternative = std::mem::replace(&mut found, true);
        }
    }
    models
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engines::triton::wire::{
        DataType, ModelInput, ModelOutput, ModelParameter, repository_index_response::ModelIndex,
    };

    fn config(name: &str, input: &str, output: &str, parameter: Option<(&str, &str)>) -> ModelConfig {
        let parameter =
            parameter.map(|(name, value)| (name.to_owned(), ModelParameter { string_value: value.to_owned() }));
        ModelConfig {
            name: name.to_owned(),
            input: vec![ModelInput {
                name: input.to_owned(),
                data_type: DataType::TypeString.into(),
                ..Default::default()
            }],
            output: vec![ModelOutput { name: output.to_owned(), ..Default::default() }],
            parameters: parameter.into_iter().collect(),
            ..Default::default()
        }
    }

    #[test]
    fn a_model_of_several_versions_is_asked_once() {
        let models = ["b", "a", "b"].map(|name| ModelIndex { name: name.to_owned(), ..Default::default() });
        assert!(names(RepositoryIndexResponse { models: models.into() }).iter().eq(["a", "b"]));
    }

    #[test]
    fn one_engine_under_three_names_is_one_model() {
        let ids = ModelConfig {
            input: vec![ModelInput {
                name: "input_ids".to_owned(),
                data_type: DataType::TypeInt32.into(),
                ..Default::default()
            }],
            ..config("tensorrt_llm", "", "output_ids", None)
        };
        let models = models(&[
            config("postprocessing", "tokens", "text", None),
            config("preprocessing", "query", "ids", Some(("tokenizer_dir", "/models/m"))),
            ids,
            config("tensorrt_llm_bls", "text_input", "text_output", Some(("accumulate_tokens", "True"))),
            config("ensemble", "text_input", "text_output", None),
        ]);
        let names: Vec<_> = models.iter().map(|model| (model.id.as_str(), model.alternative)).collect();
        assert_eq!(names, [("ensemble", false), ("tensorrt_llm_bls", true), ("tensorrt_llm", true)]);
        let tensors = |at: usize| models[at].tensors.clone().expect("tensors");
        assert!(tensors(2).takes_ids() && tensors(1).accumulates() && !tensors(0).accumulates());
        assert!(models.iter().all(|model| model.root.as_deref() == Some("/models/m")));
    }
}
