//! Read-only memory mapping of a file, handed out as [`Bytes`] without copying.
//!
//! A file that another program shortens while it is mapped raises `SIGBUS` on the next read of the
//! missing part; `lost_pages` ends the program with the file's name.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use memmap2::Mmap;

#[cfg(unix)]
use crate::lost_pages::Watched;

/// Why a file could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// No such file.
    #[error("{}: no such file; check the path", path.display())]
    Missing {
        /// The path as given.
        path: PathBuf,
    },
    /// The path names a directory, pipe or device.
    #[error("{}: this is {kind}, not a regular file; name the file itself", path.display())]
    NotAFile {
        /// The path as given.
        path: PathBuf,
        /// What it is instead, with its article.
        kind: &'static str,
    },
    /// The file has no bytes.
    #[error("{}: the file is empty; copy or download it again", path.display())]
    Empty {
        /// The path as given.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("{}: cannot {action}: {cause}", path.display())]
    Io {
        /// The path as given.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The operating system's answer.
        cause: io::Error,
    },
}

impl MapError {
    /// Whether the machine is at fault (out of memory, I/O error) rather than the path given.
    pub fn is_environment(&self) -> bool {
        match self {
            // links that lead in a circle are the path's fault
            MapError::Io { cause, .. } => {
                cause.kind() != io::ErrorKind::PermissionDenied
                    && cause.raw_os_error() != Some(libc::ELOOP)
            }
            MapError::Missing { .. } | MapError::NotAFile { .. } | MapError::Empty { .. } => false,
        }
    }
}

/// How a mapped file is about to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// In no particular order (the operating system's default).
    Normal,
    /// From front to back: read ahead far.
    Sequential,
    /// Soon: start reading it from disk now.
    WillNeed,
}

/// A whole file mapped read-only.
///
/// Cheap to clone. The mapping lives until the last clone and the last [`Bytes`] cut from it are
/// gone.
#[derive(Debug, Clone)]
pub struct MappedFile {
    path: Arc<Path>,
    map: Arc<Mapping>,
    bytes: Bytes,
}

/// The mapping, and the watch over it, which ends first.
#[derive(Debug)]
struct Mapping {
    #[cfg(unix)]
    _watched: Watched,
    map: Mmap,
}

/// Keeps the mapping alive for as long as any [`Bytes`] points into it.
struct MapOwner(Arc<Mapping>);

impl AsRef<[u8]> for MapOwner {
    fn as_ref(&self) -> &[u8] {
        &self.0.map
    }
}

impl MappedFile {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// The file is missing, is not a regular file, is empty, or the operating system refuses.
    pub fn open(path: impl AsRef<Path>) -> Result<MappedFile, MapError> {
        let path = path.as_ref();
        let fail = |action: &'static str| {
            move |cause: io::Error| MapError::Io {
                path: path.to_path_buf(),
                action,
                cause,
            }
        };
        // Asked before opening: opening a pipe would wait for a writer.
        let facts = std::fs::metadata(path).map_err(|cause| match cause.kind() {
            io::ErrorKind::NotFound => MapError::Missing {
                path: path.to_path_buf(),
            },
            _ => fail("open the file")(cause),
        })?;
        if !facts.is_file() {
            let kind = if facts.is_dir() {
                "a directory"
            } else {
                "a pipe, socket or device"
            };
            return Err(MapError::NotAFile {
                path: path.to_path_buf(),
                kind,
            });
        }
        let file = File::open(path).map_err(fail("open the file"))?;
        if file
            .metadata()
            .map_err(fail("read the file's length"))?
            .len()
            == 0
        {
            return Err(MapError::Empty {
                path: path.to_path_buf(),
            });
        }
        // SAFETY: the mapping is read-only and nothing in this program writes to the file. Another
        // program that changes the file while it is mapped can change the values read, which all
        // readers treat as untrusted, or shorten it, which ends the process (`lost_pages`).
        let map = unsafe { Mmap::map(&file) }.map_err(fail("map the file into memory"))?;
        let map = Arc::new(Mapping {
            #[cfg(unix)]
            _watched: Watched::new(
                map.as_ptr_range().start as usize..map.as_ptr_range().end as usize,
                path,
            ),
            map,
        });
        let bytes = Bytes::from_owner(MapOwner(Arc::clone(&map)));
        Ok(MappedFile {
            path: Arc::from(path),
            map,
            bytes,
        })
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole file; cut it with [`Bytes::slice`], which copies nothing.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Length of the file in bytes.
    pub fn len_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Tells the operating system how `range` (bytes of the file) will be read.
    ///
    /// Only a hint: where the system does not know it, nothing happens. A range that reaches
    /// beyond the file is cut at its end.
    pub fn advise(&self, range: Range<usize>, access: Access) {
        let range = range.start.min(self.len_bytes())..range.end.min(self.len_bytes());
        if range.is_empty() {
            return;
        }
        #[cfg(unix)]
        {
            let advice = match access {
                Access::Normal => memmap2::Advice::Normal,
                Access::Sequential => memmap2::Advice::Sequential,
                Access::WillNeed => memmap2::Advice::WillNeed,
            };
            // A refused hint changes nothing but speed.
            let _ = self.map.map.advise_range(advice, range.start, range.len());
        }
        #[cfg(not(unix))]
        let _ = access;
    }

    /// Takes the pages that lie wholly inside `range` (bytes of the file) out of this process.
    ///
    /// They stay in the system's page cache, and a later read brings them back with the same
    /// content: call it after copying a tensor, so that the copy and the file's pages do not both
    /// count as this process's memory. Returns the number of bytes given back.
    pub fn drop_pages(&self, range: Range<usize>) -> usize {
        let page_bytes = page_bytes();
        let start = range
            .start
            .min(self.len_bytes())
            .next_multiple_of(page_bytes);
        let end = range.end.min(self.len_bytes());
        // The last page of the file may be cut short by the file's end.
        let end = if end == self.len_bytes() {
            end
        } else {
            end - end % page_bytes
        };
        if start >= end {
            return 0;
        }
        #[cfg(unix)]
        {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the mapping is a read-only view of a file, so dropped pages are read from
            // the file again at the next access; no value that anybody has seen changes.
            let dropped = unsafe {
                self.map
                    .map
                    .unchecked_advise_range(advice, start, end - start)
            }
            .is_ok();
            if dropped { end - start } else { 0 }
        }
        #[cfg(not(unix))]
        0
    }
}

/// Size of a memory page in bytes.
fn page_bytes() -> usize {
    #[cfg(unix)]
    {
        // SAFETY: `sysconf` only reads a constant of the system.
        let page_bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        usize::try_from(page_bytes).unwrap_or(4096).max(1)
    }
    #[cfg(not(unix))]
    4096
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_and_slices_without_copying() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let content: Vec<u8> = (0..20_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let file = MappedFile::open(&path).unwrap();
        assert_eq!(file.len_bytes(), content.len());
        let part = file.bytes().slice(5000..9000);
        assert_eq!(
            part.as_ptr() as usize,
            file.bytes().as_ptr() as usize + 5000
        );
        drop(file);
        assert_eq!(part, content[5000..9000]);
    }

    #[cfg(unix)]
    #[test]
    fn drops_whole_pages_only_and_reads_them_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let page = page_bytes();
        let content: Vec<u8> = (0..5 * page + 10).map(|i| (i % 253) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let file = MappedFile::open(&path).unwrap();
        file.advise(0..usize::MAX, Access::Sequential);
        assert_eq!(file.bytes().as_ref(), &content[..]);
        assert_eq!(file.drop_pages(1..3 * page - 1), page);
        assert_eq!(file.drop_pages(page..page + 5), 0);
        assert_eq!(file.drop_pages(0..usize::MAX), content.len());
        assert_eq!(file.drop_pages(usize::MAX - 1..usize::MAX), 0);
        assert_eq!(file.bytes().as_ref(), &content[..]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn dropped_pages_leave_the_resident_set() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let content = vec![7u8; 32 << 20];
        std::fs::write(&path, &content).unwrap();
        drop(content);
        let file = MappedFile::open(&path).unwrap();
        let sum: u64 = file.bytes().iter().map(|&b| u64::from(b)).sum();
        assert_eq!(sum, 7 * (32 << 20));
        let before = resident_kib_of(&file);
        file.drop_pages(0..file.len_bytes());
        let after = resident_kib_of(&file);
        assert!(before >= 16 << 10, "read {before} KiB of 32 MiB");
        assert_eq!(after, 0);
    }

    /// `Rss` of the mapping that starts where `file` does.
    #[cfg(target_os = "linux")]
    fn resident_kib_of(file: &MappedFile) -> u64 {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{:x}-", file.bytes().as_ptr() as usize);
        let mut lines = maps.lines().skip_while(|line| !line.starts_with(&start));
        let rss = lines.find(|line| line.starts_with("Rss:")).unwrap();
        rss.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    #[test]
    fn refuses_what_cannot_be_mapped() {
        let folder = tempfile::tempdir().unwrap();
        let missing = MappedFile::open(folder.path().join("none")).unwrap_err();
        assert!(
            missing
                .to_string()
                .ends_with("none: no such file; check the path"),
            "{missing}"
        );
        let directory = MappedFile::open(folder.path()).unwrap_err();
        assert!(
            directory.to_string().contains("this is a directory"),
            "{directory}"
        );
        let path = folder.path().join("empty");
        std::fs::write(&path, "").unwrap();
        let empty = MappedFile::open(&path).unwrap_err();
        assert!(empty.to_string().contains("the file is empty"), "{empty}");
        assert!(!empty.is_environment());
    }
}
