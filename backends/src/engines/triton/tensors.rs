//! Tensors on the wire, and which of them a model has.

use std::collections::BTreeMap;

use forebay_tokens::{Special, Tokenizer};
use prost::Message;

use super::{
    NAME,
    wire::{
        DataType, InferParameter, ModelConfig, ModelInferRequest, ModelInferResponse, infer_parameter::ParameterChoice,
        model_infer_request::InferInputTensor,
    },
};
use crate::engines::Unsupported;

/// What a model takes and gives, by its configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tensors {
    /// Names and types as requests spell them.
    inputs: BTreeMap<String, &'static str>,
    /// Whether each tensor has a dimension for a batch in front.
    batched: bool,
    decoupled: bool,
    /// Whether each of its answers repeats the text so far.
    accumulates: bool,
    /// Whether its tokenizer puts special tokens around a text.
    adds_special: bool,
}

impl Tensors {
    /// Of a model with this configuration, KServe's `ModelConfig` as its server writes it. `None` where it generates no text.
    #[must_use]
    pub fn read(config: &[u8]) -> Option<Self> {
        Self::of(&ModelConfig::decode(config).ok()?, false)
    }

    /// `None` where the model generates no text.
    pub(super) fn of(config: &ModelConfig, adds_special: bool) -> Option<Self> {
        let spelled = |input: &super::wire::ModelInput| Some((input.name.clone(), spelled(input.data_type())?));
        let inputs: BTreeMap<_, _> = config.input.iter().filter_map(spelled).collect();
        let gives = |name: &str| config.output.iter().any(|output| output.name == name);
        let by_text = inputs.contains_key("text_input") && gives("text_output");
        let by_ids = inputs.contains_key("input_ids") && gives("output_ids");
        let accumulates = config.parameters.get("accumulate_tokens").is_some_and(|value| is_true(&value.string_value));
        (by_text || by_ids).then(|| Self {
            inputs,
            batched: config.max_batch_size > 0,
            decoupled: config.model_transaction_policy.as_ref().is_some_and(|policy| policy.decoupled),
            accumulates,
            adds_special,
        })
    }

    pub(super) fn takes_ids(&self) -> bool {
        !self.inputs.contains_key("text_input")
    }

    pub(super) fn is_decoupled(&self) -> bool {
        self.decoupled
    }

    pub(super) fn accumulates(&self) -> bool {
        self.accumulates
    }

    /// A conversation's text without the tokens at its head that the server's tokenizer puts there itself.
    pub(super) fn without_special(&self, text: &str, tokenizer: Option<&Tokenizer>) -> String {
        let head = tokenizer.filter(|_| self.adds_special).and_then(|tokenizer| {
            let added = tokenizer.encode("", Special::Add).ok()?;
            tokenizer.decode(added.get(..1)?, Special::Add).ok()
        });
        let head = head.filter(|head| !head.is_empty());
        head.and_then(|head| text.strip_prefix(head.as_str())).unwrap_or(text).to_owned()
    }
}

/// A parameter of a model as its configuration writes it.
pub(super) fn is_true(value: &str) -> bool {
    matches!(value.to_ascii_lowercase().as_str(), "true" | "1" | "yes" | "y" | "t" | "on")
}

/// A type's name in requests.
fn spelled(kind: DataType) -> Option<&'static str> {
    Some(match kind {
        DataType::TypeBool => "BOOL",
        DataType::TypeInt32 => "INT32",
        DataType::TypeInt64 => "INT64",
        DataType::TypeUint32 => "UINT32",
        DataType::TypeUint64 => "UINT64",
        DataType::TypeFp32 => "FP32",
        DataType::TypeString => "BYTES",
        // None that could be filled from here.
        _ => return None,
    })
}

/// The inputs of one request, as far as the model has them.
pub(super) struct Inputs<'a> {
    model: &'a Tensors,
    tensors: Vec<InferInputTensor>,
    raw: Vec<Vec<u8>>,
}

impl<'a> Inputs<'a> {
    pub(super) fn of(model: &'a Tensors) -> Self {
        Self { model, tensors: Vec::new(), raw: Vec::new() }
    }

    /// Whether the model has such an input, of this type.
    fn put(&mut self, name: &str, datatype: &str, shape: &[usize], raw: Vec<u8>) -> bool {
        if self.model.inputs.get(name) != Some(&datatype) {
            return false;
        }
        let batch = self.model.batched.then_some(1);
        let shape = batch.iter().chain(shape).map(|&length| i64::try_from(length).unwrap_or(i64::MAX)).collect();
        let tensor =
            InferInputTensor { name: name.to_owned(), datatype: datatype.to_owned(), shape, ..Default::default() };
        self.tensors.push(tensor);
        self.raw.push(raw);
        true
    }

    fn need(there: bool, field: &str) -> Result<(), Unsupported> {
        if there { Ok(()) } else { Err(Unsupported::field(NAME, field)) }
    }

    pub(super) fn flag(&mut self, name: &str, value: bool) -> bool {
        self.put(name, "BOOL", &[1], vec![value.into()])
    }

    pub(super) fn int(&mut self, name: &str, value: u32) -> Result<(), Unsupported> {
        Self::need(self.int_if_there(name, value), name)
    }

    pub(super) fn int_if_there(&mut self, name: &str, value: u32) -> bool {
        self.put(name, "INT32", &[1], value.to_le_bytes().to_vec())
    }

    /// Under the first of these names that the model has; if it has none, `field` is refused where it is `needed`.
    pub(super) fn int_of(&mut self, names: &[&str], field: &str, value: u32, needed: bool) -> Result<(), Unsupported> {
        Self::need(names.iter().any(|name| self.int_if_there(name, value)) || !needed, field)
    }

    /// As [`Inputs::int_of`].
    pub(super) fn float(&mut self, names: &[&str], field: &str, value: f32, needed: bool) -> Result<(), Unsupported> {
        let raw = value.to_le_bytes();
        Self::need(names.iter().any(|name| self.put(name, "FP32", &[1], raw.to_vec())) || !needed, field)
    }

    /// Older releases call it `random_seed`.
    pub(super) fn seed(&mut self, seed: u64, needed: bool) -> Result<(), Unsupported> {
        let raw = seed.to_le_bytes();
        let there = ["seed", "random_seed"].iter().any(|name| self.put(name, "UINT64", &[1], raw.to_vec()));
        Self::need(there || !needed, "seed")
    }

    pub(super) fn ints(&mut self, name: &str, values: &[u32]) -> Result<(), Unsupported> {
        let raw = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self::need(self.put(name, "INT32", &[values.len()], raw), name)
    }

    /// Single tokens as words: a row of ids, and a row that tells where each word ends.
    pub(super) fn words(&mut self, name: &str, field: &str, ids: &[u32]) -> Result<(), Unsupported> {
        let ends = (1..).take(ids.len());
        let raw = ids.iter().copied().chain(ends).flat_map(u32::to_le_bytes).collect();
        Self::need(self.put(name, "INT32", &[2, ids.len()], raw), field)
    }

    pub(super) fn texts(&mut self, name: &str, texts: &[String]) -> Result<(), Unsupported> {
        self.texts_for(name, name, texts)
    }

    pub(super) fn texts_for(&mut self, name: &str, field: &str, texts: &[String]) -> Result<(), Unsupported> {
        let mut raw = Vec::with_capacity(texts.iter().map(|text| text.len() + 4).sum());
        for text in texts {
            raw.extend_from_slice(&u32::try_from(text.len()).unwrap_or(u32::MAX).to_le_bytes());
            raw.extend_from_slice(text.as_bytes());
        }
        Self::need(self.put(name, "BYTES", &[texts.len()], raw), field)
    }

    pub(super) fn request(self, model_name: String) -> ModelInferRequest {
        let asked = InferParameter { parameter_choice: Some(ParameterChoice::BoolParam(true)) };
        ModelInferRequest {
            model_name,
            // A last, empty answer where the model would end without one.
            parameters: self
                .model
                .decoupled
                .then(|| ("triton_enable_empty_final_response".to_owned(), asked))
                .into_iter()
                .collect(),
            inputs: self.tensors,
            raw_input_contents: self.raw,
            ..Default::default()
        }
    }
}

/// The outputs of one answer.
pub(super) struct Outputs<'a>(pub(super) &'a ModelInferResponse);

impl Outputs<'_> {
    /// Position, elements, and the raw form where it has one.
    fn find(&self, name: &str) -> Option<(&super::wire::model_infer_response::InferOutputTensor, Option<&[u8]>)> {
        let at = self.0.outputs.iter().position(|output| output.name == name)?;
        Some((self.0.outputs.get(at)?, self.0.raw_output_contents.get(at).map(Vec::as_slice)))
    }

    /// The first element of a tensor of texts.
    pub(super) fn text(&self, name: &str) -> Option<String> {
        let (tensor, raw) = self.find(name)?;
        let bytes = match raw {
            Some(raw) => {
                let (length, rest) = raw.split_first_chunk::<4>()?;
                rest.get(..u32::from_le_bytes(*length) as usize)?
            }
            None => tensor.contents.as_ref()?.bytes_contents.first()?.as_slice(),
        };
        Some(String::from_utf8_lossy(bytes).into_owned())
    }

    /// All elements of a tensor of whole numbers of 32 bits, row by row.
    pub(super) fn ints(&self, name: &str) -> Option<Vec<i32>> {
        let (tensor, raw) = self.find(name)?;
        match raw {
            Some(raw) => Some(raw.as_chunks::<4>().0.iter().map(|bytes| i32::from_le_bytes(*bytes)).collect()),
            None => Some(tensor.contents.as_ref()?.int_contents.clone()),
        }
    }

    pub(super) fn count(&self, name: &str) -> Option<u64> {
        self.ints(name)?.first().and_then(|&count| u64::try_from(count).ok())
    }

    /// The ids of the first sequence.
    pub(super) fn sequence(&self) -> Option<Vec<u32>> {
        let ids = self.ints("output_ids")?;
        let row = self.find("output_ids")?.0.shape.last().and_then(|&length| usize::try_from(length).ok());
        let valid = self.count("sequence_length").and_then(|length| usize::try_from(length).ok());
        let most = row.unwrap_or(usize::MAX).min(valid.unwrap_or(usize::MAX));
        // Rows of unequal length are filled up with -1.
        Some(ids.into_iter().take(most).filter_map(|id| u32::try_from(id).ok()).collect())
    }

    /// Whether nothing comes after it.
    pub(super) fn is_final(&self) -> bool {
        let flag = self.0.parameters.get("triton_final_response").and_then(|flag| flag.parameter_choice.as_ref());
        matches!(flag, Some(ParameterChoice::BoolParam(true)))
    }
}
