//! The publisher's side of ZeroMQ: subscriptions and questions in, numbered batches out.

use std::{future::Future, io, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use forebay_proto::zmtp::{self, Command, GREETING_LENGTH, Incoming, Splitter};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::broadcast::error::RecvError,
};
use tokio_util::task::TaskTracker;

use super::{Numbered, Publisher};

/// Subscriptions and questions are short.
const MESSAGE_BYTES_MAX: usize = 1 << 16;
/// Topics one subscriber may name.
const TOPICS_MAX: usize = 64;
const HANDSHAKE: Duration = Duration::from_secs(5);
/// The number that ends a replay, -1.
const END: u64 = u64::MAX;

/// Lets peers in for ever; each connection ends with the publisher's life.
pub(super) async fn accept<F: Future<Output = io::Result<()>> + Send + 'static>(
    listener: TcpListener,
    publisher: Arc<Publisher>,
    tasks: TaskTracker,
    serve: fn(TcpStream, Arc<Publisher>) -> F,
) {
    loop {
        let Ok((stream, peer)) = listener.accept().await else {
            // Out of file descriptors, mostly: waiting is all there is to do.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let mut lives = publisher.lives.subscribe();
        let serving = serve(stream, Arc::clone(&publisher));
        tasks.spawn(async move {
            tokio::select! {
                served = serving => if let Err(error) = served {
                    tracing::debug!(%peer, %error, "a subscriber's connection ended");
                },
                // Cancel-safe: the connection ends with it.
                _ = lives.changed() => {}
            }
        });
    }
}

/// A connection after the greeting.
struct Connection {
    stream: TcpStream,
    incoming: Splitter,
    out: BytesMut,
}

impl Connection {
    async fn open(mut stream: TcpStream, socket_type: &str) -> io::Result<Self> {
        let handshake = async {
            stream.set_nodelay(true)?;
            stream.write_all(&zmtp::greeting()).await?;
            let mut theirs = [0; GREETING_LENGTH];
            stream.read_exact(&mut theirs).await?;
            zmtp::read_greeting(&theirs).map_err(invalid)?;
            let mut out = BytesMut::new();
            zmtp::write_ready(socket_type, &mut out);
            let mut connection = Self { stream, incoming: Splitter::new(MESSAGE_BYTES_MAX), out };
            match connection.next().await? {
                Incoming::Command(ready) if &ready.name[..] == b"READY" => Ok(connection),
                _ => Err(io::ErrorKind::InvalidData.into()),
            }
        };
        tokio::time::timeout(HANDSHAKE, handshake).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// Sends what is to be sent, then waits for what comes; heartbeats are answered here.
    async fn next(&mut self) -> io::Result<Incoming> {
        loop {
            self.stream.write_all_buf(&mut self.out).await?;
            match self.incoming.pop().map_err(invalid)? {
                Some(Incoming::Command(ping)) if &ping.name[..] == b"PING" => {
                    zmtp::write_command("PONG", ping.data.get(2..).unwrap_or_default(), &mut self.out);
                }
                Some(incoming) => return Ok(incoming),
                None => {
                    if self.stream.read_buf(self.incoming.buffer()).await? == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
            }
        }
    }
}

/// Serves one `SUB` socket.
pub(super) async fn publish(stream: TcpStream, publisher: Arc<Publisher>) -> io::Result<()> {
    let mut connection = Connection::open(stream, "PUB").await?;
    let mut live = publisher.live.subscribe();
    let mut topics: Vec<Bytes> = Vec::new();
    loop {
        // First of all, so that a slow subscriber loses batches instead of filling memory here.
        connection.stream.write_all_buf(&mut connection.out).await?;
        tokio::select! {
            // Cancel-safe: what was read or is half sent stays in the connection.
            incoming = connection.next() => subscribe(&incoming?, &mut topics),
            // Cancel-safe.
            batch = live.recv() => match batch {
                // All batches have the empty topic, with which only the empty prefix agrees.
                Ok(batch) => if topics.iter().any(Bytes::is_empty) {
                    zmtp::write_message(&[b"", &batch.number.to_be_bytes(), &batch.payload], &mut connection.out);
                },
                Err(RecvError::Lagged(lost)) => tracing::debug!(lost, "a subscriber is too slow"),
                Err(RecvError::Closed) => return Ok(()),
            },
        }
    }
}

/// Takes a subscription: a command in ZMTP 3.1, a message before.
fn subscribe(incoming: &Incoming, topics: &mut Vec<Bytes>) {
    let (adds, topic) = match incoming {
        Incoming::Command(Command { name, data }) if &name[..] == b"SUBSCRIBE" => (true, data.clone()),
        Incoming::Command(Command { name, data }) if &name[..] == b"CANCEL" => (false, data.clone()),
        Incoming::Message(frames) => match frames.as_slice() {
            [one] if matches!(one.first(), Some(0 | 1)) => (one.starts_with(&[1]), one.slice(1..)),
            _ => return,
        },
        Incoming::Command(_) => return,
    };
    if adds && topics.len() < TOPICS_MAX {
        topics.push(topic);
    } else if let Some(at) = topics.iter().position(|known| *known == topic) {
        topics.remove(at);
    }
}

/// Serves one `DEALER` or `REQ` socket: each question is a delimiter and the first number wanted.
pub(super) async fn replay(stream: TcpStream, publisher: Arc<Publisher>) -> io::Result<()> {
    let mut connection = Connection::open(stream, "ROUTER").await?;
    loop {
        let Incoming::Message(frames) = connection.next().await? else { continue };
        let [delimiter, number] = frames.as_slice() else { continue };
        let Ok(number) = <[u8; 8]>::try_from(&number[..]) else { continue };
        if !delimiter.is_empty() {
            continue;
        }
        for Numbered { number, payload } in publisher.kept_from(u64::from_be_bytes(number)) {
            zmtp::write_message(&[b"", b"", &number.to_be_bytes(), &payload], &mut connection.out);
            connection.stream.write_all_buf(&mut connection.out).await?;
        }
        zmtp::write_message(&[b"", b"", &END.to_be_bytes(), b""], &mut connection.out);
    }
}

fn invalid(error: zmtp::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
