#![no_main]

use forebay_proto::kv_events::{Event, read};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|payload: &[u8]| {
    for event in read(payload).unwrap_or_default() {
        if let Event::Stored(stored) = event {
            assert!(stored.plain <= stored.blocks.len() && stored.block_tokens > 0);
            let whole = stored.blocks.len() * stored.block_tokens as usize;
            assert!(stored.tokens.is_empty() || stored.tokens.len() == whole);
            assert!(stored.tokens.len() + stored.blocks.len() <= payload.len());
        }
    }
});
