//! Who owns what, and the messages between them.
#![deny(unsafe_code)]

pub mod counters;
pub mod engine;
pub mod error;
pub mod faults;
pub mod feeder;
pub mod messages;
pub mod weights;

pub use engine::{Engine, EngineOptions, Run, TeamThread, Teams};
pub use error::ActorError;
pub use feeder::{Feed, Feeder, LogitsWanted, Next};
