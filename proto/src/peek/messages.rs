//! The one check on messages: a non-empty array of objects that each have a string `role`.
//!
//! Content is read by whoever renders the prompt. The text is known to be JSON by now, so that this pass over it looks for
//! marks only, from string to string.

use super::field::{Field, Kind, kind};
use super::{Refusal, Span};
use crate::strings::string_length;

/// Where the messages stand.
pub(super) fn read(field: &Field<'_>) -> Result<Option<Span>, Refusal> {
    let Some(text) = field.text() else { return Ok(None) };
    if kind(text) != Kind::Array {
        return Err(Refusal::wrong_type(field.name(), "an array of objects", text));
    }
    match count(field, text)? {
        0 => Err(Refusal::value(field.name(), format_args!("empty array. Expected an array with minimum length 1"))),
        _ => Ok(field.span()),
    }
}

/// How many messages there are, which are all in order.
fn count(field: &Field<'_>, text: &str) -> Result<usize, Refusal> {
    let (mut messages, mut depth, mut next) = (0_usize, 0_usize, 0);
    // In a message: whether a key comes next, whether the value is the role's, and whether there was one.
    let (mut at_key, mut at_role, mut has_role) = (false, false, false);
    let role = |messages| format!("{}[{messages}].role", field.name());
    while let Some((byte, rest)) = text.as_bytes().get(next..).and_then(<[u8]>::split_first) {
        let at = next;
        next += 1 + if *byte == b'"' { string_length(rest) } else { 0 };
        match (depth, byte) {
            (_, b' ' | b'\t' | b'\n' | b'\r' | b':') => {}
            (1, b'{') => (depth, at_key, has_role) = (2, true, false),
            (2, b',') => (at_key, at_role) = (true, false),
            (2, b'}') if !has_role => return Err(Refusal::missing(&role(messages))),
            (2, b'}') => (depth, messages, at_role) = (1, messages + 1, false),
            (2, b'"') if at_key => {
                at_role =
                    is_role(text.get(at..next).unwrap_or_default()).map_err(|e| Refusal::text(field.name(), &e))?;
                at_key = false;
            }
            (2, b'"') if at_role => has_role = true,
            (2, _) if at_role => return Err(wrong(&role(messages), "a string")),
            (_, b'{' | b'[') if depth != 1 => depth += 1,
            (_, b'}' | b']') => depth = depth.saturating_sub(1),
            (1, b',') => {}
            (1, _) => return Err(wrong(&format!("{}[{messages}]", field.name()), "an object")),
            _ => {}
        }
    }
    Ok(messages)
}

fn is_role(key: &str) -> serde_json::Result<bool> {
    if key.contains('\\') {
        serde_json::from_str::<String>(key).map(|key| key == "role")
    } else {
        Ok(key == r#""role""#)
    }
}

fn wrong(name: &str, expected: &str) -> Refusal {
    Refusal {
        message: format!("Invalid type for '{name}': expected {expected}."),
        param: Some(name.to_owned()),
        code: "invalid_type",
    }
}
