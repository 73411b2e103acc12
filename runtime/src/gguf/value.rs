//! Metadata values, read in place: strings and arrays stay where they are in the mapped file.

use std::fmt;

use super::GgufError;
use super::cursor::{Cursor, Place};

/// Arrays inside arrays inside arrays …: how deep a file may go.
const MAX_ARRAY_DEPTH: usize = 4;

/// Type of a metadata value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // the names are the format's
pub enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Str,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    /// All types, in the order of their ids.
    pub const ALL: [ValueType; 13] = [
        ValueType::U8,
        ValueType::I8,
        ValueType::U16,
        ValueType::I16,
        ValueType::U32,
        ValueType::I32,
        ValueType::F32,
        ValueType::Bool,
        ValueType::Str,
        ValueType::Array,
        ValueType::U64,
        ValueType::I64,
        ValueType::F64,
    ];

    /// The type with this id in the file.
    pub fn from_id(id: u32) -> Option<ValueType> {
        ValueType::ALL.get(usize::try_from(id).ok()?).copied()
    }

    /// The number that stands for this type in the file.
    pub fn id(self) -> u32 {
        self as u32
    }

    /// Name as in Rust: `u32`, `str`, `array`.
    pub fn name(self) -> &'static str {
        match self {
            ValueType::U8 => "u8",
            ValueType::I8 => "i8",
            ValueType::U16 => "u16",
            ValueType::I16 => "i16",
            ValueType::U32 => "u32",
            ValueType::I32 => "i32",
            ValueType::F32 => "f32",
            ValueType::Bool => "bool",
            ValueType::Str => "str",
            ValueType::Array => "array",
            ValueType::U64 => "u64",
            ValueType::I64 => "i64",
            ValueType::F64 => "f64",
        }
    }

    /// Fewest bytes that a value of this type takes; exact except for strings and arrays.
    pub(super) fn bytes_min(self) -> u64 {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => 1,
            ValueType::U16 | ValueType::I16 => 2,
            ValueType::U32 | ValueType::I32 | ValueType::F32 => 4,
            ValueType::U64 | ValueType::I64 | ValueType::F64 => 8,
            ValueType::Str => 8,
            ValueType::Array => 12,
        }
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A metadata value; strings and arrays borrow from the mapped file.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs)] // the names are the format's
pub enum Value<'a> {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    /// Bytes of a string as they are in the file, not yet checked to be UTF-8.
    Str(&'a [u8]),
    Array(Array<'a>),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl<'a> Value<'a> {
    /// The value's type.
    pub fn value_type(&self) -> ValueType {
        match self {
            Value::U8(_) => ValueType::U8,
            Value::I8(_) => ValueType::I8,
            Value::U16(_) => ValueType::U16,
            Value::I16(_) => ValueType::I16,
            Value::U32(_) => ValueType::U32,
            Value::I32(_) => ValueType::I32,
            Value::F32(_) => ValueType::F32,
            Value::Bool(_) => ValueType::Bool,
            Value::Str(_) => ValueType::Str,
            Value::Array(_) => ValueType::Array,
            Value::U64(_) => ValueType::U64,
            Value::I64(_) => ValueType::I64,
            Value::F64(_) => ValueType::F64,
        }
    }

    /// The type in words, with the element type of an array.
    pub fn type_name(&self) -> String {
        match self {
            Value::Array(array) => format!("array<{}>", array.element_type()),
            other => other.value_type().name().to_owned(),
        }
    }

    /// The number, if this is an integer of any width.
    pub fn as_integer(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(value) => value.into(),
            Value::I8(value) => value.into(),
            Value::U16(value) => value.into(),
            Value::I16(value) => value.into(),
            Value::U32(value) => value.into(),
            Value::I32(value) => value.into(),
            Value::U64(value) => value.into(),
            Value::I64(value) => value.into(),
            Value::F32(_) | Value::F64(_) | Value::Bool(_) | Value::Str(_) | Value::Array(_) => {
                return None;
            }
        })
    }

    /// The number, if this is a floating-point value; `f64` is rounded to `f32`.
    pub fn as_f32(&self) -> Option<f32> {
        match *self {
            Value::F32(value) => Some(value),
            Value::F64(value) => Some(value as f32),
            _ => None,
        }
    }

    /// Reads and checks a value of type `value_type`, however deep its arrays.
    pub(super) fn read(
        cursor: &mut Cursor<'a>,
        value_type: ValueType,
        key: &'a str,
    ) -> Result<Value<'a>, GgufError> {
        Value::read_at_depth(cursor, value_type, key, 0)
    }

    fn read_at_depth(
        cursor: &mut Cursor<'a>,
        value_type: ValueType,
        key: &'a str,
        depth: usize,
    ) -> Result<Value<'a>, GgufError> {
        let place = Place::Value(key);
        Ok(match value_type {
            ValueType::U8 => Value::U8(cursor.u8(place)?),
            ValueType::I8 => Value::I8(cursor.u8(place)? as i8),
            ValueType::U16 => Value::U16(cursor.u16(place)?),
            ValueType::I16 => Value::I16(cursor.u16(place)? as i16),
            ValueType::U32 => Value::U32(cursor.u32(place)?),
            ValueType::I32 => Value::I32(cursor.u32(place)? as i32),
            ValueType::U64 => Value::U64(cursor.u64(place)?),
            ValueType::I64 => Value::I64(cursor.u64(place)? as i64),
            ValueType::F32 => Value::F32(f32::from_bits(cursor.u32(place)?)),
            ValueType::F64 => Value::F64(f64::from_bits(cursor.u64(place)?)),
            ValueType::Bool => Value::Bool(checked_bool(cursor.u8(place)?, key)?),
            ValueType::Str => Value::Str(cursor.string(place)?),
            ValueType::Array => Value::Array(Array::read(cursor, key, depth)?),
        })
    }

    /// Decodes a value that [`Value::read`] has accepted and that fills `bytes`, without walking
    /// through an array again.
    pub(super) fn reread(
        bytes: &'a [u8],
        value_type: ValueType,
        key: &'a str,
    ) -> Result<Value<'a>, GgufError> {
        let mut cursor = Cursor::new(bytes);
        if value_type != ValueType::Array {
            return Value::read(&mut cursor, value_type, key);
        }
        let (element, len) = Array::read_head(&mut cursor, key)?;
        let payload = cursor.take(cursor.left() as u64, Place::Value(key))?;
        Ok(Value::Array(Array {
            key,
            element,
            len,
            payload,
        }))
    }
}

fn checked_bool(byte: u8, key: &str) -> Result<bool, GgufError> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(GgufError::BadValue {
            key: key.to_owned(),
            problem: format!("a bool is {other}, neither 0 nor 1"),
        }),
    }
}

/// An array of values of one type, still in the mapped file.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Array<'a> {
    key: &'a str,
    element: ValueType,
    len: usize,
    /// The elements one after another, checked to be `len` ones.
    payload: &'a [u8],
}

impl<'a> Array<'a> {
    /// Reads element type and length; the length is possible for the bytes that are left.
    fn read_head(cursor: &mut Cursor<'a>, key: &str) -> Result<(ValueType, usize), GgufError> {
        let place = Place::Value(key);
        let id = cursor.u32(place)?;
        let element = ValueType::from_id(id).ok_or_else(|| GgufError::UnknownValueType {
            key: key.to_owned(),
            id,
        })?;
        let len = cursor.u64(place)?;
        // Looks ahead without moving: refuses an impossible length before walking through it.
        let bytes_min = len.saturating_mul(element.bytes_min());
        cursor.clone().take(bytes_min, place)?;
        // `len` bytes are there, so `len` is a `usize`.
        Ok((element, usize::try_from(len).unwrap_or(usize::MAX)))
    }

    fn read(cursor: &mut Cursor<'a>, key: &'a str, depth: usize) -> Result<Array<'a>, GgufError> {
        if depth >= MAX_ARRAY_DEPTH {
            return Err(GgufError::BadValue {
                key: key.to_owned(),
                problem: format!("arrays nested deeper than {MAX_ARRAY_DEPTH}"),
            });
        }
        let (element, len) = Array::read_head(cursor, key)?;
        let mut ahead = cursor.clone();
        match element {
            ValueType::Str => {
                for _ in 0..len {
                    ahead.string(Place::Value(key))?;
                }
            }
            ValueType::Array => {
                for _ in 0..len {
                    Array::read(&mut ahead, key, depth + 1)?;
                }
            }
            fixed => {
                let items = ahead.take(len as u64 * fixed.bytes_min(), Place::Value(key))?;
                if fixed == ValueType::Bool {
                    items
                        .iter()
                        .try_for_each(|&byte| checked_bool(byte, key).map(drop))?;
                }
            }
        }
        let payload_bytes = ahead.position() - cursor.position();
        let payload = cursor.take(payload_bytes as u64, Place::Value(key))?;
        Ok(Array {
            key,
            element,
            len,
            payload,
        })
    }

    /// Type of the elements.
    pub fn element_type(&self) -> ValueType {
        self.element
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements in order.
    pub fn iter(&self) -> ArrayIter<'a> {
        ArrayIter {
            cursor: Cursor::new(self.payload),
            key: self.key,
            element: self.element,
            left: self.len,
        }
    }

    /// The elements as text, borrowed from the file.
    ///
    /// # Errors
    /// The elements are no strings, or one is not UTF-8.
    pub fn to_strs(&self) -> Result<Vec<&'a str>, GgufError> {
        let mut strs = Vec::with_capacity(self.len);
        for (index, bytes) in self.to_byte_strs()?.into_iter().enumerate() {
            let text = std::str::from_utf8(bytes).map_err(|_| GgufError::BadValue {
                key: self.key.to_owned(),
                problem: format!("string {index} of {} is not valid UTF-8", self.len),
            })?;
            strs.push(text);
        }
        Ok(strs)
    }

    /// The elements as the bytes of strings, which need not be UTF-8.
    ///
    /// # Errors
    /// The elements are no strings.
    pub fn to_byte_strs(&self) -> Result<Vec<&'a [u8]>, GgufError> {
        if self.element != ValueType::Str {
            return Err(self.wrong_type("array<str>"));
        }
        // Faster than through `iter`: vocabularies have 150,000 strings.
        let mut rest = self.payload;
        let mut next = || {
            let (len_bytes, tail) = rest.split_first_chunk()?;
            let len_bytes = usize::try_from(u64::from_le_bytes(*len_bytes)).ok()?;
            let (text, tail) = tail.split_at_checked(len_bytes)?;
            rest = tail;
            Some(text)
        };
        let mut strs = Vec::with_capacity(self.len);
        strs.extend((0..self.len).map_while(|_| next()));
        Ok(strs)
    }

    /// The elements as `i32`; any integer type will do as long as each value fits.
    ///
    /// # Errors
    /// The elements are no integers, or one does not fit.
    pub fn to_i32s(&self) -> Result<Vec<i32>, GgufError> {
        self.integers("array of integers", "i32")
    }

    /// The elements as `u32`; any integer type will do as long as each value fits.
    ///
    /// # Errors
    /// The elements are no integers, or one does not fit.
    pub fn to_u32s(&self) -> Result<Vec<u32>, GgufError> {
        self.integers("array of integers", "u32")
    }

    /// The elements as `f32`; `f64` is rounded.
    ///
    /// # Errors
    /// The elements are no floating-point numbers.
    pub fn to_f32s(&self) -> Result<Vec<f32>, GgufError> {
        self.collect("array<f32>", |value| value.as_f32())
    }

    /// The elements as `bool`.
    ///
    /// # Errors
    /// The elements are no bools.
    pub fn to_bools(&self) -> Result<Vec<bool>, GgufError> {
        self.collect("array<bool>", |value| match value {
            Value::Bool(value) => Some(value),
            _ => None,
        })
    }

    fn integers<T: TryFrom<i128>>(
        &self,
        expected: &'static str,
        range: &'static str,
    ) -> Result<Vec<T>, GgufError> {
        let mut integers = Vec::with_capacity(self.len);
        for value in self.iter() {
            let value = value
                .as_integer()
                .ok_or_else(|| self.wrong_type(expected))?;
            let out_of_range = |_| GgufError::OutOfRange {
                key: self.key.to_owned(),
                value,
                expected: range,
            };
            integers.push(T::try_from(value).map_err(out_of_range)?);
        }
        Ok(integers)
    }

    fn collect<T>(
        &self,
        expected: &'static str,
        convert: impl Fn(Value<'a>) -> Option<T>,
    ) -> Result<Vec<T>, GgufError> {
        self.iter()
            .map(|value| convert(value).ok_or_else(|| self.wrong_type(expected)))
            .collect()
    }

    fn wrong_type(&self, expected: &'static str) -> GgufError {
        GgufError::WrongValueType {
            key: self.key.to_owned(),
            found: format!("array<{}>", self.element),
            expected,
        }
    }
}

impl<'a> IntoIterator for Array<'a> {
    type Item = Value<'a>;
    type IntoIter = ArrayIter<'a>;

    fn into_iter(self) -> ArrayIter<'a> {
        self.iter()
    }
}

/// Iterator over the elements of an [`Array`].
pub struct ArrayIter<'a> {
    cursor: Cursor<'a>,
    key: &'a str,
    element: ValueType,
    left: usize,
}

impl<'a> Iterator for ArrayIter<'a> {
    type Item = Value<'a>;

    fn next(&mut self) -> Option<Value<'a>> {
        self.left = self.left.checked_sub(1)?;
        // Every element was checked when the file was opened, so this never fails.
        Value::read(&mut self.cursor, self.element, self.key).ok()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for ArrayIter<'_> {}
