//! The whole room from the outside: text in, exact lines or a value out.

use super::*;

mod discover;
mod environment;
mod file;
mod model;
mod node;
mod properties;
mod server;
mod worker;

fn reader<const N: usize>(variables: [(&str, &str); N]) -> Reader {
    Reader { environment: variables.into_iter().collect(), flags: Vec::new(), engines: vec!["vllm", "openai"] }
}

/// A model that is well, for tests of what stands around it.
const MODEL: &str = "[[model]]\nname = 'm'\n[[model.worker]]\nurl = 'http://w:1'\n";

fn check(text: &str, expect: &[&str]) {
    check_with(&reader([]), text, expect);
}

fn check_with(reader: &Reader, text: &str, expect: &[&str]) {
    let lines = match reader.text("f.toml", text) {
        Ok(_) => String::new(),
        Err(mistakes) => mistakes.to_string(),
    };
    assert_eq!(lines, expect.join("\n"), "\nin\n{text}");
}

/// As `check`, for `[server]` keys with a good model below.
fn check_server(keys: &str, expect: &[&str]) {
    check(&format!("[server]\n{keys}\n{MODEL}"), expect);
}

/// As `check`, for keys of a model whose name is line 2, its first worker following.
fn check_model(keys: &str, expect: &[&str]) {
    check(&format!("[[model]]\nname = 'm'\n{keys}\n[[model.worker]]\nurl = 'http://w:1'\n"), expect);
}

/// As `check`, for keys of a worker that begin on line 4.
fn check_worker(keys: &str, expect: &[&str]) {
    check(&format!("[[model]]\nname = 'm'\n[[model.worker]]\n{keys}\n"), expect);
}
