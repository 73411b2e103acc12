//! Launches that were captured once and run again as one.

use cudarc::driver::{result, sys};

use super::device::{Device, call};
use super::stream::Stream;
use crate::error::KernelError;

/// A fixed sequence of launches. The buffers that they use must outlive it.
#[derive(Debug)]
pub struct Graph {
    device: Device,
    graph: sys::CUgraph,
    executable: sys::CUgraphExec,
}

// SAFETY: the driver's graphs may be used from any one thread at a time.
unsafe impl Send for Graph {}

impl Graph {
    /// Captures what `launches` launches on `stream`, without running it.
    ///
    /// # Errors
    /// That of `launches`, or the driver's.
    pub fn capture(
        stream: &Stream,
        launches: impl FnOnce(&Stream) -> Result<(), KernelError>,
    ) -> Result<Self, KernelError> {
        let device = stream.device().clone();
        device.bind()?;
        // this thread's calls that a capture cannot hold are errors, other threads' are their own affair
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive; a capture that was begun is ended.
        let (launched, graph) = unsafe {
            call(
                "begin a capture",
                result::stream::begin_capture(stream.raw(), mode),
            )?;
            let launched = launches(stream);
            (launched, result::stream::end_capture(stream.raw()))
        };
        launched?;
        let graph = call("end a capture", graph)?;
        // SAFETY: a graph that the driver gave.
        let executable =
            unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) };
        match call("instantiate a graph", executable) {
            Ok(executable) => Ok(Self {
                device,
                graph,
                executable,
            }),
            Err(error) => {
                // SAFETY: as above; it is not used any more.
                let _ = unsafe { result::graph::destroy(graph) };
                Err(error)
            }
        }
    }

    /// Launches all of it.
    ///
    /// # Errors
    /// The driver's.
    pub fn launch(&self, stream: &Stream) -> Result<(), KernelError> {
        assert!(self.device.is_same(stream.device()), "one device");
        self.device.bind()?;
        // SAFETY: both are alive.
        let answer = unsafe { result::graph::launch(self.executable, stream.raw()) };
        call("launch a graph", answer)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made by `capture`, destroyed once.
            unsafe {
                let _ = result::graph::exec_destroy(self.executable);
                let _ = result::graph::destroy(self.graph);
            }
        }
    }
}
