//! OpenAI's list of models, with what engines add to it.

use std::sync::Arc;

use serde_json::Value;

use super::Tensors;

/// One name that a server answers to: a model, an alias of it, or a LoRA adapter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServedModel {
    /// The name to put into a request.
    pub id: String,
    /// Who wrote the list; engines put their own name here.
    pub owned_by: Option<String>,
    /// vLLM: the directory or repository that the weights came from; SGLang says so of adapters.
    pub root: Option<String>,
    /// vLLM: the base model, when this is a LoRA adapter.
    pub parent: Option<String>,
    /// Prompt and output tokens that one sequence may have.
    pub max_model_len: Option<u32>,
    /// Triton: what it takes and gives.
    pub tensors: Option<Arc<Tensors>>,
    /// Triton: another way to a model that is listed before.
    pub alternative: bool,
}

/// Reads `{"data": [{"id": …}, …]}`. `None` when it is not that; an extra that is missing, null or of a strange type is
/// left out.
pub(super) fn read(body: &[u8]) -> Option<Vec<ServedModel>> {
    let answer: Value = serde_json::from_slice(body).ok()?;
    answer.get("data")?.as_array()?.iter().map(entry).collect()
}

fn entry(entry: &Value) -> Option<ServedModel> {
    let text = |key| entry.get(key).and_then(Value::as_str).map(str::to_owned);
    // vLLM and SGLang say `max_model_len`; llama.cpp the context of one slot as `meta.n_ctx` (b11434).
    let length = entry.get("max_model_len").filter(|length| !length.is_null());
    let length = length.or_else(|| entry.get("meta")?.get("n_ctx"));
    Some(ServedModel {
        id: text("id").filter(|id| !id.is_empty())?,
        owned_by: text("owned_by"),
        root: text("root"),
        parent: text("parent"),
        max_model_len: length.and_then(Value::as_u64).and_then(|length| u32::try_from(length).ok()),
        ..ServedModel::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists() {
        let lora = br#"{"object":"list","data":[
            {"id":"base","owned_by":"vllm","root":"/models/base","parent":null,"max_model_len":2048},
            {"id":"lora","owned_by":"vllm","root":"/loras/a","parent":"base","max_model_len":null}]}"#;
        let read = read(lora).expect("a list");
        let [base, lora] = read.as_slice() else { panic!("{read:?}") };
        assert_eq!((base.parent.as_deref(), base.max_model_len), (None, Some(2048)));
        assert_eq!((lora.parent.as_deref(), lora.max_model_len), (Some("base"), None));
    }

    #[test]
    fn not_a_list() {
        for body in [
            "",
            "<html>",
            "[]",
            "{}",
            r#"{"data":null}"#,
            r#"{"data":{}}"#,
            r#"{"data":["x"]}"#,
            r#"{"data":[{"name":"x"}]}"#,
            r#"{"data":[{"id":""}]}"#,
            r#"{"data":[{"id":7}]}"#,
        ] {
            assert_eq!(read(body.as_bytes()), None, "{body}");
        }
        assert_eq!(read(br#"{"data":[]}"#), Some(vec![]));
    }

    #[test]
    fn strange_extras_are_left_out() {
        let body = br#"{"data":[{"id":"x","root":1,"parent":{},"owned_by":[],"max_model_len":-1,"meta":"no"}]}"#;
        assert_eq!(read(body), Some(vec![ServedModel { id: "x".to_owned(), ..ServedModel::default() }]));
        let huge = br#"{"data":[{"id":"x","max_model_len":99999999999}]}"#;
        assert_eq!(read(huge).expect("a list")[0].max_model_len, None);
    }
}
