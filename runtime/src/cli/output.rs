//! Standard output: text as it is generated, and what to do when nobody reads it.

use std::io::{self, ErrorKind, Write};

use crate::error::RuntimeError;

/// Standard output whose closed reader is an ordinary end and whose other failures name it.
#[derive(Debug)]
pub struct Output {
    out: io::Stdout,
}

impl Default for Output {
    fn default() -> Self {
        Self { out: io::stdout() }
    }
}

impl Output {
    /// Writes `text` and shows it at once.
    ///
    /// # Errors
    /// [`RuntimeError::OutputClosed`] when the reader went away, [`RuntimeError::OutputFailed`] otherwise.
    pub fn text(&mut self, text: &str) -> Result<(), RuntimeError> {
        self.out
            .write_all(text.as_bytes())
            .and_then(|()| self.out.flush())
            .map_err(output_error)
    }

    /// Writes `text` and a line end.
    ///
    /// # Errors
    /// As [`Output::text`].
    pub fn line(&mut self, text: &str) -> Result<(), RuntimeError> {
        writeln!(self.out, "{text}")
            .and_then(|()| self.out.flush())
            .map_err(output_error)
    }

    /// The stream itself, for writers of several lines.
    pub fn stream(&mut self) -> &mut dyn Write {
        &mut self.out
    }
}

/// What a failed write to standard output means.
pub fn output_error(source: io::Error) -> RuntimeError {
    if source.kind() == ErrorKind::BrokenPipe {
        RuntimeError::OutputClosed
    } else {
        RuntimeError::OutputFailed { source }
    }
}
