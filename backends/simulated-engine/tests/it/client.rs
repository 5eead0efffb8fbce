//! A server under test, and a client that sees every byte.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use forebay_simulated_engine::{EngineConfig, Options, bind, serve};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Fails a test that would wait for ever.
const PATIENCE: Duration = Duration::from_secs(20);

/// A folder of the shared test data, or one line that says that it is not there.
pub(crate) fn shared(folder: &str) -> Option<PathBuf> {
    let beside = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared"));
    let root = std::env::var_os("FOREBAY_SHARED_DIR").map_or_else(beside, PathBuf::from);
    let path = root.join(folder);
    if !path.is_dir() {
        println!("skipped: {} not found", path.display());
        return None;
    }
    Some(path)
}

/// Options for tests of the wire: a fast engine.
pub(crate) fn fast() -> Options {
    Options { model: "sim".to_owned(), speed: 1000.0, ..Options::default() }
}

/// Options for tests that need an answer to take long: some 100 tokens a second.
pub(crate) fn slow() -> Options {
    Options { model: "sim".to_owned(), timing: EngineConfig::default(), ..Options::default() }
}

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    shutdown: CancellationToken,
    tasks: TaskTracker,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

impl Server {
    pub(crate) async fn start(options: Options) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let tasks = TaskTracker::new();
        let token = shutdown.clone();
        tasks.spawn(async move { serve(bind(options, listener).await.unwrap(), token).await.unwrap() });
        tasks.close();
        Self { address, shutdown, tasks }
    }

    /// Stops the server and waits for all of its tasks.
    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        tokio::time::timeout(PATIENCE, self.tasks.wait()).await.expect("the server did not end");
    }

    /// Sends bytes on a connection of its own.
    pub(crate) async fn send(&self, bytes: &[u8]) -> Connection {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        Connection { stream, received: Vec::new() }
    }

    pub(crate) async fn open(&self, path: &str, body: &Value) -> Connection {
        self.send(&post(path, &[], body)).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Reply {
        self.open(path, body).await.reply().await
    }

    pub(crate) async fn post_with(&self, path: &str, headers: &[(&str, &str)], body: &Value) -> Reply {
        self.send(&post(path, headers, body)).await.reply().await
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        let request = format!("GET {path} HTTP/1.1\r\nHost: sim\r\nConnection: close\r\n\r\n");
        self.send(request.as_bytes()).await.reply().await
    }

    pub(crate) async fn set_faults(&self, faults: &[&str]) {
        let faults: Vec<forebay_simulated_engine::Fault> = faults.iter().map(|text| text.parse().unwrap()).collect();
        let reply = self.post("/simulated/faults", &serde_json::json!({"faults": faults})).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
    }

    pub(crate) async fn log(&self) -> Value {
        self.get("/simulated/log").await.json()
    }

    /// The value of one series of `/metrics`.
    pub(crate) async fn metric(&self, series: &str) -> f64 {
        let text = self.get("/metrics").await.text();
        let line =
            text.lines().find(|line| line.starts_with(series)).unwrap_or_else(|| panic!("no {series} in {text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }
}

/// Asks until the answer is true.
pub(crate) async fn until<F: Future<Output = bool>>(what: &str, mut ask: impl FnMut() -> F) {
    let waiting = async {
        while !ask().await {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("{what} did not come true"));
}

fn post(path: &str, headers: &[(&str, &str)], body: &Value) -> Vec<u8> {
    let body = body.to_string();
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    format!(
        "POST {path} HTTP/1.1\r\nHost: sim\r\nContent-Type: application/json\r\n{headers}Content-Length: {}\r\n\
         Connection: close\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

pub(crate) struct Connection {
    pub(crate) stream: TcpStream,
    received: Vec<u8>,
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Closed,
    Reset,
}

impl Connection {
    /// Reads on; `None` at the end.
    pub(crate) async fn read(&mut self) -> Result<Option<usize>, std::io::Error> {
        let read = self.stream.read_buf(&mut self.received);
        let read = tokio::time::timeout(PATIENCE, read).await.expect("no answer came")?;
        Ok((read > 0).then_some(read))
    }

    /// Reads until so many events were seen.
    pub(crate) async fn events(&mut self, count: usize) {
        while String::from_utf8_lossy(&self.received).matches("data: ").count() < count {
            assert!(self.read().await.unwrap().is_some(), "ended early: {}", String::from_utf8_lossy(&self.received));
        }
    }

    /// Reads until nothing comes for a while, and gives what did; the connection must stay open.
    pub(crate) async fn until_silent(&mut self) -> Reply {
        const SILENCE: Duration = Duration::from_millis(50);
        while let Ok(read) = tokio::time::timeout(SILENCE, self.read()).await {
            assert!(read.unwrap().is_some(), "the connection ended");
        }
        Reply::parse(&self.received, Ended::Closed)
    }

    /// Reads to the end of the connection.
    pub(crate) async fn reply(mut self) -> Reply {
        let ended = loop {
            match self.read().await {
                Ok(Some(_)) => {}
                Ok(None) => break Ended::Closed,
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break Ended::Reset,
                Err(error) => panic!("{error}"),
            }
        };
        Reply::parse(&self.received, ended)
    }
}

#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    /// HTTP chunks in order, or all of the body as one.
    pub(crate) chunks: Vec<Vec<u8>>,
    /// Whether the body came to its declared end.
    pub(crate) whole: bool,
    pub(crate) ended: Ended,
}

impl Reply {
    pub(crate) fn parse(bytes: &[u8], ended: Ended) -> Self {
        let split = bytes.windows(4).position(|window| window == b"\r\n\r\n");
        let (head, rest) = match split {
            Some(at) => (std::str::from_utf8(&bytes[..at]).unwrap(), &bytes[at + 4..]),
            None => return Self { status: 0, headers: Vec::new(), chunks: Vec::new(), whole: false, ended },
        };
        let mut lines = head.split("\r\n");
        let status: u16 = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        if status == 100 {
            return Self::parse(rest, ended);
        }
        let headers: Vec<(String, String)> = lines
            .map(|line| line.split_once(": ").unwrap())
            .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
            .collect();
        let header = |name: &str| headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        let (chunks, whole) = if header("transfer-encoding") == Some("chunked") {
            dechunk(rest)
        } else {
            let length = header("content-length").map_or(0, |length| length.parse().unwrap());
            (vec![rest.to_vec()], rest.len() == length)
        };
        Self { status, headers, chunks, whole, ended }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn body(&self) -> Vec<u8> {
        self.chunks.concat()
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body()).into_owned()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body()).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// Data of the events, without the end mark.
    pub(crate) fn events(&self) -> Vec<Value> {
        let text = self.text();
        let data = text.split("\n\n").filter_map(|event| event.strip_prefix("data: "));
        data.filter(|data| *data != "[DONE]").map(|data| serde_json::from_str(data).unwrap()).collect()
    }

    pub(crate) fn is_done(&self) -> bool {
        self.text().ends_with("data: [DONE]\n\n")
    }
}

fn dechunk(mut bytes: &[u8]) -> (Vec<Vec<u8>>, bool) {
    let mut chunks = Vec::new();
    loop {
        let Some(at) = bytes.windows(2).position(|window| window == b"\r\n") else { return (chunks, false) };
        let size = usize::from_str_radix(std::str::from_utf8(&bytes[..at]).unwrap(), 16).unwrap();
        if size == 0 {
            return (chunks, true);
        }
        let Some(chunk) = bytes.get(at + 2..at + 2 + size) else { return (chunks, false) };
        chunks.push(chunk.to_vec());
        bytes = &bytes[(at + 4 + size).min(bytes.len())..];
    }
}
