//! `pi-runtime doctor`: what was found on this machine, what stands in the way, and the command that mends it.
//!
//! [`Facts`] are gathered once; [`findings`] is a pure function of them.

mod facts;
mod findings;
mod gpu;
mod memory;
mod model_needs;
mod processor;
mod report;
#[cfg(test)]
mod tests;

pub use facts::{Facts, ModelFacts, PlanFacts};
pub use findings::{Finding, State, findings};
pub use model_needs::ModelNeeds;
pub use report::{json, text};
