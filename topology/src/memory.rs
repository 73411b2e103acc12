//! How much memory this process has and could have, as Linux tells it.

use std::fs;
use std::path::Path;

use crate::control_group::{CGROUP_ROOT, Version, group_folders};

/// Memory of this process that is in RAM now, in bytes; none where the system does not tell.
pub fn current_rss_bytes() -> Option<u64> {
    kib_entry_bytes(&fs::read_to_string("/proc/self/status").ok()?, "VmRSS:")
}

/// The most memory of this process that was in RAM at any time, in bytes.
pub fn peak_rss_bytes() -> Option<u64> {
    kib_entry_bytes(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// Memory that this process can still take without swapping, in bytes: what the system has
/// available, or less where a control group limits it (version 1 and 2).
pub fn available_memory_bytes() -> Option<u64> {
    let system_bytes = kib_entry_bytes(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:");
    let membership = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group_bytes = group_headroom_bytes(&Path::new("/").join(CGROUP_ROOT), &membership);
    match (system_bytes, group_bytes) {
        (Some(system_bytes), Some(group_bytes)) => Some(system_bytes.min(group_bytes)),
        (bytes, None) | (None, bytes) => bytes,
    }
}

/// Memory of the whole system, in bytes.
pub(crate) fn total_memory_bytes() -> Option<u64> {
    kib_entry_bytes(&fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")
}

/// The number after `key` at the start of a line, which is in KiB.
pub(crate) fn kib_entry_bytes(text: &str, key: &str) -> Option<u64> {
    let entry = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = entry.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Names of a control group's files.
struct GroupFiles {
    limit: &'static str,
    usage: &'static str,
    /// Key in `memory.stat` of file pages that are given up first.
    reclaimable: &'static str,
}

const VERSION_2: GroupFiles = GroupFiles {
    limit: "memory.max",
    usage: "memory.current",
    reclaimable: "inactive_file ",
};

const VERSION_1: GroupFiles = GroupFiles {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    reclaimable: "total_inactive_file ",
};

/// The least that a control group of this process, or one above it, leaves.
fn group_headroom_bytes(root: &Path, membership: &str) -> Option<u64> {
    group_folders(root, membership, "memory")
        .into_iter()
        .filter_map(|(version, folder)| folder_headroom_bytes(&folder, files_of(version)))
        .min()
}

/// The lowest limit of a control group of this process, or one above it; none without a limit.
pub(crate) fn group_limit_bytes(root: &Path, membership: &str) -> Option<u64> {
    group_folders(root, membership, "memory")
        .into_iter()
        .filter_map(|(version, folder)| number(&folder.join(files_of(version).limit)))
        // version 1 writes a number beyond any memory for "no limit"
        .filter(|&bytes| bytes < 1 << 60)
        .min()
}

fn files_of(version: Version) -> &'static GroupFiles {
    match version {
        Version::V1 => &VERSION_1,
        Version::V2 => &VERSION_2,
    }
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Limit less usage of one control group; none where it has no limit.
fn folder_headroom_bytes(folder: &Path, files: &GroupFiles) -> Option<u64> {
    let limit_bytes = number(&folder.join(files.limit))?;
    let usage_bytes = number(&folder.join(files.usage))?;
    let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let reclaimable_bytes: u64 = stat
        .lines()
        .find_map(|line| line.strip_prefix(files.reclaimable)?.trim().parse().ok())
        .unwrap_or(0);
    Some(limit_bytes.saturating_sub(usage_bytes.saturating_sub(reclaimable_bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_with_their_unit() {
        let text = "Name:\tx\nVmHWM:\t    1652 kB\nVmRSS:\t     12 kB\n";
        assert_eq!(kib_entry_bytes(text, "VmHWM:"), Some(1652 * 1024));
        assert_eq!(kib_entry_bytes(text, "VmRSS:"), Some(12 * 1024));
        assert_eq!(kib_entry_bytes(text, "VmSwap:"), None);
        assert_eq!(kib_entry_bytes("VmRSS: 12 MB", "VmRSS:"), None);
        assert_eq!(kib_entry_bytes("VmRSS: -1 kB", "VmRSS:"), None);
        let too_large = format!("VmRSS: {} kB", u64::MAX);
        assert_eq!(kib_entry_bytes(&too_large, "VmRSS:"), None);
    }

    fn write(folder: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(folder).unwrap();
        for (name, text) in files {
            fs::write(folder.join(name), text).unwrap();
        }
    }

    #[test]
    fn the_tightest_group_counts() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        write(
            &root.join("outer"),
            &[
                ("memory.max", "1000\n"),
                ("memory.current", "700\n"),
                ("memory.stat", "anon 600\ninactive_file 100\n"),
            ],
        );
        write(
            &root.join("outer/inner"),
            &[("memory.max", "900\n"), ("memory.current", "100\n")],
        );
        assert_eq!(group_headroom_bytes(root, "0::/outer/inner\n"), Some(400));
        write(&root.join("outer"), &[("memory.max", "max\n")]);
        assert_eq!(group_headroom_bytes(root, "0::/outer/inner\n"), Some(800));
        assert_eq!(group_headroom_bytes(root, "0::/outer\n"), None);
        write(&root.join("outer"), &[("memory.max", "50\n")]);
        assert_eq!(group_headroom_bytes(root, "0::/outer/inner\n"), Some(0));
    }

    #[test]
    fn version_1_and_paths_of_the_host_are_understood() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let membership = "9:name=systemd:/\n4:memory:/seen/by/the/host\n0::/\n";
        assert_eq!(group_headroom_bytes(root, membership), None);
        write(
            &root.join("memory"),
            &[
                ("memory.limit_in_bytes", "5000"),
                ("memory.usage_in_bytes", "4500"),
                ("memory.stat", "inactive_file 1\ntotal_inactive_file 200\n"),
            ],
        );
        assert_eq!(group_headroom_bytes(root, membership), Some(700));
        assert_eq!(group_limit_bytes(root, membership), Some(5000));
        write(root, &[("memory.max", "300"), ("memory.current", "0")]);
        assert_eq!(group_headroom_bytes(root, membership), Some(300));
        assert_eq!(group_limit_bytes(root, membership), Some(300));
        let no_limit = [("memory.limit_in_bytes", "9223372036854771712")];
        write(&root.join("memory"), &no_limit);
        write(root, &[("memory.max", "max")]);
        assert_eq!(group_limit_bytes(root, membership), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_has_memory() {
        let rss = current_rss_bytes().unwrap();
        assert!(rss > 100_000, "{rss}");
        assert!(peak_rss_bytes().unwrap() >= current_rss_bytes().unwrap());
        let available_bytes = available_memory_bytes().unwrap();
        assert!((1..=total_memory_bytes().unwrap()).contains(&available_bytes));
    }
}
