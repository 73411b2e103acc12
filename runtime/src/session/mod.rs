//! A conversation with a model: prompts in, text out, the key-value cache kept in between.

mod answer;
mod conflict_log;
mod generation;
mod gpu;
mod opening;
mod replanning;
mod sparsity;
mod stop_texts;
mod topology_file;
mod topology_syntax;

pub use answer::{Answer, AnswerOptions, Session};
pub(crate) use conflict_log::warn_of_conflicts;
pub use generation::{
    ContextShift, Finished, Generation, GenerationOptions, Stop, TextSink, hash_floats,
};
pub(crate) use gpu::{OpenGpu, open_all, open_gpu};
pub use opening::{LoadObserver, LoadedModel, ModelOptions, N_UBATCH, Silent};
pub(crate) use opening::{N_CTX_DEFAULT_MAX, open_sidecar};
pub use sparsity::ThresholdSource;
pub use topology_file::TopologyFile;

#[cfg(test)]
mod tests;
