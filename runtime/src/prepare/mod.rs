//! `pi-runtime prepare`: what a model's neurons do on a text, and what can be foretold of it, into its sidecar.
//!
//! A preparation runs stages, each of which ends in a section of the sidecar: the profile, predictors and their
//! thresholds (or thresholds for gates that never close), the sketch of the head, the report. Hidden states are
//! collected once, into a file, and worked on layer by layer. What is done is kept in a [`Checkpoint`].

pub mod activity;
pub mod checkpoint;
mod error;
pub mod plots;
mod preparation;
pub mod samples;
mod stage;
mod subject;
mod tables;
pub mod text;

pub use checkpoint::Checkpoint;
pub use error::PrepareError;
pub use preparation::{DENSITY_MAX, Observer, Preparation, PrepareOptions, Prepared};
pub use stage::Stage;
pub use subject::Subject;
pub use tables::profile_table;
