//! Files on their way: gone again unless they are finished, also when Ctrl-C ends the program.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard};

/// Paths of all unfinished files of the program.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// The path of a file that is removed unless it is given another name.
#[derive(Debug)]
pub struct UnfinishedFile {
    path: PathBuf,
}

impl UnfinishedFile {
    /// Creates a new file in the folder of `path`.
    ///
    /// # Errors
    /// `path` names no file, or what the operating system refuses.
    pub fn create_beside(path: &Path) -> io::Result<(Self, File)> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let end = format!(".{}-{number}.part", std::process::id());
            let hidden = hidden_beside(path, &end)?;
            let mut unfinished = paths();
            match File::create_new(&hidden) {
                Ok(file) => {
                    unfinished.push(hidden.clone());
                    return Ok((Self { path: hidden }, file));
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// A name in the folder of `path` for a file that somebody else writes, and that ends in `end`.
    ///
    /// # Errors
    /// `path` names no file.
    pub fn named_beside(path: &Path, end: &str) -> io::Result<Self> {
        let end = format!(".{end}.{}.tmp", std::process::id());
        let hidden = hidden_beside(path, &end)?;
        paths().push(hidden.clone());
        Ok(Self { path: hidden })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Finishes it: from here on it is at `path`, in place of what was there.
    ///
    /// # Errors
    /// What the operating system refuses; the file is removed then.
    pub fn rename_to(self, path: &Path) -> io::Result<()> {
        let _unfinished = paths();
        fs::rename(&self.path, path)
    }
}

impl Drop for UnfinishedFile {
    fn drop(&mut self) {
        let mut unfinished = paths();
        unfinished.retain(|path| *path != self.path);
        // it may have another name by now, and nobody is left to hear of a failure
        let _ = fs::remove_file(&self.path);
    }
}

/// All unfinished files are gone, and while this lives there will be no others.
#[must_use]
pub struct NoneLeft(
    #[expect(dead_code, reason = "held, not read")] MutexGuard<'static, Vec<PathBuf>>,
);

/// Removes all unfinished files, for a program that is about to end.
pub fn remove_all() -> NoneLeft {
    let mut unfinished = paths();
    for path in unfinished.drain(..) {
        // it may not have been written yet
        let _ = fs::remove_file(path);
    }
    NoneLeft(unfinished)
}

fn paths() -> MutexGuard<'static, Vec<PathBuf>> {
    UNFINISHED
        .lock()
        .unwrap_or_else(|broken| broken.into_inner())
}

/// A hidden name beside `path`.
fn hidden_beside(path: &Path, end: &str) -> io::Result<PathBuf> {
    let Some(name) = path.file_name() else {
        let problem = "the path names no file";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
    };
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(end);
    Ok(path.with_file_name(hidden))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_file_is_gone_and_a_finished_one_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        let (dropped, _) = UnfinishedFile::create_beside(&path).unwrap();
        assert!(dropped.path().exists());
        drop(dropped);
        let (finished, _) = UnfinishedFile::create_beside(&path).unwrap();
        finished.rename_to(&path).unwrap();
        let named = UnfinishedFile::named_beside(&path, "x").unwrap();
        fs::write(named.path(), "x").unwrap();
        drop(named);
        let left: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
        assert_eq!(left.len(), 1);
        assert!(path.exists() && paths().iter().all(|path| !path.starts_with(folder.path())));
    }

    #[test]
    fn a_path_without_a_name_is_refused() {
        assert!(UnfinishedFile::create_beside(Path::new("/")).is_err());
    }
}
