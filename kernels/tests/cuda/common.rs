//! Random weights and activations, and the device.

use std::sync::OnceLock;

use half::{bf16, f16};
use pi_kernels::cuda::{
    Device, DeviceAct, DeviceBuffer, DeviceRows, NeuronList, RowsView, Stream, prepare,
};
use pi_kernels::{
    ActBatch, ActivationMode, Cpu, KernelError, Layout, MatrixRef, MatrixShape, QuantType, Tier,
};

/// The first GPU; `None`, and a line that says so, where there is no driver or GPU.
pub fn device() -> Option<Device> {
    static DEVICE: OnceLock<Option<Device>> = OnceLock::new();
    let device = DEVICE.get_or_init(|| match Device::open(0) {
        Ok(device) => {
            println!("{:?}", device.info());
            Some(device)
        }
        Err(KernelError::CudaNoDriver | KernelError::CudaNoDevice { .. }) => None,
        Err(error) => panic!("{error}"),
    });
    if device.is_none() {
        println!("skipped: no CUDA driver");
    }
    device.clone()
}

pub fn scalar(mode: ActivationMode) -> Cpu {
    Cpu::new(Tier::Scalar, mode).unwrap()
}

pub const MODES: [ActivationMode; 2] = [ActivationMode::F32, ActivationMode::Q8];

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Uniform in −1 … 1.
    pub fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }

    /// Activations with outliers and zeros, as real ones have.
    pub fn activations(&mut self, n: usize) -> Vec<f32> {
        let mut one = || match self.next() % 16 {
            0 => 0.0,
            1 => 20.0 * self.float(),
            _ => self.float(),
        };
        (0..n).map(|_| one()).collect()
    }

    /// Rows of random blocks in file order: any bits for values, scales of about ±0.02.
    pub fn rows(&mut self, quant: QuantType, n_rows: usize, n_cols: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(n_rows * quant.row_bytes(n_cols));
        for _ in 0..n_rows * n_cols / quant.block_values() {
            let start = bytes.len();
            bytes.extend((0..quant.block_bytes()).map(|_| self.next() as u8));
            let block = &mut bytes[start..];
            match quant {
                QuantType::F32 => block.copy_from_slice(&self.float().to_le_bytes()),
                QuantType::F16 => block.copy_from_slice(&f16::from_f32(self.float()).to_le_bytes()),
                QuantType::BF16 => {
                    block.copy_from_slice(&bf16::from_f32(self.float()).to_le_bytes());
                }
                _ => {
                    for plane in quant.planes().iter().filter(|plane| plane.unit_bytes == 2) {
                        let scale = f16::from_f32(0.02 * self.float()).to_le_bytes();
                        block[plane.offset_bytes..plane.offset_bytes + 2].copy_from_slice(&scale);
                    }
                }
            }
        }
        bytes
    }
}

/// A list of rows on the device, of which the first `count` are meant.
pub struct List {
    ids: DeviceBuffer<u32>,
    count: DeviceBuffer<u32>,
}

impl List {
    pub fn new(device: &Device, ids: &[u32], count: usize) -> Self {
        Self {
            ids: device.upload(ids).unwrap(),
            count: device.upload(&[count as u32]).unwrap(),
        }
    }

    pub fn view(&self) -> NeuronList<'_> {
        NeuronList::Ids {
            ids: self.ids.view(..),
            count: self.count.view(..),
        }
    }
}

/// Rows on the host, packed one by one and interleaved, and on the device.
pub struct Rows {
    pub shape: DeviceRows,
    by_row: Vec<u8>,
    interleaved: Vec<u8>,
    device: DeviceBuffer<u8>,
    stride_bytes: usize,
}

impl Rows {
    pub fn random(
        device: &Device,
        seed: u64,
        quant: QuantType,
        n_rows: usize,
        n_cols: usize,
    ) -> Self {
        let file = Random(seed).rows(quant, n_rows, n_cols);
        let shape = DeviceRows {
            quant,
            n_rows,
            n_cols,
        };
        let pack = |layout| {
            let shape = matrix_shape(shape, layout);
            let mut bytes = vec![0; shape.packed_bytes()];
            shape.pack(&file, 0, &mut bytes);
            bytes
        };
        // a stride that is no row, so that strides are tested
        let stride_bytes = shape.row_bytes() + 16 * (n_rows % 2);
        let mut packed = vec![0xFF; n_rows * stride_bytes];
        shape.pack(&file, stride_bytes, &mut packed);
        Self {
            shape,
            by_row: pack(Layout::Rows),
            interleaved: pack(Layout::Interleaved),
            device: device.upload(&packed).unwrap(),
            stride_bytes,
        }
    }

    pub fn view(&self) -> RowsView<'_> {
        RowsView::new(self.shape, self.stride_bytes, self.device.view(..))
    }

    pub fn matrix(&self) -> MatrixRef<'_> {
        MatrixRef::new(
            matrix_shape(self.shape, Layout::Interleaved),
            &self.interleaved,
        )
    }

    pub fn by_row(&self) -> pi_kernels::ffn_sparse::NeuronRows<'_> {
        pi_kernels::ffn_sparse::NeuronRows {
            quant: self.shape.quant,
            n_embd: self.shape.n_cols,
            n_neurons: self.shape.n_rows,
            stride_bytes: self.shape.quant.row_bytes(self.shape.n_cols),
            offset_bytes: 0,
            bytes: &self.by_row,
        }
    }

    /// The real values of row `row`.
    pub fn values(&self, row: usize) -> Vec<f32> {
        let mut values = vec![0.0; self.shape.n_cols];
        self.matrix().dequantize_row(row, &mut values);
        values
    }
}

fn matrix_shape(rows: DeviceRows, layout: Layout) -> MatrixShape {
    MatrixShape {
        quant: rows.quant,
        n_rows: rows.n_rows,
        n_cols: rows.n_cols,
        layout,
    }
}

/// One token's activations on both sides.
pub struct Activations {
    pub host: ActBatch,
    pub device: DeviceAct,
}

impl Activations {
    pub fn new(stream: &Stream, mode: ActivationMode, values: &[f32]) -> Self {
        let mut host = ActBatch::new(mode, values.len(), 1);
        host.set(scalar(mode), 0, values);
        let mut device = DeviceAct::new(stream.device(), mode, values.len()).unwrap();
        let x = stream.device().upload(values).unwrap();
        prepare(stream, x.view(..), &mut device).unwrap();
        stream.synchronize().unwrap();
        Self { host, device }
    }

    /// What products are taken with: the 8-bit values where `quant` meets those.
    pub fn effective(&self, quant: QuantType) -> Vec<f32> {
        let x = self.host.token(0);
        if self.host.mode() == ActivationMode::F32 || !quant.is_quantised() {
            return x.values[..self.host.n_cols()].to_vec();
        }
        let scaled = |(k, &q): (usize, &i8)| f32::from(q) * x.scales[k / 32];
        x.q.iter().enumerate().map(scaled).collect()
    }
}

/// Σ|aᵢ·bᵢ|.
pub fn magnitude(a: &[f32], b: &[f32]) -> f64 {
    let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
    products.map(f64::abs).sum()
}

/// Column counts that a format can have: whole blocks; for floats also odd ones.
pub fn column_counts(quant: QuantType) -> Vec<usize> {
    match quant.block_values() {
        1 => vec![1, 7, 101, 4096],
        32 => vec![32, 96, 576, 4096, 11008],
        _ => vec![256, 768, 4096, 8192],
    }
}

pub fn assert_near(got: f32, want: f32, bound: f64, what: &str) {
    let difference = (f64::from(got) - f64::from(want)).abs();
    assert!(difference <= bound, "{what}: {got}, not {want} ± {bound:e}");
}

/// Bit patterns, so that NaN compares equal to itself.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}
