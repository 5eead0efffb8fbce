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
//! Invariants: the bytes accounted never exceed the budget; a worker that was forgotten is never returned (its epoch
//! moved on; what it left is purged when met); a block names a bounded number of holders.
//! Not here: hashing, and which tokens a block is made of.

use std::collections::HashMap;

use foldhash::fast::FixedState;
use smallvec::SmallVec;

use crate::Tick;
use crate::worker::Slot;

/// Blocks between two probes of a lookup.
const STRIDE: usize = 32;
/// Holders kept for one block. What everyone holds, like a common system prompt, decides nothing; what is longer has
/// fewer holders.
const HOLDERS_MAX: usize = 32;
/// Bytes accounted for a block: its entry, and its key and index in a map that may be half empty.
const ENTRY_BYTES: usize = size_of::<Entry>() + 2 * (size_of::<(u64, u32)>() + 1);

#[derive(Debug)]
struct Entry {
    hash: u64,
    /// Sorted by slot.
    holders: SmallVec<[Holder; 1]>,
    /// Used since the clock's hand came by.
    used: bool,
}

#[derive(Debug, Clone, Copy)]
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
pub(crate) type Matches = SmallVec<[(Slot, u32); HOLDERS_MAX]>;

#[derive(Debug)]
pub(crate) struct PrefixIndex {
    entries: Vec<Entry>,
    places: HashMap<u64, u32, FixedState>,
    /// By slot.
    caches: Vec<Cache>,
    /// The clock's hand (second chance), over `entries`.
    hand: usize,
    spilled_bytes: usize,
    bytes_max: usize,
}

impl PrefixIndex {
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self {
            entries: Vec::new(),
            places: HashMap::default(),
            caches: Vec::new(),
            hand: 0,
            spilled_bytes: 0,
            bytes_max,
        }
    }

    /// How many blocks a worker's cache holds; none where that is not known.
    pub(crate) fn set_capacity(&mut self, slot: Slot, blocks: Option<u64>) {
        let capacity = blocks.map_or(u32::MAX, |blocks| u32::try_from(blocks).unwrap_or(u32::MAX));
        self.cache_mut(slot, |cache| cache.capacity = capacity);
    }

    /// Blocks known.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Bytes accounted.
    pub(crate) fn bytes(&self) -> usize {
        self.entries.len() * ENTRY_BYTES + self.spilled_bytes
    }

    /// Everyone who holds the beginning of `blocks`, and how much of it.
    pub(crate) fn lookup(&self, now: Tick, blocks: &[u64]) -> Matches {
        let mut matches = Matches::new();
        let mut held = 0;
        let mut group = self.holders(now, blocks, 0);
        while !group.is_empty() && held + 1 < blocks.len() {
            let next = (held + STRIDE).min(blocks.len() - 1);
            let (on, out) = split(&group, &self.holders(now, blocks, next));
            self.narrow(now, blocks, (held, next), out, &mut matches);
            (held, group) = (next, on);
        }
        matches.extend(group.into_iter().map(|slot| (slot, count(held))));
        matches.sort_unstable();
        matches
    }

    /// How many of `blocks` one worker holds.
    pub(crate) fn held_by(&self, now: Tick, slot: Slot, blocks: &[u64]) -> u32 {
        let holds = |hash: &u64| self.entry(*hash).is_some_and(|entry| entry.has(slot, now, &self.caches));
        u32::try_from(blocks.partition_point(holds)).unwrap_or(u32::MAX)
    }

    /// We sent, or will send, a prompt with these blocks there.
    pub(crate) fn expect(&mut self, now: Tick, slot: Slot, blocks: &[u64], until: Tick) {
        // from the end, which an engine evicts first: no block is believed to be there longer than the one before it
        for hash in blocks.iter().rev() {
            self.add(now, *hash, slot, until, false);
        }
    }

    /// The worker says that it holds these.
    pub(crate) fn confirm(&mut self, slot: Slot, blocks: &[u64]) {
        for hash in blocks {
            self.add(Tick::ZERO, *hash, slot, Tick::ZERO, true);
        }
    }

    /// The worker says that it dropped these. What we sent since ends by its lease.
    pub(crate) fn drop_blocks(&mut self, slot: Slot, blocks: &[u64]) {
        for hash in blocks {
            let Some(entry) = self.places.get(hash).and_then(|place| self.entries.get_mut(*place as usize)) else {
                continue;
            };
            if let Ok(at) = entry.holders.binary_search_by_key(&slot, |holder| holder.slot)
                && let Some(holder) = entry.holders.get_mut(at)
            {
                holder.confirmed = false;
            }
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

    fn entry(&self, hash: u64) -> Option<&Entry> {
        self.entries.get(*self.places.get(&hash)? as usize)
    }

    fn holders(&self, now: Tick, blocks: &[u64], at: usize) -> SmallVec<[Slot; HOLDERS_MAX]> {
        let entry = blocks.get(at).and_then(|hash| self.entry(*hash));
        let holders = entry.map_or(&[][..], |entry| &entry.holders);
        holders.iter().filter(|holder| holder.is_valid(now, &self.caches)).map(|holder| holder.slot).collect()
    }

    /// Finds where each of `group` ends, who all hold block `from` and not block `to`.
    fn narrow(
        &self,
        now: Tick,
        blocks: &[u64],
        (from, to): (usize, usize),
        group: SmallVec<[Slot; HOLDERS_MAX]>,
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

    fn add(&mut self, now: Tick, hash: u64, slot: Slot, until: Tick, confirmed: bool) {
        let place = self.places.get(&hash).copied();
        let known = place.and_then(|place| self.entries.get(place as usize));
        let held = confirmed || known.is_some_and(|entry| entry.has(slot, now, &self.caches));
        let cache = self.cache_mut(slot, |cache| cache.sent = cache.sent.wrapping_add(u32::from(!held)));
        let holder = Holder { slot, epoch: cache.epoch, until, stamp: cache.sent, confirmed };
        if let Some(entry) = place.and_then(|place| self.entries.get_mut(place as usize)) {
            entry.used = true;
            self.spilled_bytes -= entry.spilled();
            entry.hold(holder, &self.caches);
            self.spilled_bytes += entry.spilled();
        } else if ENTRY_BYTES <= self.bytes_max {
            while self.bytes() + ENTRY_BYTES > self.bytes_max {
                self.evict();
            }
            self.places.insert(hash, u32::try_from(self.entries.len()).unwrap_or(u32::MAX));
            self.reserve();
            self.entries.push(Entry { hash, holders: SmallVec::from_buf([holder]), used: false });
        }
        while self.bytes() > self.bytes_max {
            self.evict();
        }
    }

    /// Grows the entries without ever allocating past the budget.
    fn reserve(&mut self) {
        if self.entries.len() == self.entries.capacity() {
            let left = (self.bytes_max / ENTRY_BYTES).saturating_sub(self.entries.len());
            self.entries.reserve_exact(self.entries.len().max(64).min(left.max(1)));
        }
    }

    /// Drops one block that was not used for a while.
    fn evict(&mut self) {
        loop {
            if self.hand >= self.entries.len() {
                self.hand = 0;
            }
            let Some(entry) = self.entries.get_mut(self.hand) else { return };
            if std::mem::take(&mut entry.used) {
                self.hand += 1;
                continue;
            }
            break;
        }
        let entry = self.entries.swap_remove(self.hand);
        self.spilled_bytes -= entry.spilled();
        self.places.remove(&entry.hash);
        if let Some(moved) = self.entries.get(self.hand)
            && let Some(place) = self.places.get_mut(&moved.hash)
        {
            *place = u32::try_from(self.hand).unwrap_or(u32::MAX);
        }
        self.hand += 1;
    }
}

impl Entry {
    fn has(&self, slot: Slot, now: Tick, caches: &[Cache]) -> bool {
        self.holders.iter().any(|holder| holder.slot == slot && holder.is_valid(now, caches))
    }

    fn hold(&mut self, new: Holder, caches: &[Cache]) {
        match self.holders.binary_search_by_key(&new.slot, |holder| holder.slot) {
            Ok(at) => {
                if let Some(old) = self.holders.get_mut(at) {
                    let same = old.epoch == new.epoch;
                    let until = if same { old.until.max(new.until) } else { new.until };
                    *old = Holder { until, confirmed: new.confirmed || (same && old.confirmed), ..new };
                }
            }
            Err(_) => {
                if self.holders.len() == self.holders.capacity() {
                    self.holders.retain(|holder| holder.is_current(caches));
                }
                if self.holders.len() >= HOLDERS_MAX {
                    self.drop_oldest();
                }
                let at = self.holders.partition_point(|holder| holder.slot < new.slot);
                self.holders.insert(at, new);
            }
        }
    }

    fn drop_oldest(&mut self) {
        if let Some((at, _)) =
            self.holders.iter().enumerate().min_by_key(|(_, holder)| (holder.confirmed, holder.until))
        {
            self.holders.remove(at);
        }
    }

    fn spilled(&self) -> usize {
        if self.holders.spilled() { self.holders.capacity() * size_of::<Holder>() } else { 0 }
    }
}

impl Holder {
    fn is_current(&self, caches: &[Cache]) -> bool {
        caches.get(self.slot.0 as usize).is_some_and(|cache| cache.epoch == self.epoch)
    }

    fn is_valid(&self, now: Tick, caches: &[Cache]) -> bool {
        caches.get(self.slot.0 as usize).is_some_and(|cache| {
            let there = self.until > now && cache.sent.wrapping_sub(self.stamp) < cache.capacity;
            cache.epoch == self.epoch && (self.confirmed || there)
        })
    }
}

/// `group` into who is in `holders` and who is not; both are sorted.
fn split(group: &[Slot], holders: &[Slot]) -> (SmallVec<[Slot; HOLDERS_MAX]>, SmallVec<[Slot; HOLDERS_MAX]>) {
    group.iter().copied().partition(|slot| holders.binary_search(slot).is_ok())
}

/// Blocks held by who holds the block at `last`.
fn count(last: usize) -> u32 {
    u32::try_from(last + 1).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
