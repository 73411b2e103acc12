//! Order of launches, and times.

use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::result::stream::StreamKind;
use cudarc::driver::{result, sys};

use super::device::{Device, call};
use super::functions::{Function, Functions};
use crate::error::KernelError;

/// A queue of launches, which run one after the other.
#[derive(Debug)]
pub struct Stream {
    device: Device,
    raw: sys::CUstream,
    /// Whether the next launch waits for another stream's work too.
    joined: AtomicBool,
    /// Whether the next launch cannot start early: it reads weights that were just written.
    late: AtomicBool,
}

// SAFETY: the driver's streams may be used from any thread; calls make the context current first.
unsafe impl Send for Stream {}
// SAFETY: as above; the driver locks its own state.
unsafe impl Sync for Stream {}

/// From a kernel that says itself when the next may start.
const EARLY_EDGE: sys::CUgraphEdgeData = sys::CUgraphEdgeData {
    from_port: sys::CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC as u8,
    to_port: 0,
    type_: sys::CUgraphDependencyType::CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC as u8,
    reserved: [0; 5],
};

/// Size of a launch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    pub(super) blocks: [usize; 2],
    pub(super) threads: usize,
    pub(super) shared_bytes: usize,
}

impl Stream {
    pub(super) fn new(device: Device) -> Result<Self, KernelError> {
        device.bind()?;
        let raw = call(
            "make a stream",
            result::stream::create(StreamKind::NonBlocking),
        )?;
        Ok(Self {
            device,
            raw,
            joined: AtomicBool::new(false),
            late: AtomicBool::new(false),
        })
    }

    /// The stream's device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Lets everything launched from now on wait for what was before `event`, on whatever stream of the device.
    ///
    /// # Errors
    /// The driver's.
    pub fn wait_for(&self, event: &Event) -> Result<(), KernelError> {
        assert!(self.device.is_same(&event.device), "one device");
        self.device.bind()?;
        self.joined.store(true, Ordering::Relaxed);
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both are alive.
        let answer = unsafe { result::stream::wait_event(self.raw, event.raw, flags) };
        call("wait for an event", answer)
    }

    /// Lets the next launch start when everything before it has ended: for weights that a launch has written, which kernels
    /// read before they wait.
    pub fn start_next_late(&self) {
        self.late.store(true, Ordering::Relaxed);
    }

    /// Waits until everything launched so far is done.
    ///
    /// # Errors
    /// The driver's: that of an earlier launch, which has lost the device.
    pub fn synchronize(&self) -> Result<(), KernelError> {
        self.device.bind()?;
        // SAFETY: the stream is alive.
        let answer = unsafe { result::stream::synchronize(self.raw) };
        call("wait for a stream", answer)
    }

    /// Whether everything launched so far is done, without waiting.
    ///
    /// # Errors
    /// As [`Self::synchronize`].
    pub fn is_done(&self) -> Result<bool, KernelError> {
        self.device.bind()?;
        // SAFETY: the stream is alive.
        match unsafe { sys::cuStreamQuery(self.raw) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            answer => call("ask a stream", answer.result()).map(|()| true),
        }
    }

    pub(super) fn functions(&self) -> &Functions {
        self.device.functions()
    }

    /// Asserts that memory is on the stream's device.
    pub(super) fn check(&self, devices: &[&Device]) {
        for device in devices {
            assert!(self.device.is_same(device), "memory of the stream's device");
        }
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// In a capture, lets the next launch start before what it waits for has ended, on this stream and on others: as the attribute
    /// does for this stream alone. Outside of one it starts late.
    fn start_early_after_all(&self) -> Result<(), KernelError> {
        let (mut status, mut id) = (sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE, 0);
        let (mut graph, mut n_nodes) = (std::ptr::null_mut(), 0);
        let (mut nodes, mut edges) = (std::ptr::null(), std::ptr::null());
        // SAFETY: the stream is alive; everything is written before it is read.
        let answer = unsafe {
            sys::cuStreamGetCaptureInfo_v3(
                self.raw,
                &raw mut status,
                &raw mut id,
                &raw mut graph,
                &raw mut nodes,
                &raw mut edges,
                &raw mut n_nodes,
            )
        };
        call("ask for a capture", answer.result())?;
        if status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE || n_nodes == 0 {
            return Ok(());
        }
        // SAFETY: the driver's array, which lives until the capture goes on.
        let mut nodes = unsafe { std::slice::from_raw_parts(nodes, n_nodes) }.to_vec();
        // all are kernels, and all of ours say when the next may start
        let edges = vec![EARLY_EDGE; n_nodes];
        let set = sys::CUstreamUpdateCaptureDependencies_flags::CU_STREAM_SET_CAPTURE_DEPENDENCIES;
        // SAFETY: nodes of this capture, and as many edges.
        let answer = unsafe {
            sys::cuStreamUpdateCaptureDependencies_v2(
                self.raw,
                nodes.as_mut_ptr(),
                edges.as_ptr(),
                n_nodes,
                set as u32,
            )
        };
        call("let a launch start early", answer.result())
    }

    /// Launches `function` with its one argument, a struct.
    ///
    /// # Safety
    /// `A` is laid out as the kernel's argument, the memory that it names is on the stream's device and as long as
    /// the kernel takes it to be, and the grid is one that the kernel can run in.
    pub(super) unsafe fn launch<A>(
        &self,
        operation: &'static str,
        function: Function,
        grid: Grid,
        mut args: A,
    ) -> Result<(), KernelError> {
        self.device.bind()?;
        let dim = |n: usize| u32::try_from(n).expect("a grid of 32-bit size");
        let [x, y] = grid.blocks.map(dim);
        let joined = self.joined.swap(false, Ordering::Relaxed);
        let starts_early =
            !self.late.swap(false, Ordering::Relaxed) && self.device.overlaps_launches();
        if starts_early && joined {
            self.start_early_after_all()?;
        }
        // every kernel waits for the one before it, but may be set up while that one ends
        let mut early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: Default::default(),
            value: sys::CUlaunchAttributeValue {
                programmaticStreamSerializationAllowed: 1,
            },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: 1,
            blockDimX: dim(grid.threads),
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: dim(grid.shared_bytes),
            hStream: self.raw,
            attrs: &raw mut early,
            numAttrs: u32::from(starts_early && !joined),
        };
        let mut params = [(&raw mut args).cast::<c_void>()];
        // SAFETY: the caller's contract; the driver copies the argument before it returns.
        let answer = unsafe {
            let (params, extra) = (params.as_mut_ptr(), std::ptr::null_mut());
            sys::cuLaunchKernelEx(&raw const config, function.0, params, extra)
        };
        call(operation, answer.result())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made by `new`, destroyed once; the driver finishes what is queued first.
            let _ = unsafe { result::stream::destroy(self.raw) };
        }
    }
}

/// A point in a stream, with its time.
#[derive(Debug)]
pub struct Event {
    device: Device,
    raw: sys::CUevent,
}

// SAFETY: the driver's events may be used from any thread; calls make the context current first.
unsafe impl Send for Event {}
// SAFETY: as above; the driver locks its own state.
unsafe impl Sync for Event {}

impl Event {
    /// A new event of the stream's device.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(device: &Device) -> Result<Self, KernelError> {
        device.bind()?;
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
        let raw = call("make an event", result::event::create(flags))?;
        Ok(Self {
            device: device.clone(),
            raw,
        })
    }

    /// Puts it behind everything launched so far.
    ///
    /// # Errors
    /// The driver's.
    pub fn record(&self, stream: &Stream) -> Result<(), KernelError> {
        self.device.bind()?;
        // SAFETY: both are alive.
        call("record an event", unsafe {
            result::event::record(self.raw, stream.raw)
        })
    }

    /// Whether everything before it is done, without waiting.
    ///
    /// # Errors
    /// As [`Stream::synchronize`].
    pub fn is_done(&self) -> Result<bool, KernelError> {
        self.device.bind()?;
        // SAFETY: the event is alive.
        match unsafe { sys::cuEventQuery(self.raw) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            answer => call("ask an event", answer.result()).map(|()| true),
        }
    }

    /// Milliseconds from this event to `end`, when both have been waited for.
    ///
    /// # Errors
    /// The driver's.
    pub fn elapsed_ms(&self, end: &Event) -> Result<f32, KernelError> {
        self.device.bind()?;
        // SAFETY: both are alive.
        call("compare events", unsafe {
            result::event::elapsed(self.raw, end.raw)
        })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made by `new`, destroyed once.
            let _ = unsafe { result::event::destroy(self.raw) };
        }
    }
}
