//! A client of HTTP/2 frames (RFC 9113), written by hand: it may do what no library does.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use super::PATIENCE;

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const CONTINUATION: u8 = 9;
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;
const ACK: u8 = 1;

pub(crate) struct Frame {
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) stream: u32,
    pub(crate) payload: Vec<u8>,
}

impl Frame {
    /// The error code of a RST_STREAM or GOAWAY.
    pub(crate) fn code(&self) -> u32 {
        let at = if self.kind == GOAWAY { 4 } else { 0 };
        u32::from_be_bytes(self.payload[at..at + 4].try_into().expect("four bytes"))
    }

    /// The status that a head begins with, as HPACK's static table has it (RFC 7541, appendix A).
    pub(crate) fn status(&self) -> u16 {
        assert_eq!(self.kind, HEADERS);
        let at = self.payload.iter().position(|byte| byte & 0xe0 != 0x20).expect("more than table sizes");
        match self.payload[at] {
            index @ 0x88..=0x8e => [200, 204, 206, 304, 400, 404, 500][usize::from(index - 0x88)],
            // A literal with the name of index 8: its digits, plain or in Huffman's code.
            0x48 | 0x08 if self.payload[at + 1] == 3 => {
                std::str::from_utf8(&self.payload[at + 2..at + 5]).expect("digits").parse().expect("a status")
            }
            _ => 0,
        }
    }
}

pub(crate) struct Http2 {
    socket: TcpStream,
}

impl Http2 {
    /// Connects, and says its settings.
    pub(crate) fn to(address: SocketAddr, settings: &[(u16, u32)]) -> Self {
        let socket = TcpStream::connect(address).expect("the server listens");
        socket.set_nodelay(true).expect("a socket");
        socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let mut client = Self { socket };
        let values = settings.iter().flat_map(|(id, value)| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat());
        let preface =
            [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(SETTINGS, 0, 0, &values.collect::<Vec<_>>())];
        client.send(&preface.concat());
        client
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        // The server may have closed; what it said before that is read all the same.
        let _ = self.socket.write_all(bytes);
    }

    /// Sends a POST on `stream`, with a body that ends it.
    pub(crate) fn post(&mut self, stream: u32, path: &str, body: &[u8]) {
        let head = frame(HEADERS, END_HEADERS, stream, &post(path));
        self.send(&[head, frame(DATA, END_STREAM, stream, body)].concat());
    }

    /// The next frame that is not about the connection's upkeep; `None` at its end.
    pub(crate) fn next(&mut self) -> Option<Frame> {
        loop {
            let mut head = [0; 9];
            self.socket.read_exact(&mut head).ok()?;
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let mut payload = vec![0; length];
            self.socket.read_exact(&mut payload).ok()?;
            let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & 0x7fff_ffff;
            let found = Frame { kind: head[3], flags: head[4], stream, payload };
            match found.kind {
                SETTINGS if found.flags & ACK == 0 => {
                    self.send(&frame(SETTINGS, ACK, 0, &[]));
                    return Some(found);
                }
                PING if found.flags & ACK == 0 => self.send(&frame(PING, ACK, 0, &found.payload)),
                DATA | HEADERS | RST_STREAM | GOAWAY => return Some(found),
                _ => {}
            }
        }
    }

    /// The next frame of this kind.
    pub(crate) fn until(&mut self, kind: u8) -> Frame {
        loop {
            let found = self.next().expect("the connection goes on");
            if found.kind == kind {
                return found;
            }
        }
    }
}

pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a short frame").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The header block of a POST of JSON: indexed fields, and literals that no table takes.
pub(crate) fn post(path: &str) -> Vec<u8> {
    let mut block = vec![0x83, 0x86, 0x01, 4];
    block.extend(b"test");
    block.extend([0x04, u8::try_from(path.len()).expect("a short path")]);
    block.extend(path.as_bytes());
    block.extend([0x0f, 0x10, 16]);
    block.extend(b"application/json");
    block
}
