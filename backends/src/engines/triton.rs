//! Triton with TensorRT-LLM models, over KServe v2's gRPC: those that take and give text (`ensemble`,
//! `tensorrt_llm_bls`), and the engine itself (`tensorrt_llm`), which takes and gives token ids.
//!
//! A request is one call with one message. A model that may answer several times is called as a stream of which we send
//! all at once; dropping the answer is how it is told to stop. Which tensors a model has decides what it heeds: what it
//! has no input for is refused.
//!
//! Here: what is asked (this file), `tensors` (values on the wire, and what a model has), `answers` (what comes back),
//! `server` (what a server has).

mod answers;
mod server;
mod tensors;

use std::sync::Arc;

use forebay_proto::metrics_text::samples;
use forebay_proto::peek::COMPLETION_TOKENS;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::Value;

pub(super) use self::server::{detect, ready};
pub use self::tensors::Tensors;
use self::{
    answers::{Answers, Output},
    tensors::Inputs,
};
use super::{
    Api, Asked, Engine, Form, Load, Mark, Members, Prepared, Totals, Translation, Unsupported, Ways,
    fields::refuse_unheeded, require_text, tally::Tally,
};
use crate::transport::grpc;

/// The protocol as it is generated.
#[allow(
    clippy::all,
    clippy::allow_attributes_without_reason,
    dead_code,
    missing_docs,
    unreachable_pub,
    reason = "generated code"
)]
mod wire {
    tonic::include_proto!("inference");
}

pub(super) struct Triton;

const NAME: &str = "triton";
const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
const STREAM: &str = "/inference.GRPCInferenceService/ModelStreamInfer";
/// The second: a stream that fails ends with a status in place of a message of its own.
const HEADERS: &[(&str, &str)] = &[("content-type", grpc::GRPC), ("triton_grpc_error", "true")];

/// Some only where the model has an input for them, two by the template, which is written here.
const HEEDED: &[&str] = &[
    "stop",
    "presence_penalty",
    "reasoning_effort",
    "chat_template_kwargs",
    "top_k",
    "repetition_penalty",
    "min_tokens",
    "stop_token_ids",
    "ignore_eos",
    "bad_words",
    "response_format",
    "structured_outputs",
];

impl Engine for Triton {
    fn name(&self) -> &'static str {
        NAME
    }

    fn mark(&self) -> Mark {
        Mark::Grpc(NAME)
    }

    /// Not that a model is: the index of those that are is read with it.
    fn health_paths(&self) -> &'static [&'static str] {
        &[server::READY]
    }

    fn load_paths(&self) -> &'static [&'static str] {
        &["/metrics"]
    }

    /// Of all TensorRT-LLM models of the server. Triton's own queue is empty: the backend takes requests at once.
    fn read_load(&self, answer: &[u8]) -> Option<Load> {
        let [mut scheduled, mut waiting, mut share, mut blocks, mut block] = [Tally::default(); 5];
        for sample in samples(answer) {
            let label = |name| sample.labels.get(name);
            match sample.name {
                "nv_trt_llm_request_metrics" => match label("request_type").as_deref() {
                    Some("scheduled") => scheduled.add(sample.value),
                    Some("waiting") => waiting.add(sample.value),
                    _ => {}
                },
                "nv_trt_llm_kv_cache_block_metrics" => match label("kv_cache_block_type").as_deref() {
                    Some("fraction") => share.add(sample.value),
                    Some("max") => blocks.add(sample.value),
                    Some("tokens_per") => block.add(sample.value),
                    _ => {}
                },
                _ => {}
            }
        }
        let block_tokens = block.count().filter(|&tokens| tokens > 0);
        let blocks = blocks.total().filter(|&blocks| blocks > 0);
        Some(Load {
            running: scheduled.count()?,
            waiting: waiting.count()?,
            kv_usage: share.share(),
            block_tokens,
            kv_tokens: blocks.zip(block_tokens).map(|(blocks, tokens)| blocks.saturating_mul(tokens.into())),
            sleeping: false,
            adapters_max: None,
            totals: Totals::default(),
        })
    }

    fn serves(&self, api: Api) -> bool {
        matches!(api, Api::ChatCompletions | Api::Completions)
    }

    fn form(&self, _: Api, server: &Ways) -> Form {
        let by_ids = server.tensors.as_ref().is_some_and(|tensors| tensors.takes_ids());
        if by_ids { Form::Ids } else { Form::Text }
    }

    fn is_grpc(&self) -> bool {
        true
    }

    fn metrics_port(&self) -> Option<u16> {
        Some(8002)
    }

    fn rewrites(&self) -> bool {
        true
    }

    fn adapt(&self, asked: Asked) -> Result<Prepared, Unsupported> {
        let Some(tensors) = asked.server.tensors.clone() else {
            let message = "The server of this model (triton) does not list it as one that generates text.".to_owned();
            return Err(Unsupported { message, param: None });
        };
        let body = asked.body.clone();
        let Some(members) = Members::read(&body) else {
            return Err(Unsupported { message: "The body must be a JSON object.".to_owned(), param: None });
        };
        if !tensors.takes_ids() {
            require_text(NAME, &members)?;
        }
        refuse_unheeded(NAME, &members, HEEDED)?;
        if list::<IgnoredAny>(&members, "tools", "a list")?.is_some() {
            return Err(Unsupported::field(NAME, "tools"));
        }
        request(asked, &members, &tensors)
    }
}

fn request(asked: Asked, members: &Members<'_>, tensors: &Arc<Tensors>) -> Result<Prepared, Unsupported> {
    let Asked { api, streamed, written, .. } = asked;
    let model: String = members.get_as("model").unwrap_or_default();
    let most = most_tokens(api, members, written.room)?;
    let stops = stops(members)?;
    let stop_ids = list::<u32>(members, "stop_token_ids", "a list of token ids")?;
    let stop_ids = stop_ids.map(|ids| fitting(ids, "stop_token_ids")).transpose()?;
    let past_end = read(members, "ignore_eos", "true or false", |_| true)?.unwrap_or(false);
    let mut inputs = Inputs::of(tensors);
    let strip;
    let output = if tensors.takes_ids() {
        let (Some(ids), Some(tokenizer)) = (&written.ids, &written.tokenizer) else {
            let what = "one prompt is taken, and the model's tokenizer must be at hand to write it in token ids";
            return Err(Unsupported::value(NAME, if api == Api::Completions { "prompt" } else { "messages" }, what));
        };
        // Without it there is no end to an answer but its greatest length.
        if let Some(end) = tokenizer.end()
            && !past_end
        {
            inputs.int("end_id", end)?;
            inputs.int_if_there("pad_id", end);
        }
        inputs.ints("input_ids", ids)?;
        inputs.int("input_lengths", u32::try_from(ids.len()).unwrap_or(u32::MAX))?;
        inputs.int("request_output_len", most)?;
        if let Some(ids) = &stop_ids {
            inputs.words("stop_words_list", "stop_token_ids", ids)?;
        }
        strip = ids.len();
        Output::ids(tokenizer, ids)
    } else {
        for (field, asked) in [("stop_token_ids", stop_ids.is_some()), ("ignore_eos", past_end)] {
            if asked {
                return Err(Unsupported::field(NAME, field));
            }
        }
        let text = match &written.text {
            // What puts special tokens before every text shall find none there.
            Some(text) => tensors.without_special(text, written.tokenizer.as_deref()),
            None => prompt(members)?,
        };
        inputs.texts("text_input", &[text])?;
        inputs.int("max_tokens", most)?;
        if !stops.is_empty() {
            inputs.texts("stop_words", &stops)?;
        }
        strip = 0;
        Output::text(tensors.accumulates(), written.tokenizer.clone())
    };
    sampling(members, &mut inputs)?;
    constraint(members, &mut inputs)?;
    let stream = streamed && tensors.is_decoupled();
    let excludes = inputs.flag("exclude_input_in_output", true);
    for (name, value) in [
        (if tensors.takes_ids() { "streaming" } else { "stream" }, stream),
        ("return_num_input_tokens", true),
        ("return_num_output_tokens", true),
    ] {
        inputs.flag(name, value);
    }
    let answers = Answers::new((api, model.clone()), output, stops, most)
        .streamed(streamed)
        .several(tensors.is_decoupled())
        .without(if stream || excludes { 0 } else { strip })
        .prompt_tokens(written.prompt_tokens);
    Ok(Prepared {
        path: if tensors.is_decoupled() { STREAM } else { INFER },
        headers: HEADERS,
        body: grpc::frame(&inputs.request(model)),
        translation: Some(Translation::new(answers)),
    })
}

/// Its models must be told how long an answer may become.
fn most_tokens(api: Api, members: &Members<'_>, room: Option<u32>) -> Result<u32, Unsupported> {
    for field in ["max_completion_tokens", "max_tokens"] {
        if let Some(most) = whole(members, field, 1)? {
            return Ok(most.cast_unsigned());
        }
    }
    match (api, room) {
        (Api::Completions, _) => Ok(COMPLETION_TOKENS),
        (_, Some(room)) => Ok(room.max(1)),
        (_, None) => {
            let what = "it must be given, since the context length of this server is not known";
            Err(Unsupported::value(NAME, "max_tokens", what))
        }
    }
}

/// A field in its form. One that is there in another is refused, also one out of range: the server would call that a
/// failure of its own.
fn read<T: DeserializeOwned>(
    members: &Members<'_>,
    field: &str,
    what: &str,
    fits: impl FnOnce(&T) -> bool,
) -> Result<Option<T>, Unsupported> {
    let Some(json) = members.get(field) else { return Ok(None) };
    let value = serde_json::from_str(json).ok().filter(fits);
    value.map(Some).ok_or_else(|| Unsupported::value(NAME, field, &format!("{what} is taken")))
}

fn whole(members: &Members<'_>, field: &str, least: i32) -> Result<Option<i32>, Unsupported> {
    read(members, field, &format!("a whole number from {least} to {}", i32::MAX), |&value| value >= least)
}

/// Token ids that a tensor of theirs can hold: the server would call others a failure of its own.
fn fitting(ids: Vec<u32>, field: &str) -> Result<Vec<u32>, Unsupported> {
    match ids.iter().find(|id| i32::try_from(**id).is_err()) {
        Some(id) => Err(Unsupported::value(NAME, field, &format!("no token has the id {id}"))),
        None => Ok(ids),
    }
}

/// `None`: it asks for nothing.
fn list<T: DeserializeOwned>(members: &Members<'_>, field: &str, what: &str) -> Result<Option<Vec<T>>, Unsupported> {
    let list = read::<Vec<T>>(members, field, what, |_| true)?;
    Ok(list.filter(|list| !list.is_empty()))
}

fn prompt(members: &Members<'_>) -> Result<String, Unsupported> {
    let one = members.get_as::<String>("prompt");
    let one = one.or_else(|| members.get_as::<[String; 1]>("prompt").map(|[only]| only));
    one.ok_or_else(|| Unsupported::value(NAME, "prompt", "one text is taken, no list"))
}

fn stops(members: &Members<'_>) -> Result<Vec<String>, Unsupported> {
    let Some(json) = members.get("stop") else { return Ok(Vec::new()) };
    let one = serde_json::from_str::<String>(json).map(|one| vec![one]);
    let mut list = one.or_else(|_| serde_json::from_str::<Vec<String>>(json));
    if let Ok(list) = &mut list {
        list.retain(|stop| !stop.is_empty());
    }
    list.map_err(|_| Unsupported::value(NAME, "stop", "texts are taken"))
}

/// All is said, also what OpenAI leaves to its defaults: TensorRT-LLM's are greedy, with one seed for all.
fn sampling(members: &Members<'_>, inputs: &mut Inputs<'_>) -> Result<(), Unsupported> {
    const TOP_P: &[&str] = &["top_p", "runtime_top_p"];
    const TOP_K: &[&str] = &["top_k", "runtime_top_k"];
    let number = |field, what, fits: fn(f32) -> bool| {
        read(members, field, what, |&value: &f32| value.is_finite() && fits(value))
    };
    let temperature = number("temperature", "a number not below 0", |value| value >= 0.0)?.unwrap_or(1.0);
    let top_p = number("top_p", "a number above 0 and not above 1", |value| value > 0.0 && value <= 1.0)?;
    let top_k = whole(members, "top_k", -1)?.unwrap_or(0).max(0);
    let top_k = if temperature == 0.0 { 1 } else { top_k.cast_unsigned() };
    if temperature > 0.0 {
        inputs.float(&["temperature"], "temperature", temperature, members.get("temperature").is_some())?;
        inputs.float(TOP_P, "top_p", top_p.unwrap_or(1.0), top_p.is_some_and(|top_p| top_p < 1.0))?;
    }
    inputs.int_of(TOP_K, "top_k", top_k, top_k > 0)?;
    let around_0 = |field| number(field, "a number from -2 to 2", |value| value.abs() <= 2.0);
    for (field, nothing, penalty) in [
        ("presence_penalty", 0.0, around_0("presence_penalty")?),
        ("frequency_penalty", 0.0, around_0("frequency_penalty")?),
        ("repetition_penalty", 1.0, number("repetition_penalty", "a number above 0", |value| value > 0.0)?),
    ] {
        if let Some(penalty) = penalty.filter(|&penalty| penalty != nothing) {
            inputs.float(&[field], field, penalty, true)?;
        }
    }
    if let Some(least) = whole(members, "min_tokens", 0)?.filter(|&least| least > 0) {
        inputs.int_of(&["min_tokens", "min_length"], "min_tokens", least.cast_unsigned(), true)?;
    }
    let seed = read(members, "seed", "a whole number of 64 bits with its sign", |_| true)?;
    inputs.seed(seed.map_or_else(|| rand::random::<u64>() >> 1, i64::cast_unsigned), seed.is_some())?;
    if let Some(words) = list(members, "bad_words", "a list of texts")? {
        inputs.texts("bad_words", &words)?;
    }
    Ok(())
}

/// What the answer must look like: OpenAI's field, or vLLM's.
fn constraint(members: &Members<'_>, inputs: &mut Inputs<'_>) -> Result<(), Unsupported> {
    for field in ["response_format", "structured_outputs"] {
        let Some(asked) = members.get_as::<Value>(field) else { continue };
        let schema = asked.pointer("/json_schema/schema").or_else(|| asked.get("json"));
        let text = |name| asked.get(name).and_then(Value::as_str).map(str::to_owned);
        let (kind, guide) = match asked.get("type").and_then(Value::as_str) {
            Some("text") => continue,
            Some("json_object") => ("json", None),
            _ => match (schema, text("regex"), text("grammar")) {
                (Some(Value::String(schema)), ..) => ("json_schema", Some(schema.clone())),
                (Some(schema), ..) => ("json_schema", Some(schema.to_string())),
                (None, Some(regex), _) => ("regex", Some(regex)),
                (None, None, Some(grammar)) => ("ebnf_grammar", Some(grammar)),
                (None, None, None) if asked.as_object().is_some_and(serde_json::Map::is_empty) => continue,
                (None, None, None) => return Err(Unsupported::value(NAME, field, "this form is not known")),
            },
        };
        inputs.texts_for("guided_decoding_guide_type", field, &[kind.to_owned()])?;
        if let Some(guide) = guide {
            inputs.texts_for("guided_decoding_guide", field, &[guide])?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
