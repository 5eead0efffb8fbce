//! A client of raw sockets: what it sends is what the test says, what it reads is what came.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::PATIENCE;

/// An answer to its last byte.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    /// Without chunk framing.
    pub(crate) body: Vec<u8>,
    /// Whether the body came to the end that its framing names.
    pub(crate) whole: bool,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).expect("UTF-8")
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// The error object of a refusal in OpenAI's shape: all four keys and no more, each of its type.
    pub(crate) fn error(&self) -> serde_json::Value {
        assert!(self.whole && self.status >= 400, "{self:?}");
        assert_eq!(self.header("content-type"), Some("application/json"), "{}", self.text());
        assert!(self.header("x-request-id").is_some_and(|id| !id.is_empty()), "{:?}", self.headers);
        error_object(&self.body)
    }

    /// The `code` of a refusal with this status; empty where it has none.
    pub(crate) fn refusal(&self, status: u16) -> String {
        assert_eq!(self.status, status, "{}", self.text());
        self.error()["code"].as_str().unwrap_or_default().to_owned()
    }

    /// The data of each event of a stream.
    pub(crate) fn events(&self) -> Vec<String> {
        self.text().split("\n\n").filter_map(|event| event.strip_prefix("data: ")).map(str::to_owned).collect()
    }

    /// How a stream ended: with `[DONE]`, or with one error event whose message this is, and nothing after it.
    pub(crate) fn stream_end(&self) -> Result<(), String> {
        assert!(self.whole, "the stream's framing is cut: {}", self.text());
        let events = self.events();
        let errors = events.iter().filter(|event| event.starts_with("{\"error\"")).count();
        let last = events.last().expect("an event");
        if last == "[DONE]" {
            assert_eq!(errors, 0, "{}", self.text());
            return Ok(());
        }
        assert_eq!(errors, 1, "{}", self.text());
        let json: serde_json::Value = serde_json::from_str(last).expect("JSON");
        Err(json["error"]["message"].as_str().expect("the error event comes last").to_owned())
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// An open connection.
pub(crate) struct Connection {
    pub(crate) socket: TcpStream,
    read: Vec<u8>,
}

impl Connection {
    pub(crate) fn to(address: SocketAddr) -> Self {
        let socket = TcpStream::connect(address).expect("the server listens");
        socket.set_nodelay(true).expect("a socket");
        socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
        Self { socket, read: Vec::new() }
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).expect("the server reads");
    }

    /// Sends a POST with this JSON body; `headers` are whole lines.
    pub(crate) fn post(&mut self, path: &str, headers: &[&str], body: &[u8]) {
        let lines: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {}\r\n{lines}\r\n",
            body.len()
        );
        self.send(&[head.as_bytes(), body].concat());
    }

    /// Reads more; false at the end of the stream.
    fn fill(&mut self) -> bool {
        let mut piece = [0; 16384];
        loop {
            match self.socket.read(&mut piece) {
                Ok(0) => return false,
                Ok(length) => {
                    self.read.extend_from_slice(&piece[..length]);
                    return true;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return false,
                Err(error) => panic!("nothing came for {PATIENCE:?}: {error}; until then: {:?}", self.read),
            }
        }
    }

    /// Reads until `bytes` stand somewhere in what came since the last answer; returns all of it, framing included.
    pub(crate) fn until(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.until_times(bytes, 1)
    }

    /// Reads until these bytes came so many times; gives all that was read, which stays to be read.
    pub(crate) fn until_times(&mut self, bytes: &[u8], times: usize) -> Vec<u8> {
        loop {
            if self.read.windows(bytes.len()).filter(|window| *window == bytes).count() >= times {
                return self.read.clone();
            }
            assert!(self.fill(), "the connection ended before {:?} came: {:?}", text(bytes), text(&self.read));
        }
    }

    /// Reads a whole answer.
    pub(crate) fn answer(&mut self) -> Answer {
        let head_end = loop {
            if let Some(at) = self.read.windows(4).position(|window| window == b"\r\n\r\n") {
                break at + 4;
            }
            assert!(self.fill(), "the connection ended before an answer's head came: {:?}", text(&self.read));
        };
        let head = text(&self.read[..head_end]);
        self.read.drain(..head_end);
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
        let headers: Vec<(String, String)> = head
            .lines()
            .skip(1)
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect();
        let named = |name: &str| headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone());
        if (100..200).contains(&status) {
            return self.answer();
        }
        let (body, whole) = if named("transfer-encoding").is_some_and(|coding| coding.contains("chunked")) {
            self.chunked()
        } else if let Some(length) = named("content-length") {
            self.sized(length.parse().expect("a length"))
        } else {
            while self.fill() {}
            (std::mem::take(&mut self.read), true)
        };
        Answer { status, headers, body, whole }
    }

    fn sized(&mut self, length: usize) -> (Vec<u8>, bool) {
        while self.read.len() < length {
            if !self.fill() {
                return (std::mem::take(&mut self.read), false);
            }
        }
        (self.read.drain(..length).collect(), true)
    }

    fn chunked(&mut self) -> (Vec<u8>, bool) {
        let mut body = Vec::new();
        loop {
            let line_end = loop {
                if let Some(at) = self.read.windows(2).position(|window| window == b"\r\n") {
                    break at;
                }
                if !self.fill() {
                    return (body, false);
                }
            };
            let size = text(&self.read[..line_end]);
            let size = usize::from_str_radix(size.trim(), 16).expect("a chunk size");
            self.read.drain(..line_end + 2);
            let (chunk, whole) = self.sized(size + 2);
            if !whole {
                return (body, false);
            }
            body.extend_from_slice(&chunk[..size]);
            assert!(body.len() < 256 << 20, "an answer without end");
            if size == 0 {
                return (body, true);
            }
        }
    }

    /// Whether the server closes the connection within `limit` without another byte.
    pub(crate) fn closes_within(&mut self, limit: Duration) -> bool {
        self.socket.set_read_timeout(Some(limit)).expect("a socket");
        matches!(self.socket.read(&mut [0; 1]), Ok(0))
    }
}

/// The object under `error` of a body or an event's data that has nothing beside it.
pub(crate) fn error_object(json: &[u8]) -> serde_json::Value {
    let shown = text(json);
    let body: serde_json::Value = serde_json::from_slice(json).unwrap_or_else(|error| panic!("{error}: {shown}"));
    assert_eq!(body.as_object().map(serde_json::Map::len), Some(1), "{shown}");
    let error = &body["error"];
    let keys: Vec<&str> = error.as_object().expect("an object").keys().map(String::as_str).collect();
    assert_eq!(keys.len(), 4, "{shown}");
    for key in ["message", "type", "param", "code"] {
        let value = error.get(key).unwrap_or_else(|| panic!("no `{key}`: {shown}"));
        let null = matches!(key, "param" | "code") && value.is_null();
        assert!(null || value.as_str().is_some_and(|text| !text.is_empty()), "`{key}`: {shown}");
    }
    error.clone()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub(crate) fn get(address: SocketAddr, path: &str) -> Answer {
    get_with(address, path, &[])
}

/// With more headers; each is a whole line.
pub(crate) fn get_with(address: SocketAddr, path: &str, headers: &[&str]) -> Answer {
    let lines: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
    request(address, format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n{lines}\r\n").as_bytes())
}

pub(crate) fn post(address: SocketAddr, path: &str, body: &str) -> Answer {
    post_with(address, path, &[], body)
}

pub(crate) fn post_with(address: SocketAddr, path: &str, headers: &[&str], body: &str) -> Answer {
    let mut connection = Connection::to(address);
    connection.post(path, headers, body.as_bytes());
    connection.answer()
}

/// Asks a gateway's ops listener for a change under `/admin/v1/`.
pub(crate) fn order(ops: SocketAddr, key: &str, method: &str, path: &str, body: &str) -> Answer {
    let head = format!(
        "{method} /admin/v1/{path} HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {key}\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    request(ops, format!("{head}{body}").as_bytes())
}

/// Sends exactly these bytes and reads one answer.
pub(crate) fn request(address: SocketAddr, bytes: &[u8]) -> Answer {
    let mut connection = Connection::to(address);
    connection.send(bytes);
    connection.answer()
}
