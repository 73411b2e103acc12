//! What is done so far, kept beside the sidecar to be, so that an interrupted preparation goes on where it was.
//!
//! The folder `<sidecar>.partial` has a file for each finished part, and one that says what they were made from and
//! with. Files appear whole or not at all. A folder made from anything else is emptied, and all of it goes when the
//! sidecar is there.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::PrepareError;
use crate::gguf::{GgufError, GgufFile, GgufWriter};
use crate::sidecar::Section;
use crate::unfinished_file::UnfinishedFile;

const KEY: &str = "made-from";
const LOCK: &str = "lock";
const N_PASSAGES: &str = "passages";
const SAMPLES: &str = "states.f16";

/// What was there when a checkpoint was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Earlier {
    /// Nothing.
    None,
    /// Parts of the same preparation, which goes on.
    Same,
    /// Parts of another one, which are gone.
    Other,
}

/// The folder of what is done so far.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    /// Held until the preparation ends.
    lock: File,
}

impl Checkpoint {
    /// Opens the folder beside `output` for a preparation that `key` tells from all others.
    ///
    /// # Errors
    /// What the file system refuses, or another program prepares the same sidecar.
    pub fn open(output: &Path, key: &str) -> Result<(Self, Earlier), PrepareError> {
        let mut folder = output.to_owned().into_os_string();
        folder.push(".partial");
        let folder = PathBuf::from(folder);
        let refused = |source| PrepareError::Checkpoint {
            path: folder.clone(),
            action: "keep",
            source,
        };
        match fs::create_dir(&folder) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                return Err(refused(source));
            }
            _ => {}
        }
        let lock = lock(&folder.join(LOCK)).map_err(refused)?;
        let checkpoint = Self { folder, lock };
        let earlier = match fs::read_to_string(checkpoint.path(KEY)) {
            Ok(found) if found == key => Earlier::Same,
            Ok(_) => Earlier::Other,
            Err(_) => Earlier::None,
        };
        if earlier != Earlier::Same {
            checkpoint.empty()?;
            keep_text(&checkpoint.path(KEY), key)?;
        }
        Ok((checkpoint, earlier))
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The file of hidden states.
    pub fn samples(&self) -> PathBuf {
        self.path(SAMPLES)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn error(&self, action: &'static str, name: &str, source: io::Error) -> PrepareError {
        PrepareError::Checkpoint {
            path: self.path(name),
            action,
            source,
        }
    }

    /// Passages whose hidden states are kept.
    pub fn n_passages(&self) -> usize {
        let text = fs::read_to_string(self.path(N_PASSAGES));
        text.ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0)
    }

    /// Takes note that the states of so many passages are kept.
    ///
    /// # Errors
    /// What the file system refuses.
    pub fn keep_n_passages(&self, n: usize) -> Result<(), PrepareError> {
        self.noting()(n)
    }

    /// [`Self::keep_n_passages`], to be called from elsewhere.
    pub fn noting(&self) -> impl Fn(usize) -> Result<(), PrepareError> + Send + 'static {
        let path = self.path(N_PASSAGES);
        move |n| keep_text(&path, &n.to_string())
    }

    /// The finished part `name`, if it is there.
    pub fn section(&self, name: &str) -> Option<Section> {
        let path = self.section_path(name);
        if !path.exists() {
            return None;
        }
        let read = GgufFile::open(&path)
            .map_err(crate::sidecar::SidecarError::from)
            .and_then(|file| Section::of(&file, |_| true));
        read.inspect_err(|error| tracing::warn!("{name} is made again: {error}"))
            .ok()
    }

    /// Keeps the finished part `name`.
    ///
    /// # Errors
    /// What the file system refuses.
    pub fn keep(&self, name: &str, section: &Section) -> Result<(), GgufError> {
        section.write(GgufWriter::new(), &self.section_path(name))
    }

    /// Where the finished part `name` is kept.
    pub fn section_path(&self, name: &str) -> PathBuf {
        self.path(&format!("{name}.gguf"))
    }

    /// Whether nothing has been done yet.
    pub fn is_blank(&self) -> bool {
        let Ok(entries) = fs::read_dir(&self.folder) else {
            return false;
        };
        let mut names = entries.flatten().map(|entry| entry.file_name());
        names.all(|name| name == KEY || name == LOCK)
    }

    /// Removes what a preparation leaves, and nothing else that somebody may have put there.
    fn empty(&self) -> Result<(), PrepareError> {
        let names = fs::read_dir(&self.folder).and_then(|entries| {
            entries
                .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                .collect::<io::Result<Vec<_>>>()
        });
        for name in names.map_err(|source| self.error("read", "", source))? {
            let ours = [KEY, N_PASSAGES].contains(&&*name)
                || name.ends_with(".gguf")
                || name.ends_with(".f16")
                || (name.starts_with('.') && name.ends_with(".part"));
            if ours {
                fs::remove_file(self.path(&name))
                    .map_err(|source| self.error("remove", &name, source))?;
            }
        }
        Ok(())
    }

    /// Removes it all: the sidecar is there.
    ///
    /// # Errors
    /// What the file system refuses.
    pub fn remove(self) -> Result<(), PrepareError> {
        self.empty()?;
        let Self { folder, lock } = self;
        let removed = fs::remove_file(folder.join(LOCK)).and_then(|()| fs::remove_dir(&folder));
        drop(lock);
        removed.map_err(|source| PrepareError::Checkpoint {
            path: folder,
            action: "remove",
            source,
        })
    }
}

/// Writes a small file, whole or not at all.
fn keep_text(path: &Path, text: &str) -> Result<(), PrepareError> {
    let written = UnfinishedFile::create_beside(path).and_then(|(unfinished, mut file)| {
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        unfinished.rename_to(path)
    });
    written.map_err(|source| PrepareError::Checkpoint {
        path: path.to_owned(),
        action: "keep",
        source,
    })
}

/// Takes the lock of a folder, which goes with the process.
fn lock(path: &Path) -> io::Result<File> {
    let file = File::create(path)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "another program is preparing the same sidecar: wait for it, or name another one with -o",
        )),
        Err(TryLockError::Error(source)) => Err(source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(value: f32) -> Section {
        let mut section = Section::new();
        section.vector("v", &[value]).unwrap();
        section
    }

    #[test]
    fn parts_are_found_again_by_the_same_preparation_only() {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("m.sparse.gguf");
        let (checkpoint, earlier) = Checkpoint::open(&output, "a").unwrap();
        assert_eq!((earlier, checkpoint.n_passages()), (Earlier::None, 0));
        assert!(checkpoint.is_blank());
        checkpoint.keep("profile", &section(1.0)).unwrap();
        assert!(!checkpoint.is_blank());
        checkpoint.keep_n_passages(3).unwrap();
        let busy = Checkpoint::open(&output, "a").unwrap_err();
        assert!(busy.to_string().contains("another program"), "{busy}");
        drop(checkpoint);

        let (checkpoint, earlier) = Checkpoint::open(&output, "a").unwrap();
        assert_eq!((earlier, checkpoint.n_passages()), (Earlier::Same, 3));
        assert_eq!(checkpoint.section("profile").unwrap().size_bytes(), 4);
        fs::write(checkpoint.folder().join("theirs.txt"), "x").unwrap();
        drop(checkpoint);

        let (checkpoint, earlier) = Checkpoint::open(&output, "b").unwrap();
        assert_eq!((earlier, checkpoint.n_passages()), (Earlier::Other, 0));
        assert!(checkpoint.section("profile").is_none());
        assert!(checkpoint.folder().join("theirs.txt").exists());
        fs::remove_file(checkpoint.folder().join("theirs.txt")).unwrap();
        checkpoint.remove().unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_damaged_part_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let (checkpoint, _) = Checkpoint::open(&folder.path().join("m"), "a").unwrap();
        checkpoint.keep("head", &section(1.0)).unwrap();
        fs::write(checkpoint.section_path("head"), "GGUF").unwrap();
        assert!(checkpoint.section("head").is_none());
    }
}
