//! Following a publisher of KV events whose every byte the test decides.

use std::{future::Future, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use forebay_backends::{
    signals::kv_events::{KvEvents, KvSignal, KvSource, Standing},
    transport::zmtp::Address,
};
use forebay_proto::{
    kv_events::{EngineHash, Event},
    zmtp::{self, Incoming, Splitter},
};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::timeout,
};
use tokio_util::task::TaskTracker;
use url::Url;

use crate::support::PATIENCE;

/// A number and what is published under it.
type Batch = (u64, Vec<u8>);

/// The publisher's side of one connection.
struct Peer {
    stream: TcpStream,
    incoming: Splitter,
}

impl Peer {
    async fn accept(listener: &TcpListener, kind: &str) -> Self {
        let (mut stream, _) = listener.accept().await.expect("a connection");
        stream.write_all(&zmtp::greeting()).await.expect("a greeting");
        let mut theirs = [0; zmtp::GREETING_LENGTH];
        stream.read_exact(&mut theirs).await.expect("a greeting");
        assert_eq!(zmtp::read_greeting(&theirs), Ok(1));
        let mut peer = Self { stream, incoming: Splitter::new(1 << 16) };
        let mut ready = BytesMut::new();
        zmtp::write_ready(kind, &mut ready);
        peer.stream.write_all(&ready).await.expect("a command");
        peer
    }

    async fn incoming(&mut self) -> Incoming {
        loop {
            if let Some(incoming) = self.incoming.pop().expect("ZMTP") {
                return incoming;
            }
            assert_ne!(self.stream.read_buf(self.incoming.buffer()).await.expect("bytes"), 0, "closed");
        }
    }

    /// The next command, which has this name.
    async fn command(&mut self, name: &str) -> Bytes {
        let Incoming::Command(command) = self.incoming().await else { panic!("a message, not `{name}`") };
        assert_eq!(command.name, name.as_bytes());
        command.data
    }

    async fn send(&mut self, frames: &[&[u8]]) {
        let mut bytes = BytesMut::new();
        zmtp::write_message(frames, &mut bytes);
        self.stream.write_all(&bytes).await.expect("written");
    }

    /// Publishes a batch.
    async fn publish(&mut self, number: u64, payload: &[u8]) {
        self.send(&[b"topic", &number.to_be_bytes(), payload]).await;
    }
}

/// An engine's two sockets. What a replay tells is what `kept` holds when it is asked for.
struct Publisher {
    events: TcpListener,
    kept: Arc<Mutex<Vec<Batch>>>,
    /// First number of each question.
    asked: mpsc::Receiver<u64>,
    source: KvSource,
}

fn address(listener: &TcpListener) -> Address {
    let url = format!("tcp://{}", listener.local_addr().expect("an address"));
    Address::new(&Url::parse(&url).expect("a URL"), None).expect("an address")
}

impl Publisher {
    async fn start(replays: bool) -> Self {
        let events = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let replay = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let source = KvSource { events: address(&events), replay: replays.then(|| address(&replay)) };
        let kept: Arc<Mutex<Vec<Batch>>> = Arc::default();
        let (asks, asked) = mpsc::channel(16);
        let answers = Arc::clone(&kept);
        TaskTracker::new().spawn(async move {
            loop {
                let mut peer = Peer::accept(&replay, "ROUTER").await;
                peer.command("READY").await;
                let Incoming::Message(frames) = peer.incoming().await else { panic!("no question") };
                let [empty, from] = frames.as_slice() else { panic!("{frames:?}") };
                assert!(empty.is_empty());
                let from = u64::from_be_bytes(from[..].try_into().expect("eight bytes"));
                asks.send(from).await.expect("someone counts");
                let batches = answers.lock().clone();
                for (number, payload) in batches.iter().filter(|(number, _)| *number >= from) {
                    peer.send(&[b"", b"topic", &number.to_be_bytes(), payload]).await;
                }
                peer.send(&[b"", b"", &[0xff; 8], b""]).await;
            }
        });
        Self { events, kept, asked, source }
    }

    /// The next subscriber, once it has subscribed.
    async fn subscriber(&self) -> Peer {
        let mut peer = Peer::accept(&self.events, "PUB").await;
        let ready = peer.command("READY").await;
        assert!(ready.windows(3).any(|window| window == b"SUB"));
        assert_eq!(peer.command("SUBSCRIBE").await, "");
        peer
    }

    fn keep(&self, batches: &[Batch]) {
        *self.kept.lock() = batches.to_vec();
    }

    fn questions(&mut self) -> Vec<u64> {
        std::iter::from_fn(|| self.asked.try_recv().ok()).collect()
    }
}

/// A batch that removes one block.
fn batch(hash: u8) -> Vec<u8> {
    [b"\x93\x01\x91\x92\xacBlockRemoved\x91".as_slice(), &[0xcc, hash], &[0]].concat()
}

fn removed(signal: &KvSignal) -> Option<u64> {
    match signal {
        KvSignal::Events(events) => match &events[..] {
            [Event::Removed(removed)] => removed.blocks.first().map(|EngineHash(hash)| *hash),
            _ => None,
        },
        _ => None,
    }
}

async fn soon<T>(waiting: impl Future<Output = T>) -> T {
    timeout(PATIENCE, waiting).await.expect("within patience")
}

/// The next signals until one of them is `last`, in words.
async fn until(events: &mut KvEvents, last: &str) -> Vec<String> {
    let mut said = Vec::new();
    loop {
        let signal = soon(events.next()).await;
        let word = match (removed(&signal), &signal) {
            (Some(hash), _) => hash.to_string(),
            (None, KvSignal::Standing(standing)) => format!("{standing:?}"),
            (None, KvSignal::Forget(loss)) => format!("forget: {loss:?}"),
            (None, other) => format!("{other:?}"),
        };
        said.push(word);
        if said.last().is_some_and(|word| word == last) {
            return said;
        }
    }
}

/// A follower that is connected, and what it said until it stood so.
async fn follow(publisher: &Publisher, standing: &str) -> (KvEvents, Peer, Vec<String>) {
    let mut events = KvEvents::new(publisher.source.clone());
    let (said, peer) = tokio::join!(until(&mut events, standing), publisher.subscriber());
    (events, peer, said)
}

#[tokio::test]
async fn what_was_before_is_replayed_and_what_comes_is_told_once() {
    let mut publisher = Publisher::start(true).await;
    publisher.keep(&[(0, batch(10)), (1, batch(11)), (2, batch(12))]);
    let (mut events, mut peer, said) = follow(&publisher, "Complete").await;
    assert_eq!(said, ["10", "11", "12", "Complete"]);
    peer.publish(2, &batch(12)).await;
    peer.publish(3, &batch(13)).await;
    assert_eq!(until(&mut events, "13").await, ["13"], "a batch that was replayed is not told again");
    assert_eq!(publisher.questions(), [0]);
}

#[tokio::test]
async fn a_buffer_without_the_beginning_tells_a_part() {
    let publisher = Publisher::start(true).await;
    publisher.keep(&[(7, batch(17)), (8, batch(18))]);
    let (mut events, mut peer, said) = follow(&publisher, "Partial").await;
    assert_eq!(said, ["17", "18", "Partial"]);
    peer.publish(9, b"\x93\x01\x91\x91\xb0AllBlocksCleared\0").await;
    let said = until(&mut events, "Complete").await;
    assert_eq!(said, ["Events([Cleared])", "Complete"], "of an empty cache everything is known");
}

#[tokio::test]
async fn a_fresh_publisher_has_told_everything() {
    let publisher = Publisher::start(true).await;
    let (mut events, mut peer, said) = follow(&publisher, "Complete").await;
    assert_eq!(said, ["Complete"]);
    peer.publish(0, &batch(1)).await;
    assert_eq!(until(&mut events, "1").await, ["1"]);
}

#[tokio::test]
async fn a_gap_is_filled_in_order() {
    let mut publisher = Publisher::start(true).await;
    let (mut events, mut peer, _) = follow(&publisher, "Complete").await;
    peer.publish(0, &batch(1)).await;
    let all: Vec<_> = (0_u8..5).map(|at| (u64::from(at), batch(at + 1))).collect();
    publisher.keep(&all);
    peer.publish(4, &batch(5)).await;
    assert_eq!(until(&mut events, "Filled").await, ["1", "2", "3", "4", "5", "Filled"]);
    peer.publish(5, &batch(6)).await;
    assert_eq!(until(&mut events, "6").await, ["6"]);
    assert_eq!(publisher.questions(), [0, 1]);
}

#[tokio::test]
async fn a_gap_that_cannot_be_filled_voids_what_was_known() {
    for (replays, kept) in [(false, vec![]), (true, vec![]), (true, vec![(3, batch(4)), (4, batch(5))])] {
        let publisher = Publisher::start(replays).await;
        let (mut events, mut peer, _) = follow(&publisher, if replays { "Complete" } else { "Partial" }).await;
        peer.publish(0, &batch(1)).await;
        until(&mut events, if replays { "1" } else { "Complete" }).await;
        publisher.keep(&kept);
        peer.publish(4, &batch(5)).await;
        let told: Vec<String> = kept.iter().take(1).map(|_| "4".to_owned()).collect();
        let expected = [vec!["forget: Gap".to_owned()], told, vec!["5".to_owned(), "Partial".to_owned()]].concat();
        assert_eq!(until(&mut events, "Partial").await, expected, "{replays} {kept:?}");
        peer.publish(5, &batch(6)).await;
        assert_eq!(until(&mut events, "6").await, ["6"]);
    }
}

/// A ROUTER drops what its queue cannot hold: the replay itself has a hole.
#[tokio::test]
async fn a_replay_with_a_hole_is_asked_for_again() {
    let mut publisher = Publisher::start(true).await;
    publisher.keep(&[(0, batch(1)), (1, batch(2)), (4, batch(5))]);
    let mut events = KvEvents::new(publisher.source.clone());
    let (_peer, first) = tokio::join!(publisher.subscriber(), until(&mut events, "1"));
    assert_eq!(first, ["1"]);
    publisher.keep(&[(0, batch(1)), (1, batch(2)), (2, batch(3)), (3, batch(4)), (4, batch(5))]);
    let rest = until(&mut events, "Complete").await;
    assert_eq!(rest, ["2", "3", "4", "5", "Complete"]);
    assert_eq!(publisher.questions(), [0, 2]);
}

#[tokio::test]
async fn a_publisher_that_begins_anew() {
    let publisher = Publisher::start(true).await;
    let (mut events, mut peer, _) = follow(&publisher, "Complete").await;
    for number in 0..3 {
        peer.publish(number, &batch(number as u8 + 1)).await;
    }
    until(&mut events, "3").await;
    // On the same connection.
    peer.publish(0, &batch(9)).await;
    assert_eq!(until(&mut events, "9").await, ["forget: Restarted", "9"]);
    // By another process, which is as far as the old one was, but with other events.
    publisher.keep(&[(0, batch(7))]);
    drop(peer);
    let (mut peer, said) = tokio::join!(publisher.subscriber(), until(&mut events, "7"));
    assert_eq!(said, ["forget: Restarted", "7"]);
    peer.publish(1, &batch(8)).await;
    assert_eq!(until(&mut events, "8").await, ["8"]);
    // By one that is less far.
    publisher.keep(&[]);
    drop(peer);
    let (mut peer, said) = tokio::join!(publisher.subscriber(), until(&mut events, "forget: Restarted"));
    assert_eq!(said, ["forget: Restarted"]);
    peer.publish(0, &batch(2)).await;
    assert_eq!(until(&mut events, "2").await, ["2"]);
}

#[tokio::test]
async fn a_lost_connection_costs_nothing_where_the_publisher_proves_itself() {
    let publisher = Publisher::start(true).await;
    let (mut events, mut peer, _) = follow(&publisher, "Complete").await;
    peer.publish(0, &batch(1)).await;
    until(&mut events, "1").await;
    publisher.keep(&[(0, batch(1)), (1, batch(2))]);
    drop(peer);
    let (_peer, said) = tokio::join!(publisher.subscriber(), until(&mut events, "2"));
    assert_eq!(said, ["2"], "what was missed meanwhile, and no more");
}

#[tokio::test]
async fn a_lost_connection_voids_what_nothing_proves() {
    let publisher = Publisher::start(false).await;
    let (mut events, mut peer, _) = follow(&publisher, "Partial").await;
    peer.publish(0, &batch(1)).await;
    until(&mut events, "Complete").await;
    drop(peer);
    let (mut peer, said) = tokio::join!(publisher.subscriber(), until(&mut events, "Partial"));
    assert_eq!(said, ["forget: Unproven", "Partial"]);
    peer.publish(1, &batch(2)).await;
    assert_eq!(until(&mut events, "2").await, ["2"]);
}

#[tokio::test]
async fn what_cannot_be_read_voids_what_was_known() {
    let publisher = Publisher::start(true).await;
    let (mut events, mut peer, _) = follow(&publisher, "Complete").await;
    // Not a KV event at all: passed over.
    peer.send(&[b"hello"]).await;
    peer.send(&[b"topic", b"short", &batch(1)]).await;
    peer.publish(0, &batch(1)).await;
    assert_eq!(until(&mut events, "1").await, ["1"]);
    peer.publish(1, b"garbage").await;
    assert_eq!(until(&mut events, "Partial").await, ["forget: Unreadable", "Partial"]);
    peer.publish(2, &batch(3)).await;
    assert_eq!(until(&mut events, "3").await, ["3"], "the numbers go on");
}

/// Whoever sends what is not ZMTP, or too much of it, is left, and asked again later.
#[tokio::test]
async fn what_is_not_zeromq_is_left() {
    let http = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\nserver: x\r\n\r\n".as_slice();
    let huge = [&zmtp::greeting()[..], b"\x02\x7f\xff\xff\xff\xff\xff\xff\xff"].concat();
    let router = {
        let mut bytes = BytesMut::from(&zmtp::greeting()[..]);
        zmtp::write_ready("ROUTER", &mut bytes);
        bytes.to_vec()
    };
    let publisher = Publisher::start(true).await;
    let mut events = KvEvents::new(publisher.source.clone());
    let refusing = async {
        for bytes in [http, &huge, &router] {
            let (mut stream, _) = publisher.events.accept().await.expect("a connection");
            stream.write_all(bytes).await.expect("written");
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest).await;
        }
        publisher.subscriber().await
    };
    let (_peer, said) = tokio::join!(refusing, until(&mut events, "Complete"));
    assert_eq!(said, ["Complete"]);
}

#[tokio::test(start_paused = true)]
async fn silence_is_asked_about_and_then_given_up() {
    let publisher = Publisher::start(false).await;
    let (mut events, mut peer, _) = follow(&publisher, "Partial").await;
    let answering = async {
        for _ in 0..3 {
            assert_eq!(peer.command("PING").await, b"\0\0".as_slice());
            let mut pong = BytesMut::new();
            zmtp::write_command("PONG", b"", &mut pong);
            peer.stream.write_all(&pong).await.expect("written");
        }
        assert_eq!(peer.command("PING").await, b"\0\0".as_slice());
        // No answer any more: it is left, and after a while, in which nobody lets it in, it says so.
        let mut rest = Vec::new();
        assert_eq!(peer.stream.read_to_end(&mut rest).await.expect("closed"), 0);
    };
    // The listener's queue still takes connections, which nobody greets.
    let (said, ()) = tokio::join!(async { timeout(Duration::from_secs(600), events.next()).await }, answering);
    assert_eq!(said.expect("a signal"), KvSignal::Standing(Standing::Away));
}

/// A caller that does not read makes the publisher wait, and costs no memory here.
#[tokio::test]
async fn a_slow_caller_holds_the_publisher_up() {
    let publisher = Publisher::start(false).await;
    let (mut events, mut peer, _) = follow(&publisher, "Partial").await;
    let payload = [b"\x92\x01\x91\x92\xaaBlockMoved\xc6\x00\x01\x00\x00".as_slice(), &vec![0; 1 << 16]].concat();
    let mut sent = 0_u64;
    while timeout(Duration::from_millis(200), peer.publish(sent, &payload)).await.is_ok() {
        sent += 1;
        assert!(sent < 1000, "64 MB and nobody reads");
    }
    assert_eq!(soon(events.next()).await, KvSignal::Standing(Standing::Complete), "the first one is there");
}
