//! What holds for any text.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use proptest::prelude::*;

use super::{Place, reader};

/// Lines as they stand in config files, so that random texts get past the parser.
fn fragment() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("[server]".to_owned()),
        Just("[[model]]".to_owned()),
        Just("[[model.worker]]".to_owned()),
        Just("[model".to_owned()),
        Just("name = \"é\u{1F600}\"".to_owned()),
        Just("aliases = [\"a\",\n 'b', 3,".to_owned()),
        Just("]".to_owned()),
        Just("\"\"\"".to_owned()),
        Just("url = 'http://w:1'".to_owned()),
        Just("api_key = { env = 'K' }".to_owned()),
        Just("queue_requests_max = 0".to_owned()),
        Just("a.b.c = {x = [{}]}\r".to_owned()),
        "[a-z_]{1,8} ?= ?[0-9a-zA-Z'\"{}\\[\\].:-]{0,8}",
        "\\PC{0,20}",
    ]
}

proptest! {
    /// Whatever the text: no panic, and every mistake points into it.
    #[test]
    fn every_mistake_stands_inside_the_text(lines in prop_oneof![
        prop::collection::vec(fragment(), 0..12).prop_map(|lines| lines.join("\n")),
        any::<String>(),
    ]) {
        let Err(mistakes) = reader([]).text("f.toml", &lines) else { return Ok(()) };
        let rows: Vec<&str> = lines.split('\n').collect();
        for mistake in mistakes.iter() {
            let Place::Text { line, column, .. } = mistake.place else { panic!("{mistake}") };
            let row = rows.get(line - 1).expect("a line of the text");
            prop_assert!((1..=row.chars().count() + 1).contains(&column), "{mistake}");
            prop_assert!(!mistake.to_string().contains('\n'), "{mistake:?}");
        }
    }

    /// Mistakes in keys that do not touch each other are all reported, each at its own place.
    #[test]
    fn mistakes_do_not_hide_each_other(bad in prop::collection::btree_map(0_usize..6, 0_u32..4, 1..6)) {
        const KEYS: [&str; 6] =
            ["queue_requests_max", "queue_seconds_max", "attempts_max", "first_byte_seconds", "idle_seconds", "other"];
        const VALUES: [&str; 4] = ["0", "-7", "'x'", "[]"];
        let mut text = "[[model]]\nname = 'm'\n".to_owned();
        for (key, value) in &bad {
            writeln!(text, "{} = {}", KEYS[*key], VALUES[*value as usize]).unwrap();
        }
        text.push_str("[[model.worker]]\nurl = 'http://w:1'\n");
        let mistakes = reader([]).text("f.toml", &text).unwrap_err();
        let mut places = BTreeMap::new();
        for mistake in mistakes.iter() {
            let Place::Text { line, .. } = mistake.place else { panic!("{mistake}") };
            places.insert(line, mistake.key.clone());
        }
        let keys = bad.keys().map(|key| format!("model[0].{}", KEYS[*key]));
        prop_assert_eq!(places, (3..).zip(keys).collect::<BTreeMap<_, _>>());
    }
}
