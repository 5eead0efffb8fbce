use super::table::BLOCK_BYTES;
use super::*;
use proptest::prelude::*;

const LATER: Tick = Tick(16 * LEASE_STEP);
const NOW: Tick = Tick(1);

fn chain(seed: u64, len: usize) -> Vec<u64> {
    let mut hash = seed;
    (0..len)
        .map(|_| {
            hash = (hash ^ 0x9E37).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(17);
            hash
        })
        .collect()
}

fn matches(index: &PrefixIndex, now: Tick, blocks: &[u64]) -> Vec<(u32, u32)> {
    index.lookup(now, blocks).into_iter().map(|(slot, held)| (slot.0, held)).collect()
}

#[test]
fn holders_of_every_length_are_found() {
    let blocks = chain(1, 500);
    for lengths in [[0_usize, 1, 2], [31, 32, 33], [64, 65, 500], [499, 500, 250], [500, 500, 500]] {
        let mut index = PrefixIndex::new(1 << 20, 16);
        for (slot, held) in (0..).zip(lengths) {
            index.expect(Tick(0), Slot(slot), &blocks[..held], LATER);
        }
        let expect: Vec<_> = (0..).zip(lengths.map(|held| held as u32)).filter(|(_, held)| *held > 0).collect();
        assert_eq!(matches(&index, NOW, &blocks), expect, "{lengths:?}");
        for (slot, held) in (0..).zip(lengths) {
            assert_eq!(index.held_by(NOW, Slot(slot), &blocks), held as u32);
        }
    }
}

#[test]
fn nothing_is_found_for_nothing_and_for_another_prompt() {
    let mut index = PrefixIndex::new(1 << 20, 16);
    index.expect(Tick(0), Slot(0), &chain(1, 10), LATER);
    assert_eq!(matches(&index, NOW, &[]), []);
    assert_eq!(matches(&index, NOW, &chain(2, 10)), []);
}

#[test]
fn what_is_shared_with_a_guess_is_found_to_the_milestone_and_with_the_engines_word_to_the_block() {
    let a = chain(1, 100);
    for shared in 0..=100_usize {
        let b: Vec<u64> = a[..shared].iter().copied().chain(chain(2, 50)).collect();
        let mut index = PrefixIndex::new(1 << 20, 16);
        index.expect(Tick(0), Slot(0), &a, LATER);
        // the end of a prompt is found wherever it is
        let guessed = if shared == 100 { 100 } else { shared as u32 / 8 * 8 };
        let expect: Vec<_> = [(0, guessed)].into_iter().filter(|(_, held)| *held > 0).collect();
        assert_eq!(matches(&index, NOW, &b), expect, "{shared}");
        assert_eq!(index.held_by(NOW, Slot(0), &b), guessed, "{shared}");
        index.confirm(Slot(0), &a);
        let expect: Vec<_> = [(0, shared as u32)].into_iter().filter(|(_, held)| *held > 0).collect();
        assert_eq!(matches(&index, NOW, &b), expect, "{shared}");
        assert_eq!(index.held_by(NOW, Slot(0), &b), shared as u32, "{shared}");
    }
}

#[test]
fn a_guess_is_a_lease_and_the_engines_word_is_none() {
    let blocks = chain(1, 40);
    let mut index = PrefixIndex::new(1 << 20, 16);
    index.expect(Tick(0), Slot(0), &blocks, LATER);
    index.confirm(Slot(1), &blocks[..20]);
    index.expect(Tick(0), Slot(1), &blocks, LATER);
    assert_eq!(matches(&index, NOW, &blocks), [(0, 40), (1, 40)]);
    assert_eq!(matches(&index, LATER, &blocks), [(1, 20)]);
    index.drop_blocks(Slot(1), &blocks[10..20]);
    assert_eq!(matches(&index, NOW, &blocks), [(0, 40), (1, 40)], "our guess is as young as the engine's word");
    assert_eq!(matches(&index, LATER, &blocks), [(1, 10)]);
}

#[test]
fn a_forgotten_worker_is_not_found_even_when_its_slot_is_used_again() {
    let blocks = chain(1, 40);
    let mut index = PrefixIndex::new(1 << 20, 16);
    index.confirm(Slot(0), &blocks);
    index.forget(Slot(0));
    assert_eq!(matches(&index, NOW, &blocks), []);
    index.expect(Tick(0), Slot(0), &blocks[..3], LATER);
    assert_eq!(matches(&index, NOW, &blocks), [(0, 3)]);
    assert_eq!(matches(&index, LATER, &blocks), [], "the old word of the engine does not last");
}

#[test]
fn a_block_that_all_hold_names_a_bounded_number() {
    let blocks = chain(1, 4);
    let mut index = PrefixIndex::new(1 << 20, 16);
    for slot in 0..1000 {
        index.expect(Tick(0), Slot(slot), &blocks, Tick((100 + u64::from(slot)) * LEASE_STEP));
    }
    let found = matches(&index, NOW, &blocks);
    assert_eq!(found.len(), HOLDERS_MAX);
    assert_eq!(found[0].0, 1000 - HOLDERS_MAX as u32, "the newest");
}

#[test]
fn who_holds_more_is_found_where_more_hold_the_beginning_than_it_can_name() {
    let (shared, long) = (chain(1, 40), chain(1, 200));
    let mut index = PrefixIndex::new(1 << 20, 16);
    index.confirm(Slot(0), &long);
    for slot in 1..1 + 2 * HOLDERS_MAX as u32 {
        index.confirm(Slot(slot), &shared);
    }
    let found = matches(&index, NOW, &long);
    assert!(found.contains(&(0, 200)), "{found:?}");
    assert!(found.iter().all(|(slot, held)| *held == if *slot == 0 { 200 } else { 40 }), "{found:?}");
}

#[test]
fn what_is_used_stays_and_the_budget_holds() {
    let mut index = PrefixIndex::new(400 * BLOCK_BYTES, MILESTONE_TOKENS);
    let kept = chain(1, 50);
    for round in 0..100 {
        // later each time, so that it is written each time
        index.expect(Tick(0), Slot(0), &kept, Tick(LATER.0 * (round + 1)));
        index.expect(Tick(0), Slot(1), &chain(100 + round, 20), LATER);
        assert!(index.bytes() <= 400 * BLOCK_BYTES);
    }
    // buckets fill unevenly, so that a few may be lost
    let held = |blocks: &[u64]| (1..=blocks.len()).filter(|held| !index.holders(NOW, blocks, *held).is_empty()).count();
    assert!(held(&kept) >= 45, "{}", held(&kept));
    let old: usize = (100..150).map(|seed| held(&chain(seed, 20))).sum();
    assert!(old <= 100, "{old} of 1000 that were never used again");
}

#[test]
fn a_budget_for_nothing_keeps_nothing() {
    let mut index = PrefixIndex::new(10, 16);
    index.confirm(Slot(0), &chain(1, 10));
    assert_eq!((index.len(), index.bytes()), (0, 0));
}

#[derive(Debug, Clone)]
enum Change {
    Expect(u32, u64, usize, u64),
    Confirm(u32, u64, usize),
    Drop(u32, u64, usize),
    Forget(u32),
}

fn change() -> impl Strategy<Value = Change> {
    let (slot, seed, len) = (0..6_u32, 0..4_u64, 0..120_usize);
    prop_oneof![
        // leases far apart: one that is hardly longer is not written
        (slot.clone(), seed.clone(), len.clone(), 0..4_u32).prop_map(|(s, c, l, t)| Change::Expect(
            s,
            c,
            l,
            5 * 6_u64.pow(t) - 5
        )),
        (slot.clone(), seed.clone(), len.clone()).prop_map(|(s, c, l)| Change::Confirm(s, c, l)),
        (slot.clone(), seed, len).prop_map(|(s, c, l)| Change::Drop(s, c, l)),
        slot.prop_map(Change::Forget),
    ]
}

proptest! {
    /// With room for all, lookups equal a plain model of who holds which length; engines drop from the end.
    #[test]
    fn lookups_equal_a_plain_model(changes in prop::collection::vec(change(), 0..60), now in 0..1200_u64) {
        let mut index = PrefixIndex::new(1 << 24, 16);
        let at = Tick(now * LEASE_STEP);
        // (slot, chain) -> (confirmed length, [(length, until)])
        let mut model = std::collections::BTreeMap::<(u32, u64), (usize, Vec<(usize, u64)>)>::new();
        for change in changes {
            match change {
                Change::Expect(slot, seed, len, until) => {
                    index.expect(Tick(0), Slot(slot), &chain(seed, len), Tick(until * LEASE_STEP));
                    model.entry((slot, seed)).or_default().1.push((len, until));
                }
                Change::Confirm(slot, seed, len) => {
                    index.confirm(Slot(slot), &chain(seed, len));
                    let held = &mut model.entry((slot, seed)).or_default().0;
                    *held = len.max(*held);
                }
                Change::Drop(slot, seed, keep) => {
                    let held = model.entry((slot, seed)).or_default();
                    if held.0 > keep {
                        index.drop_blocks(Slot(slot), &chain(seed, held.0)[keep..]);
                        held.0 = keep;
                    }
                }
                Change::Forget(slot) => {
                    index.forget(Slot(slot));
                    model.retain(|(held, _), _| *held != slot);
                }
            }
        }
        for seed in 0..4 {
            let blocks = chain(seed, 120);
            let mut expect = Vec::new();
            for slot in 0..6 {
                let held = model.get(&(slot, seed)).map_or(0, |(confirmed, guesses)| {
                    guesses.iter().filter(|(_, until)| *until > now).map(|(len, _)| *len).max().unwrap_or(0).max(*confirmed)
                });
                let held = u32::try_from(held).unwrap();
                prop_assert_eq!(index.held_by(at, Slot(slot), &blocks), held);
                if held > 0 {
                    expect.push((slot, held));
                }
            }
            let longest = expect.iter().map(|(_, held)| *held).max();
            expect.retain(|(_, held)| *held >= 8 || longest < Some(8));
            prop_assert_eq!(matches(&index, at, &blocks), expect);
        }
    }

    /// Whatever happens, the budget holds and only current workers are named.
    #[test]
    fn a_small_budget_holds(changes in prop::collection::vec(change(), 0..60), entries in 1..300_usize) {
        let mut index = PrefixIndex::new(entries * BLOCK_BYTES, 16);
        for change in changes {
            match change {
                Change::Expect(slot, seed, len, until) => index.expect(Tick(0), Slot(slot), &chain(seed, len), Tick(until)),
                Change::Confirm(slot, seed, len) => index.confirm(Slot(slot), &chain(seed, len)),
                Change::Drop(slot, seed, keep) => index.drop_blocks(Slot(slot), &chain(seed, 120)[keep..]),
                Change::Forget(slot) => {
                    index.forget(Slot(slot));
                    for seed in 0..4 {
                        prop_assert!(matches(&index, NOW, &chain(seed, 120)).iter().all(|(held, _)| *held != slot));
                    }
                }
            }
            prop_assert!(index.bytes() <= entries * BLOCK_BYTES);
        }
    }
}

#[test]
fn a_worker_without_events_is_believed_to_hold_no_more_than_its_cache() {
    let mut index = PrefixIndex::new(1 << 20, 16);
    index.set_capacity(Slot(0), Some(100));
    let (old, shared) = (chain(1, 40), chain(2, 40));
    index.expect(Tick(0), Slot(0), &old, LATER);
    index.expect(Tick(0), Slot(0), &shared, LATER);
    assert_eq!((index.held_by(NOW, Slot(0), &old), index.held_by(NOW, Slot(0), &shared)), (40, 40));
    index.expect(Tick(0), Slot(0), &shared, LATER);
    assert_eq!(index.held_by(NOW, Slot(0), &old), 40, "what was there already takes no room");
    index.expect(Tick(0), Slot(0), &chain(3, 25), LATER);
    assert_eq!(index.held_by(NOW, Slot(0), &old), 32, "the oldest is evicted first, from its end");
    assert_eq!(index.held_by(NOW, Slot(0), &shared), 40, "what was used since stays");
    index.expect(Tick(0), Slot(0), &chain(4, 80), LATER);
    assert_eq!((index.held_by(NOW, Slot(0), &old), index.held_by(NOW, Slot(0), &shared)), (0, 0));
}
