//! Which shape of message contents a template expects, decided as vLLM decides it.
//!
//! vLLM (0.32, `renderers/hf.py`) reads the template's syntax tree: where a loop over the messages holds a loop over
//! a message's `content`, the template takes a list of parts ("openai"); every other template gets plain text
//! ("string"). The words of the blocks are enough to decide the same.

use super::scan::{Token, Word, as_loop, blocks, keyword};

/// The shape in which a template wants the contents of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ContentFormat {
    /// Text; parts are joined by line breaks.
    Text,
    /// A list of parts, also for plain text.
    Parts,
}

/// Decides from the template's source.
pub(super) fn detect(source: &str) -> ContentFormat {
    let blocks = blocks(source);
    if loops_over_content(&blocks).unwrap_or(false) { ContentFormat::Parts } else { ContentFormat::Text }
}

/// `None` where vLLM gives up on the template and takes it as one of text: a loop or assignment it looks at has
/// another target than a plain name.
fn loops_over_content(blocks: &[Vec<Token<'_>>]) -> Option<bool> {
    let lists = names_of_messages(blocks)?;
    let mut messages = Vec::new();
    for block in blocks {
        if let Some(found) = as_loop(block)
            && lists.iter().any(|list| reads(found.over, list, None))
        {
            messages.push(plain_name(found.target)?);
        }
    }
    for block in blocks {
        if let Some(found) = as_loop(block)
            && messages.iter().any(|message| reads(found.over, message, Some("content")))
        {
            return plain_name(found.target).map(|_| true);
        }
    }
    Some(false)
}

/// `messages`, and every name that is assigned from one of these names.
fn names_of_messages<'a>(blocks: &[Vec<Token<'a>>]) -> Option<Vec<&'a str>> {
    let mut names = vec!["messages"];
    let mut next = 0;
    while let Some(name) = names.get(next).copied() {
        next += 1;
        for words in blocks.iter().filter_map(|block| keyword(block, "set")) {
            let Some(equals) = words.iter().position(|token| token.word == Word::Sign('=')) else { continue };
            let (target, value) = words.split_at(equals);
            if reads(value.get(1..).unwrap_or_default(), name, None) {
                let target = plain_name(target)?;
                if !names.contains(&target) {
                    names.push(target);
                }
            }
        }
    }
    Some(names)
}

fn plain_name<'a>(words: &[Token<'a>]) -> Option<&'a str> {
    match words {
        [Token { word: Word::Name(name), .. }] => Some(name),
        _ => None,
    }
}

/// Whether the expression is `name`, or `name.key` when a key is asked for, behind which only filters, tests and
/// slices stand.
fn reads(expression: &[Token<'_>], name: &str, key: Option<&str>) -> bool {
    let [Token { word: Word::Name(first), .. }, rest @ ..] = expression else { return false };
    if *first != name {
        return false;
    }
    let rest = match (key, rest) {
        (None, rest) => rest,
        (Some(key), [dot, name, rest @ ..]) if dot.word == Word::Sign('.') && name.word == Word::Name(key) => rest,
        (Some(key), [open, text, close, rest @ ..])
            if (open.word, text.word, close.word) == (Word::Sign('['), Word::Text(key), Word::Sign(']')) =>
        {
            rest
        }
        _ => return false,
    };
    only_filters_tests_and_slices(rest)
}

fn only_filters_tests_and_slices(mut rest: &[Token<'_>]) -> bool {
    loop {
        rest = match rest {
            [] => return true,
            [bar, filter, more @ ..] if bar.word == Word::Sign('|') && is_name(filter) => arguments(more),
            [is, not, test, more @ ..]
                if is.word == Word::Name("is") && not.word == Word::Name("not") && is_name(test) =>
            {
                arguments(more)
            }
            [is, test, more @ ..] if is.word == Word::Name("is") && is_name(test) => arguments(more),
            [open, ..] if open.word == Word::Sign('[') => {
                let Some((inside, more)) = bracketed(rest) else { return false };
                if !inside.iter().any(|token| token.word == Word::Sign(':')) {
                    return false;
                }
                more
            }
            _ => return false,
        };
    }
}

fn is_name(token: &Token<'_>) -> bool {
    matches!(token.word, Word::Name(_))
}

/// What follows the arguments in parentheses, if there are any.
fn arguments<'t, 'a>(rest: &'t [Token<'a>]) -> &'t [Token<'a>] {
    match rest {
        [open, ..] if open.word == Word::Sign('(') => bracketed(rest).map_or(&[], |(_, more)| more),
        _ => rest,
    }
}

/// The words within the bracket that `words` begins with, and those behind it.
fn bracketed<'t, 'a>(words: &'t [Token<'a>]) -> Option<(&'t [Token<'a>], &'t [Token<'a>])> {
    let mut depth = 0_usize;
    for (index, token) in words.iter().enumerate() {
        match token.word {
            Word::Sign('(' | '[' | '{') => depth += 1,
            Word::Sign(')' | ']' | '}') => depth = depth.checked_sub(1)?,
            _ => {}
        }
        if depth == 0 {
            return Some((words.get(1..index)?, words.get(index + 1..)?));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(source: &str, expect: ContentFormat) {
        assert_eq!(detect(source), expect, "{source}");
    }

    #[test]
    fn a_loop_over_the_content_of_a_message_asks_for_parts() {
        use ContentFormat::{Parts, Text};
        check("{% for m in messages %}{{ m.content }}{% endfor %}", Text);
        check("{% for m in messages %}{% for c in m.content %}{% endfor %}{% endfor %}", Parts);
        check("{%- for m in messages -%}{%- for c in m['content'] -%}{%- endfor -%}{%- endfor -%}", Parts);
        check("{% for m in messages[1:] %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}", Parts);
        check("{% set ms = messages[1:] %}{% for m in ms %}{% for c in m['content'] if c.text %}", Parts);
        // assigned from an assigned name
        check("{% set a = messages %}{% set b = a|list %}{% for m in b %}{% for c in m.content %}", Parts);
        // one step further than vLLM follows
        check("{% for m in messages %}{% set k = m.content %}{% for c in k %}", Text);
        check("{% for m in messages %}{% for c in m.content.parts %}", Text);
        check("{% for m in messages %}{% for c in m['content'][0] %}", Text);
        check("{% for m in others %}{% for c in m.content %}", Text);
        // vLLM gives up where a target is not a plain name
        check("{% set ns.all = messages %}{% for m in messages %}{% for c in m.content %}", Text);
        check("{# {% for m in messages %}{% for c in m.content %} #}", Text);
    }
}
