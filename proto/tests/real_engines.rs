//! Reads what real engines sent: recorded answers of vLLM and llama.cpp, cut everywhere.
//!
//! The recordings lie outside this repository, in the folder that `FOREBAY_SHARED_DIR` names (default: `shared` beside
//! the checkout). Without it these tests say so in one line and pass.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test's helper fails as the test does")]

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Once;

use bytes::Bytes;
use forebay_proto::peek::{Chat, Completion, Detokenize, Embedding, Tokenize};
use forebay_proto::sse::{End, Event, Splitter};
use forebay_proto::stream::{Chunk, Completeness, Usage, read};
use forebay_proto::tap::Tap;
use forebay_proto::{error, kv_events, metrics_text};

struct Answer {
    status: u16,
    content_type: String,
    body: Bytes,
}

/// Recordings whose file ends in `suffix`, by engine and name, as in `vllm/chat-stream`.
fn recorded(suffix: &str) -> BTreeMap<String, Vec<u8>> {
    let shared = std::env::var_os("FOREBAY_SHARED_DIR")
        .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared")), PathBuf::from);
    let samples = shared.join("real-engines/samples");
    if !samples.is_dir() {
        static SAID: Once = Once::new();
        SAID.call_once(|| {
            // `eprintln!` goes through the test harness, which keeps it to itself.
            let line = format!("skipped: {} not found\n", samples.display());
            std::io::stderr().write_all(line.as_bytes()).unwrap();
        });
        return BTreeMap::new();
    }
    let mut files = BTreeMap::new();
    for engine in ["vllm", "vllm-embed", "llamacpp"] {
        let folder = std::fs::read_dir(samples.join(engine)).unwrap();
        for file in folder.map(|entry| entry.unwrap().path()) {
            let name = file.file_name().unwrap().to_str().unwrap().to_owned();
            if let Some(name) = name.strip_suffix(suffix) {
                files.insert(format!("{engine}/{name}"), std::fs::read(&file).unwrap());
            }
        }
    }
    files
}

/// Head and rest of an HTTP/1.1 message; header names in lower case.
fn head(message: &[u8]) -> (String, BTreeMap<String, String>, &[u8]) {
    let end = memchr::memmem::find(message, b"\r\n\r\n").unwrap();
    let text = String::from_utf8(message[..end].to_vec()).unwrap();
    let mut lines = text.split("\r\n");
    let first = lines.next().unwrap().to_owned();
    let headers = lines.filter_map(|line| line.split_once(':')).map(|(k, v)| (k.to_lowercase(), v.trim().to_owned()));
    (first, headers.collect(), &message[end + 4..])
}

/// The bytes of a chunked body, as far as they were received.
fn dechunked(mut body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    while let Some(end) = memchr::memmem::find(body, b"\r\n") {
        let size = std::str::from_utf8(&body[..end]).unwrap();
        let size = usize::from_str_radix(size.trim(), 16).unwrap();
        let chunk = &body[end + 2..];
        out.extend_from_slice(&chunk[..size.min(chunk.len())]);
        if size == 0 || chunk.len() < size + 2 {
            break;
        }
        body = &chunk[size + 2..];
    }
    out
}

fn body_of(headers: &BTreeMap<String, String>, rest: &[u8]) -> Bytes {
    if headers.get("transfer-encoding").is_some_and(|encoding| encoding == "chunked") {
        return dechunked(rest).into();
    }
    let length = headers.get("content-length").map_or(rest.len(), |length| length.parse().unwrap());
    Bytes::copy_from_slice(&rest[..length.min(rest.len())])
}

fn answers() -> BTreeMap<String, Answer> {
    let parse = |message: Vec<u8>| {
        let (first, headers, rest) = head(&message);
        Answer {
            status: first.split(' ').nth(1).unwrap().parse().unwrap(),
            content_type: headers.get("content-type").cloned().unwrap_or_default(),
            body: body_of(&headers, rest),
        }
    };
    recorded(".response.http").into_iter().map(|(name, message)| (name, parse(message))).collect()
}

/// Path and body.
fn requests() -> BTreeMap<String, (String, Bytes)> {
    let parse = |message: Vec<u8>| {
        let (first, headers, rest) = head(&message);
        (first.split(' ').nth(1).unwrap_or_default().to_owned(), body_of(&headers, rest))
    };
    let well_formed = |(name, message): (String, Vec<u8>)| {
        (memchr::memmem::find(&message, b"\r\n\r\n").is_some()).then(|| (name, parse(message)))
    };
    recorded(".request.http").into_iter().filter_map(well_formed).collect()
}

/// Every place of a body up to `everywhere` bytes, some thousand evenly spread places of a longer one.
fn cuts(length: usize, everywhere: usize) -> impl Iterator<Item = usize> {
    (0..=length).step_by(if length <= everywhere { 1 } else { length.div_ceil(1000) })
}

/// All events, and what is left, of a stream that arrives as `pieces`.
fn split<const N: usize>(pieces: [Bytes; N]) -> (Vec<Event>, Option<End>) {
    let mut splitter = Splitter::new(1 << 20);
    let mut events = Vec::new();
    for piece in pieces {
        splitter.push(piece);
        while let Some(event) = splitter.next().unwrap() {
            events.push(event);
        }
    }
    (events, splitter.finish())
}

#[test]
fn streams_give_the_same_events_wherever_they_are_cut() {
    for (name, answer) in answers() {
        if !answer.content_type.starts_with("text/event-stream") {
            continue;
        }
        let body = answer.body;
        let whole = split([body.clone()]);
        assert!(!whole.0.is_empty(), "{name}");
        for at in cuts(body.len(), 8 << 10) {
            assert_eq!(split([body.slice(..at), body.slice(at..)]), whole, "{name} cut at {at}");
        }
        let mut joined: Vec<u8> = whole.0.iter().flat_map(|event| event.raw.to_vec()).collect();
        if let Some(End::Whole(event) | End::Cut(event)) = &whole.1 {
            joined.extend_from_slice(&event.raw);
        }
        assert_eq!(joined, body, "{name}");
    }
}

#[test]
fn streams_are_understood() {
    let requests = requests();
    for (name, answer) in answers() {
        let of_openai = ["chat", "completion", "disconnect", "failure", "error"].iter().any(|api| name.contains(api));
        if !answer.content_type.starts_with("text/event-stream") || !of_openai {
            continue;
        }
        let broken = name.contains("failure") || name.contains("disconnect");
        let request = requests.get(&name).map(|(_, body)| body);
        let choices = request.and_then(|body| Chat::peek(body).ok()).map_or(1, |chat| chat.n);
        let asked = request.is_some_and(|body| memchr::memmem::find(body, b"include_usage").is_some());

        let mut progress = Completeness::new(choices);
        let (mut done, mut errors, mut output, mut usage) = (0, 0, 0, None);
        for event in split([answer.body]).0 {
            match read(&event.data.unwrap()) {
                Chunk::Done => done += 1,
                Chunk::Error { error, status } => {
                    errors += 1;
                    assert_eq!((error.kind.as_str(), status), ("server_error", Some(500)), "{name}");
                }
                Chunk::Delta(delta) => {
                    progress.observe(&delta);
                    output += usize::from(delta.has_content);
                    assert_eq!(delta.usage_only, delta.choices.is_empty(), "{name}");
                    usage = delta.usage.or(usage);
                }
                Chunk::Malformed => panic!("{name}: {:?}", event.raw),
            }
        }
        assert_eq!(errors, usize::from(name.ends_with("failure-core-stream")), "{name}");
        assert_eq!(progress.complete(), !broken, "{name}");
        assert_eq!(done, usize::from(!broken) + errors, "{name}");
        assert!(output > 0, "{name}");
        if asked && !broken {
            let usage: Usage = usage.unwrap();
            assert!(usage.prompt_tokens > 0 && usage.completion_tokens > 0, "{name}");
        }
    }
}

#[test]
fn usage_of_whole_answers_wherever_they_are_cut() {
    for (name, answer) in answers() {
        let Ok(value) = serde_json::from_slice::<serde_json::Value>(&answer.body) else { continue };
        let tapped = |pieces: &[&[u8]]| {
            let mut tap = Tap::new();
            pieces.iter().for_each(|piece| tap.feed(piece));
            tap.finish()
        };
        let whole = tapped(&[&answer.body]);
        let told = value.get("usage").and_then(|usage| usage.get("prompt_tokens")).and_then(serde_json::Value::as_u64);
        if value.get("usage").is_some_and(|usage| usage.get("input_tokens").is_none()) {
            assert_eq!(whole.map(|usage| usage.prompt_tokens), told, "{name}");
        }
        for at in cuts(answer.body.len(), 1 << 10) {
            assert_eq!(tapped(&[&answer.body[..at], &answer.body[at..]]), whole, "{name} cut at {at}");
        }
    }
}

#[test]
fn errors_are_understood() {
    for (name, answer) in answers() {
        if answer.status < 400 {
            continue;
        }
        let got = error::from_engine(answer.status, &answer.body);
        let expect = match answer.status {
            400..=499 => "invalid_request_error",
            503 => "service_unavailable_error",
            _ => "server_error",
        };
        assert_eq!(got.kind, expect, "{name}");
        assert_eq!(got.message.contains("no readable message"), answer.body.is_empty(), "{name}: {}", got.message);
        assert!(!got.message.contains("127.0.0.1"), "{name}: {}", got.message);
        let code = match name.rsplit('/').next().unwrap() {
            "error-prompt-too-long"
            | "error-prompt-too-long-stream"
            | "error-prompt-too-long-completion"
            | "error-too-long"
            | "error-max-tokens-over-context" => Some("context_length_exceeded"),
            "error-unknown-model" | "error-unknown-model-stream" => Some("model_not_found"),
            _ => None,
        };
        assert_eq!(got.code.as_deref(), code, "{name}: {}", got.message);
    }
}

#[test]
fn requests_are_read() {
    // What no engine takes, or what is not what its path says, is refused here too.
    let refused = [
        "empty-body",
        "empty-messages",
        "invalid-json",
        "max-tokens-negative",
        "max-tokens-zero",
        "messages-wrong-type",
        "n-zero",
        "no-messages",
        "not-utf8",
        "stream-options-without-stream",
        "empty-list",
        "no-input",
    ];
    for (name, (path, body)) in requests() {
        let result = match path.as_str() {
            _ if name.contains("get-not-allowed") || name.contains("preflight") => continue,
            "/v1/chat/completions" => Chat::peek(&body).map(|_| ()),
            "/v1/completions" => Completion::peek(&body).map(|_| ()),
            "/v1/embeddings" => Embedding::peek(&body).map(|_| ()),
            "/tokenize" if name.starts_with("vllm") => Tokenize::peek(&body).map(|_| ()),
            "/detokenize" => Detokenize::peek(&body).map(|_| ()),
            _ => continue,
        };
        let expect = refused.iter().any(|case| name.ends_with(&format!("error-{case}")));
        assert_eq!(result.is_err(), expect, "{name}: {result:?}");
    }
}

#[test]
fn metrics_are_read_to_the_last_line() {
    for (name, answer) in answers() {
        if !name.contains("/metrics") {
            continue;
        }
        let lines =
            answer.body.split(|b| *b == b'\n').filter(|line| !line.is_empty() && !line.starts_with(b"#")).count();
        assert!(lines > 5, "{name}");
        assert_eq!(metrics_text::samples(&answer.body).count(), lines, "{name}");
        let running = metrics_text::samples(&answer.body)
            .find(|sample| matches!(sample.name, "vllm:num_requests_running" | "llamacpp:requests_processing"))
            .unwrap();
        assert!(running.value >= 0.0);
        if name.starts_with("vllm/") {
            assert_eq!(running.labels.get("model_name").as_deref(), Some("smollm2"), "{name}");
        }
    }
}

#[test]
fn kv_events_are_read_as_they_are_and_refused_when_cut() {
    let bytes = |hex: &str| -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
    };
    for (name, lines) in recorded(".jsonl") {
        for line in std::str::from_utf8(&lines).unwrap().lines() {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            let payload = bytes(line["frames_hex"][2].as_str().unwrap());
            let events = kv_events::read(&payload).unwrap();
            let expected = line["decoded"][1].as_array().unwrap();
            assert_eq!(events.len(), expected.len(), "{name}");
            for (event, expected) in events.iter().zip(expected) {
                let kv_events::Event::Stored(stored) = event else { panic!("{name}: {event:?}") };
                let numbers = |field: &str| -> Vec<u64> {
                    expected[field].as_array().unwrap().iter().map(|number| number.as_u64().unwrap()).collect()
                };
                assert_eq!(expected["type"], "BlockStored");
                assert_eq!(stored.blocks.iter().map(|hash| hash.0).collect::<Vec<_>>(), numbers("block_hashes"));
                assert_eq!(stored.tokens.iter().map(|id| u64::from(*id)).collect::<Vec<_>>(), numbers("token_ids"));
                assert_eq!(u64::from(stored.block_tokens), expected["block_size"].as_u64().unwrap());
                assert!(stored.place.on_gpu && stored.place.full_attention && stored.place.group == Some(0));
                assert_eq!((stored.plain, &stored.parent, &stored.salt), (stored.blocks.len(), &None, &None));
            }
            for end in 0..payload.len() {
                assert!(kv_events::read(&payload[..end]).is_err(), "{name} cut at {end}");
            }
        }
    }
}
