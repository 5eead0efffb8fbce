//! Changes to a request body in place: the bytes of a few values are replaced, all others stay as the client wrote
//! them, white space, order and unknown fields included.
//!
//! Places come from [`crate::peek`] and count in the body that was peeked at; [`Edits::apply`] takes that same body.

use bytes::Bytes;

use crate::peek::{Model, Place, Span, Streaming, UsageAt};

/// What to change, kept in the order of the body and without overlap.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Edits(Vec<(Span, Bytes)>);

impl Edits {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Puts `bytes` in place of `span`; an empty span inserts.
    ///
    /// Bytes have one new form only: an edit replaces earlier edits that it overlaps. Insertions at one place, and
    /// before a replacement that starts there, keep the order in which they were made.
    pub fn replace(&mut self, span: Span, bytes: impl Into<Bytes>) {
        self.0.retain(|(other, _)| !overlap(other, &span));
        let at = self.0.partition_point(|(other, _)| (other.start, other.end) <= (span.start, span.end));
        self.0.insert(at, (span, bytes.into()));
    }

    /// Asks the engine for `name` instead of what the client called the model.
    pub fn model(&mut self, model: &Model, name: &str) {
        if model.name != name {
            self.member("model", &model.at, name);
        }
    }

    /// Makes a stream carry its usage, however the client wrote `stream_options`; its other options stay. An answer
    /// that is not streamed carries usage anyway.
    pub fn usage(&mut self, streaming: &Streaming) {
        if !streaming.stream || streaming.include_usage {
            return;
        }
        match streaming.usage_at.clone() {
            UsageAt::Value(span) => self.replace(span, "true"),
            UsageAt::NullOptions(span) => self.replace(span, r#"{"include_usage":true}"#),
            UsageAt::Options { open, empty: true } => self.replace(open..open, r#""include_usage":true"#),
            UsageAt::Options { open, empty: false } => self.replace(open..open, r#""include_usage":true,"#),
            UsageAt::Body { open } => self.replace(open..open, r#""stream_options":{"include_usage":true},"#),
        }
    }

    /// Sets `cache_salt`, which isolates the engine's prefix cache. `at` is the `cache_salt_at` of the peek.
    pub fn cache_salt(&mut self, at: &Place, salt: &str) {
        self.member("cache_salt", at, salt);
    }

    fn member(&mut self, key: &str, at: &Place, text: &str) {
        let value = quoted(text);
        match at {
            Place::Value(span) => self.replace(span.clone(), value),
            // A body that was peeked at has other members, hence the comma.
            Place::Free(open) => self.replace(*open..*open, format!(r#""{key}":{value},"#)),
        }
    }

    /// The body with all edits, or the very same `Bytes` if there are none.
    #[must_use]
    pub fn apply(&self, body: &Bytes) -> Bytes {
        if self.0.is_empty() {
            return body.clone();
        }
        let added: usize = self.0.iter().map(|(_, bytes)| bytes.len()).sum();
        let mut out = Vec::with_capacity(body.len() + added);
        let mut done = 0;
        for (span, bytes) in &self.0 {
            out.extend_from_slice(body.get(done..span.start).unwrap_or_default());
            out.extend_from_slice(bytes);
            done = span.end;
        }
        out.extend_from_slice(body.get(done..).unwrap_or_default());
        out.into()
    }
}

/// An insertion overlaps only what it lies strictly within.
fn overlap(a: &Span, b: &Span) -> bool {
    a.start < b.end && b.start < a.end
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests;
