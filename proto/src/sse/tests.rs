use proptest::prelude::*;

use super::*;

/// Events as (raw, data, name), and the end with whether it is whole, when `input` arrives in the given pieces.
type Seen = (Vec<(String, Option<String>, Option<String>)>, Option<(bool, String, Option<String>)>);

fn text(bytes: &Bytes) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn run<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Seen {
    let mut splitter = Splitter::new(1 << 20);
    let mut events = Vec::new();
    for piece in pieces {
        splitter.push(Bytes::copy_from_slice(piece));
        while let Some(event) = splitter.next().unwrap() {
            events.push((text(&event.raw), event.data.as_ref().map(text), event.name.as_ref().map(text)));
        }
    }
    let end = splitter.finish().map(|end| match end {
        End::Whole(event) => (true, text(&event.raw), event.data.as_ref().map(text)),
        End::Cut(event) => (false, text(&event.raw), event.data.as_ref().map(text)),
    });
    (events, end)
}

fn check(input: &str, data: &[Option<&str>], end: Option<(bool, &str)>) {
    let whole = run([input.as_bytes()]);
    assert_eq!(whole.0.iter().map(|(_, data, _)| data.as_deref()).collect::<Vec<_>>(), data, "{input:?}");
    assert_eq!(whole.1.as_ref().map(|(whole, raw, _)| (*whole, raw.as_str())), end, "{input:?}");
    let raw: String =
        whole.0.iter().map(|(raw, ..)| raw.as_str()).chain(whole.1.iter().map(|(_, raw, _)| raw.as_str())).collect();
    assert_eq!(raw, input);
    for at in 0..=input.len() {
        assert_eq!(run([&input.as_bytes()[..at], &input.as_bytes()[at..]]), whole, "{input:?} cut at {at}");
    }
    assert_eq!(run(input.as_bytes().chunks(1)), whole, "{input:?} byte by byte");
}

#[test]
fn line_ends_comments_and_fields() {
    check("data: a\n\ndata: b\n\n", &[Some("a"), Some("b")], None);
    check("data: a\r\n\r\ndata: b\r\n\r\n", &[Some("a"), Some("b")], None);
    check("data: a\r\rdata: b\r\r", &[Some("a")], Some((true, "data: b\r\r")));
    check("data: a\r\n\ndata: b\n\r\n", &[Some("a"), Some("b")], None);
    check("data: a\n\rdata: b\r\n\r", &[Some("a")], Some((true, "data: b\r\n\r")));
    check("data:a\n\ndata:  a\n\ndata\n\ndata:\n\n", &[Some("a"), Some(" a"), Some(""), Some("")], None);
    check("data: a\ndata: b\ndata\n\n", &[Some("a\nb\n")], None);
    check("data\r\ndata\r\n\r\n", &[Some("\n")], None);
    check(": keep-alive\n\n:\n\n", &[None, None], None);
    check(": ping\ndata: a\n\n", &[Some("a")], None);
    check("\n\n\ndata: a\n\n", &[None, None, None, Some("a")], None);
    check("\u{feff}data: a\n\n\u{feff}data: b\n\n", &[Some("a"), None], None);
    check("id: 7\nretry: 5\ndatax: 1\n data: 2\n\n", &[None], None);
    check("data: a: b\n\ndata: é😀\n\n", &[Some("a: b"), Some("é😀")], None);
    check("", &[], None);
    check("data: [DONE]", &[], Some((false, "data: [DONE]")));
    check("data: a\n\ndata: [DONE]\n", &[Some("a")], Some((false, "data: [DONE]\n")));
    check("data: [DONE]\r", &[], Some((false, "data: [DONE]\r")));
}

#[test]
fn names() {
    let (events, _) = run([b"event: a\nevent: b\ndata: x\n\nevent:c\n\n".as_slice()]);
    assert_eq!(events[0].1.as_deref(), Some("x"));
    assert_eq!(events[0].2.as_deref(), Some("b"));
    assert_eq!((events[1].1.as_deref(), events[1].2.as_deref()), (None, Some("c")));
}

#[test]
fn the_end_is_read_as_far_as_it_goes() {
    let (_, end) = run([b"data: [DO".as_slice(), b"NE]"]);
    assert_eq!(end, Some((false, "data: [DONE]".into(), Some("[DONE]".into()))));
}

#[test]
fn an_event_is_there_as_soon_as_its_bytes_are() {
    for (input, waits) in
        [("data: a\n\n", false), ("data: a\r\n\r\n", false), ("data: a\r\n\n", false), ("data: a\r\r", true)]
    {
        let mut splitter = Splitter::new(100);
        splitter.push(Bytes::from_static(input.as_bytes()));
        assert_eq!(splitter.next().unwrap().is_none(), waits, "{input:?}");
    }
}

#[test]
fn an_event_in_one_chunk_is_a_slice_of_it() {
    let chunk = Bytes::from_static(b"data: a\n\nevent: e\ndata: b\n\n");
    let mut splitter = Splitter::new(100);
    splitter.push(chunk.clone());
    let first = splitter.next().unwrap().unwrap();
    let second = splitter.next().unwrap().unwrap();
    assert_eq!(first.raw.as_ptr(), chunk.as_ptr());
    assert_eq!(second.raw.as_ptr(), chunk[9..].as_ptr());
    assert_eq!(second.data.unwrap().as_ptr(), chunk[24..].as_ptr());
    assert_eq!(splitter.next(), Ok(None));
    assert_eq!(splitter.finish(), None);
}

#[test]
fn chunks_may_be_pushed_before_events_are_taken() {
    let mut splitter = Splitter::new(100);
    splitter.push(Bytes::from_static(b"data: a\n\nda"));
    splitter.push(Bytes::from_static(b"ta: b\n\n"));
    assert_eq!(splitter.next().unwrap().unwrap().data.unwrap(), "a");
    assert_eq!(splitter.next().unwrap().unwrap().data.unwrap(), "b");
}

#[test]
fn too_long_wherever_it_is_cut() {
    let ok = b"data: 1234\n\n".as_slice();
    let long = b"data: 12345\n\n".as_slice();
    let open = b"data: 1234567".as_slice();
    for at in 0..=ok.len() {
        for (input, fits) in [(ok, true), (long, false), (open, false)] {
            let mut splitter = Splitter::new(12);
            let (mut events, mut failed) = (0, false);
            for piece in [&input[..at], &input[at..]] {
                splitter.push(Bytes::copy_from_slice(piece));
                loop {
                    match splitter.next() {
                        Ok(Some(_)) => events += 1,
                        Ok(None) => break,
                        Err(TooLong { event_bytes_max }) => {
                            assert_eq!(event_bytes_max, 12);
                            failed = true;
                            break;
                        }
                    }
                }
            }
            assert_eq!((events, failed), (usize::from(fits), !fits), "{input:?} cut at {at}");
            assert_eq!(splitter.next().is_err(), failed, "once failed, always failed");
        }
    }
}

#[test]
fn what_no_engine_writes_is_told_apart() {
    let check = |input: &[u8], well_formed: bool| {
        let mut splitter = Splitter::new(1 << 10);
        splitter.push(Bytes::copy_from_slice(input));
        let event = splitter.next().unwrap().unwrap();
        assert_eq!(event.well_formed, well_formed, "{}", String::from_utf8_lossy(input));
    };
    for good in
        ["data: x\n\n", ": keep-alive\n\n", "id: 1\nretry: 5\nevent: e\ndata: x\n\n", "\u{feff}data: x\n\n", "\n"]
    {
        check(good.as_bytes(), true);
    }
    for bad in [&b"data: \xff\n\n"[..], b"HTTP/1.1 200 OK\n\n", b"no event\ndata: x\n\n", b"\x80\n\n"] {
        check(bad, false);
    }
}

proptest! {
    #[test]
    fn the_same_events_however_it_arrives(
        input in prop::collection::vec(prop_oneof![
            Just(b"\n".to_vec()), Just(b"\r".to_vec()), Just(b"\r\n".to_vec()), Just(b"data: x".to_vec()),
            Just(b"event: e".to_vec()), Just(b":".to_vec()), Just("\u{feff}".as_bytes().to_vec()),
            prop::collection::vec(any::<u8>(), 0..4),
        ], 0..24).prop_map(|parts| parts.concat()),
        cuts in prop::collection::vec(0..200_usize, 0..6),
    ) {
        let whole = run([input.as_slice()]);
        let mut cuts: Vec<usize> = cuts.into_iter().map(|at| at.min(input.len())).collect();
        cuts.sort_unstable();
        cuts.push(input.len());
        let mut from = 0;
        let pieces: Vec<&[u8]> = cuts.iter().map(|at| &input[std::mem::replace(&mut from, *at)..*at]).collect();
        prop_assert_eq!(run(pieces), whole.clone());
        prop_assert_eq!(run(input.chunks(1)), whole);

        let mut splitter = Splitter::new(1 << 20);
        splitter.push(Bytes::copy_from_slice(&input));
        let mut joined = Vec::new();
        while let Some(event) = splitter.next().unwrap() {
            joined.extend_from_slice(&event.raw);
        }
        if let Some(End::Whole(event) | End::Cut(event)) = splitter.finish() {
            joined.extend_from_slice(&event.raw);
        }
        prop_assert_eq!(joined, input);
    }
}
