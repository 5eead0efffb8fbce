//! Where the prefix index keeps its blocks: a set-associative table of fixed size, like a processor's cache.
//!
//! A block's hash names a bucket of four cells, which is as much as a line of memory. Finding a block, adding one and
//! dropping another for it touch that bucket and nothing else, so that a prompt of hundreds of blocks costs microseconds
//! also when the budget is used up; there is no growth that would stop the world, and memory is taken from the system
//! only as buckets are written. Most blocks have one holder, kept in the cell; more go to a list beside.
//!
//! Of a hash a cell keeps 32 bits, beside those that named the bucket. So one look in a billion takes a block for
//! another, which makes a wrong guess about a cache and nothing worse.
//!
//! Invariants: a block stands in at most one cell; table and lists stay under the budget; a list belongs to one cell.
//! Not here: what a holder means and how long it is believed.

use std::hint::black_box;

use super::{Cache, HOLDERS_MAX, Holder};
use crate::worker::Slot;

const WAYS: usize = 4;
/// Bytes of one block.
pub(super) const BLOCK_BYTES: usize = size_of::<Cell>();
/// Part of the budget that is for the lists.
const LISTS_PART: usize = 4;
/// Holders for which a list has room at first.
const LIST_FIRST: usize = 2;
/// Bytes of a list beside its holders; it is used again, but never given back.
const LIST_BYTES: usize = size_of::<Vec<Cell>>();

/// A packed [`Holder`], a list's number instead, or neither. All zero when it was never written.
type Cell = [u64; 2];
/// Plain words, so that the system can give them zeroed when they are first written.
type Bucket = [Cell; WAYS];

#[derive(Debug)]
pub(super) struct Table {
    buckets: Vec<Bucket>,
    len: usize,
    lists: Lists,
}

/// Holders of blocks that have several, each list sorted by slot.
#[derive(Debug)]
struct Lists {
    all: Vec<Vec<Cell>>,
    free: Vec<u32>,
    bytes: usize,
    bytes_max: usize,
}

impl Table {
    pub(super) fn new(bytes_max: usize) -> Self {
        let lists_bytes_max = bytes_max / LISTS_PART;
        Self {
            buckets: vec![[[0; 2]; WAYS]; (bytes_max - lists_bytes_max) / size_of::<Bucket>()],
            len: 0,
            lists: Lists::new(lists_bytes_max),
        }
    }

    /// Blocks in it.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Bytes of the blocks in it and their lists.
    pub(super) fn bytes(&self) -> usize {
        self.len * BLOCK_BYTES + self.lists.bytes
    }

    /// Who holds a block, sorted by slot.
    pub(super) fn get(&self, hash: u64) -> impl ExactSizeIterator<Item = Holder> {
        let cells = match self.find(hash) {
            Some(cell) => list_of(cell).map_or(std::slice::from_ref(cell), |list| self.lists.get(list)),
            None => &[],
        };
        cells.iter().map(unpack)
    }

    /// What is known of one holder of a block.
    pub(super) fn holder(&self, hash: u64, slot: Slot) -> Option<Holder> {
        let cell = self.find(hash)?;
        match list_of(cell) {
            Some(list) => self.lists.find(list, slot).map(unpack),
            None => Some(unpack(cell)).filter(|holder| holder.slot == slot),
        }
    }

    /// Whether anything is known of a block.
    pub(super) fn has(&self, hash: u64) -> bool {
        self.find(hash).is_some()
    }

    /// Reads the buckets of blocks that are to be looked at or changed next. Alone that is of no use: reads that do not
    /// wait for one another miss the processor's caches together, where block by block they would in turn.
    pub(super) fn fetch<'a>(&self, blocks: impl IntoIterator<Item = &'a u64>) {
        let read = |hash: &u64| self.buckets.get(self.place(*hash).0).map_or(0, |[[word, _], ..]| *word);
        black_box(blocks.into_iter().fold(0, |all, hash| all ^ read(hash)));
    }

    /// Adds a holder to a block or renews it, as `renew` says by what is known of it; whether it was to be changed.
    pub(super) fn hold(
        &mut self,
        hash: u64,
        slot: Slot,
        caches: &[Cache],
        renew: impl FnOnce(Option<Holder>) -> Option<Holder>,
    ) -> bool {
        let (at, tag) = self.place(hash);
        let Some(bucket) = self.buckets.get_mut(at).filter(|_| slot.0 <= SLOT_MAX) else { return false };
        let Some(cell) = bucket.iter_mut().find(|cell| is(cell, tag)) else {
            let Some(new) = renew(None) else { return false };
            let cell = vacate(bucket, hash, caches);
            self.len += usize::from(is_empty(cell));
            if let Some(list) = list_of(&std::mem::replace(cell, pack(tag, new))) {
                self.lists.release(list);
            }
            return true;
        };
        let new = match list_of(cell) {
            Some(list) => {
                if !self.lists.hold(list, slot, caches, renew) {
                    return false;
                }
                *cell
            }
            None => {
                let old = unpack(cell);
                let known = Some(old).filter(|old| old.slot == slot);
                let Some(new) = renew(known) else { return false };
                let both = known.is_none() && old.is_current(caches);
                let list = if both { self.lists.of_two(*cell, pack(tag, new)) } else { None };
                list.map_or_else(
                    || pack(tag, known.map_or(new, |known| known.renewed(new))),
                    |list| with_list(tag, list),
                )
            }
        };
        // what was added once and never seen again goes before what was
        *cell = used(new);
        true
    }

    /// Changes what is known of one holder of a block.
    pub(super) fn change(&mut self, hash: u64, slot: Slot, change: impl FnOnce(Holder) -> Holder) {
        let (at, tag) = self.place(hash);
        let bucket = self.buckets.get_mut(at).into_iter().flatten();
        let Some(cell) = bucket.into_iter().find(|cell| is(cell, tag)) else { return };
        match list_of(cell) {
            Some(list) => {
                if let Ok(cell) = self.lists.find_mut(list, slot) {
                    *cell = pack(0, change(unpack(cell)));
                }
            }
            None => {
                let holder = unpack(cell);
                if holder.slot == slot {
                    let changed = pack(tag, change(holder));
                    *cell = if was_used(cell) { used(changed) } else { changed };
                }
            }
        }
    }

    /// The bucket of a block, and by what it is known there.
    fn place(&self, hash: u64) -> (usize, u32) {
        // the caller's hashes may be regular; the product's upper half is not
        let mixed = hash.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let bucket = ((u128::from(mixed) * self.buckets.len() as u128) >> 64) as usize;
        (bucket, (mixed ^ mixed >> 32) as u32)
    }

    fn find(&self, hash: u64) -> Option<&Cell> {
        let (at, tag) = self.place(hash);
        self.buckets.get(at)?.iter().find(|cell| is(cell, tag))
    }
}

/// The cell of a bucket that goes for a new block: an empty one, else one whose holder is gone, else one that was not used
/// since the last time all had been.
fn vacate<'a>(bucket: &'a mut Bucket, hash: u64, caches: &[Cache]) -> &'a mut Cell {
    let gone = |cell: &Cell| is_empty(cell) || (list_of(cell).is_none() && !unpack(cell).is_current(caches));
    // any of several, since the first would always be the newest; by the hash, so that equal events give equal tables
    let any = (hash >> 7) as usize % WAYS;
    let is_unused = |way: &usize| bucket.get(*way).is_some_and(|cell| !was_used(cell));
    let found = bucket.iter().position(is_empty).or_else(|| bucket.iter().position(gone));
    let way = found.or_else(|| (any..WAYS).chain(0..any).find(is_unused)).unwrap_or_else(|| {
        bucket.iter_mut().for_each(|cell| *cell = unused(*cell));
        any
    });
    let [first, rest @ ..] = bucket;
    match way.checked_sub(1).and_then(|way| rest.get_mut(way)) {
        Some(cell) => cell,
        None => first,
    }
}

impl Lists {
    fn new(bytes_max: usize) -> Self {
        // as many as there can be: it never grows, which would stop the world
        let all = Vec::with_capacity(bytes_max / (LIST_FIRST * size_of::<Cell>() + LIST_BYTES));
        Self { all, free: Vec::new(), bytes: 0, bytes_max }
    }

    fn get(&self, list: u32) -> &[Cell] {
        self.all.get(list as usize).map_or(&[], Vec::as_slice)
    }

    fn find(&self, list: u32, slot: Slot) -> Option<&Cell> {
        let cells = self.get(list);
        cells.get(cells.binary_search_by_key(&slot, slot_of).ok()?)
    }

    /// A holder in a list, or where it would stand.
    fn find_mut(&mut self, list: u32, slot: Slot) -> Result<&mut Cell, usize> {
        let cells = self.all.get_mut(list as usize).map_or(&mut [][..], Vec::as_mut_slice);
        let at = cells.binary_search_by_key(&slot, slot_of)?;
        cells.get_mut(at).ok_or(at)
    }

    /// A list of two, if there is room for it.
    fn of_two(&mut self, old: Cell, new: Cell) -> Option<u32> {
        if self.bytes + LIST_FIRST * size_of::<Cell>() + LIST_BYTES > self.bytes_max {
            return None;
        }
        let list = self.free.pop().unwrap_or_else(|| {
            self.bytes += LIST_BYTES;
            self.all.push(Vec::new());
            u32::try_from(self.all.len() - 1).unwrap_or(u32::MAX)
        });
        let cells = self.all.get_mut(list as usize)?;
        cells.reserve_exact(LIST_FIRST);
        cells.extend([old, new]);
        cells.sort_unstable_by_key(slot_of);
        self.bytes += cells.capacity() * size_of::<Cell>();
        Some(list)
    }

    /// As [`Table::hold`].
    fn hold(
        &mut self,
        list: u32,
        slot: Slot,
        caches: &[Cache],
        renew: impl FnOnce(Option<Holder>) -> Option<Holder>,
    ) -> bool {
        match self.find_mut(list, slot) {
            Ok(cell) => {
                let known = unpack(cell);
                let Some(new) = renew(Some(known)) else { return false };
                *cell = pack(0, known.renewed(new));
            }
            Err(at) => {
                let Some(new) = renew(None) else { return false };
                self.insert(list, at, pack(0, new), caches);
            }
        }
        true
    }

    /// Adds a holder; where no more are kept, in place of one that is gone, or else of the oldest guess.
    fn insert(&mut self, list: u32, mut at: usize, new: Cell, caches: &[Cache]) {
        let Some(cells) = self.all.get_mut(list as usize) else { return };
        if cells.len() == cells.capacity() {
            let more = cells.capacity().min(HOLDERS_MAX.saturating_sub(cells.len()));
            let bytes = more * size_of::<Cell>();
            let grows = more > 0 && self.bytes + bytes <= self.bytes_max;
            let worth = |cell: &Cell| {
                let holder = unpack(cell);
                (holder.is_current(caches), holder.confirmed, holder.until)
            };
            let least = cells.iter().enumerate().map(|(at, cell)| (worth(cell), at)).min();
            match least {
                Some(((is_current, ..), least)) if !is_current || !grows => {
                    cells.remove(least);
                    at -= usize::from(least < at);
                }
                _ => {
                    cells.reserve_exact(more);
                    self.bytes += bytes;
                }
            }
        }
        cells.insert(at, new);
    }

    fn release(&mut self, list: u32) {
        let Some(cells) = self.all.get_mut(list as usize) else { return };
        self.bytes -= cells.capacity() * size_of::<Cell>();
        *cells = Vec::new();
        self.free.push(list);
    }
}

// Word 0: what is left of the block's hash, and until when (32 bits each). Word 1: slot (20 bits), epoch (16), stamp (24),
// flags; or a list's number, flags.
const SLOT_MAX: u32 = (1 << 20) - 1;
const SLOT_SHIFT: u32 = 44;
const EPOCH_SHIFT: u32 = 28;
const STAMP_SHIFT: u32 = 4;
const PRESENT: u64 = 1;
const USED: u64 = 2;
const CONFIRMED: u64 = 4;
const LIST: u64 = 8;

fn pack(tag: u32, holder: Holder) -> Cell {
    let who = u64::from(holder.slot.0) << SLOT_SHIFT | u64::from(holder.epoch) << EPOCH_SHIFT;
    let confirmed = if holder.confirmed { CONFIRMED } else { 0 };
    [
        u64::from(tag) << 32 | u64::from(holder.until),
        who | u64::from(holder.stamp & super::STAMP_MAX) << STAMP_SHIFT | confirmed | PRESENT,
    ]
}

fn unpack(cell: &Cell) -> Holder {
    let [until, who] = *cell;
    Holder {
        slot: slot_of(cell),
        epoch: (who >> EPOCH_SHIFT) as u16,
        until: until as u32,
        stamp: (who >> STAMP_SHIFT) as u32 & super::STAMP_MAX,
        confirmed: who & CONFIRMED != 0,
    }
}

fn slot_of(&[_, who]: &Cell) -> Slot {
    Slot((who >> SLOT_SHIFT) as u32)
}

fn with_list(tag: u32, list: u32) -> Cell {
    [u64::from(tag) << 32, u64::from(list) << EPOCH_SHIFT | LIST | PRESENT]
}

fn list_of(&[_, who]: &Cell) -> Option<u32> {
    (who & LIST != 0).then_some((who >> EPOCH_SHIFT) as u32)
}

fn is(&[until, who]: &Cell, tag: u32) -> bool {
    (until >> 32) as u32 == tag && who & PRESENT != 0
}

fn is_empty(&[_, who]: &Cell) -> bool {
    who & PRESENT == 0
}

fn was_used(&[_, who]: &Cell) -> bool {
    who & USED != 0
}

fn used([until, who]: Cell) -> Cell {
    [until, who | USED]
}

fn unused([until, who]: Cell) -> Cell {
    [until, who & !USED]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_holder_survives_packing() {
        for holder in [
            Holder { slot: Slot(0), epoch: 0, until: 0, stamp: 0, confirmed: false },
            Holder {
                slot: Slot(SLOT_MAX),
                epoch: u16::MAX,
                until: u32::MAX,
                stamp: super::super::STAMP_MAX,
                confirmed: true,
            },
            Holder { slot: Slot(7), epoch: 3, until: 1 << 20, stamp: 9, confirmed: false },
        ] {
            for tag in [0, 9, u32::MAX] {
                for cell in [pack(tag, holder), used(pack(tag, holder)), unused(used(pack(tag, holder)))] {
                    assert_eq!((unpack(&cell), list_of(&cell), is(&cell, tag)), (holder, None, true));
                    assert!(!is(&cell, tag ^ 1) && !is_empty(&cell));
                }
            }
        }
        assert!(is_empty(&[0; 2]) && !is(&[0; 2], 0));
        for list in [0, 5, u32::MAX] {
            assert_eq!(list_of(&used(with_list(7, list))), Some(list));
        }
    }

    #[test]
    fn any_hash_is_a_block_like_any_other_and_a_slot_beyond_its_bits_is_not_kept() {
        let mut table = Table::new(1 << 16);
        let holder = |slot| Holder { slot: Slot(slot), epoch: 0, until: 5, stamp: 0, confirmed: true };
        for hash in [0, 1, u64::MAX] {
            assert_eq!(table.get(hash).count(), 0);
            assert!(table.hold(hash, Slot(1), &[], |_| Some(holder(1))));
            assert_eq!(table.get(hash).collect::<Vec<_>>(), vec![holder(1)]);
        }
        assert!(!table.hold(2, Slot(SLOT_MAX + 1), &[], |_| Some(holder(SLOT_MAX + 1))));
        assert_eq!((table.len(), table.get(2).count()), (3, 0));
    }
}
