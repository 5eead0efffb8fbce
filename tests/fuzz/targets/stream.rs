#![no_main]

use forebay_proto::stream::{Chunk, Completeness, Usage, read};
use forebay_proto::tap::Tap;
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fn tapped(pieces: &[&[u8]]) -> Option<Usage> {
    let mut tap = Tap::new();
    pieces.iter().for_each(|piece| tap.feed(piece));
    tap.finish()
}

fuzz_target!(|data: &[u8]| {
    let cut = usize::from(data.first().copied().unwrap_or(0)).min(data.len());
    let whole = tapped(&[data]);
    assert_eq!(tapped(&[&data[..cut], &data[cut..]]), whole);
    assert_eq!(tapped(&data.chunks(1).collect::<Vec<_>>()), whole);

    let Chunk::Delta(delta) = read(data) else { return };
    Completeness::new(3).observe(&delta);
    if let Some(member) = delta.usage_member.clone() {
        let rest = [&data[..member.start], &data[member.end..]].concat();
        assert!(matches!(read(&rest), Chunk::Delta(_)), "what is left is no chunk");
    }
    let Ok(value) = serde_json::from_slice::<Value>(data) else { return };
    assert_eq!(value["choices"].as_array().map_or(0, Vec::len), delta.choices.len());
    assert_eq!(value["usage"].is_object(), delta.usage.is_some());
});
