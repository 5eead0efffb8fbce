//! Answers that need no call of their own: coalescing with an equal request in flight.
//!
//! Where a model allows it, requests that must get the same answer share one call: equal to the byte, of one class, with
//! nothing drawn by chance (temperature 0 or a seed; embeddings and the like anyway). Whoever is first makes the call;
//! it belongs to nobody: it goes on while anyone listens. What came so far is kept up to a bound, so that who comes
//! later still gets it from the start.
//!
//! Invariants: a call is shared under one [`Key`] at a time; listeners get the same bytes in the same order; the
//! fastest sets the pace, and who falls further behind than the bound is cut, so that a slow reader stalls nobody; all
//! calls together keep no more than a bound, either; exactly one listener pays, the last of those whose turn it was.
//!
//! Not here: the call itself (`pipeline`), answers that are over.

mod flight;

use std::collections::hash_map::Entry;
use std::sync::Arc;

use bytes::Bytes;
use foldhash::HashMap;
use http::HeaderValue;
use parking_lot::Mutex;

use flight::{Flight, Kept};
pub use flight::{Left, Listener, Next, Pilot};

/// Longer bodies are not compared.
pub const BODY_BYTES_MAX: usize = 256 << 10;

/// What requests that share an answer have in common: all that an engine sees, and what decides when it does. While
/// callers have no keys they are one tenant.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key {
    /// The configured model.
    pub model: Arc<str>,
    pub path: &'static str,
    pub class: usize,
    /// But for the trace.
    pub headers: Vec<(String, HeaderValue)>,
    pub body: Bytes,
}

/// One who joined a call.
#[derive(Debug)]
pub struct Seat<H: Clone, E: Clone, F: Clone + Default> {
    pub listener: Listener<H, E, F>,
    /// For the one who has to make the call.
    pub pilot: Option<Pilot<H, E, F>>,
}

type Flights<H, E, F> = HashMap<Key, Arc<Flight<H, E, F>>>;

/// Calls that are under way. `H` is what is known when an answer begins, `E` why none does, `F` what it has cost.
#[derive(Debug)]
pub struct Coalescing<H, E, F> {
    flights: Mutex<Flights<H, E, F>>,
    kept: Arc<Kept>,
}

impl<H, E, F> Default for Coalescing<H, E, F> {
    fn default() -> Self {
        Self { flights: Mutex::default(), kept: Arc::default() }
    }
}

impl<H: Clone, E: Clone, F: Clone + Default> Coalescing<H, E, F> {
    /// Listens to the call under `key`. Where there is none that can be joined, whoever asks has to make it; or, where calls
    /// keep too much already, a call of its own.
    pub fn join(self: &Arc<Self>, key: Key) -> Option<Seat<H, E, F>> {
        let mut flights = self.flights.lock();
        let slot = flights.entry(key);
        if let Entry::Occupied(known) = &slot
            && let Some(listener) = Flight::join(known.get())
        {
            return Some(Seat { listener, pilot: None });
        }
        if !self.kept.has_room() {
            return None;
        }
        let (flight, listener) = Flight::begin(Arc::clone(&self.kept));
        let key = slot.key().clone();
        slot.insert_entry(Arc::clone(&flight));
        Some(Seat { listener, pilot: Some(Pilot::new(flight, Arc::clone(self), key)) })
    }

    /// Nobody joins this call any more.
    fn close(&self, key: &Key, flight: &Arc<Flight<H, E, F>>) {
        let mut flights = self.flights.lock();
        if flights.get(key).is_some_and(|known| Arc::ptr_eq(known, flight)) {
            flights.remove(key);
        }
    }
}
