#![no_main]

use forebay_proto::peek::{Chat, Completion, Detokenize, Embedding, Place, Span, Tokenize};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fuzz_target!(|body: &[u8]| {
    let _ = Completion::peek(body);
    let _ = Embedding::peek(body);
    let _ = Tokenize::peek(body);
    let _ = Detokenize::peek(body);
    let Ok(chat) = Chat::peek(body) else { return };
    let at = |span: &Span| &body[span.clone()];
    if let Place::Value(span) = &chat.model.at {
        let name = serde_json::from_slice::<Option<String>>(at(span)).unwrap();
        assert_eq!(name.unwrap_or_default(), chat.model.name);
    }
    assert!(at(&chat.messages).starts_with(b"[") && at(&chat.messages).ends_with(b"]"));
    // A whole parse gives up on deep nesting and on half surrogate pairs in fields that are not ours.
    let Ok(whole) = serde_json::from_slice::<Value>(body) else { return };
    assert_eq!(whole["model"].as_str().unwrap_or_default(), chat.model.name);
    assert_eq!(whole["stream"] == Value::from(true), chat.streaming.stream);
    assert_eq!(whole["stream_options"]["include_usage"] == Value::from(true), chat.streaming.include_usage);
});
