//! Triton's gRPC surface with a TensorRT-LLM model behind it: the server's and the models' state, unary and streamed
//! inference. Its metrics are on the same port, in HTTP.
//!
//! As in the backend: what is wrong with a request is an internal error; the answer of a stream holds the tokens of one
//! step; a stop word that is given stands at the end of the answer; without `end_id` the token-level model never ends by
//! itself, and without `exclude_input_in_output` its one whole answer begins with the prompt.

use std::{collections::HashMap, fmt::Write as _, sync::Arc};

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, future::BoxFuture, stream as streams};
use http::{HeaderName, HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use prost::Message;
use serde_json::{Map, Value, json};

use self::wire::{
    DataType, InferParameter, ModelConfig, ModelConfigRequest, ModelConfigResponse, ModelInferRequest,
    ModelInferResponse, ModelInput, ModelMetadataRequest, ModelMetadataResponse, ModelOutput, ModelReadyRequest,
    ModelReadyResponse, ModelStreamInferResponse, ModelTransactionPolicy, RepositoryIndexResponse, ServerLiveResponse,
    ServerMetadataResponse, ServerReadyResponse, infer_parameter::ParameterChoice,
    model_infer_response::InferOutputTensor, model_metadata_response::TensorMetadata,
    repository_index_response::ModelIndex,
};
use crate::{
    body::{Death, Events},
    output,
    server::{Answer, Service},
    vllm::{
        error::Failure,
        fields::Fields,
        request::{Common, Started},
        stream::{self, Shape},
        tools::{self, Say},
    },
    wire::{Wire, metrics_page},
};

#[allow(
    clippy::all,
    clippy::allow_attributes_without_reason,
    missing_docs,
    unreachable_pub,
    dead_code,
    reason = "generated code"
)]
mod wire {
    include!(concat!(env!("OUT_DIR"), "/inference.rs"));
}

pub(crate) const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
pub(crate) const STREAM: &str = "/inference.GRPCInferenceService/ModelStreamInfer";
const SERVICE: &str = "/inference.GRPCInferenceService/";
const BODY_BYTES_MAX: usize = 64 << 20;

pub(crate) struct Triton {
    /// Whether its model takes and gives token ids.
    pub(crate) ids: bool,
}

/// Inputs of both kinds of model.
const INPUTS: [(&str, DataType); 10] = [
    ("temperature", DataType::TypeFp32),
    ("repetition_penalty", DataType::TypeFp32),
    ("presence_penalty", DataType::TypeFp32),
    ("frequency_penalty", DataType::TypeFp32),
    ("min_tokens", DataType::TypeInt32),
    ("seed", DataType::TypeUint64),
    ("exclude_input_in_output", DataType::TypeBool),
    ("return_num_input_tokens", DataType::TypeBool),
    ("return_num_output_tokens", DataType::TypeBool),
    ("guided_decoding_guide_type", DataType::TypeString),
];
const TEXT_INPUTS: [(&str, DataType); 8] = [
    ("text_input", DataType::TypeString),
    ("max_tokens", DataType::TypeInt32),
    ("stop_words", DataType::TypeString),
    ("bad_words", DataType::TypeString),
    ("top_k", DataType::TypeInt32),
    ("top_p", DataType::TypeFp32),
    ("stream", DataType::TypeBool),
    ("guided_decoding_guide", DataType::TypeString),
];
const ID_INPUTS: [(&str, DataType); 10] = [
    ("input_ids", DataType::TypeInt32),
    ("input_lengths", DataType::TypeInt32),
    ("request_output_len", DataType::TypeInt32),
    ("end_id", DataType::TypeInt32),
    ("pad_id", DataType::TypeInt32),
    ("stop_words_list", DataType::TypeInt32),
    ("runtime_top_k", DataType::TypeInt32),
    ("runtime_top_p", DataType::TypeFp32),
    ("streaming", DataType::TypeBool),
    ("guided_decoding_guide", DataType::TypeString),
];

impl Wire for Triton {
    fn answer<'a>(&'a self, service: &'a Arc<Service>, request: Request<Incoming>) -> BoxFuture<'a, Answer> {
        Box::pin(async move { self.route(service, request).await.unwrap_or_else(|failure| self.refusal(failure)) })
    }

    fn refusal(&self, failure: Failure) -> Answer {
        let code = match failure.status().as_u16() {
            404 => 5,
            401 => 16,
            405 | 501 => 12,
            429 | 503 => 14,
            // Also what is wrong with a request: the backend knows no other code.
            _ => 13,
        };
        let message = match failure.message() {
            long if long.contains("maximum context length") => "Prompt length exceeds maximum input length (simulated)",
            other => other,
        };
        let message: String = message.chars().map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' }).collect();
        let status = HeaderValue::from(code);
        let message = HeaderValue::try_from(message.replace('%', "%25")).unwrap_or(HeaderValue::from_static(""));
        let headers = vec![
            (header::CONTENT_TYPE, HeaderValue::from_static("application/grpc")),
            (HeaderName::from_static("grpc-status"), status),
            (HeaderName::from_static("grpc-message"), message),
        ];
        Answer::Whole { status: StatusCode::OK, headers, body: Bytes::new() }
    }

    /// As a stream that did not ask for a status ends: it stays open for other requests, of which there are none.
    fn death_events(&self) -> Death {
        let error_message = "Executor failed process requestId 1 due to the following error: simulated".to_owned();
        Death::Events(vec![frame(&ModelStreamInferResponse { error_message, infer_response: None })])
    }

    fn is_grpc(&self) -> bool {
        true
    }

    fn headers(&self) -> Vec<(HeaderName, &'static str)> {
        Vec::new()
    }
}

impl Triton {
    async fn route(&self, service: &Arc<Service>, request: Request<Incoming>) -> Result<Answer, Failure> {
        let (parts, body) = request.into_parts();
        if parts.method == Method::GET {
            return match parts.uri.path() {
                "/metrics" => Ok(metrics_page(metrics(service))),
                _ => Err(Failure::not_found()),
            };
        }
        let Some(call) = parts.uri.path().strip_prefix(SERVICE) else { return Err(Failure::not_found()) };
        if call == "ModelStreamInfer" {
            let ends_with_status = parts.headers.get("triton_grpc_error").is_some_and(|value| value == "true");
            return self.converse(service, body, ends_with_status).await;
        }
        let body = Limited::new(body, BODY_BYTES_MAX).collect().await.map_err(|_| Failure::unreadable())?.to_bytes();
        let question = message(&body)?;
        let model = &service.options.model;
        Ok(match call {
            "ServerLive" => one(&ServerLiveResponse { live: true }),
            "ServerReady" => one(&ServerReadyResponse { ready: true }),
            "ServerMetadata" => {
                let (name, version) = ("triton".to_owned(), "2.60.0".to_owned());
                one(&ServerMetadataResponse { name, version, extensions: vec!["model_configuration".to_owned()] })
            }
            "RepositoryIndex" => {
                let entry = |name: &str| ModelIndex {
                    name: name.to_owned(),
                    version: "1".to_owned(),
                    state: "READY".to_owned(),
                    reason: String::new(),
                };
                one(&RepositoryIndexResponse { models: vec![entry("preprocessing"), entry(model)] })
            }
            "ModelReady" => {
                let asked: ModelReadyRequest = read(question)?;
                one(&ModelReadyResponse { ready: asked.name == *model })
            }
            "ModelConfig" => {
                let asked: ModelConfigRequest = read(question)?;
                let config = match asked.name.as_str() {
                    "preprocessing" => ModelConfig { name: asked.name, max_batch_size: 8, ..Default::default() },
                    name if name == model => self.config(model),
                    _ => return Err(unknown(&asked.name)),
                };
                one(&ModelConfigResponse { config: Some(config) })
            }
            "ModelMetadata" => {
                let asked: ModelMetadataRequest = read(question)?;
                if asked.name != *model {
                    return Err(unknown(&asked.name));
                }
                one(&self.metadata(model))
            }
            // It is decoupled.
            "ModelInfer" => {
                let message = "ModelInfer RPC doesn't support models with decoupled transaction policy";
                return Err(Failure::plain(StatusCode::NOT_IMPLEMENTED, message));
            }
            _ => return Err(Failure::not_found()),
        })
    }

    /// A stream of requests, answered one after the other. Unless it is to end with a status, a failure of the first is a
    /// message, as that of any other.
    async fn converse(
        &self,
        service: &Arc<Service>,
        mut incoming: Incoming,
        ends_with_status: bool,
    ) -> Result<Answer, Failure> {
        let mut held = BytesMut::new();
        let Some(first) = next(&mut incoming, &mut held).await else { return Err(internal("there is no request")) };
        let first = match read(first).and_then(|asked| self.infer(service, asked)) {
            Err(failure) if ends_with_status => return Err(failure),
            first => first.unwrap_or_else(|failure| failed(&failure)),
        };
        let (ids, service) = (self.ids, Arc::clone(service));
        let rest = streams::unfold((incoming, held), move |(mut incoming, mut held)| {
            let service = Arc::clone(&service);
            async move {
                let message = next(&mut incoming, &mut held).await?;
                let events = read(message).and_then(|asked| Self { ids }.infer(&service, asked));
                Some((events.unwrap_or_else(|failure| failed(&failure)), (incoming, held)))
            }
        });
        Ok(Answer::Events(Box::pin(first.chain(rest.flatten()))))
    }

    fn inputs(&self) -> impl Iterator<Item = (&'static str, DataType)> {
        let own: &[_] = if self.ids { &ID_INPUTS } else { &TEXT_INPUTS };
        own.iter().chain(&INPUTS).copied()
    }

    fn outputs(&self) -> [(&'static str, DataType); 3] {
        let said = if self.ids { ("output_ids", DataType::TypeInt32) } else { ("text_output", DataType::TypeString) };
        [said, ("num_input_tokens", DataType::TypeInt32), ("num_output_tokens", DataType::TypeInt32)]
    }

    fn config(&self, model: &str) -> ModelConfig {
        let required = ["text_input", "max_tokens", "input_ids", "input_lengths", "request_output_len"];
        let input = |(name, kind): (&str, DataType)| ModelInput {
            name: name.to_owned(),
            data_type: kind.into(),
            dims: vec![1],
            optional: !required.contains(&name),
        };
        let output = |(name, kind): (&str, DataType)| ModelOutput {
            name: name.to_owned(),
            data_type: kind.into(),
            dims: vec![-1],
        };
        ModelConfig {
            name: model.to_owned(),
            platform: if self.ids { "" } else { "ensemble" }.to_owned(),
            backend: if self.ids { "tensorrtllm" } else { "" }.to_owned(),
            max_batch_size: 8,
            input: self.inputs().map(input).collect(),
            output: self.outputs().map(output).to_vec(),
            model_transaction_policy: Some(ModelTransactionPolicy { decoupled: true }),
            ..Default::default()
        }
    }

    fn metadata(&self, model: &str) -> ModelMetadataResponse {
        let tensor = |(name, kind): (&str, DataType)| TensorMetadata {
            name: name.to_owned(),
            datatype: datatype(kind).to_owned(),
            shape: vec![-1, -1],
        };
        ModelMetadataResponse {
            name: model.to_owned(),
            versions: vec!["1".to_owned()],
            platform: if self.ids { "tensorrtllm" } else { "ensemble" }.to_owned(),
            inputs: self.inputs().map(tensor).collect(),
            outputs: self.outputs().map(tensor).to_vec(),
            ..Default::default()
        }
    }

    fn infer(&self, service: &Arc<Service>, asked: ModelInferRequest) -> Result<Events, Failure> {
        if asked.model_name != service.options.model {
            return Err(unknown(&asked.model_name));
        }
        let inputs = self.read_inputs(&asked)?;
        let int = |name: &str| inputs.get(name).and_then(|values| values.first()?.as_i64());
        let texts = |name: &str| inputs.get(name).cloned().unwrap_or_default();
        let flag = |name: &str| inputs.get(name).and_then(|values| values.first()?.as_bool()).unwrap_or_default();
        let Some(most) = int(if self.ids { "request_output_len" } else { "max_tokens" }) else {
            return Err(internal("expected 1 or more inputs but a required one is missing"));
        };
        let mut own = Map::from_iter([("max_tokens".to_owned(), json!(most))]);
        own.insert("stop".to_owned(), texts("stop_words").into());
        own.insert("include_stop_str_in_output".to_owned(), true.into());
        own.insert("ignore_eos".to_owned(), (self.ids && int("end_id").is_none()).into());
        for name in ["temperature", "seed", "min_tokens"] {
            own.extend(inputs.get(name).and_then(|values| Some((name.to_owned(), values.first()?.clone()))));
        }
        if let Some(list) = inputs.get("stop_words_list") {
            // A row of ids, and a row of the places where each word ends; here every word is one token.
            own.insert("stop_token_ids".to_owned(), list.iter().take(list.len() / 2).cloned().collect());
        }
        if let Some(Value::String(kind)) = texts("guided_decoding_guide_type").first() {
            let guide = texts("guided_decoding_guide").first().and_then(Value::as_str).map(str::to_owned);
            let schema = guide.and_then(|guide| serde_json::from_str(&guide).ok()).unwrap_or_else(|| json!({}));
            match kind.as_str() {
                "json" | "json_schema" => drop(own.insert("structured_outputs".to_owned(), json!({"json": schema}))),
                _ => return Err(internal("this kind of guide is not simulated")),
            }
        }
        let prompt = if self.ids {
            let ids: Vec<u32> = texts("input_ids").iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()).collect();
            if int("input_lengths") != i64::try_from(ids.len()).ok() {
                return Err(internal("input_lengths does not fit input_ids"));
            }
            ids
        } else {
            let text = texts("text_input").first().and_then(Value::as_str).map(str::to_owned);
            service.model.encode(&text.ok_or_else(|| internal("text_input is missing"))?, true)
        };
        let fields = Fields::body(&own);
        let common = Common::read(&fields, &["max_tokens"])?;
        common.check(service)?;
        let say = tools::read(&fields, "")?;
        let range = service.options.output_tokens.clone();
        let started = common.start(service, vec![prompt], u32::MAX, |prompt, seed, limits| match &say {
            Say::Text(text) => output::fixed(&service.model, "", text, limits),
            Say::Prose | Say::Call(_) => output::prose(&service.model, prompt, seed, &range, limits),
        })?;
        let steps = Steps {
            id: asked.id,
            model: asked.model_name,
            ids: self.ids,
            streamed: flag(if self.ids { "streaming" } else { "stream" }),
            with_input: self.ids && !flag("exclude_input_in_output"),
            counts: (flag("return_num_input_tokens"), flag("return_num_output_tokens")),
        };
        Ok(stream::events(service, &common, started, steps))
    }

    /// Values by name: texts, numbers and flags. Refused as Triton does: unknown names, and data that is not the shape's.
    fn read_inputs(&self, asked: &ModelInferRequest) -> Result<HashMap<String, Vec<Value>>, Failure> {
        let known: HashMap<_, _> = self.inputs().collect();
        let mut inputs = HashMap::new();
        for (at, tensor) in asked.inputs.iter().enumerate() {
            let kind = known.get(tensor.name.as_str()).copied();
            let Some(kind) = kind.filter(|kind| datatype(*kind) == tensor.datatype) else {
                let message = format!("unexpected inference input '{}' for this model", tensor.name);
                return Err(Failure::plain(StatusCode::BAD_REQUEST, &message));
            };
            let elements = tensor.shape.iter().product::<i64>();
            let values = match (asked.raw_input_contents.get(at), &tensor.contents) {
                (Some(raw), None) => raw_values(kind, raw),
                (None, Some(contents)) => contents
                    .bytes_contents
                    .iter()
                    .map(|text| json!(String::from_utf8_lossy(text)))
                    .chain(contents.int_contents.iter().map(|value| json!(value)))
                    .chain(contents.uint64_contents.iter().map(|value| json!(value)))
                    .chain(contents.fp32_contents.iter().map(|value| json!(value)))
                    .chain(contents.bool_contents.iter().map(|value| json!(value)))
                    .collect(),
                _ => return Err(internal("contents field must not be specified when using raw_input_contents")),
            };
            if tensor.shape.first() != Some(&1) || i64::try_from(values.len()).ok() != Some(elements) {
                return Err(internal(&format!("input '{}' has another shape than its data", tensor.name)));
            }
            inputs.insert(tensor.name.clone(), values);
        }
        Ok(inputs)
    }
}

fn internal(message: &str) -> Failure {
    Failure::plain(StatusCode::INTERNAL_SERVER_ERROR, message)
}

fn unknown(model: &str) -> Failure {
    Failure::plain(StatusCode::NOT_FOUND, &format!("Request for unknown model: '{model}' is not found"))
}

fn datatype(kind: DataType) -> &'static str {
    match kind {
        DataType::TypeBool => "BOOL",
        DataType::TypeInt32 => "INT32",
        DataType::TypeUint64 => "UINT64",
        DataType::TypeFp32 => "FP32",
        _ => "BYTES",
    }
}

fn raw_values(kind: DataType, raw: &[u8]) -> Vec<Value> {
    match kind {
        DataType::TypeBool => raw.iter().map(|byte| json!(*byte != 0)).collect(),
        DataType::TypeInt32 => raw.as_chunks::<4>().0.iter().map(|bytes| json!(i32::from_le_bytes(*bytes))).collect(),
        DataType::TypeFp32 => raw.as_chunks::<4>().0.iter().map(|bytes| json!(f32::from_le_bytes(*bytes))).collect(),
        DataType::TypeUint64 => raw.as_chunks::<8>().0.iter().map(|bytes| json!(u64::from_le_bytes(*bytes))).collect(),
        _ => {
            let mut values = Vec::new();
            let mut rest = raw;
            while let Some((length, after)) = rest.split_first_chunk::<4>() {
                let length = u32::from_le_bytes(*length) as usize;
                let Some((text, after)) = after.split_at_checked(length) else { break };
                values.push(json!(String::from_utf8_lossy(text)));
                rest = after;
            }
            values
        }
    }
}

/// One message of a body with just that; a flag and a length stand in front.
fn message(body: &Bytes) -> Result<Bytes, Failure> {
    let length = body.get(1..5).and_then(|length| Some(u32::from_be_bytes(length.try_into().ok()?) as usize));
    let message = length.filter(|length| body.first() == Some(&0) && body.len() == length + 5);
    message.map(|_| body.slice(5..)).ok_or_else(|| internal("the body is no single message"))
}

/// The next message of a body that goes on; a flag and a length stand in front.
async fn next(incoming: &mut Incoming, held: &mut BytesMut) -> Option<Bytes> {
    loop {
        let length = held.get(1..5).and_then(|length| Some(u32::from_be_bytes(length.try_into().ok()?) as usize));
        if let Some(length) = length.filter(|length| held.len() >= length + 5) {
            return Some(held.split_to(length + 5).split_off(5).freeze());
        }
        if held.len() > BODY_BYTES_MAX {
            return None;
        }
        if let Ok(data) = incoming.frame().await?.ok()?.into_data() {
            held.extend_from_slice(&data);
        }
    }
}

/// A failure that leaves its stream open.
fn failed(failure: &Failure) -> Events {
    let error_message = failure.message().to_owned();
    Box::pin(streams::iter([frame(&ModelStreamInferResponse { error_message, infer_response: None })]))
}

fn read<M: Message + Default>(message: Bytes) -> Result<M, Failure> {
    M::decode(message).map_err(|_| internal("the message cannot be read"))
}

fn frame(message: &impl Message) -> Bytes {
    let bytes = message.encode_to_vec();
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    [&[0][..], &length.to_be_bytes(), &bytes].concat().into()
}

fn one(message: &impl Message) -> Answer {
    let kind = HeaderValue::from_static("application/grpc");
    Answer::Whole { status: StatusCode::OK, headers: vec![(header::CONTENT_TYPE, kind)], body: frame(message) }
}

/// The answers to one request: one for each step, or one at the end.
struct Steps {
    id: String,
    model: String,
    ids: bool,
    streamed: bool,
    with_input: bool,
    /// Whether the prompt's tokens and the answer's are told.
    counts: (bool, bool),
}

impl Shape for Steps {
    fn opening(&self, _: &Started) -> Vec<Value> {
        Vec::new()
    }

    fn token(&mut self, started: &Started, index: usize, at: usize) -> Option<Value> {
        let output = started.outputs.get(index)?;
        let last = at + 1 == output.tokens.len();
        if !self.streamed && !last {
            return None;
        }
        let from = if self.streamed { at } else { 0 };
        let tokens = output.tokens.get(from..=at)?;
        let text: String = tokens.iter().map(|token| token.text.as_str()).collect();
        let mut ids: Vec<u32> = tokens.iter().map(|token| token.id).collect();
        if self.with_input && !self.streamed {
            ids = [started.prompt_of(index), &ids].concat();
        }
        Some(json!({"text": text, "ids": ids, "tokens": tokens.len(), "prompt": started.prompt_of(index).len(),
            "last": last}))
    }

    fn usage(&self, usage: Value) -> Value {
        usage
    }

    fn end(&self) -> Option<Bytes> {
        None
    }

    fn frame(&self, value: &Value) -> Bytes {
        let number = |name: &str| value.get(name).and_then(Value::as_i64).and_then(|number| i32::try_from(number).ok());
        let mut outputs = Vec::new();
        let mut put = |name: &str, kind: DataType, shape: Vec<i64>, raw: Vec<u8>| {
            let (name, datatype) = (name.to_owned(), datatype(kind).to_owned());
            outputs.push((InferOutputTensor { name, datatype, shape, ..Default::default() }, raw));
        };
        if self.ids {
            let ids = value.get("ids").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
            let raw = ids.iter().filter_map(|id| i32::try_from(id.as_i64()?).ok()).flat_map(i32::to_le_bytes).collect();
            let length = i64::try_from(ids.len()).unwrap_or_default();
            put("output_ids", DataType::TypeInt32, vec![1, 1, length], raw);
            let length = i32::try_from(ids.len()).unwrap_or_default();
            put("sequence_length", DataType::TypeInt32, vec![1, 1], length.to_le_bytes().to_vec());
        } else {
            let text = value.get("text").and_then(Value::as_str).unwrap_or_default();
            let length = u32::try_from(text.len()).unwrap_or_default();
            put("text_output", DataType::TypeString, vec![1], [&length.to_le_bytes()[..], text.as_bytes()].concat());
        }
        for (wanted, name, of) in
            [(self.counts.0, "num_input_tokens", "prompt"), (self.counts.1, "num_output_tokens", "tokens")]
        {
            if let Some(count) = number(of).filter(|_| wanted) {
                put(name, DataType::TypeInt32, vec![1, 1], count.to_le_bytes().to_vec());
            }
        }
        let last = value.get("last") == Some(&true.into());
        let flag = InferParameter { parameter_choice: Some(ParameterChoice::BoolParam(last)) };
        let (outputs, raw_output_contents) = outputs.into_iter().unzip();
        let response = ModelInferResponse {
            model_name: self.model.clone(),
            model_version: "1".to_owned(),
            id: self.id.clone(),
            parameters: HashMap::from([("triton_final_response".to_owned(), flag)]),
            outputs,
            raw_output_contents,
        };
        frame(&ModelStreamInferResponse { error_message: String::new(), infer_response: Some(response) })
    }

    fn is_chat(&self) -> bool {
        false
    }
}

fn metrics(service: &Service) -> String {
    let (load, _) = service.driver.load();
    let timing = &service.options.timing;
    let used = (load.kv_usage * f64::from(timing.kv_blocks)).round();
    let mut page = String::new();
    for (name, label, kind, value) in [
        ("nv_trt_llm_request_metrics", "request_type", "waiting", f64::from(load.waiting)),
        ("nv_trt_llm_request_metrics", "request_type", "scheduled", f64::from(load.running)),
        ("nv_trt_llm_request_metrics", "request_type", "active", f64::from(load.waiting + load.running)),
        ("nv_trt_llm_request_metrics", "request_type", "max", f64::from(timing.max_batch)),
        ("nv_trt_llm_kv_cache_block_metrics", "kv_cache_block_type", "fraction", load.kv_usage),
        ("nv_trt_llm_kv_cache_block_metrics", "kv_cache_block_type", "used", used),
        ("nv_trt_llm_kv_cache_block_metrics", "kv_cache_block_type", "max", f64::from(timing.kv_blocks)),
        ("nv_trt_llm_kv_cache_block_metrics", "kv_cache_block_type", "tokens_per", f64::from(timing.block_tokens)),
    ] {
        // Writing to a string does not fail.
        let _ = writeln!(page, "{name}{{model=\"tensorrt_llm\",{label}=\"{kind}\",version=\"1\"}} {value}");
    }
    page
}
