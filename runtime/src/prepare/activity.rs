//! What a layer's neurons do for given hidden states: gates, and how much each neuron contributes.

use pi_kernels::elementwise::gelu_in_place;
use pi_kernels::gemm::gemm;
use pi_kernels::{ActBatch, Cpu, Layout, MatrixRef, MatrixShape, StridedOut};

use crate::model::GateKind;
use crate::model::quantize::dequantize_row;
use crate::model::tensors::{FileDown, FileMatrix, LayerTensors};

/// Tokens that go through a product together.
const TILE_TOKENS: usize = 64;

/// A matrix laid out for products.
#[derive(Debug)]
struct Packed {
    shape: MatrixShape,
    bytes: Vec<u8>,
}

impl Packed {
    fn new(matrix: &FileMatrix) -> Self {
        let shape = MatrixShape {
            quant: matrix.quant,
            n_rows: matrix.n_rows(),
            n_cols: matrix.n_cols(),
            layout: Layout::Interleaved,
        };
        let mut bytes = vec![0; shape.packed_bytes()];
        shape.pack(&matrix.bytes, 0, &mut bytes);
        Self { shape, bytes }
    }

    /// Products with the first `n_tokens` rows of `x`, into `out` `[n_tokens, n_rows]`.
    fn times(&self, cpu: Cpu, x: &ActBatch, n_tokens: usize, out: &mut [f32]) {
        let n_rows = self.shape.n_rows;
        let matrix = MatrixRef::new(self.shape, &self.bytes);
        let out = StridedOut::from_slice(out, n_rows, n_tokens, 0..n_rows);
        gemm(cpu, matrix, x, 0..n_tokens, 0..n_rows, out);
    }
}

/// A layer's FFN, as far as it says what its neurons do.
#[derive(Debug)]
pub struct LayerActivity {
    cpu: Cpu,
    gate_kind: GateKind,
    gate: Packed,
    up: Packed,
    down_norms: Vec<f32>,
    n_threads: usize,
}

impl LayerActivity {
    /// Takes the weights of a layer, to be used by `n_threads` threads.
    pub fn new(cpu: Cpu, gate_kind: GateKind, layer: &LayerTensors, n_threads: usize) -> Self {
        Self {
            cpu,
            gate_kind,
            gate: Packed::new(&layer.gate),
            up: Packed::new(&layer.up),
            down_norms: down_norms(&layer.down),
            n_threads: n_threads.max(1),
        }
    }

    /// L2 norm of each neuron's down row, `[n_ff]`.
    pub fn down_norms(&self) -> &[f32] {
        &self.down_norms
    }

    /// Neurons.
    pub fn n_ff(&self) -> usize {
        self.gate.shape.n_rows
    }

    /// For each neuron the tokens of `normed` `[n_tokens, n_embd]` for which its gate is above zero.
    pub fn counts(&self, normed: &[f32]) -> Vec<u32> {
        let n_ff = self.n_ff();
        let parts = self.by_thread(normed, |part| {
            let mut counts = vec![0u32; n_ff];
            let mut gates = vec![0.0; TILE_TOKENS * n_ff];
            self.tiles(part, |x, n_tokens, _| {
                self.gate.times(self.cpu, x, n_tokens, &mut gates);
                for row in gates[..n_tokens * n_ff].chunks_exact(n_ff) {
                    for (count, gate) in counts.iter_mut().zip(row) {
                        *count += u32::from(*gate > 0.0);
                    }
                }
            });
            counts
        });
        let mut counts = vec![0; n_ff];
        for part in parts {
            for (count, more) in counts.iter_mut().zip(part) {
                *count += more;
            }
        }
        counts
    }

    /// Gates before their activation, and contributions `|act(gate) · up| · ‖down row‖`, both `[n_tokens, n_ff]`, for
    /// `normed` `[n_tokens, n_embd]`.
    pub fn gates_and_contributions(&self, normed: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let n_ff = self.n_ff();
        let parts = self.by_thread(normed, |part| {
            let n_tokens = part.len() / self.gate.shape.n_cols;
            let mut gates = vec![0.0; n_tokens * n_ff];
            let mut contributions = vec![0.0; n_tokens * n_ff];
            self.tiles(part, |x, n_tokens, first| {
                let tile = first * n_ff..(first + n_tokens) * n_ff;
                let (gates, ups) = (&mut gates[tile.clone()], &mut contributions[tile]);
                self.gate.times(self.cpu, x, n_tokens, gates);
                self.up.times(self.cpu, x, n_tokens, ups);
                self.contribute(gates, ups);
            });
            (gates, contributions)
        });
        let mut both = (Vec::new(), Vec::new());
        for (gates, contributions) in parts {
            both.0.extend(gates);
            both.1.extend(contributions);
        }
        both
    }

    /// Turns ups into contributions.
    fn contribute(&self, gates: &[f32], ups: &mut [f32]) {
        let n_ff = self.n_ff();
        for (gates, ups) in gates.chunks_exact(n_ff).zip(ups.chunks_exact_mut(n_ff)) {
            for ((gate, up), norm) in gates.iter().zip(ups).zip(&self.down_norms) {
                let act = match self.gate_kind {
                    GateKind::Relu => gate.max(0.0),
                    GateKind::Silu => gate / (1.0 + (-gate).exp()),
                    GateKind::Gelu => {
                        let mut act = [*gate];
                        gelu_in_place(self.cpu, &mut act);
                        act[0]
                    }
                };
                *up = (act * *up).abs() * norm;
            }
        }
    }

    /// Calls `work` with the prepared rows of each tile of `normed`, their number and the first one's.
    fn tiles(&self, normed: &[f32], mut work: impl FnMut(&ActBatch, usize, usize)) {
        let n_embd = self.gate.shape.n_cols;
        let mut x = ActBatch::new(self.cpu.mode(), n_embd, TILE_TOKENS);
        for (tile, rows) in normed.chunks(TILE_TOKENS * n_embd).enumerate() {
            for (token, row) in rows.chunks_exact(n_embd).enumerate() {
                x.set(self.cpu, token, row);
            }
            work(&x, rows.len() / n_embd, tile * TILE_TOKENS);
        }
    }

    /// Results of `work` on parts of `normed`, in their order, each by a thread of its own.
    fn by_thread<T: Send>(&self, normed: &[f32], work: impl Fn(&[f32]) -> T + Sync) -> Vec<T> {
        let n_embd = self.gate.shape.n_cols;
        let n_tokens = normed.len() / n_embd;
        let part = n_tokens.div_ceil(self.n_threads).max(1) * n_embd;
        std::thread::scope(|scope| {
            let threads: Vec<_> = normed
                .chunks(part)
                .map(|part| scope.spawn(|| work(part)))
                .collect();
            threads
                .into_iter()
                .map(|thread| {
                    thread
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                })
                .collect()
        })
    }
}

/// L2 norm of each neuron's down row.
fn down_norms(down: &FileDown) -> Vec<f32> {
    let matrix = down.matrix();
    let mut row = vec![0.0; matrix.n_cols()];
    let squares = |row: &[f32]| row.iter().map(|value| value * value).sum::<f32>();
    match down {
        FileDown::NeuronMajor(_) => (0..matrix.n_rows())
            .map(|neuron| {
                dequantize_row(matrix.quant, matrix.rows(neuron..neuron + 1), &mut row);
                squares(&row).sqrt()
            })
            .collect(),
        FileDown::Plain(_) => {
            let mut sums = vec![0.0; matrix.n_cols()];
            for output in 0..matrix.n_rows() {
                dequantize_row(matrix.quant, matrix.rows(output..output + 1), &mut row);
                for (sum, value) in sums.iter_mut().zip(&row) {
                    *sum += value * value;
                }
            }
            sums.into_iter().map(f32::sqrt).collect()
        }
    }
}
