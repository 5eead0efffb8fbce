//! Prometheus text format 0.0.4 and OpenMetrics, as far as reading gauges and counters needs it.
//!
//! A sample borrows from the text; comments, `# EOF` and lines that are not a sample are passed over, so that one bad
//! line of an engine does not cost the others. Nothing is allocated but label values that hold an escape. Time stamps
//! and exemplars are skipped. Not here: families, types and histograms as such: their series are samples like others.

use std::borrow::Cow;

/// One series' value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample<'a> {
    /// As exported, `_total` and `_bucket` included.
    pub name: &'a str,
    pub labels: Labels<'a>,
    /// May be infinite or NaN.
    pub value: f64,
}

/// The labels of a sample, read when asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Labels<'a>(&'a str);

/// The samples of `text`, in its order.
pub fn samples(text: &[u8]) -> impl Iterator<Item = Sample<'_>> {
    text.split(|b| *b == b'\n').filter_map(|line| sample(std::str::from_utf8(line).ok()?))
}

impl<'a> Labels<'a> {
    /// The value of the label `name`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Cow<'a, str>> {
        self.iter().find(|(label, _)| *label == name).map(|(_, value)| value)
    }

    /// Names and values, in the order of the text.
    pub fn iter(&self) -> impl Iterator<Item = (&'a str, Cow<'a, str>)> + use<'a> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let (name, value, after) = label(rest)?;
            rest = after;
            Some((name, unescape(value)))
        })
    }
}

/// `name{label="value",…} value [timestamp] [# exemplar]`
fn sample(line: &str) -> Option<Sample<'_>> {
    let line = line.trim_matches([' ', '\t', '\r']);
    let (name, rest) = word(line, |b| matches!(b, b'_' | b':'))?;
    let rest = rest.trim_start_matches([' ', '\t']);
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(inner) => labels(inner)?,
        None if rest.len() == line.len() - name.len() => return None,
        None => (Labels(""), rest),
    };
    let value = rest.trim_start_matches([' ', '\t']).split([' ', '\t']).next()?;
    Some(Sample { name, labels, value: value.parse().ok()? })
}

/// The labels, and what follows their closing brace.
fn labels(inner: &str) -> Option<(Labels<'_>, &str)> {
    let mut rest = inner;
    while let Some((_, _, after)) = label(rest) {
        rest = after;
    }
    let after = rest.trim_start_matches([' ', '\t']).strip_prefix('}')?;
    let length = inner.len() - after.len() - 1;
    Some((Labels(inner.get(..length)?), after))
}

/// One label's name and escaped value, and what follows them and their comma.
fn label(text: &str) -> Option<(&str, &str, &str)> {
    let blank = [' ', '\t'];
    let (name, rest) = word(text.trim_start_matches(blank), |b| b == b'_')?;
    let rest = rest.trim_start_matches(blank).strip_prefix('=')?.trim_start_matches(blank).strip_prefix('"')?;
    let end = closing_quote(rest)?;
    let after = rest.get(end + 1..)?.trim_start_matches(blank);
    Some((name, rest.get(..end)?, after.strip_prefix(',').unwrap_or(after)))
}

/// A name: ASCII letters, digits (not first) and what `also` allows.
fn word(text: &str, also: impl Fn(u8) -> bool) -> Option<(&str, &str)> {
    let end = text.bytes().position(|b| !b.is_ascii_alphanumeric() && !also(b)).unwrap_or(text.len());
    let (name, rest) = text.split_at_checked(end)?;
    name.bytes().next().is_some_and(|b| !b.is_ascii_digit()).then_some((name, rest))
}

fn closing_quote(text: &str) -> Option<usize> {
    let mut from = 0;
    loop {
        let at = from + memchr::memchr2(b'"', b'\\', text.as_bytes().get(from..)?)?;
        if text.as_bytes().get(at) == Some(&b'"') {
            return Some(at);
        }
        from = at + 2;
    }
}

/// `\\`, `\"` and `\n`; any other escape stays as it is.
fn unescape(value: &str) -> Cow<'_, str> {
    if !value.contains('\\') {
        return Cow::Borrowed(value);
    }
    let mut out = String::with_capacity(value.len());
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        let next = if c == '\\' { chars.clone().next() } else { None };
        let plain = match next {
            Some('\\') => '\\',
            Some('"') => '"',
            Some('n') => '\n',
            _ => {
                out.push(c);
                continue;
            }
        };
        chars.next();
        out.push(plain);
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests;
