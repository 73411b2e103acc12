//! A conversation with a model: prompts in, text out, the key-value cache kept in between.

mod generation;

pub use generation::{Generation, GenerationOptions, Stop};
