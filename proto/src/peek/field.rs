//! One field of a request, and its reading as the type we need.
//!
//! `null` counts as absent, as OpenAI and vLLM take it for every optional field here.

use std::ops::RangeInclusive;

use super::{Refusal, Span};

/// A value as the client wrote it, or its absence.
#[derive(Debug, Clone, Copy)]
pub(super) struct Field<'a> {
    name: &'static str,
    given: Option<(&'a str, usize)>,
    repeated: bool,
}

impl<'a> Field<'a> {
    pub(super) fn absent(name: &'static str) -> Self {
        Self { name, given: None, repeated: false }
    }

    /// Takes the value `text`, which is a slice of `body`.
    pub(super) fn fill(&mut self, body: &'a str, text: &'a str) {
        self.given = Some((text, text.as_ptr().addr().saturating_sub(body.as_ptr().addr())));
    }

    /// Notes that the key stands more than once.
    pub(super) fn repeat(&mut self) {
        self.repeated = true;
    }

    pub(super) fn is_repeated(&self) -> bool {
        self.repeated
    }

    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    /// Whether the key stands in the body, if only with `null`.
    pub(super) fn is_given(&self) -> bool {
        self.given.is_some()
    }

    /// Where the value stands, `null` included.
    pub(super) fn place(&self) -> Option<Span> {
        self.given.map(|(text, start)| start..start.saturating_add(text.len()))
    }

    /// The value's text, unless absent or `null`.
    pub(super) fn text(&self) -> Option<&'a str> {
        self.given.map(|(text, _)| text).filter(|text| *text != "null")
    }

    /// Where the value stands, unless absent or `null`. Any type will do.
    pub(super) fn span(&self) -> Option<Span> {
        self.text().and_then(|_| self.place())
    }

    pub(super) fn is_string(&self) -> bool {
        self.text().is_some_and(|text| kind(text) == Kind::String)
    }

    pub(super) fn boolean(&self) -> Result<Option<bool>, Refusal> {
        match self.text() {
            None => Ok(None),
            Some("true") => Ok(Some(true)),
            Some("false") => Ok(Some(false)),
            Some(text) => Err(Refusal::wrong_type(self.name, "a boolean", text)),
        }
    }

    pub(super) fn string(&self) -> Result<Option<String>, Refusal> {
        let Some(text) = self.text() else { return Ok(None) };
        if !text.starts_with('"') {
            return Err(Refusal::wrong_type(self.name, "a string", text));
        }
        // Already checked to be JSON: what can still fail is half a surrogate pair.
        serde_json::from_str(text).map(Some).map_err(|e| Refusal::text(self.name, &e))
    }

    /// An integer within `range`; `16.0` and `1.6e1` are integers too, as Python's engines take them.
    pub(super) fn integer(&self, range: RangeInclusive<i64>) -> Result<Option<i64>, Refusal> {
        let Some(text) = self.text() else { return Ok(None) };
        let value = match kind(text) {
            Kind::Number => whole(text).ok_or_else(|| Refusal::wrong_type(self.name, "an integer", text))?,
            _ => return Err(Refusal::wrong_type(self.name, "an integer", text)),
        };
        if value < *range.start() {
            return Err(Refusal::out_of_range(self.name, "below minimum value", ">=", *range.start(), text));
        }
        if value > *range.end() {
            return Err(Refusal::out_of_range(self.name, "above maximum value", "<=", *range.end(), text));
        }
        Ok(Some(value))
    }

    /// As [`Field::integer`], for ranges that fit `u32`.
    pub(super) fn count(&self, range: RangeInclusive<u32>) -> Result<Option<u32>, Refusal> {
        let value = self.integer(i64::from(*range.start())..=i64::from(*range.end()))?;
        Ok(value.and_then(|value| u32::try_from(value).ok()))
    }

    /// Where an array stands.
    pub(super) fn array(&self) -> Result<Option<Span>, Refusal> {
        self.of_kind(Kind::Array, "an array")
    }

    /// Where an object stands.
    pub(super) fn object(&self) -> Result<Option<Span>, Refusal> {
        self.of_kind(Kind::Object, "an object")
    }

    fn of_kind(&self, wanted: Kind, expected: &'static str) -> Result<Option<Span>, Refusal> {
        match self.text() {
            Some(text) if kind(text) != wanted => Err(Refusal::wrong_type(self.name, expected, text)),
            _ => Ok(self.span()),
        }
    }

    pub(super) fn missing(&self) -> Refusal {
        Refusal::missing(self.name)
    }
}

/// JSON's types, told by a value's first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Null,
    Boolean,
    Number,
    String,
    Array,
    Object,
}

pub(super) fn kind(text: &str) -> Kind {
    match text.as_bytes().first() {
        Some(b'"') => Kind::String,
        Some(b'[') => Kind::Array,
        Some(b'{') => Kind::Object,
        Some(b't' | b'f') => Kind::Boolean,
        Some(b'n') | None => Kind::Null,
        Some(_) => Kind::Number,
    }
}

/// A JSON number without a fractional part. Saturates, so that a range check still sees which side it fell off.
fn whole(text: &str) -> Option<i64> {
    if let Ok(value) = text.parse::<i64>() {
        return Some(value);
    }
    let value = text.parse::<f64>().ok().filter(|value| value.fract() == 0.0 || value.is_infinite())?;
    // `as` saturates; beyond 2^53 the exact value does not matter, every range here is far below.
    Some(value as i64)
}
