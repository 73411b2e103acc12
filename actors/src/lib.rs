//! Who owns what, and the messages between them.
//!
//! See `ARCHITECTURE.md`, "Actors", for the picture; [`messages`] for who says what to whom, and the
//! protocols beside their code: `slots` (data), `team` (threads of a node), `wait` (parking).
#![deny(unsafe_code)]

// for `test_model`, which tests outside the crate use as well
#[cfg(test)]
extern crate self as pi_actors;

mod cold_layer;
mod control;
pub mod counters;
mod device_layer;
pub mod engine;
pub mod error;
mod executor;
pub mod faults;
pub mod feeder;
pub mod gpu;
mod host;
mod kv;
pub mod latency;
mod mailbox;
pub mod messages;
mod model;
mod pieces;
mod pipeline;
mod posts;
mod predictor;
pub mod replan;
mod scratch;
#[doc(hidden)]
pub mod slots;
mod tap;
mod team;
mod teams;
#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod test_model;
pub mod trace;
mod wait;
pub mod weights;

pub use engine::{Engine, EngineOptions, Run};
pub use error::{ActorError, ModelPart};
pub use feeder::{Candidates, Feed, Feeder, HeadWanted, LogitsWanted, Next};
pub use gpu::GpuError;
pub use tap::LayerTap;
pub use teams::{TeamThread, Teams};
