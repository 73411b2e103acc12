//! The data section of a file being written: tensors in order, and the file in place at the end.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use super::GgufError;
use crate::unfinished_file::UnfinishedFile;

/// Bytes gathered before they are written to the file.
const BUFFER_BYTES: usize = 1 << 20;

/// Where a tensor's data goes.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) name: String,
    /// Offset in the data section in bytes.
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

/// A file whose header is written and whose tensors are to come.
///
/// The bytes go to a temporary file in the same folder, which takes the final name in
/// [`finish`](GgufStream::finish). A stream that is dropped before leaves nothing behind, and what
/// was at the path before stays as it was.
#[derive(Debug)]
pub struct GgufStream {
    path: PathBuf,
    // Before `temporary`, so that the file is closed when it is removed.
    out: BufWriter<File>,
    temporary: UnfinishedFile,
    slots: Vec<Slot>,
    /// The tensor that is being written, as an index into `slots`.
    current: usize,
    /// Bytes written into the data section.
    written: u64,
}

impl GgufStream {
    pub(super) fn create(
        path: &Path,
        header: &[u8],
        slots: Vec<Slot>,
    ) -> Result<GgufStream, GgufError> {
        match fs::metadata(path) {
            Ok(facts) if !facts.is_file() => {
                return Err(GgufError::NotReplaceable {
                    path: path.to_path_buf(),
                });
            }
            _ => {}
        }
        let (temporary, file) = UnfinishedFile::create_beside(path)
            .map_err(|cause| write_error(path, "create a file in its folder", cause))?;
        let mut stream = GgufStream {
            path: path.to_path_buf(),
            temporary,
            out: BufWriter::with_capacity(BUFFER_BYTES, file),
            slots,
            current: 0,
            written: 0,
        };
        stream.write_bytes(header)?;
        Ok(stream)
    }

    /// Writes `bytes` as the next part of tensor `name`.
    ///
    /// A tensor may come in any number of parts; the tensors come in the order in which they were
    /// announced, each whole before the next one begins.
    ///
    /// # Errors
    /// It is another tensor's turn, there are more bytes than the tensor has, or the operating
    /// system refuses. After an error the file cannot be finished.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), GgufError> {
        while let Some(slot) = self.slots.get(self.current)
            && slot.name != name
            && self.written == slot.offset + slot.bytes
        {
            self.current += 1;
        }
        let Some(slot) = self.slots.get(self.current) else {
            return Err(wrong_data(
                name,
                "all announced tensors are written".to_owned(),
            ));
        };
        if slot.name != name {
            return Err(wrong_data(
                name,
                format!("it is the turn of {:?}", slot.name),
            ));
        }
        let (offset, end) = (slot.offset, slot.offset + slot.bytes);
        let start = self.written.max(offset);
        if bytes.len() as u64 > end - start {
            return Err(wrong_data(
                name,
                format!(
                    "{} bytes given, {} are left of it",
                    bytes.len(),
                    end - start
                ),
            ));
        }
        let padding = start - self.written;
        self.pad(padding)?;
        self.write_bytes(bytes)?;
        self.written = start + bytes.len() as u64;
        Ok(())
    }

    /// Completes the file and gives it its name.
    ///
    /// # Errors
    /// A tensor is not written whole, or the operating system refuses (disk full, for example).
    pub fn finish(mut self) -> Result<(), GgufError> {
        if let Some(slot) = self
            .slots
            .iter()
            .find(|slot| self.written < slot.offset + slot.bytes)
        {
            let problem = "the file was to be finished before all of its data was written";
            return Err(wrong_data(&slot.name, problem.to_owned()));
        }
        let flushed = self
            .out
            .flush()
            .and_then(|()| self.out.get_ref().sync_all());
        flushed.map_err(|cause| write_error(&self.path, "write the file", cause))?;
        self.temporary
            .rename_to(&self.path)
            .map_err(|cause| write_error(&self.path, "give the finished file its name", cause))
    }

    fn pad(&mut self, count: u64) -> Result<(), GgufError> {
        let padding = io::copy(&mut io::Read::take(io::repeat(0), count), &mut self.out);
        padding
            .map(drop)
            .map_err(|cause| write_error(&self.path, "write the file", cause))
    }

    fn write_bytes(&mut self, bytes: &[u8]) -> Result<(), GgufError> {
        let written = self.out.write_all(bytes);
        written.map_err(|cause| write_error(&self.path, "write the file", cause))
    }
}

fn write_error(path: &Path, action: &'static str, cause: io::Error) -> GgufError {
    GgufError::Write {
        path: path.to_path_buf(),
        action,
        cause,
    }
}

fn wrong_data(tensor: &str, problem: String) -> GgufError {
    GgufError::WrongData {
        tensor: tensor.to_owned(),
        problem,
    }
}
