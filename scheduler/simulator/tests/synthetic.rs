//! The synthetic trace that ships is what its generator makes.

use std::io::Read;

#[path = "../examples/synthetic_trace.rs"]
mod generator;

#[test]
fn the_shipped_trace_is_the_generators() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/traces/synthetic.jsonl.gz");
    let mut shipped = String::new();
    let file = std::fs::File::open(path).expect("the shipped trace");
    flate2::read::GzDecoder::new(file).read_to_string(&mut shipped).expect("gzip");
    let made = generator::generate(generator::SEED);
    assert_eq!(made.lines().count(), shipped.lines().count());
    for (number, (made, shipped)) in made.lines().zip(shipped.lines()).enumerate() {
        assert_eq!(made, shipped, "row {number}");
    }
    assert_ne!(made, generator::generate(generator::SEED + 1));
    let size = std::fs::metadata(path).expect("the shipped trace").len();
    assert!(size < 150_000, "{size} bytes");
}
