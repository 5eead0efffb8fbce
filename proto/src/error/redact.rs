//! Takes hosts, addresses, file paths and keys out of an engine's message.
//!
//! Works word by word on what such things look like: rather one harmless word too many than a host. Model names
//! (`org/name`) and API paths (`/v1/…`) stay.

use std::net::{IpAddr, SocketAddr};

/// Looked at of a message; the rest is cut.
const BYTES_MAX: usize = 8192;

/// `message` without what must not leave, in at most `chars_max` characters and an ellipsis.
pub(super) fn redact(message: &str, chars_max: usize) -> String {
    let message = message.get(..message.floor_char_boundary(BYTES_MAX)).unwrap_or_default();
    let mut out = Redacted { text: String::with_capacity(message.len()), key_follows: false };
    for piece in message.split_inclusive(ends_url) {
        let (before, url) = piece.split_at(url_start(piece).unwrap_or(piece.len()));
        out.words(before);
        if !url.is_empty() {
            out.text.push_str("[url]");
            out.text.push_str(url.get(url.trim_end_matches(ends_url).len()..).unwrap_or_default());
        }
    }
    let text = out.text;
    match text.char_indices().nth(chars_max) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text,
    }
}

struct Redacted {
    text: String,
    /// The last word announced a key.
    key_follows: bool,
}

impl Redacted {
    fn words(&mut self, text: &str) {
        for piece in text.split_inclusive(ends_word) {
            let word = piece.trim_end_matches(ends_word).trim_end_matches(['.', ':', '!', '?']);
            match stand_in(word, self.key_follows) {
                Some(stand_in) => {
                    self.text.push_str(stand_in);
                    self.text.push_str(piece.get(word.len()..).unwrap_or_default());
                }
                None => self.text.push_str(piece),
            }
            // An empty word is a second border, as in `"api_key": "…"`.
            if !word.is_empty() {
                self.key_follows = announces_key(word);
            }
        }
    }
}

/// Where a URL's scheme begins.
fn url_start(text: &str) -> Option<usize> {
    let before = text.get(..text.find("://")?)?;
    Some(before.trim_end_matches(|c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.')).len())
}

fn ends_url(c: char) -> bool {
    c.is_whitespace() || matches!(c, '"' | '\'' | '`' | '<' | '>')
}

fn ends_word(c: char) -> bool {
    ends_url(c) || matches!(c, '(' | ')' | '[' | ']' | '{' | '}' | ',' | ';' | '=' | '|')
}

fn announces_key(word: &str) -> bool {
    ["bearer", "api_key", "api-key", "apikey", "password"].iter().any(|name| word.eq_ignore_ascii_case(name))
}

/// What goes in place of `word`, if it must not leave.
fn stand_in(word: &str, key_follows: bool) -> Option<&'static str> {
    if key_follows && !word.is_empty() || is_key(word) {
        return Some("[key]");
    }
    if is_path(word) {
        return Some("[path]");
    }
    is_host(word).then_some("[host]")
}

fn is_key(word: &str) -> bool {
    const PREFIXES: [&str; 5] = ["sk-", "sk_", "hf_", "nvapi-", "xai-"];
    word.len() >= 8 && PREFIXES.iter().any(|prefix| word.starts_with(prefix))
}

fn is_path(word: &str) -> bool {
    let windows = matches!(word.as_bytes(), [drive, b':', b'\\', ..] if drive.is_ascii_alphabetic());
    let Some(inner) = word.strip_prefix("~/").or_else(|| word.strip_prefix('/')) else { return windows };
    let first = inner.split('/').next().unwrap_or_default();
    let is_api = matches!(first, "v1" | "v2" | "v1beta" | "inference") || !inner.contains(['/', '.']);
    !is_api || word.starts_with('~')
}

/// An IP address, with or without port, or `name:port`.
fn is_host(word: &str) -> bool {
    if word.parse::<IpAddr>().is_ok() || word.parse::<SocketAddr>().is_ok() {
        return true;
    }
    let (host, port) = match word.rsplit_once(':') {
        Some((host, port)) => (host.rsplit('@').next().unwrap_or(host), port.split('/').next().unwrap_or(port)),
        None => (word, ""),
    };
    let is_name = host.bytes().any(|b| b.is_ascii_alphabetic())
        && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
    // `column:64` is no host, `gpu-a:80` is.
    let digits_min = if host.bytes().any(|b| !b.is_ascii_alphabetic()) { 2 } else { 4 };
    let is_port = (digits_min..=5).contains(&port.len()) && port.parse::<u16>().is_ok();
    let inner = host.ends_with(".local") || host.ends_with(".internal") || host.ends_with(".svc");
    (is_name && is_port) || host.eq_ignore_ascii_case("localhost") || (inner && is_name)
}
