//! The worker behind the proxies: answers at once with canned bytes, and says of itself what a vLLM server says.
//!
//! A streamed answer leaves one event a write. Between two events every other connection gets its turn, as the sequences
//! of a batch do, or, where the request says `"paced":` and microseconds (a field that every proxy must pass on), so
//! much time goes by. The usage event comes only where it was asked for.

use std::fmt::Write as _;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::http::{content_length, head_bytes};

/// Events with text in a streamed answer.
pub(crate) const EVENTS: u32 = 64;
/// Time between two events of an engine's answer, about.
pub(crate) const PACE: Duration = Duration::from_millis(10);
/// Models that it serves, for the two ways of counting.
pub(crate) const MODELS: [&str; 2] = ["counted", "guessed"];

/// Where in a body the fields are looked for that decide the answer's form; both stand before the messages.
const FIELDS_WITHIN: usize = 160;

/// Serves whoever connects, for as long as it is polled.
pub(crate) async fn run(listener: TcpListener) -> io::Result<()> {
    let answers = Arc::new(MODELS.map(Answers::of));
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        // A connection that breaks is its client's matter, and seen there.
        connections.spawn(serve(stream, Arc::clone(&answers)));
        while connections.try_join_next().is_some() {}
    }
}

async fn serve(mut stream: TcpStream, answers: Arc<[Answers; 2]>) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(64 << 10);
    loop {
        let Some(head) = request(&mut stream, &mut buffer).await? else { return Ok(()) };
        let (head, body) = buffer.split_at(head);
        let body = body.get(..FIELDS_WITHIN).unwrap_or(body);
        // Whoever answers as another model than was asked is no worker.
        let [counted, guessed] = &*answers;
        let answers = if contains(body, br#""model":"counted""#) { counted } else { guessed };
        if !head.starts_with(b"POST ") {
            stream.write_all(answers.about(head)).await?;
        } else if !contains(body, br#""stream":true"#) {
            stream.write_all(&answers.whole).await?;
        } else {
            let pace = pace(body);
            for event in &answers.events {
                stream.write_all(event).await?;
                match pace {
                    Some(pace) => tokio::time::sleep(pace).await,
                    None => tokio::task::yield_now().await,
                }
            }
            if contains(body, br#""include_usage":true"#) {
                stream.write_all(&answers.usage).await?;
            }
            stream.write_all(&answers.done).await?;
        }
        buffer.clear();
    }
}

/// Reads one request; the length of its head, `None` when the client is gone.
async fn request(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> io::Result<Option<usize>> {
    loop {
        if let Some(head) = head_bytes(buffer)
            && buffer.len() >= head + buffer.get(..head).and_then(content_length).unwrap_or(0)
        {
            return Ok(Some(head));
        }
        if stream.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
}

/// What a request asks for between two events.
fn pace(body: &[u8]) -> Option<Duration> {
    const NAME: &[u8] = br#""paced":"#;
    let at = body.windows(NAME.len()).position(|window| window == NAME)? + NAME.len();
    let digits = body.get(at..)?.split(|byte| !byte.is_ascii_digit()).next()?;
    Some(Duration::from_micros(str::from_utf8(digits).ok()?.parse().ok()?))
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

/// Every answer, head included, as it goes out.
struct Answers {
    models: Vec<u8>,
    metrics: Vec<u8>,
    health: Vec<u8>,
    whole: Vec<u8>,
    /// The first begins with the head; each is one chunk of HTTP.
    events: Vec<Vec<u8>>,
    usage: Vec<u8>,
    done: Vec<u8>,
}

impl Answers {
    fn of(model: &str) -> Self {
        let models = MODELS
            .map(|name| format!(r#"{{"id":"{name}","object":"model","owned_by":"vllm","max_model_len":131072}}"#));
        let mut metrics = String::new();
        for (name, value) in
            [("num_requests_running", "0.0"), ("num_requests_waiting", "0.0"), ("kv_cache_usage_perc", "0.0")]
        {
            let _ = writeln!(metrics, r#"vllm:{name}{{engine="0"}} {value}"#);
        }
        let _ = writeln!(metrics, r#"vllm:cache_config_info{{block_size="16",engine="0",num_gpu_blocks="62500"}} 1.0"#);
        let mut events: Vec<_> = (0..EVENTS).map(|index| chunk(&event(model, index))).collect();
        if let Some(first) = events.first_mut() {
            let head = "HTTP/1.1 200 OK\r\ndate: Mon, 01 Jan 2024 00:00:00 GMT\r\nserver: uvicorn\r\n\
                        content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
            first.splice(0..0, head.bytes());
        }
        // Written as engines write it; the model's name is put in.
        let named = |text: &str| text.replace(r#""model":"""#, &format!(r#""model":"{model}""#));
        let usage = r#"data: {"id":"chatcmpl-6b0e","object":"chat.completion.chunk","created":1700000000,"model":"","choices":[],"usage":{"prompt_tokens":32,"total_tokens":96,"completion_tokens":64}}"#;
        Self {
            models: json(&format!(r#"{{"object":"list","data":[{}]}}"#, models.join(","))),
            metrics: document("text/plain; version=0.0.4; charset=utf-8", &metrics),
            health: document("text/plain", ""),
            whole: json(&named(
                r#"{"id":"chatcmpl-6b0e","object":"chat.completion","created":1700000000,"model":"","choices":[{"index":0,"message":{"role":"assistant","content":"It is the pool of water right before the turbines.","refusal":null,"annotations":null,"audio":null,"function_call":null,"tool_calls":[],"reasoning":null},"logprobs":null,"finish_reason":"stop","stop_reason":null,"token_ids":null}],"service_tier":null,"system_fingerprint":null,"usage":{"prompt_tokens":32,"total_tokens":43,"completion_tokens":11,"prompt_tokens_details":null},"prompt_logprobs":null,"prompt_token_ids":null,"kv_transfer_params":null}"#,
            )),
            events,
            usage: chunk(&named(&format!("{usage}\n\n"))),
            done: [chunk("data: [DONE]\n\n"), b"0\r\n\r\n".to_vec()].concat(),
        }
    }

    /// What a GET asks about.
    fn about(&self, head: &[u8]) -> &[u8] {
        match head.split(|byte| *byte == b' ').nth(1) {
            Some(b"/v1/models") => &self.models,
            Some(b"/metrics") => &self.metrics,
            _ => &self.health,
        }
    }
}

fn event(model: &str, index: u32) -> String {
    let finish = if index + 1 == EVENTS { r#""stop""# } else { "null" };
    format!(
        r#"data: {{"id":"chatcmpl-6b0e","object":"chat.completion.chunk","created":1700000000,"model":"{model}","choices":[{{"index":0,"delta":{{"content":" water"}},"logprobs":null,"finish_reason":{finish},"token_ids":null}}]}}"#
    ) + "\n\n"
}

fn chunk(data: &str) -> Vec<u8> {
    format!("{:x}\r\n{data}\r\n", data.len()).into_bytes()
}

fn json(body: &str) -> Vec<u8> {
    document("application/json", body)
}

fn document(content_type: &str, body: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 200 OK\r\ndate: Mon, 01 Jan 2024 00:00:00 GMT\r\nserver: uvicorn\r\ncontent-length: {}\r\n\
         content-type: {content_type}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}
