use proptest::prelude::*;

use super::*;

type Owned = (String, Vec<(String, String)>, f64);

fn one(line: &str) -> Option<Owned> {
    let mut all = samples(line.as_bytes());
    let sample = all.next()?;
    assert!(all.next().is_none(), "{line}");
    let labels = sample.labels.iter().map(|(name, value)| (name.to_owned(), value.into_owned())).collect();
    Some((sample.name.to_owned(), labels, sample.value))
}

#[test]
fn lines() {
    type Expect<'a> = (&'a str, &'a [(&'a str, &'a str)], f64);
    let cases: [(&str, Expect<'_>); 13] = [
        ("up 1", ("up", &[], 1.0)),
        ("  up\t 1.5e3  \r", ("up", &[], 1500.0)),
        (
            "vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"m\"} 0.25",
            ("vllm:kv_cache_usage_perc", &[("engine", "0"), ("model_name", "m")], 0.25),
        ),
        ("x{} 1", ("x", &[], 1.0)),
        ("x{a=\"1\",} 1", ("x", &[("a", "1")], 1.0)),
        ("x { a = \"1\" , b=\"2\" } 1", ("x", &[("a", "1"), ("b", "2")], 1.0)),
        ("x{a=\"1\"}1", ("x", &[("a", "1")], 1.0)),
        ("x{a=\"}\",b=\"a,b=\\\"c\\\"\\\\\\n\\t\"} 1", ("x", &[("a", "}"), ("b", "a,b=\"c\"\\\n\\t")], 1.0)),
        ("x_bucket{le=\"+Inf\"} +Inf", ("x_bucket", &[("le", "+Inf")], f64::INFINITY)),
        ("x -Inf", ("x", &[], f64::NEG_INFINITY)),
        ("x 3 1700000000000", ("x", &[], 3.0)),
        ("x_total{a=\"é\"} 3 # {trace_id=\"abc\"} 0.67 1.5", ("x_total", &[("a", "é")], 3.0)),
        ("_x:1 -0.5", ("_x:1", &[], -0.5)),
    ];
    for (line, (name, labels, value)) in cases {
        let labels = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        assert_eq!(one(line), Some((name.to_owned(), labels, value)), "{line}");
    }
    assert!(one("x NaN").unwrap().2.is_nan());
}

#[test]
fn what_is_no_sample_is_passed_over() {
    for line in [
        "",
        " ",
        "# HELP x text",
        "# TYPE x gauge",
        "# EOF",
        "x",
        "x{",
        "x{a",
        "x{a=",
        "x{a=\"",
        "x{a=\"1",
        "x{a=\"1\"",
        "x{a=\"1\\\"} 1",
        "x{a=\"1\"}",
        "x{a=\"1\"} ",
        "x{a=1} 1",
        "x one",
        "1x 1",
        "{a=\"1\"} 1",
        "x{1a=\"1\"} 1",
        "x-y 1",
        "x 1,5",
        "x{a=\"1\"x} 1",
        "<html>",
    ] {
        assert_eq!(one(line), None, "{line}");
    }
    let text = b"bad\xff 1\n# c\nok 2\n{\nok{a=\"b\"} 3".as_slice();
    assert_eq!(samples(text).map(|sample| (sample.name, sample.value)).collect::<Vec<_>>(), [("ok", 2.0), ("ok", 3.0)]);
}

#[test]
fn labels_by_name() {
    let sample = samples(b"x{a=\"1\",b=\"\\\"2\\\"\"} 1").next().unwrap();
    assert!(matches!(sample.labels.get("a"), Some(Cow::Borrowed("1"))));
    assert_eq!(sample.labels.get("b").unwrap(), "\"2\"");
    assert_eq!(sample.labels.get("c"), None);
}

proptest! {
    #[test]
    fn no_bytes_panic(text in prop::collection::vec(any::<u8>(), 0..300)) {
        for sample in samples(&text) {
            sample.labels.iter().count();
        }
    }

    #[test]
    fn nearly_samples_do_not_panic(text in "[a{}=\",\\\\ 1#\n\r\t\u{e9}.:_-]{0,60}") {
        for sample in samples(text.as_bytes()) {
            sample.labels.iter().count();
        }
    }

    #[test]
    fn what_is_written_is_read(
        name in "[a-zA-Z_:][a-zA-Z0-9_:]{0,10}",
        labels in prop::collection::vec(("[a-zA-Z_][a-zA-Z0-9_]{0,6}", "\\PC{0,8}"), 0..4),
        value in any::<f64>(),
    ) {
        let written: Vec<String> = labels
            .iter()
            .map(|(name, value)| format!("{name}=\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")))
            .collect();
        let (got_name, got_labels, got) = one(&format!("{name}{{{}}} {value}", written.join(","))).unwrap();
        prop_assert_eq!((got_name, got_labels), (name, labels));
        prop_assert!(got == value || (got.is_nan() && value.is_nan()));
    }
}
