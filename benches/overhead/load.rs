//! Clients: each connection sends its next request when its last answer is whole (a closed loop).

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::http::{content_length, head_bytes};
use crate::upstream::EVENTS;

/// English that every prompt is cut from.
const PROSE: &str = include_str!("../../backends/simulated-engine/model/prose.txt");
/// What is written over with letters that no request had before.
const FRESH_WORD: &[u8] = b"abcdefgh";
/// Bytes from one such word to the next, less than any piece that a tokenization cache would remember.
const FRESH_EVERY: usize = 512;

/// What to ask for.
#[derive(Clone, Copy)]
pub(crate) struct Question {
    /// Length of the body.
    pub(crate) bytes: usize,
    pub(crate) form: Form,
    pub(crate) novelty: Novelty,
}

/// How the answer is to come.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    Whole,
    /// As events, as fast as they go.
    Stream,
    /// As events, one each such time; the latency is the first one's.
    PacedStream(Duration),
}

/// How much of a prompt has been seen before.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Novelty {
    /// Nothing that is worth remembering.
    Everywhere,
    /// All but its last bytes.
    AtTheEnd,
}

/// A request ready to be sent, but for its fresh words.
#[derive(Clone)]
struct Prepared {
    bytes: Vec<u8>,
    fresh: Vec<usize>,
    form: Form,
}

impl Question {
    fn prepare(self, model: &str) -> anyhow::Result<Prepared> {
        let form = match self.form {
            Form::Whole => String::new(),
            Form::Stream => r#""stream":true,"#.to_owned(),
            Form::PacedStream(pace) => format!(r#""stream":true,"paced":{},"#, pace.as_micros()),
        };
        let open = format!(r#"{{"model":"{model}",{form}"max_tokens":64,"messages":[{{"role":"user","content":""#);
        let close = r#""}]}"#;
        let room = self.bytes.checked_sub(open.len() + close.len()).context("the body has no room for a message")?;
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer sk-any\r\n\
             user-agent: OpenAI/Python 2.0.0\r\naccept: application/json\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n",
            self.bytes
        );
        // JSON needs no escapes for these.
        let plain = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b' ' | b',' | b'.' | b'\'');
        let prose = PROSE.bytes().map(|byte| if byte == b'\n' { b' ' } else { byte }).filter(plain);
        let mut message: Vec<u8> = prose.cycle().take(room).collect();
        let last = room.checked_sub(FRESH_WORD.len()).context("the message has no room for a word")?;
        let within: Vec<usize> = match self.novelty {
            Novelty::Everywhere => (0..=last).step_by(FRESH_EVERY).collect(),
            Novelty::AtTheEnd => vec![last],
        };
        for at in &within {
            message.splice(*at..at + FRESH_WORD.len(), FRESH_WORD.iter().copied());
        }
        let fresh = within.iter().map(|at| head.len() + open.len() + at).collect();
        let bytes = [head.as_bytes(), open.as_bytes(), &message, close.as_bytes()].concat();
        Ok(Prepared { bytes, fresh, form: self.form })
    }
}

impl Prepared {
    fn renew(&mut self) {
        static WORDS: AtomicU64 = AtomicU64::new(0);
        for at in &self.fresh {
            let mut number = WORDS.fetch_add(1, Ordering::Relaxed);
            for byte in self.bytes.iter_mut().skip(*at).take(FRESH_WORD.len()) {
                *byte = b"abcdefghijklmnopqrstuvwxyz".get((number % 26) as usize).copied().unwrap_or(b'a');
                number /= 26;
            }
        }
    }
}

/// What one answer took.
#[derive(Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) latency: Duration,
    /// The longest time in which nothing of it came, once it had begun.
    pub(crate) silence: Duration,
}

/// When to stop asking.
#[derive(Clone, Copy)]
pub(crate) enum Enough {
    After(Duration),
    /// At least one a connection.
    Requests(u32),
}

/// What all connections have still to do.
enum Left {
    Until(Instant),
    Requests(AtomicU64),
}

impl Left {
    fn another(&self) -> bool {
        match self {
            Self::Until(end) => Instant::now() < *end,
            Self::Requests(left) => {
                left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
            }
        }
    }
}

/// Asks over `connections` at once until it is `enough`, and waits for the answers under way.
pub(crate) async fn drive(
    address: SocketAddr,
    model: &str,
    question: Question,
    connections: u32,
    enough: Enough,
) -> anyhow::Result<Vec<Sample>> {
    let prepared = question.prepare(model)?;
    let left = Arc::new(match enough {
        Enough::After(length) => Left::Until(Instant::now() + length),
        Enough::Requests(count) => Left::Requests(u64::from(count.saturating_sub(connections)).into()),
    });
    let mut clients = JoinSet::new();
    // Paced streams begin one after the other, so that their events do not fall together.
    let ramp = if let Form::PacedStream(pace) = question.form { pace * EVENTS } else { Duration::ZERO };
    for index in 0..connections {
        let (prepared, left) = (prepared.clone(), Arc::clone(&left));
        clients.spawn(async move {
            tokio::time::sleep(ramp * index / connections).await;
            client(address, prepared, &left).await
        });
    }
    let mut samples = Vec::new();
    while let Some(client) = clients.join_next().await {
        samples.append(&mut client??);
    }
    Ok(samples)
}

async fn client(address: SocketAddr, mut request: Prepared, left: &Left) -> anyhow::Result<Vec<Sample>> {
    let mut stream = TcpStream::connect(address).await.with_context(|| format!("cannot connect to {address}"))?;
    stream.set_nodelay(true)?;
    let mut buffer = Vec::with_capacity(64 << 10);
    let mut samples = Vec::new();
    loop {
        request.renew();
        let began = Instant::now();
        stream.write_all(&request.bytes).await?;
        let (first, silence) = answer(&mut stream, &mut buffer, request.form).await?;
        let now = Instant::now();
        let latency = if matches!(request.form, Form::PacedStream(_)) { first } else { now } - began;
        samples.push(Sample { latency, silence });
        if !left.another() {
            return Ok(samples);
        }
        buffer.clear();
    }
}

/// Reads one answer whole, and refuses every other than a good one; when its first bytes came, and the longest time to
/// the next ones.
async fn answer(stream: &mut TcpStream, buffer: &mut Vec<u8>, form: Form) -> anyhow::Result<(Instant, Duration)> {
    const LAST_CHUNK: &[u8] = b"\r\n0\r\n\r\n";
    const LAST_EVENT: &[u8] = b"data: [DONE]\n\n";
    let (mut head, mut first, mut last, mut silence) = (None, None, None, Duration::ZERO);
    loop {
        ensure!(stream.read_buf(buffer).await? > 0, "the answer broke off: {}", String::from_utf8_lossy(buffer));
        let now = Instant::now();
        let first = *first.get_or_insert(now);
        silence = silence.max(now - last.replace(now).unwrap_or(now));
        if head.is_none() {
            head = head_bytes(buffer);
        }
        let Some(head) = head else { continue };
        if !buffer.starts_with(b"HTTP/1.1 200 ") {
            bail!("no good answer: {}", String::from_utf8_lossy(buffer));
        }
        let whole = match buffer.get(..head).and_then(content_length) {
            Some(length) => form == Form::Whole && buffer.len() >= head + length,
            None => form != Form::Whole && buffer.ends_with(LAST_CHUNK),
        };
        if whole {
            // How events are cut into chunks is the proxy's own choice.
            let is_good =
                form == Form::Whole || unchunked(buffer.get(head..).unwrap_or_default()).ends_with(LAST_EVENT);
            ensure!(is_good, "the answer has no last event: {}", String::from_utf8_lossy(buffer));
            return Ok((first, silence));
        }
    }
}

/// The data of chunks, up to the first that is none.
fn unchunked(mut bytes: &[u8]) -> Vec<u8> {
    let mut data = Vec::with_capacity(bytes.len());
    while let Some(at) = bytes.windows(2).position(|pair| pair == b"\r\n")
        && let Some(length) =
            bytes.get(..at).and_then(|size| usize::from_str_radix(str::from_utf8(size).ok()?, 16).ok())
        && let Some(chunk) = bytes.get(at + 2..at + 2 + length)
    {
        data.extend_from_slice(chunk);
        bytes = bytes.get(at + 2 + length + 2..).unwrap_or_default();
    }
    data
}
