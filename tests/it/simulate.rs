//! `forebay simulate` as a user runs it: what it writes, that it writes the same again, and that an outsider who has only
//! the trace and the event logs computes every figure of the report.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use serde_json::Value;

use crate::support::process::run;

const TRACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/traces/synthetic.jsonl.gz");
const POLICIES: [&str; 9] = [
    "forebay",
    "round-robin",
    "least-requests",
    "power-of-two",
    "least-tokens",
    "bounded-hash",
    "radix-threshold",
    "weighted-223",
    "linear-cost",
];

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().expect("a directory")
}

fn simulate(here: &Path, arguments: &[&str]) -> String {
    let arguments: Vec<&str> = ["simulate", "--trace", TRACE].iter().chain(arguments).copied().collect();
    let (code, out, err) = run(&arguments, here, &[]);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    out
}

fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(directory).expect("a directory").map(|entry| entry.expect("an entry"));
    entries.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
}

#[test]
fn equal_runs_write_equal_bytes() {
    let here = directory();
    let flags = ["--load", "0.3,1.1", "--workers", "3", "--jitter-ms", "500", "--seed", "1", "--seed", "2", "--events"];
    let run = |to| simulate(here.path(), &[&flags[..], &["--report", to]].concat());
    assert_eq!(run("one"), run("two"));
    let (one, two) = (files(&here.path().join("one")), files(&here.path().join("two")));
    // One report, three pictures for each of two rates, and the events of each cell.
    assert_eq!(one.len(), 1 + 2 * 3 + 2 * 2 * POLICIES.len(), "{:?}", one.keys());
    assert!(one.keys().eq(two.keys()));
    for (name, bytes) in &one {
        assert!(two[name] == *bytes, "{name} differs");
    }
    for (name, bytes) in one.iter().filter(|(name, _)| name.ends_with(".svg")) {
        let text = String::from_utf8_lossy(bytes);
        assert!(POLICIES.iter().all(|policy| text.contains(policy)), "{name}");
        assert!(!text.contains("NaN") && !text.contains("inf"), "{name}");
    }
}

#[test]
fn an_outsider_computes_every_figure_of_the_report_again() {
    let here = directory();
    let faults = ["--fault", "crash@5:1:10", "--fault", "slow=3@0:2:20"];
    let flags = ["--load", "0.5", "--workers", "3", "--kv-blocks", "2500", "--slo-ttft-ms", "700", "--events"];
    simulate(here.path(), &[&flags[..], &faults, &["--report", "out"]].concat());
    let report: Value = serde_json::from_slice(&files(&here.path().join("out"))["report.json"]).unwrap();
    let cells = report["cells"].as_array().unwrap();
    assert_eq!(cells.iter().map(|cell| cell["policy"].as_str().unwrap()).collect::<Vec<_>>(), POLICIES);
    let tenants: Vec<String> = trace().iter().map(|row| row["tenant"].as_str().unwrap().to_owned()).collect();
    let mut odd = 0;
    for cell in cells {
        let (policy, rate, seed) = (cell["policy"].as_str().unwrap(), &cell["rate"], &cell["seed"]);
        let name = format!("out/events-{policy}-{rate}-{seed}.jsonl");
        let text = std::fs::read_to_string(here.path().join(&name)).unwrap_or_else(|_| panic!("no {name}"));
        let again = figures(&text, &tenants, &report);
        for (figure, value) in &again {
            let told = figure.split('.').fold(cell, |told, part| &told[part]);
            let near = match (told.as_f64(), value) {
                (Some(told), Some(value)) => (told - value).abs() <= 1e-9 * value.abs().max(1.0),
                (None, None) => told.is_null(),
                _ => false,
            };
            assert!(near, "{policy}: {figure} is {told} in the report and {value:?} by the events");
        }
        // Every figure was looked at: what is left is names and settings, and what is measured only when asked for.
        let looked_at = |name: &String| again.keys().any(|figure| figure.split('.').next() == Some(name));
        let rest: Vec<_> = cell.as_object().unwrap().keys().filter(|name| !looked_at(name)).collect();
        assert_eq!(rest, ["policy", "load", "rate", "seed", "decision_us"]);
        assert!(cell["decision_us"].is_null());
        odd += cell["failed"].as_u64().unwrap() + cell["preemptions"].as_u64().unwrap();
    }
    assert!(odd > 0, "the crash and the small memory should show");
}

/// Rows of the trace.
fn trace() -> Vec<Value> {
    let mut text = String::new();
    let file = std::fs::File::open(TRACE).expect("the trace");
    flate2::read::GzDecoder::new(file).read_to_string(&mut text).expect("gzip");
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// What the events say of one request.
#[derive(Default, Clone)]
struct Course {
    arrived: f64,
    first: Option<f64>,
    finished: Option<(f64, f64)>,
}

/// The figures of a cell by its events, under their names in the report.
fn figures(events: &str, tenants: &[String], report: &Value) -> BTreeMap<String, Option<f64>> {
    let mut courses = vec![Course::default(); tenants.len()];
    let mut counts: BTreeMap<&str, f64> = BTreeMap::new();
    let mut done = vec![0.0; usize::try_from(report["workers"].as_u64().unwrap()).unwrap()];
    let (mut cached, mut prompts, mut last) = (0.0, 0.0, 0.0);
    for line in events.lines() {
        let event: Value = serde_json::from_str(line).unwrap();
        let number = |name: &str| event[name].as_f64().unwrap_or_else(|| panic!("no {name} in {line}"));
        let at = number("t_ms");
        assert!(at >= last, "{line} is out of order");
        last = at;
        let course = &mut courses[number("request") as usize];
        match event["event"].as_str().unwrap() {
            "arrived" => course.arrived = at,
            "placed" | "sent" => assert!(number("worker") < done.len() as f64),
            "first_token" => {
                assert_eq!(course.first.replace(at), None, "{line}");
                cached += number("cached_tokens");
                prompts += number("in_tokens");
            }
            "finished" => {
                assert!(course.finished.replace((at, number("out_tokens"))).is_none(), "{line}");
                done[number("worker") as usize] += number("in_tokens") - number("cached_tokens") + number("out_tokens");
                *counts.entry("completed").or_default() += 1.0;
            }
            "preempted" => *counts.entry("preemptions").or_default() += 1.0,
            "shed" => *counts.entry("shed").or_default() += 1.0,
            "timed_out" => *counts.entry("timed_out").or_default() += 1.0,
            "refused" => *counts.entry("refused").or_default() += 1.0,
            "failed" => *counts.entry("failed").or_default() += 1.0,
            other => panic!("unknown event {other}"),
        }
    }
    let slo = report["slo_ttft_ms"].as_f64().unwrap();
    let ttft = |course: &Course| Some(course.first? - course.arrived);
    let good = |course: &Course| ttft(course).is_some_and(|ttft| ttft <= slo);
    let share_of = |tenant: &str| {
        let of = || courses.iter().zip(tenants).filter(|(_, name)| *name == tenant).map(|(course, _)| course);
        of().filter(|course| good(course)).count() as f64 / of().count() as f64
    };
    let mut names = tenants.to_vec();
    names.sort();
    names.dedup();
    let shares: Vec<f64> = names.iter().map(|tenant| share_of(tenant)).collect();
    let sum: f64 = shares.iter().sum();
    let jain = sum * sum / (shares.len() as f64 * shares.iter().map(|share| share * share).sum::<f64>());
    let total: f64 = done.iter().sum();
    let most = done.iter().copied().fold(0.0, f64::max);
    let well = courses.iter().filter(|course| course.finished.is_some() && good(course)).count() as f64;
    let all = courses.len() as f64;

    let mut figures = BTreeMap::from([
        ("requests".to_owned(), Some(all)),
        ("within_slo".to_owned(), Some(courses.iter().filter(|course| good(course)).count() as f64 / all)),
        ("goodput_rps".to_owned(), Some(well / (last / 1e3))),
        ("hit_ratio_tokens".to_owned(), Some(cached / prompts)),
        ("load_max_over_mean".to_owned(), Some(most / (total / done.len() as f64))),
        ("jain_tenants".to_owned(), Some(jain)),
        ("virtual_seconds".to_owned(), Some(last / 1e3)),
    ]);
    for name in ["completed", "shed", "timed_out", "refused", "failed", "preemptions"] {
        figures.insert(name.to_owned(), Some(counts.get(name).copied().unwrap_or(0.0)));
    }
    let tpot = |course: &Course| {
        let (at, tokens) = course.finished?;
        (tokens >= 2.0).then_some((at - course.first?) / (tokens - 1.0))
    };
    let e2e = |course: &Course| Some(course.finished?.0 - course.arrived);
    spread(&mut figures, "ttft_ms", courses.iter().filter_map(ttft).collect());
    spread(&mut figures, "tpot_ms", courses.iter().filter_map(tpot).collect());
    spread(&mut figures, "e2e_ms", courses.iter().filter_map(e2e).collect());
    figures
}

fn spread(figures: &mut BTreeMap<String, Option<f64>>, name: &str, mut values: Vec<f64>) {
    values.sort_by(f64::total_cmp);
    let rank = |share: f64| values[((share * values.len() as f64).ceil() as usize).max(1) - 1];
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    for (part, value) in [("mean", mean), ("p50", rank(0.5)), ("p90", rank(0.9)), ("p99", rank(0.99))] {
        figures.insert(format!("{name}.{part}"), Some(value));
    }
}

#[test]
fn the_table_and_json_say_the_same_and_decisions_are_timed_on_demand() {
    let here = directory();
    let flags = ["--policy", "forebay", "--policy", "round-robin", "--workers", "2", "--rate", "4"];
    let table = simulate(here.path(), &flags);
    assert!(POLICIES[..2].iter().all(|policy| table.lines().any(|line| line.starts_with(policy))), "{table}");
    assert!(!table.contains("least-requests"), "{table}");
    let json: Value = serde_json::from_str(&simulate(here.path(), &[&flags[..], &["--json"]].concat())).unwrap();
    assert_eq!(json["cells"].as_array().unwrap().len(), 2);
    assert_eq!(json["cells"][0]["completed"], json["cells"][0]["requests"]);
    let timed = simulate(here.path(), &[&flags[..], &["--json", "--time-decisions"]].concat());
    let timed: Value = serde_json::from_str(&timed).unwrap();
    assert!(timed["cells"][0]["decision_us"]["p99"].as_f64().unwrap() > 0.0);
    assert!(timed["cells"][1]["decision_us"].is_null(), "rivals are not timed");
    assert!(std::fs::read_dir(here.path()).unwrap().next().is_none(), "nothing was to be written");
}

#[test]
fn a_trace_that_cannot_be_used_is_refused_with_its_line() {
    let here = directory();
    let row = |t_ms: u32, rest: &str| format!("{{\"t_ms\":{t_ms},\"in_tokens\":20,\"out_tokens\":1{rest}}}\n");
    for (text, says) in [
        (String::new(), "no rows"),
        (row(0, "") + "{}\n", "trace.jsonl:2: not a row"),
        (row(5, "") + &row(4, ""), "trace.jsonl:2: t_ms is less"),
        (row(0, ",\"hash_ids\":[1,2,3,4,5,6,7]"), "no block size"),
        (row(0, ",\"class\":\"royal\""), "trace.jsonl:1: not a row"),
        ("\u{1f}".repeat(40), "trace.jsonl:1: not a row"),
    ] {
        std::fs::write(here.path().join("trace.jsonl"), &text).unwrap();
        let (code, out, err) = run(&["simulate", "--trace", "trace.jsonl"], here.path(), &[]);
        assert_eq!((code, out.as_str()), (1, ""), "{text}: {err}");
        assert!(err.contains(says), "{text}: {err}");
    }
    std::fs::write(here.path().join("trace.jsonl"), row(0, "")).unwrap();
    for (flags, says) in [
        (&["--load", "0.5"][..], "all at once"),
        (&["--policy", "best"], "linear-cost"),
        (&["--fault", "melt@1:0"], "crash@60:0:30"),
        (&["--fault", "crash@1:8"], "there is no worker 8"),
        (&["--rate", "0"], "above 0"),
        (&["--rate", "1", "--load", "1"], "cannot be used with"),
        (&["--events"], "--report"),
    ] {
        let arguments = [&["simulate", "--trace", "trace.jsonl"], flags].concat();
        let (code, out, err) = run(&arguments, here.path(), &[]);
        assert_eq!((code, out.as_str()), (2, ""), "{flags:?}: {err}");
        assert!(err.contains(says), "{flags:?}: {err}");
    }
    let (code, _, err) = run(&["simulate", "--trace", "trace.jsonl"], here.path(), &[]);
    assert_eq!((code, err.as_str()), (0, ""), "one plain row without ids is a trace");
}

#[test]
fn a_run_in_which_nothing_was_answered_has_failed() {
    let here = directory();
    std::fs::write(here.path().join("trace.jsonl"), "{\"t_ms\":0,\"in_tokens\":2000,\"out_tokens\":5}\n").unwrap();
    let (code, out, err) = run(&["simulate", "--trace", "trace.jsonl", "--kv-blocks", "10"], here.path(), &[]);
    assert_eq!(code, 1, "{out}{err}");
    assert!(err.contains("no request was answered: of 1, 1 fit no engine"), "{err}");
    assert!(out.contains("forebay"), "what happened is shown all the same: {out}");
}
