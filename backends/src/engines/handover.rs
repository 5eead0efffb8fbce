//! A prompt that one server computes and another goes on from, as vLLM's connectors do it (`kv_transfer_params`).
//!
//! The first is asked for one token, which nobody sees; with its answer comes what the second needs to fetch the cache.
//! That is nobody's here to read: it is moved as it came. A server keeps the cache until it was fetched, or a lease ends.

use std::time::Duration;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{Api, members::Members};

/// What asks a server to compute a prompt and to keep its cache for another.
const KEEP: &str = concat!(
    r#"{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"#,
    r#""remote_block_ids":null,"remote_host":null,"remote_port":null}"#
);
const PARAMS: &str = "kv_transfer_params";
/// How long a cache is taken to be kept where its server says nothing of it: vLLM's lease is 30 s (`kv_lease_duration`),
/// which began before its answer came.
const KEPT: Duration = Duration::from_secs(20);
/// Of the answer to a prompt alone only the first token is asked for, and of that nothing more than itself.
const IDLE: [&str; 6] = ["stream_options", "min_tokens", "logprobs", "top_logprobs", "return_token_ids", "echo"];
/// What cannot be done by two: several sequences would each fetch the cache, log probabilities of a prompt are those of
/// whoever computes it, and who brings a cache already is not to be given another.
const UNDIVIDED: [&str; 4] = [PARAMS, "best_of", "use_beam_search", "prompt_logprobs"];

/// Whether to call a tool is the model's to say. A call that was asked for is checked by the engine, and one token is none;
/// without that choice another prompt may be written.
const FREE_CHOICES: [&str; 2] = [r#""auto""#, r#""none""#];

/// A cache that a server keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// JSON, for the server that is to fetch it.
    params: String,
    /// From its server's answer on.
    pub time: Duration,
}

/// The request for the prompt alone; `None` where two servers cannot do it, each a part.
#[must_use]
pub fn prompt_alone(api: Api, body: &Bytes) -> Option<Bytes> {
    let mut members = Members::read(body)?;
    if !matches!(api, Api::ChatCompletions | Api::Completions)
        || UNDIVIDED.iter().any(|name| members.get(name).is_some())
        || members.get("tool_choice").is_some_and(|choice| !FREE_CHOICES.contains(&choice))
    {
        return None;
    }
    IDLE.iter().for_each(|name| drop(members.remove(name)));
    members.set("stream", &false.into());
    members.set("max_tokens", &1.into());
    if api == Api::ChatCompletions {
        members.set("max_completion_tokens", &1.into());
    }
    members.put(PARAMS, KEEP.to_owned());
    Some(members.write(body))
}

/// What the answer to that says of the cache, `since_epoch` by the wall clock; `None`: there is nothing to fetch.
#[must_use]
pub fn kept(answer: &[u8], since_epoch: Duration) -> Option<Kept> {
    #[derive(Deserialize)]
    struct Given<'a> {
        #[serde(borrow)]
        kv_transfer_params: Option<&'a RawValue>,
    }
    #[derive(Deserialize)]
    struct Params {
        do_remote_prefill: Option<bool>,
        remote_blocks_expiry_time: Option<f64>,
    }
    let given: Given<'_> = serde_json::from_slice(answer).ok()?;
    let text = given.kv_transfer_params?.get();
    let params: Params = serde_json::from_str(text).ok()?;
    let left = |expires: f64| Duration::try_from_secs_f64(expires - since_epoch.as_secs_f64()).unwrap_or_default();
    let time = params.remote_blocks_expiry_time.map_or(KEPT, |expires| left(expires).min(KEPT));
    (params.do_remote_prefill != Some(false)).then(|| Kept { params: text.to_owned(), time })
}

/// The request with the cache of its prompt.
#[must_use]
pub fn go_on(body: &Bytes, kept: &Kept) -> Option<Bytes> {
    let mut members = Members::read(body)?;
    members.put(PARAMS, kept.params.clone());
    Some(members.write(body))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn alone(api: Api, body: &Value) -> Option<Value> {
        prompt_alone(api, &body.to_string().into()).map(|body| serde_json::from_slice(&body).expect("JSON"))
    }

    #[test]
    fn the_prompt_alone_keeps_what_the_prompt_depends_on() {
        let asked = json!({"model": "m", "messages": [{"role": "user", "content": "a"}], "tools": [{}], "cache_salt": "s",
            "stream": true, "stream_options": {"include_usage": true}, "max_tokens": 100, "min_tokens": 5,
            "logprobs": true, "top_logprobs": 2, "tool_choice": "auto", "x": 1.50});
        let keep: Value = serde_json::from_str(KEEP).expect("JSON");
        let expected = json!({"model": "m", "messages": [{"role": "user", "content": "a"}], "tools": [{}],
            "cache_salt": "s", "tool_choice": "auto", "x": 1.5, "stream": false, "max_tokens": 1,
            "max_completion_tokens": 1, "kv_transfer_params": keep});
        assert_eq!(alone(Api::ChatCompletions, &asked), Some(expected));
        let completion = alone(Api::Completions, &json!({"prompt": [1, 2], "max_tokens": null})).expect("a part");
        assert_eq!(completion, json!({"prompt": [1, 2], "stream": false, "max_tokens": 1, "kv_transfer_params": keep}));
    }

    #[test]
    fn what_two_cannot_do_is_left_whole() {
        for member in ["kv_transfer_params", "best_of", "use_beam_search", "prompt_logprobs"] {
            assert_eq!(alone(Api::Completions, &json!({"prompt": "a", member: 1})), None, "{member}");
            assert!(alone(Api::Completions, &json!({"prompt": "a", member: null})).is_some(), "{member}");
        }
        let forced = [json!("required"), json!({"type": "function", "function": {"name": "f"}})];
        for (choice, divides) in forced.map(|choice| (choice, false)).into_iter().chain([(json!("none"), true)]) {
            let asked = json!({"messages": [], "tools": [{}], "tool_choice": choice});
            assert_eq!(alone(Api::ChatCompletions, &asked).is_some(), divides, "{choice}");
        }
        assert_eq!(alone(Api::Embeddings, &json!({"input": "a"})), None);
        assert_eq!(prompt_alone(Api::Completions, &Bytes::from_static(b"[]")), None);
    }

    #[test]
    fn what_is_given_is_moved_to_the_byte() {
        let params = r#"{"do_remote_prefill": true,"remote_block_ids":[[1,2]],  "remote_port":5600,"new":1.50}"#;
        let answer = format!(r#"{{"id":"x","choices":[],"kv_transfer_params":{params}}}"#);
        let kept = kept(answer.as_bytes(), Duration::ZERO).expect("something to fetch");
        assert_eq!(kept.time, KEPT);
        let body = go_on(&Bytes::from_static(br#"{"model":"m","stream":true,"n":1.0}"#), &kept).expect("a request");
        assert_eq!(body, format!(r#"{{"model":"m","stream":true,"n":1.0,"kv_transfer_params":{params}}}"#));
    }

    #[test]
    fn what_is_not_kept_is_not_fetched() {
        let time = |params: &str| {
            let answer = format!(r#"{{"kv_transfer_params":{params}}}"#);
            kept(answer.as_bytes(), Duration::from_secs(1_700_000_000)).map(|kept| kept.time.as_secs())
        };
        assert_eq!(time("{}"), Some(20));
        assert_eq!(time(r#"{"remote_blocks_expiry_time":1700000005.5}"#), Some(5));
        assert_eq!(time(r#"{"remote_blocks_expiry_time":1800000000}"#), Some(20), "no longer than is sure");
        assert_eq!(time(r#"{"remote_blocks_expiry_time":3.5}"#), Some(0), "gone");
        for none in ["null", "7", r#"{"do_remote_prefill":false}"#, r#"{"remote_blocks_expiry_time":"x"}"#] {
            assert_eq!(time(none), None, "{none}");
        }
        for none in ["", "{}", "[]", "\u{0}"] {
            assert_eq!(kept(none.as_bytes(), Duration::ZERO), None, "{none}");
        }
    }
}
