//! Finds the `usage` of a whole answer while its chunks pass by, without keeping the answer.
//!
//! Follows just enough of JSON to know which member of the outermost object it is in, wherever the chunks are cut: what
//! strings and brackets enclose. It does not check the rest, which is the engine's. Memory is constant: the value of
//! `usage`, up to [`USAGE_BYTES_MAX`].
//!
//! Most answers are one piece, and their usage is near the end: [`of_whole`] begins there and reads a fifth as much.

use memchr::{memchr2, memmem};

use crate::stream::Usage;
use crate::strings::unstrung;

/// A longer value is not read. Engines write 60 to 400 bytes.
pub const USAGE_BYTES_MAX: usize = 4096;

/// The key as engines write it; none writes it with escapes.
const KEY: &[u8] = b"usage";

/// The tap on one answer.
#[derive(Debug, Default)]
pub struct Tap {
    /// Objects and arrays that enclose the next byte.
    depth: usize,
    string: InString,
    member: Member,
    /// The value of `usage` so far, while in it.
    value: Option<Vec<u8>>,
    usage: Option<Usage>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum InString {
    #[default]
    No,
    Yes,
    /// After a backslash.
    Escape,
}

/// Where in a member of the outermost object the next byte is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Member {
    /// Before its key.
    #[default]
    Start,
    /// In its key, of which so many bytes are those of [`KEY`]; None if one differs.
    Key(Option<usize>),
    /// After its key, which is [`KEY`] or another.
    Value(bool),
}

/// What [`Tap`] would find in an answer that is here as a whole.
#[must_use]
pub fn of_whole(answer: &[u8]) -> Option<Usage> {
    let (mut seen_from, mut depth) = (answer.len(), 0);
    memmem::rfind_iter(answer, br#""usage""#).find_map(|at| {
        let (before, rest) = answer.split_at_checked(at)?;
        let value = rest.get(KEY.len() + 2..)?.trim_ascii_start().strip_prefix(b":")?;
        if before.ends_with(b"\\") {
            return None; // within a string, as it is where a backslash precedes its last quote
        }
        // A member of the outermost object: what follows closes one more bracket than it opens.
        depth += unstrung(answer.get(at..seen_from)?).map(|(_, byte)| opens(byte)).sum::<isize>();
        seen_from = at;
        let value = if depth == -1 { first_value(value)? } else { return None };
        Usage::read(value)
    })
}

/// The value that begins here, if it is not too long.
fn first_value(bytes: &[u8]) -> Option<&[u8]> {
    let bytes = bytes.get(..=USAGE_BYTES_MAX).unwrap_or(bytes);
    let mut depth = 0;
    let end = unstrung(bytes).find(|(_, byte)| {
        depth += opens(*byte);
        depth < 0 || (depth == 0 && *byte == b',')
    });
    bytes.get(..end?.0)
}

/// One more or one less bracket around what follows.
fn opens(byte: u8) -> isize {
    match byte {
        b'{' | b'[' => 1,
        b'}' | b']' => -1,
        _ => 0,
    }
}

impl Tap {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Looks at the next bytes of the answer.
    pub fn feed(&mut self, mut chunk: &[u8]) {
        while !chunk.is_empty() {
            if self.depth > 1 {
                let (inner, rest) = chunk.split_at_checked(self.pass_inner(chunk)).unwrap_or((chunk, &[]));
                self.keep(inner);
                chunk = rest;
                continue;
            }
            let (before, mark, rest) = match self.string {
                InString::No => split(chunk, chunk.iter().position(|b| nests(*b) || matches!(b, b',' | b':'))),
                InString::Yes => split(chunk, memchr2(b'"', b'\\', chunk)),
                InString::Escape => split(chunk, Some(0)),
            };
            chunk = rest;
            if let Member::Key(Some(matched)) = self.member {
                self.member = Member::Key(matches_key(matched, before));
            }
            self.keep(before);
            let Some(mark) = mark else { return };
            self.keep(&[mark]);
            match self.string {
                InString::No => self.outside(mark),
                InString::Yes => self.inside(mark),
                InString::Escape => self.string = InString::Yes,
            }
        }
    }

    /// The usage, if the answer was a JSON object with a `usage` of fair length. The last one counts.
    #[must_use]
    pub fn finish(self) -> Option<Usage> {
        self.usage
    }

    /// Follows what is inside of a member, until the next byte is of the outermost value again: so many bytes.
    fn pass_inner(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
            let length = match self.string {
                InString::No => rest.iter().position(|byte| nests(*byte)),
                InString::Yes => memchr2(b'"', b'\\', rest),
                InString::Escape => Some(0),
            };
            let Some(mark) = length.and_then(|length| rest.get(length)) else { return bytes.len() };
            at += length.unwrap_or(0) + 1;
            match (self.string, mark) {
                (InString::No, b'"') | (InString::Escape, _) => self.string = InString::Yes,
                (InString::Yes, b'"') => self.string = InString::No,
                (InString::Yes, _) => self.string = InString::Escape,
                (InString::No, b'{' | b'[') => self.depth += 1,
                (InString::No, _) => self.depth -= 1,
            }
            if self.depth == 1 {
                break;
            }
        }
        at
    }

    fn outside(&mut self, mark: u8) {
        match mark {
            b'"' => {
                self.string = InString::Yes;
                if self.depth == 1 && self.member == Member::Start {
                    self.member = Member::Key(Some(0));
                }
            }
            b'{' | b'[' => {
                self.depth += 1;
                if self.depth == 1 {
                    self.member = Member::Start;
                }
            }
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                if self.depth == 0 {
                    self.end_member();
                }
            }
            b',' if self.depth == 1 => self.end_member(),
            b':' if self.member == Member::Value(true) && self.depth == 1 => self.value = Some(Vec::new()),
            _ => {}
        }
    }

    fn inside(&mut self, mark: u8) {
        let escape = mark == b'\\';
        self.string = if escape { InString::Escape } else { InString::No };
        if let Member::Key(matched) = self.member {
            let whole = matched == Some(KEY.len());
            self.member = if escape { Member::Key(None) } else { Member::Value(whole) };
        }
    }

    /// Adds to the value of `usage`, if in it.
    fn keep(&mut self, bytes: &[u8]) {
        let Some(value) = &mut self.value else { return };
        if value.len() + bytes.len() > USAGE_BYTES_MAX {
            self.value = None;
        } else {
            value.extend_from_slice(bytes);
        }
    }

    /// At the comma or bracket after a member, which was kept with it.
    fn end_member(&mut self) {
        self.member = Member::Start;
        if let Some(mut value) = self.value.take() {
            value.pop();
            self.usage = Usage::read(&value).or(self.usage);
        }
    }
}

/// How far [`KEY`] goes once `bytes` follow the `matched` first of it.
fn matches_key(matched: usize, bytes: &[u8]) -> Option<usize> {
    KEY.get(matched..)?.starts_with(bytes).then_some(matched + bytes.len())
}

/// What stands before, at and after `at`.
fn split(bytes: &[u8], at: Option<usize>) -> (&[u8], Option<u8>, &[u8]) {
    at.and_then(|at| {
        let (before, rest) = bytes.split_at_checked(at)?;
        let (mark, rest) = rest.split_first()?;
        Some((before, Some(*mark), rest))
    })
    .unwrap_or((bytes, None, &[]))
}

/// Opens or closes something.
fn nests(byte: u8) -> bool {
    matches!(byte, b'"' | b'{' | b'}' | b'[' | b']')
}

#[cfg(test)]
mod tests;
