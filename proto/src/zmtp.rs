//! ZMTP 3.1, ZeroMQ's wire, as far as a subscriber and its publisher need it: greeting, frames, commands.
//!
//! Only the NULL mechanism: no authentication, no encryption. Source: ZeroMQ RFC 37 (`rfc.zeromq.org/spec/37`), which
//! extends RFC 23 (ZMTP 3.0).
//!
//! Invariants: a message that is longer than the bound is refused before it is received; no byte is copied once it is
//! in the buffer.
//!
//! Not here: sockets, heartbeats' times, who may subscribe.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Length of a [`greeting`].
pub const GREETING_LENGTH: usize = 64;
/// Frames in one message; KV events have three, a replayed one has a delimiter more.
const FRAMES_MAX: usize = 16;

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

/// What is no ZMTP, or more of it than is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("the peer does not speak ZMTP 3")]
    Version,
    #[error("the peer asks for a security mechanism other than NULL")]
    Mechanism,
    #[error("a message is longer than {max} bytes or has too many frames")]
    TooLong { max: usize },
    #[error("a frame is not well formed")]
    Malformed,
}

/// The first bytes on a connection, from both sides.
#[must_use]
pub fn greeting() -> [u8; GREETING_LENGTH] {
    let mut bytes = [0; GREETING_LENGTH];
    for (at, byte) in [(0, 0xff), (9, 0x7f), (10, 3), (11, 1)] {
        if let Some(place) = bytes.get_mut(at) {
            *place = byte;
        }
    }
    if let Some(mechanism) = bytes.get_mut(12..16) {
        mechanism.copy_from_slice(b"NULL");
    }
    bytes
}

/// Reads a peer's greeting: the minor version of its ZMTP 3.
///
/// # Errors
/// When it is another protocol, or asks for a security mechanism.
pub fn read_greeting(bytes: &[u8; GREETING_LENGTH]) -> Result<u8, Error> {
    let [0xff, _, _, _, _, _, _, _, _, 0x7f, major, minor, mechanism @ ..] = bytes else { return Err(Error::Version) };
    if *major < 3 {
        return Err(Error::Version);
    }
    if mechanism.starts_with(b"NULL\0") { Ok(*minor) } else { Err(Error::Mechanism) }
}

/// What a peer sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Incoming {
    Command(Command),
    /// All frames of one message.
    Message(Vec<Bytes>),
}

/// A word between the peers' libraries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    pub name: Bytes,
    pub data: Bytes,
}

impl Command {
    fn read(mut body: Bytes) -> Result<Self, Error> {
        if body.is_empty() {
            return Err(Error::Malformed);
        }
        let length = usize::from(body.get_u8());
        if length > body.len() {
            return Err(Error::Malformed);
        }
        Ok(Self { name: body.split_to(length), data: body })
    }

    /// The value of a property of a `READY` command; names are alike in any case.
    #[must_use]
    pub fn property(&self, name: &str) -> Option<Bytes> {
        let mut data = self.data.clone();
        while !data.is_empty() {
            let name_length = usize::from(data.get_u8());
            if name_length > data.len() {
                return None;
            }
            let found = data.split_to(name_length);
            let value_length = usize::try_from(data.try_get_u32().ok()?).ok()?;
            if value_length > data.len() {
                return None;
            }
            let value = data.split_to(value_length);
            if found.eq_ignore_ascii_case(name.as_bytes()) {
                return Some(value);
            }
        }
        None
    }
}

/// Cuts what a peer sends after its greeting into messages and commands.
#[derive(Debug)]
pub struct Splitter {
    buffer: BytesMut,
    frames: Vec<Bytes>,
    message_bytes: usize,
    message_bytes_max: usize,
}

impl Splitter {
    /// Takes messages of up to so many bytes over all frames.
    #[must_use]
    pub fn new(message_bytes_max: usize) -> Self {
        Self { buffer: BytesMut::new(), frames: Vec::new(), message_bytes: 0, message_bytes_max }
    }

    /// Where received bytes are to be appended.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// The next message or command, once all of it is in the buffer.
    ///
    /// # Errors
    /// When the bytes are not ZMTP or a message is too long; nothing after that can be understood.
    pub fn pop(&mut self) -> Result<Option<Incoming>, Error> {
        while let Some((flags, body)) = self.frame()? {
            if flags & COMMAND != 0 {
                return Command::read(body).map(|command| Some(Incoming::Command(command)));
            }
            self.message_bytes += body.len();
            self.frames.push(body);
            if flags & MORE == 0 {
                self.message_bytes = 0;
                return Ok(Some(Incoming::Message(std::mem::take(&mut self.frames))));
            }
        }
        Ok(None)
    }

    fn frame(&mut self) -> Result<Option<(u8, Bytes)>, Error> {
        let (flags, head, length) = match *self.buffer {
            [flags, ..] if flags & !(MORE | LONG | COMMAND) != 0 || flags & (COMMAND | MORE) == COMMAND | MORE => {
                return Err(Error::Malformed);
            }
            [flags, a, b, c, d, e, f, g, h, ..] if flags & LONG != 0 => {
                (flags, 9, u64::from_be_bytes([a, b, c, d, e, f, g, h]))
            }
            [flags, length, ..] if flags & LONG == 0 => (flags, 2, u64::from(length)),
            _ => return Ok(None),
        };
        let too_long = Error::TooLong { max: self.message_bytes_max };
        let room = self.message_bytes_max.saturating_sub(self.message_bytes);
        let length = usize::try_from(length).ok().filter(|length| *length <= room).ok_or(too_long)?;
        if self.frames.len() >= FRAMES_MAX {
            return Err(too_long);
        }
        if self.buffer.len() < head + length {
            self.buffer.reserve(head + length - self.buffer.len());
            return Ok(None);
        }
        self.buffer.advance(head);
        Ok(Some((flags, self.buffer.split_to(length).freeze())))
    }
}

/// Appends one message of these frames.
pub fn write_message(frames: &[&[u8]], out: &mut BytesMut) {
    for (at, frame) in frames.iter().enumerate() {
        write_frame(if at + 1 < frames.len() { MORE } else { 0 }, &[frame], out);
    }
}

/// Appends a command.
pub fn write_command(name: &str, data: &[u8], out: &mut BytesMut) {
    let length = u8::try_from(name.len()).unwrap_or(u8::MAX);
    write_frame(COMMAND, &[&[length], name.as_bytes(), data], out);
}

/// Appends the `READY` command of a socket of this type, such as `SUB`.
pub fn write_ready(socket_type: &str, out: &mut BytesMut) {
    let mut data = BytesMut::new();
    for (name, value) in [("Socket-Type", socket_type), ("Identity", "")] {
        data.put_u8(u8::try_from(name.len()).unwrap_or(u8::MAX));
        data.put_slice(name.as_bytes());
        data.put_u32(u32::try_from(value.len()).unwrap_or(u32::MAX));
        data.put_slice(value.as_bytes());
    }
    write_command("READY", &data, out);
}

fn write_frame(flags: u8, parts: &[&[u8]], out: &mut BytesMut) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    match u8::try_from(length) {
        Ok(short) => out.put_slice(&[flags, short]),
        Err(_) => {
            out.put_u8(flags | LONG);
            out.put_u64(length as u64);
        }
    }
    parts.iter().for_each(|part| out.put_slice(part));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split(bytes: &[u8], piece: usize) -> Result<Vec<Incoming>, Error> {
        let mut splitter = Splitter::new(1000);
        let mut found = Vec::new();
        for part in bytes.chunks(piece.max(1)) {
            splitter.buffer().extend_from_slice(part);
            while let Some(incoming) = splitter.pop()? {
                found.push(incoming);
            }
        }
        Ok(found)
    }

    #[test]
    fn a_greeting_is_that_of_the_specification() {
        let own = greeting();
        assert_eq!(own[..16], *b"\xff\0\0\0\0\0\0\0\0\x7f\x03\x01NULL");
        assert!(own[16..].iter().all(|byte| *byte == 0));
        assert_eq!(read_greeting(&own), Ok(1));
        // libzmq 4.3 writes the length of its identity, plus one, where ZMTP 2 had it.
        let mut libzmq = own;
        libzmq[8] = 1;
        assert_eq!(read_greeting(&libzmq), Ok(1));
        let (mut older, mut curve) = (own, own);
        older[10] = 2;
        curve[12..17].copy_from_slice(b"CURVE");
        assert_eq!(read_greeting(&older), Err(Error::Version));
        assert_eq!(read_greeting(&curve), Err(Error::Mechanism));
        assert_eq!(read_greeting(&[b'H'; 64]), Err(Error::Version));
    }

    #[test]
    fn commands_and_their_properties() {
        let bytes = b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03SUB\x04\x0a\x09SUBSCRIBE";
        let found = split(bytes, bytes.len()).expect("two commands");
        let [Incoming::Command(ready), Incoming::Command(subscribe)] = &found[..] else { panic!("{found:?}") };
        assert_eq!((&ready.name[..], ready.property("socket-type").as_deref()), (&b"READY"[..], Some(&b"SUB"[..])));
        assert_eq!(ready.property("Identity"), None);
        assert_eq!((&subscribe.name[..], &subscribe.data[..]), (&b"SUBSCRIBE"[..], &b""[..]));
        let mut own = BytesMut::new();
        write_ready("DEALER", &mut own);
        let Incoming::Command(ready) = &split(&own, 1).expect("a command")[0] else { panic!() };
        assert_eq!(ready.property("Socket-Type").as_deref(), Some(&b"DEALER"[..]));
        assert_eq!(ready.property("Identity").as_deref(), Some(&b""[..]));
    }

    #[test]
    fn what_is_too_long_or_no_frame_is_refused() {
        let max = Error::TooLong { max: 1000 };
        for (bytes, error) in [
            (&b"\x02\xff\xff\xff\xff\xff\xff\xff\xff"[..], max),
            (b"\x02\0\0\0\0\0\0\x03\xe9", max),
            (b"\x08\0", Error::Malformed),
            (b"\x05\0", Error::Malformed),
            (b"\x04\0", Error::Malformed),
            (b"\x04\x02\x05R", Error::Malformed),
        ] {
            assert_eq!(split(bytes, bytes.len()), Err(error), "{bytes:x?}");
        }
        assert_eq!(split(&[1, 0].repeat(17), 100), Err(max), "frames without end");
        assert_eq!(split(&[&[1, 250][..], &[0; 250]].concat().repeat(5), 100), Err(max), "frames count together");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_however_it_is_cut(
            messages in proptest::collection::vec(proptest::collection::vec(
                proptest::collection::vec(any::<u8>(), 0..300), 1..4), 0..5),
            piece in 1_usize..700,
        ) {
            let mut bytes = BytesMut::new();
            for message in &messages {
                let frames: Vec<&[u8]> = message.iter().map(Vec::as_slice).collect();
                write_message(&frames, &mut bytes);
            }
            let expected: Vec<Incoming> = messages.into_iter()
                .map(|message| Incoming::Message(message.into_iter().map(Bytes::from).collect())).collect();
            prop_assert_eq!(split(&bytes, piece), Ok(expected));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = split(&bytes, 7);
            if let Some(Incoming::Command(command)) = split(&bytes, 200).unwrap_or_default().first() {
                let _ = command.property("x");
            }
        }
    }
}
