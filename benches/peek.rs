//! What reading costs per request and per event: the peek at a body, the splice that asks for usage, and the way of one
//! stream event through splitter and reader.

use std::hint::black_box;

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use forebay_proto::peek::Chat;
use forebay_proto::splice::Edits;
use forebay_proto::sse::Splitter;
use forebay_proto::stream;

/// Characters as prompts of prose have them: here and there one that JSON escapes, and one of more than one byte.
const SENTENCE: &str =
    "The gates open by a hand's width, \"the water leans forward\" – and the first blades begin to turn.\n";
/// Length of one message of a conversation.
const MESSAGE_BYTES: usize = 2000;

/// A streamed conversation of at least `bytes`.
fn chat(bytes: usize) -> Bytes {
    let text: String = SENTENCE.chars().cycle().take(MESSAGE_BYTES.min(bytes)).collect();
    let roles = ["user", "assistant"].iter().cycle();
    let messages = roles.map(|role| serde_json::json!({"role": role, "content": text}));
    let messages: Vec<_> = messages.take((bytes / MESSAGE_BYTES).max(1)).collect();
    let body = serde_json::json!({"model": "llama-3.1-8b", "stream": true, "temperature": 0.7, "messages": messages});
    body.to_string().into()
}

fn bodies(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("peek");
    for (name, bytes) in [("1 KB", 1_000), ("16 KB", 16_000), ("200 KB", 200_000)] {
        let body = chat(bytes);
        group.throughput(Throughput::Bytes(body.len() as u64));
        group.bench_with_input(BenchmarkId::new("chat", name), &body, |bencher, body| {
            bencher.iter(|| Chat::peek(black_box(body)));
        });
    }
    group.finish();

    let mut group = criterion.benchmark_group("splice");
    for (name, bytes) in [("1 KB", 1_000), ("16 KB", 16_000), ("200 KB", 200_000)] {
        let body = chat(bytes);
        let Ok(peeked) = Chat::peek(&body) else { continue };
        group.throughput(Throughput::Bytes(body.len() as u64));
        group.bench_with_input(BenchmarkId::new("usage", name), &body, |bencher, body| {
            bencher.iter(|| {
                let mut edits = Edits::new();
                edits.usage(black_box(&peeked.streaming));
                edits.apply(body)
            });
        });
    }
    group.finish();
}

/// Events as vLLM writes them, with what stands in them.
const EVENTS: [(&str, &str); 3] = [
    (
        "content",
        r#"data: {"id":"chatcmpl-6b0e","object":"chat.completion.chunk","created":1700000000,"model":"llama-3.1-8b","choices":[{"index":0,"delta":{"content":" water"},"logprobs":null,"finish_reason":null,"token_ids":null}]}"#,
    ),
    (
        "usage",
        r#"data: {"id":"chatcmpl-6b0e","object":"chat.completion.chunk","created":1700000000,"model":"llama-3.1-8b","choices":[],"usage":{"prompt_tokens":32,"total_tokens":96,"completion_tokens":64}}"#,
    ),
    ("done", "data: [DONE]"),
];

fn events(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("event");
    for (name, event) in EVENTS {
        let event = Bytes::from(format!("{event}\n\n"));
        group.throughput(Throughput::Elements(1));
        let mut splitter = Splitter::new(1 << 20);
        group.bench_with_input(BenchmarkId::new("split and read", name), &event, |bencher, event| {
            bencher.iter(|| {
                splitter.push(event.clone());
                splitter.next().ok().flatten().and_then(|event| Some(stream::read(&event.data?)))
            });
        });
    }
    // What a chunk of a busy connection is like: many events at once, the last one cut.
    let many: Vec<u8> =
        EVENTS.first().map(|(_, event)| format!("{event}\n\n").into_bytes().repeat(22)).unwrap_or_default();
    let (begin, rest) = many.split_at(many.len() - 100);
    let (begin, rest) = (Bytes::copy_from_slice(begin), Bytes::copy_from_slice(rest));
    group.throughput(Throughput::Elements(22));
    let mut splitter = Splitter::new(1 << 20);
    group.bench_function("split and read/22 in two pieces", |bencher| {
        bencher.iter(|| {
            let mut read = 0;
            for piece in [&begin, &rest] {
                splitter.push(piece.clone());
                while let Ok(Some(event)) = splitter.next() {
                    read += usize::from(event.data.is_some_and(|data| stream::read(&data) != stream::Chunk::Malformed));
                }
            }
            read
        });
    });
    group.finish();
}

criterion_group!(benches, bodies, events);
criterion_main!(benches);
