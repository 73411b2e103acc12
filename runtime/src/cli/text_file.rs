//! Texts that flags name.

use std::io::Read;
use std::path::Path;

use crate::error::RuntimeError;

/// The text in a file, without one line end at its end, as llama.cpp reads `-f`.
///
/// # Errors
/// The file cannot be read or is not UTF-8.
pub fn read(path: &Path) -> Result<String, RuntimeError> {
    let bytes = std::fs::read(path).map_err(|source| RuntimeError::ReadText {
        path: path.to_path_buf(),
        source,
    })?;
    let mut text = String::from_utf8(bytes).map_err(|error| RuntimeError::NotUtf8 {
        path: path.to_path_buf(),
        offset: error.utf8_error().valid_up_to(),
    })?;
    if text.ends_with('\n') {
        text.pop();
    }
    Ok(text)
}

/// All of standard input.
///
/// # Errors
/// It cannot be read or is not UTF-8.
pub fn read_stdin() -> Result<String, RuntimeError> {
    let mut text = String::new();
    std::io::stdin()
        .lock()
        .read_to_string(&mut text)
        .map_err(|source| RuntimeError::InputFailed { source })?;
    Ok(text)
}
