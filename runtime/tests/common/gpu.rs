//! Whether there is a GPU.

use pi_kernels::KernelError;
use pi_kernels::cuda::Device;

/// Whether there is one; a line that says so where there is none.
pub fn has_gpu() -> bool {
    match Device::open(0) {
        Ok(_) => true,
        Err(KernelError::CudaNoDriver | KernelError::CudaNoDevice { .. }) => {
            println!("skipped: no CUDA driver");
            false
        }
        Err(error) => panic!("{error}"),
    }
}
