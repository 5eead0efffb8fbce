#![no_main]

use forebay_proto::zmtp::{Incoming, Splitter, read_greeting};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let whole = split(bytes, bytes.len());
    assert_eq!(split(bytes, 1), whole, "the same, however it arrives");
    if let Some((greeting, _)) = bytes.split_first_chunk() {
        let _ = read_greeting(greeting);
    }
});

fn split(bytes: &[u8], piece: usize) -> (Vec<Incoming>, bool) {
    let mut splitter = Splitter::new(1000);
    let mut found = Vec::new();
    for part in bytes.chunks(piece.max(1)) {
        splitter.buffer().extend_from_slice(part);
        loop {
            match splitter.pop() {
                Ok(Some(incoming)) => {
                    if let Incoming::Command(command) = &incoming {
                        let _ = command.property("Socket-Type");
                    }
                    found.push(incoming);
                }
                Ok(None) => break,
                Err(_) => return (found, false),
            }
        }
    }
    (found, true)
}
