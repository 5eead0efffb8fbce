//! Which workers hold which prompt prefixes, for one pool and block size.
//!
//! The key is a block's rolling hash: each covers all blocks before it, so a hash stands for a position too, and a
//! worker that holds a block holds, as engines evict from the end, all before it. That makes the match of a worker a
//! monotone question: a lookup probes every 32nd block and searches only where a holder drops out.
//!
//! Two layers. *Confirmed*: the engine's KV events say so. *Speculative*: we routed such a prompt there a short time
//! ago; a lease, without which a burst of siblings would see an empty cache and scatter. What an engine that publishes
//! no events has evicted is known by counting: a block is believed to be there only while fewer blocks than its cache
//! holds were sent there since (the order of a least-recently-used cache, without a list).
//!
//! Invariants: memory never exceeds the budget; a worker that was forgotten is never returned (its epoch moved on; what
//! it left is overwritten when met); a block names a bounded number of holders.
//! Not here: hashing, and which tokens a block is made of.

mod table;

use smallvec::SmallVec;

use crate::Tick;
use crate::worker::Slot;
use table::{Holders, Table};

/// Blocks between two probes of a lookup.
const STRIDE: usize = 32;
/// Holders kept for one block. What everyone holds, like a common system prompt, decides nothing as long as all of them
/// are known; in a pool much larger than this, those that are known get somewhat more.
const HOLDERS_MAX: usize = 128;
/// Holders that most blocks have at most.
const HOLDERS_USUAL: usize = 32;
/// A lease is renewed only when so small a part of it is left to gain: 1/8. Blocks that were renewed a short time ago
/// are not written again, so that a prompt costs what is new of it.
const RENEW_PART: u64 = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Holder {
    slot: Slot,
    epoch: u32,
    /// Until when it is believed to hold the block, by what we sent.
    until: Tick,
    /// Blocks sent there until it was last used (wraps).
    stamp: u32,
    /// It says so itself.
    confirmed: bool,
}

/// A worker's cache as a whole.
#[derive(Debug, Clone, Copy)]
struct Cache {
    /// What was known in another epoch is void.
    epoch: u32,
    /// Blocks sent there that it was not believed to hold (wraps).
    sent: u32,
    /// Blocks that it holds.
    capacity: u32,
}

impl Default for Cache {
    fn default() -> Self {
        Self { epoch: 0, sent: 0, capacity: u32::MAX }
    }
}

/// How many blocks of a prompt each holder has, by slot.
pub(crate) type Matches = SmallVec<[(Slot, u32); HOLDERS_USUAL]>;

#[derive(Debug)]
pub(crate) struct PrefixIndex {
    table: Table,
    /// By slot.
    caches: Vec<Cache>,
}

impl PrefixIndex {
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { table: Table::new(bytes_max), caches: Vec::new() }
    }

    /// How many blocks a worker's cache holds; none where that is not known.
    pub(crate) fn set_capacity(&mut self, slot: Slot, blocks: Option<u64>) {
        let capacity = blocks.map_or(u32::MAX, |blocks| u32::try_from(blocks).unwrap_or(u32::MAX));
        self.cache_mut(slot, |cache| cache.capacity = capacity);
    }

    /// Blocks known.
    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    /// Bytes these take.
    pub(crate) fn bytes(&self) -> usize {
        self.table.bytes()
    }

    /// Everyone who holds the beginning of `blocks`, and how much of it.
    pub(crate) fn lookup(&self, now: Tick, blocks: &[u64]) -> Matches {
        let mut matches = Matches::new();
        let mut held = 0;
        let mut group = self.holders(now, blocks, 0);
        while !group.is_empty() && held + 1 < blocks.len() {
            let next = (held + STRIDE).min(blocks.len() - 1);
            // all who hold this block, also such as a block before it could not name, since it names but so many
            let on = self.holders(now, blocks, next);
            let (_, out) = split(&group, &on);
            self.narrow(now, blocks, (held, next), out, &mut matches);
            (held, group) = (next, on);
        }
        matches.extend(group.into_iter().map(|slot| (slot, count(held))));
        matches.sort_unstable();
        matches
    }

    /// How many of `blocks` one worker holds.
    pub(crate) fn held_by(&self, now: Tick, slot: Slot, blocks: &[u64]) -> u32 {
        let holds = |hash: &u64| {
            self.table.get(*hash).iter().any(|holder| holder.slot == slot && holder.is_valid(now, &self.caches))
        };
        u32::try_from(blocks.partition_point(holds)).unwrap_or(u32::MAX)
    }

    /// How many workers hold the first `held` of `blocks`.
    pub(crate) fn copies(&self, now: Tick, blocks: &[u64], held: u32) -> usize {
        let last = (held as usize).checked_sub(1);
        last.map_or(0, |last| self.holders(now, blocks, last).len())
    }

    /// We sent, or will send, a prompt with these blocks there.
    pub(crate) fn expect(&mut self, now: Tick, slot: Slot, blocks: &[u64], until: Tick) {
        let mut cache = self.cache_mut(slot, |_| ());
        // from the end, which an engine evicts first: no block is believed to be there longer than the one before it
        for (at, hash) in blocks.iter().enumerate().rev() {
            if (blocks.len() - 1 - at).is_multiple_of(STRIDE) {
                self.table.fetch(blocks.get((at + 1).saturating_sub(STRIDE)..=at).unwrap_or_default());
            }
            let known = self.table.get(*hash).iter().find(|holder| holder.slot == slot).copied();
            let held = known.filter(|holder| holder.is_valid(now, &self.caches));
            if held.is_some_and(|holder| holder.is_young(now, until, &cache)) {
                // so are all before it
                break;
            }
            if held.is_none() {
                cache = self.cache_mut(slot, |cache| cache.sent = cache.sent.wrapping_add(1));
            }
            let holder = Holder { slot, epoch: cache.epoch, until, stamp: cache.sent, confirmed: false };
            self.table.hold(*hash, holder, &self.caches);
        }
    }

    /// The worker says that it holds these.
    pub(crate) fn confirm(&mut self, slot: Slot, blocks: &[u64]) {
        let cache = self.cache_mut(slot, |_| ());
        let holder = Holder { slot, epoch: cache.epoch, until: Tick::ZERO, stamp: cache.sent, confirmed: true };
        for stride in blocks.chunks(STRIDE) {
            self.table.fetch(stride);
            for hash in stride {
                self.table.hold(*hash, holder, &self.caches);
            }
        }
    }

    /// The worker says that it dropped these. What we sent since ends by its lease.
    pub(crate) fn drop_blocks(&mut self, slot: Slot, blocks: &[u64]) {
        for hash in blocks {
            self.table.change(*hash, slot, |holder| holder.confirmed = false);
        }
    }

    /// The worker left, or lost its cache.
    pub(crate) fn forget(&mut self, slot: Slot) {
        self.cache_mut(slot, |cache| cache.epoch = cache.epoch.wrapping_add(1));
    }

    /// Changes what is known of a worker's cache; what it is afterwards.
    fn cache_mut(&mut self, slot: Slot, change: impl FnOnce(&mut Cache)) -> Cache {
        if self.caches.len() <= slot.0 as usize {
            self.caches.resize(slot.0 as usize + 1, Cache::default());
        }
        let Some(cache) = self.caches.get_mut(slot.0 as usize) else { return Cache::default() };
        change(cache);
        *cache
    }

    fn holders(&self, now: Tick, blocks: &[u64], at: usize) -> SmallVec<[Slot; HOLDERS_USUAL]> {
        let holders = blocks.get(at).map_or(Holders::One(None), |hash| self.table.get(*hash));
        holders.iter().filter(|holder| holder.is_valid(now, &self.caches)).map(|holder| holder.slot).collect()
    }

    /// Finds where each of `group` ends, who all hold block `from` and not block `to`.
    fn narrow(
        &self,
        now: Tick,
        blocks: &[u64],
        (from, to): (usize, usize),
        group: SmallVec<[Slot; HOLDERS_USUAL]>,
        matches: &mut Matches,
    ) {
        if group.is_empty() {
            return;
        }
        if to - from <= 1 {
            return matches.extend(group.into_iter().map(|slot| (slot, count(from))));
        }
        let middle = from.midpoint(to);
        let (on, out) = split(&group, &self.holders(now, blocks, middle));
        self.narrow(now, blocks, (middle, to), on, matches);
        self.narrow(now, blocks, (from, middle), out, matches);
    }
}

impl Holder {
    fn is_current(&self, caches: &[Cache]) -> bool {
        caches.get(self.slot.0 as usize).is_some_and(|cache| cache.epoch == self.epoch)
    }

    /// What is known of the same worker after `new`.
    fn renewed(self, new: Self) -> Self {
        if self.epoch != new.epoch {
            return new;
        }
        Self { until: self.until.max(new.until), confirmed: self.confirmed || new.confirmed, ..new }
    }

    /// Whether renewing it until `until` would change next to nothing.
    fn is_young(&self, now: Tick, until: Tick, cache: &Cache) -> bool {
        let lease = until.0.saturating_sub(now.0);
        let left = self.until.0.saturating_sub(now.0);
        left >= lease - lease / RENEW_PART
            && u64::from(cache.sent.wrapping_sub(self.stamp)) <= u64::from(cache.capacity) / RENEW_PART
    }

    fn is_valid(&self, now: Tick, caches: &[Cache]) -> bool {
        caches.get(self.slot.0 as usize).is_some_and(|cache| {
            let there = self.until > now && cache.sent.wrapping_sub(self.stamp) < cache.capacity;
            cache.epoch == self.epoch && (self.confirmed || there)
        })
    }
}

/// `group` into who is in `holders` and who is not; both are sorted.
fn split(group: &[Slot], holders: &[Slot]) -> (SmallVec<[Slot; HOLDERS_USUAL]>, SmallVec<[Slot; HOLDERS_USUAL]>) {
    group.iter().copied().partition(|slot| holders.binary_search(slot).is_ok())
}

/// Blocks held by who holds the block at `last`.
fn count(last: usize) -> u32 {
    u32::try_from(last + 1).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
