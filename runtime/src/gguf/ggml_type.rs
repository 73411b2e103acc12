//! Element types of tensors in GGUF files: all that ggml has ever numbered and still reads.

use std::fmt;

/// Element type of a tensor as the file states it.
///
/// Every type is known by name and size, so that a file can be listed and copied; only some can be
/// run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GgmlType(&'static Facts);

#[derive(Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Facts {
    id: u32,
    name: &'static str,
    block_values: usize,
    block_bytes: usize,
}

/// Declares every type: constant, id in the file, name, values per block, bytes per block.
macro_rules! types {
    ($($name:ident $id:literal $values:literal $bytes:literal;)*) => {
        #[allow(missing_docs)] // the names are ggml's
        #[allow(non_upper_case_globals)]
        impl GgmlType {
            $(pub const $name: GgmlType = GgmlType(&Facts {
                id: $id,
                name: stringify!($name),
                block_values: $values,
                block_bytes: $bytes,
            });)*
            /// All types, in the order of their ids.
            pub const ALL: &'static [GgmlType] = &[$(GgmlType::$name),*];
        }
    };
}

types! {
    F32 0 1 4;
    F16 1 1 2;
    Q4_0 2 32 18;
    Q4_1 3 32 20;
    Q5_0 6 32 22;
    Q5_1 7 32 24;
    Q8_0 8 32 34;
    Q8_1 9 32 36;
    Q2_K 10 256 84;
    Q3_K 11 256 110;
    Q4_K 12 256 144;
    Q5_K 13 256 176;
    Q6_K 14 256 210;
    Q8_K 15 256 292;
    IQ2_XXS 16 256 66;
    IQ2_XS 17 256 74;
    IQ3_XXS 18 256 98;
    IQ1_S 19 256 50;
    IQ4_NL 20 32 18;
    IQ3_S 21 256 110;
    IQ2_S 22 256 82;
    IQ4_XS 23 256 136;
    I8 24 1 1;
    I16 25 1 2;
    I32 26 1 4;
    I64 27 1 8;
    F64 28 1 8;
    IQ1_M 29 256 56;
    BF16 30 1 2;
    Q4_0_4_4 31 32 18;
    Q4_0_4_8 32 32 18;
    Q4_0_8_8 33 32 18;
    TQ1_0 34 256 54;
    TQ2_0 35 256 66;
    IQ4_NL_4_4 36 32 18;
    IQ4_NL_4_8 37 32 18;
    IQ4_NL_8_8 38 32 18;
    MXFP4 39 32 17;
    NVFP4 40 64 36;
    Q1_0 41 128 18;
    Q2_0 42 64 18;
}

impl GgmlType {
    /// The type with this id in a GGUF file.
    pub fn from_id(id: u32) -> Option<GgmlType> {
        GgmlType::ALL.iter().copied().find(|t| t.id() == id)
    }

    /// The type with this id in a PowerInfer file (magic `PWRI`).
    ///
    /// PowerInfer branched off before ggml moved its integer types from 16–18 to 24–26.
    pub fn from_powerinfer_id(id: u32) -> Option<GgmlType> {
        match id {
            16 => Some(GgmlType::I8),
            17 => Some(GgmlType::I16),
            18 => Some(GgmlType::I32),
            _ => GgmlType::from_id(id).filter(|t| t.id() < 16),
        }
    }

    /// The number that stands for this type in a GGUF file.
    pub fn id(self) -> u32 {
        self.0.id
    }

    /// ggml's name, such as `Q4_0`.
    pub fn name(self) -> &'static str {
        self.0.name
    }

    /// Values in one block; rows hold whole blocks.
    pub fn block_values(self) -> usize {
        self.0.block_values
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        self.0.block_bytes
    }

    /// Bytes of a row of `n_cols` values, `None` if that is no whole number of blocks or too many.
    pub fn row_bytes(self, n_cols: usize) -> Option<usize> {
        if !n_cols.is_multiple_of(self.block_values()) {
            return None;
        }
        (n_cols / self.block_values()).checked_mul(self.block_bytes())
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_unique_and_lead_back_to_their_type() {
        for pair in GgmlType::ALL.windows(2) {
            assert!(pair[0].id() < pair[1].id());
        }
        for &t in GgmlType::ALL {
            assert_eq!(GgmlType::from_id(t.id()), Some(t));
            assert!(t.block_values() > 0 && t.block_bytes() > 0);
        }
        for removed in [4, 5, 43, u32::MAX] {
            assert_eq!(GgmlType::from_id(removed), None);
        }
    }

    #[test]
    fn rows_are_whole_blocks() {
        assert_eq!(GgmlType::Q4_0.row_bytes(576), Some(324));
        assert_eq!(GgmlType::Q6_K.row_bytes(512), Some(420));
        assert_eq!(GgmlType::Q4_0.row_bytes(33), None);
        assert_eq!(GgmlType::F32.row_bytes(usize::MAX), None);
    }

    #[test]
    fn powerinfer_keeps_the_old_integer_ids() {
        assert_eq!(GgmlType::from_powerinfer_id(18), Some(GgmlType::I32));
        assert_eq!(GgmlType::from_powerinfer_id(2), Some(GgmlType::Q4_0));
        assert_eq!(GgmlType::from_powerinfer_id(30), None);
    }
}
