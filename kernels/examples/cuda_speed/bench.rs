//! Weights, activations, time.

use pi_kernels::cuda::{
    Device, DeviceAct, DeviceBuffer, DeviceRows, Event, Graph, RowsView, Stream, prepare,
};
use pi_kernels::{ActivationMode, KernelError, QuantType};

/// Bytes over which weights rotate: several times the largest cache.
const ROTATED_BYTES: usize = 400 << 20;

/// The device and its peaks.
pub struct Bench {
    pub device: Device,
    pub stream: Stream,
    pub peak_gb_s: f64,
    pub peak_tflop_s: f64,
}

/// Copies of rows whose values are any bits and whose scales are small.
pub struct Weights {
    pub rows: DeviceRows,
    pub copies: Vec<DeviceBuffer<u8>>,
}

impl Weights {
    pub fn view(&self, launch: usize) -> RowsView<'_> {
        RowsView::dense(self.rows, self.copies[launch % self.copies.len()].view(..))
    }
}

pub fn random_bytes(n: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as u8
    };
    (0..n).map(|_| next()).collect()
}

impl Bench {
    pub fn weights(
        &self,
        quant: QuantType,
        n_rows: usize,
        n_cols: usize,
    ) -> Result<Weights, KernelError> {
        let rows = DeviceRows {
            quant,
            n_rows,
            n_cols,
        };
        // every 97th row is its own; floats and scales get a small exponent
        let n_own = n_rows.min(97);
        let mut file = random_bytes(n_own * quant.row_bytes(n_cols), 5);
        for block in file.chunks_exact_mut(quant.block_bytes()) {
            for plane in quant.planes().iter().filter(|plane| plane.unit_bytes == 2) {
                block[plane.offset_bytes + 1] = 0x21;
            }
        }
        let mut own = vec![0; n_own * rows.row_bytes()];
        rows.pack(&file, rows.row_bytes(), &mut own);
        let packed: Vec<u8> = own.iter().copied().cycle().take(rows.bytes()).collect();
        let n_copies = ROTATED_BYTES.div_ceil(rows.bytes());
        let copies = (0..n_copies).map(|_| self.device.upload(&packed));
        Ok(Weights {
            rows,
            copies: copies.collect::<Result<_, _>>()?,
        })
    }

    pub fn activations(&self, n: usize, mode: ActivationMode) -> Result<DeviceAct, KernelError> {
        let values: Vec<f32> = random_bytes(n, 9)
            .iter()
            .map(|&b| f32::from(b) / 128.0 - 1.0)
            .collect();
        let mut act = DeviceAct::new(&self.device, mode, n)?;
        let values = self.device.upload(&values)?;
        prepare(&self.stream, values.view(..), &mut act)?;
        self.stream.synchronize()?;
        Ok(act)
    }

    /// Median microseconds of one of `n` launches in a graph.
    pub fn time(
        &self,
        n: usize,
        mut launch: impl FnMut(&Stream, usize) -> Result<(), KernelError>,
    ) -> Result<f64, KernelError> {
        let graph = Graph::capture(&self.stream, |stream| {
            (0..n).try_for_each(|i| launch(stream, i))
        })?;
        let (start, end) = (Event::new(&self.device)?, Event::new(&self.device)?);
        let mut times = Vec::new();
        for _ in 0..11 {
            start.record(&self.stream)?;
            graph.launch(&self.stream)?;
            end.record(&self.stream)?;
            self.stream.synchronize()?;
            times.push(1e3 * f64::from(start.elapsed_ms(&end)?) / n as f64);
        }
        times.drain(..2);
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }

    pub fn report(&self, what: &str, us: f64, bytes: usize) {
        let gb_s = bytes as f64 / us / 1e3;
        let percent = 100.0 * gb_s / self.peak_gb_s;
        println!("{what:52} {us:9.2} µs {gb_s:8.0} GB/s {percent:5.1} %");
    }

    /// As [`Self::report`], for `flop` operations.
    pub fn report_flop(&self, what: &str, us: f64, flop: f64) {
        let tflop_s = flop / us / 1e6;
        let percent = 100.0 * tflop_s / self.peak_tflop_s;
        println!("{what:52} {us:9.2} µs {tflop_s:8.1} TFLOP/s {percent:5.1} %");
    }
}
