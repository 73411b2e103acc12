//! `pi-runtime bench`: prefill and decode speed, with llama-bench's table and field names.

pub mod environment;
pub mod row;
pub mod table;
pub mod token_source;
