//! Which neurons fire while a model runs, and what the model's sidecar says of them.

use std::path::Path;
use std::sync::Mutex;

use pi_actors::LayerTap;
use pi_kernels::gemm::gemv;
use pi_kernels::{ActBatch, ActRef, ActivationMode, Cpu, Layout, MatrixRef, MatrixShape};
use pi_runtime::gguf::GgufFile;
use pi_runtime::model::quantize::dequantize_row;
use pi_runtime::model::tensors::{FileDown, FileMatrix};
use pi_runtime::model::{Hyperparameters, ModelTensors};
use pi_runtime::sidecar::Sidecar;

/// Sees every token's active neurons, computed from what enters the FFNs as the FFNs do it.
#[derive(Debug)]
pub struct Watch {
    cpu: Cpu,
    rms_eps: f32,
    layers: Vec<WatchedLayer>,
    seen: Mutex<Seen>,
}

#[derive(Debug)]
struct WatchedLayer {
    gate: Product,
    up: Product,
    gate_rows: Vec<u8>,
    gate_row_bytes: usize,
    down_norms: Vec<f32>,
    finders: Option<Finders>,
}

/// What a sidecar has for a layer.
#[derive(Debug)]
struct Finders {
    ahead: Option<(Product, Product, Vec<f32>)>,
    sketch_bias: Vec<f32>,
}

/// All that was seen.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Layers in order.
    pub layers: Vec<SeenLayer>,
    /// The residual streams of the layer before, in this step.
    residual: Vec<f32>,
}

/// What was seen of a layer.
#[derive(Debug, Clone, Default)]
pub struct SeenLayer {
    /// By token, by neuron.
    pub active: Vec<Vec<bool>>,
    /// Sum of |gate · up| · ‖down row‖ over all tokens and active neurons.
    pub mass: f64,
    /// One layer ahead.
    pub ahead: Found,
    /// From the layer's own input.
    pub sketch: Found,
}

/// What a predictor found.
#[derive(Debug, Clone, Copy, Default)]
pub struct Found {
    pub mass: f64,
    pub candidates: usize,
}

impl Seen {
    /// Mean over layers and tokens of |a ∩ b| / |a ∪ b|, of the active sets a and b of consecutive tokens.
    pub fn overlap(&self) -> f64 {
        let of_layer = |layer: &SeenLayer| {
            let pairs = layer.active.iter().zip(&layer.active[1..]);
            let overlaps: Vec<f64> = pairs
                .map(|(a, b)| {
                    let count = |wanted: fn(bool, bool) -> bool| {
                        a.iter().zip(b).filter(|(a, b)| wanted(**a, **b)).count()
                    };
                    count(|a, b| a && b) as f64 / count(|a, b| a || b).max(1) as f64
                })
                .collect();
            overlaps.iter().sum::<f64>() / overlaps.len() as f64
        };
        self.layers.iter().map(of_layer).sum::<f64>() / self.layers.len() as f64
    }

    /// Share of neurons that were active.
    pub fn active_share(&self) -> f64 {
        let shares: Vec<f64> = self
            .layers
            .iter()
            .map(|layer| layer.active_share())
            .collect();
        shares.iter().sum::<f64>() / shares.len() as f64
    }
}

impl SeenLayer {
    /// Share of neurons that were active.
    pub fn active_share(&self) -> f64 {
        let counts = self.counts();
        let all = counts.len() * self.active.len();
        counts.iter().sum::<usize>() as f64 / all as f64
    }

    /// Tokens for which each neuron was active.
    pub fn counts(&self) -> Vec<usize> {
        let n_ff = self.active[0].len();
        let count = |neuron: usize| self.active.iter().filter(|set| set[neuron]).count();
        (0..n_ff).map(count).collect()
    }

    /// Share of all activations that the most active neurons make, a share `top` of all.
    pub fn top_share(&self, top: f64) -> f64 {
        let mut counts = self.counts();
        counts.sort_unstable_by(|a, b| b.cmp(a));
        let n_top = (top * counts.len() as f64).round() as usize;
        counts[..n_top].iter().sum::<usize>() as f64 / counts.iter().sum::<usize>() as f64
    }
}

impl Watch {
    /// Watches the model at `path`, and what its sidecar at `sidecar` says of it.
    pub fn new(path: &Path, sidecar: Option<&Path>) -> Self {
        let file = GgufFile::open(path).unwrap();
        let hyper = Hyperparameters::read(&file).unwrap();
        let tensors = ModelTensors::find(&file, &hyper).unwrap();
        let sidecar = sidecar.map(|path| Sidecar::open(path, &file, &hyper).unwrap());
        let layers = tensors.layers.iter().enumerate().map(|(layer, tensors)| {
            let FileDown::NeuronMajor(down) = &tensors.down else {
                panic!("the model is packed")
            };
            WatchedLayer {
                gate: Product::new(&tensors.gate),
                up: Product::new(&tensors.up),
                gate_rows: tensors.gate.bytes.to_vec(),
                gate_row_bytes: tensors.gate.quant.row_bytes(hyper.n_embd),
                down_norms: row_norms(down),
                finders: sidecar
                    .as_ref()
                    .map(|sidecar| Finders::read(sidecar, layer, &hyper)),
            }
        });
        Self {
            cpu: Cpu::detect(ActivationMode::Q8),
            rms_eps: hyper.rms_eps,
            layers: layers.collect(),
            seen: Mutex::new(Seen {
                layers: vec![SeenLayer::default(); hyper.n_layer],
                residual: vec![],
            }),
        }
    }

    /// What was seen since the start or the last call.
    pub fn take(&self) -> Seen {
        let mut seen = self.seen.lock().unwrap();
        let empty = vec![SeenLayer::default(); self.layers.len()];
        let layers = std::mem::replace(&mut seen.layers, empty);
        Seen {
            layers,
            residual: vec![],
        }
    }

    fn see(&self, layer: usize, x: ActRef<'_>, before: Option<&[f32]>, seen: &mut SeenLayer) {
        let watched = &self.layers[layer];
        let gates = watched.gate.of(self.cpu, x);
        seen.active
            .push(gates.iter().map(|gate| *gate > 0.0).collect());
        let Some(finders) = &watched.finders else {
            return;
        };
        let ups = watched.up.of(self.cpu, x);
        let mass: Vec<f64> = (0..gates.len())
            .map(|i| f64::from(gates[i].max(0.0) * ups[i].abs() * watched.down_norms[i]))
            .collect();
        seen.mass += mass.iter().sum::<f64>();
        if let (Some(before), Some((a, b, bias))) = (before, &finders.ahead) {
            let hidden = a.of_values(self.cpu, &normed(before, self.rms_eps));
            let mut scores = b.of_values(self.cpu, &hidden);
            scores
                .iter_mut()
                .zip(bias)
                .for_each(|(score, bias)| *score += bias);
            seen.ahead.add(&scores, &mass);
        }
        let rows = watched.gate_rows.chunks_exact(watched.gate_row_bytes);
        let scores: Vec<f32> = rows
            .zip(&finders.sketch_bias)
            .map(|(row, bias)| sign_score(row, x) + bias)
            .collect();
        seen.sketch.add(&scores, &mass);
    }
}

impl LayerTap for Watch {
    fn ffn_input(&self, layer: usize, _: usize, residual: &[f32], inputs: &ActBatch) {
        let mut guard = self.seen.lock().unwrap();
        let seen = &mut *guard;
        let n_embd = inputs.n_cols();
        for token in 0..residual.len() / n_embd {
            let before = (layer > 0).then(|| &seen.residual[token * n_embd..][..n_embd]);
            self.see(layer, inputs.token(token), before, &mut seen.layers[layer]);
        }
        seen.residual = residual.to_vec();
    }
}

impl Finders {
    fn read(sidecar: &Sidecar, layer: usize, hyper: &Hyperparameters) -> Self {
        let (n_embd, n_ff) = (hyper.n_embd, hyper.n_ff);
        let name = |part: &str| format!("blk.{layer}.{part}");
        let bias = |part: &str| sidecar.vector(&name(part), n_ff).unwrap();
        let ahead = (layer > 0).then(|| {
            let a_name = name("ahead_a.weight");
            let rank = sidecar.file().require_tensor(&a_name).unwrap().n_rows();
            let a = sidecar.matrix(&a_name, rank, n_embd).unwrap().unwrap();
            let b = sidecar.matrix(&name("ahead_b.weight"), n_ff, rank).unwrap();
            (
                Product::new(&a),
                Product::new(&b.unwrap()),
                bias("ahead_b.bias").unwrap(),
            )
        });
        Self {
            ahead,
            sketch_bias: bias("sketch.bias").unwrap(),
        }
    }
}

impl Found {
    fn add(&mut self, scores: &[f32], mass: &[f64]) {
        for (score, mass) in scores.iter().zip(mass) {
            if *score > 0.0 {
                self.candidates += 1;
                self.mass += mass;
            }
        }
    }
}

/// A packed matrix.
#[derive(Debug)]
struct Product {
    shape: MatrixShape,
    bytes: Vec<u8>,
}

impl Product {
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

    fn of(&self, cpu: Cpu, x: ActRef<'_>) -> Vec<f32> {
        let mut out = vec![0.0; self.shape.n_rows];
        let matrix = MatrixRef::new(self.shape, &self.bytes);
        gemv(cpu, matrix, x, 0..self.shape.n_rows, &mut out);
        out
    }

    fn of_values(&self, cpu: Cpu, values: &[f32]) -> Vec<f32> {
        let mut batch = ActBatch::new(cpu.mode(), values.len(), 1);
        batch.set(cpu, 0, values);
        self.of(cpu, batch.token(0))
    }
}

fn normed(x: &[f32], eps: f32) -> Vec<f32> {
    let square = x.iter().map(|value| value * value).sum::<f32>() / x.len() as f32;
    let rms = (square + eps).sqrt();
    x.iter().map(|value| value / rms).collect()
}

/// The score of the kind `signs`, from the bytes of a Q4_0 row.
fn sign_score(row: &[u8], x: ActRef<'_>) -> f32 {
    let blocks = row.chunks_exact(18).enumerate().map(|(b, block)| {
        let negative = half::f16::from_le_bytes([block[0], block[1]]).is_sign_negative();
        let q = &x.q[b * 32..][..32];
        let mut sum = 0;
        for (k, byte) in block[2..].iter().enumerate() {
            let sign = |code: u8, q: i8| {
                if (code >= 8) != negative {
                    i32::from(q)
                } else {
                    -i32::from(q)
                }
            };
            sum += sign(byte & 0xf, q[k]) + sign(byte >> 4, q[k + 16]);
        }
        x.scales[b] * sum as f32
    });
    blocks.sum()
}

fn row_norms(matrix: &FileMatrix) -> Vec<f32> {
    let n_cols = matrix.n_cols();
    let mut values = vec![0.0; n_cols];
    let rows = matrix.bytes.chunks_exact(matrix.quant.row_bytes(n_cols));
    rows.map(|row| {
        dequantize_row(matrix.quant, row, &mut values);
        values.iter().map(|value| value * value).sum::<f32>().sqrt()
    })
    .collect()
}
