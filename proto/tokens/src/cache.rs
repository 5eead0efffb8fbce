//! The exact tokenization cache: ids of pieces of text that were seen before.
//!
//! Between two safe cuts (`cuts`) ids depend on the piece alone, so a piece is looked up by its content, wherever in
//! a prompt it stands and whichever request it came with.
//!
//! Invariants: a hit compares the text itself, so no text is ever mistaken for another's, whatever hashes alike (XXH3 is
//! fast, but made to be fooled; its seed is random in each process, so that nobody can even spoil the cache); the memory
//! held stays under the budget given.
//!
//! Not here: keeping tenants from learning by timing whether a text was seen before.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::cuts::{Head, Piece};

/// Locks are held for a look-up or an insertion in one of these many parts.
const SHARDS: usize = 16;

/// What an entry costs beside its text and ids: pointers, counts, and its places in map and queue.
const ENTRY_BYTES: usize = 160;

/// Which tokenizer a piece was encoded by: a hash of its definition, so that the same file loaded twice shares entries.
pub(crate) type Fingerprint = [u8; 32];

type Key = u64;

/// A cache that any number of tokenizers share.
pub struct Cache {
    seed: u64,
    shards: Vec<Mutex<Shard>>,
    hits: AtomicU64,
    misses: AtomicU64,
}

/// What a [`Cache`] holds and has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Bytes held, upkeep included.
    pub bytes: usize,
    /// Pieces held.
    pub entries: usize,
    /// Pieces found, and not found, since the start.
    pub hits: u64,
    pub misses: u64,
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cache").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl Cache {
    /// A cache that holds at most `bytes_max` bytes: about twice the text it remembers.
    #[must_use]
    pub fn new(bytes_max: usize) -> Self {
        let shard = || Mutex::new(Shard::new(bytes_max / SHARDS));
        Self {
            seed: rand::random(),
            shards: std::iter::repeat_with(shard).take(SHARDS).collect(),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        }
    }

    #[must_use]
    pub fn stats(&self) -> CacheStats {
        let mut stats = CacheStats {
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            ..CacheStats::default()
        };
        for shard in &self.shards {
            let shard = shard.lock();
            stats.bytes += shard.bytes;
            stats.entries += shard.entries.len();
        }
        stats
    }

    /// The ids of a piece: remembered, or made by `encode` and remembered. `None` is what `encode` gives up with.
    pub(crate) fn ids(
        &self,
        tokenizer: &Fingerprint,
        piece: Piece<'_>,
        encode: impl FnOnce() -> Option<Vec<u32>>,
    ) -> Option<Arc<[u32]>> {
        let (key, shard) = self.shard(tokenizer, piece)?;
        if let Some(ids) = shard.lock().get(key, tokenizer, piece) {
            self.hits.fetch_add(1, Ordering::Relaxed);
            return Some(ids);
        }
        self.misses.fetch_add(1, Ordering::Relaxed);
        let ids: Arc<[u32]> = encode()?.into();
        let (text, head) = (piece.text.into(), piece.head);
        shard.lock().insert(key, Entry { tokenizer: *tokenizer, head, text, ids: Arc::clone(&ids), asked: false });
        Some(ids)
    }

    /// The ids of a piece, if they are remembered.
    pub(crate) fn known(&self, tokenizer: &Fingerprint, piece: Piece<'_>) -> Option<Arc<[u32]>> {
        let (key, shard) = self.shard(tokenizer, piece)?;
        shard.lock().get(key, tokenizer, piece)
    }

    /// Under which key, and where, a piece is kept.
    fn shard(&self, tokenizer: &Fingerprint, piece: Piece<'_>) -> Option<(Key, &Mutex<Shard>)> {
        let key = self.key(tokenizer, piece);
        self.shards.get((key >> 32) as usize % SHARDS).map(|shard| (key, shard))
    }

    fn key(&self, tokenizer: &Fingerprint, piece: Piece<'_>) -> Key {
        let [.., a, b, c, d, e, f, g, h] = *tokenizer;
        let tokenizer = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        xxhash_rust::xxh3::xxh3_64_with_seed(piece.text.as_bytes(), self.seed ^ tokenizer ^ piece.head as u64)
    }
}

/// One part of the cache. What was not asked for since its last turn is the first to go (a second-chance queue).
struct Shard {
    bytes_max: usize,
    bytes: usize,
    entries: HashMap<Key, Entry>,
    queue: VecDeque<Key>,
}

struct Entry {
    tokenizer: Fingerprint,
    head: Head,
    text: Box<str>,
    ids: Arc<[u32]>,
    asked: bool,
}

impl Entry {
    fn cost(&self) -> usize {
        ENTRY_BYTES + self.text.len() + size_of_val::<[u32]>(&self.ids)
    }

    fn is_of(&self, tokenizer: &Fingerprint, piece: Piece<'_>) -> bool {
        *self.text == *piece.text && self.head == piece.head && self.tokenizer == *tokenizer
    }
}

impl Shard {
    fn new(bytes_max: usize) -> Self {
        Self { bytes_max, bytes: 0, entries: HashMap::new(), queue: VecDeque::new() }
    }

    fn get(&mut self, key: Key, tokenizer: &Fingerprint, piece: Piece<'_>) -> Option<Arc<[u32]>> {
        let entry = self.entries.get_mut(&key).filter(|entry| entry.is_of(tokenizer, piece))?;
        entry.asked = true;
        Some(Arc::clone(&entry.ids))
    }

    fn insert(&mut self, key: Key, entry: Entry) {
        let cost = entry.cost();
        // another request may have brought the same piece meanwhile; of two that hash alike the first stays
        if cost > self.bytes_max || self.entries.contains_key(&key) {
            return;
        }
        while self.bytes + cost > self.bytes_max && self.evict() {}
        self.bytes += cost;
        self.entries.insert(key, entry);
        self.queue.push_back(key);
    }

    /// Takes one turn of the queue; false when it is empty.
    fn evict(&mut self) -> bool {
        let Some(key) = self.queue.pop_front() else { return false };
        match self.entries.get_mut(&key) {
            Some(entry) if entry.asked => {
                entry.asked = false;
                self.queue.push_back(key);
            }
            _ => {
                if let Some(entry) = self.entries.remove(&key) {
                    self.bytes -= entry.cost();
                }
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: Fingerprint = [7; 32];

    fn piece(text: &str) -> Piece<'_> {
        Piece { text, head: Head::Plain }
    }

    #[test]
    fn a_piece_is_encoded_once_and_told_apart_by_tokenizer_head_and_text() {
        let cache = Cache::new(1 << 20);
        let ids = |model: &Fingerprint, piece, new| cache.ids(model, piece, || new).map(|ids| ids.to_vec());
        assert_eq!(ids(&MODEL, piece("a"), Some(vec![1])), Some(vec![1]));
        assert_eq!(ids(&MODEL, piece("a"), None), Some(vec![1]));
        assert_eq!(ids(&[8; 32], piece("a"), Some(vec![2])), Some(vec![2]));
        assert_eq!(ids(&MODEL, Piece { text: "a", head: Head::Mark }, Some(vec![3])), Some(vec![3]));
        assert_eq!(ids(&MODEL, piece("b"), None), None);
        let stats = cache.stats();
        assert_eq!((stats.entries, stats.hits, stats.misses), (3, 1, 4));
    }

    #[test]
    fn pieces_that_hash_alike_are_not_mistaken_for_each_other() {
        let mut shard = Shard::new(1 << 20);
        let entry = |text: &str, id| Entry {
            tokenizer: MODEL,
            head: Head::Plain,
            text: text.into(),
            ids: [id].into(),
            asked: false,
        };
        shard.insert(7, entry("a", 1));
        shard.insert(7, entry("b", 2));
        assert_eq!(shard.get(7, &MODEL, piece("a")).as_deref(), Some(&[1][..]));
        assert_eq!(shard.get(7, &MODEL, piece("b")), None);
        assert_eq!(shard.get(7, &[8; 32], piece("a")), None);
        assert_eq!(shard.get(7, &MODEL, Piece { text: "a", head: Head::Space }), None);
        assert_eq!(shard.bytes, shard.entries.values().map(Entry::cost).sum::<usize>());
    }

    #[test]
    fn two_processes_hash_differently() {
        assert_ne!(Cache::new(0).key(&MODEL, piece("a")), Cache::new(0).key(&MODEL, piece("a")));
    }

    #[test]
    fn the_budget_holds_and_what_is_asked_for_stays() {
        let budget = 64 << 10;
        let cache = Cache::new(budget);
        for round in 0..2_000_u32 {
            let text = format!("piece {round}");
            cache.ids(&MODEL, piece(&text), || Some(vec![round; 20]));
            let kept = cache.ids(&MODEL, piece("always asked for"), || Some(vec![1; 20]));
            assert_eq!(kept.as_deref(), Some(&[1; 20][..]));
            assert!(cache.stats().bytes <= budget);
        }
        let stats = cache.stats();
        assert!(stats.entries > 200, "{stats:?}");
        assert_eq!(stats.hits, 1_999, "the piece asked for each time was never dropped");
    }

    #[test]
    fn what_is_larger_than_its_part_of_the_budget_is_not_kept() {
        let cache = Cache::new(SHARDS * 1_000);
        assert!(cache.ids(&MODEL, piece("a"), || Some(vec![0; 300])).is_some());
        assert_eq!(cache.stats().entries, 0);
    }
}
