//! CPU for one event of a stream: as an engine of OpenAI's dialect writes it, and translated from another's wire.
//!
//!     cargo bench -p forebay-backends

use std::hint::black_box;

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use forebay_backends::engines::{Api, Asked, Translation, by_name, prepare};

const EVENTS: usize = 64;

/// The translation of a stream's answer by this engine, and a stream of so many events with this one.
fn case(
    engine: &str,
    body: &'static str,
    openai_routes: bool,
    event: &str,
) -> (impl Fn() -> Option<Translation>, Bytes) {
    let engine = by_name(engine);
    let translation = move || {
        let mut asked = Asked::new(Api::ChatCompletions, Bytes::from_static(body.as_bytes()), true);
        asked.server.openai_routes = openai_routes;
        asked.written.text = Some("hi".to_owned());
        prepare(engine?, asked).ok()?.translation
    };
    (translation, event.repeat(EVENTS).into())
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
    let mut group = criterion.benchmark_group("translate");
    group.throughput(Throughput::Elements(EVENTS as u64));
    for (name, (translation, stream)) in [
        ("as it came (SGLang)", case("sglang", CHAT, true, &chunk(r#"{"content":" word"}"#))),
        ("thinking (SGLang)", case("sglang", CHAT, true, &chunk(r#"{"reasoning_content":" word"}"#))),
        ("as it came (TGI)", case("tgi", CHAT, true, &chunk(r#"{"content":" word"}"#))),
        ("tool call (TGI)", case("tgi", CHAT, true, &chunk(call))),
        ("/generate_stream (TGI)", case("tgi", CHAT, false, token)),
        ("/api/chat (Ollama)", case("ollama", OWN, true, line)),
    ] {
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
