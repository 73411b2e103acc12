//! Finding the demo model when no `-m` is given.

use std::path::{Path, PathBuf};

use crate::error::RuntimeError;

/// File name of the demo model.
pub const DEMO_MODEL: &str = "smollm2-135m-reglu-q4_0.gguf";

/// Where the demo model is looked for: `models/` in the current folder, the program's and all folders above, nearest
/// first; `share/` beside the `bin/` that the program is in; the user's data folder.
pub fn candidates(
    current: Option<&Path>,
    program: Option<&Path>,
    data_home: Option<&Path>,
) -> Vec<PathBuf> {
    let data_homes = program
        .and_then(Path::parent)
        .map(|prefix| prefix.join("share"))
        .into_iter()
        .chain(data_home.map(Path::to_path_buf));
    let mut folders: Vec<PathBuf> = [current, program]
        .into_iter()
        .flatten()
        .flat_map(|start| start.ancestors().map(|folder| folder.join("models")))
        .chain(data_homes.map(|home| home.join("pi-runtime").join("models")))
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
    let current = std::env::current_dir().ok();
    let data_home = data_home();
    let paths = candidates(current.as_deref(), program.as_deref(), data_home.as_deref());
    paths
        .into_iter()
        .find(|path| path.is_file())
        .ok_or_else(|| RuntimeError::NoModel {
            name: DEMO_MODEL,
            folder: data_home
                .unwrap_or_default()
                .join("pi-runtime")
                .join("models"),
        })
}

fn data_home() -> Option<PathBuf> {
    let absolute = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    absolute("XDG_DATA_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local").join("share")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_folder_first_user_s_data_last() {
        let paths = candidates(
            Some(Path::new("/a/b")),
            Some(Path::new("/a/c")),
            Some(Path::new("/home/u/.local/share")),
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
                "/a/share/pi-runtime/models",
                "/home/u/.local/share/pi-runtime/models"
            ]
        );
    }
}
