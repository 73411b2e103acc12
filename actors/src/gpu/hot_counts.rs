//! How often a GPU's neurons fired.

use pi_kernels::KernelError;
use pi_kernels::cuda::{
    Device, DeviceBuffer, MARK_TOKENS, NeuronList, Stream, View, count_marks, mark_active,
    mark_words,
};

use super::weights::{GpuFfn, GpuLayer};

/// Marks of the last tokens' neurons that fired, and counts of those before.
///
/// A token's marks have a place by its position, and are overwritten where the token is repeated after a failure, whatever the
/// attempt that was given up has left there. They are added to the counts when the token has ended and another one needs the place,
/// or the counts are asked for: so these depend on tokens alone.
#[derive(Debug)]
pub(super) struct HotCounts {
    /// `[MARK_TOKENS, n_words]`
    marks: DeviceBuffer<u32>,
    /// `[n_words · 32]`
    counts: DeviceBuffer<u32>,
    /// Each layer's first word, and its neurons.
    layers: Vec<(usize, usize)>,
    /// Places of tokens that have ended and are not counted yet, a bit each.
    ended: u64,
}

const _: () = assert!(MARK_TOKENS == u64::BITS as usize);

impl HotCounts {
    pub fn new(device: &Device, layers: &[GpuLayer]) -> Result<Self, KernelError> {
        let mut n_words = 0;
        let layers = layers.iter().map(|layer| {
            let n_hot = layer.ffn.as_ref().map_or(0, GpuFfn::n_hot);
            let first = n_words;
            n_words += mark_words(n_hot);
            (first, n_hot)
        });
        let layers = layers.collect();
        Ok(Self {
            marks: device.alloc(MARK_TOKENS * n_words)?,
            counts: device.alloc(u32::BITS as usize * n_words)?,
            layers,
            ended: 0,
        })
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.marks.bytes() + self.counts.bytes()
    }

    /// Has a layer's neurons marked, of the token at `position` (`[1]`), by their activations.
    pub fn mark(
        &mut self,
        stream: &Stream,
        layer: usize,
        (act, list): (View<'_, f32>, NeuronList<'_>),
        position: View<'_, u32>,
    ) -> Result<(), KernelError> {
        let (first, _) = self.layers[layer];
        mark_active(stream, act, list, position, self.marks.view_mut(..), first)
    }

    /// Sees to it that the token at `position`, which is about to start, overwrites no marks that have to be counted.
    pub fn make_room(&mut self, stream: &Stream, position: usize) -> Result<(), KernelError> {
        match self.ended & place(position) {
            0 => Ok(()),
            _ => self.count(stream),
        }
    }

    /// The token at `position` is complete: it will not be repeated.
    pub fn end_token(&mut self, position: usize) {
        self.ended |= place(position);
    }

    fn count(&mut self, stream: &Stream) -> Result<(), KernelError> {
        let (marks, counts) = (self.marks.view(..), self.counts.view_mut(..));
        count_marks(stream, marks, self.ended, counts)?;
        self.ended = 0;
        Ok(())
    }

    /// The counts of each layer's neurons, `[n_hot]`, which start anew.
    pub fn take(&mut self, stream: &Stream) -> Result<Vec<Vec<u32>>, KernelError> {
        self.count(stream)?;
        stream.synchronize()?;
        let counts = self.counts.read()?;
        self.counts.write(0, &vec![0; counts.len()])?;
        let of_layer = |&(first, n_hot): &(usize, usize)| {
            let at = u32::BITS as usize * first;
            counts[at..at + n_hot].to_vec()
        };
        Ok(self.layers.iter().map(of_layer).collect())
    }
}

/// The place of a token's marks, as a bit.
fn place(position: usize) -> u64 {
    1 << (position % MARK_TOKENS)
}
