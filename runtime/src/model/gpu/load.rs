//! Copies a model to a GPU: all threads read and pack, each into two pieces of pinned memory in turns, and the link copies one meanwhile.
#![allow(unsafe_code)]

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use pi_actors::gpu::weights::{GpuSync, GpuWeights};
use pi_kernels::KernelError;
use pi_kernels::cuda::{Device, DeviceRows, PinnedBuffer, Stream, copy_to_device};

use super::layout::{GpuLayout, PieceSource, device_rows};
use crate::model::error::ModelError;
use crate::model::node_memory::NodeThreads;
use crate::model::tensors::FileMatrix;
use crate::model::transpose::Transposer;

/// Bytes that a thread packs before they are copied: few enough that the copy finds them in a cache.
const TASK_BYTES: usize = 1 << 20;
/// Columns of a transposing task are multiples of this, as every task reads all rows of the matrix.
const TRANSPOSED_NEURONS: usize = 256;

/// Pinned memory of a thread, and what is copied from it.
struct Staging {
    memory: PinnedBuffer<u8>,
    copies: Stream,
    /// Bytes that are on their way.
    bytes: u64,
}

impl Staging {
    fn new(device: &Device, bytes: usize) -> Result<Self, KernelError> {
        Ok(Self {
            memory: PinnedBuffer::new(device, bytes)?,
            copies: device.stream()?,
            bytes: 0,
        })
    }

    /// Waits until nothing is on its way any more, and returns how much was.
    fn wait(&mut self) -> Result<u64, KernelError> {
        self.copies.synchronize()?;
        Ok(std::mem::take(&mut self.bytes))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // where something failed; another error has nowhere to go
        let _ = self.copies.synchronize();
    }
}

/// Some rows of a piece.
struct Task<'l, 'a> {
    at: usize,
    bytes: usize,
    source: &'l PieceSource<'a>,
    first: usize,
    n_rows: usize,
}

impl GpuLayout<'_> {
    /// Copies everything to `device`. `progress` is called from all threads with the bytes that are there.
    ///
    /// # Errors
    /// Memory that the device does not give, or a thread that failed.
    pub fn load(
        &self,
        device: &Device,
        sync: GpuSync,
        threads: &dyn NodeThreads,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<GpuWeights, ModelError> {
        let arena = device.alloc::<u8>(self.bytes).map_err(driver)?;
        let tasks = self.tasks();
        let arena = Mutex::new(arena);
        let (next, copied) = (AtomicUsize::new(0), AtomicU64::new(0));
        let failure: Mutex<Option<KernelError>> = Mutex::default();
        let node = pi_topology::gpu_node(&device.info().pci_address);
        let largest = tasks.iter().map(|task| task.bytes).max().unwrap_or(0);
        threads.run(&|_| {
            let fill = || {
                // on the GPU's own NUMA node, whichever the thread is on: the link reads it from there
                let new = || {
                    Ok([
                        Staging::new(device, largest)?,
                        Staging::new(device, largest)?,
                    ])
                };
                let mut staging = match node {
                    Some(numa) => pi_topology::with_memory_of(numa, new),
                    None => new(),
                }?;
                let there =
                    |bytes: u64| progress(copied.fetch_add(bytes, Ordering::Relaxed) + bytes);
                while let Some(task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let [now, _] = &mut staging;
                    there(now.wait()?);
                    // SAFETY: the thread's own, and what was copied from it is there.
                    task.pack(unsafe { now.memory.write(0..task.bytes) });
                    let mut arena = arena.lock().expect("no copy panics in here");
                    let to = arena.view_mut(task.at..task.at + task.bytes);
                    copy_to_device(&now.copies, &now.memory, to)?;
                    drop(arena);
                    now.bytes = task.bytes as u64;
                    staging.rotate_left(1);
                }
                for last in &mut staging {
                    there(last.wait()?);
                }
                Ok(())
            };
            if let Err(error) = fill() {
                next.store(tasks.len(), Ordering::Relaxed);
                *failure.lock().expect("nothing panics in here") = Some(error);
            }
        })?;
        if let Some(error) = failure.into_inner().expect("nothing panicked in there") {
            return Err(driver(error));
        }
        Ok(GpuWeights {
            device: device.clone(),
            arena: arena.into_inner().expect("no copy panicked in there"),
            layers: self.layers.clone(),
            first_layer: self.first_layer,
            head: self.head.clone(),
            sync,
            replan: None,
            counts: false,
            dense: self.is_dense,
        })
    }

    /// All bytes of the arena, as they would be copied.
    #[cfg(test)]
    pub(in crate::model) fn image(&self) -> Vec<u8> {
        let mut image = vec![0; self.bytes];
        for task in self.tasks() {
            task.pack(&mut image[task.at..task.at + task.bytes]);
        }
        image
    }

    fn tasks(&self) -> Vec<Task<'_, '_>> {
        let mut tasks = Vec::new();
        for piece in &self.pieces {
            let (row_bytes, n_rows, multiple) = match &piece.source {
                PieceSource::Values(values) => (size_of_val(&values[..]), 1, 1),
                PieceSource::Rows { matrix, n_rows, .. } => {
                    (device_rows(matrix, 1).row_bytes(), *n_rows, 1)
                }
                PieceSource::Columns { matrix, to, n_rows } => {
                    let row = DeviceRows {
                        quant: *to,
                        n_rows: 1,
                        n_cols: matrix.n_rows(),
                    };
                    (row.row_bytes(), *n_rows, TRANSPOSED_NEURONS)
                }
            };
            let step = (TASK_BYTES / row_bytes.max(1))
                .max(1)
                .next_multiple_of(multiple);
            for first in (0..n_rows).step_by(step) {
                let n_rows = step.min(n_rows - first);
                tasks.push(Task {
                    at: piece.at + first * row_bytes,
                    bytes: n_rows * row_bytes,
                    source: &piece.source,
                    first,
                    n_rows,
                });
            }
        }
        tasks
    }
}

impl Task<'_, '_> {
    fn pack(&self, to: &mut [u8]) {
        let rows = self.first..self.first + self.n_rows;
        match self.source {
            PieceSource::Values(values) => {
                let bytes = values.iter().flat_map(|value| value.to_le_bytes());
                to.iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte);
            }
            PieceSource::Rows { matrix, order, .. } => {
                let format = device_rows(matrix, self.n_rows);
                let row_bytes = format.row_bytes();
                match order {
                    None => format.pack(matrix.rows(rows), row_bytes, to),
                    Some(order) => pack_rows(matrix, &order[rows], format, to),
                }
            }
            PieceSource::Columns {
                matrix, to: quant, ..
            } => {
                let format = DeviceRows {
                    quant: *quant,
                    n_rows: self.n_rows,
                    n_cols: matrix.n_rows(),
                };
                let row_bytes = format.row_bytes();
                let first = self.first;
                Transposer::new(matrix, *quant).each_row(rows, |neuron, row| {
                    let to = &mut to[(neuron - first) * row_bytes..][..row_bytes];
                    format.pack(row, row_bytes, to);
                });
            }
        }
    }
}

/// Packs the rows that `order` names one behind the other, as a device has them.
pub(in crate::model) fn pack_rows(
    matrix: &FileMatrix,
    order: &[u32],
    format: DeviceRows,
    to: &mut [u8],
) {
    let row_bytes = format.row_bytes();
    for (&row, to) in order.iter().zip(to.chunks_exact_mut(row_bytes)) {
        let row = row as usize;
        format.pack(matrix.rows(row..row + 1), row_bytes, to);
    }
}

fn driver(error: KernelError) -> ModelError {
    ModelError::Gpu(error.into())
}
