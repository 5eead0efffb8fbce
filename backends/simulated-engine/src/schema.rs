//! A small value that satisfies a JSON schema.
//!
//! Handles what tools and response formats commonly use: types, `properties` and `required`, `items` with their least
//! number, `enum`, `const`, `anyOf`/`oneOf`/`allOf`, `$ref` into the same document, bounds of numbers and lengths. Patterns
//! and formats are not satisfied.

use serde_json::{Map, Value, json};

/// How deep a schema is followed, and how many values are made in all; parts beyond are null. Bounds schemas that refer
/// to themselves.
const DEPTH_MAX: u32 = 16;
const VALUES_MAX: u32 = 4096;

/// Most elements and characters that a lower bound in the schema can ask for.
const LENGTH_MAX: u64 = 256;

const TYPES: [&str; 7] = ["object", "array", "string", "integer", "number", "boolean", "null"];

/// The name of a type that JSON schema does not have, if the schema uses one at its top.
pub(crate) fn unknown_type(schema: &Value) -> Option<&str> {
    schema.get("type")?.as_str().filter(|name| !TYPES.contains(name))
}

/// Gives a value that `schema` accepts; `word` fills strings.
pub(crate) fn instance(schema: &Value, word: &str) -> Value {
    Builder { root: schema, word, left: VALUES_MAX }.value(schema, DEPTH_MAX)
}

struct Builder<'a> {
    root: &'a Value,
    word: &'a str,
    left: u32,
}

impl Builder<'_> {
    fn value(&mut self, schema: &Value, depth: u32) -> Value {
        let (Some(depth), Some(left)) = (depth.checked_sub(1), self.left.checked_sub(1)) else { return Value::Null };
        self.left = left;
        let first = |key: &str| schema.get(key).and_then(Value::as_array).and_then(|list| list.first());
        if let Some(value) = schema.get("const").or_else(|| first("enum")) {
            return value.clone();
        }
        if let Some(target) = schema.get("$ref").and_then(Value::as_str) {
            return self.root.pointer(target.trim_start_matches('#')).map_or(Value::Null, |at| self.value(at, depth));
        }
        if let Some(part) = first("anyOf").or_else(|| first("oneOf")).or_else(|| first("allOf")) {
            return self.value(part, depth);
        }
        let declared = schema.get("type").and_then(|kind| kind.as_str().or_else(|| kind.get(0)?.as_str()));
        let implied = || if schema.get("properties").is_some() { "object" } else { "string" };
        match declared.unwrap_or_else(implied) {
            "object" => self.object(schema, depth),
            "array" => self.array(schema, depth),
            "integer" => json!(bound(schema, "minimum").unwrap_or(1.0).ceil() as i64),
            "number" => json!(bound(schema, "minimum").unwrap_or(1.5)),
            "boolean" => json!(true),
            "null" => Value::Null,
            _ => self.string(schema),
        }
    }

    /// All declared properties: what is optional may be there.
    fn object(&mut self, schema: &Value, depth: u32) -> Value {
        let mut object = Map::new();
        for (name, part) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
            object.insert(name.clone(), self.value(part, depth));
        }
        let required = schema.get("required").and_then(Value::as_array).into_iter().flatten();
        for name in required.filter_map(Value::as_str) {
            object.entry(name).or_insert_with(|| self.word.into());
        }
        Value::Object(object)
    }

    fn array(&mut self, schema: &Value, depth: u32) -> Value {
        let length = schema.get("minItems").and_then(Value::as_u64).unwrap_or(1).min(LENGTH_MAX);
        let items = schema.get("items").unwrap_or(&Value::Null);
        (0..length).map(|_| self.value(items, depth)).collect()
    }

    fn string(&self, schema: &Value) -> Value {
        let least = schema.get("minLength").and_then(Value::as_u64).unwrap_or(0).min(LENGTH_MAX);
        let most = schema.get("maxLength").and_then(Value::as_u64).unwrap_or(LENGTH_MAX).max(least);
        let mut text: Vec<char> = self.word.chars().take(usize::try_from(most).unwrap_or(usize::MAX)).collect();
        while (text.len() as u64) < least {
            text.push('.');
        }
        text.into_iter().collect::<String>().into()
    }
}

fn bound(schema: &Value, key: &str) -> Option<f64> {
    schema.get(key)?.as_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_are_what_the_schema_says() {
        let cases = [
            (json!({"type": "string"}), json!("water")),
            (json!({"type": "string", "maxLength": 2}), json!("wa")),
            (json!({"type": "string", "minLength": 7}), json!("water..")),
            (json!({"type": "integer", "minimum": 2.5}), json!(3)),
            (json!({"type": "number"}), json!(1.5)),
            (json!({"enum": ["celsius", "kelvin"]}), json!("celsius")),
            (json!({"const": 7}), json!(7)),
            (json!({"type": ["null", "string"]}), json!(null)),
            (json!({"type": "array", "items": {"type": "boolean"}, "minItems": 2}), json!([true, true])),
            (json!({"anyOf": [{"type": "null"}, {"type": "string"}]}), json!(null)),
            (
                json!({"properties": {"a": {"$ref": "#/$defs/x"}}, "required": ["a", "b"], "$defs": {"x": {"const": 1}}}),
                json!({"a": 1, "b": "water"}),
            ),
            (json!(true), json!("water")),
        ];
        for (schema, expect) in cases {
            assert_eq!(instance(&schema, "water"), expect, "{schema}");
        }
    }

    #[test]
    fn what_refers_to_itself_or_asks_for_much_ends() {
        let schema = json!({"type": "object", "properties": {"next": {"$ref": "#"}}});
        assert!(instance(&schema, "x").to_string().len() < 1000);
        let wide = json!({"properties": {"a": {"$ref": "#"}, "b": {"$ref": "#"}, "c": {"type": "array", "minItems": 99, "items": {"$ref": "#"}}}});
        assert!(instance(&wide, "x").to_string().len() < 100_000);
        let huge = json!({"type": "array", "minItems": 1e12 as u64, "items": {"type": "null"}});
        assert_eq!(instance(&huge, "x").as_array().unwrap().len(), 256);
    }

    #[test]
    fn a_type_that_does_not_exist_is_named() {
        assert_eq!(unknown_type(&json!({"type": "nonsense"})), Some("nonsense"));
        assert_eq!(unknown_type(&json!({"type": "object"})), None);
        assert_eq!(unknown_type(&json!({})), None);
    }
}
