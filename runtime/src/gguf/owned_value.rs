//! Metadata values to be written into a file.

use super::{GgufError, ValueType};

/// A metadata value to be written.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // the names are the format's
pub enum OwnedValue {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Str(String),
    /// All items have type `element`.
    Array {
        element: ValueType,
        items: Vec<OwnedValue>,
    },
    U64(u64),
    I64(i64),
    F64(f64),
}

impl OwnedValue {
    /// The value's type.
    pub fn value_type(&self) -> ValueType {
        match self {
            OwnedValue::U8(_) => ValueType::U8,
            OwnedValue::I8(_) => ValueType::I8,
            OwnedValue::U16(_) => ValueType::U16,
            OwnedValue::I16(_) => ValueType::I16,
            OwnedValue::U32(_) => ValueType::U32,
            OwnedValue::I32(_) => ValueType::I32,
            OwnedValue::F32(_) => ValueType::F32,
            OwnedValue::Bool(_) => ValueType::Bool,
            OwnedValue::Str(_) => ValueType::Str,
            OwnedValue::Array { .. } => ValueType::Array,
            OwnedValue::U64(_) => ValueType::U64,
            OwnedValue::I64(_) => ValueType::I64,
            OwnedValue::F64(_) => ValueType::F64,
        }
    }

    /// Appends the value as it stands in a file, without its type.
    pub(super) fn encode(&self, key: &str, out: &mut Vec<u8>) -> Result<(), GgufError> {
        match self {
            OwnedValue::U8(value) => out.push(*value),
            OwnedValue::I8(value) => out.extend(value.to_le_bytes()),
            OwnedValue::U16(value) => out.extend(value.to_le_bytes()),
            OwnedValue::I16(value) => out.extend(value.to_le_bytes()),
            OwnedValue::U32(value) => out.extend(value.to_le_bytes()),
            OwnedValue::I32(value) => out.extend(value.to_le_bytes()),
            OwnedValue::F32(value) => out.extend(value.to_le_bytes()),
            OwnedValue::Bool(value) => out.push(u8::from(*value)),
            OwnedValue::Str(text) => encode_string(text, out),
            OwnedValue::U64(value) => out.extend(value.to_le_bytes()),
            OwnedValue::I64(value) => out.extend(value.to_le_bytes()),
            OwnedValue::F64(value) => out.extend(value.to_le_bytes()),
            OwnedValue::Array { element, items } => {
                out.extend(element.id().to_le_bytes());
                out.extend((items.len() as u64).to_le_bytes());
                for item in items {
                    if item.value_type() != *element {
                        return Err(GgufError::MixedArray {
                            key: key.to_owned(),
                            found: item.value_type(),
                            expected: *element,
                        });
                    }
                    item.encode(key, out)?;
                }
            }
        }
        Ok(())
    }
}

/// Appends a length and the text.
pub(super) fn encode_string(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

macro_rules! from_scalar {
    ($($from:ty => $variant:ident;)*) => {
        $(
            impl From<$from> for OwnedValue {
                fn from(value: $from) -> OwnedValue {
                    OwnedValue::$variant(value.into())
                }
            }

            impl From<Vec<$from>> for OwnedValue {
                fn from(items: Vec<$from>) -> OwnedValue {
                    OwnedValue::Array {
                        element: ValueType::$variant,
                        items: items.into_iter().map(OwnedValue::from).collect(),
                    }
                }
            }
        )*
    };
}

from_scalar! {
    u8 => U8;
    i8 => I8;
    u16 => U16;
    i16 => I16;
    u32 => U32;
    i32 => I32;
    f32 => F32;
    bool => Bool;
    &str => Str;
    String => Str;
    u64 => U64;
    i64 => I64;
    f64 => F64;
}
