//! `pi-runtime prepare`: what a model's neurons do on a text, and what can be foretold of it, into its sidecar.
//!
//! A preparation runs stages, each of which ends in a section of the sidecar: the profile, predictors and their
//! thresholds (or thresholds for gates that never close), the sketch of the head, the report. Hidden states are
//! collected once, into a file, and worked on layer by layer. What is done is kept in a [`Checkpoint`].

pub mod activity;
pub mod checkpoint;
mod divergence;
mod error;
mod gate_thresholds;
mod head;
mod layers;
pub mod plots;
mod predictors;
mod preparation;
pub mod report;
pub mod samples;
mod score_costs;
mod stage;
mod subject;
mod tables;
pub mod text;
mod thresholds;
mod trials;

pub use checkpoint::Checkpoint;
pub use error::PrepareError;
pub use predictors::AheadKind;
pub use preparation::{
    DENSITY_MAX, N_PASSAGES_MIN, Observer, Preparation, PrepareOptions, Prepared,
};
pub use report::Report;
pub use score_costs::{ScorerCosts, TokenCosts};
pub use stage::Stage;
pub use subject::Subject;
pub use tables::{profile_table, report_table};
