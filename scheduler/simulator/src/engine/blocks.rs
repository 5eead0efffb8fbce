//! KV memory in blocks, with prefix caching.
//!
//! A block is free, held by one sequence (private), or cached under the chained hash of its content and held by any
//! number of sequences. A cached block that nobody holds is *idle*: still reusable, and the first to go, least recently
//! used first, when a new block is needed.
//!
//! Invariants: private + cached blocks <= capacity; a cached block is idle exactly when no sequence holds it.
//!
//! Not here: which block belongs to which token; physical positions are not modelled, only their number and hashes.

use std::collections::BTreeMap;

use foldhash::HashMap;

/// A change of the prefix cache, as an engine publishes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockEvent {
    Stored(u64),
    Removed(u64),
}

/// One block in a sequence's hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Block {
    /// Partly filled, or filled with content that is already cached in another block.
    Private,
    Cached(u64),
}

#[derive(Debug)]
pub(super) struct Pool {
    capacity: usize,
    private: usize,
    cached: HashMap<u64, Cached>,
    /// Idle blocks by the time they became idle.
    idle: BTreeMap<u64, u64>,
    /// Counts releases; orders `idle`.
    clock: u64,
    events: Vec<BlockEvent>,
}

#[derive(Debug)]
struct Cached {
    holders: u32,
    /// Its key in `idle`, valid while nobody holds it.
    idle_since: u64,
}

impl Pool {
    pub(super) fn new(capacity: u32) -> Self {
        Self {
            capacity: capacity as usize,
            private: 0,
            cached: HashMap::default(),
            idle: BTreeMap::new(),
            clock: 0,
            events: Vec::new(),
        }
    }

    /// Blocks that sequences hold.
    pub(super) fn used(&self) -> u32 {
        u32::try_from(self.private + self.cached.len() - self.idle.len()).unwrap_or(u32::MAX)
    }

    pub(super) fn is_cached(&self, hash: u64) -> bool {
        self.cached.contains_key(&hash)
    }

    /// Takes `count` blocks into `held`, evicting idle ones as needed; takes none and gives `false` when there are too few.
    pub(super) fn allocate(&mut self, count: usize, held: &mut Vec<Block>) -> bool {
        let empty = self.capacity - self.private - self.cached.len();
        if count > empty + self.idle.len() {
            return false;
        }
        for _ in empty..count {
            if let Some((_, hash)) = self.idle.pop_first() {
                self.cached.remove(&hash);
                self.events.push(BlockEvent::Removed(hash));
            }
        }
        self.private += count;
        held.extend(std::iter::repeat_n(Block::Private, count));
        true
    }

    /// Takes the longest run of `hashes` that is cached, from the first on, into `held`.
    pub(super) fn reuse(&mut self, hashes: impl Iterator<Item = u64>, held: &mut Vec<Block>) {
        for hash in hashes {
            let Some(cached) = self.cached.get_mut(&hash) else { break };
            if cached.holders == 0 {
                self.idle.remove(&cached.idle_since);
            }
            cached.holders += 1;
            held.push(Block::Cached(hash));
        }
    }

    /// Caches a private block that is now full. One whose content is cached already stays private.
    pub(super) fn publish(&mut self, block: &mut Block, hash: u64) {
        if *block != Block::Private || self.cached.contains_key(&hash) {
            return;
        }
        self.cached.insert(hash, Cached { holders: 1, idle_since: 0 });
        self.private -= 1;
        *block = Block::Cached(hash);
        self.events.push(BlockEvent::Stored(hash));
    }

    /// Caches blocks that come from elsewhere, from the first on, until there is no room. Nobody holds them.
    pub(super) fn fill(&mut self, hashes: &[u64]) {
        let mut held = Vec::new();
        self.reuse(hashes.iter().copied(), &mut held);
        for hash in hashes.iter().skip(held.len()) {
            if !self.allocate(1, &mut held) {
                break;
            }
            held.last_mut().into_iter().for_each(|block| self.publish(block, *hash));
        }
        self.release(held);
    }

    /// Gives blocks back. The end of a sequence becomes idle first, so that it is evicted before the prefix it extends.
    pub(super) fn release(&mut self, held: Vec<Block>) {
        for block in held.into_iter().rev() {
            match block {
                Block::Private => self.private -= 1,
                Block::Cached(hash) => {
                    let Some(cached) = self.cached.get_mut(&hash) else { continue };
                    cached.holders -= 1;
                    if cached.holders == 0 {
                        self.clock += 1;
                        cached.idle_since = self.clock;
                        self.idle.insert(self.clock, hash);
                    }
                }
            }
        }
    }

    /// Forgets all cached blocks, if nobody holds one.
    pub(super) fn clear(&mut self) -> bool {
        let unused = self.used() == 0;
        if unused {
            self.cached.clear();
            self.idle.clear();
            self.events.clear();
        }
        unused
    }

    pub(super) fn take_events(&mut self, out: &mut Vec<BlockEvent>) {
        out.append(&mut self.events);
    }
}
