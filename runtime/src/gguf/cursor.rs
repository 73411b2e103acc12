//! Bounds-checked reading of little-endian values from the head of a file.

use std::fmt;

use super::GgufError;

/// What is being read, for messages.
#[derive(Clone, Copy)]
pub(super) enum Place<'a> {
    /// Magic, version and counts.
    Header,
    /// Name or type of the metadata entry with this index.
    Key(u64),
    /// Value of this metadata key.
    Value(&'a str),
    /// Name of the tensor with this index.
    TensorName(u64),
    /// Description of this tensor.
    Tensor(&'a str),
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Header => f.write_str("the header"),
            Place::Key(index) => write!(f, "metadata entry {index}"),
            Place::Value(key) => write!(f, "the value of metadata key {key:?}"),
            Place::TensorName(index) => write!(f, "the name of tensor {index}"),
            Place::Tensor(name) => write!(f, "the description of tensor {name:?}"),
        }
    }
}

/// A position in a file's bytes; every step is checked against the end.
#[derive(Clone)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Cursor<'a> {
        Cursor { bytes, position: 0 }
    }

    /// Offset of the next byte.
    pub(super) fn position(&self) -> usize {
        self.position
    }

    /// Bytes from here to the end.
    pub(super) fn left(&self) -> usize {
        self.bytes.len() - self.position
    }

    /// The next `count` bytes.
    pub(super) fn take(&mut self, count: u64, place: Place<'_>) -> Result<&'a [u8], GgufError> {
        let rest = &self.bytes[self.position..];
        match usize::try_from(count)
            .ok()
            .and_then(|count| rest.get(..count))
        {
            Some(taken) => {
                self.position += taken.len();
                Ok(taken)
            }
            None => Err(self.cut_off(count, place)),
        }
    }

    #[cold]
    fn cut_off(&self, wanted: u64, place: Place<'_>) -> GgufError {
        GgufError::HeaderCutOff {
            place: place.to_string(),
            offset: self.position,
            wanted,
            left: self.left(),
        }
    }

    fn array<const N: usize>(&mut self, place: Place<'_>) -> Result<[u8; N], GgufError> {
        let taken = self.take(N as u64, place)?;
        let mut value = [0; N];
        value.copy_from_slice(taken);
        Ok(value)
    }

    pub(super) fn u8(&mut self, place: Place<'_>) -> Result<u8, GgufError> {
        self.array::<1>(place).map(|[byte]| byte)
    }

    pub(super) fn u16(&mut self, place: Place<'_>) -> Result<u16, GgufError> {
        self.array(place).map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self, place: Place<'_>) -> Result<u32, GgufError> {
        self.array(place).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, place: Place<'_>) -> Result<u64, GgufError> {
        self.array(place).map(u64::from_le_bytes)
    }

    /// A length (u64) and that many bytes.
    pub(super) fn string(&mut self, place: Place<'_>) -> Result<&'a [u8], GgufError> {
        let count = self.u64(place)?;
        self.take(count, place)
    }
}
