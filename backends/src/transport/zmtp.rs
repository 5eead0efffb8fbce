//! A client's connection of ZeroMQ: one peer, subscribed to or asked, without a socket's queues around it.
//!
//! There is no queue here: what is not read stays in TCP's buffers, and then the publisher drops messages, as ZeroMQ's
//! publishers do for a slow subscriber. Heartbeats of ZMTP 3.1 find out a peer that is gone without a word.
//!
//! Invariants: a message has a bound in bytes; [`Peer::next`] loses nothing when it is dropped.
//!
//! Not here: connecting again, and several peers behind one socket. A `tcp://` address is dialled, never listened on.

use std::{fmt, io, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use forebay_proto::zmtp::{self, Command, GREETING_LENGTH, Incoming, Splitter};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, timeout_at},
};
use url::Url;

use super::connect::dial;

/// Name lookup, TCP and handshake.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// Silence after which the peer is asked for a sign of life.
const PING_AFTER: Duration = Duration::from_secs(10);
/// Silence after the question that means it is gone.
const GONE_AFTER: Duration = Duration::from_secs(10);
/// The longest message: the events of one step of an engine. A million token ids are 5 MB.
const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// Read at a time.
const READ_BYTES: usize = 64 << 10;

/// What to be to the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Gets every message of a `PUB` socket.
    Subscriber,
    /// Asks a `ROUTER` socket.
    Dealer,
}

/// Where a peer listens: `tcp://host:port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// As a resolver wants it: an IPv6 address without brackets.
    host: String,
    port: u16,
}

impl Address {
    /// Reads `tcp://host:port`; `None` for any other URL. Where the host is `*`, as in the address that a publisher
    /// binds, it is `instead`.
    #[must_use]
    pub fn new(url: &Url, instead: Option<&str>) -> Option<Self> {
        let bare = url.path().is_empty() && url.query().is_none() && url.fragment().is_none();
        let host = url.host_str().filter(|host| !host.is_empty())?;
        if url.scheme() != "tcp" || !bare || !url.username().is_empty() || url.password().is_some() {
            return None;
        }
        let host = match host {
            "*" | "0.0.0.0" | "[::]" => instead?,
            host => host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host),
        };
        Some(Self { host: host.to_owned(), port: url.port().filter(|port| *port > 0)? })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') { write!(f, "tcp://[{host}]:{port}") } else { write!(f, "tcp://{host}:{port}") }
    }
}

/// A connection that is greeted and ready.
#[derive(Debug)]
pub struct Peer {
    stream: TcpStream,
    incoming: Splitter,
    outgoing: BytesMut,
    /// Whether it knows ZMTP 3.1's heartbeats.
    has_heartbeats: bool,
    heard: Instant,
    asked: bool,
}

impl Peer {
    /// Connects; a [`Role::Subscriber`] has subscribed to everything then.
    ///
    /// # Errors
    /// When nobody listens there, or it is no ZeroMQ socket without security.
    pub async fn connect(address: &Address, role: Role) -> io::Result<Self> {
        let deadline = Instant::now() + CONNECT_LIMIT;
        let opening = async {
            let mut stream = dial((&address.host, address.port), deadline).await?;
            stream.write_all(&zmtp::greeting()).await?;
            let mut theirs = [0; GREETING_LENGTH];
            stream.read_exact(&mut theirs).await?;
            let has_heartbeats = zmtp::read_greeting(&theirs).map_err(invalid)? >= 1;
            let incoming = Splitter::new(MESSAGE_BYTES_MAX);
            let outgoing = BytesMut::new();
            let mut peer = Self { stream, incoming, outgoing, has_heartbeats, heard: Instant::now(), asked: false };
            peer.introduce(role).await?;
            Ok(peer)
        };
        timeout_at(deadline, opening).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    async fn introduce(&mut self, role: Role) -> io::Result<()> {
        let (own, theirs): (_, &[&[u8]]) = match role {
            Role::Subscriber => ("SUB", &[b"PUB", b"XPUB"]),
            Role::Dealer => ("DEALER", &[b"ROUTER", b"REP"]),
        };
        zmtp::write_ready(own, &mut self.outgoing);
        self.flush().await?;
        let ready = loop {
            match self.incoming.pop().map_err(invalid)? {
                Some(Incoming::Command(command)) => break command,
                Some(Incoming::Message(_)) => return Err(io::ErrorKind::InvalidData.into()),
                None => self.receive().await?,
            }
        };
        let kind = ready.property("Socket-Type").unwrap_or_default();
        if &ready.name[..] != b"READY" || !theirs.contains(&&kind[..]) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "another kind of ZeroMQ socket listens there"));
        }
        if role == Role::Subscriber {
            match self.has_heartbeats {
                true => zmtp::write_command("SUBSCRIBE", b"", &mut self.outgoing),
                false => zmtp::write_message(&[&[1]], &mut self.outgoing),
            }
        }
        self.flush().await
    }

    /// Sends one message.
    ///
    /// # Errors
    /// When the connection is broken.
    pub async fn send(&mut self, frames: &[&[u8]]) -> io::Result<()> {
        zmtp::write_message(frames, &mut self.outgoing);
        self.flush().await
    }

    /// The frames of the next message. Cancel-safe.
    ///
    /// # Errors
    /// When the connection is broken or closed, the peer is gone, or what it sends is not ZMTP.
    pub async fn next(&mut self) -> io::Result<Vec<Bytes>> {
        loop {
            self.flush().await?;
            match self.incoming.pop().map_err(invalid)? {
                Some(Incoming::Message(frames)) => return Ok(frames),
                Some(Incoming::Command(command)) => self.obey(&command),
                None => {
                    let limit = if self.asked { PING_AFTER + GONE_AFTER } else { PING_AFTER };
                    match timeout_at(self.heard + limit, self.receive()).await {
                        Ok(received) => received?,
                        Err(_) if !self.has_heartbeats => self.heard = Instant::now(),
                        Err(_) if self.asked => return Err(io::ErrorKind::TimedOut.into()),
                        Err(_) => {
                            self.asked = true;
                            // The time, in tenths of a second, after which it may give us up in turn: none.
                            zmtp::write_command("PING", &[0, 0], &mut self.outgoing);
                        }
                    }
                }
            }
        }
    }

    fn obey(&mut self, command: &Command) {
        if &command.name[..] == b"PING" {
            let context = command.data.get(2..).unwrap_or_default();
            zmtp::write_command("PONG", context, &mut self.outgoing);
        }
    }

    async fn receive(&mut self) -> io::Result<()> {
        let buffer = self.incoming.buffer();
        buffer.reserve(READ_BYTES);
        if self.stream.read_buf(buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        (self.heard, self.asked) = (Instant::now(), false);
        Ok(())
    }

    async fn flush(&mut self) -> io::Result<()> {
        while self.outgoing.has_remaining() {
            self.stream.write_buf(&mut self.outgoing).await?;
        }
        Ok(())
    }
}

fn invalid(error: zmtp::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (url, shown) in [
            ("tcp://gpu-a:5557", Some("tcp://gpu-a:5557")),
            ("tcp://10.0.0.1:5557", Some("tcp://10.0.0.1:5557")),
            ("tcp://[::1]:5557", Some("tcp://[::1]:5557")),
            ("tcp://*:5557", Some("tcp://worker:5557")),
            ("tcp://[::]:5557", Some("tcp://worker:5557")),
            ("tcp://gpu-a", None),
            ("tcp://gpu-a:0", None),
            ("tcp://gpu-a:5557/x", None),
            ("tcp://u:p@gpu-a:5557", None),
            ("tcp://gpu-a:5557?x", None),
            ("http://gpu-a:5557", None),
            ("ipc:///tmp/events", None),
            ("inproc://cache", None),
        ] {
            let url = Url::parse(url).expect(url);
            let address = Address::new(&url, Some("worker")).map(|address| address.to_string());
            assert_eq!(address.as_deref(), shown, "{url}");
        }
        assert_eq!(Address::new(&Url::parse("tcp://*:5557").expect("a URL"), None), None);
    }
}
