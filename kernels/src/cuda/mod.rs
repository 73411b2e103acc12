//! The kernels on NVIDIA GPUs: sources in `kernels/cuda`, compiled ahead of time and loaded through the driver.
//!
//! [`Device::open`] finds the driver at run time; without one it is an error and nothing else. Weights are
//! copied as [`DeviceRows::pack`] lays them out. Launches go to a [`Stream`], return at once, and touch no host
//! memory: lists, counts, positions and tokens are read from device memory, and grids depend on shapes alone,
//! so that launches can be captured in a [`Graph`]. No kernel adds floats in an order that depends on time: a
//! result has the same bits whenever it is repeated on the same device model.
//!
//! Every launcher asserts its shapes. Ids, positions and tokens in device memory are checked by the kernels: one
//! that is out of range gives NaN or writes nothing. A buffer must not be freed while a graph that uses it can
//! still be launched: its launch would then end with an error of the driver, and the device would be lost.

mod activations;
mod attention;
mod attention_batch;
mod batch;
mod buffer;
mod compact;
mod device;
mod down;
mod embed;
pub mod fit;
mod functions;
mod gemm;
mod graph;
mod hand_off;
mod images;
mod layout;
mod lz4;
mod norm;
mod pinned;
mod predict;
mod replan;
mod rope;
mod rows;
mod sample;
mod stream;
mod streamed;
mod then_norm;

pub use activations::{DeviceAct, Q8Copy, prepare, prepare_relu};
pub use attention::{
    AttendScratch, AttendToken, DeviceCache, attend, attend_token, attend_token_with,
    can_attend_token,
};
pub use attention_batch::attend_batch;
pub use batch::{DeviceBatch, gate_up_batch, prepare_batch, rms_norm_batch};
pub use buffer::{DeviceBuffer, Plain, View, ViewMut};
pub use compact::{compact, count_active};
pub use device::{DRIVER_VERSION_MIN, Device, DeviceInfo, device_count};
pub use down::{DownScratch, down_active};
pub use embed::embed;
pub use gemm::{GemmScratch, gemm};
pub use graph::Graph;
pub use hand_off::{
    BeginToken, HandOver, HandOverNormed, TakeOver, begin_token, hand_over, tagged, take_over,
};
pub use images::Capability;
pub use layout::{DeviceRows, RowsView, SUPPORTED, is_supported};
pub use norm::{AroundNorm, rms_norm, rms_norm_with};
pub use pinned::{PinnedBuffer, copy_to_device, copy_to_host};
pub use predict::{ListMasks, PredictHidden, PredictMasks, can_predict, mask_words};
pub use replan::{MARK_TOKENS, Scatter, count_marks, mark_active, mark_words};
pub use rope::{RopeAppend, rope_append, rope_append_batch};
pub use rows::{
    Add, BesideGates, Gates, NeuronList, can_norm_products, gate_up, gate_up_with, gemv,
    gemv_then_norm, gemv_then_norm_with, row_products, takes_pairs,
};
pub use sample::{SampleScratch, TOP_K_MAX, argmax, top_k};
pub use stream::{Event, Stream};
pub use streamed::{
    HostPlanes, HostRows, Registered, copy, copy_in, transpose, transposed_rows, trap, unpack,
    unpack_planes,
};
pub use then_norm::{ThenNorm, can_norm};
