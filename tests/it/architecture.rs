//! The rules of the house: which crate may use which, which room may import which, and what must not be in the graph.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Crate -> crates of ours that it may depend on (`src/ARCHITECTURE.md`, "Crates and arrows").
const ARROWS: [(&str, &[&str]); 7] = [
    (
        "forebay",
        &[
            "forebay-backends",
            "forebay-simulated-engine",
            "forebay-simulator",
            "forebay-scheduler",
            "forebay-tokens",
            "forebay-proto",
        ],
    ),
    ("forebay-simulated-engine", &["forebay-simulator", "forebay-tokens", "forebay-proto"]),
    ("forebay-simulator", &["forebay-scheduler"]),
    ("forebay-backends", &["forebay-scheduler", "forebay-tokens", "forebay-proto"]),
    ("forebay-scheduler", &[]),
    ("forebay-tokens", &[]),
    ("forebay-proto", &[]),
];

/// Floors from the ground up; on floor 2 the order within is the order of the request.
const FLOORS: [&[&str]; 6] = [
    &["ids"],
    &["store", "prices", "telemetry", "config"],
    &["access", "guard", "routing", "cache", "prepare", "limits", "dispatch", "ledger"],
    &["pipeline"],
    &["server", "api", "admin", "jobs"],
    &["cli", "app"],
];
const ORDERED_FLOOR: usize = 2;

/// Crates that must not come in, with the reason.
const UNWANTED: [(&str, &str); 5] = [
    ("openssl-sys", "one TLS stack: rustls"),
    ("aws-lc-sys", "one crypto provider: ring"),
    ("native-tls", "one TLS stack: rustls"),
    ("protobuf-src", "no protoc"),
    ("onig_sys", "no C but where a crate cannot do without"),
];
/// Crates of which one version only may be there.
const SINGLE: [&str; 6] = ["hyper", "tower", "rustls", "tokio", "tonic", "prost"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Of this platform: crates of others were not fetched.
fn metadata() -> serde_json::Value {
    let rustc = Command::new("rustc").arg("-vV").output().expect("rustc runs");
    let version = String::from_utf8_lossy(&rustc.stdout);
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).expect("rustc names its host");
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--offline", "--filter-platform", host])
        .args(cfg!(feature = "kubernetes").then_some("--all-features"))
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("cargo's metadata is JSON")
}

#[test]
fn arrows_between_crates_never_turn_back() {
    let metadata = metadata();
    let allowed: BTreeMap<_, _> = ARROWS.into_iter().collect();
    let mut seen = BTreeSet::new();
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        if !name.starts_with("forebay") {
            continue;
        }
        let may = allowed.get(name).unwrap_or_else(|| panic!("crate `{name}` has no row in ARROWS"));
        seen.insert(name.to_owned());
        for dependency in package["dependencies"].as_array().unwrap() {
            let to = dependency["name"].as_str().unwrap();
            let for_tests_only = dependency["kind"].as_str() == Some("dev");
            assert!(
                !to.starts_with("forebay") || for_tests_only || may.contains(&to),
                "`{name}` must not depend on `{to}`"
            );
        }
    }
    assert_eq!(seen.len(), ARROWS.len(), "every crate of ARROWS exists: {seen:?}");
}

#[test]
fn pure_crates_know_no_clock_no_socket_and_no_runtime() {
    let metadata = metadata();
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        let impure: &[&str] = match name {
            "forebay-scheduler" | "forebay-simulator" => {
                &["tokio", "hyper", "parking_lot", "tracing", "rand", "serde", "chrono"]
            }
            "forebay-proto" | "forebay-tokens" => &["tokio", "hyper", "tracing"],
            _ => continue,
        };
        for dependency in package["dependencies"].as_array().unwrap() {
            let to = dependency["name"].as_str().unwrap();
            assert!(
                dependency["kind"].as_str() == Some("dev") || !impure.contains(&to),
                "`{name}` must not use `{to}`"
            );
        }
    }
    for directory in ["scheduler/src", "scheduler/simulator/src"] {
        for (path, text) in sources(&root().join(directory)) {
            for word in
                ["Instant::now", "SystemTime", "std::fs", "std::net", "std::thread", "HashMap::new", "RandomState"]
            {
                assert!(!text.contains(word), "{} uses {word}", path.display());
            }
        }
    }
}

#[test]
fn unwanted_crates_stay_out_and_central_ones_stay_single() {
    let metadata = metadata();
    let mut versions: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for package in metadata["packages"].as_array().unwrap() {
        versions.entry(package["name"].as_str().unwrap()).or_default().insert(package["version"].as_str().unwrap());
    }
    for (name, reason) in UNWANTED {
        assert!(!versions.contains_key(name), "`{name}` is in the graph: {reason}");
    }
    for name in SINGLE {
        assert!(versions.get(name).is_none_or(|found| found.len() == 1), "`{name}`: {:?}", versions.get(name));
    }
}

#[test]
fn rooms_import_only_downward() {
    let place = |room: &str| {
        FLOORS.iter().enumerate().find_map(|(floor, rooms)| Some((floor, rooms.iter().position(|name| *name == room)?)))
    };
    let mut imports = 0;
    for (path, text) in sources(&root().join("src")) {
        let relative = path.strip_prefix(root().join("src")).unwrap();
        let room = relative.components().next().unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs");
        if matches!(room, "lib" | "main") {
            continue;
        }
        let (floor, at) = place(room).unwrap_or_else(|| panic!("room `{room}` has no floor"));
        for other in rooms_named(&text) {
            if other == room {
                continue;
            }
            let (their_floor, their_at) = place(&other).unwrap_or_else(|| panic!("room `{other}` has no floor"));
            let downward = their_floor < floor || (floor == ORDERED_FLOOR && their_floor == floor && their_at < at);
            // `app` builds what `cli` asks for: the one pair on the top floor.
            let top = room == "cli" && other == "app";
            assert!(downward || top, "{}: room `{room}` must not import `{other}`", relative.display());
            imports += 1;
        }
    }
    assert!(imports > 20, "the search for imports has gone blind: {imports}");
}

/// Names right after `crate::`, also inside `use crate::{a, b::c}`.
fn rooms_named(text: &str) -> BTreeSet<String> {
    let ident = |text: &str| text.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect::<String>();
    let mut found = BTreeSet::new();
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        if let Some(list) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut start = true;
            for (index, c) in list.char_indices() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => start = true,
                    c if c.is_whitespace() => {}
                    _ if start && depth == 0 => {
                        found.insert(ident(&list[index..]));
                        start = false;
                    }
                    _ => {}
                }
            }
        } else {
            found.insert(ident(rest));
        }
    }
    found.remove("");
    found
}

#[test]
fn unsafe_is_forbidden_in_every_crate() {
    for (manifest, text) in manifests() {
        assert!(
            text.contains("[lints]\nworkspace = true"),
            "{} does not take the workspace's lints",
            manifest.display()
        );
    }
    let workspace = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
    assert!(workspace.contains("unsafe_code = \"forbid\""));
}

fn manifests() -> Vec<(PathBuf, String)> {
    let places =
        [".", "proto", "proto/tokens", "scheduler", "scheduler/simulator", "backends", "backends/simulated-engine"];
    places
        .iter()
        .map(|place| root().join(place).join("Cargo.toml"))
        .map(|path| (path.clone(), std::fs::read_to_string(&path).unwrap()))
        .collect()
}

fn sources(directory: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            found.push((path.clone(), std::fs::read_to_string(&path).unwrap()));
        }
    }
    found
}
