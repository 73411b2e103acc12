//! The folder that profiles are kept in.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use pi_topology::{Machine, Plan};

use super::{MachineProfile, fingerprint};
use crate::error::RuntimeError;
use crate::unfinished_file::UnfinishedFile;

/// Longest file that is read: a profile of 16 teams has a hundredth.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Profiles as files of a folder, each named after its fingerprint.
#[derive(Debug, Clone)]
pub struct ProfileStore {
    folder: PathBuf,
}

impl ProfileStore {
    /// Keeps them in `folder`, which is made when one is saved.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// The profile of `machine` with the threads of `plan`, if it is kept. A file that is no profile counts as none, and
    /// is named in the log.
    pub fn find(&self, machine: &Machine, plan: &Plan) -> Option<MachineProfile> {
        let fingerprint = fingerprint(machine, plan);
        let path = self.path(&fingerprint);
        match read(&path, &fingerprint) {
            Ok(profile) => profile,
            Err(problem) => {
                tracing::warn!(
                    "{}: not used, for {problem}: make it anew with `pi-runtime topology measure`",
                    path.display()
                );
                None
            }
        }
    }

    /// Keeps a profile in place of an older one, and returns its file.
    ///
    /// # Errors
    /// What the file system refuses.
    pub fn save(&self, profile: &MachineProfile) -> Result<PathBuf, RuntimeError> {
        let path = self.path(&profile.fingerprint);
        match self.write(profile, &path) {
            Ok(()) => Ok(path),
            Err(source) => Err(RuntimeError::WriteProfile { path, source }),
        }
    }

    fn write(&self, profile: &MachineProfile, path: &Path) -> io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        let (unfinished, mut file) = UnfinishedFile::create_beside(path)?;
        let text = serde_json::to_string_pretty(profile)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        unfinished.rename_to(path)
    }

    fn path(&self, fingerprint: &str) -> PathBuf {
        self.folder.join(format!("machine-{fingerprint}.json"))
    }
}

/// The profile in a file; none without a file. An error says what is wrong with it.
fn read(path: &Path, fingerprint: &str) -> Result<Option<MachineProfile>, String> {
    let bytes = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
        Ok(metadata) => metadata.len(),
    };
    if bytes > FILE_BYTES_MAX {
        return Err(format!("it has {bytes} bytes"));
    }
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    let profile: MachineProfile = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    if profile.fingerprint != fingerprint {
        return Err(format!("it is of the machine {}", profile.fingerprint));
    }
    match profile.is_sane() {
        true => Ok(Some(profile)),
        false => Err("its numbers cannot be".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine_profile::tests::profile;

    #[test]
    fn a_profile_is_found_again_bit_by_bit() {
        let folder = tempfile::tempdir().unwrap();
        let store = ProfileStore::new(folder.path().join("a/b"));
        let kept = profile(12_345_678_901.2);
        let path = store.save(&kept).unwrap();
        assert_eq!(read(&path, &kept.fingerprint).unwrap(), Some(kept.clone()));
        // in place of the older one, and with nothing beside it
        let newer = profile(3e10);
        assert_eq!(store.save(&newer).unwrap(), path);
        assert_eq!(read(&path, &newer.fingerprint).unwrap(), Some(newer));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    /// Of before joins and GPUs were measured.
    #[test]
    fn files_of_earlier_versions_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("machine-x.json");
        let mut older = profile(1e10);
        let mut value = serde_json::to_value(&older).unwrap();
        for key in ["joins", "gpus", "gpu_problems"] {
            value.as_object_mut().unwrap().remove(key).unwrap();
        }
        fs::write(&path, value.to_string()).unwrap();
        older.joins.clear();
        older.gpu_problems.clear();
        assert_eq!(read(&path, &older.fingerprint).unwrap(), Some(older));
    }

    #[test]
    fn files_that_are_no_profile_are_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("machine-x.json");
        assert_eq!(read(&path, "x").unwrap(), None);
        let whole = serde_json::to_string(&profile(1e10)).unwrap();
        for (text, problem) in [
            ("", "EOF"),
            ("{}", "missing field"),
            (whole.as_str(), "it is of the machine 0123456789abcdef"),
            (&whole[..whole.len() / 2], "EOF"),
        ] {
            fs::write(&path, text).unwrap();
            let found = read(&path, "x").unwrap_err();
            assert!(found.contains(problem), "{found}");
        }
        let slow = serde_json::to_string(&profile(-1.0)).unwrap();
        fs::write(&path, slow).unwrap();
        let found = read(&path, "0123456789abcdef").unwrap_err();
        assert_eq!(found, "its numbers cannot be");
        fs::File::create(&path).unwrap().set_len(2 << 20).unwrap();
        assert_eq!(read(&path, "x").unwrap_err(), "it has 2097152 bytes");
        assert!(read(folder.path(), "x").is_err());
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let error = ProfileStore::new(file.join("below")).save(&profile(1e10));
        let text = error.unwrap_err().to_string();
        assert!(text.contains("file/below/machine-"), "{text}");
    }
}
