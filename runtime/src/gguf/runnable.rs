//! Which of the file's tensor types the kernels can compute with.

use pi_kernels::QuantType;

use super::{GgmlType, GgufError, TensorInfo};

impl GgmlType {
    /// The kernels' name for this type, if they can compute with it.
    pub fn quant(self) -> Option<QuantType> {
        QuantType::from_ggml_id(self.id())
    }
}

impl From<QuantType> for GgmlType {
    fn from(quant: QuantType) -> GgmlType {
        GgmlType::from_id(quant.ggml_id()).expect("every type of the kernels is one of ggml's")
    }
}

impl TensorInfo {
    /// The type of this tensor for the kernels.
    ///
    /// # Errors
    /// [`GgufError::UnsupportedType`] with the names of the types that can be run.
    pub fn require_quant(&self) -> Result<QuantType, GgufError> {
        self.ggml_type()
            .quant()
            .ok_or_else(|| GgufError::UnsupportedType {
                tensor: self.name().to_owned(),
                found: self.ggml_type(),
                supported: QuantType::ALL.map(QuantType::name).join(", "),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_tables_of_types_agree() {
        for quant in QuantType::ALL {
            let ggml_type = GgmlType::from(quant);
            assert_eq!(ggml_type.quant(), Some(quant));
            assert_eq!(ggml_type.name(), quant.name());
            assert_eq!(ggml_type.block_values(), quant.block_values());
            assert_eq!(ggml_type.block_bytes(), quant.block_bytes());
        }
        assert_eq!(GgmlType::IQ4_XS.quant(), None);
    }
}
