//! What NVIDIA's driver knows of its GPUs. No context is made, so that it takes none of their memory.

use crate::machine::Gpu;

/// The GPUs that the driver shows to this process; none without a driver.
#[cfg(not(feature = "cuda"))]
pub(crate) fn gpus() -> Vec<Gpu> {
    Vec::new()
}

/// The GPUs that the driver shows to this process; none without a driver, or where it fails (logged).
#[cfg(feature = "cuda")]
pub(crate) fn gpus() -> Vec<Gpu> {
    // SAFETY: it loads the driver's library, whose initialisers do not depend on this process's state.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return Vec::new();
    }
    // cudarc panics where an old driver lacks a function; the words of that panic are nobody's business
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let asked = std::panic::catch_unwind(driver::gpus);
    std::panic::set_hook(hook);
    match asked {
        Ok(Ok(gpus)) => gpus,
        Ok(Err(error)) => {
            tracing::warn!(%error, "NVIDIA's driver does not tell its GPUs");
            Vec::new()
        }
        Err(_) => {
            tracing::warn!("NVIDIA's driver is too old to tell its GPUs");
            Vec::new()
        }
    }
}

#[cfg(feature = "cuda")]
mod driver {
    use std::ffi::{CStr, c_char};

    use cudarc::driver::result::{DriverError, device, init};
    use cudarc::driver::sys::{self, CUdevice_attribute};

    use crate::machine::Gpu;

    /// Bytes of `0000:01:00.0` and its end, and some more.
    const ADDRESS_BYTES: usize = 32;

    /// # Errors
    /// The driver's.
    pub(super) fn gpus() -> Result<Vec<Gpu>, DriverError> {
        init()?;
        (0..device::get_count()?).map(gpu).collect()
    }

    fn gpu(ordinal: i32) -> Result<Gpu, DriverError> {
        let device = device::get(ordinal)?;
        let attribute = |attribute| {
            // SAFETY: the driver has just given this device.
            unsafe { device::get_attribute(device, attribute) }
        };
        let major = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        // SAFETY: as above.
        let memory_bytes = unsafe { device::total_mem(device) }?;
        Ok(Gpu {
            pci_address: pci_address(device)?,
            pci_device: 0,
            name: Some(device::get_name(device)?),
            memory_bytes: Some(memory_bytes as u64),
            compute_capability: Some((major as u32, minor as u32)),
            numa: None,
        })
    }

    fn pci_address(device: sys::CUdevice) -> Result<String, DriverError> {
        let mut text: [c_char; ADDRESS_BYTES] = [0; ADDRESS_BYTES];
        // SAFETY: the driver writes at most the length that it is told, its end included.
        unsafe { sys::cuDeviceGetPCIBusId(text.as_mut_ptr(), ADDRESS_BYTES as i32, device) }
            .result()?;
        // SAFETY: the driver has ended the text within the array, which was zero besides.
        let text = unsafe { CStr::from_ptr(text.as_ptr()) };
        Ok(text.to_string_lossy().to_lowercase())
    }
}
