//! What an engine holds in its prefix cache, as its own events tell it.
//!
//! vLLM and SGLang publish them over ZeroMQ: three frames a message, topic, number (8 bytes, big-endian) and payload.
//! A second socket, where there is one, repeats the last messages: asked with `[empty, first number]` it answers
//! `[empty, topic, number, payload]` each, and last number -1 (vLLM 0.32.0, `ZmqEventPublisher`; releases before leave
//! out the topic). Both are followed at the pace at which [`KvEvents::next`] is called: a slow caller makes the
//! publisher drop messages, which shows as a gap, and costs no memory here.
//!
//! Invariants: events come in the order of their numbers, each once; where the order is broken and cannot be mended,
//! [`KvSignal::Forget`] comes before anything else; after a connection was lost, what was known is only kept when the
//! publisher proves, by repeating the last message, that it is the same one.
//!
//! A silent stream is no verdict about the worker: an idle engine publishes nothing. Only a lost connection counts, and
//! only for what may be believed of the cache.

mod sequence;

use std::{collections::VecDeque, io, time::Duration};

use bytes::Bytes;
use forebay_proto::kv_events::{self, Event};
use tokio::time::{Instant, sleep_until, timeout_at};

use self::sequence::{Mark, Sequence, Verdict};
use crate::transport::zmtp::{Address, Peer, Role};

/// Where one engine publishes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvSource {
    /// Its `PUB` socket.
    pub events: Address,
    /// Its `ROUTER` socket for replays.
    pub replay: Option<Address>,
}

/// News of one engine's prefix cache.
#[derive(Debug, PartialEq)]
pub enum KvSignal {
    /// What happened in one step.
    Events(Vec<Event>),
    /// What was told before holds no more.
    Forget(Loss),
    /// A gap was found and filled.
    Filled,
    /// How far the events can be relied on changed.
    Standing(Standing),
}

/// Why what was known is void.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Messages are missing and cannot be had.
    Gap,
    /// The engine began anew, with an empty cache.
    Restarted,
    /// After a new connection nothing proves that it is the same engine, or that nothing was missed.
    Unproven,
    /// A message could not be read.
    Unreadable,
}

/// How far the events can be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// There is no connection, for longer than a moment.
    Away,
    /// What is told is true, but the cache may hold more than that.
    Partial,
    /// All that the cache holds was told.
    Complete,
}

/// First and longest pause between two attempts to connect, and the random part of each.
const PAUSE: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));
const PAUSE_JITTER: f64 = 0.3;
/// A connection that lasts this long was a good one: the next pause is the first again.
const GOOD_CONNECTION: Duration = Duration::from_secs(10);
/// How long a lost connection goes unmentioned.
const AWAY_AFTER: Duration = Duration::from_secs(5);
/// Silence in a replay that ends it. A publisher looks for questions every 0.1 s, between its messages.
const REPLAY_SILENCE: Duration = Duration::from_secs(5);
/// The longest replay; vLLM keeps 10,000 messages by default.
const REPLAY_LIMIT: Duration = Duration::from_secs(60);
/// The number that ends a replay.
const END: u64 = u64::MAX;

/// Follows one engine's events.
#[derive(Debug)]
pub struct KvEvents {
    source: KvSource,
    sequence: Sequence,
    state: State,
    ready: VecDeque<KvSignal>,
    told: Standing,
    pause: Duration,
}

#[derive(Debug)]
enum State {
    Apart { since: Instant, retry: Instant },
    Live(Box<Live>),
}

#[derive(Debug)]
struct Live {
    peer: Peer,
    since: Instant,
    replay: Option<Replay>,
}

/// A replay under way; the live stream waits.
#[derive(Debug)]
struct Replay {
    peer: Peer,
    /// The message that must come first, else the publisher is another one.
    proof: Option<Mark>,
    /// The live message that showed the gap.
    held: Option<Message>,
    /// Something new came.
    progress: bool,
    /// Something is not kept any more.
    lost: bool,
    until: Instant,
}

/// A numbered payload.
#[derive(Debug)]
struct Message {
    number: u64,
    payload: Bytes,
}

impl Message {
    /// Number and payload are the last two frames.
    fn read(frames: &[Bytes]) -> Option<Self> {
        let [.., number, payload] = frames else { return None };
        let number = <[u8; 8]>::try_from(&number[..]).ok()?;
        Some(Self { number: u64::from_be_bytes(number), payload: payload.clone() })
    }
}

impl KvEvents {
    #[must_use]
    pub fn new(source: KvSource) -> Self {
        let now = Instant::now();
        Self {
            source,
            sequence: Sequence::default(),
            state: State::Apart { since: now, retry: now },
            ready: VecDeque::new(),
            told: Standing::Away,
            pause: PAUSE.0,
        }
    }

    /// Waits for the next signal. To be dropped only together with this: a step that is cut short may lose a message.
    pub async fn next(&mut self) -> KvSignal {
        loop {
            if let Some(signal) = self.ready.pop_front() {
                return signal;
            }
            match &mut self.state {
                State::Apart { since, retry } => {
                    let (since, retry) = (*since, *retry);
                    self.connect(since, retry).await;
                }
                State::Live(live) => match &mut live.replay {
                    Some(replay) => {
                        let silence = replay.until.min(Instant::now() + REPLAY_SILENCE);
                        let came = timeout_at(silence, replay.peer.next()).await.ok().and_then(Result::ok);
                        match came.and_then(|frames| Message::read(&frames)) {
                            Some(message) if message.number == END => self.replay_ended().await,
                            Some(message) => self.replayed(message).await,
                            None => self.replay_failed(),
                        }
                    }
                    None => match live.peer.next().await {
                        Ok(frames) => match Message::read(&frames) {
                            Some(message) => self.live(message, self.source.replay.is_some()).await,
                            None => tracing::debug!(source = %self.source.events, "a message is no KV event"),
                        },
                        Err(error) => self.disconnected(&error),
                    },
                },
            }
        }
    }

    async fn connect(&mut self, since: Instant, retry: Instant) {
        let late = since + AWAY_AFTER;
        if self.told != Standing::Away && late < retry {
            sleep_until(late).await;
            return self.tell(Standing::Away);
        }
        sleep_until(retry).await;
        match Peer::connect(&self.source.events, Role::Subscriber).await {
            Ok(peer) => {
                tracing::debug!(source = %self.source.events, "subscribed to KV events");
                self.sequence.connected();
                self.state = State::Live(Box::new(Live { peer, since: Instant::now(), replay: None }));
                let proof = self.sequence.last();
                self.ask(proof.map_or(0, |mark| mark.number), proof, None).await;
            }
            Err(error) => {
                tracing::debug!(source = %self.source.events, %error, "cannot subscribe to KV events");
                self.apart(since);
            }
        }
    }

    fn disconnected(&mut self, error: &io::Error) {
        tracing::debug!(source = %self.source.events, %error, "lost the connection to KV events");
        if let State::Live(live) = &self.state
            && live.since.elapsed() >= GOOD_CONNECTION
        {
            self.pause = PAUSE.0;
        }
        self.apart(Instant::now());
    }

    fn apart(&mut self, since: Instant) {
        let pause = self.pause.mul_f64(1.0 + rand::random_range(-PAUSE_JITTER..PAUSE_JITTER));
        self.pause = (self.pause * 2).min(PAUSE.1);
        self.state = State::Apart { since, retry: Instant::now() + pause };
        if since.elapsed() >= AWAY_AFTER {
            self.tell(Standing::Away);
        }
    }

    /// Takes what came on the live stream, or asks for what is missing before it, if it `may_ask`.
    async fn live(&mut self, message: Message, may_ask: bool) {
        match self.sequence.live(message.number) {
            Verdict::Take => self.take(&message),
            Verdict::Known => {}
            Verdict::Missing(from) if may_ask => self.ask(from, None, Some(message)).await,
            Verdict::Missing(_) => self.take_after_gap(&message),
            Verdict::Restarted => {
                self.forget(Loss::Restarted);
                match message.number {
                    0 => self.take(&message),
                    _ if may_ask => self.ask(0, None, Some(message)).await,
                    _ => self.take_after_gap(&message),
                }
            }
        }
        self.settle();
    }

    fn take_after_gap(&mut self, message: &Message) {
        if self.sequence.next().is_some() {
            self.forget(Loss::Gap);
        }
        self.take(message);
    }

    /// Asks for a replay; without anyone to ask, it fails at once.
    async fn ask(&mut self, from: u64, proof: Option<Mark>, held: Option<Message>) {
        let asking = async {
            let mut peer = Peer::connect(self.source.replay.as_ref()?, Role::Dealer).await.ok()?;
            peer.send(&[b"", &from.to_be_bytes()]).await.ok()?;
            Some(peer)
        };
        let answering = asking.await;
        drop(self.end_replay());
        match (answering, &mut self.state) {
            (Some(peer), State::Live(live)) => {
                let until = Instant::now() + REPLAY_LIMIT;
                live.replay = Some(Replay { peer, proof, held, progress: false, lost: false, until });
            }
            _ => self.unanswered(proof, held),
        }
    }

    /// One message of the replay.
    async fn replayed(&mut self, message: Message) {
        let Some(replay) = self.replay() else { return };
        if let Some(proof) = replay.proof.take() {
            if proof == Mark::new(message.number, &message.payload) {
                replay.progress = true;
                return;
            }
            // Another engine, or one that has forgotten how far it was: all from the beginning.
            self.forget(Loss::Restarted);
            return self.ask(0, None, None).await;
        }
        let (progress, next) = (replay.progress, self.sequence.next());
        match next {
            Some(next) if message.number < next => return,
            // A ROUTER drops what its queue cannot hold: asked again it goes on from there.
            Some(next) if message.number > next && progress => {
                let held = self.end_replay().and_then(|replay| replay.held);
                return self.ask(next, None, held).await;
            }
            Some(next) if message.number > next => self.forget(Loss::Gap),
            _ => {}
        }
        if let Some(replay) = self.replay() {
            replay.progress = true;
            replay.lost |= next.is_some_and(|next| message.number > next);
        }
        self.take(&message);
    }

    async fn replay_ended(&mut self) {
        let Some(replay) = self.end_replay() else { return };
        if replay.proof.is_some() {
            // It does not know the last message: it began anew.
            self.forget(Loss::Restarted);
            return self.ask(0, None, None).await;
        }
        match replay.held {
            Some(message) => {
                let filled = self.sequence.next() >= Some(message.number);
                self.after_replay(&message);
                if filled && replay.progress && !replay.lost {
                    self.ready.push_back(KvSignal::Filled);
                }
            }
            None if self.sequence.next().is_none() => self.sequence.is_fresh(),
            None => {}
        }
        self.settle();
    }

    fn replay_failed(&mut self) {
        if let Some(Replay { proof, held, .. }) = self.end_replay() {
            self.unanswered(proof, held);
        }
    }

    /// What is missing cannot be had.
    fn unanswered(&mut self, proof: Option<Mark>, held: Option<Message>) {
        if proof.is_some() {
            self.forget(Loss::Unproven);
        }
        if let Some(message) = held {
            self.after_replay(&message);
        }
        self.settle();
    }

    fn replay(&mut self) -> Option<&mut Replay> {
        match &mut self.state {
            State::Live(live) => live.replay.as_mut(),
            State::Apart { .. } => None,
        }
    }

    fn end_replay(&mut self) -> Option<Replay> {
        match &mut self.state {
            State::Live(live) => live.replay.take(),
            State::Apart { .. } => None,
        }
    }

    /// The live message that showed a gap, which is filled by now or never.
    fn after_replay(&mut self, message: &Message) {
        match self.sequence.next() {
            Some(next) if message.number < next => {}
            Some(next) if message.number == next => self.take(message),
            _ => self.take_after_gap(message),
        }
    }

    fn take(&mut self, message: &Message) {
        self.sequence.took(Mark::new(message.number, &message.payload));
        match kv_events::read(&message.payload) {
            Ok(events) => {
                self.sequence.complete |= events.contains(&Event::Cleared);
                if !events.is_empty() {
                    self.ready.push_back(KvSignal::Events(events));
                }
            }
            Err(error) => {
                tracing::debug!(source = %self.source.events, %error, "a message cannot be read");
                self.sequence.complete = false;
                self.ready.push_back(KvSignal::Forget(Loss::Unreadable));
            }
        }
    }

    fn forget(&mut self, loss: Loss) {
        tracing::debug!(source = %self.source.events, ?loss, "KV events are void");
        self.sequence.forget();
        self.ready.push_back(KvSignal::Forget(loss));
    }

    /// Says how far the events can be relied on, once no replay is under way.
    fn settle(&mut self) {
        if let State::Live(live) = &self.state
            && live.replay.is_none()
        {
            let standing = if self.sequence.complete { Standing::Complete } else { Standing::Partial };
            self.tell(standing);
        }
    }

    fn tell(&mut self, standing: Standing) {
        if self.told != standing {
            self.told = standing;
            self.ready.push_back(KvSignal::Standing(standing));
        }
    }
}
