//! CPU for one event of a stream: as an engine of OpenAI's dialect writes it, and translated from another's wire.
//!
//!     cargo bench -p forebay-backends

use std::{hint::black_box, path::Path, sync::Arc};

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use forebay_backends::engines::{Api, Asked, Tensors, Translation, by_name, prepare};
use forebay_tokens::Tokenizer;

const EVENTS: usize = 64;

/// How a stream's answer is translated.
type Way = Box<dyn Fn() -> Option<Translation>>;

/// The translation of a stream's answer by this engine, and a stream of so many events with this one.
fn case(engine: &str, body: &'static str, openai_routes: bool, event: &str) -> (Way, Bytes) {
    let engine = by_name(engine);
    let translation = move || {
        let mut asked = Asked::new(Api::ChatCompletions, Bytes::from_static(body.as_bytes()), true);
        asked.server.openai_routes = openai_routes;
        asked.written.text = Some("hi".to_owned());
        prepare(engine?, asked).ok()?.translation
    };
    (Box::new(translation), event.repeat(EVENTS).into())
}

/// The same of a model of Triton's with these inputs, and events with this one tensor, in the bytes of the wire.
fn triton(inputs: &[(&str, u64)], (output, kind, raw): (&str, &str, Vec<u8>)) -> (Way, Bytes) {
    const CHAT: &str = r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true,"max_tokens":1000}"#;
    let input = |(name, kind): &(&str, u64)| message(5, &[message(1, name.as_bytes()), number(2, *kind)].concat());
    let output_there = message(6, &message(1, output.as_bytes()));
    let inputs: Vec<u8> = inputs.iter().flat_map(input).collect();
    let decoupled = message(19, &number(1, 1));
    let tensors = Tensors::read(&[number(4, 8), inputs, output_there, decoupled].concat()).map(Arc::new);
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("simulated-engine/model");
    let tokenizer = Tokenizer::from_dir(&model).ok().map(Arc::new);
    let translation = move || {
        let mut asked = Asked::new(Api::ChatCompletions, Bytes::from_static(CHAT.as_bytes()), true);
        asked.server.tensors.clone_from(&tensors);
        asked.written.text = Some("hi".to_owned());
        asked.written.ids = Some(vec![10, 20, 30]);
        asked.written.tokenizer.clone_from(&tokenizer);
        prepare(by_name("triton")?, asked).ok()?.translation
    };
    let tensor = [message(1, output.as_bytes()), message(2, kind.as_bytes()), message(3, &[1, 1])].concat();
    let response = [message(1, b"m"), message(5, &tensor), message(6, &raw)].concat();
    let event = message(2, &response);
    let length = u32::try_from(event.len()).unwrap_or_default().to_be_bytes();
    (Box::new(translation), [&[0][..], &length, &event].concat().repeat(EVENTS).into())
}

/// A field of a message: its number, and bytes.
fn message(number: u64, bytes: &[u8]) -> Vec<u8> {
    [varint(number << 3 | 2), varint(bytes.len() as u64), bytes.to_vec()].concat()
}

fn number(number: u64, value: u64) -> Vec<u8> {
    [varint(number << 3), varint(value)].concat()
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

fn translate(criterion: &mut Criterion) {
    const CHAT: &str = r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true}"#;
    const OWN: &str = r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true,"top_k":5}"#;
    let chunk = |delta: &str| {
        format!(
            "data: {{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\
             \"choices\":[{{\"index\":0,\"delta\":{delta},\"logprobs\":null,\"finish_reason\":null}}]}}\n\n"
        )
    };
    let call = r#"{"role":"assistant","tool_calls":[{"index":0,"id":"0","type":"function","function":{"name":null,"arguments":"x"}}]}"#;
    let token = "data:{\"index\":1,\"token\":{\"id\":1,\"text\":\" word\",\"logprob\":-0.5,\"special\":false},\
                 \"generated_text\":null,\"details\":null}\n\n";
    let line = "{\"model\":\"m\",\"created_at\":\"2026-01-01T00:00:00Z\",\"message\":{\"role\":\"assistant\",\
                \"content\":\" word\"},\"done\":false}\n";
    const INT32: u64 = 8;
    const STRING: u64 = 13;
    let by_text = [("text_input", STRING), ("max_tokens", INT32)];
    let by_ids = [("input_ids", INT32), ("input_lengths", INT32), ("request_output_len", INT32), ("end_id", INT32)];
    let word = [&5_u32.to_le_bytes()[..], b" word"].concat();
    let mut group = criterion.benchmark_group("translate");
    group.throughput(Throughput::Elements(EVENTS as u64));
    for (name, (translation, stream)) in [
        ("as it came (SGLang)", case("sglang", CHAT, true, &chunk(r#"{"content":" word"}"#))),
        ("thinking (SGLang)", case("sglang", CHAT, true, &chunk(r#"{"reasoning_content":" word"}"#))),
        ("as it came (TGI)", case("tgi", CHAT, true, &chunk(r#"{"content":" word"}"#))),
        ("tool call (TGI)", case("tgi", CHAT, true, &chunk(call))),
        ("/generate_stream (TGI)", case("tgi", CHAT, false, token)),
        ("/api/chat (Ollama)", case("ollama", OWN, true, line)),
        ("text (Triton)", triton(&by_text, ("text_output", "BYTES", word))),
        ("token ids (Triton)", triton(&by_ids, ("output_ids", "INT32", 300_u32.to_le_bytes().to_vec()))),
    ] {
        let said = translation().and_then(|mut translation| translation.push(stream.clone()).ok());
        let events = said.map_or(0, |said| said.windows(6).filter(|window| window == b"data: ").count());
        assert!(events >= EVENTS, "{name} says {events} events");
        // Each stream begins with a request of its own; what that costs is spread over its events.
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let mut translation = translation()?;
                black_box(translation.push(stream.clone()).ok())
            });
        });
    }
    group.finish();
}

criterion_group!(benches, translate);
criterion_main!(benches);
