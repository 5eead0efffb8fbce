//! Where the prefix index keeps its blocks: a set-associative table of fixed size, like a processor's cache.
//!
//! A block's hash names a bucket of four cells. Finding a block, adding one and dropping another for it touch that
//! bucket and nothing else, so that a prompt of hundreds of blocks costs microseconds also when the budget is used up;
//! there is no growth that would stop the world, and memory is taken from the system only as buckets are written.
//! Most blocks have one holder, kept in the cell; more go to a list beside.
//!
//! Invariants: a hash stands in at most one cell; table and lists stay under the budget; a list belongs to one cell.
//! Not here: what a holder means and how long it is believed.

use std::hint::black_box;

use super::{Cache, HOLDERS_MAX, Holder};
use crate::worker::Slot;

const WAYS: usize = 4;
/// Bytes of a processor's cache line.
const LINE: usize = 64;
/// Bytes of one block: its hash and its cell.
pub(super) const BLOCK_BYTES: usize = size_of::<u64>() + size_of::<Cell>();
/// Part of the budget that is for the lists.
const LISTS_PART: usize = 4;
/// Holders for which a list has room at first.
const LIST_FIRST: usize = 2;

/// A packed [`Holder`], a list's number instead, or neither. All zero when it was never written.
type Cell = [u64; CELL];
/// Words of a cell.
const CELL: usize = 3;
/// The hashes of its blocks, 0 where a cell is empty, then the cells. Together, so that what a block needs lies in
/// neighbouring lines of memory; plain words, so that the system can give them zeroed when they are first written.
type Bucket = [u64; WAYS + WAYS * CELL];

#[derive(Debug)]
pub(super) struct Table {
    buckets: Vec<Bucket>,
    len: usize,
    lists: Vec<Vec<Holder>>,
    lists_free: Vec<u32>,
    lists_bytes: usize,
    lists_bytes_max: usize,
}

/// What is fetched of a bucket.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Hashes,
    All,
}

/// Who holds a block.
pub(super) enum Holders<'a> {
    One(Option<Holder>),
    Many(&'a [Holder]),
}

impl Holders<'_> {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Holder> {
        let (one, many) = match self {
            Self::One(one) => (one.as_ref(), &[][..]),
            Self::Many(many) => (None, *many),
        };
        one.into_iter().chain(many)
    }
}

impl Table {
    pub(super) fn new(bytes_max: usize) -> Self {
        let lists_bytes_max = bytes_max / LISTS_PART;
        Self {
            buckets: vec![
                [0; size_of::<Bucket>() / size_of::<u64>()];
                (bytes_max - lists_bytes_max) / size_of::<Bucket>()
            ],
            len: 0,
            // as many as there can be: it never grows, which would stop the world
            lists: Vec::with_capacity(lists_bytes_max / (LIST_FIRST * size_of::<Holder>())),
            lists_free: Vec::new(),
            lists_bytes: 0,
            lists_bytes_max,
        }
    }

    /// Blocks in it.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Bytes of the blocks in it and their lists.
    pub(super) fn bytes(&self) -> usize {
        self.len * BLOCK_BYTES + self.lists_bytes
    }

    pub(super) fn get(&self, hash: u64) -> Holders<'_> {
        match self.buckets.get(self.bucket(hash)).and_then(|bucket| cells(bucket).get(find(bucket, hash)?)) {
            Some(cell) => self.holders(cell),
            None => Holders::One(None),
        }
    }

    /// Whether anything is known of a block.
    pub(super) fn has(&self, hash: u64) -> bool {
        self.buckets.get(self.bucket(hash)).is_some_and(|bucket| find(bucket, hash).is_some())
    }

    /// Reads `part` of the buckets of blocks that are to be looked at or changed next. Alone that is of no use: reads that
    /// do not wait for one another miss the processor's caches together, where block by block they would in turn.
    pub(super) fn fetch<'a>(&self, blocks: impl IntoIterator<Item = &'a u64>, part: Part) {
        let lines = if part == Part::Hashes { 1 } else { size_of::<Bucket>() / LINE };
        let read = |hash: &u64| {
            let bucket = self.buckets.get(self.bucket(*hash)).map_or(&[][..], |bucket| bucket);
            bucket.iter().step_by(LINE / size_of::<u64>()).take(lines).fold(0, |all, word| all ^ word)
        };
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
        let at = self.bucket(hash);
        let found = self.buckets.get(at).and_then(|bucket| {
            let way = find(bucket, hash)?;
            Some((way, *cells(bucket).get(way)?))
        });
        let cell = found.map_or([0; CELL], |(_, cell)| cell);
        let known = self.holders(&cell).iter().find(|holder| holder.slot == slot).copied();
        let Some(new) = renew(known) else { return false };
        let new = known.map_or(new, |known| known.renewed(new));
        let cell = match list_of(&cell) {
            Some(list) => {
                self.hold_in(list, new, caches);
                with_list(list)
            }
            None => match unpack(&cell) {
                Some(old) if old.slot != slot && old.is_current(caches) => {
                    self.hold_both(old, new).unwrap_or_else(|| pack(new))
                }
                _ => pack(new),
            },
        };
        let Some(way) = found.map(|(way, _)| way).or_else(|| self.vacate(at, hash, caches)) else { return true };
        if let Some(place) = self.buckets.get_mut(at).and_then(|bucket| cells_mut(bucket).get_mut(way)) {
            // what was added once and never seen again goes before what was
            *place = if found.is_some() { used(cell) } else { cell };
        }
        true
    }

    /// Changes what is known of one holder of a block.
    pub(super) fn change(&mut self, hash: u64, slot: Slot, change: impl FnOnce(&mut Holder)) {
        let at = self.bucket(hash);
        let Some(bucket) = self.buckets.get_mut(at) else { return };
        let Some(cell) = find(bucket, hash).and_then(|way| cells_mut(bucket).get_mut(way)) else { return };
        match list_of(cell) {
            Some(list) => {
                let list = self.lists.get_mut(list as usize).into_iter().flatten();
                if let Some(holder) = list.into_iter().find(|holder| holder.slot == slot) {
                    change(holder);
                }
            }
            None => {
                if let Some(mut holder) = unpack(cell).filter(|holder| holder.slot == slot) {
                    change(&mut holder);
                    *cell = pack(holder);
                }
            }
        }
    }

    fn bucket(&self, hash: u64) -> usize {
        // the caller's hashes may be regular; the product's upper half is not
        let mixed = hash.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        ((u128::from(mixed) * self.buckets.len() as u128) >> 64) as usize
    }

    /// Makes room for a block in its bucket: an empty cell, else one whose holder is gone, else one that was not used
    /// since the last time all had been.
    fn vacate(&mut self, at: usize, hash: u64, caches: &[Cache]) -> Option<usize> {
        let bucket = self.buckets.get_mut(at)?;
        let empty = hashes(bucket).iter().position(|other| *other == 0);
        let cells = cells_mut(bucket);
        let way = empty.unwrap_or_else(|| {
            let gone =
                |cell: &Cell| list_of(cell).is_none() && unpack(cell).is_none_or(|holder| !holder.is_current(caches));
            // any of several, since the first would always be the newest; by the hash, so that equal events give equal
            // tables
            let any = (hash >> 7) as usize % WAYS;
            let is_unused = |way: &usize| cells.get(*way).is_some_and(|cell| !was_used(cell));
            let found = cells.iter().position(gone);
            found.or_else(|| (any..WAYS).chain(0..any).find(is_unused)).unwrap_or_else(|| {
                cells.iter_mut().for_each(|cell| *cell = unused(*cell));
                any
            })
        });
        let list = list_of(&std::mem::take(cells.get_mut(way)?));
        *bucket.get_mut(way)? = stored(hash);
        self.len += usize::from(empty.is_some());
        if let Some(list) = list {
            self.free(list);
        }
        Some(way)
    }

    fn free(&mut self, list: u32) {
        let Some(holders) = self.lists.get_mut(list as usize) else { return };
        self.lists_bytes -= holders.capacity() * size_of::<Holder>();
        *holders = Vec::new();
        self.lists_free.push(list);
    }

    fn holders(&self, cell: &Cell) -> Holders<'_> {
        match list_of(cell) {
            Some(list) => Holders::Many(self.lists.get(list as usize).map_or(&[], Vec::as_slice)),
            None => Holders::One(unpack(cell)),
        }
    }

    /// A list of two, if the lists' budget has room for it.
    fn hold_both(&mut self, old: Holder, new: Holder) -> Option<Cell> {
        if self.lists_bytes + LIST_FIRST * size_of::<Holder>() > self.lists_bytes_max {
            return None;
        }
        let list = self.lists_free.pop().unwrap_or_else(|| {
            self.lists.push(Vec::new());
            u32::try_from(self.lists.len() - 1).unwrap_or(u32::MAX)
        });
        let holders = self.lists.get_mut(list as usize)?;
        holders.reserve_exact(LIST_FIRST);
        holders.extend([old, new]);
        holders.sort_unstable_by_key(|holder| holder.slot);
        self.lists_bytes += holders.capacity() * size_of::<Holder>();
        Some(with_list(list))
    }

    fn hold_in(&mut self, list: u32, new: Holder, caches: &[Cache]) {
        let Some(holders) = self.lists.get_mut(list as usize) else { return };
        if let Some(old) = holders.iter_mut().find(|holder| holder.slot == new.slot) {
            *old = new;
            return;
        }
        if holders.len() == holders.capacity() {
            holders.retain(|holder| holder.is_current(caches));
        }
        if holders.len() == holders.capacity() {
            let more = holders.capacity().min(HOLDERS_MAX.saturating_sub(holders.len()));
            let bytes = more * size_of::<Holder>();
            if more > 0 && self.lists_bytes + bytes <= self.lists_bytes_max {
                holders.reserve_exact(more);
                self.lists_bytes += bytes;
            } else if let Some((oldest, _)) =
                holders.iter().enumerate().min_by_key(|(_, holder)| (holder.confirmed, holder.until))
            {
                holders.remove(oldest);
            }
        }
        let at = holders.partition_point(|holder| holder.slot < new.slot);
        holders.insert(at, new);
    }
}

fn hashes(bucket: &Bucket) -> &[u64] {
    bucket.get(..WAYS).unwrap_or_default()
}

fn cells(bucket: &Bucket) -> &[Cell] {
    bucket.get(WAYS..).unwrap_or_default().as_chunks().0
}

fn cells_mut(bucket: &mut Bucket) -> &mut [Cell] {
    bucket.get_mut(WAYS..).unwrap_or_default().as_chunks_mut().0
}

/// The way of a bucket in which a block stands.
fn find(bucket: &Bucket, hash: u64) -> Option<usize> {
    hashes(bucket).iter().position(|other| *other == stored(hash))
}

/// A hash as it is stored, where 0 means empty.
fn stored(hash: u64) -> u64 {
    hash.max(1)
}

// Word 0: slot, epoch. Word 1: until (61 bits: 73,000 years), and the flags below. Word 2: stamp, list.
const USED: u64 = 1 << 63;
const CONFIRMED: u64 = 1 << 62;
const PRESENT: u64 = 1 << 61;
const UNTIL: u64 = PRESENT - 1;

fn pack(holder: Holder) -> Cell {
    let confirmed = if holder.confirmed { CONFIRMED } else { 0 };
    [
        u64::from(holder.slot.0) << 32 | u64::from(holder.epoch),
        holder.until.0.min(UNTIL) | confirmed | PRESENT,
        u64::from(holder.stamp) << 32,
    ]
}

fn unpack(&[who, until, stamp]: &Cell) -> Option<Holder> {
    (until & PRESENT != 0).then_some(Holder {
        slot: Slot((who >> 32) as u32),
        epoch: who as u32,
        until: crate::Tick(until & UNTIL),
        stamp: (stamp >> 32) as u32,
        confirmed: until & CONFIRMED != 0,
    })
}

/// Lists are numbered from 1 in a cell.
fn with_list(list: u32) -> Cell {
    [0, 0, u64::from(list) + 1]
}

fn list_of(&[_, _, last]: &Cell) -> Option<u32> {
    (last as u32).checked_sub(1)
}

fn was_used(&[_, flags, _]: &Cell) -> bool {
    flags & USED != 0
}

fn used([a, flags, b]: Cell) -> Cell {
    [a, flags | USED, b]
}

fn unused([a, flags, b]: Cell) -> Cell {
    [a, flags & !USED, b]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tick;

    #[test]
    fn a_holder_survives_packing() {
        for holder in [
            Holder { slot: Slot(0), epoch: 0, until: Tick(0), stamp: 0, confirmed: false },
            Holder { slot: Slot(u32::MAX), epoch: u32::MAX, until: Tick(UNTIL), stamp: u32::MAX, confirmed: true },
            Holder { slot: Slot(7), epoch: 3, until: Tick(1 << 40), stamp: 9, confirmed: false },
        ] {
            for cell in [pack(holder), used(pack(holder)), unused(used(pack(holder)))] {
                assert_eq!((unpack(&cell), list_of(&cell)), (Some(holder), None));
            }
        }
        assert_eq!((unpack(&[0; 3]), list_of(&[0; 3])), (None, None));
        assert_eq!((unpack(&used(with_list(5))), list_of(&used(with_list(5)))), (None, Some(5)));
    }

    #[test]
    fn hash_zero_is_a_block_like_any_other() {
        let mut table = Table::new(1 << 16);
        let holder = Holder { slot: Slot(1), epoch: 0, until: Tick(5), stamp: 0, confirmed: true };
        assert_eq!(table.get(0).iter().count(), 0);
        table.hold(0, Slot(1), &[], |_| Some(holder));
        assert_eq!((table.len(), table.get(0).iter().collect::<Vec<_>>()), (1, vec![&holder]));
    }
}
