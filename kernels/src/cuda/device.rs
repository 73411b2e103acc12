//! A GPU: finding the driver, opening a device, loading the kernels.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::result::stream::StreamKind;
use cudarc::driver::{DriverError, result, sys};

use super::buffer::{DeviceBuffer, Plain};
use super::functions::Functions;
use super::images::{self, Capability};
use super::lz4::decompress;
use super::stream::Stream;
use crate::error::KernelError;

/// The least version of CUDA that a driver must support, as the driver states it: 12.0, driver 525.
pub const DRIVER_VERSION_MIN: u32 = 12_000;

/// The least version of CUDA with which graphs hold launches that may start early.
const OVERLAP_DRIVER_VERSION_MIN: u32 = 12_030;

/// What is known of a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Number among the driver's devices.
    pub ordinal: usize,
    /// Name, such as `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Address on the PCI bus, such as `0000:01:00.0`.
    pub pci_address: String,
    /// Compute capability.
    pub capability: Capability,
    /// Multiprocessors.
    pub n_multiprocessors: usize,
    /// Memory in bytes.
    pub memory_bytes: usize,
    /// Version of CUDA that the driver supports: 1000 · major + 10 · minor.
    pub driver_version: u32,
}

/// A GPU with its kernels loaded. Clones are the same device; the last one unloads it.
#[derive(Debug, Clone)]
pub struct Device {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    info: DeviceInfo,
    device: sys::CUdevice,
    context: sys::CUcontext,
    /// For copies and clearing, so that they wait for no launch.
    copies: sys::CUstream,
    module: sys::CUmodule,
    functions: Functions,
}

// SAFETY: the driver's handles may be used from any thread that has made the context current, and every use here
// does so first.
unsafe impl Send for Inner {}
// SAFETY: as above; the driver locks its own state.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: nothing else uses the module: what was launched holds the device. An error has nowhere to go.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            let _ = result::stream::destroy(self.copies);
            let _ = result::module::unload(self.module);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

/// The driver's answer as this crate's error, with what was tried.
pub(super) fn call<T>(
    operation: &'static str,
    answer: Result<T, DriverError>,
) -> Result<T, KernelError> {
    answer.map_err(|error| KernelError::Cuda {
        operation,
        code: error.0 as u32,
        text: error.error_string().map_or_else(
            |_| "unknown".to_owned(),
            |s| s.to_string_lossy().into_owned(),
        ),
    })
}

/// Starts the driver and returns the version of CUDA that it supports.
fn start_driver() -> Result<u32, KernelError> {
    // a driver too old to have the symbols panics inside cudarc
    let started = std::panic::catch_unwind(|| {
        // SAFETY: opens the library and closes it again.
        if !unsafe { sys::is_culib_present() } {
            return Err(KernelError::CudaNoDriver);
        }
        let mut version = 0;
        // SAFETY: writes one int; may be called before `cuInit`.
        let answer = unsafe { sys::cuDriverGetVersion(&raw mut version) };
        call("ask the driver for its version", answer.result())?;
        let found = u32::try_from(version).unwrap_or(0);
        if found < DRIVER_VERSION_MIN {
            return Err(KernelError::CudaDriverTooOld {
                found,
                needed: DRIVER_VERSION_MIN,
            });
        }
        match result::init() {
            Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => {
                Err(KernelError::CudaNoDevice {
                    ordinal: 0,
                    count: 0,
                })
            }
            answer => call("start the driver", answer).map(|()| found),
        }
    });
    started.unwrap_or(Err(KernelError::CudaNoDriver))
}

/// GPUs that the driver has.
///
/// # Errors
/// [`KernelError::CudaNoDriver`], [`KernelError::CudaDriverTooOld`], or the driver's own; a driver without a GPU
/// gives 0.
pub fn device_count() -> Result<usize, KernelError> {
    match start_driver() {
        Err(KernelError::CudaNoDevice { .. }) => return Ok(0),
        answer => answer?,
    };
    let count = call("count devices", result::device::get_count())?;
    Ok(usize::try_from(count).unwrap_or(0))
}

impl Device {
    /// Opens GPU number `ordinal` and loads its kernels, which takes tens of milliseconds.
    ///
    /// # Errors
    /// Where there is no driver, it is too old, there is no such GPU, it is of an architecture without kernels, or
    /// the driver refuses.
    pub fn open(ordinal: usize) -> Result<Self, KernelError> {
        let driver_version = start_driver()?;
        let count = device_count()?;
        if ordinal >= count {
            return Err(KernelError::CudaNoDevice { ordinal, count });
        }
        let device = call("get a device", result::device::get(ordinal as i32))?;
        let info = describe(ordinal, device, driver_version)?;
        let packed = images::choose(info.capability).ok_or_else(|| KernelError::CudaNoImage {
            name: info.name.clone(),
            capability: info.capability,
        })?;
        let image = decompress(packed).expect("an embedded image is whole, by test");
        // SAFETY: a device that the driver gave; the context is released when loading fails, or by `Inner`.
        unsafe {
            let context = call("make a context", result::primary_ctx::retain(device))?;
            match load(context, &image) {
                Ok((module, functions, copies)) => Ok(Self {
                    inner: Arc::new(Inner {
                        info,
                        device,
                        context,
                        copies,
                        module,
                        functions,
                    }),
                }),
                Err(error) => {
                    let _ = result::primary_ctx::release(device);
                    Err(error)
                }
            }
        }
    }

    /// Opens the GPU at an address on the PCI bus, such as `0000:01:00.0`.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_at(pci_address: &str) -> Result<Self, KernelError> {
        start_driver()?;
        let address = std::ffi::CString::new(pci_address).unwrap_or_default();
        let mut device = 0;
        // SAFETY: writes one device; the address is a text that ends with a zero.
        let answer = unsafe { sys::cuDeviceGetByPCIBusId(&raw mut device, address.as_ptr()) };
        call("find a device by its PCI address", answer.result())?;
        Self::open(usize::try_from(device).unwrap_or(usize::MAX))
    }

    /// What is known of the GPU.
    pub fn info(&self) -> &DeviceInfo {
        &self.inner.info
    }

    /// Bytes of device memory that are free, whoever took the rest.
    ///
    /// # Errors
    /// The driver's.
    pub fn free_bytes(&self) -> Result<usize, KernelError> {
        self.bind()?;
        call("ask for free memory", result::mem_get_info()).map(|(free, _)| free)
    }

    /// Memory for `len` values, zeros.
    ///
    /// # Errors
    /// [`KernelError::CudaOutOfMemory`], or the driver's.
    pub fn alloc<T: Plain>(&self, len: usize) -> Result<DeviceBuffer<T>, KernelError> {
        DeviceBuffer::zeroed(self.clone(), len)
    }

    /// A copy of `values` in device memory.
    ///
    /// # Errors
    /// As [`Self::alloc`].
    pub fn upload<T: Plain>(&self, values: &[T]) -> Result<DeviceBuffer<T>, KernelError> {
        let mut buffer = self.alloc(values.len())?;
        buffer.write(0, values)?;
        Ok(buffer)
    }

    /// A new stream: launches on it run in order.
    ///
    /// # Errors
    /// The driver's.
    pub fn stream(&self) -> Result<Stream, KernelError> {
        Stream::new(self.clone())
    }

    /// Waits until everything on the device is done.
    ///
    /// # Errors
    /// The driver's: that of an earlier launch, which has lost the device.
    pub fn synchronize(&self) -> Result<(), KernelError> {
        self.bind()?;
        call("wait for the device", result::ctx::synchronize())
    }

    /// Makes the device's context the thread's.
    pub(super) fn bind(&self) -> Result<(), KernelError> {
        // SAFETY: the context lives as long as `self`.
        let answer = unsafe { result::ctx::set_current(self.inner.context) };
        call("make the context current", answer)
    }

    /// Whether a kernel's start may overlap the end of the one before: Hopper and later, and drivers that can
    /// capture it.
    pub(super) fn overlaps_launches(&self) -> bool {
        let info = self.info();
        info.capability.major >= 9 && info.driver_version >= OVERLAP_DRIVER_VERSION_MIN
    }

    /// Runs `copy` on the stream for copies, and waits for it.
    pub(super) fn copy(
        &self,
        operation: &'static str,
        copy: impl FnOnce(sys::CUstream) -> Result<(), DriverError>,
    ) -> Result<(), KernelError> {
        self.bind()?;
        call(operation, copy(self.inner.copies))?;
        // SAFETY: the stream lives as long as `self`.
        call(operation, unsafe {
            result::stream::synchronize(self.inner.copies)
        })
    }

    pub(super) fn functions(&self) -> &Functions {
        &self.inner.functions
    }

    pub(super) fn is_same(&self, other: &Device) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }
}

fn describe(
    ordinal: usize,
    device: sys::CUdevice,
    driver_version: u32,
) -> Result<DeviceInfo, KernelError> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as MULTIPROCESSORS,
        CU_DEVICE_ATTRIBUTE_PCI_BUS_ID as PCI_BUS, CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID as PCI_DEVICE,
        CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID as PCI_DOMAIN,
    };
    let attribute = |attribute| {
        // SAFETY: a device that the driver gave.
        let answer = unsafe { result::device::get_attribute(device, attribute) };
        call("describe a device", answer).map(i32::unsigned_abs)
    };
    // SAFETY: as above.
    let memory = unsafe { result::device::total_mem(device) };
    Ok(DeviceInfo {
        ordinal,
        name: call("name a device", result::device::get_name(device))?,
        pci_address: format!(
            "{:04x}:{:02x}:{:02x}.0",
            attribute(PCI_DOMAIN)?,
            attribute(PCI_BUS)?,
            attribute(PCI_DEVICE)?
        ),
        capability: Capability {
            major: attribute(MAJOR)?,
            minor: attribute(MINOR)?,
        },
        n_multiprocessors: attribute(MULTIPROCESSORS)? as usize,
        memory_bytes: call("ask for a device's memory", memory)?,
        driver_version,
    })
}

/// Loads an image and fetches its functions; makes the stream for copies.
///
/// # Safety
/// `context` is alive.
unsafe fn load(
    context: sys::CUcontext,
    image: &[u8],
) -> Result<(sys::CUmodule, Functions, sys::CUstream), KernelError> {
    // SAFETY: the context is alive; the image is whole, and PTX ends with a zero.
    unsafe {
        call(
            "make the context current",
            result::ctx::set_current(context),
        )?;
        let module = result::module::load_data(image.as_ptr().cast::<c_void>());
        let module = call("load the kernels", module)?;
        let rest = || {
            let functions = Functions::fetch(module)?;
            let copies = result::stream::create(StreamKind::NonBlocking);
            Ok((module, functions, call("make a stream", copies)?))
        };
        rest().inspect_err(|_| _ = result::module::unload(module))
    }
}
