#![no_main]

use bytes::Bytes;
use forebay_proto::peek::Chat;
use forebay_proto::splice::Edits;
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

fuzz_target!(|body: &[u8]| {
    let Ok(chat) = Chat::peek(body) else { return };
    let mut edits = Edits::new();
    edits.model(&chat.model, "org/\"new\"");
    edits.usage(&chat.streaming);
    edits.cache_salt(&chat.cache_salt_at, "salt");
    let edited = edits.apply(&Bytes::copy_from_slice(body));

    let again = Chat::peek(&edited).expect("still a request");
    assert_eq!(again.model.name, "org/\"new\"");
    assert_eq!(again.cache_salt.as_deref(), Some("salt"));
    assert_eq!(again.streaming.include_usage, chat.streaming.stream);

    let Ok(mut value) = serde_json::from_slice::<Value>(body) else { return };
    value["model"] = json!("org/\"new\"");
    value["cache_salt"] = json!("salt");
    if chat.streaming.stream {
        if value["stream_options"].is_null() {
            value["stream_options"] = json!({});
        }
        value["stream_options"]["include_usage"] = json!(true);
    }
    assert_eq!(serde_json::from_slice::<Value>(&edited).unwrap(), value);
});
