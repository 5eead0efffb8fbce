#![no_main]

use forebay_proto::metrics_text::samples;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    for sample in samples(text) {
        assert!(!sample.name.is_empty());
        for (name, value) in sample.labels.iter() {
            assert!(!name.is_empty() && value.len() <= text.len());
            assert!(sample.labels.get(name).is_some());
        }
    }
});
