use forebay_proto::kv_events::Removed;
use proptest::prelude::*;

use super::*;

const GPU: Place = Place { on_gpu: true, group: Some(0), full_attention: true };

/// Blocks of 4 tokens: the engine names them by `names`, the tokens count from `first` on.
fn stored(names: &[u64], parent: Option<u64>, first: u32) -> Stored {
    Stored {
        blocks: names.iter().map(|name| EngineHash(*name)).collect(),
        parent: parent.map(EngineHash),
        tokens: (first..first + 4 * u32::try_from(names.len()).unwrap()).collect(),
        block_tokens: 4,
        lora: None,
        salt: None,
        plain: names.len(),
        place: GPU,
    }
}

fn removed(names: &[u64]) -> Event {
    Event::Removed(Removed { blocks: names.iter().map(|name| EngineHash(*name)).collect(), place: GPU })
}

/// The hashes of a prompt of tokens from 0 on, as `prepare` makes them.
fn prompt(tokens: u32, salt: Option<&str>) -> Vec<u64> {
    let ids: Vec<u32> = (0..tokens).collect();
    let mut chain = Chain::after(seed("m", salt));
    ids.chunks_exact(4).map(|block| chain.block(block)).collect()
}

fn apply(rehash: &mut Rehash, events: &[Event]) -> Vec<KvEvent> {
    rehash.apply(events, (None, &[]))
}

fn new() -> Rehash {
    Rehash::new("m".into())
}

#[test]
fn blocks_get_the_hashes_of_their_prompt() {
    let mut rehash = new();
    let whole = prompt(16, None);
    let first = apply(&mut rehash, &[Event::Stored(stored(&[70, 71], None, 0))]);
    assert_eq!(first, [KvEvent::Stored { blocks: whole[..2].to_vec() }]);
    let next =
        apply(&mut rehash, &[Event::Stored(stored(&[72], Some(71), 8)), Event::Stored(stored(&[73], Some(72), 12))]);
    assert_eq!(next, [KvEvent::Stored { blocks: whole[2..].to_vec() }], "neighbours are told together");
    let gone = apply(&mut rehash, &[removed(&[73]), removed(&[72, 99])]);
    assert_eq!(gone, [KvEvent::Removed { blocks: vec![whole[3], whole[2]] }]);
    let mut left = rehash.blocks();
    left.sort_unstable();
    let mut held = whole[..2].to_vec();
    held.sort_unstable();
    assert_eq!((left, rehash.block_tokens()), (held, Some(4)));
}

#[test]
fn a_salt_is_in_every_block_behind_it() {
    let mut rehash = new();
    let salted = Stored { salt: Some("s".to_owned()), ..stored(&[1], None, 0) };
    let told = apply(&mut rehash, &[Event::Stored(salted), Event::Stored(stored(&[2], Some(1), 4))]);
    assert_eq!(told, [KvEvent::Stored { blocks: prompt(8, Some("s")) }]);
    assert_ne!(prompt(8, Some("s")), prompt(8, None));
}

#[test]
fn what_is_told_again_is_passed_over() {
    let mut rehash = new();
    let whole = prompt(12, None);
    apply(&mut rehash, &[Event::Stored(stored(&[1, 2], None, 0))]);
    assert_eq!(apply(&mut rehash, &[Event::Stored(stored(&[1, 2], None, 0))]), []);
    let more = apply(&mut rehash, &[Event::Stored(stored(&[1, 2, 3], None, 0))]);
    assert_eq!(more, [KvEvent::Stored { blocks: vec![whole[2]] }]);
}

#[test]
fn order_is_kept_and_clearing_forgets() {
    let mut rehash = new();
    let whole = prompt(8, None);
    let events = [
        Event::Stored(stored(&[1], None, 0)),
        removed(&[1]),
        Event::Stored(stored(&[1], None, 0)),
        Event::Cleared,
        Event::Stored(stored(&[2], Some(1), 4)),
        Event::Stored(stored(&[3], None, 0)),
    ];
    let (stored, gone) = (KvEvent::Stored { blocks: vec![whole[0]] }, KvEvent::Removed { blocks: vec![whole[0]] });
    let expected = [stored.clone(), gone, stored.clone(), KvEvent::Cleared, stored];
    assert_eq!(apply(&mut rehash, &events), expected, "and a block without a known parent has no hash");
    rehash.forget();
    assert_eq!(apply(&mut rehash, &[removed(&[3])]), []);
}

#[test]
fn what_no_prompt_could_match_is_left_out() {
    let plain = || stored(&[1, 2], None, 0);
    let elsewhere = Place { on_gpu: false, ..GPU };
    let window = Place { group: Some(1), full_attention: false, ..GPU };
    for (name, event) in [
        ("another adapter", Stored { lora: Some("ada".to_owned()), ..plain() }),
        ("a slower tier", Stored { place: elsewhere, ..plain() }),
        ("layers with a window", Stored { place: window, ..plain() }),
        ("an image in the first block", Stored { plain: 0, ..plain() }),
        ("a parent that is not known", Stored { parent: Some(EngineHash(9)), ..plain() }),
    ] {
        let mut rehash = new();
        assert_eq!(apply(&mut rehash, &[Event::Stored(event)]), [], "{name}");
        assert_eq!(apply(&mut rehash, &[removed(&[1])]), [], "{name}");
    }
    let mut rehash = new();
    let image = Stored { plain: 1, ..plain() };
    let behind = stored(&[3], Some(2), 8);
    let told = apply(&mut rehash, &[Event::Stored(image), Event::Stored(behind)]);
    assert_eq!(told, [KvEvent::Stored { blocks: prompt(4, None) }], "nothing from an image on");
    let other_size = Stored { blocks: vec![EngineHash(5)], block_tokens: 8, plain: 1, ..plain() };
    assert_eq!(apply(&mut rehash, &[Event::Stored(other_size)]), [], "blocks of another size");
}

#[test]
fn removals_from_a_window_or_a_tier_leave_the_block() {
    let mut rehash = new();
    let window = Place { group: Some(1), full_attention: false, ..GPU };
    apply(&mut rehash, &[Event::Stored(stored(&[1], None, 0))]);
    apply(&mut rehash, &[Event::Stored(Stored { place: window, ..stored(&[1], None, 0) })]);
    for place in [Place { group: Some(1), ..GPU }, Place { on_gpu: false, ..GPU }] {
        let gone = Event::Removed(Removed { blocks: vec![EngineHash(1)], place });
        assert_eq!(apply(&mut rehash, &[gone]), [], "{place:?}");
    }
    assert_eq!(apply(&mut rehash, &[removed(&[1])]).len(), 1);
}

#[test]
fn a_pool_of_an_adapter_takes_that_adapters_blocks() {
    let mut rehash = new();
    let adapted = Event::Stored(Stored { lora: Some("ada".to_owned()), ..stored(&[1], None, 0) });
    let base = Event::Stored(stored(&[2], None, 0));
    assert_eq!(rehash.apply(&[base, adapted], (Some("ada"), &[])), [KvEvent::Stored { blocks: prompt(4, None) }]);
    assert_eq!(rehash.blocks().len(), 1);
}

#[test]
fn adapters_beside_the_model_have_blocks_of_their_own() {
    let mut rehash = new();
    let adapter = |name: &str| Adapter {
        id: forebay_scheduler::AdapterId(1),
        name: name.into(),
        base: "m".into(),
        path: None,
        gone: false,
        memory_bytes: 0,
    };
    let of = |lora: &str, block| Event::Stored(Stored { lora: Some(lora.to_owned()), ..stored(&[block], None, 0) });
    let events = [of("ada", 1), of("other", 2), of("", 3), Event::Stored(stored(&[4], None, 0))];
    let told = rehash.apply(&events, (None, &[adapter("bob"), adapter("ada")]));
    let ada = Chain::after(seed("ada", None)).block(&[0, 1, 2, 3]);
    assert_eq!(told, [KvEvent::Stored { blocks: vec![ada, prompt(4, None)[0]] }]);
}

#[test]
fn memory_is_bounded() {
    let mut rehash = new();
    let mut told = 0;
    let step = 1 << 14;
    for at in 0..(BLOCKS_MAX as u64 / step + 2) {
        let names: Vec<u64> = (at * step..(at + 1) * step).collect();
        let parent = names[0].checked_sub(1);
        for change in apply(&mut rehash, &[Event::Stored(stored(&names, parent, 0))]) {
            let KvEvent::Stored { blocks } = change else { panic!("{change:?}") };
            told += blocks.len();
        }
    }
    assert_eq!((told, rehash.blocks().len()), (BLOCKS_MAX, BLOCKS_MAX));
}

proptest! {
    /// Whatever comes in whatever order: what the core was told is what is known, and no more than was stored.
    #[test]
    fn the_core_knows_what_is_known(steps in proptest::collection::vec((0_u64..12, 0_u8..4), 0..60)) {
        let mut rehash = new();
        let mut core = std::collections::BTreeMap::<u64, u32>::new();
        for (name, kind) in steps {
            let event = match kind {
                0 => removed(&[name]),
                1 if name == 0 => Event::Cleared,
                _ => Event::Stored(stored(&[name], name.checked_sub(1), 4 * u32::try_from(name).unwrap())),
            };
            for change in apply(&mut rehash, &[event]) {
                match change {
                    KvEvent::Stored { blocks } => blocks.iter().for_each(|hash| *core.entry(*hash).or_default() += 1),
                    KvEvent::Removed { blocks } => blocks.iter().for_each(|hash| { core.remove(hash); }),
                    KvEvent::Cleared => core.clear(),
                }
            }
            let mut known = rehash.blocks();
            known.sort_unstable();
            prop_assert_eq!(known, core.keys().copied().collect::<Vec<_>>());
        }
    }
}
