//! Memory of the host that a device sees as well.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use cudarc::driver::{result, sys};

use super::buffer::{Plain, View, ViewMut};
use super::device::{Device, call};
use super::stream::Stream;
use crate::error::KernelError;

/// `len` values in memory of the host that is never paged out and that the device reads and writes where it lies.
///
/// Both sides may use it at a time, so that the host's access is through unsafe functions; flags (u32) say when what is there.
#[derive(Debug)]
pub struct PinnedBuffer<T: Plain> {
    device: Device,
    host: *mut T,
    at: sys::CUdeviceptr,
    len: usize,
}

// SAFETY: all access is through unsafe functions whose contract keeps writers and readers apart, or atomic.
unsafe impl<T: Plain + Send> Send for PinnedBuffer<T> {}
// SAFETY: as above.
unsafe impl<T: Plain + Sync> Sync for PinnedBuffer<T> {}

impl<T: Plain> PinnedBuffer<T> {
    /// Zeros, at least one.
    ///
    /// # Errors
    /// The driver's: no such memory, or a device that cannot see it.
    pub fn new(device: &Device, len: usize) -> Result<Self, KernelError> {
        device.bind()?;
        let bytes = len.max(1) * size_of::<T>();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: the context is current; the memory is set before anybody reads it.
        unsafe {
            let host = call("allocate pinned memory", result::malloc_host(bytes, flags))?;
            std::ptr::write_bytes(host.cast::<u8>(), 0, bytes);
            let mut buffer = Self {
                device: device.clone(),
                host: host.cast(),
                at: 0,
                len,
            };
            let answer = sys::cuMemHostGetDevicePointer_v2(&raw mut buffer.at, host, 0);
            call("map pinned memory", answer.result())?;
            Ok(buffer)
        }
    }

    /// Values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of the host's memory.
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// Part of it, as the device sees it.
    ///
    /// # Panics
    /// When it is not in it.
    pub fn view(&self, range: Range<usize>) -> View<'_, T> {
        self.check(&range);
        let at = self.at + (range.start * size_of::<T>()) as u64;
        View::raw(&self.device, at, range.len())
    }

    /// # Safety
    /// Nobody, the device included, writes these values while the slice lives.
    ///
    /// # Panics
    /// When they are not in it.
    pub unsafe fn read(&self, range: Range<usize>) -> &[T] {
        self.check(&range);
        // SAFETY: inside the allocation; this function's contract.
        unsafe { std::slice::from_raw_parts(self.host.add(range.start), range.len()) }
    }

    /// # Safety
    /// Nobody else, the device included, touches these values while the slice lives.
    ///
    /// # Panics
    /// When they are not in it.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn write(&self, range: Range<usize>) -> &mut [T] {
        self.check(&range);
        // SAFETY: inside the allocation; this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.host.add(range.start), range.len()) }
    }

    fn check(&self, range: &Range<usize>) {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "{range:?} of {}",
            self.len
        );
    }
}

impl PinnedBuffer<u32> {
    /// Flag `n`. What its writer wrote before is there for who loads it.
    pub fn load(&self, n: usize) -> u32 {
        self.flag(n).load(Ordering::Acquire)
    }

    /// Sets flag `n`, behind everything written before.
    pub fn store(&self, n: usize, value: u32) {
        self.flag(n).store(value, Ordering::Release);
    }

    fn flag(&self, n: usize) -> &AtomicU32 {
        assert!(n < self.len, "flag {n} of {}", self.len);
        // SAFETY: inside the allocation, aligned, and only used as a flag.
        unsafe { AtomicU32::from_ptr(self.host.add(n)) }
    }
}

impl PinnedBuffer<u64> {
    /// Writes words from the `first` on, each as a whole: the device may read them meanwhile.
    ///
    /// # Panics
    /// When there is no room for them.
    pub fn store_words(&self, first: usize, words: impl ExactSizeIterator<Item = u64>) {
        self.check(&(first..first + words.len()));
        for (n, word) in words.enumerate() {
            // SAFETY: inside the allocation (checked; an iterator that gives more than it says stops here), aligned, and written
            // as whole words alone.
            let at = unsafe { AtomicU64::from_ptr(self.host.add((first + n).min(self.len - 1))) };
            at.store(word, Ordering::Relaxed);
        }
    }
}

impl<T: Plain> Drop for PinnedBuffer<T> {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated by `new`, freed once. An error has nowhere to go.
            let _ = unsafe { result::free_host(self.host.cast()) };
        }
    }
}

/// Copies as many of the first values of `from` to the device as there is room for in `to`, behind everything launched on `stream`. The
/// host leaves `from` as it is until that is done.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When `from` has fewer, or devices differ.
pub fn copy_to_device<T: Plain>(
    stream: &Stream,
    from: &PinnedBuffer<T>,
    to: ViewMut<'_, T>,
) -> Result<(), KernelError> {
    assert!(from.len() >= to.len(), "values to copy");
    stream.check(&[&from.device, to.device()]);
    stream.device().bind()?;
    let bytes = to.len() * size_of::<T>();
    if bytes == 0 {
        return Ok(());
    }
    // SAFETY: both have room for as many values, and are freed behind what is queued.
    let answer =
        unsafe { sys::cuMemcpyHtoDAsync_v2(to.address(), from.host.cast(), bytes, stream.raw()) };
    call("copy pinned memory to the device", answer.result())
}

/// Copies `from` to the host, behind everything launched on `stream`. The host leaves `to` alone until that is done.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When lengths or devices differ.
pub fn copy_to_host<T: Plain>(
    stream: &Stream,
    from: View<'_, T>,
    to: &PinnedBuffer<T>,
) -> Result<(), KernelError> {
    assert_eq!(from.len(), to.len(), "values to copy");
    stream.check(&[from.device(), &to.device]);
    stream.device().bind()?;
    // SAFETY: as above; the host's access is through unsafe functions, whose contract is that nobody writes meanwhile.
    let answer = unsafe {
        sys::cuMemcpyDtoHAsync_v2(to.host.cast(), from.address(), to.bytes(), stream.raw())
    };
    call("copy to pinned memory", answer.result())
}
