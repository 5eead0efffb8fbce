//! The top-level keys of a JSON object, each as a piece of the body's own text.
//!
//! One pass: keys that [`keys!`] names are kept as slices of the body, all others are checked for being JSON and
//! skipped. Nothing is interpreted here except that a kept key stands once.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::Refusal;
use super::field::Field;

/// Keys that tell us only whether an answer could be shared: it is not where they repeat.
const MAY_REPEAT: [&str; 2] = ["temperature", "seed"];

/// A set of fields that [`read`] fills.
pub(super) trait Keys<'a>: Default {
    /// The field for `key`, if it is one of ours.
    fn slot(&mut self, key: &str) -> Option<&mut Field<'a>>;
}

/// Declares a struct with one [`Field`] per wanted key, named as the key. `as` gives the name that refusals show.
macro_rules! keys {
    (@shown $key:ident) => { stringify!($key) };
    (@shown $key:ident $shown:literal) => { $shown };
    ($name:ident { $($key:ident $(as $shown:literal)?),* $(,)? }) => {
        struct $name<'a> { $($key: $crate::peek::field::Field<'a>),* }

        impl Default for $name<'_> {
            fn default() -> Self {
                Self { $($key: $crate::peek::field::Field::absent($crate::peek::keys::keys!(@shown $key $($shown)?))),* }
            }
        }

        impl<'a> $crate::peek::keys::Keys<'a> for $name<'a> {
            fn slot(&mut self, key: &str) -> Option<&mut $crate::peek::field::Field<'a>> {
                match key {
                    $(stringify!($key) => Some(&mut self.$key),)*
                    _ => None,
                }
            }
        }
    };
}
pub(super) use keys;

/// Reads `body`, which must be exactly one JSON object in UTF-8.
///
/// Returns the fields, and the offset just after the object's opening brace.
pub(super) fn read<'a, K: Keys<'a>>(body: &'a [u8]) -> Result<(K, usize), Refusal> {
    let text = std::str::from_utf8(body)
        .map_err(|e| Refusal::json(format_args!("invalid UTF-8 at byte {}", e.valid_up_to())))?;
    let fields = nested(text)?;
    let open = text.find('{').map_or(0, |at| at.saturating_add(1));
    Ok((fields, open))
}

/// Reads the JSON object `text`; places count from its start.
pub(super) fn nested<'a, K: Keys<'a>>(text: &'a str) -> Result<K, Refusal> {
    let mut fields = K::default();
    let mut doubled = None;
    let mut json = serde_json::Deserializer::from_str(text);
    json.deserialize_map(Fields { body: text, fields: &mut fields, doubled: &mut doubled })
        .and_then(|()| json.end())
        .map_err(|e| match e.classify() {
        serde_json::error::Category::Data => Refusal::json(format_args!("expected a JSON object")),
        _ => Refusal::json(format_args!("{e}")),
    })?;
    doubled.map_or(Ok(fields), |key| Err(Refusal::doubled(key)))
}

struct Fields<'k, 'a, K> {
    body: &'a str,
    fields: &'k mut K,
    doubled: &'k mut Option<&'static str>,
}

impl<'a, K: Keys<'a>> Visitor<'a> for Fields<'_, 'a, K> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(slot) = map.next_key_seed(Slot(&mut *self.fields))? {
            let Some(field) = slot else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            let text = map.next_value::<&'a RawValue>()?.get();
            if field.is_given() && MAY_REPEAT.contains(&field.name()) {
                field.repeat();
            } else if field.is_given() {
                self.doubled.get_or_insert(field.name());
            }
            field.fill(self.body, text);
        }
        Ok(())
    }
}

/// Resolves a key, unescaped, to the field that waits for it.
struct Slot<'k, K>(&'k mut K);

impl<'k, 'a, K: Keys<'a>> DeserializeSeed<'a> for Slot<'k, K>
where
    'a: 'k,
{
    type Value = Option<&'k mut Field<'a>>;

    fn deserialize<D: Deserializer<'a>>(self, key: D) -> Result<Self::Value, D::Error> {
        key.deserialize_str(self)
    }
}

impl<'k, 'a, K: Keys<'a>> Visitor<'a> for Slot<'k, K>
where
    'a: 'k,
{
    type Value = Option<&'k mut Field<'a>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: serde::de::Error>(self, key: &str) -> Result<Self::Value, E> {
        Ok(self.0.slot(key))
    }
}
