//! The key–value part of a GGUF file, with typed getters.

use std::ops::Range;

use bytes::Bytes;

use super::cursor::{Cursor, Place};
use super::value::{Array, Value, ValueType};
use super::{GgufError, names};

/// Most keys accepted; real files have some dozens.
const MAX_KEYS: u64 = 1 << 16;
/// Longest key that the format allows, in bytes.
const MAX_KEY_BYTES: usize = (1 << 16) - 1;
/// Fewest bytes of an entry: length of the key, key, type, value.
const ENTRY_BYTES_MIN: u64 = 8 + 1 + 4 + 1;

/// All metadata of a file.
///
/// Opening a file checks every value's extent, but copies none: strings and arrays are read from
/// the mapped file when they are asked for. `get_…` returns `None` for a key that is not there,
/// `require_…` an error; both refuse a value of another type. Integers of any width are accepted
/// wherever the value fits.
#[derive(Debug, Clone)]
pub struct Metadata {
    file: Bytes,
    entries: Vec<Entry>,
    /// Indices into `entries`, ordered by key.
    by_key: Vec<u32>,
}

#[derive(Debug, Clone)]
struct Entry {
    key: String,
    value_type: ValueType,
    /// Where the value lies in the file.
    range: Range<usize>,
}

impl Metadata {
    /// Reads `n_keys` entries; `cursor` stands at the first one in `file`.
    pub(super) fn read(
        file: &Bytes,
        cursor: &mut Cursor<'_>,
        n_keys: u64,
    ) -> Result<Metadata, GgufError> {
        let limit = MAX_KEYS.min(cursor.left() as u64 / ENTRY_BYTES_MIN);
        if n_keys > limit {
            return Err(GgufError::Count {
                what: "metadata keys",
                count: n_keys,
                limit,
            });
        }
        let mut entries = Vec::new();
        for index in 0..n_keys {
            let place = Place::Key(index);
            let key = names::checked(cursor.string(place)?, MAX_KEY_BYTES, place)?;
            let id = cursor.u32(place)?;
            let value_type = ValueType::from_id(id).ok_or_else(|| GgufError::UnknownValueType {
                key: key.to_owned(),
                id,
            })?;
            let start = cursor.position();
            Value::read(cursor, value_type, key)?;
            let range = start..cursor.position();
            entries.push(Entry {
                key: key.to_owned(),
                value_type,
                range,
            });
        }
        let by_key =
            names::sorted(&entries, |entry| &entry.key).map_err(|key| GgufError::DuplicateKey {
                key: key.to_owned(),
            })?;
        Ok(Metadata {
            file: file.clone(),
            entries,
            by_key,
        })
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no keys.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether `key` is there.
    pub fn contains(&self, key: &str) -> bool {
        self.find(key).is_some()
    }

    /// Keys and values in the order of the file.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Value<'_>)> {
        self.entries
            .iter()
            .filter_map(|entry| Some((entry.key.as_str(), self.value(entry)?)))
    }

    /// Keys with their types and encoded values, for copying into another file, and for hashes.
    pub(crate) fn encoded(&self) -> impl Iterator<Item = (&str, ValueType, Bytes)> {
        self.entries.iter().map(|entry| {
            (
                entry.key.as_str(),
                entry.value_type,
                self.file.slice(entry.range.clone()),
            )
        })
    }

    /// The value of `key`, whatever its type.
    pub fn get(&self, key: &str) -> Option<Value<'_>> {
        self.value(self.find(key)?)
    }

    fn find(&self, key: &str) -> Option<&Entry> {
        names::find(&self.entries, &self.by_key, |entry| &entry.key, key)
    }

    fn value<'a>(&'a self, entry: &'a Entry) -> Option<Value<'a>> {
        let bytes = self.file.get(entry.range.clone())?;
        // The value was checked when the file was opened, so this never fails.
        Value::reread(bytes, entry.value_type, &entry.key).ok()
    }

    /// The value of `key` as `u32`, if it is there.
    ///
    /// # Errors
    /// It is no integer, or does not fit.
    pub fn get_u32(&self, key: &str) -> Result<Option<u32>, GgufError> {
        self.integer(key, "u32")
    }

    /// The value of `key` as `i32`, if it is there.
    ///
    /// # Errors
    /// It is no integer, or does not fit.
    pub fn get_i32(&self, key: &str) -> Result<Option<i32>, GgufError> {
        self.integer(key, "i32")
    }

    /// The value of `key` as `u64`, if it is there.
    ///
    /// # Errors
    /// It is no integer, or does not fit.
    pub fn get_u64(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.integer(key, "u64")
    }

    /// The value of `key` as `usize`, if it is there.
    ///
    /// # Errors
    /// It is no integer, or does not fit.
    pub fn get_usize(&self, key: &str) -> Result<Option<usize>, GgufError> {
        self.integer(key, "usize")
    }

    /// The value of `key` as `f32`, if it is there; `f64` is rounded.
    ///
    /// # Errors
    /// It is no floating-point number.
    pub fn get_f32(&self, key: &str) -> Result<Option<f32>, GgufError> {
        self.typed(key, "f32", |value| value.as_f32())
    }

    /// The value of `key` as `bool`, if it is there.
    ///
    /// # Errors
    /// It is no bool.
    pub fn get_bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "bool", |value| match value {
            Value::Bool(value) => Some(value),
            _ => None,
        })
    }

    /// The value of `key` as text, if it is there.
    ///
    /// # Errors
    /// It is no string, or not UTF-8.
    pub fn get_str(&self, key: &str) -> Result<Option<&str>, GgufError> {
        let bytes = self.typed(key, "str", |value| match value {
            Value::Str(bytes) => Some(bytes),
            _ => None,
        })?;
        bytes
            .map(std::str::from_utf8)
            .transpose()
            .map_err(|_| GgufError::BadValue {
                key: key.to_owned(),
                problem: "the string is not valid UTF-8".to_owned(),
            })
    }

    /// The array of `key`, if it is there.
    ///
    /// # Errors
    /// It is no array.
    pub fn get_array(&self, key: &str) -> Result<Option<Array<'_>>, GgufError> {
        self.typed(key, "array", |value| match value {
            Value::Array(array) => Some(array),
            _ => None,
        })
    }

    /// The value of `key` as `u32`.
    ///
    /// # Errors
    /// As [`get_u32`](Metadata::get_u32), and [`GgufError::MissingKey`].
    pub fn require_u32(&self, key: &str) -> Result<u32, GgufError> {
        self.get_u32(key)?.ok_or_else(|| missing(key))
    }

    /// The value of `key` as `u64`.
    ///
    /// # Errors
    /// As [`get_u64`](Metadata::get_u64), and [`GgufError::MissingKey`].
    pub fn require_u64(&self, key: &str) -> Result<u64, GgufError> {
        self.get_u64(key)?.ok_or_else(|| missing(key))
    }

    /// The value of `key` as `usize`.
    ///
    /// # Errors
    /// As [`get_usize`](Metadata::get_usize), and [`GgufError::MissingKey`].
    pub fn require_usize(&self, key: &str) -> Result<usize, GgufError> {
        self.get_usize(key)?.ok_or_else(|| missing(key))
    }

    /// The value of `key` as `f32`.
    ///
    /// # Errors
    /// As [`get_f32`](Metadata::get_f32), and [`GgufError::MissingKey`].
    pub fn require_f32(&self, key: &str) -> Result<f32, GgufError> {
        self.get_f32(key)?.ok_or_else(|| missing(key))
    }

    /// The value of `key` as text.
    ///
    /// # Errors
    /// As [`get_str`](Metadata::get_str), and [`GgufError::MissingKey`].
    pub fn require_str(&self, key: &str) -> Result<&str, GgufError> {
        self.get_str(key)?.ok_or_else(|| missing(key))
    }

    /// The array of `key`.
    ///
    /// # Errors
    /// As [`get_array`](Metadata::get_array), and [`GgufError::MissingKey`].
    pub fn require_array(&self, key: &str) -> Result<Array<'_>, GgufError> {
        self.get_array(key)?.ok_or_else(|| missing(key))
    }

    fn integer<T: TryFrom<i128>>(
        &self,
        key: &str,
        expected: &'static str,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.typed(key, expected, |value| value.as_integer())? else {
            return Ok(None);
        };
        let out_of_range = |_| GgufError::OutOfRange {
            key: key.to_owned(),
            value,
            expected,
        };
        T::try_from(value).map(Some).map_err(out_of_range)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        convert: impl Fn(Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        convert(value)
            .map(Some)
            .ok_or_else(|| GgufError::WrongValueType {
                key: key.to_owned(),
                found: value.type_name(),
                expected,
            })
    }
}

fn missing(key: &str) -> GgufError {
    GgufError::MissingKey {
        key: key.to_owned(),
    }
}
