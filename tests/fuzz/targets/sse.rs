#![no_main]

use bytes::Bytes;
use forebay_proto::sse::{End, Event, Splitter};
use libfuzzer_sys::fuzz_target;

const MAX: usize = 64;

/// None if an event is too long.
fn run(pieces: &[&[u8]]) -> Option<(Vec<Event>, Option<End>)> {
    let mut splitter = Splitter::new(MAX);
    let mut events = Vec::new();
    for piece in pieces {
        splitter.push(Bytes::copy_from_slice(piece));
        while let Some(event) = splitter.next().ok()? {
            assert!(event.raw.len() <= MAX);
            events.push(event);
        }
    }
    Some((events, splitter.finish()))
}

fuzz_target!(|input: &[u8]| {
    // The first three bytes say where to cut.
    let Some((cuts, stream)) = input.split_first_chunk::<3>() else { return };
    let whole = run(&[stream]);
    let mut pieces = Vec::new();
    let mut rest = stream;
    for cut in cuts {
        let (piece, after) = rest.split_at(usize::from(*cut).min(rest.len()));
        pieces.push(piece);
        rest = after;
    }
    pieces.push(rest);
    assert_eq!(run(&pieces), whole);
    assert_eq!(run(&stream.chunks(1).collect::<Vec<_>>()), whole);
    if let Some((events, end)) = whole {
        let mut joined: Vec<u8> = events.iter().flat_map(|event| event.raw.to_vec()).collect();
        if let Some(End::Whole(event) | End::Cut(event)) = end {
            joined.extend_from_slice(&event.raw);
        }
        assert_eq!(joined, stream);
    }
});
