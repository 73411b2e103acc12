//! `pi-runtime completions` and `pi-runtime man`: what shells and `man` know of the flags.

use std::path::Path;

use clap::{Command, CommandFactory};

use super::args::{Cli, CompletionsArgs, ManArgs};
use super::output::{Output, output_error};
use crate::error::RuntimeError;

/// Prints the completions of a shell.
///
/// # Errors
/// The output.
pub fn run(args: &CompletionsArgs) -> Result<(), RuntimeError> {
    let mut script = Vec::new();
    let mut command = Cli::command();
    let name = command.get_name().to_owned();
    clap_complete::generate(args.shell, &mut command, name, &mut script);
    print(&script)
}

/// Prints the program's manual page, or writes those of all subcommands into a folder.
///
/// # Errors
/// The output, or what the file system refuses.
pub fn man(args: &ManArgs) -> Result<(), RuntimeError> {
    let command = Cli::command();
    let Some(folder) = &args.folder else {
        let mut page = Vec::new();
        clap_mangen::Man::new(command)
            .render(&mut page)
            .map_err(output_error)?;
        return print(&page);
    };
    write_pages(command, folder).map_err(|source| RuntimeError::WritePages {
        folder: folder.clone(),
        source,
    })
}

fn write_pages(command: Command, folder: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    clap_mangen::generate_to(command, folder)
}

fn print(bytes: &[u8]) -> Result<(), RuntimeError> {
    Output::default()
        .stream()
        .write_all(bytes)
        .map_err(output_error)
}
