//! The text as a tree of spanned TOML values, and the one way to ask it for keys.
//!
//! A [`Section`] is one table. Whoever reads it asks for each key it knows, with a conversion; a value that does not
//! convert becomes a mistake at its own place and the default stands in, so that reading goes on and finds the next
//! mistake. [`Section::finish`] reports what nobody asked for: the list of known keys is the list of keys that were
//! read, and cannot fall behind it.

use std::num::NonZeroU32;
use std::ops::{Range, RangeInclusive};
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::defaults::SECONDS_MAX;
use super::log::{At, Log};
use super::mistake::{quoted, shortened};

/// A value given outside the file for a key of `[server]`.
pub(super) struct Override {
    pub(super) key: String,
    /// The variable or flag.
    pub(super) name: String,
    pub(super) text: String,
}

/// A value before it is converted.
pub(super) enum Raw<'a> {
    /// The value and its source text.
    Toml(&'a DeValue<'a>, &'a str),
    /// From the environment or a flag: takes the type that the key has.
    Text(&'a str),
}

/// Why a conversion refused a value.
pub(super) struct Refusal {
    remedy: String,
    shown: Option<String>,
}

impl Refusal {
    pub(super) fn new(remedy: impl Into<String>) -> Self {
        Self { remedy: remedy.into(), shown: None }
    }

    /// Shows `shown` in place of the value, which must not be repeated.
    pub(super) fn showing(shown: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { remedy: remedy.into(), shown: Some(shown.into()) }
    }
}

impl Raw<'_> {
    pub(super) fn text(&self) -> Result<&str, Refusal> {
        match self {
            Raw::Toml(DeValue::String(text), _) => Ok(text),
            Raw::Text(text) => Ok(text),
            Raw::Toml(..) => Err(Refusal::new("must be a string in quotes")),
        }
    }

    pub(super) fn boolean(&self) -> Result<bool, Refusal> {
        let parsed = match self {
            Raw::Toml(value, _) => value.as_bool(),
            Raw::Text(text) => text.trim().parse().ok(),
        };
        parsed.ok_or_else(|| Refusal::new("must be true or false"))
    }

    fn number(&self) -> Option<f64> {
        let of = |value: &DeValue<'_>| match value {
            DeValue::Float(number) => number.as_str().parse().ok(),
            #[expect(clippy::cast_precision_loss, reason = "numbers beyond 2^52 are refused for their size")]
            value => whole_of(value).map(|number| number as f64),
        };
        match self {
            Raw::Toml(value, _) => of(value),
            Raw::Text(text) => DeValue::parse(text.trim()).ok().and_then(|value| of(value.get_ref())),
        }
    }

    /// `omit` says what the key's absence means.
    pub(super) fn whole(&self, range: &RangeInclusive<u64>, omit: &str) -> Result<u64, Refusal> {
        let parsed = match self {
            Raw::Toml(value, _) => whole_of(value),
            Raw::Text(text) => DeValue::parse(text.trim()).ok().and_then(|value| whole_of(value.get_ref())),
        };
        let (least, most) = (range.start(), range.end());
        let wrong = match parsed {
            None => format!("must be a whole number from {least} to {most}"),
            Some(number) if number < i128::from(*least) => format!("must be at least {least}"),
            Some(number) if number > i128::from(*most) => format!("must be at most {most}"),
            Some(number) => match u64::try_from(number) {
                Ok(number) => return Ok(number),
                Err(_) => format!("must be at most {most}"),
            },
        };
        Err(Refusal::new(format!("{wrong} (omit the key {omit})")))
    }

    pub(super) fn show(&self) -> String {
        match self {
            Raw::Toml(DeValue::String(text), _) => quoted(text),
            Raw::Toml(DeValue::Table(_), _) => "a table".to_owned(),
            Raw::Toml(DeValue::Array(_), _) => "a list".to_owned(),
            Raw::Toml(_, source) => shortened(source),
            Raw::Text(text) => quoted(text),
        }
    }
}

/// Numbers beyond what any key takes saturate, so that they are refused as too large and not as no numbers.
fn whole_of(value: &DeValue<'_>) -> Option<i128> {
    let integer = value.as_integer()?;
    let digits = integer.as_str();
    let beyond = if digits.starts_with('-') { i128::MIN } else { i128::MAX };
    Some(i128::from_str_radix(digits, integer.radix()).unwrap_or(beyond))
}

/// A value that was accepted, and its place for later checks.
pub(super) struct Found<T> {
    pub(super) value: T,
    pub(super) at: At,
}

/// One table of the file with what overrides it.
pub(super) struct Section<'a> {
    pub(super) log: &'a Log<'a>,
    path: String,
    span: Range<usize>,
    table: &'a DeTable<'a>,
    overrides: &'a [Override],
    asked: Vec<&'static str>,
    /// Path and keys of the section around this one: in TOML a key that stands too low belongs to the wrong table.
    outer: (String, Vec<&'static str>),
}

impl<'a> Section<'a> {
    pub(super) fn root(log: &'a Log<'a>, table: &'a DeTable<'a>) -> Self {
        let outer = (String::new(), Vec::new());
        Self { log, path: String::new(), span: 0..0, table, overrides: &[], asked: Vec::new(), outer }
    }

    /// Asks for one value: checks every place that gives it and returns what the strongest of the good ones gives.
    pub(super) fn read<T>(
        &mut self,
        key: &'static str,
        convert: impl Fn(&Raw<'_>) -> Result<T, Refusal>,
    ) -> Option<Found<T>> {
        self.asked.push(key);
        let path = self.path_of(key);
        let in_file = self.table.get(key).map(|value| {
            let raw = self.raw(value);
            (At::offset(&path, value.span().start), raw)
        });
        let outside = self.overrides.iter().filter(|over| over.key == key);
        let outside = outside.map(|over| (At::given(&path, &over.name), Raw::Text(&over.text)));
        let mut found = None;
        for (at, raw) in in_file.into_iter().chain(outside) {
            if let Some(value) = self.convert(&at, &raw, &convert) {
                found = Some(Found { value, at });
            }
        }
        found
    }

    /// Asks for a list, each item converted on its own.
    pub(super) fn list<T>(
        &mut self,
        key: &'static str,
        convert: impl Fn(&Raw<'_>) -> Result<T, Refusal>,
    ) -> Vec<Found<T>> {
        self.asked.push(key);
        let Some(value) = self.table.get(key) else { return Vec::new() };
        let path = self.path_of(key);
        let Some(items) = value.get_ref().as_array() else {
            let raw = self.raw(value);
            self.log.refuse(&At::offset(path, value.span().start), raw.show(), "must be a list in square brackets");
            return Vec::new();
        };
        let mut found = Vec::new();
        for (index, item) in items.iter().enumerate() {
            let at = At::offset(format!("{path}[{index}]"), item.span().start);
            let raw = self.raw(item);
            if let Some(value) = self.convert(&at, &raw, &convert) {
                found.push(Found { value, at });
            }
        }
        found
    }

    /// Whether the key stands there, good or bad.
    pub(super) fn holds(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    /// As `read`, for a key without which the section means nothing.
    pub(super) fn required<T>(
        &mut self,
        key: &'static str,
        remedy: &str,
        convert: impl Fn(&Raw<'_>) -> Result<T, Refusal>,
    ) -> Option<Found<T>> {
        if !self.holds(key) {
            self.log.refuse_absence(&self.at(key), "missing", remedy);
        }
        self.read(key, convert)
    }

    pub(super) fn boolean(&mut self, key: &'static str, default: bool) -> bool {
        self.read(key, |raw| raw.boolean()).map_or(default, |found| found.value)
    }

    /// From 1 to `most`.
    pub(super) fn count(&mut self, key: &'static str, most: u32, default: NonZeroU32) -> NonZeroU32 {
        self.optional_count(key, most, &format!("for the default {default}")).unwrap_or(default)
    }

    /// From 1 to `most`; `omit` says what the key's absence means.
    pub(super) fn optional_count(&mut self, key: &'static str, most: u32, omit: &str) -> Option<NonZeroU32> {
        let found = self.read(key, |raw| raw.whole(&(1..=u64::from(most)), omit))?;
        u32::try_from(found.value).ok().and_then(NonZeroU32::new)
    }

    /// Whole seconds, from `least` to a day.
    pub(super) fn seconds(&mut self, key: &'static str, least: u64, default: Duration) -> Duration {
        let omit = format!("for the default {}", default.as_secs());
        let found = self.read(key, |raw| raw.whole(&(least..=SECONDS_MAX), &omit));
        found.map_or(default, |found| Duration::from_secs(found.value))
    }

    /// Whole milliseconds, from 0 to `most`.
    pub(super) fn milliseconds(&mut self, key: &'static str, most: u64, default: Duration) -> Duration {
        let omit = format!("for the default {}", default.as_millis());
        let found = self.read(key, |raw| raw.whole(&(0..=most), &omit));
        found.map_or(default, |found| Duration::from_millis(found.value))
    }

    /// From 0 to 1.
    pub(super) fn share(&mut self, key: &'static str, default: f64) -> f64 {
        let found = self.read(key, |raw| {
            let share = raw.number().filter(|share| (0.0..=1.0).contains(share));
            share.ok_or_else(|| {
                Refusal::new(format!("must be a number from 0 to 1 (omit the key for the default {default})"))
            })
        });
        found.map_or(default, |found| found.value)
    }

    pub(super) fn bytes(&mut self, key: &'static str, range: RangeInclusive<u64>, default: usize) -> usize {
        usize::try_from(self.whole(key, range, default as u64)).unwrap_or(default)
    }

    pub(super) fn whole(&mut self, key: &'static str, range: RangeInclusive<u64>, default: u64) -> u64 {
        let found = self.read(key, |raw| raw.whole(&range, &format!("for the default {default}")));
        found.map_or(default, |found| found.value)
    }

    /// Asks for the table `[key]`; an absent one is empty, and still takes overrides.
    pub(super) fn table(
        &mut self,
        key: &'static str,
        empty: &'a DeTable<'a>,
        overrides: &'a [Override],
    ) -> Section<'a> {
        self.asked.push(key);
        let value = self.table.get(key);
        let table = value.and_then(|value| value.get_ref().as_table());
        if let (Some(value), None) = (value, table) {
            let at = At::offset(self.path_of(key), value.span().start);
            self.log.refuse(&at, self.raw(value).show(), format!("must be a table: write `[{key}]`"));
        }
        let span = value.map_or(0..0, |value| value.span());
        Section { overrides, ..self.inner(self.path_of(key), span, table.unwrap_or(empty)) }
    }

    /// Asks for the table `[header]`, which may be absent.
    pub(super) fn optional_table(&mut self, key: &'static str, header: &str) -> Option<Section<'a>> {
        self.asked.push(key);
        let value = self.table.get(key)?;
        let table = value.get_ref().as_table();
        if table.is_none() {
            let at = At::offset(self.path_of(key), value.span().start);
            self.log.refuse(&at, self.raw(value).show(), format!("must be a table: write `[{header}]`"));
        }
        Some(self.inner(self.path_of(key), value.span(), table?))
    }

    /// Asks for the tables `[[header]]`. One written `[header]` is a mistake, and read all the same.
    pub(super) fn tables(&mut self, key: &'static str, header: &str) -> Vec<Section<'a>> {
        self.asked.push(key);
        let Some(value) = self.table.get(key) else { return Vec::new() };
        let items = match value.get_ref() {
            DeValue::Array(items) => items.iter().collect(),
            _ => vec![value],
        };
        let listed = value.get_ref().is_array();
        let mut sections = Vec::new();
        for (index, item) in items.into_iter().enumerate() {
            let path = format!("{}[{index}]", self.path_of(key));
            let table = item.get_ref().as_table();
            if table.is_none() || !listed {
                let at = At::offset(&path, item.span().start);
                let raw = self.raw(item);
                self.log.refuse(&at, raw.show(), format!("must be a list of tables: write `[[{header}]]`"));
            }
            if let Some(table) = table {
                sections.push(self.inner(path, item.span(), table));
            }
        }
        sections
    }

    /// The section itself.
    pub(super) fn here(&self) -> At {
        At::offset(self.path.clone(), self.span.start)
    }

    /// Whether a list stands there with nothing in it.
    pub(super) fn is_empty_list(&self, key: &str) -> bool {
        self.table.get(key).and_then(|value| value.get_ref().as_array()).is_some_and(|items| items.is_empty())
    }

    /// Where the value of a key of this section stands; of one that does not, where the section begins.
    pub(super) fn at(&self, key: &str) -> At {
        let start = self.table.get(key).map_or(self.span.start, |value| value.span().start);
        At::offset(self.path_of(key), start)
    }

    /// Reports every key that was not asked for. `later` are keys of the format that this version cannot act on.
    pub(super) fn finish(self, later: &[&str]) {
        for (key, value) in self.table.iter() {
            let (name, at) = (key.get_ref().as_ref(), At::offset(self.path_of(key.get_ref()), key.span().start));
            if self.asked.contains(&name) {
                continue;
            }
            if later.contains(&name) {
                let what = value.get_ref().type_str();
                self.log.refuse(&at, format!("not supported by this version ({what})"), "remove it");
            } else {
                self.log.refuse(&at, "not a known key", self.advice(name));
            }
        }
        for over in self.overrides.iter().filter(|over| !self.asked.contains(&over.key.as_str())) {
            let at = At::given(self.path_of(&over.key), &over.name);
            self.log.refuse(&at, "not a known key", self.advice(&over.key));
        }
    }

    fn advice(&self, unknown: &str) -> String {
        let (outer, outer_keys) = &self.outer;
        let near = self.asked.iter().map(|known| (distance(unknown, known), *known)).min();
        match near {
            Some((steps, known)) if steps <= 1 + known.len() / 4 => format!("did you mean `{known}`?"),
            _ if outer_keys.contains(&unknown) && !outer.is_empty() => {
                format!("it is a key of `{outer}`: move it above the header of `{}`", self.path)
            }
            _ => format!("known here: {}", self.asked.join(", ")),
        }
    }

    fn inner(&self, path: String, span: Range<usize>, table: &'a DeTable<'a>) -> Section<'a> {
        let outer = (self.path.clone(), self.asked.clone());
        Section { log: self.log, path, span, table, overrides: &[], asked: Vec::new(), outer }
    }

    fn convert<T>(&self, at: &At, raw: &Raw<'_>, convert: impl Fn(&Raw<'_>) -> Result<T, Refusal>) -> Option<T> {
        match convert(raw) {
            Ok(value) => Some(value),
            Err(refusal) => {
                self.log.refuse(at, refusal.shown.unwrap_or_else(|| raw.show()), refusal.remedy);
                None
            }
        }
    }

    fn raw(&self, value: &'a Spanned<DeValue<'a>>) -> Raw<'a> {
        Raw::Toml(value.get_ref(), self.log.source(value.span()))
    }

    fn path_of(&self, key: &str) -> String {
        let bare = key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-');
        let key = if bare { shortened(key) } else { quoted(key) };
        if self.path.is_empty() { key } else { format!("{}.{key}", self.path) }
    }
}

/// Levenshtein distance in bytes.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (cell, y) in row.iter_mut().skip(1).zip(b.bytes()) {
            let above = *cell;
            left = (diagonal + usize::from(x != y)).min(above + 1).min(left + 1);
            diagonal = above;
            *cell = left;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or_default()
}
