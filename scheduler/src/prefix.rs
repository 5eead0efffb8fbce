//! Which workers hold which prompt prefixes, for one pool and block size.
//!
//! The key is a block's rolling hash: each covers all blocks before it, so a hash stands for a position too, and a
//! worker that holds a block holds, as engines evict from the end, all before it.
//!
//! Two layers. *Confirmed*: the engine's KV events say so, block by block. *Speculative*: we routed such a prompt there
//! a short time ago; a lease, without which a burst of siblings would see an empty cache and scatter. Guesses are made
//! with every prompt, so they are written only at *milestones*, blocks some 128 tokens apart, and at the prompt's last
//! block. What that costs: where two prompts part between milestones, fewer than 128 tokens of what they share are not
//! seen at a worker that does not confirm them. What an engine that publishes no events has evicted is known by
//! counting: a block is believed to be there only while fewer blocks than its cache holds were sent there since (the
//! order of a least-recently-used cache, without a list).
//!
//! At milestones the match of a worker is a monotone question: a lookup bisects for the last milestone that anyone knows,
//! then for those of who holds the first and not that one, and looks at single blocks only behind a holder's last
//! milestone.
//!
//! Invariants: memory never exceeds the budget; a worker that was forgotten is never returned (its epoch moved on; what
//! it left is overwritten when met); a block names a bounded number of holders.
//! Not here: hashing, and which tokens a block is made of.

mod table;

use smallvec::SmallVec;

use crate::Tick;
use crate::worker::Slot;
use table::Table;

/// Tokens from one milestone to the next.
const MILESTONE_TOKENS: u32 = 128;
/// Blocks that are fetched together before they are changed.
const BATCH: usize = 32;
/// Holders kept for one block. What everyone holds, like a common system prompt, decides nothing as long as all of them
/// are known; in a pool much larger than this, those that are known get somewhat more.
const HOLDERS_MAX: usize = 128;
/// Holders that most blocks have at most.
const HOLDERS_USUAL: usize = 32;
/// A lease is renewed only when so small a part of it is left to gain: 1/8. Blocks that were renewed a short time ago
/// are not written again, so that a prompt costs what is new of it.
const RENEW_PART: u64 = 8;
/// Leases end at a multiple of so many microseconds (65 ms), the next one, so that their ends fit in 32 bits.
const LEASE_STEP: u64 = 1 << 16;
/// Stamps have 24 bits: as many blocks are not sent to one worker within a lease.
const STAMP_MAX: u32 = (1 << 24) - 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Holder {
    slot: Slot,
    epoch: u16,
    /// Until when it is believed to hold the block, by what we sent, in [`LEASE_STEP`]s.
    until: u32,
    /// Blocks sent there until it was last used (wraps at [`STAMP_MAX`]).
    stamp: u32,
    /// It says so itself.
    confirmed: bool,
}

/// A worker's cache as a whole.
#[derive(Debug, Clone, Copy)]
struct Cache {
    /// What was known in another epoch is void (wraps: by then that was overwritten).
    epoch: u16,
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

impl Cache {
    /// Blocks sent there since the moment of a stamp.
    fn since(&self, stamp: u32) -> u32 {
        self.sent.wrapping_sub(stamp) & STAMP_MAX
    }
}

/// How many blocks of a prompt each holder has, by slot.
pub(crate) type Matches = SmallVec<[(Slot, u32); HOLDERS_USUAL]>;

#[derive(Debug)]
pub(crate) struct PrefixIndex {
    table: Table,
    /// By slot.
    caches: Vec<Cache>,
    /// Blocks from one milestone to the next.
    mile: usize,
}

/// Who holds some block, sorted.
type Group = SmallVec<[Slot; HOLDERS_USUAL]>;

impl PrefixIndex {
    /// An index of blocks of so many tokens.
    pub(crate) fn new(bytes_max: usize, block_tokens: u32) -> Self {
        let mut index = Self { table: Table::new(bytes_max), caches: Vec::new(), mile: 1 };
        index.set_block_tokens(block_tokens);
        index
    }

    /// Blocks have so many tokens from now on, and other hashes.
    pub(crate) fn set_block_tokens(&mut self, tokens: u32) {
        self.mile = (MILESTONE_TOKENS / tokens.max(1)).max(1) as usize;
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

    /// Who holds the beginning of `blocks`, and how much of it, sorted. Who holds less than the first milestone is named
    /// only where nobody holds more.
    pub(crate) fn lookup(&self, now: Tick, blocks: &[u64]) -> Matches {
        let mut matches = Matches::new();
        let miles = blocks.len() / self.mile;
        if miles <= BATCH {
            self.table.fetch(blocks.chunks_exact(self.mile).filter_map(|mile| mile.last()));
        }
        // the last milestone that someone held, and often holds
        let is_known = |mile| blocks.get(mile * self.mile - 1).is_some_and(|hash| self.table.has(*hash));
        let last = last_in_row(miles, is_known);
        let group = self.holders(now, blocks, last * self.mile);
        let first = if last > 1 { self.holders(now, blocks, self.mile) } else { Group::new() };
        if group.is_empty() && first.is_empty() {
            self.begin(now, blocks, &mut matches);
            return matches;
        }
        let (_, out) = split(first, &group);
        self.finish(now, blocks, last, group, &mut matches);
        self.narrow(now, blocks, (1, last), out, &mut matches);
        matches
    }

    /// How many of `blocks` one worker holds.
    pub(crate) fn held_by(&self, now: Tick, slot: Slot, blocks: &[u64]) -> u32 {
        let holds =
            |hash: &u64| self.table.holder(*hash, slot).is_some_and(|holder| holder.is_valid(now, &self.caches));
        let miles = blocks.len() / self.mile;
        let held = last_in_row(miles, |mile| blocks.get(mile * self.mile - 1).is_some_and(holds)) * self.mile;
        let mut rest = blocks.get(held..).unwrap_or_default().iter().take(self.mile);
        count(held + rest.rposition(holds).map_or(0, |last| last + 1))
    }

    /// How many workers hold the first `held` of `blocks`, up to the last milestone in them.
    pub(crate) fn copies(&self, now: Tick, blocks: &[u64], held: u32) -> usize {
        let held = held as usize;
        let milestone = held / self.mile * self.mile;
        self.holders(now, blocks, if milestone > 0 { milestone } else { held }).len()
    }

    /// We sent, or will send, a prompt with these blocks there.
    pub(crate) fn expect(&mut self, now: Tick, slot: Slot, blocks: &[u64], until: Tick) {
        let mut cache = self.cache_mut(slot, |_| ());
        let until = u32::try_from(until.0.div_ceil(LEASE_STEP)).unwrap_or(u32::MAX);
        // from the end, which an engine evicts first: no block is believed to be there longer than the one before it
        for (at, mile) in blocks.chunks(self.mile).rev().enumerate() {
            if at.is_multiple_of(BATCH) {
                let next = blocks.chunks(self.mile).rev().skip(at).take(BATCH);
                self.table.fetch(next.filter_map(|mile| mile.last()));
            }
            let Some(hash) = mile.last() else { break };
            let written = self.table.hold(*hash, slot, &self.caches, |known| {
                let held = known.filter(|holder| holder.is_valid(now, &self.caches));
                if held.is_some_and(|holder| holder.is_young(now, until, &cache)) {
                    return None;
                }
                // the last block is the first of these to be evicted
                let stamp = cache.sent.wrapping_add(u32::from(held.is_none()));
                if held.is_none() {
                    cache.sent = cache.sent.wrapping_add(count(mile.len()));
                }
                Some(Holder { slot, epoch: cache.epoch, until, stamp, confirmed: false })
            });
            if !written {
                // so are all before it
                break;
            }
        }
        self.cache_mut(slot, |known| known.sent = cache.sent);
    }

    /// The worker says that it holds these.
    pub(crate) fn confirm(&mut self, slot: Slot, blocks: &[u64]) {
        let cache = self.cache_mut(slot, |_| ());
        let holder = Holder { slot, epoch: cache.epoch, until: 0, stamp: cache.sent, confirmed: true };
        for batch in blocks.chunks(BATCH) {
            self.table.fetch(batch);
            for hash in batch {
                self.table.hold(*hash, slot, &self.caches, |_| Some(holder));
            }
        }
    }

    /// The worker says that it dropped these. What we sent since ends by its lease.
    pub(crate) fn drop_blocks(&mut self, slot: Slot, blocks: &[u64]) {
        for hash in blocks {
            self.table.change(*hash, slot, |holder| Holder { confirmed: false, ..holder });
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

    /// Who holds the first `held` blocks, sorted; everyone holds none, and nobody is named for it.
    fn holders(&self, now: Tick, blocks: &[u64], held: usize) -> Group {
        let Some(hash) = held.checked_sub(1).and_then(|last| blocks.get(last)) else { return Group::new() };
        let holders = self.table.get(*hash);
        let mut group = Group::with_capacity(holders.len());
        group.extend(holders.filter(|holder| holder.is_valid(now, &self.caches)).map(|holder| holder.slot));
        group
    }

    /// Who holds a beginning that has no milestone.
    fn begin(&self, now: Tick, blocks: &[u64], matches: &mut Matches) {
        for held in (1..=blocks.len().min(self.mile)).rev() {
            for slot in self.holders(now, blocks, held) {
                if !matches.iter().any(|(other, _)| *other == slot) {
                    matches.push((slot, count(held)));
                }
            }
        }
        matches.sort_unstable();
    }

    /// Finds where each of `group` ends, who all hold milestone `from` and not milestone `to`.
    fn narrow(&self, now: Tick, blocks: &[u64], (from, to): (usize, usize), group: Group, matches: &mut Matches) {
        if group.is_empty() {
            return;
        }
        if to - from <= 1 {
            return self.finish(now, blocks, from, group, matches);
        }
        let middle = from.midpoint(to);
        // all who hold this block, also such as a block before it could not name, since it names but so many
        let on = self.holders(now, blocks, middle * self.mile);
        let known: Group = matches.iter().map(|(slot, _)| *slot).collect();
        let (_, on) = split(on, &known);
        let (_, out) = split(group, &on);
        self.narrow(now, blocks, (middle, to), on, matches);
        self.narrow(now, blocks, (from, middle), out, matches);
    }

    /// Finds where each of `group` ends, who all hold milestone `from` and not the next.
    fn finish(&self, now: Tick, blocks: &[u64], from: usize, mut group: Group, matches: &mut Matches) {
        let from = from * self.mile;
        let behind = blocks.get(from..).unwrap_or_default().iter().take(self.mile - 1);
        self.table.fetch(behind);
        for held in (from + 1..=blocks.len().min(from + self.mile - 1)).rev() {
            if group.is_empty() {
                break;
            }
            let holders = self.holders(now, blocks, held);
            if !holders.is_empty() {
                let (on, out) = split(group, &holders);
                matches.extend(on.into_iter().map(|slot| (slot, count(held))));
                group = out;
            }
        }
        matches.extend(group.into_iter().map(|slot| (slot, count(from))));
        // of a few rows that are sorted, which costs this sort little
        matches.sort();
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
    fn is_young(&self, now: Tick, until: u32, cache: &Cache) -> bool {
        let [lease, left] = [until, self.until].map(|until| (u64::from(until) * LEASE_STEP).saturating_sub(now.0));
        left >= lease - lease / RENEW_PART
            && u64::from(cache.since(self.stamp)) <= u64::from(cache.capacity) / RENEW_PART
    }

    fn is_valid(&self, now: Tick, caches: &[Cache]) -> bool {
        caches.get(self.slot.0 as usize).is_some_and(|cache| {
            let there = u64::from(self.until) * LEASE_STEP > now.0 && cache.since(self.stamp) < cache.capacity;
            cache.epoch == self.epoch && (self.confirmed || there)
        })
    }
}

/// The last of 1 to `most` up to which `is` holds, where it holds for a beginning; 0 for none.
fn last_in_row(most: usize, is: impl Fn(usize) -> bool) -> usize {
    let (mut from, mut to) = (0, most + 1);
    while to - from > 1 {
        let middle = from.midpoint(to);
        *(if is(middle) { &mut from } else { &mut to }) = middle;
    }
    from
}

/// `group` into who is in `holders` and who is not; both are sorted.
fn split(group: Group, holders: &[Slot]) -> (Group, Group) {
    if holders.is_empty() {
        return (Group::new(), group);
    }
    let mut holders = holders.iter().peekable();
    group.into_iter().partition(|slot| {
        while holders.next_if(|holder| *holder < slot).is_some() {}
        holders.peek() == Some(&slot)
    })
}

/// A number of blocks.
fn count(blocks: usize) -> u32 {
    u32::try_from(blocks).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
