//! A model on a GPU: which neurons are hot, what lies where in its memory, and how it gets there.

mod choice;
mod error;
mod layout;
mod load;

pub use choice::{GpuMemory, GpuPart, GpuRequest, GpuRoom, HOT_SAVES, HotLayer, choose_on};
pub use error::GpuModelError;
pub use layout::GpuLayout;
pub(super) use load::pack_rows;
