//! Device memory with a length and a type.

use std::marker::PhantomData;
use std::ops::{Bound, Range, RangeBounds};

use cudarc::driver::{DriverError, result, sys};

use super::device::{Device, call};
use crate::error::KernelError;

/// Types of which every bit pattern is a value.
///
/// # Safety
/// That holds, and the type has no padding.
pub unsafe trait Plain: Copy + Default + 'static {}

// SAFETY: numbers.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for i8 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for i32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: as above.
unsafe impl Plain for f32 {}
// SAFETY: as above.
unsafe impl Plain for f64 {}

/// `len` values in device memory. Freed when dropped, once all launches are done.
#[derive(Debug)]
pub struct DeviceBuffer<T: Plain> {
    device: Device,
    at: sys::CUdeviceptr,
    len: usize,
    of: PhantomData<T>,
}

impl<T: Plain> DeviceBuffer<T> {
    pub(super) fn zeroed(device: Device, len: usize) -> Result<Self, KernelError> {
        device.bind()?;
        let bytes = len * size_of::<T>();
        let mut buffer = Self {
            device,
            at: 0,
            len,
            of: PhantomData,
        };
        if bytes == 0 {
            return Ok(buffer);
        }
        // SAFETY: the context is current; the memory is cleared before anything reads it.
        unsafe {
            buffer.at = match result::malloc_sync(bytes) {
                Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                    let free_bytes = result::mem_get_info().map_or(0, |(free, _)| free);
                    return Err(KernelError::CudaOutOfMemory { bytes, free_bytes });
                }
                answer => call("allocate device memory", answer)?,
            };
        }
        buffer.device.copy("clear device memory", |stream| {
            // SAFETY: the memory was just allocated.
            unsafe { result::memset_d8_async(buffer.at, 0, bytes, stream) }
        })?;
        Ok(buffer)
    }

    /// Values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// Copies `values` to places `at ..`, and returns when they are there. Streams are not waited for.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// When they do not fit.
    pub fn write(&mut self, at: usize, values: &[T]) -> Result<(), KernelError> {
        self.view_mut(at..at + values.len()).write(values)
    }

    /// All values. Streams are not waited for.
    ///
    /// # Errors
    /// The driver's.
    pub fn read(&self) -> Result<Vec<T>, KernelError> {
        self.view(..).read()
    }

    /// Part of the buffer.
    ///
    /// # Panics
    /// When it is not in it.
    pub fn view(&self, range: impl RangeBounds<usize>) -> View<'_, T> {
        let (at, len) = self.part(range);
        View {
            device: &self.device,
            at,
            len,
            of: PhantomData,
        }
    }

    /// Part of the buffer, to be written.
    ///
    /// # Panics
    /// As [`Self::view`].
    pub fn view_mut(&mut self, range: impl RangeBounds<usize>) -> ViewMut<'_, T> {
        let (at, len) = self.part(range);
        ViewMut {
            device: &self.device,
            at,
            len,
            of: PhantomData,
        }
    }

    /// The first `n` values, to be written, and those behind them.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn split_at_mut(&mut self, n: usize) -> (ViewMut<'_, T>, View<'_, T>) {
        let ((first, _), (rest, len)) = (self.part(..n), self.part(n..));
        let first = ViewMut {
            device: &self.device,
            at: first,
            len: n,
            of: PhantomData,
        };
        (first, View::raw(&self.device, rest, len))
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    fn part(&self, range: impl RangeBounds<usize>) -> (sys::CUdeviceptr, usize) {
        let start = match range.start_bound() {
            Bound::Included(&start) => start,
            Bound::Excluded(&start) => start + 1,
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(&end) => end + 1,
            Bound::Excluded(&end) => end,
            Bound::Unbounded => self.len,
        };
        assert!(
            start <= end && end <= self.len,
            "values {start}..{end} of {}",
            self.len
        );
        (self.at + (start * size_of::<T>()) as u64, end - start)
    }
}

impl<T: Plain> Drop for DeviceBuffer<T> {
    fn drop(&mut self) {
        if self.at != 0 && self.device.bind().is_ok() {
            // SAFETY: allocated by `zeroed`, and freed once. An error has nowhere to go.
            let _ = unsafe { result::free_sync(self.at) };
        }
    }
}

/// Part of a buffer.
#[derive(Debug, Clone, Copy)]
pub struct View<'a, T: Plain> {
    device: &'a Device,
    at: sys::CUdeviceptr,
    len: usize,
    of: PhantomData<T>,
}

impl<'a, T: Plain> View<'a, T> {
    /// Values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All values. Streams are not waited for.
    ///
    /// # Errors
    /// The driver's.
    pub fn read(&self) -> Result<Vec<T>, KernelError> {
        let mut values = vec![T::default(); self.len];
        if self.len > 0 {
            self.device.copy("copy from the device", |stream| {
                // SAFETY: the memory holds `len` values, all bit patterns of which are values; `values` stays until
                // the copy is done.
                unsafe { result::memcpy_dtoh_async(&mut values, self.at, stream) }
            })?;
        }
        Ok(values)
    }

    /// Part of it.
    ///
    /// # Panics
    /// When it is not in it.
    pub fn part(self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "values {range:?} of {}",
            self.len
        );
        let at = self.at + (range.start * size_of::<T>()) as u64;
        Self::raw(self.device, at, range.len())
    }

    /// `len` values from `at` on.
    pub(super) fn raw(device: &'a Device, at: sys::CUdeviceptr, len: usize) -> Self {
        Self {
            device,
            at,
            len,
            of: PhantomData,
        }
    }

    pub(super) fn device(&self) -> &'a Device {
        self.device
    }

    /// Where it is on the device.
    pub(super) fn address(&self) -> u64 {
        self.at
    }
}

impl<'a> View<'a, f32> {
    /// The values' bits.
    pub fn to_bits(self) -> View<'a, u32> {
        View::raw(self.device, self.at, self.len)
    }
}

impl<'a> View<'a, u8> {
    /// The bytes as f32 values.
    ///
    /// # Panics
    /// When start or length are no multiple of 4.
    pub fn as_f32(self) -> View<'a, f32> {
        assert!(
            self.at.is_multiple_of(4) && self.len.is_multiple_of(4),
            "aligned values"
        );
        View::raw(self.device, self.at, self.len / 4)
    }
}

/// Part of a buffer, to be written.
#[derive(Debug)]
pub struct ViewMut<'a, T: Plain> {
    device: &'a Device,
    at: sys::CUdeviceptr,
    len: usize,
    of: PhantomData<&'a mut T>,
}

impl<T: Plain> ViewMut<'_, T> {
    /// Values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies `values`, as many as there are, and returns when they are there. Streams are not waited for.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn write(&mut self, values: &[T]) -> Result<(), KernelError> {
        assert_eq!(values.len(), self.len, "values to copy");
        if self.len == 0 {
            return Ok(());
        }
        self.device.copy("copy to the device", |stream| {
            // SAFETY: the memory has room for `len` values; `values` stays until the copy is done.
            unsafe { result::memcpy_htod_async(self.at, values, stream) }
        })
    }

    pub(super) fn device(&self) -> &Device {
        self.device
    }

    /// Where it is on the device.
    pub(super) fn address(&self) -> u64 {
        self.at
    }
}
