//! The `pi-runtime` program.

use std::process::ExitCode;

use pi_runtime::heap_limit::LimitedHeap;

#[global_allocator]
static ALLOCATOR: LimitedHeap = LimitedHeap;

fn main() -> ExitCode {
    pi_runtime::cli::main(std::env::args_os())
}
