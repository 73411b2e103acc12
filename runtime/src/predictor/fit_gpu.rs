//! A GPU that takes part in fits: covariances, products of a regression's directions, and the training of predictors one layer ahead.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use nalgebra::DMatrix;
use pi_kernels::KernelError;
use pi_kernels::cuda::fit::{
    Join, LossOf, Matrix, Parameters, column_sums, double_product, join_slices, long_product,
    n_slices, product_slices, scaled_rows, score_errors,
};
use pi_kernels::cuda::{Device, DeviceBuffer, Stream};

use super::adam::Rate;
use crate::linear_algebra::{Workers, centred};

/// Bytes that rounding may add to what a fit takes: it has about so many pieces, of which the driver gives each this many bytes at a time.
const ROUNDING: usize = 32 * (2 << 20);

/// Where something is fitted: threads, and a GPU where there is one.
#[derive(Debug, Clone, Copy)]
pub struct FitOn<'a> {
    /// The threads.
    pub workers: Workers,
    /// The GPU.
    pub gpu: Option<&'a FitGpu>,
}

impl From<Workers> for FitOn<'_> {
    fn from(workers: Workers) -> Self {
        Self { workers, gpu: None }
    }
}

/// A GPU, and how much of its memory fits may take. One that finds it taken waits: whether a fit is the GPU's or the host's depends on
/// its size alone, as the bits do.
#[derive(Debug)]
pub struct FitGpu {
    device: Device,
    bytes_max: usize,
    bytes_free: Mutex<usize>,
    given_back: Condvar,
}

/// Some of the memory, until it is dropped. Who has some waits for no more.
#[derive(Debug)]
struct Share<'a> {
    gpu: &'a FitGpu,
    bytes: usize,
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        *self.gpu.bytes_free() += self.bytes;
        self.gpu.given_back.notify_all();
    }
}

impl FitGpu {
    /// Lets fits take `bytes_max` of the device's memory.
    pub fn new(device: Device, bytes_max: usize) -> Self {
        Self {
            device,
            bytes_max,
            bytes_free: Mutex::new(bytes_max),
            given_back: Condvar::new(),
        }
    }

    fn bytes_free(&self) -> MutexGuard<'_, usize> {
        self.bytes_free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for `bytes` of the memory; none where there never are as many.
    fn share(&self, bytes: usize) -> Option<Share<'_>> {
        // small pieces share what the driver gives at a time, of which each may leave a part
        let bytes = bytes + ROUNDING;
        if bytes > self.bytes_max {
            let (mib, of_mib) = (bytes >> 20, self.bytes_max >> 20);
            tracing::info!(mib, of_mib, "too much for the GPU: fitted on the host");
            return None;
        }
        let mut free = self.bytes_free();
        while *free < bytes {
            free = (self.given_back.wait(free)).unwrap_or_else(PoisonError::into_inner);
        }
        *free -= bytes;
        Some(Share { gpu: self, bytes })
    }

    /// What `work` makes on the GPU with `bytes` of its memory; none where there is less, or the driver refuses, which is said: the host
    /// does it then.
    fn have<T>(
        &self,
        bytes: usize,
        work: impl FnOnce(&Device) -> Result<T, KernelError>,
    ) -> Option<T> {
        let _share = self.share(bytes)?;
        said(work(&self.device))
    }

    /// As [`crate::linear_algebra::covariance`] has it, but for the order of sums.
    pub(super) fn covariance(
        &self,
        workers: Workers,
        (a, n_a): (&[f32], usize),
        (b, n_b): (&[f32], usize),
    ) -> Option<DMatrix<f64>> {
        let n = a.len() / n_a;
        let same = std::ptr::eq(a, b);
        let inputs = a.len() + if same { 0 } else { b.len() };
        let bytes = inputs * size_of::<f32>() + n_a * n_b * size_of::<f64>();
        let sums = self.have(bytes, |device| {
            let stream = device.stream()?;
            let on_a = device.upload(a)?;
            let on_b = (!same).then(|| device.upload(b)).transpose()?;
            let mut sums = device.alloc::<f64>(n_a * n_b)?;
            let x = Matrix::new(on_a.view(..), n, n_a).turned();
            let y = on_b.as_ref().unwrap_or(&on_a).view(..);
            let y = Matrix::new(y, n, n_b).turned();
            long_product(&stream, x, y, sums.view_mut(..))?;
            stream.synchronize()?;
            sums.read()
        })?;
        // rows of [n_a, n_b] are columns of [n_b, n_a]
        let mut sums = DMatrix::from_vec(n_b, n_a, sums);
        centred(workers, &mut sums, (a, n_a), (b, n_b));
        Some(sums)
    }

    /// Takes a matrix, which is to be multiplied with up to `n_rows` rows at a time.
    pub(super) fn take(&self, matrix: &DMatrix<f64>, n_rows: usize) -> Option<OnGpu<'_>> {
        let (m, n) = matrix.shape();
        let values = m * n + n_rows * (m + n);
        let share = self.share(values * size_of::<f64>())?;
        let taken = || {
            Ok(OnGpu {
                stream: self.device.stream()?,
                // column after column: row after row of the turned one
                turned: self.device.upload(matrix.as_slice())?,
                shape: (m, n),
                narrow: self.device.alloc(n_rows * n)?,
                wide: self.device.alloc(n_rows * m)?,
                _share: share,
            })
        };
        said(taken())
    }

    /// The parameters `start` after the steps that `each_step` makes of tokens and rate, one call each; none where [`Self::have`] has
    /// none, or steps or the inner layer are wider than anybody wants.
    pub(super) fn trained(
        &self,
        start: StartOn<'_>,
        each_step: impl FnOnce(
            &mut dyn FnMut(&[u32], Rate) -> Result<(), KernelError>,
        ) -> Result<(), KernelError>,
    ) -> Option<[Vec<f32>; 4]> {
        // one slice of a product is the product
        if n_slices(start.fc1_bias.len()) > 1 || n_slices(start.batch) > 1 {
            return None;
        }
        self.have(start.bytes(), |device| {
            let mut net = NetOnGpu::new(device, &start)?;
            each_step(&mut |tokens, rate| net.step(tokens, rate))?;
            net.stream.synchronize()?;
            let parameters = [&net.fc1, &net.fc1_bias, &net.fc2, &net.fc2_bias];
            let [fc1, fc1_bias, fc2, fc2_bias] = parameters.map(|of| of.values().read());
            Ok([fc1?, fc1_bias?, fc2?, fc2_bias?])
        })
    }
}

/// What the driver gave; none where it refused, which is said.
fn said<T>(answer: Result<T, KernelError>) -> Option<T> {
    answer
        .inspect_err(|error| tracing::warn!("{error}; the host computes in its place"))
        .ok()
}

/// A matrix M `[m, n]` on the GPU.
#[derive(Debug)]
pub(super) struct OnGpu<'a> {
    stream: Stream,
    /// `[n, m]`
    turned: DeviceBuffer<f64>,
    shape: (usize, usize),
    /// Rows of n values.
    narrow: DeviceBuffer<f64>,
    /// Rows of m values.
    wide: DeviceBuffer<f64>,
    _share: Share<'a>,
}

impl OnGpu<'_> {
    /// `rows · Mᵀ · M` of rows `[k, n]`.
    pub fn squared_times(&mut self, rows: &DMatrix<f64>) -> Option<DMatrix<f64>> {
        said(self.try_squared_times(rows))
    }

    fn try_squared_times(&mut self, rows: &DMatrix<f64>) -> Result<DMatrix<f64>, KernelError> {
        let ((m, n), k) = (self.shape, rows.nrows());
        self.narrow.write(0, rows.as_slice())?;
        let matrix = Matrix::new(self.turned.view(..), n, m);
        // rows lie column after column, as matrices of the host do
        let x = Matrix::new(self.narrow.view(..k * n), n, k).turned();
        double_product(
            &self.stream,
            x,
            matrix.turned(),
            self.wide.view_mut(..k * m),
        )?;
        let outputs = Matrix::new(self.wide.view(..k * m), k, m);
        let back = self.narrow.view_mut(..k * n);
        double_product(&self.stream, outputs, matrix, back)?;
        self.stream.synchronize()?;
        let values = self.narrow.view(..k * n).read()?;
        Ok(DMatrix::from_row_slice(k, n, &values))
    }
}

/// What training starts from, and what it looks at.
#[derive(Debug, Clone, Copy)]
pub(super) struct StartOn<'a> {
    /// `[rank, n_embd]`
    pub fc1: &'a [f32],
    /// `[rank]`
    pub fc1_bias: &'a [f32],
    /// `[n_ff, rank]`
    pub fc2: &'a [f32],
    /// `[n_ff]`
    pub fc2_bias: &'a [f32],
    /// `[n_embd]`
    pub input_scale: &'a [f32],
    /// `[n_tokens, n_embd]`
    pub residual: &'a [f32],
    /// `[n_tokens, n_ff]`
    pub masses: &'a [f32],
    /// Mass that weighs as much as a missed chance to skip.
    pub mass_unit: f32,
    /// Most that a mass weighs.
    pub weight_max: f32,
    /// Tokens of a step.
    pub batch: usize,
}

impl StartOn<'_> {
    /// Bytes of device memory.
    fn bytes(&self) -> usize {
        let parameters = [self.fc1, self.fc1_bias, self.fc2, self.fc2_bias];
        let parameters: usize = parameters.iter().map(|values| values.len()).sum();
        let (n_embd, n_ff) = (self.input_scale.len(), self.fc2_bias.len());
        let (rank, batch) = (self.fc1_bias.len(), self.batch);
        let slices = n_slices(n_embd) + n_slices(n_ff);
        let of_a_step = batch * (n_embd + n_ff + (slices + 2) * rank);
        // a parameter, its two means, and its gradient
        let values = 4 * parameters + self.residual.len() + self.masses.len() + of_a_step;
        values * size_of::<f32>()
    }
}

/// A network in training.
struct NetOnGpu {
    stream: Stream,
    rank: usize,
    batch: usize,
    mass_unit: f32,
    weight_max: f32,
    input_scale: DeviceBuffer<f32>,
    residual: DeviceBuffer<f32>,
    masses: DeviceBuffer<f32>,
    fc1: Parameters,
    fc1_bias: Parameters,
    fc2: Parameters,
    fc2_bias: Parameters,
    /// `[batch]`
    tokens: DeviceBuffer<u32>,
    /// `[batch, n_embd]`
    x: DeviceBuffer<f32>,
    /// `[.., batch, rank]`
    inner_slices: DeviceBuffer<f32>,
    /// `[batch, rank]`
    inner: DeviceBuffer<f32>,
    /// `[batch, n_ff]`: scores, then errors.
    errors: DeviceBuffer<f32>,
    /// `[.., batch, rank]`
    back_slices: DeviceBuffer<f32>,
    /// `[batch, rank]`
    back: DeviceBuffer<f32>,
    /// Gradients, as the parameters.
    gradients: [DeviceBuffer<f32>; 4],
}

impl NetOnGpu {
    fn new(device: &Device, start: &StartOn<'_>) -> Result<Self, KernelError> {
        let (rank, batch) = (start.fc1_bias.len(), start.batch);
        let (n_embd, n_ff) = (start.input_scale.len(), start.fc2_bias.len());
        let floats = |n: usize| device.alloc::<f32>(n);
        Ok(Self {
            stream: device.stream()?,
            rank,
            batch,
            mass_unit: start.mass_unit,
            weight_max: start.weight_max,
            input_scale: device.upload(start.input_scale)?,
            residual: device.upload(start.residual)?,
            masses: device.upload(start.masses)?,
            fc1: Parameters::new(device, start.fc1)?,
            fc1_bias: Parameters::new(device, start.fc1_bias)?,
            fc2: Parameters::new(device, start.fc2)?,
            fc2_bias: Parameters::new(device, start.fc2_bias)?,
            tokens: device.alloc(batch)?,
            x: floats(batch * n_embd)?,
            inner_slices: floats(n_slices(n_embd) * batch * rank)?,
            inner: floats(batch * rank)?,
            errors: floats(batch * n_ff)?,
            back_slices: floats(n_slices(n_ff) * batch * rank)?,
            back: floats(batch * rank)?,
            gradients: [
                floats(start.fc1.len())?,
                floats(rank)?,
                floats(start.fc2.len())?,
                floats(n_ff)?,
            ],
        })
    }

    /// One step down the gradient, as `Net::step` has it.
    fn step(&mut self, tokens: &[u32], rate: Rate) -> Result<(), KernelError> {
        // copies do not wait for launches
        self.stream.synchronize()?;
        self.tokens.write(0, tokens)?;
        let (stream, rank, batch) = (&self.stream, self.rank, self.batch);
        let (n_embd, n_ff) = (self.input_scale.len(), self.fc2_bias.values().len());
        let ids = self.tokens.view(..);
        let scale = self.input_scale.view(..);
        scaled_rows(
            stream,
            self.residual.view(..),
            ids,
            scale,
            self.x.view_mut(..),
        )?;
        let x = Matrix::new(self.x.view(..), batch, n_embd);
        let fc1 = Matrix::new(self.fc1.values(), rank, n_embd);
        product_slices(stream, x, fc1, self.inner_slices.view_mut(..))?;
        let join = Join::Forward(self.fc1_bias.values());
        let (slices, inner) = (self.inner_slices.view(..), self.inner.view_mut(..));
        join_slices(stream, slices, join, rank, inner)?;
        let inner = Matrix::new(self.inner.view(..), batch, rank);
        let fc2 = Matrix::new(self.fc2.values(), n_ff, rank);
        product_slices(stream, inner, fc2, self.errors.view_mut(..))?;
        let loss = LossOf {
            masses: self.masses.view(..),
            ids,
            unit: self.mass_unit,
            most: self.weight_max,
        };
        score_errors(
            stream,
            self.errors.view_mut(..),
            self.fc2_bias.values(),
            loss,
        )?;
        let errors = Matrix::new(self.errors.view(..), batch, n_ff);
        product_slices(stream, errors, fc2.turned(), self.back_slices.view_mut(..))?;
        let join = Join::Backward(self.inner.view(..));
        let (slices, back) = (self.back_slices.view(..), self.back.view_mut(..));
        join_slices(stream, slices, join, rank, back)?;
        let back = Matrix::new(self.back.view(..), batch, rank);
        let [of_fc1, of_fc1_bias, of_fc2, of_fc2_bias] = &mut self.gradients;
        product_slices(stream, errors.turned(), inner.turned(), of_fc2.view_mut(..))?;
        product_slices(stream, back.turned(), x.turned(), of_fc1.view_mut(..))?;
        column_sums(stream, self.errors.view(..), of_fc2_bias.view_mut(..))?;
        column_sums(stream, self.back.view(..), of_fc1_bias.view_mut(..))?;
        let step = rate.on_gpu();
        self.fc1.update(stream, of_fc1.view(..), step)?;
        self.fc1_bias.update(stream, of_fc1_bias.view(..), step)?;
        self.fc2.update(stream, of_fc2.view(..), step)?;
        self.fc2_bias.update(stream, of_fc2_bias.view(..), step)
    }
}
