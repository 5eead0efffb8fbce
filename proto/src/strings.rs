//! Going over JSON from string to string, where it is known to be JSON and only its marks are looked for.

use memchr::memchr2;

/// The bytes that are outside of strings, and where.
pub(crate) fn unstrung(bytes: &[u8]) -> impl Iterator<Item = (usize, u8)> {
    let mut next = 0;
    std::iter::from_fn(move || {
        let at = next;
        let (byte, rest) = bytes.get(at..)?.split_first()?;
        next += 1 + if *byte == b'"' { string_length(rest) } else { 0 };
        Some((at, *byte))
    })
}

/// Bytes of a string behind its opening quote, the closing one included.
pub(crate) fn string_length(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Some(mark) = bytes.get(at..).and_then(|rest| memchr2(b'"', b'\\', rest)) {
        at += mark + 1;
        if bytes.get(at - 1) == Some(&b'"') {
            return at;
        }
        at += 1;
    }
    bytes.len()
}
