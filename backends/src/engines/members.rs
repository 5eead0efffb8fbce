//! The members of a request's JSON object, to be taken out, renamed and put in before it goes to an engine that does not
//! take them as they are. What is not touched keeps its bytes; what nobody touched stays the very same body.

use std::fmt;

use bytes::Bytes;
use serde::de::{DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde_json::{Value, value::RawValue};

/// An object's members in their order.
#[derive(Debug)]
pub(super) struct Members<'a> {
    list: Vec<Member<'a>>,
    changed: bool,
}

#[derive(Debug)]
struct Member<'a> {
    name: String,
    value: Text<'a>,
}

#[derive(Debug)]
enum Text<'a> {
    Asked(&'a str),
    Ours(String),
}

impl Text<'_> {
    fn as_str(&self) -> &str {
        match self {
            Self::Asked(text) => text,
            Self::Ours(text) => text,
        }
    }
}

impl<'a> Members<'a> {
    /// `None` when `body` is no JSON object.
    pub(super) fn read(body: &'a [u8]) -> Option<Self> {
        let mut json = serde_json::Deserializer::from_str(std::str::from_utf8(body).ok()?);
        let list = json.deserialize_map(List).ok()?;
        json.end().ok()?;
        Some(Self { list, changed: false })
    }

    /// The JSON of a member that is not null. Of several of one name the last counts, as in most readers.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        let member = self.list.iter().rev().find(|member| member.name == name)?;
        Some(member.value.as_str()).filter(|text| *text != "null")
    }

    /// A member of this type.
    pub(super) fn get_as<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        serde_json::from_str(self.get(name)?).ok()
    }

    /// Names and values that are not null.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        let all = self.list.iter().map(|member| (member.name.as_str(), member.value.as_str()));
        all.filter(|(_, text)| *text != "null")
    }

    /// Takes a member out; gives what [`Members::get`] would have.
    pub(super) fn remove(&mut self, name: &str) -> Option<String> {
        let value = self.get(name).map(str::to_owned);
        let before = self.list.len();
        self.list.retain(|member| member.name != name);
        self.changed |= self.list.len() < before;
        value
    }

    pub(super) fn set(&mut self, name: &str, value: &Value) {
        self.put(name, value.to_string());
    }

    /// Gives a member another name, unless the other is there already; either way the first name is gone.
    pub(super) fn rename(&mut self, from: &str, to: &str) {
        if let Some(value) = self.remove(from)
            && self.get(to).is_none()
        {
            self.put(to, value);
        }
    }

    /// The same with a value that is JSON already.
    pub(super) fn put(&mut self, name: &str, json: String) {
        self.remove(name);
        self.list.push(Member { name: name.to_owned(), value: Text::Ours(json) });
        self.changed = true;
    }

    /// The object again; `body` is what was read.
    pub(super) fn write(self, body: &Bytes) -> Bytes {
        if !self.changed {
            return body.clone();
        }
        let mut out = Vec::with_capacity(body.len() + 64);
        for member in &self.list {
            out.push(if out.is_empty() { b'{' } else { b',' });
            out.extend_from_slice(Value::from(member.name.as_str()).to_string().as_bytes());
            out.push(b':');
            out.extend_from_slice(member.value.as_str().as_bytes());
        }
        if out.is_empty() {
            out.push(b'{');
        }
        out.push(b'}');
        out.into()
    }
}

struct List;

impl<'a> Visitor<'a> for List {
    type Value = Vec<Member<'a>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut list = Vec::new();
        while let Some((name, value)) = map.next_entry::<String, &'a RawValue>()? {
            list.push(Member { name, value: Text::Asked(value.get()) });
        }
        Ok(list)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_not_touched_stays() {
        let body = Bytes::from_static(br#" {"a" : 1.50, "b\u0063":{"x": null},"a":2, "z":null} "#);
        let read = || Members::read(&body).expect("an object");
        assert_eq!(read().write(&body).as_ptr(), body.as_ptr());
        let mut members = read();
        assert_eq!(
            (members.get("a"), members.get_as("bc"), members.get("z")),
            (Some("2"), Some(json!({"x": null})), None)
        );
        assert_eq!(members.remove("none"), None);
        members.rename("bc", "d");
        members.rename("a", "d");
        assert_eq!(members.write(&body), r#"{"z":null,"d":{"x": null}}"#);
        let mut empty = read();
        for name in ["a", "bc", "z"] {
            empty.remove(name);
        }
        assert_eq!(empty.write(&body), "{}");
        for none in ["", "[]", "{", "7", "{} {}", "\u{0}"] {
            assert!(Members::read(none.as_bytes()).is_none(), "{none}");
        }
    }
}
