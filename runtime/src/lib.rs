//! GGUF models, tokenizer, sampler, sessions and the command line on top of the actor pipeline.

pub mod bench;
pub mod calendar;
pub mod chat;
pub mod cli;
pub mod doctor;
pub mod error;
pub mod gguf;
pub mod inspect;
pub mod mapped_file;
pub mod model;
pub mod pack;
pub mod perplexity;
pub mod sampler;
pub mod session;
pub mod tokenizer;
