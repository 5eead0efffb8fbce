//! The one check on messages: a non-empty array of objects that each have a string `role`.
//!
//! Content is read by whoever renders the prompt.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::field::{Field, Kind, kind};
use super::{Refusal, Span};

/// Where the messages stand.
pub(super) fn read(field: &Field<'_>) -> Result<Option<Span>, Refusal> {
    let Some(text) = field.text() else { return Ok(None) };
    if kind(text) != Kind::Array {
        return Err(Refusal::wrong_type(field.name(), "an array of objects", text));
    }
    let mut walk = Walk { count: 0, fault: None };
    let end = serde_json::Deserializer::from_str(text).deserialize_seq(&mut walk);
    let at = walk.count.saturating_sub(1);
    match (end, walk.fault) {
        (Ok(()), _) if walk.count == 0 => {
            Err(Refusal::value(field.name(), format_args!("empty array. Expected an array with minimum length 1")))
        }
        (Ok(()), _) => Ok(field.span()),
        (Err(_), Some(Fault::NoRole)) => Err(Refusal::missing(&format!("{}[{at}].role", field.name()))),
        (Err(_), Some(Fault::Role)) => Err(wrong(&format!("{}[{at}].role", field.name()), "a string")),
        (Err(e), None) if e.is_data() => Err(wrong(&format!("{}[{at}]", field.name()), "an object")),
        (Err(e), None) => Err(Refusal::text(field.name(), &e)),
    }
}

fn wrong(name: &str, expected: &str) -> Refusal {
    Refusal {
        message: format!("Invalid type for '{name}': expected {expected}."),
        param: Some(name.to_owned()),
        code: "invalid_type",
    }
}

enum Fault {
    NoRole,
    Role,
}

struct Walk {
    /// Messages begun.
    count: usize,
    fault: Option<Fault>,
}

impl<'de> Visitor<'de> for &mut Walk {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of messages")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(Message(&mut *self))?.is_some() {}
        Ok(())
    }
}

struct Message<'w>(&'w mut Walk);

impl<'de> DeserializeSeed<'de> for Message<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        self.0.count += 1;
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Message<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a message")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut role = false;
        while let Some(is_role) = map.next_key_seed(IsRole)? {
            if !is_role {
                map.next_value::<IgnoredAny>()?;
            } else if map.next_value::<&serde_json::value::RawValue>()?.get().starts_with('"') {
                role = true;
            } else {
                self.0.fault = Some(Fault::Role);
                return Err(A::Error::custom("role"));
            }
        }
        if !role {
            self.0.fault = Some(Fault::NoRole);
            return Err(A::Error::custom("no role"));
        }
        Ok(())
    }
}

struct IsRole;

impl<'de> DeserializeSeed<'de> for IsRole {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, key: D) -> Result<bool, D::Error> {
        key.deserialize_str(self)
    }
}

impl Visitor<'_> for IsRole {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: serde::de::Error>(self, key: &str) -> Result<bool, E> {
        Ok(key == "role")
    }
}
