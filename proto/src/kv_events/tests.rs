use proptest::prelude::*;

use super::*;

/// Writes MessagePack by the specification.
#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn array(self, length: usize) -> Self {
        let length = u16::try_from(length).unwrap().to_be_bytes();
        self.raw(&[0xdc]).raw(&length)
    }

    fn map(self, length: usize) -> Self {
        let length = u16::try_from(length).unwrap().to_be_bytes();
        self.raw(&[0xde]).raw(&length)
    }

    fn text(self, text: &str) -> Self {
        let length = u8::try_from(text.len()).unwrap();
        self.raw(&[0xd9, length]).raw(text.as_bytes())
    }

    fn bytes(self, bytes: &[u8]) -> Self {
        let length = u8::try_from(bytes.len()).unwrap();
        self.raw(&[0xc4, length]).raw(bytes)
    }

    fn number(self, number: u64) -> Self {
        self.raw(&[0xcf]).raw(&number.to_be_bytes())
    }

    fn nil(self) -> Self {
        self.raw(&[0xc0])
    }

    fn numbers(self, numbers: &[u64]) -> Self {
        numbers.iter().fold(self.array(numbers.len()), |writer, number| writer.number(*number))
    }

    /// A batch of these events.
    fn batch(count: usize) -> Self {
        Self::default().array(3).raw(&[0xcb]).raw(&1.5_f64.to_be_bytes()).array(count)
    }

    fn read(self) -> Result<Vec<Event>, Malformed> {
        read(&self.number(0).0)
    }
}

const GPU: Place = Place { on_gpu: true, group: None, full_attention: true };

fn stored() -> Stored {
    Stored {
        blocks: vec![EngineHash(11), EngineHash(12)],
        parent: None,
        tokens: vec![1, 2, 3, 4],
        block_tokens: 2,
        lora: None,
        salt: None,
        plain: 2,
        place: GPU,
    }
}

/// A stored event as a map: the fields that are always there, and `more` of them.
fn as_map(more: usize, write: impl FnOnce(Writer) -> Writer) -> Result<Vec<Event>, Malformed> {
    let writer = Writer::batch(1).map(5 + more).text("type").text("BlockStored");
    let writer = writer.text("block_hashes").numbers(&[11, 12]).text("parent_block_hash").nil();
    let writer = writer.text("token_ids").numbers(&[1, 2, 3, 4]).text("block_size").number(2);
    write(writer).read()
}

#[test]
fn both_forms_say_the_same() {
    let array = Writer::batch(3).array(6).text("BlockStored").numbers(&[11, 12]).nil().numbers(&[1, 2, 3, 4]).number(2);
    let array = array.nil().array(3).text("BlockRemoved").numbers(&[11]).text("GPU").array(1).text("AllBlocksCleared");
    let map = Writer::batch(3).map(7).text("medium").text("GPU").text("token_ids").numbers(&[1, 2, 3, 4]);
    let map = map.text("block_size").number(2).text("block_hashes").numbers(&[11, 12]);
    let map = map.text("parent_block_hash").nil().text("lora_id").nil().text("type").text("BlockStored");
    let map = map.map(2).text("type").text("BlockRemoved").text("block_hashes").numbers(&[11]);
    let map = map.map(1).text("type").text("AllBlocksCleared");
    let removed = Removed { blocks: vec![EngineHash(11)], place: GPU };
    let expected = vec![Event::Stored(stored()), Event::Removed(removed), Event::Cleared];
    assert_eq!(array.read(), Ok(expected.clone()));
    assert_eq!(map.read(), Ok(expected));
}

#[test]
fn a_batch_may_end_early_or_go_on() {
    let two = Writer::default().array(2).number(7).array(0);
    assert_eq!(read(&two.0), Ok(vec![]));
    let nil = Writer::default().array(3).number(7).array(0).nil();
    assert_eq!(read(&nil.0), Ok(vec![]));
    let more = Writer::default().array(5).number(7).array(0).number(3).map(1).text("new").nil().text("field");
    assert_eq!(read(&more.0), Ok(vec![]));
}

#[test]
fn hashes_as_bytes_are_the_numbers_of_their_last_eight() {
    let long = [&[9; 24][..], &12_u64.to_be_bytes()].concat();
    let array = Writer::batch(1).array(2).text("BlockRemoved").array(3).bytes(&long).bytes(&[1, 0]).raw(&[0xff]);
    let Event::Removed(removed) = array.read().unwrap().remove(0) else { panic!() };
    assert_eq!(removed.blocks, [EngineHash(12), EngineHash(256), EngineHash(u64::MAX)]);
}

#[test]
fn what_is_not_known_is_passed_over() {
    let later = as_map(2, |writer| {
        writer.text("lookahead_token_ids").numbers(&[5]).text("of_tomorrow").map(1).text("a").array(1).nil()
    });
    assert_eq!(later, Ok(vec![Event::Stored(stored())]));
    let array =
        Writer::batch(2).array(2).text("BlockMoved").map(1).number(1).number(2).array(1).text("AllBlocksCleared");
    assert_eq!(array.read(), Ok(vec![Event::Cleared]));
    let map = Writer::batch(1).map(2).text("block_hashes").text("another type here").text("type").text("BlockMoved");
    assert_eq!(map.read(), Ok(vec![]));
    // All fields of the array form that exist, and one more.
    let full = Writer::batch(1).array(18).text("BlockStored").numbers(&[11, 12]).nil().numbers(&[1, 2, 3, 4]).number(2);
    let full = full.nil().text("GPU").nil().nil().number(0).text("full_attention").nil().nil().nil().nil().nil().nil();
    let place = Place { group: Some(0), ..GPU };
    assert_eq!(full.nil().read(), Ok(vec![Event::Stored(Stored { place, ..stored() })]));
}

/// Which keys besides the tokens two blocks have, and what is made of it.
#[test]
fn extra_keys() {
    type Write = fn(Writer) -> Writer;
    let salted = Stored { salt: Some("s".to_owned()), ..stored() };
    let adapter = Stored { lora: Some("ada".to_owned()), ..stored() };
    let cases: [(&str, usize, Write, Stored); 9] = [
        ("nil", 1, |w| w.text("extra_keys").nil(), stored()),
        ("none of each", 1, |w| w.text("extra_keys").array(2).nil().array(0), stored()),
        ("a salt", 1, |w| w.text("extra_keys").array(2).array(1).text("s").nil(), salted.clone()),
        (
            "a salt elsewhere",
            1,
            |w| w.text("extra_keys").array(2).nil().array(1).text("s"),
            Stored { plain: 1, ..stored() },
        ),
        (
            "two texts",
            1,
            |w| w.text("extra_keys").array(1).array(2).text("a").text("b"),
            Stored { plain: 0, ..stored() },
        ),
        (
            "an image in the second",
            1,
            |w| w.text("extra_keys").array(2).nil().array(1).array(2).text("img").number(3),
            Stored { plain: 1, ..stored() },
        ),
        (
            "an adapter and a salt",
            2,
            |w| {
                w.text("lora_name")
                    .text("ada")
                    .text("extra_keys")
                    .array(2)
                    .array(2)
                    .text("ada")
                    .text("s")
                    .array(1)
                    .text("ada")
            },
            Stored { salt: Some("s".to_owned()), ..adapter.clone() },
        ),
        (
            "an adapter without a name",
            1,
            |w| w.text("lora_id").number(1),
            Stored { lora: Some(String::new()), ..stored() },
        ),
        ("SGLang's salt", 1, |w| w.text("cache_salt").text("s"), salted),
    ];
    for (name, more, write, expected) in cases {
        assert_eq!(as_map(more, write), Ok(vec![Event::Stored(expected)]), "{name}");
    }
}

#[test]
fn tiers_and_groups() {
    let place = |write: fn(Writer) -> Writer| match as_map(1, write).unwrap().remove(0) {
        Event::Stored(stored) => stored.place,
        other => panic!("{other:?}"),
    };
    assert_eq!(place(|w| w.text("medium").text("GPU")), GPU);
    for medium in ["CPU", "CPU_PINNED", "DISK", "STORAGE"] {
        let read = as_map(1, |w| w.text("medium").text(medium)).unwrap().remove(0);
        assert!(matches!(read, Event::Stored(Stored { place: Place { on_gpu: false, .. }, .. })), "{medium}");
    }
    assert!(!place(|w| w.text("locality").text("REMOTE")).on_gpu);
    assert_eq!(place(|w| w.text("group_idx").number(2)).group, Some(2));
    assert!(place(|w| w.text("kv_cache_spec_kind").text("mla_attention")).full_attention);
    assert!(!place(|w| w.text("kv_cache_spec_kind").text("sliding_window")).full_attention);
}

#[test]
fn tokens_that_do_not_fill_the_blocks_tell_nothing() {
    let none = |hashes: &[u64], write: fn(Writer) -> Writer| {
        let writer = Writer::batch(1).array(5).text("BlockStored").numbers(hashes).nil();
        match write(writer).number(2).read().unwrap().remove(0) {
            Event::Stored(stored) => assert_eq!((stored.plain, stored.tokens.len()), (0, 0)),
            other => panic!("{other:?}"),
        }
    };
    none(&[1], |w| w.numbers(&[1, 2, 3, 4]));
    none(&[1, 2], |w| w.numbers(&[1, 2, 3]));
    none(&[1], |w| w.array(2).array(2).number(1).number(2).number(3));
    none(&[1], |w| w.numbers(&[1, 1 << 40]));
    none(&[1], |w| w.nil());
}

#[test]
fn what_is_no_batch_is_refused() {
    let batch = || Writer::batch(1);
    for (name, writer) in [
        ("no array", Writer::default().map(0)),
        ("no events", Writer::default().array(1).number(1)),
        ("time as text", Writer::default().array(2).text("now").array(0)),
        ("events as text", Writer::default().array(2).number(1).text("x")),
        ("an event as text", batch().text("BlockStored")),
        ("an empty event", batch().array(0)),
        ("a map without a type", batch().map(1).text("block_hashes").array(0)),
        ("no hashes", batch().array(1).text("BlockRemoved")),
        ("hashes as text", batch().array(2).text("BlockRemoved").text("x")),
        ("a nil hash", batch().array(2).text("BlockRemoved").array(1).nil()),
        ("no block size", batch().array(4).text("BlockStored").numbers(&[1]).nil().numbers(&[1])),
        ("blocks of no tokens", batch().array(5).text("BlockStored").numbers(&[1]).nil().array(0).number(0)),
        ("more than it says", Writer::default().array(2).number(1).array(0).nil()),
    ] {
        assert_eq!(read(&writer.0), Err(Malformed), "{name}");
    }
}

fn example() -> Vec<u8> {
    let writer = Writer::batch(2).map(7).text("type").text("BlockStored").text("block_hashes").array(1).bytes(&[7; 32]);
    let writer = writer.text("parent_block_hash").number(3).text("token_ids").numbers(&[1, 2]).text("block_size");
    let writer = writer.number(2).text("medium").text("GPU").text("extra_keys").array(1).array(1).text("s");
    writer.array(2).text("BlockRemoved").numbers(&[4]).number(0).0
}

#[test]
fn cut_anywhere_it_is_refused() {
    let whole = example();
    assert!(read(&whole).is_ok());
    for end in 0..whole.len() {
        assert_eq!(read(&whole[..end]), Err(Malformed), "cut at {end}");
    }
}

proptest! {
    #[test]
    fn damage_is_refused_or_read(at in 0_usize..120, byte: u8, tail in proptest::collection::vec(any::<u8>(), 0..40)) {
        let mut bytes = example();
        let at = at % bytes.len();
        bytes[at] = byte;
        let _ = read(&bytes);
        bytes.truncate(at);
        bytes.extend(tail);
        let _ = read(&bytes);
    }

    #[test]
    fn a_chain_is_read_back(hashes in proptest::collection::vec(any::<u64>(), 0..9), size in 1_u32..5, parent: Option<u64>) {
        let ids: Vec<u64> = (0..hashes.len() as u64 * u64::from(size)).collect();
        let writer = Writer::batch(1).array(5).text("BlockStored").numbers(&hashes);
        let writer = match parent { Some(parent) => writer.number(parent), None => writer.nil() };
        let read = writer.numbers(&ids).number(size.into()).read();
        let expected = Stored {
            blocks: hashes.iter().map(|hash| EngineHash(*hash)).collect(),
            parent: parent.map(EngineHash),
            tokens: ids.iter().map(|id| *id as u32).collect(),
            block_tokens: size,
            plain: hashes.len(),
            ..stored()
        };
        prop_assert_eq!(read, Ok(vec![Event::Stored(expected)]));
    }
}
