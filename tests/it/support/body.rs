//! What clients ask and what the recorder answers.

use super::recorder::{Step, chunk, json, stream, stream_head};

/// A whole answer that a client of any call takes.
pub(crate) const ANSWER: &str = r#"{"id":"x","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"ok"},"finish_reason":"stop"}],"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}}"#;

/// One message for the model `m`; `more` are further members, each after a comma.
pub(crate) fn chat(text: &str, more: &str) -> String {
    format!(r#"{{"model":"m","messages":[{{"role":"user","content":{text:?}}}]{more}}}"#)
}

/// The same as a stream.
pub(crate) fn streamed(text: &str) -> String {
    chat(text, r#","stream":true"#)
}

/// A prompt of some thousand tokens that shares no prefix with one of another name.
pub(crate) fn long(name: &str) -> String {
    format!("{name}: {}", "the water is let in through the gate, turbine by turbine; ".repeat(80))
}

/// A completion of 256 sequences, as many as are sent to a worker before it has to end some.
pub(crate) fn wide(prompt: &str) -> String {
    format!(r#"{{"model":"m","prompt":[{prompt:?},{prompt:?}],"n":128,"max_tokens":1}}"#)
}

/// One event of a streamed chat.
pub(crate) fn delta(text: &str) -> Vec<u8> {
    format!(
        "data: {{\"id\":\"x\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\
         \"choices\":[{{\"index\":0,\"delta\":{{\"content\":{text:?}}},\"finish_reason\":null}}]}}\n\n"
    )
    .into_bytes()
}

/// The event that finishes it, and the end mark.
pub(crate) const FINISH: &[u8] = b"data: {\"id\":\"x\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n";

/// A whole answer after a gate.
pub(crate) fn held() -> Vec<Step> {
    [vec![Step::Gate], json("200 OK", ANSWER)].concat()
}

/// A streamed answer with a gate after its first event.
pub(crate) fn held_stream() -> Vec<Step> {
    let rest = stream(&[FINISH]).split_off(1);
    [vec![stream_head(), chunk(&delta("first")), Step::Gate], rest].concat()
}

/// A streamed answer that never ends.
pub(crate) fn endless_stream() -> Vec<Step> {
    vec![stream_head(), chunk(&delta("first")), Step::AwaitClose]
}
