//! A light reading of Jinja source: its `{% … %}` blocks and the words in them.
//!
//! Two things need it. The template engine differs from Python's where only the source can say so ([`rewrite`]), and
//! an engine chooses the shape of message contents by what a template loops over (`format`). Source that cannot be
//! read here is passed on unchanged, for the engine's own parser to refuse.

use std::ops::Range;

/// The filter that [`rewrite`] puts behind what a loop goes over.
pub(super) const ITERABLE: &str = "__iterable__";

/// The method that [`rewrite`] calls for a slice with a step.
pub(super) const SLICE: &str = "__slice__";

/// Python's Jinja reads every line end in a template as `\n`.
pub(super) fn normalize_newlines(source: &str) -> String {
    source.replace("\r\n", "\n").replace('\r', "\n")
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word<'a> {
    Name(&'a str),
    /// A string literal, between its quotes.
    Text(&'a str),
    /// Anything else, one character at a time.
    Sign(char),
}

/// A word and where it stands in the source.
#[derive(Debug, Clone)]
pub(super) struct Token<'a> {
    pub(super) word: Word<'a>,
    pub(super) at: Range<usize>,
}

/// The words of a `{% … %}` block, or of an output `{{ … }}`.
pub(super) struct Tag<'a> {
    is_block: bool,
    words: Vec<Token<'a>>,
}

/// The words of each block, in order.
pub(super) fn blocks(source: &str) -> Vec<Vec<Token<'_>>> {
    tags(source).into_iter().filter(|tag| tag.is_block).map(|tag| tag.words).collect()
}

/// Blocks and outputs in order; comments and raw text are passed over.
fn tags(source: &str) -> Vec<Tag<'_>> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(start) = source.get(at..).and_then(|rest| rest.find('{')).map(|offset| at + offset) {
        let opened = source.get(start..start + 2).unwrap_or_default();
        at = match opened {
            "{#" => after(source, start + 2, "#}"),
            "{{" => {
                let (words, end) = words(source, start + 2, "}}");
                found.push(Tag { is_block: false, words });
                end
            }
            "{%" => {
                let (words, end) = words(source, start + 2, "%}");
                let raw = keyword(&words, "raw").is_some();
                found.push(Tag { is_block: true, words });
                if raw { raw_end(source, end) } else { end }
            }
            _ => start + 1,
        };
    }
    found
}

fn after(source: &str, from: usize, what: &str) -> usize {
    source.get(from..).and_then(|rest| rest.find(what)).map_or(source.len(), |offset| from + offset + what.len())
}

/// Where the `{% endraw %}` begins that ends raw text.
fn raw_end(source: &str, from: usize) -> usize {
    let mut at = from;
    while let Some(start) = source.get(at..).and_then(|rest| rest.find("{%")).map(|offset| at + offset) {
        let inside = source.get(start + 2..).unwrap_or_default().trim_start_matches(['-', '+']).trim_start();
        if inside.starts_with("endraw") {
            return start;
        }
        at = start + 2;
    }
    source.len()
}

/// The words from `from` to the closing mark, and where the source goes on behind it; none when it is missing.
fn words<'a>(source: &'a str, from: usize, close: &str) -> (Vec<Token<'a>>, usize) {
    let mut found = Vec::new();
    let mut at = from;
    while let Some(rest) = source.get(at..)
        && let Some(first) = rest.chars().next()
    {
        if rest.starts_with(close) {
            return (found, at + close.len());
        }
        let (word, length) = match first {
            '\'' | '"' => {
                let length = literal_length(rest, first);
                let inside = rest.get(1..length.saturating_sub(1)).unwrap_or_default();
                (Some(Word::Text(inside)), length)
            }
            c if c.is_alphanumeric() || c == '_' => {
                let length = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
                (rest.get(..length).map(Word::Name), length)
            }
            c if c.is_whitespace() => (None, c.len_utf8()),
            c => (Some(Word::Sign(c)), c.len_utf8()),
        };
        found.extend(word.map(|word| Token { word, at: at..at + length }));
        at += length;
    }
    (Vec::new(), source.len())
}

/// The length of a string literal with both quotes; an unfinished one takes all the rest.
fn literal_length(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// The parts of a `for` tag: its target, what it loops over, both as words.
pub(super) struct Loop<'t, 'a> {
    pub(super) target: &'t [Token<'a>],
    pub(super) over: &'t [Token<'a>],
}

/// Takes a block apart when it is a `for` tag.
pub(super) fn as_loop<'t, 'a>(block: &'t [Token<'a>]) -> Option<Loop<'t, 'a>> {
    let words = keyword(block, "for")?;
    let inside = position(words, |word| word == Word::Name("in"))?;
    let (target, rest) = words.split_at_checked(inside)?;
    let rest = rest.get(1..)?;
    let end = position(rest, |word| matches!(word, Word::Name("if" | "recursive"))).unwrap_or(rest.len());
    let over = rest.get(..end)?;
    (!over.is_empty()).then_some(Loop { target, over })
}

/// The words behind a block's keyword, whitespace control aside, when it has that keyword.
pub(super) fn keyword<'t, 'a>(block: &'t [Token<'a>], name: &str) -> Option<&'t [Token<'a>]> {
    let block = trim_signs(block);
    matches!(block.first(), Some(Token { word: Word::Name(first), .. }) if *first == name).then(|| block.get(1..))?
}

/// Without the `-` and `+` of whitespace control at either end.
fn trim_signs<'t, 'a>(mut words: &'t [Token<'a>]) -> &'t [Token<'a>] {
    let control = |token: &Token<'_>| matches!(token.word, Word::Sign('-' | '+'));
    if let [first, rest @ ..] = words
        && control(first)
    {
        words = rest;
    }
    if let [rest @ .., last] = words
        && control(last)
    {
        words = rest;
    }
    words
}

/// The first word outside all brackets for which `wanted` holds.
fn position(words: &[Token<'_>], wanted: impl Fn(Word<'_>) -> bool) -> Option<usize> {
    let mut depth = 0_usize;
    for (index, token) in words.iter().enumerate() {
        match token.word {
            Word::Sign('(' | '[' | '{') => depth += 1,
            Word::Sign(')' | ']' | '}') => depth = depth.saturating_sub(1),
            word if depth == 0 && wanted(word) => return Some(index),
            _ => {}
        }
    }
    None
}

/// Makes the source mean to our template engine what it means to Python's:
/// - a loop over `None` must fail, so what every loop goes over passes through the filter [`ITERABLE`];
/// - a slice with a step (`messages[::-1]`) becomes a call of the method [`SLICE`], since the engine's own fails on
///   what is empty;
/// - `{% generation %}`, which only marks what a model is trained on, becomes a plain scope.
pub(super) fn rewrite(source: &str) -> String {
    let mut edits: Vec<(Range<usize>, String)> = Vec::new();
    for Tag { is_block, words } in tags(source) {
        for index in 0..words.len() {
            edits.extend(words.get(index..).and_then(stepped_slice).into_iter().flatten());
        }
        if !is_block {
            continue;
        }
        if let Some(Loop { over: [first, .., last] | [first @ last], .. }) = as_loop(&words) {
            edits.push((first.at.start..first.at.start, "(".to_owned()));
            edits.push((last.at.end..last.at.end, format!(")|{ITERABLE}")));
        }
        for (mark, plain) in [("generation", "with"), ("endgeneration", "endwith")] {
            if keyword(&words, mark).is_some_and(<[_]>::is_empty) {
                let token = words.iter().find(|token| token.word == Word::Name(mark));
                edits.extend(token.map(|token| (token.at.clone(), plain.to_owned())));
            }
        }
    }
    edits.sort_by_key(|(range, _)| range.start);
    let mut out = String::with_capacity(source.len() + edits.len() * ITERABLE.len());
    let mut done = 0;
    for (range, text) in edits {
        out.push_str(source.get(done..range.start).unwrap_or_default());
        out.push_str(&text);
        done = range.end;
    }
    out.push_str(source.get(done..).unwrap_or_default());
    out
}

/// The edits that turn `[a:b:c]`, with which these words begin, into `.__slice__(a,b,c)`.
fn stepped_slice(words: &[Token<'_>]) -> Option<Vec<(Range<usize>, String)>> {
    let [open, rest @ ..] = words else { return None };
    if open.word != Word::Sign('[') {
        return None;
    }
    let mut edits = vec![(open.at.clone(), format!(".{SLICE}("))];
    let (mut depth, mut empty) = (0_usize, true);
    for token in rest {
        let nothing = if empty { "none" } else { "" };
        match token.word {
            Word::Sign(']') if depth == 0 => {
                edits.push((token.at.clone(), format!("{nothing})")));
                return (edits.len() == 4).then_some(edits);
            }
            Word::Sign(':') if depth == 0 => {
                edits.push((token.at.clone(), format!("{nothing},")));
                empty = true;
                continue;
            }
            Word::Sign('(' | '[' | '{') => depth += 1,
            Word::Sign(')' | ']' | '}') => depth = depth.checked_sub(1)?,
            _ => {}
        }
        empty = false;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(source: &str, expect: &str) {
        assert_eq!(rewrite(source), expect);
    }

    #[test]
    fn loops_are_guarded_and_nothing_else_is_touched() {
        check("{% for x in y %}", "{% for x in (y)|__iterable__ %}");
        check("{%- for x in y -%}", "{%- for x in (y)|__iterable__ -%}");
        check("{%for x in y[1:]%}", "{%for x in (y[1:])|__iterable__%}");
        check("{% for k, v in t.items() if k != 'in' %}", "{% for k, v in (t.items())|__iterable__ if k != 'in' %}");
        check("{% for x in f(a if b else c) recursive %}", "{% for x in (f(a if b else c))|__iterable__ recursive %}");
        check("{% for x in ['%}', \"if\"] %}", "{% for x in (['%}', \"if\"])|__iterable__ %}");
        check("{# {% for x in y %} #}{{ '{% for x in y %}' }}", "{# {% for x in y %} #}{{ '{% for x in y %}' }}");
        check("{% raw %}{% for x in y %}{% endraw %}", "{% raw %}{% for x in y %}{% endraw %}");
        check("for x in y {% set a = 'for' %}", "for x in y {% set a = 'for' %}");
    }

    #[test]
    fn slices_with_a_step_become_calls() {
        check("{{ a[::-1][0].b }}", "{{ a.__slice__(none,none,-1)[0].b }}");
        check(
            "{{ a[ b[1:2] : {'c':1}.c : d[::2] ] }}",
            "{{ a.__slice__( b[1:2] , {'c':1}.c , d.__slice__(none,none,2) ) }}",
        );
        check("{% for x in y[::-1] %}", "{% for x in (y.__slice__(none,none,-1))|__iterable__ %}");
        check(
            "{{ a[1:] }}{{ [1, 2] }}{{ {'a': [1]} }}{{ a[':::'] }}",
            "{{ a[1:] }}{{ [1, 2] }}{{ {'a': [1]} }}{{ a[':::'] }}",
        );
        check("[::-1]{# [::-1] #}{{ a[::", "[::-1]{# [::-1] #}{{ a[::");
    }

    #[test]
    fn generation_marks_become_scopes_and_keep_their_whitespace_control() {
        check("{%- generation -%}a{% endgeneration %}", "{%- with -%}a{% endwith %}");
        check("{% set generation = 1 %}", "{% set generation = 1 %}");
    }

    #[test]
    fn unfinished_source_is_passed_on() {
        for source in ["{% for x in", "{% for x in 'a", "{{", "{", "{#", "{% raw %}{%", "{% for %}", "{% for x in %}"] {
            check(source, source);
        }
    }
}
