//! The `pi-runtime` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    pi_runtime::cli::main(std::env::args_os())
}
