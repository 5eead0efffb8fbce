//! Every engine's adapter over the whole table, and over the bytes of real engines.

use forebay_backends::engines::{Api, ENGINES, Load, Mark, Totals, by_name};
use proptest::prelude::*;

use crate::support::recorded;

#[test]
fn the_table_is_consistent() {
    for (place, engine) in ENGINES.into_iter().enumerate() {
        let name = engine.name();
        assert_eq!(by_name(name).map(|found| found.name()), Some(name), "found by its own name, which is unique");
        let single = [engine.version_path(), engine.details_path(), engine.kv_sources_path()];
        let paths =
            engine.health_paths().iter().chain(engine.load_paths()).copied().chain(single.into_iter().flatten());
        for path in paths {
            assert!(path.starts_with('/') && path.parse::<http::uri::PathAndQuery>().is_ok(), "{name}: {path}");
        }
        assert!(!engine.health_paths().is_empty(), "{name}");
        assert_eq!(
            matches!(engine.mark(), Mark::Any),
            place + 1 == ENGINES.len(),
            "{name}: only the last takes what it does not know"
        );
        assert_eq!(engine.read_load(b""), None, "{name}");
        assert!(engine.serves(Api::ChatCompletions), "{name}");
    }
    assert!(by_name("VLLM").is_none() && by_name("").is_none());
}

proptest! {
    #[test]
    fn any_text_is_read(text in "([a-z:_]{1,40}(\\{[^\\n]{0,40}\\})? [0-9.eE+-]{1,12}\n){0,8}") {
        for engine in ENGINES {
            let _ = engine.read_load(text.as_bytes());
        }
    }
}

fn load_of(engine: &str, sample: &str) -> Option<Load> {
    let text = recorded(sample)?;
    let load = by_name(engine).expect("a known engine").read_load(text.as_bytes());
    Some(load.unwrap_or_else(|| panic!("{sample} tells a load")))
}

#[test]
fn a_busy_vllm() {
    let Some(load) = load_of("vllm", "vllm/metrics-busy") else { return };
    let expected = Load {
        running: 16,
        waiting: 4,
        kv_usage: Some(0.044_077_134_986_225_9),
        block_tokens: Some(128),
        kv_tokens: Some(46_592),
        sleeping: false,
        totals: Totals {
            prompt_tokens: Some(2391),
            generation_tokens: Some(1000),
            prefix_queries: Some(2387),
            prefix_hits: Some(128),
            preemptions: Some(0),
        },
    };
    assert_eq!(load, expected);
    assert_eq!((load.report().running, load.report().waiting, load.report().kv_usage), (16, 4, expected.kv_usage));
}

#[test]
fn an_idle_vllm() {
    for sample in ["vllm/metrics-before", "vllm/metrics-after", "vllm-embed/metrics"] {
        let Some(load) = load_of("vllm", sample) else { return };
        assert_eq!((load.running, load.waiting, load.kv_usage, load.sleeping), (0, 0, Some(0.0), false), "{sample}");
    }
}

#[test]
fn a_busy_llamacpp() {
    let Some(load) = load_of("llamacpp", "llamacpp/metrics-busy") else { return };
    assert_eq!((load.running, load.waiting, load.kv_usage), (4, 16, None));
    let expected = Totals {
        prompt_tokens: Some(2136 + 2779),
        generation_tokens: Some(4195),
        prefix_queries: Some(2136 + 2779),
        prefix_hits: Some(2779),
        preemptions: None,
    };
    assert_eq!(load.totals, expected);
}

#[test]
fn one_engine_does_not_read_the_other() {
    for (engine, sample) in [("llamacpp", "vllm/metrics-busy"), ("vllm", "llamacpp/metrics-busy")] {
        let Some(text) = recorded(sample) else { return };
        assert_eq!(by_name(engine).expect("a known engine").read_load(text.as_bytes()), None, "{engine}");
    }
}

#[test]
fn a_text_that_is_cut_short_is_never_misread() {
    let Some(text) = recorded("vllm/metrics-busy") else { return };
    let vllm = by_name("vllm").expect("a known engine");
    for end in (0..text.len()).step_by(101) {
        // A cut inside a number would make another number of it; cuts at line ends only lose what follows.
        let whole_lines = text[..end].rfind('\n').map_or(0, |at| at + 1);
        if let Some(load) = vllm.read_load(&text.as_bytes()[..whole_lines]) {
            assert_eq!((load.running, load.waiting), (16, 4));
            assert!(load.kv_tokens.is_none_or(|tokens| tokens == 46_592));
        }
        let _ = vllm.read_load(&text.as_bytes()[..end]);
    }
}
