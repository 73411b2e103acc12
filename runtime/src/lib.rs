//! GGUF models, tokenizer, sampler, sessions and the command line on top of the actor pipeline.

pub mod bench;
pub mod calendar;
pub mod chat;
pub mod cli;
pub mod doctor;
pub mod error;
pub mod gguf;
pub mod head_sketch;
pub mod heap_limit;
pub mod inspect;
mod linear_algebra;
#[cfg(unix)]
mod lost_pages;
pub mod machine_profile;
pub mod mapped_file;
pub mod model;
pub mod numa_bench;
pub mod pack;
pub mod perplexity;
mod picture;
pub mod plan;
pub mod predictor;
pub mod prepare;
pub mod sampler;
pub mod session;
pub mod sidecar;
pub mod synth;
pub mod threshold;
pub mod tokenizer;
pub mod topology_view;
pub mod trace;
pub mod unfinished_file;

// as in the program, so that its limits hold in tests
#[cfg(test)]
#[global_allocator]
static ALLOCATOR: heap_limit::LimitedHeap = heap_limit::LimitedHeap;
