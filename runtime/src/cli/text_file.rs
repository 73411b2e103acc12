//! Texts that flags name.

use std::fs::File;
use std::io::{BufRead, Read};
use std::path::Path;

use crate::error::RuntimeError;

/// Bytes of a text that are read at most: some hundred times the longest context.
const TEXT_BYTES_MAX: u64 = 1 << 28;

/// The text in a file, without one line end at its end, as llama.cpp reads `-f`.
///
/// # Errors
/// The file cannot be read or is not UTF-8.
pub fn read(path: &Path) -> Result<String, RuntimeError> {
    let mut text = read_as_it_is(path)?;
    if text.ends_with('\n') {
        text.pop();
    }
    Ok(text)
}

/// The text in a file.
///
/// # Errors
/// The file cannot be read, is longer than any text (a device, perhaps) or is not UTF-8.
pub fn read_as_it_is(path: &Path) -> Result<String, RuntimeError> {
    let refused = |source| RuntimeError::ReadText {
        path: path.to_path_buf(),
        source,
    };
    let file = File::open(path).map_err(refused)?;
    let mut bytes = Vec::new();
    file.take(TEXT_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(refused)?;
    if bytes.len() as u64 > TEXT_BYTES_MAX {
        return Err(RuntimeError::TextTooLong {
            path: path.to_path_buf(),
            bytes_max: TEXT_BYTES_MAX,
        });
    }
    utf8(bytes, path)
}

/// All of standard input.
///
/// # Errors
/// It cannot be read or is not UTF-8.
pub fn read_stdin() -> Result<String, RuntimeError> {
    let mut bytes = Vec::new();
    std::io::stdin()
        .lock()
        .read_to_end(&mut bytes)
        .map_err(|source| RuntimeError::InputFailed { source })?;
    utf8(bytes, Path::new(STDIN))
}

/// The next line of standard input, without its end; none where it has ended.
///
/// # Errors
/// It cannot be read or is not UTF-8.
pub fn read_line() -> Result<Option<String>, RuntimeError> {
    let mut bytes = Vec::new();
    let n_read = std::io::stdin()
        .lock()
        .read_until(b'\n', &mut bytes)
        .map_err(|source| RuntimeError::InputFailed { source })?;
    if n_read == 0 {
        return Ok(None);
    }
    let mut line = utf8(bytes, Path::new(STDIN))?;
    line.truncate(line.trim_end_matches(['\n', '\r']).len());
    Ok(Some(line))
}

/// Standard input in messages.
const STDIN: &str = "standard input";

fn utf8(bytes: Vec<u8>, path: &Path) -> Result<String, RuntimeError> {
    String::from_utf8(bytes).map_err(|error| RuntimeError::NotUtf8 {
        path: path.to_path_buf(),
        offset: error.utf8_error().valid_up_to(),
    })
}
