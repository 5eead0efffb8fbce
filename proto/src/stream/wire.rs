//! The visitors behind [`super::read`]. One pass, no allocation on a usual chunk.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use smallvec::SmallVec;

use super::Choice;

#[derive(Default)]
pub(super) struct Chunk<'a> {
    pub(super) choices: SmallVec<[Choice; 2]>,
    pub(super) has_content: bool,
    /// A truthy top-level `error`, or the flat form `"object": "error"` of SGLang and TensorRT-LLM.
    pub(super) is_error: bool,
    /// A choice ended because the engine let go of it, see [`super::gave_up`].
    pub(super) gave_up: bool,
    pub(super) usage: Option<&'a str>,
}

impl<'a> Chunk<'a> {
    pub(super) fn read(data: &'a [u8]) -> Option<Self> {
        let mut chunk = Self::default();
        // One look at all bytes is cheaper than one at each string.
        let mut json = serde_json::Deserializer::from_str(std::str::from_utf8(data).ok()?);
        json.deserialize_map(Top(&mut chunk)).ok()?;
        json.end().ok()?;
        Some(chunk)
    }
}

struct Top<'c, 'a>(&'c mut Chunk<'a>);

impl<'a> Visitor<'a> for Top<'_, 'a> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<Key>()? {
            match key {
                Key::Choices => {
                    let Choices { choices, has_content, gave_up } = map.next_value::<Option<_>>()?.unwrap_or_default();
                    self.0.choices = choices;
                    self.0.has_content = has_content;
                    self.0.gave_up = gave_up;
                }
                Key::Usage => self.0.usage = Some(map.next_value::<&RawValue>()?.get()),
                Key::Error => self.0.is_error |= map.next_value::<Truthy>()?.0,
                Key::Object => self.0.is_error |= map.next_value::<&RawValue>()?.get() == r#""error""#,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }
}

/// The keys of chunk, choice and delta. No key means two things, so one set does for all three.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Key {
    Choices,
    Usage,
    Error,
    Object,
    Index,
    FinishReason,
    Delta,
    /// Output, if truthy.
    Output,
    Other,
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        struct Name;
        impl Visitor<'_> for Name {
            type Value = Key;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }

            fn visit_str<E: Error>(self, key: &str) -> Result<Key, E> {
                Ok(match key {
                    "choices" => Key::Choices,
                    "usage" => Key::Usage,
                    "error" => Key::Error,
                    "object" => Key::Object,
                    "index" => Key::Index,
                    "finish_reason" => Key::FinishReason,
                    "delta" => Key::Delta,
                    "text" | "content" | "reasoning" | "reasoning_content" | "refusal" | "tool_calls"
                    | "function_call" | "audio" | "token_ids" => Key::Output,
                    _ => Key::Other,
                })
            }
        }
        json.deserialize_str(Name)
    }
}

/// The array of choices.
#[derive(Default)]
struct Choices {
    choices: SmallVec<[Choice; 2]>,
    has_content: bool,
    gave_up: bool,
}

impl<'de> Deserialize<'de> for Choices {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        struct Items;
        impl<'de> Visitor<'de> for Items {
            type Value = Choices;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("choices")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Choices, A::Error> {
                let mut all = Choices::default();
                while let Some(OneChoice { choice, has_content, gave_up }) = seq.next_element()? {
                    all.choices.push(choice);
                    all.has_content |= has_content;
                    all.gave_up |= gave_up;
                }
                Ok(all)
            }
        }
        json.deserialize_seq(Items)
    }
}

struct OneChoice {
    choice: Choice,
    has_content: bool,
    gave_up: bool,
}

impl<'de> Deserialize<'de> for OneChoice {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = OneChoice;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a choice")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<OneChoice, A::Error> {
                let choice = Choice { index: 0, finished: false };
                let mut one = OneChoice { choice, has_content: false, gave_up: false };
                while let Some(key) = map.next_key::<Key>()? {
                    match key {
                        // Any number will do; `as` saturates.
                        Key::Index => one.choice.index = map.next_value::<Option<f64>>()?.unwrap_or(0.0) as u32,
                        // Some engines write "" for none; SGLang's native form is an object.
                        Key::FinishReason => {
                            let reason = map.next_value::<&RawValue>()?.get();
                            one.choice.finished = !matches!(reason, "null" | r#""""#);
                            one.gave_up = reason == super::ABORT;
                        }
                        Key::Delta => {
                            one.has_content |= map.next_value::<Option<Output>>()?.is_some_and(|Output(any)| any);
                        }
                        Key::Output => one.has_content |= map.next_value::<Truthy>()?.0,
                        _ => {
                            map.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                Ok(one)
            }
        }
        json.deserialize_map(Members)
    }
}

/// A delta: whether it has any output.
struct Output(bool);

impl<'de> Deserialize<'de> for Output {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Output;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a delta")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Output, A::Error> {
                let mut any = false;
                while let Some(key) = map.next_key::<Key>()? {
                    if key == Key::Output {
                        any |= map.next_value::<Truthy>()?.0;
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(Output(any))
            }
        }
        json.deserialize_map(Members)
    }
}

/// Whether a value is one that Python takes for true: not `null`, `false`, 0 or empty. The OpenAI SDKs test `error` so.
struct Truthy(bool);

impl<'de> Deserialize<'de> for Truthy {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Truthy;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any value")
            }

            fn visit_unit<E: Error>(self) -> Result<Truthy, E> {
                Ok(Truthy(false))
            }

            fn visit_bool<E: Error>(self, value: bool) -> Result<Truthy, E> {
                Ok(Truthy(value))
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<Truthy, E> {
                Ok(Truthy(value != 0))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<Truthy, E> {
                Ok(Truthy(value != 0))
            }

            fn visit_f64<E: Error>(self, value: f64) -> Result<Truthy, E> {
                Ok(Truthy(value != 0.0))
            }

            fn visit_str<E: Error>(self, value: &str) -> Result<Truthy, E> {
                Ok(Truthy(!value.is_empty()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Truthy, A::Error> {
                let any = seq.next_element::<IgnoredAny>()?.is_some();
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Truthy(any))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Truthy, A::Error> {
                let any = map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some();
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Truthy(any))
            }
        }
        json.deserialize_any(Any)
    }
}
