//! Finding the demo model when no `-m` is given.

use std::path::{Path, PathBuf};

use super::user_folder;
use crate::error::RuntimeError;

/// File name of the demo model.
pub const DEMO_MODEL: &str = "smollm2-135m-reglu-q4_0.gguf";

/// Where the demo model is looked for: `models/` in `starts` (the program's folder, the current one) and all folders
/// above, nearest first, then the user's data folder.
pub fn candidates(starts: &[PathBuf], data: Option<&Path>) -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = starts
        .iter()
        .flat_map(|start| start.ancestors().map(|folder| folder.join("models")))
        .chain(data.map(|folder| folder.join("models")))
        .map(|folder| folder.join(DEMO_MODEL))
        .collect();
    let mut seen = std::collections::HashSet::new();
    folders.retain(|path| seen.insert(path.clone()));
    folders
}

/// The model named with `-m`, or the demo model.
///
/// # Errors
/// [`RuntimeError::NoModel`], with the place to put the demo model, when none is named or found.
pub fn or_demo(named: Option<&Path>) -> Result<PathBuf, RuntimeError> {
    if let Some(path) = named {
        return Ok(path.to_path_buf());
    }
    let program = std::env::current_exe()
        .ok()
        .and_then(|path| path.parent().map(Path::to_path_buf));
    let starts: Vec<PathBuf> = std::env::current_dir()
        .ok()
        .into_iter()
        .chain(program)
        .collect();
    let data = user_folder::data();
    let paths = candidates(&starts, data.as_deref());
    paths
        .into_iter()
        .find(|path| path.is_file())
        .ok_or_else(|| RuntimeError::NoModel {
            name: DEMO_MODEL,
            folder: data.unwrap_or_default().join("models"),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_folder_first_user_s_data_last() {
        let paths = candidates(
            &["/a/b".into(), "/a/c".into()],
            Some(Path::new("/home/u/.local/share/pi-runtime")),
        );
        let folders: Vec<&str> = paths
            .iter()
            .map(|path| path.parent().unwrap().to_str().unwrap())
            .collect();
        assert_eq!(
            folders,
            [
                "/a/b/models",
                "/a/models",
                "/models",
                "/a/c/models",
                "/home/u/.local/share/pi-runtime/models"
            ]
        );
    }
}
