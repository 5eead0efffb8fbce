//! Publishes what the prefix cache gains and loses, as vLLM's `ZmqEventPublisher` does.
//!
//! A `PUB` socket sends one numbered batch for each step that changed the cache; a `ROUTER` socket repeats the last of
//! them when asked. A subscriber that does not keep up loses messages. Batches can be lost on purpose, and the publisher
//! can begin anew as if its engine had restarted.
//!
//! The parts: `contents` (which tokens a block's hash stands for), `payload` (a batch in MessagePack), `socket` (the
//! wire). Not here: tiers behind the GPU, LoRA, several groups of layers.

mod contents;
mod payload;
mod socket;

use std::{collections::VecDeque, fmt, io, net::SocketAddr, str::FromStr, sync::Arc};

use bytes::Bytes;
use forebay_simulator::BlockEvent;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::{broadcast, watch},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub(crate) use self::contents::{Content, Contents};
use self::payload::Told;

/// Messages that a subscriber may lag behind before it loses the oldest.
const LAG_MAX: usize = 4096;

/// Where and how to publish.
#[derive(Clone, Debug)]
pub struct KvEventOptions {
    pub events: KvAddress,
    /// Where batches are repeated; nowhere when absent.
    pub replay: Option<KvAddress>,
    pub form: KvEventForm,
    /// Batches kept for replays: vLLM's `buffer_steps`.
    pub buffer_steps: usize,
}

/// How events are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvEventForm {
    /// As vLLM 0.32 does: maps with a `type`, hashes as bytes.
    #[default]
    Maps,
    /// As releases before: arrays that begin with a tag, hashes as numbers.
    Arrays,
}

/// A `tcp://` address to listen on; port 0 takes a free one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvAddress(pub SocketAddr);

impl FromStr for KvAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let address = text.strip_prefix("tcp://").and_then(|address| address.parse().ok());
        address.map(Self).ok_or_else(|| format!("`{text}` is not of the form tcp://127.0.0.1:5557"))
    }
}

impl fmt::Display for KvAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tcp://{}", self.0)
    }
}

/// A batch on its way to subscribers.
#[derive(Clone, Debug)]
struct Numbered {
    number: u64,
    payload: Bytes,
}

/// The publisher of one engine.
#[derive(Debug)]
pub(crate) struct Publisher {
    form: KvEventForm,
    block_tokens: u32,
    buffer_steps: usize,
    state: Mutex<State>,
    live: broadcast::Sender<Numbered>,
    /// Counts the lives of the engine; a change ends all connections.
    lives: watch::Sender<u64>,
    /// Where it listens: events and replays.
    addresses: [Option<SocketAddr>; 2],
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    buffer: VecDeque<Numbered>,
    /// Batches that no subscriber will see.
    drop: u32,
}

/// The sockets of a publisher, before they are served.
pub(crate) struct Sockets {
    events: TcpListener,
    replay: Option<TcpListener>,
}

async fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let failed = |error: io::Error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}"));
    TcpListener::bind(address).await.map_err(failed)
}

impl Publisher {
    pub(crate) async fn bind(options: &KvEventOptions, block_tokens: u32) -> io::Result<(Self, Sockets)> {
        let events = listen(options.events.0).await?;
        let replay = match options.replay {
            Some(address) => Some(listen(address.0).await?),
            None => None,
        };
        let addresses = [Some(events.local_addr()?), replay.as_ref().map(TcpListener::local_addr).transpose()?];
        let publisher = Self {
            form: options.form,
            block_tokens,
            buffer_steps: options.buffer_steps,
            state: Mutex::default(),
            live: broadcast::Sender::new(LAG_MAX),
            lives: watch::Sender::new(0),
            addresses,
        };
        Ok((publisher, Sockets { events, replay }))
    }

    /// Serves its sockets until `shutdown`.
    pub(crate) fn serve(self: &Arc<Self>, sockets: Sockets, tasks: &TaskTracker, shutdown: &CancellationToken) {
        let publishing = socket::accept(sockets.events, Arc::clone(self), tasks.clone(), socket::publish);
        tasks.spawn(shutdown.clone().run_until_cancelled_owned(publishing));
        if let Some(replay) = sockets.replay {
            let replaying = socket::accept(replay, Arc::clone(self), tasks.clone(), socket::replay);
            tasks.spawn(shutdown.clone().run_until_cancelled_owned(replaying));
        }
    }

    /// Publishes what a step changed.
    pub(crate) fn step(&self, events: &[BlockEvent], contents: &Contents) {
        let told = payload::told(events, contents, self.block_tokens);
        if !told.is_empty() {
            self.publish(&told);
        }
    }

    /// Publishes that the cache is empty now.
    pub(crate) fn cleared(&self) {
        self.publish(&[Told::Cleared]);
    }

    /// Loses the next so many batches on the way to the subscribers; they are still repeated when asked for.
    pub(crate) fn drop_next(&self, batches: u32) {
        self.state.lock().drop = batches;
    }

    /// Begins anew, as with a new process: from number 0, with nothing to repeat, without connections.
    pub(crate) fn restart(&self) {
        *self.state.lock() = State::default();
        self.lives.send_modify(|life| *life += 1);
    }

    /// Ends all connections.
    pub(crate) fn disconnect(&self) {
        self.lives.send_modify(|life| *life += 1);
    }

    /// What vLLM's `/kv_event_sources` says of rank 0.
    pub(crate) fn describe(&self) -> Value {
        let [events, replay] =
            self.addresses.map(|address| address.map(|address| format!("tcp://*:{}", address.port())));
        json!({
            "enable_kv_cache_events": true,
            "publisher": "zmq",
            "endpoint": events,
            "replay_endpoint": replay,
            "buffer_steps": self.buffer_steps,
            "hwm": LAG_MAX,
            "max_queue_size": 100_000,
            "topic": "",
        })
    }

    fn publish(&self, told: &[Told<'_>]) {
        let payload = Bytes::from(payload::write(told, self.form));
        let mut state = self.state.lock();
        let numbered = Numbered { number: state.next, payload };
        state.next += 1;
        state.buffer.push_back(numbered.clone());
        while state.buffer.len() > self.buffer_steps {
            state.buffer.pop_front();
        }
        match state.drop.checked_sub(1) {
            Some(left) => state.drop = left,
            // Without subscribers there is nobody to send to.
            None => drop(self.live.send(numbered)),
        }
    }

    /// Kept batches from this number on.
    fn kept_from(&self, number: u64) -> Vec<Numbered> {
        self.state.lock().buffer.iter().filter(|batch| batch.number >= number).cloned().collect()
    }
}
