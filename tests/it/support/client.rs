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
        loop {
            if self.read.windows(bytes.len()).any(|window| window == bytes) {
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

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub(crate) fn get(address: SocketAddr, path: &str) -> Answer {
    request(address, format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").as_bytes())
}

pub(crate) fn post(address: SocketAddr, path: &str, body: &str) -> Answer {
    post_with(address, path, &[], body)
}

pub(crate) fn post_with(address: SocketAddr, path: &str, headers: &[&str], body: &str) -> Answer {
    let mut connection = Connection::to(address);
    connection.post(path, headers, body.as_bytes());
    connection.answer()
}

/// Sends exactly these bytes and reads one answer.
pub(crate) fn request(address: SocketAddr, bytes: &[u8]) -> Answer {
    let mut connection = Connection::to(address);
    connection.send(bytes);
    connection.answer()
}
