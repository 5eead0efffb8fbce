//! Reading MessagePack, value by value, without building anything.
//!
//! Invariants: every length is held against the bytes that are left, so that nothing is allocated for what is not there;
//! skipping does not recurse, however deep the values are nested.
//!
//! Format: the MessagePack specification (github.com/msgpack/msgpack, `spec.md`).

/// Bytes that are not MessagePack, or not what was expected there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not the MessagePack that was expected")]
pub struct Malformed;

/// One value; of a container only its length, the elements follow.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Value<'a> {
    Nil,
    Bool(bool),
    Unsigned(u64),
    /// Below zero.
    Negative(i64),
    Float(f64),
    Text(&'a [u8]),
    Bytes(&'a [u8]),
    /// Elements.
    Array(usize),
    /// Pairs of key and value.
    Map(usize),
    Extension,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub(crate) fn next(&mut self) -> Result<Value<'a>, Malformed> {
        let [marker] = self.fixed()?;
        Ok(match marker {
            0x00..=0x7f => Value::Unsigned(marker.into()),
            0x80..=0x8f => self.map(usize::from(marker & 0x0f))?,
            0x90..=0x9f => self.array(usize::from(marker & 0x0f))?,
            0xa0..=0xbf => Value::Text(self.take(usize::from(marker & 0x1f))?),
            0xc0 => Value::Nil,
            0xc1 => return Err(Malformed),
            0xc2 | 0xc3 => Value::Bool(marker == 0xc3),
            0xc4..=0xc6 => Value::Bytes(self.sized(marker - 0xc4)?),
            0xc7..=0xc9 => {
                let length = self.length(marker - 0xc7)?;
                self.extension(length)?
            }
            0xca => Value::Float(f32::from_be_bytes(self.fixed()?).into()),
            0xcb => Value::Float(f64::from_be_bytes(self.fixed()?)),
            0xcc => Value::Unsigned(u8::from_be_bytes(self.fixed()?).into()),
            0xcd => Value::Unsigned(u16::from_be_bytes(self.fixed()?).into()),
            0xce => Value::Unsigned(u32::from_be_bytes(self.fixed()?).into()),
            0xcf => Value::Unsigned(u64::from_be_bytes(self.fixed()?)),
            0xd0 => signed(i8::from_be_bytes(self.fixed()?).into()),
            0xd1 => signed(i16::from_be_bytes(self.fixed()?).into()),
            0xd2 => signed(i32::from_be_bytes(self.fixed()?).into()),
            0xd3 => signed(i64::from_be_bytes(self.fixed()?)),
            0xd4..=0xd8 => self.extension(1 << (marker - 0xd4))?,
            0xd9..=0xdb => Value::Text(self.sized(marker - 0xd9)?),
            0xdc | 0xdd => {
                let length = self.length(marker - 0xdb)?;
                self.array(length)?
            }
            0xde | 0xdf => {
                let length = self.length(marker - 0xdd)?;
                self.map(length)?
            }
            0xe0..=0xff => signed(i64::from(i8::from_be_bytes([marker]))),
        })
    }

    /// Passes over one value with all that is in it.
    pub(crate) fn skip(&mut self) -> Result<(), Malformed> {
        let mut left = 1_usize;
        while left > 0 {
            left = left - 1
                + match self.next()? {
                    Value::Array(length) => length,
                    Value::Map(length) => length.saturating_mul(2),
                    _ => 0,
                };
        }
        Ok(())
    }

    /// The length of an array; `None` for nil.
    pub(crate) fn array_or_nil(&mut self) -> Result<Option<usize>, Malformed> {
        match self.next()? {
            Value::Array(length) => Ok(Some(length)),
            Value::Nil => Ok(None),
            _ => Err(Malformed),
        }
    }

    /// A text; `None` for nil. What is not UTF-8 in it is replaced.
    pub(crate) fn text_or_nil(&mut self) -> Result<Option<String>, Malformed> {
        match self.next()? {
            Value::Text(text) => Ok(Some(String::from_utf8_lossy(text).into_owned())),
            Value::Nil => Ok(None),
            _ => Err(Malformed),
        }
    }

    pub(crate) fn unsigned(&mut self) -> Result<u64, Malformed> {
        match self.next()? {
            Value::Unsigned(number) => Ok(number),
            _ => Err(Malformed),
        }
    }

    /// An array of so many elements, each of which is at least one byte.
    fn array(&self, length: usize) -> Result<Value<'a>, Malformed> {
        if length <= self.rest.len() { Ok(Value::Array(length)) } else { Err(Malformed) }
    }

    fn map(&self, length: usize) -> Result<Value<'a>, Malformed> {
        if length <= self.rest.len() / 2 { Ok(Value::Map(length)) } else { Err(Malformed) }
    }

    fn extension(&mut self, length: usize) -> Result<Value<'a>, Malformed> {
        let [_kind] = self.fixed()?;
        self.take(length).map(|_| Value::Extension)
    }

    /// A length of 1, 2 or 4 bytes: `size` is the binary logarithm of that.
    fn length(&mut self, size: u8) -> Result<usize, Malformed> {
        let length = match size {
            0 => u8::from_be_bytes(self.fixed()?).into(),
            1 => u16::from_be_bytes(self.fixed()?).into(),
            _ => u32::from_be_bytes(self.fixed()?),
        };
        usize::try_from(length).map_err(|_| Malformed)
    }

    fn sized(&mut self, size: u8) -> Result<&'a [u8], Malformed> {
        let length = self.length(size)?;
        self.take(length)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.rest.split_at_checked(length).ok_or(Malformed)?;
        self.rest = rest;
        Ok(taken)
    }

    fn fixed<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(Malformed)?;
        self.rest = rest;
        Ok(*taken)
    }
}

fn signed<'a>(number: i64) -> Value<'a> {
    u64::try_from(number).map_or(Value::Negative(number), Value::Unsigned)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(bytes: &[u8]) -> Result<Value<'_>, Malformed> {
        Reader::new(bytes).next()
    }

    #[test]
    fn every_marker() {
        let long = |head: &[u8], length: usize| [head, &vec![7; length]].concat();
        for (bytes, value) in [
            (vec![0x7f], Value::Unsigned(127)),
            (vec![0xe0], Value::Negative(-32)),
            (vec![0xc0], Value::Nil),
            (vec![0xc3], Value::Bool(true)),
            (vec![0xcc, 200], Value::Unsigned(200)),
            (vec![0xcd, 1, 0], Value::Unsigned(256)),
            (vec![0xce, 1, 0, 0, 0], Value::Unsigned(1 << 24)),
            (vec![0xcf, 255, 255, 255, 255, 255, 255, 255, 255], Value::Unsigned(u64::MAX)),
            (vec![0xd0, 0xff], Value::Negative(-1)),
            (vec![0xd0, 5], Value::Unsigned(5)),
            (vec![0xd1, 0xff, 0], Value::Negative(-256)),
            (vec![0xd3, 0x80, 0, 0, 0, 0, 0, 0, 0], Value::Negative(i64::MIN)),
            (vec![0xca, 0x3f, 0xc0, 0, 0], Value::Float(1.5)),
            (vec![0xcb, 0x3f, 0xf8, 0, 0, 0, 0, 0, 0], Value::Float(1.5)),
            (vec![0xa2, b'h', b'i'], Value::Text(b"hi")),
            (long(&[0xd9, 2], 2), Value::Text(&[7, 7])),
            (long(&[0xda, 1, 0], 256), Value::Text(&[7; 256])),
            (long(&[0xc4, 1], 1), Value::Bytes(&[7])),
            (long(&[0xc6, 0, 0, 0, 3], 3), Value::Bytes(&[7; 3])),
            (long(&[0x93], 3), Value::Array(3)),
            (long(&[0xdc, 0, 2], 2), Value::Array(2)),
            (long(&[0xdd, 0, 0, 0, 1], 1), Value::Array(1)),
            (long(&[0x81], 2), Value::Map(1)),
            (long(&[0xde, 0, 1], 2), Value::Map(1)),
            (long(&[0xd6, 1], 4), Value::Extension),
            (long(&[0xc7, 3, 1], 3), Value::Extension),
        ] {
            assert_eq!(read(&bytes), Ok(value), "{bytes:x?}");
            let mut reader = Reader::new(&bytes);
            assert_eq!((reader.skip(), reader.is_empty()), (Ok(()), true), "{bytes:x?}");
        }
    }

    #[test]
    fn what_is_not_there_is_refused_before_it_is_allocated() {
        for bytes in [&[][..], &[0xc1], &[0xcd, 1], &[0xdd, 0xff, 0xff, 0xff, 0xff, 0], &[0xdf, 0, 0, 0, 1, 0], &[0xa1]]
        {
            assert_eq!(read(bytes), Err(Malformed), "{bytes:x?}");
        }
    }

    #[test]
    fn deep_nesting_is_skipped_without_recursion() {
        let mut deep = vec![0x91; 1 << 20];
        deep.push(0xc0);
        let mut reader = Reader::new(&deep);
        assert_eq!((reader.skip(), reader.is_empty()), (Ok(()), true));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut reader = Reader::new(&bytes);
            while !reader.is_empty() {
                if reader.skip().is_err() {
                    break;
                }
            }
        }
    }
}
