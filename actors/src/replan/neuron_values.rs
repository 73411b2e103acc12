//! A number for each neuron of a share, of neurons that may change places between steps.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::ops::Deref;

/// `[neurons]` f32, to be read as a slice.
pub struct NeuronValues(Box<[UnsafeCell<f32>]>);

// SAFETY: who writes sees to it that nobody reads (`set`'s contract).
unsafe impl Sync for NeuronValues {}

impl NeuronValues {
    /// Overwrites the number of a neuron.
    ///
    /// # Safety
    /// Nobody has a slice of these values or writes them while this runs, and who reads them later learns of it by something that
    /// orders memory.
    ///
    /// # Panics
    /// When there is no such neuron.
    pub unsafe fn set(&self, neuron: usize, value: f32) {
        // SAFETY: a place of its own, which nobody else touches (this function's contract).
        unsafe { *self.0[neuron].get() = value };
    }
}

impl Deref for NeuronValues {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: a cell is laid out as its value, and nothing is written while the slice lives (`set`'s contract).
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast::<f32>(), self.0.len()) }
    }
}

impl From<Vec<f32>> for NeuronValues {
    fn from(values: Vec<f32>) -> Self {
        Self(values.into_iter().map(UnsafeCell::new).collect())
    }
}

impl Clone for NeuronValues {
    fn clone(&self) -> Self {
        self.to_vec().into()
    }
}

impl std::fmt::Debug for NeuronValues {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_value_changes_and_a_copy_does_not() {
        let values = NeuronValues::from(vec![1.0, 2.0, 3.0]);
        let copy = values.clone();
        // SAFETY: nobody else has them.
        unsafe { values.set(1, 7.0) };
        assert_eq!(values[..], [1.0, 7.0, 3.0]);
        assert_eq!(copy[..], [1.0, 2.0, 3.0]);
        assert!(NeuronValues::from(vec![]).is_empty());
    }
}
