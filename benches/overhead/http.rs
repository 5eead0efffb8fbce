//! As much of HTTP/1.1 as the two ends of this bench need: whole messages, one after the other.

/// Bytes up to and with the blank line after the headers, once it is here.
pub(crate) fn head_bytes(message: &[u8]) -> Option<usize> {
    message.windows(4).position(|four| four == b"\r\n\r\n").map(|at| at + 4)
}

/// The value of `content-length`; `None` for a chunked body.
pub(crate) fn content_length(head: &[u8]) -> Option<usize> {
    const NAME: &[u8] = b"content-length:";
    let line = head
        .split(|byte| *byte == b'\n')
        .find(|line| line.get(..NAME.len()).is_some_and(|name| name.eq_ignore_ascii_case(NAME)))?;
    str::from_utf8(line.get(NAME.len()..)?).ok()?.trim().parse().ok()
}
