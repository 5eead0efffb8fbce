//! W3C trace context: which trace a request belongs to, as `traceparent` says it (Trace Context, level 1).

use std::fmt;

/// A position in a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceParent {
    /// Never zero.
    pub trace: u128,
    /// Never zero.
    pub span: u64,
    /// Whether who came before records it.
    pub is_sampled: bool,
}

const SAMPLED: u8 = 1;

impl TraceParent {
    /// Reads a header's value; `None` where the standard says to begin a new trace.
    #[must_use]
    pub fn read(header: &[u8]) -> Option<Self> {
        let header = std::str::from_utf8(header).ok()?;
        let mut parts = header.splitn(5, '-');
        let version = hexadecimal(parts.next()?, 2)?;
        let trace = hexadecimal(parts.next()?, 32)?;
        let span = hexadecimal(parts.next()?, 16)?;
        let flags = hexadecimal(parts.next()?, 2)?;
        // Later versions may say more behind it, version 0 may not, and 0xff is none.
        let is_known = version != 0xff && (version > 0 || parts.next().is_none());
        let span = u64::try_from(span).ok()?;
        let is_sampled = u8::try_from(flags).ok()? & SAMPLED != 0;
        (is_known && trace != 0 && span != 0).then_some(Self { trace, span, is_sampled })
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace, self.span, u8::from(self.is_sampled))
    }
}

/// Lower case alone, as the standard has it.
fn hexadecimal(digits: &str, length: usize) -> Option<u128> {
    let is_lower = digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
    (digits.len() == length && is_lower).then(|| u128::from_str_radix(digits, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn what_is_read_is_written_again() {
        let parent = TraceParent::read(GOOD.as_bytes()).unwrap();
        assert_eq!(parent.trace, 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736);
        assert_eq!((parent.span, parent.is_sampled), (0x00f0_67aa_0ba9_02b7, true));
        assert_eq!(parent.to_string(), GOOD);
        let unsampled = GOOD.replace("-01", "-00");
        assert_eq!(TraceParent::read(unsampled.as_bytes()).unwrap().to_string(), unsampled);
        // A later version, with more behind it, and flags that nobody knows yet.
        let later = TraceParent::read(format!("cc{}-what-ever", GOOD[2..].replace("-01", "-09")).as_bytes());
        assert_eq!(later, Some(parent));
    }

    #[test]
    fn what_is_not_one_begins_a_new_trace() {
        for bad in [
            "",
            "00",
            &GOOD[..54],
            &format!("{GOOD}-more"),
            &format!("{GOOD} "),
            &format!("ff{}", &GOOD[2..]),
            &GOOD.to_uppercase(),
            &GOOD.replace("4bf92f3577b34da6a3ce929d0e0e4736", "00000000000000000000000000000000"),
            &GOOD.replace("00f067aa0ba902b7", "0000000000000000"),
            &GOOD.replace("00f067aa0ba902b7", "00f067aa0ba902b"),
            &GOOD.replace("00f067aa0ba902b7", "+0f067aa0ba902b7"),
            &GOOD.replace('-', "_"),
        ] {
            assert_eq!(TraceParent::read(bad.as_bytes()), None, "{bad:?}");
        }
        assert_eq!(TraceParent::read(b"\xff\xfe"), None);
    }
}
