//! A worker that plays exactly the bytes a test gives it and keeps every byte it was sent.
//!
//! It knows nothing of the gateway's code. `GET`s are answered as a vLLM would answer a probe; each `POST` gets the
//! next script, or the last one again.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::{PATIENCE, eventually};

/// What the recorder does once a request's body is there.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    /// Writes these bytes in one piece.
    Write(Vec<u8>),
    Pause(Duration),
    /// Waits until the gateway closes the connection, and notes when.
    AwaitClose,
    /// Closes with a reset in place of an end.
    Reset,
    /// Writes these bytes again and again, as fast as they are taken.
    Repeat(Vec<u8>, usize),
    /// Waits until the test says [`Recorder::go_on`], once for each of these steps.
    Gate,
}

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Received {
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
    /// When the gateway closed the connection, where the script waited for it.
    pub(crate) closed: Option<Instant>,
}

impl Received {
    pub(crate) fn path(&self) -> &str {
        self.head.split(' ').nth(1).unwrap_or_default()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head
            .lines()
            .skip(1)
            .filter_map(|line| line.split_once(':'))
            .find(|(known, _)| known.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.trim())
    }
}

struct Shared {
    models: String,
    scripts: Mutex<VecDeque<Vec<Step>>>,
    /// For requests with these bytes in their body, the first that fits.
    matching: Mutex<Vec<(String, Vec<Step>)>>,
    posts: Mutex<Vec<Received>>,
    /// Answer probes and polls; without it they are refused with 503.
    healthy: Mutex<bool>,
    /// Bytes written by scripts.
    written: AtomicUsize,
    /// How often [`Recorder::go_on`] was said and not yet heard.
    gates: (Mutex<usize>, Condvar),
}

/// The worker.
pub(crate) struct Recorder {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
}

impl Recorder {
    /// Serves one model of that name with these scripts, one a `POST`.
    pub(crate) fn start(model: &str, scripts: Vec<Vec<Step>>) -> Self {
        Self::start_at("127.0.0.1:0".parse().expect("an address"), model, scripts)
    }

    /// The same at this address.
    pub(crate) fn start_at(address: SocketAddr, model: &str, scripts: Vec<Vec<Step>>) -> Self {
        let listener = TcpListener::bind(address).expect("a port");
        let address = listener.local_addr().expect("an address");
        let models = format!(
            "{{\"object\":\"list\",\"data\":[{{\"id\":\"{model}\",\"object\":\"model\",\"created\":1,\
             \"owned_by\":\"vllm\",\"root\":\"{model}\",\"parent\":null,\"max_model_len\":4096}}]}}"
        );
        let shared = Arc::new(Shared {
            models,
            scripts: Mutex::new(scripts.into()),
            matching: Mutex::default(),
            posts: Mutex::default(),
            healthy: Mutex::new(true),
            written: AtomicUsize::new(0),
            gates: (Mutex::new(0), Condvar::new()),
        });
        let serving = Arc::clone(&shared);
        std::thread::spawn(move || {
            for socket in listener.incoming().map_while(Result::ok) {
                let shared = Arc::clone(&serving);
                std::thread::spawn(move || serve(&shared, socket));
            }
        });
        Self { address, shared }
    }

    pub(crate) fn posts(&self) -> Vec<Received> {
        self.shared.posts.lock().unwrap().clone()
    }

    /// Waits until this many requests with a body have come.
    pub(crate) fn await_posts(&self, count: usize) -> Vec<Received> {
        eventually("a request at the worker", || Some(self.posts()).filter(|posts| posts.len() >= count))
    }

    /// Answers every `POST` with this script from now on.
    pub(crate) fn play(&self, script: Vec<Step>) {
        self.play_all(vec![script]);
    }

    /// As [`Recorder::play`], with one script after the other; the last one stays.
    pub(crate) fn play_all(&self, scripts: Vec<Vec<Step>>) {
        *self.shared.scripts.lock().unwrap() = scripts.into();
    }

    /// Answers every request for a stream with this script from now on.
    pub(crate) fn answer_streams(&self, script: Vec<Step>) {
        self.answer_matching(vec![("\"stream\":true".to_owned(), script)]);
    }

    /// Answers every request with one of these in its body with the script beside it from now on, others as before.
    pub(crate) fn answer_matching(&self, scripts: Vec<(String, Vec<Step>)>) {
        *self.shared.matching.lock().unwrap() = scripts;
    }

    /// Bytes of scripts that the sockets have taken until now.
    pub(crate) fn written(&self) -> usize {
        self.shared.written.load(Ordering::SeqCst)
    }

    /// Lets one [`Step::Gate`] pass.
    pub(crate) fn go_on(&self) {
        *self.shared.gates.0.lock().unwrap() += 1;
        self.shared.gates.1.notify_all();
    }

    /// When the gateway closed the connection of its `index`th request, as soon as it has.
    pub(crate) fn closed(&self, index: usize) -> Instant {
        eventually("the gateway to close its connection", || self.posts().get(index)?.closed)
    }

    pub(crate) fn set_healthy(&self, healthy: bool) {
        *self.shared.healthy.lock().unwrap() = healthy;
    }
}

fn serve(shared: &Shared, mut socket: TcpStream) {
    socket.set_nodelay(true).expect("a socket");
    let mut read = Vec::new();
    while let Some((head, body)) = request(&mut socket, &mut read) {
        if !head.starts_with("POST") {
            if probe(shared, &mut socket, &head).is_err() {
                return;
            }
            continue;
        }
        let matching = {
            let body = String::from_utf8_lossy(&body);
            let scripts = shared.matching.lock().unwrap();
            scripts.iter().find(|(part, _)| body.contains(part)).map(|(_, script)| script.clone())
        };
        let index = {
            let mut posts = shared.posts.lock().unwrap();
            posts.push(Received { head, body, closed: None });
            posts.len() - 1
        };
        let script = matching.unwrap_or_else(|| {
            let mut scripts = shared.scripts.lock().unwrap();
            let script = scripts.pop_front().expect("a script");
            if scripts.is_empty() {
                scripts.push_back(script.clone());
            }
            script
        });
        if !play(shared, &mut socket, &script, index) {
            return;
        }
    }
}

/// Plays a script; false when the connection is over.
fn play(shared: &Shared, socket: &mut TcpStream, script: &[Step], index: usize) -> bool {
    for step in script {
        match step {
            Step::Write(bytes) => {
                if !write(shared, socket, bytes, index) {
                    return false;
                }
            }
            Step::Repeat(bytes, times) => {
                if !(0..*times).all(|_| write(shared, socket, bytes, index)) {
                    return false;
                }
            }
            Step::Gate => {
                let (said, heard) = &shared.gates;
                let waiting = said.lock().unwrap();
                let (mut said, timeout) = heard.wait_timeout_while(waiting, PATIENCE, |said| *said == 0).unwrap();
                if timeout.timed_out() {
                    return false;
                }
                *said -= 1;
            }
            Step::Pause(duration) => sleep(*duration),
            Step::AwaitClose => {
                socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
                if matches!(socket.read(&mut [0; 1]), Ok(0) | Err(_)) {
                    shared.posts.lock().unwrap()[index].closed = Some(Instant::now());
                }
                return false;
            }
            Step::Reset => {
                // What the peer sent and nobody read turns a close into a reset.
                let _ = socket.set_nonblocking(true);
                reset(socket);
                return false;
            }
        }
    }
    // An answer that names no length ends with the connection.
    let written: Vec<u8> = script
        .iter()
        .filter_map(|step| if let Step::Write(bytes) = step { Some(bytes.clone()) } else { None })
        .flatten()
        .collect();
    let head = String::from_utf8_lossy(&written).to_ascii_lowercase();
    head.contains("content-length:") || head.trim_end().ends_with("\r\n0")
}

/// Writes; false when the gateway has closed the connection, which is noted.
fn write(shared: &Shared, socket: &mut TcpStream, bytes: &[u8], index: usize) -> bool {
    let written = socket.write_all(bytes).is_ok();
    if written {
        shared.written.fetch_add(bytes.len(), Ordering::SeqCst);
    } else {
        shared.posts.lock().unwrap()[index].closed = Some(Instant::now());
    }
    written
}

fn reset(socket: &TcpStream) {
    let _ = socket.shutdown(std::net::Shutdown::Both);
}

fn probe(shared: &Shared, socket: &mut TcpStream, head: &str) -> std::io::Result<()> {
    let path = head.split(' ').nth(1).unwrap_or_default();
    let (status, body) = match path {
        _ if !*shared.healthy.lock().unwrap() => ("503 Service Unavailable", String::new()),
        "/v1/models" => ("200 OK", shared.models.clone()),
        "/health" => ("200 OK", String::new()),
        "/version" => ("200 OK", "{\"version\":\"0.32.0\"}".to_owned()),
        "/metrics" => ("200 OK", "vllm:num_requests_running{engine=\"0\"} 0.0\nvllm:num_requests_waiting{engine=\"0\"} 0.0\nvllm:kv_cache_usage_perc{engine=\"0\"} 0.0\n".to_owned()),
        _ => ("404 Not Found", "{\"detail\":\"Not Found\"}".to_owned()),
    };
    write!(
        socket,
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Reads one request with `Content-Length`; `None` at the end of the connection.
fn request(socket: &mut TcpStream, read: &mut Vec<u8>) -> Option<(String, Vec<u8>)> {
    let mut piece = [0; 16384];
    let mut fill = |read: &mut Vec<u8>| match socket.read(&mut piece) {
        Ok(length) if length > 0 => {
            read.extend_from_slice(&piece[..length]);
            true
        }
        _ => false,
    };
    let end = loop {
        if let Some(at) = read.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
        if !fill(read) {
            return None;
        }
    };
    let head = String::from_utf8_lossy(&read[..end]).into_owned();
    let length = head
        .lines()
        .find_map(|line| {
            line.to_ascii_lowercase().strip_prefix("content-length:").map(|value| value.trim().parse::<usize>())
        })
        .map_or(0, |length| length.expect("a length"));
    while read.len() < end + length {
        if !fill(read) {
            return None;
        }
    }
    let body = read[end..end + length].to_vec();
    read.drain(..end + length);
    Some((head, body))
}

/// A whole JSON answer.
pub(crate) fn json(status: &str, body: &str) -> Vec<Step> {
    json_with(status, "", body)
}

/// A whole JSON answer with more header lines, each ending in `\r\n`.
pub(crate) fn json_with(status: &str, headers: &str, body: &str) -> Vec<Step> {
    let text = format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n{headers}\r\n{body}",
        body.len()
    );
    vec![Step::Write(text.into_bytes())]
}

/// The head of a chunked event stream.
pub(crate) fn stream_head() -> Step {
    Step::Write(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
            .to_vec(),
    )
}

/// One HTTP chunk.
pub(crate) fn chunk(bytes: &[u8]) -> Step {
    Step::Write([format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat())
}

/// The end of a chunked body.
pub(crate) fn stream_end() -> Step {
    Step::Write(b"0\r\n\r\n".to_vec())
}

/// An event stream of these pieces, one HTTP chunk each.
pub(crate) fn stream(pieces: &[&[u8]]) -> Vec<Step> {
    let mut steps = vec![stream_head()];
    steps.extend(pieces.iter().map(|piece| chunk(piece)));
    steps.push(stream_end());
    steps
}
