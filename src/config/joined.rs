//! A worker that is given by a call, in JSON, with the keys of `[[model.worker]]`.
//!
//! It is written as TOML and read as the file is, so that there is one reader and one set of rules.

use std::fmt::Write;

use serde_json::{Map, Value};
use toml::de::DeTable;

use super::log::Log;
use super::model::{self, Taken};
use super::tree::Section;
use super::{Node, Reader, Worker};

impl Reader {
    /// The worker that these keys make; one that is null is not there.
    ///
    /// # Errors
    /// All mistakes, each with its key and its remedy.
    pub fn worker(&self, keys: &Map<String, Value>, nodes: &[Node]) -> Result<Worker, String> {
        let mut text = String::new();
        for (key, value) in keys.iter().filter(|(_, value)| !value.is_null()) {
            write_toml(&mut text, &Value::from(key.as_str()));
            text.push_str(" = ");
            write_toml(&mut text, value);
            text.push('\n');
        }
        let table = DeTable::parse(&text).map_err(|error| error.message().to_owned())?;
        let log = Log::new("worker", &text);
        let worker = model::worker(Section::root(&log, table.get_ref()), (self, nodes), &mut Taken::default());
        match (log.mistakes(), worker) {
            (None, Some(worker)) => Ok(worker.value),
            (mistakes, _) => {
                let mistakes = mistakes.iter().flat_map(super::Mistakes::iter);
                let said: Vec<_> = mistakes.map(|m| format!("{} is {}: {}", m.key, m.value, m.remedy)).collect();
                Err(said.join("; "))
            }
        }
    }
}

/// A `null` inside a value becomes a table, which no key takes there.
fn write_toml(text: &mut String, value: &Value) {
    match value {
        Value::Null => text.push_str("{}"),
        Value::Bool(_) | Value::Number(_) => _ = write!(text, "{value}"),
        // JSON's escapes are TOML's; it leaves only DEL as it is.
        Value::String(_) => text.push_str(&value.to_string().replace('\u{7f}', "\\u007f")),
        Value::Array(items) => {
            text.push('[');
            for item in items {
                write_toml(text, item);
                text.push(',');
            }
            text.push(']');
        }
        Value::Object(entries) => {
            text.push('{');
            for (index, (key, value)) in entries.iter().enumerate() {
                text.push_str(if index == 0 { "" } else { "," });
                write_toml(text, &Value::from(key.as_str()));
                text.push('=');
                write_toml(text, value);
            }
            text.push('}');
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::Environment;

    fn read(keys: &Value) -> Result<Worker, String> {
        let environment = Environment::from_iter([("KEY", "secret")]);
        let reader = Reader { environment, flags: Vec::new(), engines: vec!["vllm"] };
        reader.worker(keys.as_object().unwrap(), &[])
    }

    #[test]
    fn the_rules_are_those_of_the_file() {
        let worker = read(&json!({"url": "http://a:1/x/", "name": "a \u{7f}\"\\\u{1}"}));
        assert!(worker.unwrap_err().starts_with("name is "), "no name has a control character");
        let worker = read(&json!({"url": "http://a:1/x/"})).unwrap();
        assert_eq!((worker.name.as_str(), worker.url.as_str()), ("a:1", "http://a:1/x"));
        let keys = json!({"url": "http://a:1", "name": "é \"q\"", "engine": "vllm", "api_key": {"env": "KEY"},
            "data_parallel": 2, "gpus": ["local/0"], "token_ids": true});
        let worker = read(&keys).unwrap();
        assert_eq!((worker.name.as_str(), worker.engine, worker.gpus.len()), ("é \"q\"", Some("vllm"), 1));
        assert!(worker.api_key.is_some() && worker.token_ids && worker.data_parallel.get() == 2);
        for (keys, expect) in [
            (json!({}), "url is missing"),
            (json!({"url": "http://a/v1"}), "must not end in /v1"),
            (json!({"url": "a:1"}), "url is \"a:1\""),
            (json!({"url": null}), "url is missing"),
            (json!({"url": ["http://a", null]}), "url is a list"),
            (json!({"url": "http://a", "port": 1}), "port is not a known key"),
            (json!({"url": "http://a", "api_key": "very-secret"}), "api_key is (redacted)"),
            (json!({"url": "http://a", "name": 7, "engine": "x"}), "; engine is \"x\""),
            (json!({"url": "http://a", "data_parallel": 1e300}), "data_parallel is 1e"),
        ] {
            let mistakes = read(&keys).unwrap_err();
            assert!(mistakes.contains(expect) && !mistakes.contains("secret"), "{keys}: {mistakes}");
        }
    }
}
