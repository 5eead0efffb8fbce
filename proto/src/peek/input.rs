//! Prompts and embedding inputs: text, texts, token ids, or lists of token ids.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, IgnoredAny, SeqAccess, Unexpected, Visitor};

use super::Refusal;
use super::field::{Field, Kind, kind};

/// Inputs that one request may carry. OpenAI's bound for embeddings; taken for completions too, so that the choices of
/// one request stay countable.
pub const INPUTS_MAX: usize = 2048;

/// What a completion continues or an embedding is made of. Lists are never empty, texts may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<u32>),
    IdLists(Vec<Vec<u32>>),
}

impl Input {
    /// Number of prompts, 1 to [`INPUTS_MAX`].
    #[must_use]
    pub fn count(&self) -> usize {
        match self {
            Self::Text(_) | Self::Ids(_) => 1,
            Self::Texts(texts) => texts.len(),
            Self::IdLists(lists) => lists.len(),
        }
    }
}

const ANY: &str = "a string, an array of strings, an array of token ids or an array of arrays of token ids";
const IDS: &str = "an array of token ids";
const ID: &str = "an integer between 0 and 4294967295";

/// Reads a prompt or an embedding input.
pub(super) fn read(field: &Field<'_>) -> Result<Option<Input>, Refusal> {
    let Some(text) = field.text() else { return Ok(None) };
    let Some(items) = text.strip_prefix('[') else {
        return match kind(text) {
            Kind::String => Ok(field.string()?.map(Input::Text)),
            _ => Err(Refusal::wrong_type(field.name(), ANY, text)),
        };
    };
    let items = items.trim_ascii_start();
    match kind(items) {
        _ if items.starts_with(']') => Err(empty(field, "")),
        Kind::String => Ok(Some(Input::Texts(few(field, text, "a string")?))),
        Kind::Number => read_ids(field).map(|ids| ids.map(Input::Ids)),
        Kind::Array => {
            let lists: Vec<Vec<Id>> = few(field, text, IDS)?;
            if let Some(at) = lists.iter().position(Vec::is_empty) {
                return Err(empty(field, &format!("[{at}]")));
            }
            Ok(Some(Input::IdLists(lists.into_iter().map(plain).collect())))
        }
        _ => Err(Refusal::wrong_type(&format!("{}[0]", field.name()), "a string or token ids", items)),
    }
}

/// Reads an array of token ids, which may be empty.
pub(super) fn read_ids(field: &Field<'_>) -> Result<Option<Vec<u32>>, Refusal> {
    match field.text() {
        None => Ok(None),
        Some(text) if kind(text) == Kind::Array => list::<Vec<Id>>(field, text, ID).map(|ids| Some(plain(ids))),
        Some(text) => Err(Refusal::wrong_type(field.name(), IDS, text)),
    }
}

fn few<T: DeserializeOwned>(field: &Field<'_>, text: &str, item: &str) -> Result<Vec<T>, Refusal> {
    let Few(items) = list(field, text, item)?;
    if items.len() > INPUTS_MAX {
        return Err(Refusal::value(field.name(), format_args!("more than {INPUTS_MAX} items")));
    }
    Ok(items)
}

/// `text` is known to be JSON, so an error is an item of another type, or half a surrogate pair.
fn list<T: DeserializeOwned>(field: &Field<'_>, text: &str, item: &str) -> Result<T, Refusal> {
    serde_json::from_str(text).map_err(|e| match e.classify() {
        serde_json::error::Category::Data => Refusal {
            message: format!("Invalid type for '{}': expected every item to be {item}.", field.name()),
            param: Some(field.name().to_owned()),
            code: "invalid_type",
        },
        _ => Refusal::text(field.name(), &e),
    })
}

fn empty(field: &Field<'_>, index: &str) -> Refusal {
    let name = format!("{}{index}", field.name());
    Refusal::value(&name, format_args!("empty array. Expected an array with minimum length 1"))
}

fn plain(ids: Vec<Id>) -> Vec<u32> {
    ids.into_iter().map(|Id(id)| id).collect()
}

/// A token id; `16.0` counts as 16.
struct Id(u32);

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        struct Number;
        impl Visitor<'_> for Number {
            type Value = Id;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(ID)
            }

            fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Id, E> {
                u32::try_from(value).map(Id).map_err(|_| E::invalid_value(Unexpected::Unsigned(value), &self))
            }

            fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Id, E> {
                // `as` is exact: whole and within range.
                (value.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(&value))
                    .then_some(Id(value as u32))
                    .ok_or_else(|| E::invalid_value(Unexpected::Float(value), &self))
            }
        }
        json.deserialize_any(Number)
    }
}

/// An array of which at most one item more than [`INPUTS_MAX`] is kept.
struct Few<T>(Vec<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Few<T> {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        struct Items<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Items<T> {
            type Value = Few<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Few<T>, A::Error> {
                let mut items = Vec::new();
                while items.len() <= INPUTS_MAX {
                    match seq.next_element()? {
                        Some(item) => items.push(item),
                        None => return Ok(Few(items)),
                    }
                }
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Few(items))
            }
        }
        json.deserialize_seq(Items(PhantomData))
    }
}
