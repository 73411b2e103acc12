//! The machine: what it has, what is asked of it, and where threads and memory go.
//!
//! [`Machine`] says what there is, [`TopologyConfig`] (the schema of `configs/*.toml`) what is
//! asked, and [`Plan::new`] makes teams of both. [`pin_thread`] and [`Arena`] carry a plan out;
//! [`read_bandwidth`] says what the planned threads can read at best,
//! [`SystemState`] what limits and settings of the system stand in their way.

mod arena;
mod arena_writer;
mod config;
mod conflicts;
mod control_group;
mod cuda;
mod error;
mod fit;
mod gpu;
mod huge_share;
#[cfg(feature = "hwloc")]
mod hwloc;
mod machine;
mod measure;
mod memory;
mod neighbours;
mod node_room;
mod pin;
pub mod placement;
mod plan;
mod probe;
mod proportion;
mod reserved_pages;
mod residence;
mod system;
#[cfg(all(feature = "hwloc", target_os = "linux"))]
mod udev;

pub use arena::Arena;
pub use arena_writer::ArenaWriter;
pub use config::{
    ByteSize, ColdPolicy, CoreChoice, GpuConfig, GpuSync, HostConfig, HugePages, LayerList,
    ListedTeam, MachineNeeds, MemoryConfig, NodeCount, Predict, PredictBy, SparsityConfig,
    ThreadsPerNode, TopologyConfig, VramBudget,
};
pub use conflicts::{Conflict, ConflictSubject, conflicts, conflicts_here};
pub use error::TopologyError;
pub use fit::{Backends, Difference, Fit, asking_for};
pub use gpu::{NvidiaDriver, NvidiaGpu, gpu_node};
pub use huge_share::HugeShare;
pub use machine::{
    Cache, Core, Gpu, Machine, MachineNode, MachineSource, MemoryNode, NodeDistances, Package,
    Withheld, ranges,
};
pub use measure::{AcrossSpeed, MemorySpeeds, RowsSpeed, TeamSpeeds, ThreadsSpeed, read_bandwidth};
pub use memory::{available_memory_bytes, current_rss_bytes, peak_rss_bytes};
pub use neighbours::BoundProcess;
pub use node_room::{NodeBalance, NodeRooms};
pub use pin::{pin_thread, with_memory_of};
pub use plan::{N_NODES_MAX, NodePlan, Plan};
pub use probe::{memory_binding_problem, try_pinning};
pub use proportion::Proportion;
pub use residence::{NodeResidence, Residence};
pub use system::{Limit, SystemState};
