//! What the gateway pays per request and per streamed event for reading bytes.

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use forebay_proto::peek::{Chat, Embedding};
use forebay_proto::splice::Edits;
use forebay_proto::sse::Splitter;
use forebay_proto::stream;
use forebay_proto::tap::Tap;
use std::hint::black_box;

/// As vLLM 0.32 writes it, 190 bytes.
const CHUNK: &str = r#"{"id":"chatcmpl-8fed3f4a2963476b","object":"chat.completion.chunk","created":1795238864,"model":"smollm2","choices":[{"index":0,"delta":{"content":" was"},"logprobs":null,"finish_reason":null,"token_ids":null}]}"#;

fn chat(content_bytes: usize) -> String {
    let turn = r#"{"role":"user","content":"The quick brown fox jumps over the lazy dog,\nthen \"rests\" a while."}"#;
    let turns = vec![turn; content_bytes / turn.len()].join(",");
    format!(r#"{{"model":"org/model","stream":true,"temperature":0.7,"max_tokens":256,"messages":[{turns}]}}"#)
}

fn requests(c: &mut Criterion) {
    let mut group = c.benchmark_group("peek");
    for (name, size) in [("chat 1 KiB", 1 << 10), ("chat 16 KiB", 16 << 10), ("chat 400 KiB", 400 << 10)] {
        let body = chat(size);
        group.throughput(Throughput::Bytes(body.len() as u64));
        group.bench_function(name, |b| b.iter(|| Chat::peek(black_box(body.as_bytes()))));
    }
    let body = format!(r#"{{"model":"m","input":{:?}}}"#, (0..8192).collect::<Vec<_>>());
    group.throughput(Throughput::Bytes(body.len() as u64));
    group.bench_function("embedding of 8192 token ids", |b| b.iter(|| Embedding::peek(black_box(body.as_bytes()))));
    group.finish();

    let body = Bytes::from(chat(16 << 10));
    let peek = Chat::peek(&body).ok();
    c.bench_function("splice/model and usage in 16 KiB", |b| {
        b.iter(|| {
            let mut edits = Edits::new();
            if let Some(chat) = &peek {
                edits.model(&chat.model, "upstream");
                edits.usage(&chat.streaming);
            }
            edits.apply(black_box(&body))
        });
    });
}

fn answers(c: &mut Criterion) {
    c.bench_function("stream/one chunk", |b| b.iter(|| stream::read(black_box(CHUNK.as_bytes()))));

    let events = Bytes::from(format!("data: {CHUNK}\n\n").repeat(64));
    let mut group = c.benchmark_group("sse");
    group.throughput(Throughput::Elements(64));
    for (name, piece) in [("64 events in one chunk", events.len()), ("64 events, all of them cut", 200)] {
        group.bench_function(name, |b| {
            b.iter(|| {
                let mut splitter = Splitter::new(1 << 20);
                let mut bytes = 0;
                for from in (0..events.len()).step_by(piece) {
                    splitter.push(events.slice(from..events.len().min(from + piece)));
                    while let Ok(Some(event)) = splitter.next() {
                        bytes += event.data.map_or(0, |data| data.len());
                    }
                }
                bytes
            });
        });
    }
    group.finish();

    let floats: Vec<f64> = (0..40_000).map(|i| f64::from(i).sin()).collect();
    let answer = format!(r#"{{"data":[{{"embedding":{floats:?}}}],"usage":{{"prompt_tokens":5}}}}"#);
    let text =
        format!(r#"{{"choices":[{{"text":"{}"}}],"usage":{{"prompt_tokens":5}}}}"#, "some words ".repeat(60_000));
    let mut group = c.benchmark_group("tap");
    for (name, answer) in [("floats", answer), ("text", text)] {
        group.throughput(Throughput::Bytes(answer.len() as u64));
        group.bench_function(name, |b| {
            b.iter(|| {
                let mut tap = Tap::new();
                black_box(answer.as_bytes()).chunks(16 << 10).for_each(|chunk| tap.feed(chunk));
                tap.finish()
            });
        });
    }
    group.finish();
}

criterion_group!(benches, requests, answers);
criterion_main!(benches);
