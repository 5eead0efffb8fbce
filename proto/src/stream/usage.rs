//! The `usage` object, and where it stands in a chunk.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::peek::Span;

/// Tokens that an answer cost. Counts that are missing are 0, as in embeddings without completion.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt_tokens: u64,
    /// Of all choices together.
    pub completion_tokens: u64,
    /// Part of `prompt_tokens`. vLLM tells it only with `--enable-prompt-tokens-details`.
    pub cached_tokens: Option<u64>,
    /// Part of `completion_tokens`.
    pub reasoning_tokens: Option<u64>,
}

impl Usage {
    /// Reads a JSON object; None for any other value.
    pub(crate) fn read(json: &[u8]) -> Option<Self> {
        let usage = Members::read(std::str::from_utf8(json).ok()?)?;
        let count_in = |details: Option<&str>, of: fn(&Members<'_>) -> Option<u64>| of(&Members::read(details?)?);
        Some(Self {
            prompt_tokens: usage.prompt_tokens.and_then(count).unwrap_or(0),
            completion_tokens: usage.completion_tokens.and_then(count).unwrap_or(0),
            cached_tokens: count_in(usage.prompt_details, |details| count(details.cached_tokens?)),
            reasoning_tokens: count_in(usage.completion_details, |details| count(details.reasoning_tokens?)),
        })
    }
}

/// A JSON number as a count.
fn count(json: &str) -> Option<u64> {
    // `as` saturates, negative counts become 0.
    json.parse().ok().or_else(|| json.parse().ok().map(|value: f64| value as u64))
}

/// The values of a `usage` object, or of one of the objects in it, as they are written. The last of equal keys counts.
#[derive(Default)]
struct Members<'a> {
    prompt_tokens: Option<&'a str>,
    completion_tokens: Option<&'a str>,
    prompt_details: Option<&'a str>,
    completion_details: Option<&'a str>,
    cached_tokens: Option<&'a str>,
    reasoning_tokens: Option<&'a str>,
}

impl<'a> Members<'a> {
    fn read(json: &'a str) -> Option<Self> {
        if !json.trim_ascii_start().starts_with('{') {
            return None; // most often `null`, and an error takes long to make
        }
        let mut members = Self::default();
        let mut json = serde_json::Deserializer::from_str(json);
        json.deserialize_map(&mut members).ok()?;
        json.end().ok()?;
        Some(members)
    }
}

impl<'a> Visitor<'a> for &mut Members<'a> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(Key(place)) = map.next_key()? {
            let value = map.next_value::<&RawValue>()?.get();
            if let Some(place) = place {
                *place(self) = Some(value);
            }
        }
        Ok(())
    }
}

/// Where the value of a key goes.
struct Key(Option<for<'m, 'a> fn(&'m mut Members<'a>) -> &'m mut Option<&'a str>>);

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        struct Name;
        impl Visitor<'_> for Name {
            type Value = Key;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }

            fn visit_str<E: Error>(self, key: &str) -> Result<Key, E> {
                Ok(Key(match key {
                    "prompt_tokens" => Some(|members| &mut members.prompt_tokens),
                    "completion_tokens" => Some(|members| &mut members.completion_tokens),
                    "prompt_tokens_details" => Some(|members| &mut members.prompt_details),
                    "completion_tokens_details" => Some(|members| &mut members.completion_details),
                    "cached_tokens" => Some(|members| &mut members.cached_tokens),
                    "reasoning_tokens" => Some(|members| &mut members.reasoning_tokens),
                    _ => None,
                }))
            }
        }
        json.deserialize_str(Name)
    }
}

/// The span of the member whose value is `value`, a slice of `data`, together with one comma beside it.
pub(super) fn member(data: &[u8], value: &str) -> Option<Span> {
    let start = value.as_ptr().addr().checked_sub(data.as_ptr().addr())?;
    let end = start.checked_add(value.len())?;
    // Back over `"usage" :` to what stands before it. The key reads "usage", so no quote is within, however it is escaped.
    let before = data.get(..start)?.trim_ascii_end().strip_suffix(b":")?.trim_ascii_end().strip_suffix(b"\"")?;
    let key = memchr::memrchr(b'"', before)?;
    let before = data.get(..key)?.trim_ascii_end();
    if before.ends_with(b",") {
        return Some(before.len() - 1..end);
    }
    let after = data.get(end..)?;
    let gap = after.len() - after.trim_ascii_start().len();
    let has_next = after.get(gap) == Some(&b',');
    Some(key..if has_next { end + gap + 1 } else { end })
}
