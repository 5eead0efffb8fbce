//! What `tokenizer_config.json` and its sister files say: the names of special tokens, and the chat templates.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::error::LoadError;

/// Special tokens by role (`bos_token`, `eos_token`, …), as templates see them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens(pub BTreeMap<String, String>);

/// The roles that `transformers` hands to every template when the model has them.
const ROLES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Chat templates by name; a model with one has it under [`DEFAULT`].
pub(crate) type Templates = BTreeMap<String, String>;

pub(crate) const DEFAULT: &str = "default";
/// The name that `transformers` prefers when a request has tools.
pub(crate) const TOOL_USE: &str = "tool_use";

#[derive(Debug, Default)]
pub(crate) struct Config {
    pub(crate) special: SpecialTokens,
    pub(crate) templates: Templates,
}

impl Config {
    /// Reads `tokenizer_config.json`.
    pub(crate) fn parse(json: &[u8]) -> Result<Self, LoadError> {
        let object = object("tokenizer_config.json", json)?;
        let mut config = Self { templates: templates(object.get("chat_template")), ..Self::default() };
        config.read_special(&object);
        Ok(config)
    }

    /// Adds what `special_tokens_map.json` names and the configuration left out.
    pub(crate) fn add_special_tokens_map(&mut self, json: &[u8]) -> Result<(), LoadError> {
        self.read_special(&object("special_tokens_map.json", json)?);
        Ok(())
    }

    /// Takes `chat_template.json`, the older file beside it: `{"chat_template": …}`.
    pub(crate) fn set_template_json(&mut self, json: &[u8]) -> Result<(), LoadError> {
        let found = templates(object("chat_template.json", json)?.get("chat_template"));
        if !found.is_empty() {
            self.templates = found;
        }
        Ok(())
    }

    /// Takes `chat_template.jinja`, which wins over a default template from elsewhere.
    pub(crate) fn set_template(&mut self, text: String) {
        self.templates.insert(DEFAULT.to_owned(), text);
    }

    fn read_special(&mut self, object: &Map<String, Value>) {
        for role in ROLES {
            if let Some(token) = object.get(role).and_then(token_text) {
                self.special.0.entry(role.to_owned()).or_insert_with(|| token.to_owned());
            }
        }
    }
}

/// A token is written as its text, or as an object with its text as `content`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// One template as a string, or a list of `{"name": …, "template": …}`.
fn templates(value: Option<&Value>) -> Templates {
    match value {
        Some(Value::String(text)) => Templates::from([(DEFAULT.to_owned(), text.clone())]),
        Some(Value::Array(list)) => list
            .iter()
            .filter_map(|entry| {
                Some((entry.get("name")?.as_str()?.to_owned(), entry.get("template")?.as_str()?.to_owned()))
            })
            .collect(),
        _ => Templates::new(),
    }
}

fn object(file: &'static str, json: &[u8]) -> Result<Map<String, Value>, LoadError> {
    serde_json::from_slice(json).map_err(|error| LoadError::Invalid { file, message: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_strings_or_objects_and_null_is_none() {
        let json = br#"{"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>", "pad_token": null}"#;
        let config = Config::parse(json).unwrap();
        let found: Vec<_> = config.special.0.iter().map(|(role, token)| (role.as_str(), token.as_str())).collect();
        assert_eq!(found, [("bos_token", "<s>"), ("eos_token", "</s>")]);
    }

    #[test]
    fn the_configuration_wins_over_the_map_and_the_file_over_both_templates() {
        let mut config = Config::parse(br#"{"eos_token": "a", "chat_template": "one"}"#).unwrap();
        config.add_special_tokens_map(br#"{"eos_token": "b", "bos_token": "c"}"#).unwrap();
        assert_eq!(config.special.0["eos_token"], "a");
        assert_eq!(config.special.0["bos_token"], "c");
        config.set_template_json(br#"{"chat_template": "two"}"#).unwrap();
        assert_eq!(config.templates[DEFAULT], "two");
        config.set_template("three".to_owned());
        assert_eq!(config.templates[DEFAULT], "three");
    }

    #[test]
    fn named_templates_are_a_list() {
        let json =
            br#"{"chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]}"#;
        let config = Config::parse(json).unwrap();
        assert_eq!(config.templates.len(), 2);
        assert_eq!(config.templates[TOOL_USE], "t");
    }

    #[test]
    fn what_is_not_an_object_is_refused_by_file_name() {
        let error = Config::parse(b"[]").unwrap_err();
        assert!(error.to_string().starts_with("`tokenizer_config.json` is not what it should be"), "{error}");
    }
}
