//! From a name that a client asks for to one of the models.
//!
//! In this order: the name or alias itself; the same after `local/`, which says that no cloud is meant; the newest
//! version of it (`llama` and `llama@latest` are `llama@3` where there are `llama@1` and `llama@3`); the alias with a
//! `*` that says most of it. A request that names nothing gets the default, where one is configured.
//!
//! Not here: who may ask for it.

use std::cmp::{Ordering, Reverse};

use foldhash::HashMap;

/// What clients write before a name that no cloud is to answer.
const LOCAL: &str = "local/";
/// Stands between a model's name and its version.
const VERSION: char = '@';
const LATEST: &str = "latest";

/// An alias with `*`, which stands for any text, also none.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pattern {
    /// What lies between the stars; at least two.
    parts: Box<[Box<str>]>,
}

impl Pattern {
    fn new(text: &str) -> Option<Self> {
        let parts: Box<[Box<str>]> = text.split('*').map(Box::from).collect();
        (parts.len() > 1).then_some(Self { parts })
    }

    /// Bytes that are not stars.
    fn length(&self) -> usize {
        self.parts.iter().map(|part| part.len()).sum()
    }

    fn matches(&self, name: &str) -> bool {
        let [first, middle @ .., last] = &*self.parts else { return false };
        let Some(mut rest) = name.strip_prefix(&**first).and_then(|rest| rest.strip_suffix(&**last)) else {
            return false;
        };
        for part in middle {
            // The first place is the best: what is left after it is the longest.
            let Some((_, after)) = rest.split_once(&**part) else { return false };
            rest = after;
        }
        true
    }
}

/// Names of models, which are numbers here.
#[derive(Debug, Default)]
pub(super) struct Names {
    exact: HashMap<Box<str>, usize>,
    /// The newest version by its name without one.
    newest: HashMap<Box<str>, usize>,
    /// The longest first; of equal ones, the first configured.
    patterns: Vec<(Pattern, usize)>,
    default: Option<usize>,
}

impl Names {
    /// `models` in the order of their numbers: names, aliases, and whether it is the default.
    pub(super) fn new<'a, A: IntoIterator<Item = &'a str>>(
        models: impl IntoIterator<Item = (&'a str, A, bool)>,
    ) -> Self {
        let mut names = Self::default();
        let mut versions: HashMap<&str, (&str, usize)> = HashMap::default();
        for (number, (name, aliases, default)) in models.into_iter().enumerate() {
            names.exact.insert(name.into(), number);
            if let Some((base, version)) = name.rsplit_once(VERSION) {
                let newest = versions.entry(base).or_insert((version, number));
                if by_version(version, newest.0) == Ordering::Greater {
                    *newest = (version, number);
                }
            }
            for alias in aliases {
                match Pattern::new(alias) {
                    Some(pattern) => names.patterns.push((pattern, number)),
                    None => drop(names.exact.insert(alias.into(), number)),
                }
            }
            if default {
                names.default.get_or_insert(number);
            }
        }
        names.newest = versions.into_iter().map(|(base, (_, number))| (base.into(), number)).collect();
        names.patterns.sort_by_key(|(pattern, _)| Reverse(pattern.length()));
        names
    }

    /// The number of the model that `name` means.
    pub(super) fn find(&self, name: &str) -> Option<usize> {
        if name.is_empty() {
            return self.default;
        }
        let versioned = |name: &str| {
            let base =
                name.rsplit_once(VERSION).filter(|(_, version)| *version == LATEST).map_or(name, |(base, _)| base);
            self.exact.get(name).or_else(|| self.newest.get(base)).copied()
        };
        let here = || name.strip_prefix(LOCAL).and_then(versioned);
        let pattern = || self.patterns.iter().find(|(pattern, _)| pattern.matches(name)).map(|(_, number)| *number);
        versioned(name).or_else(here).or_else(pattern)
    }
}

/// Newer is greater: runs of digits as numbers, all else as text.
fn by_version(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a, b);
    while !a.is_empty() && !b.is_empty() {
        let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
        let order = match (digits(a), digits(b)) {
            (0, _) | (_, 0) => {
                let first = |text: &str| text.chars().next().map_or(0, char::len_utf8);
                let ((x, left), (y, right)) = (a.split_at(first(a)), b.split_at(first(b)));
                (a, b) = (left, right);
                x.cmp(y)
            }
            (m, n) => {
                let ((x, left), (y, right)) = (a.split_at(m), b.split_at(n));
                (a, b) = (left, right);
                let [x, y] = [x, y].map(|digits| digits.trim_start_matches('0'));
                x.len().cmp(&y.len()).then_with(|| x.cmp(y))
            }
        };
        if order != Ordering::Equal {
            return order;
        }
    }
    a.len().cmp(&b.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(models: &[(&str, &[&str])], names: &[(&str, Option<usize>)]) {
        let table = Names::new(models.iter().map(|(name, aliases)| (*name, aliases.iter().copied(), false)));
        for (name, number) in names {
            assert_eq!(table.find(name), *number, "{name}");
        }
    }

    #[test]
    fn a_name_or_alias_wins_over_all_else() {
        let models: [(&str, &[&str]); 3] = [("a", &["gpt-*"]), ("b", &["gpt-4o", "local/c"]), ("c", &[])];
        found(
            &models,
            &[("a", Some(0)), ("gpt-4o", Some(1)), ("gpt-4o-mini", Some(0)), ("local/c", Some(1)), ("d", None)],
        );
        found(
            &models,
            &[("local/a", Some(0)), ("local/gpt-4o", Some(1)), ("local/d", None), ("cloud/a", None), ("", None)],
        );
    }

    #[test]
    fn the_pattern_that_says_most_wins() {
        let models: [(&str, &[&str]); 4] = [
            ("any", &["*"]),
            ("chat", &["gpt-*", "*-*-*"]),
            ("mini", &["gpt-*-mini"]),
            ("org", &["meta-llama/*", "x-*"]),
        ];
        let gpt = [
            ("gpt-4o", Some(1)),
            ("gpt-4o-mini", Some(2)),
            ("gpt--mini", Some(2)),
            ("gpt-mini", Some(1)),
            ("gpt", Some(0)),
        ];
        found(&models, &gpt);
        found(&models, &[("meta-llama/Llama-3", Some(3)), ("a-b-c", Some(1)), ("x-", Some(3)), ("x-é-z", Some(1))]);
        found(&[("m", &["ab*ba"])], &[("aba", None), ("abba", Some(0)), ("abxba", Some(0)), ("ab", None)]);
        found(&[("m", &["*a*ab*"])], &[("aab", Some(0)), ("ab", None), ("xaxabx", Some(0))]);
    }

    #[test]
    fn a_name_without_version_is_the_newest() {
        let models: [(&str, &[&str]); 5] =
            [("llama@9", &[]), ("llama@10", &[]), ("llama@2", &[]), ("q@1", &[]), ("q", &["llama@latest-but-one"])];
        found(&models, &[("llama", Some(1)), ("llama@latest", Some(1)), ("llama@2", Some(2)), ("llama@3", None)]);
        found(&models, &[("q", Some(4)), ("q@1", Some(3)), ("q@latest", Some(3)), ("local/llama", Some(1))]);
        for (older, newer) in
            [("1", "2"), ("9", "10"), ("1.9", "1.10"), ("2024-08", "2024-11"), ("1", "1.1"), ("v2", "v03")]
        {
            assert_eq!(
                (by_version(older, newer), by_version(newer, older)),
                (Ordering::Less, Ordering::Greater),
                "{older}"
            );
        }
        assert_eq!(by_version("1.2", "1.2"), Ordering::Equal);
    }

    #[test]
    fn nothing_named_is_the_default() {
        let table = Names::new([("a", [], false), ("b", [], true)]);
        assert_eq!((table.find(""), table.find("x")), (Some(1), None));
    }
}
