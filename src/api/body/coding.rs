//! Content codings of a request's body: what clients compress with, undone within bounds.

use std::io::{self, Read};

use bytes::Bytes;
use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use ruzstd::decoding::StreamingDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};

/// What is said to a client that sent another one.
pub(in crate::api) const ACCEPTED: &str = "gzip, deflate, zstd";
/// The most that a decoder of HTTP's `zstd` must be able to look back (RFC 9659), and so its memory.
pub(in crate::api) const ZSTD_WINDOW_MAX: u64 = 8 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::api) enum Coding {
    Gzip,
    Deflate,
    Zstd,
}

impl Coding {
    /// By its name in `content-encoding`. Several at once are none that we know.
    pub(super) fn named(name: &[u8]) -> Option<Self> {
        let is = |known: &[u8]| name.trim_ascii().eq_ignore_ascii_case(known);
        match () {
            () if is(b"gzip") || is(b"x-gzip") => Some(Self::Gzip),
            () if is(b"deflate") => Some(Self::Deflate),
            () if is(b"zstd") => Some(Self::Zstd),
            () => None,
        }
    }

    pub(in crate::api) fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Deflate => "deflate",
            Self::Zstd => "zstd",
        }
    }

    /// The body as it was; `None` when it is longer than `bytes_max`, of which no more than that was made.
    ///
    /// # Errors
    /// When the body is not what its coding says, breaks off, or would take too much memory to decode.
    pub(super) fn decode(self, body: &[u8], bytes_max: usize) -> Result<Option<Bytes>, Undecodable> {
        let mut plain = Vec::new();
        match self {
            Self::Gzip => fill(MultiGzDecoder::new(body), &mut plain, bytes_max)?,
            Self::Deflate if is_zlib(body) => fill(ZlibDecoder::new(body), &mut plain, bytes_max)?,
            Self::Deflate => fill(DeflateDecoder::new(body), &mut plain, bytes_max)?,
            Self::Zstd => {
                let mut left = body;
                while !left.is_empty() && plain.len() <= bytes_max {
                    match StreamingDecoder::new_with_max_window_size(&mut left, ZSTD_WINDOW_MAX) {
                        Ok(frame) => fill(frame, &mut plain, bytes_max)?,
                        // Somebody else's notes between the frames (RFC 8878, 3.1.2).
                        Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                            length,
                            ..
                        })) => left = left.get(length as usize..).ok_or(Undecodable::Invalid)?,
                        Err(FrameDecoderError::WindowSizeTooBig { .. }) => return Err(Undecodable::Window),
                        Err(_) => return Err(Undecodable::Invalid),
                    }
                }
            }
        }
        Ok((plain.len() <= bytes_max).then(|| plain.into()))
    }
}

/// Why a body cannot be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::api) enum Undecodable {
    Invalid,
    /// Its decoder would have to look back further than any of HTTP's need.
    Window,
}

impl From<io::Error> for Undecodable {
    fn from(_: io::Error) -> Self {
        Self::Invalid
    }
}

/// Up to one byte more than `bytes_max`.
fn fill(from: impl Read, plain: &mut Vec<u8>, bytes_max: usize) -> io::Result<()> {
    let room = (bytes_max + 1).saturating_sub(plain.len());
    from.take(room as u64).read_to_end(plain).map(|_| ())
}

/// `deflate` is zlib's format (RFC 9110, 8.4.1.2), but some clients send it without the two bytes in front.
fn is_zlib(body: &[u8]) -> bool {
    matches!(body, [method, flags, ..] if method & 0x0f == 8 && u16::from_be_bytes([*method, *flags]) % 31 == 0)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;

    /// Every way in which a body may come, with its name.
    fn encoded(plain: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
        let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
        let mut zlib = ZlibEncoder::new(Vec::new(), Compression::best());
        let mut raw = DeflateEncoder::new(Vec::new(), Compression::best());
        gzip.write_all(plain).unwrap();
        zlib.write_all(plain).unwrap();
        raw.write_all(plain).unwrap();
        vec![
            ("gzip", gzip.finish().unwrap()),
            ("deflate", zlib.finish().unwrap()),
            ("deflate", raw.finish().unwrap()),
            ("zstd", compress_to_vec(plain, CompressionLevel::Fastest)),
        ]
    }

    #[test]
    fn what_was_encoded_is_decoded() {
        for plain in [&b""[..], b"{}", &b"the water is let in ".repeat(50_000)] {
            for (name, body) in encoded(plain) {
                let coding = Coding::named(name.as_bytes()).unwrap();
                assert_eq!(coding.decode(&body, plain.len()).unwrap().unwrap(), plain, "{name}");
                if plain.len() > 2 {
                    assert_eq!(coding.decode(&body, plain.len() - 1).unwrap(), None, "{name} one byte too long");
                    for cut in [1, body.len() / 2, body.len() - 1] {
                        let cut = coding.decode(&body[..cut], plain.len());
                        assert!(!matches!(cut, Ok(Some(all)) if all == plain), "{name} cut");
                    }
                    assert!(!matches!(coding.decode(plain, plain.len()), Ok(Some(_))), "{name} of plain text");
                }
            }
        }
    }

    #[test]
    fn several_members_and_frames_are_one_body() {
        for (name, body) in encoded(b"one two ") {
            let twice = [&body[..], &body].concat();
            let decoded = Coding::named(name.as_bytes()).unwrap().decode(&twice, 100);
            if name != "deflate" {
                assert_eq!(decoded.unwrap().unwrap(), &b"one two one two "[..], "{name}");
            }
        }
    }

    /// A thousandth of what it becomes.
    #[test]
    fn a_bomb_is_made_no_larger_than_what_is_taken() {
        for (name, body) in encoded(&vec![b' '; 16 << 20]) {
            assert!(body.len() < 1 << 17, "{name}: {}", body.len());
            assert_eq!(Coding::named(name.as_bytes()).unwrap().decode(&body, 1 << 20).unwrap(), None, "{name}");
        }
        // A frame whose head asks for a window of a gigabyte.
        let greedy = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 20 << 3, 0x01, 0x00, 0x00];
        assert_eq!(Coding::Zstd.decode(&greedy, 1 << 20), Err(Undecodable::Window));
    }

    #[test]
    fn frames_that_are_to_be_skipped_are() {
        let frame = compress_to_vec(&b"{}"[..], CompressionLevel::Fastest);
        let note = |length: u8| [0x5f, 0x2a, 0x4d, 0x18, length, 0, 0, 0, b'h', b'i'];
        let body = [&note(2)[..], &frame, &note(2)].concat();
        assert_eq!(Coding::Zstd.decode(&body, 10).unwrap().unwrap(), &b"{}"[..]);
        assert_eq!(Coding::Zstd.decode(&[&frame[..], &note(3)].concat(), 10), Err(Undecodable::Invalid));
    }

    #[test]
    fn names() {
        for (name, coding) in [
            ("gzip", Some(Coding::Gzip)),
            (" X-GZip ", Some(Coding::Gzip)),
            ("Deflate", Some(Coding::Deflate)),
            ("zstd", Some(Coding::Zstd)),
            ("br", None),
            ("gzip, gzip", None),
            ("", None),
        ] {
            assert_eq!(Coding::named(name.as_bytes()), coding, "{name:?}");
        }
    }
}
