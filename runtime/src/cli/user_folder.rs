//! The user's own folders, as the XDG base directory specification names them.

use std::path::PathBuf;

/// The program's name in them.
const NAME: &str = "pi-runtime";

/// Where data lies, such as models; none without a home.
pub fn data() -> Option<PathBuf> {
    folder("XDG_DATA_HOME", ".local/share")
}

/// Where state is kept, such as histories; none without a home.
pub fn state() -> Option<PathBuf> {
    folder("XDG_STATE_HOME", ".local/state")
}

/// Where lies what can be made again, such as measurements of the machine; none without a home.
pub fn cache() -> Option<PathBuf> {
    folder("XDG_CACHE_HOME", ".cache")
}

fn folder(variable: &str, below_home: &str) -> Option<PathBuf> {
    // the specification: relative paths are to be ignored
    let absolute = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    absolute(variable)
        .or_else(|| absolute("HOME").map(|home| home.join(below_home)))
        .map(|folder| folder.join(NAME))
}
