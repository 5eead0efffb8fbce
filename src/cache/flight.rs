//! One call and those who listen to it.

use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use parking_lot::Mutex;

use super::{Coalescing, Key};

/// What is kept of an answer for those who have not read it yet: longer than almost any, and little beside a KV cache.
const KEPT_BYTES_MAX: usize = 4 << 20;
/// The same of all calls together. One that finds it used up keeps what the fastest of its readers has yet to read.
const ALL_KEPT_BYTES_MAX: usize = 256 << 20;

/// Bytes that all calls keep.
#[derive(Debug, Default)]
pub(super) struct Kept(AtomicUsize);

impl Kept {
    fn holds(&self, more: usize) -> bool {
        self.0.load(Ordering::Relaxed).saturating_add(more) <= ALL_KEPT_BYTES_MAX
    }

    /// Whether there is room for what a call may keep.
    pub(super) fn has_room(&self) -> bool {
        self.holds(KEPT_BYTES_MAX)
    }
}

#[derive(Debug)]
pub(super) struct Flight<H, E, F>(Mutex<State<H, E, F>>);

#[derive(Debug)]
struct State<H, E, F> {
    head: Option<Result<H, E>>,
    /// The answer, but for the pieces that were dropped in front.
    kept: VecDeque<Bytes>,
    kept_bytes: usize,
    /// With what others keep.
    all_kept: Arc<Kept>,
    dropped: u64,
    end: Option<End>,
    facts: F,
    listeners: BTreeMap<u64, Place>,
    next_listener: u64,
    payer: u64,
    /// Of whoever makes the call.
    pilot: Option<Waker>,
}

#[derive(Debug, Default)]
struct Place {
    /// Pieces read.
    position: u64,
    waker: Option<Waker>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Whole,
    Broken,
}

/// What a listener gets next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    Bytes(Bytes),
    /// It has all of the answer.
    End,
    /// The answer broke off, and its bytes do not say so.
    Broken,
    /// It fell further behind than what is kept.
    Behind,
}

impl<H: Clone, E: Clone, F: Clone + Default> Flight<H, E, F> {
    pub(super) fn begin(all_kept: Arc<Kept>) -> (Arc<Self>, Listener<H, E, F>) {
        let flight = Arc::new(Self(Mutex::new(State {
            head: None,
            kept: VecDeque::new(),
            kept_bytes: 0,
            all_kept,
            dropped: 0,
            end: None,
            facts: F::default(),
            listeners: BTreeMap::from([(0, Place::default())]),
            next_listener: 1,
            payer: 0,
            pilot: None,
        })));
        let listener = Listener { flight: Arc::clone(&flight), id: 0, left: false };
        (flight, listener)
    }

    /// Unless it has ended, nobody listens, or its beginning is not kept any more.
    pub(super) fn join(this: &Arc<Self>) -> Option<Listener<H, E, F>> {
        let mut state = this.0.lock();
        if state.end.is_some() || state.listeners.is_empty() || state.dropped > 0 {
            return None;
        }
        let id = state.next_listener;
        state.next_listener += 1;
        state.listeners.insert(id, Place::default());
        Some(Listener { flight: Arc::clone(this), id, left: false })
    }
}

impl<H, E, F> State<H, E, F> {
    fn wake_all(&mut self) {
        self.listeners.values_mut().filter_map(|place| place.waker.take()).for_each(Waker::wake);
    }

    /// Drops pieces in front of `position`, as far as it needs for so many bytes more; says whether they can be kept. A
    /// piece that is longer than what is kept can be, alone.
    fn make_room(&mut self, bytes: usize, position: Option<u64>) -> bool {
        while !self.has_room(bytes) && position.is_none_or(|position| position > self.dropped) {
            let Some(first) = self.kept.pop_front() else { return true };
            self.kept_bytes -= first.len();
            self.all_kept.0.fetch_sub(first.len(), Ordering::Relaxed);
            self.dropped += 1;
        }
        self.kept.is_empty() || self.has_room(bytes)
    }

    fn has_room(&self, bytes: usize) -> bool {
        self.kept_bytes + bytes <= KEPT_BYTES_MAX && self.all_kept.holds(bytes)
    }

    fn positions(&self) -> impl Iterator<Item = u64> {
        self.listeners.values().map(|place| place.position)
    }
}

impl<H, E, F> Drop for State<H, E, F> {
    fn drop(&mut self) {
        self.all_kept.0.fetch_sub(self.kept_bytes, Ordering::Relaxed);
    }
}

/// Makes the call that others listen to. Dropping it ends the call; an answer without an end is broken off.
#[derive(Debug)]
pub struct Pilot<H: Clone, E: Clone, F: Clone + Default> {
    flight: Arc<Flight<H, E, F>>,
    all: Arc<Coalescing<H, E, F>>,
    key: Key,
}

impl<H: Clone, E: Clone, F: Clone + Default> Pilot<H, E, F> {
    pub(super) fn new(flight: Arc<Flight<H, E, F>>, all: Arc<Coalescing<H, E, F>>, key: Key) -> Self {
        Self { flight, all, key }
    }

    /// Says what the call has cost by now.
    pub fn note(&self, facts: F) {
        self.flight.0.lock().facts = facts;
    }

    /// The answer begins, or does not.
    pub fn head(&self, head: Result<H, E>, facts: F) {
        let mut state = self.flight.0.lock();
        state.head = Some(head);
        state.facts = facts;
        state.wake_all();
    }

    /// Hands on the next piece, for which there is room, and what the answer has cost by now.
    pub fn push(&self, bytes: Bytes, facts: F) {
        let mut state = self.flight.0.lock();
        state.kept_bytes += bytes.len();
        state.all_kept.0.fetch_add(bytes.len(), Ordering::Relaxed);
        state.kept.push_back(bytes);
        state.facts = facts;
        state.wake_all();
    }

    /// The answer is over; `whole` when nothing of it is missing or its bytes say what is.
    pub fn end(&self, whole: bool, facts: F) {
        let mut state = self.flight.0.lock();
        state.end = Some(if whole { End::Whole } else { End::Broken });
        state.facts = facts;
        state.wake_all();
    }

    /// Waits until so many bytes more can be kept and nobody falls behind for them.
    pub async fn room_for_all(&self, bytes: usize) {
        self.until(|state| state.make_room(bytes, state.positions().min())).await;
    }

    /// Waits until so many bytes more can be kept for the one who is furthest; who needs what they take the place of is
    /// cut.
    pub async fn room(&self, bytes: usize) {
        self.until(|state| state.make_room(bytes, state.positions().max())).await;
    }

    /// Waits until nobody listens any more.
    pub async fn abandoned(&self) {
        self.until(|state| state.listeners.is_empty()).await;
    }

    async fn until(&self, mut condition: impl FnMut(&mut State<H, E, F>) -> bool) {
        poll_fn(|context| {
            let mut state = self.flight.0.lock();
            if condition(&mut state) {
                return Poll::Ready(());
            }
            state.pilot = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

impl<H: Clone, E: Clone, F: Clone + Default> Drop for Pilot<H, E, F> {
    fn drop(&mut self) {
        self.all.close(&self.key, &self.flight);
        let mut state = self.flight.0.lock();
        state.end.get_or_insert(End::Broken);
        state.wake_all();
    }
}

/// One who listens to a call. Dropping it leaves.
#[derive(Debug)]
pub struct Listener<H, E, F> {
    flight: Arc<Flight<H, E, F>>,
    id: u64,
    left: bool,
}

impl<H: Clone, E: Clone, F: Clone + Default> Listener<H, E, F> {
    /// How the answer begins; `None` when the call is gone without a word.
    pub async fn head(&mut self) -> Option<Result<H, E>> {
        poll_fn(|context| {
            let mut state = self.flight.0.lock();
            if let Some(head) = &state.head {
                return Poll::Ready(Some(head.clone()));
            }
            if state.end.is_some() {
                return Poll::Ready(None);
            }
            if let Some(place) = state.listeners.get_mut(&self.id) {
                place.waker = Some(context.waker().clone());
            }
            Poll::Pending
        })
        .await
    }

    /// What the call has cost by now.
    pub fn facts(&self) -> F {
        self.flight.0.lock().facts.clone()
    }

    /// The next piece of the answer.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Next> {
        let mut state = self.flight.0.lock();
        let State { listeners, kept, dropped, end, pilot, .. } = &mut *state;
        let Some(place) = listeners.get_mut(&self.id) else { return Poll::Ready(Next::End) };
        let Some(at) = place.position.checked_sub(*dropped) else { return Poll::Ready(Next::Behind) };
        if let Some(bytes) = usize::try_from(at).ok().and_then(|at| kept.get(at)) {
            place.position += 1;
            pilot.take().into_iter().for_each(Waker::wake);
            return Poll::Ready(Next::Bytes(bytes.clone()));
        }
        match end {
            Some(End::Whole) => Poll::Ready(Next::End),
            Some(End::Broken) => Poll::Ready(Next::Broken),
            None => {
                place.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// What holds for a listener that leaves.
#[derive(Debug, PartialEq, Eq)]
pub struct Left<F> {
    /// What the call has cost by now.
    pub facts: F,
    /// Whether this one pays for it. While others listen, one of them does.
    pub pays: bool,
    /// Whether it has all that came by now.
    pub has_all: bool,
}

impl<H, E, F: Clone> Listener<H, E, F> {
    /// Leaves; to be said once.
    pub fn leave(&mut self) -> Left<F> {
        let mut state = self.flight.0.lock();
        let facts = state.facts.clone();
        self.left = true;
        let Some(place) = state.listeners.remove(&self.id) else { return Left { facts, pays: false, has_all: false } };
        let has_all = place.position == state.dropped + state.kept.len() as u64;
        let next = state.listeners.keys().next().copied();
        let pays = state.payer == self.id && (next.is_none() || state.end.is_some());
        if let (false, Some(next)) = (pays, next)
            && state.payer == self.id
        {
            state.payer = next;
        }
        state.pilot.take().into_iter().for_each(Waker::wake);
        Left { facts, pays, has_all }
    }
}

impl<H, E, F> Drop for Listener<H, E, F> {
    fn drop(&mut self) {
        if self.left {
            return;
        }
        let mut state = self.flight.0.lock();
        state.listeners.remove(&self.id);
        if state.payer == self.id
            && let Some(next) = state.listeners.keys().next().copied()
        {
            state.payer = next;
        }
        state.pilot.take().into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use std::task::Context;

    use http::HeaderValue;
    use proptest::prelude::*;

    use super::super::Seat;
    use super::*;

    type Calls = Coalescing<(), (), u32>;
    type Ear = Listener<(), (), u32>;

    fn key(body: &'static [u8]) -> Key {
        Key {
            model: "m".into(),
            path: "/v1/chat/completions",
            class: 1,
            headers: Vec::<(String, HeaderValue)>::new(),
            body: Bytes::from_static(body),
        }
    }

    fn join(calls: &Arc<Calls>, key: Key) -> (Ear, Option<Pilot<(), (), u32>>) {
        let Seat { listener, pilot } = calls.join(key).expect("there is room");
        (listener, pilot)
    }

    fn next(listener: &mut Ear) -> Option<Next> {
        match listener.poll_next(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(next) => Some(next),
            Poll::Pending => None,
        }
    }

    fn is_ready(future: impl Future<Output = ()>) -> bool {
        std::pin::pin!(future).poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    fn piece(bytes: usize) -> Bytes {
        vec![b'x'; bytes].into()
    }

    #[test]
    fn equals_share_and_others_do_not() {
        let calls = Arc::new(Calls::default());
        let (mut first, pilot) = join(&calls, key(b"a"));
        let pilot = pilot.expect("the first makes the call");
        pilot.push(piece(1), 1);
        let (mut second, none) = join(&calls, key(b"a"));
        assert!(none.is_none());
        assert!(join(&calls, key(b"b")).1.is_some());
        let batch = Key { class: 2, ..key(b"a") };
        assert!(join(&calls, batch).1.is_some());
        for listener in [&mut first, &mut second] {
            assert_eq!((next(listener), next(listener)), (Some(Next::Bytes(piece(1))), None));
        }
        pilot.end(true, 2);
        assert!(join(&calls, key(b"a")).1.is_some(), "what is over is not in flight");
        assert_eq!((next(&mut first), next(&mut second)), (Some(Next::End), Some(Next::End)));
        assert_eq!(first.leave(), Left { facts: 2, pays: true, has_all: true });
        assert_eq!(second.leave(), Left { facts: 2, pays: false, has_all: true });
        drop(pilot);
    }

    #[test]
    fn a_call_goes_on_while_anyone_listens_and_the_last_pays() {
        let calls = Arc::new(Calls::default());
        let (mut first, pilot) = join(&calls, key(b"a"));
        let pilot = pilot.unwrap();
        let (mut second, _) = join(&calls, key(b"a"));
        let (third, _) = join(&calls, key(b"a"));
        pilot.push(piece(1), 7);
        assert_eq!(first.leave(), Left { facts: 7, pays: false, has_all: false });
        drop(third);
        assert!(!is_ready(pilot.abandoned()));
        assert_eq!(second.leave(), Left { facts: 7, pays: true, has_all: false });
        assert!(is_ready(pilot.abandoned()));
        let later = join(&calls, key(b"a"));
        assert!(later.1.is_some(), "nobody joins what is given up");
        drop(pilot);
        assert_eq!(calls.flights.lock().len(), 1, "the later call stays");
        drop(later);
        assert_eq!(calls.flights.lock().len(), 0);
    }

    #[test]
    fn who_falls_behind_is_cut_and_a_lone_reader_sets_the_pace() {
        let calls = Arc::new(Calls::default());
        let (mut fast, pilot) = join(&calls, key(b"a"));
        let pilot = pilot.unwrap();
        pilot.push(piece(KEPT_BYTES_MAX), 0);
        assert!(!is_ready(pilot.room(10)), "nobody has read anything");
        let (mut slow, _) = join(&calls, key(b"a"));
        assert_eq!(next(&mut fast), Some(Next::Bytes(piece(KEPT_BYTES_MAX))));
        assert!(!is_ready(pilot.room_for_all(10)), "one has read nothing");
        assert!(is_ready(pilot.room(10)), "the other goes on");
        pilot.push(piece(10), 0);
        assert_eq!(next(&mut slow), Some(Next::Behind));
        assert_eq!(next(&mut fast), Some(Next::Bytes(piece(10))));
        assert!(join(&calls, key(b"a")).1.is_some(), "its beginning is gone");
    }

    #[test]
    fn all_calls_together_keep_so_much_and_no_more() {
        let calls = Arc::new(Calls::default());
        let kept = || calls.kept.0.load(Ordering::Relaxed);
        let mut many: Vec<_> = (0..ALL_KEPT_BYTES_MAX / KEPT_BYTES_MAX)
            .map(|number| {
                let (listener, pilot) = join(&calls, Key { class: number, ..key(b"a") });
                let pilot = pilot.unwrap();
                pilot.push(piece(KEPT_BYTES_MAX), 0);
                (listener, pilot)
            })
            .collect();
        assert_eq!(kept(), ALL_KEPT_BYTES_MAX);
        assert!(calls.join(key(b"new")).is_none(), "whoever is new goes its own way");
        let Seat { listener: mut second, pilot } = calls.join(key(b"a")).expect("one like it is under way");
        assert!(pilot.is_none(), "and may be joined");
        let (mut last, pilot) = many.pop().unwrap();
        assert_eq!(next(&mut last), Some(Next::Bytes(piece(KEPT_BYTES_MAX))));
        assert!(is_ready(pilot.room(10)));
        pilot.push(piece(10), 0);
        assert_eq!(next(&mut last), Some(Next::Bytes(piece(10))));
        assert_eq!(kept(), ALL_KEPT_BYTES_MAX - KEPT_BYTES_MAX + 10);
        assert_eq!(next(&mut second), Some(Next::Bytes(piece(KEPT_BYTES_MAX))));
        drop((many, last, pilot, second));
        assert_eq!(kept(), 0, "all is given back");
        assert!(calls.join(key(b"new")).is_some());
    }

    #[test]
    fn a_call_that_ends_without_a_word_is_broken_off() {
        let calls = Arc::new(Calls::default());
        let (mut listener, pilot) = join(&calls, key(b"a"));
        drop(pilot);
        assert_eq!(next(&mut listener), Some(Next::Broken));
    }

    proptest! {
        /// Whatever they do, those who are not cut read all of it in order, what is kept is bounded, and one pays.
        #[test]
        fn all_read_the_same(moves in prop::collection::vec((0u8..5, any::<prop::sample::Index>(), 1usize..2_000_000), 1..120)) {
            let calls = Arc::new(Calls::default());
            let (first, pilot) = join(&calls, key(b"a"));
            let pilot = pilot.unwrap();
            let mut listeners = vec![(first, 0usize)];
            let mut pushed: Vec<usize> = Vec::new();
            let mut paid = 0;
            for (what, at, size) in moves {
                match what {
                    0 => if let Some(listener) = Flight::join(&pilot.flight) {
                        listeners.push((listener, 0));
                    },
                    1 if is_ready(pilot.room(size)) => {
                        pushed.push(size);
                        pilot.push(piece(size), 0);
                    }
                    2 if !listeners.is_empty() => {
                        let at = at.index(listeners.len());
                        paid += u32::from(listeners.remove(at).0.leave().pays);
                    }
                    3 | 4 if !listeners.is_empty() => {
                        let at = at.index(listeners.len());
                        let (listener, read) = &mut listeners[at];
                        match next(listener) {
                            Some(Next::Bytes(bytes)) => {
                                prop_assert_eq!(bytes.len(), pushed[*read]);
                                *read += 1;
                            }
                            Some(Next::Behind) => { paid += u32::from(listeners.remove(at).0.leave().pays); }
                            other => prop_assert_eq!((other, *read), (None, pushed.len())),
                        }
                    }
                    _ => {}
                }
                let kept: usize = pilot.flight.0.lock().kept.iter().map(Bytes::len).sum();
                prop_assert!(kept <= KEPT_BYTES_MAX);
            }
            for (mut listener, _) in listeners {
                paid += u32::from(listener.leave().pays);
            }
            prop_assert_eq!(paid, 1);
        }
    }
}
