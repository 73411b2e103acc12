//! `pi-runtime bench`: prefill and decode speed, with llama-bench's table and field names.

pub mod environment;
pub mod feeder;
pub mod row;
pub mod runner;
pub mod table;
pub mod token_source;

pub use feeder::BenchFeeder;
pub use row::{BenchRow, BenchTest};
pub use runner::{Measured, Runner};
pub use token_source::TokenSource;
