//! The control groups that this process is in, of version 1 and 2, and the processor time that they allow.

use std::fs;
use std::path::{Path, PathBuf};

use crate::machine::numbers;

/// Where control groups are, below the system's root.
pub(crate) const CGROUP_ROOT: &str = "sys/fs/cgroup";

/// Which of the two interfaces a control group's files have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    /// A hierarchy for each controller.
    V1,
    /// One hierarchy for all of them.
    V2,
}

/// Folders of the control groups that this process is in for `controller`, each followed by those above it.
///
/// `membership` is `/proc/self/cgroup`: lines of `hierarchy:controllers:path`. In a container the path may name folders
/// that only the host sees; the container's own group is then the top, and folders that are not there hold no files.
pub(crate) fn group_folders(
    root: &Path,
    membership: &str,
    controller: &str,
) -> Vec<(Version, PathBuf)> {
    let mut folders = Vec::new();
    for line in membership.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        let (version, top) = match controllers {
            "" => (Version::V2, root.to_path_buf()),
            _ if controllers.split(',').any(|name| name == controller) => {
                (Version::V1, root.join(controller))
            }
            _ => continue,
        };
        let group = top.join(path.trim_start_matches('/'));
        let groups = group
            .ancestors()
            .take_while(|folder| folder.starts_with(&top))
            .map(|folder| (version, folder.to_path_buf()));
        folders.extend(groups);
    }
    folders
}

/// Processors' worth of time that the tightest control group allows; none without a limit.
pub(crate) fn cpu_limit(root: &Path, membership: &str) -> Option<f64> {
    group_folders(root, membership, "cpu")
        .into_iter()
        .filter_map(|(version, folder)| {
            let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
            let (quota, period) = match version {
                Version::V2 => {
                    let text = read("cpu.max")?;
                    let (quota, period) = text.trim().split_once(' ')?;
                    (quota.to_owned(), period.to_owned())
                }
                Version::V1 => (read("cpu.cfs_quota_us")?, read("cpu.cfs_period_us")?),
            };
            // "max" and -1 are no limit
            let quota_us: u64 = quota.trim().parse().ok()?;
            let period_us: u64 = period.trim().parse().ok().filter(|&us| us > 0)?;
            Some(quota_us as f64 / period_us as f64)
        })
        .min_by(f64::total_cmp)
}

/// CPUs of the nearest control group that has a cpuset; none without one.
pub(crate) fn cpuset_cpus(root: &Path, membership: &str) -> Option<Vec<usize>> {
    group_folders(root, membership, "cpuset")
        .into_iter()
        .find_map(|(version, folder)| {
            let name = match version {
                Version::V2 => "cpuset.cpus.effective",
                Version::V1 => "cpuset.effective_cpus",
            };
            numbers(fs::read_to_string(folder.join(name)).ok()?.trim())
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(folder).unwrap();
        for (name, text) in files {
            fs::write(folder.join(name), text).unwrap();
        }
    }

    #[test]
    fn the_tightest_processor_quota_counts() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        assert_eq!(cpu_limit(root, "0::/a/b\n"), None);
        write(&root.join("a/b"), &[("cpu.max", "max 100000\n")]);
        assert_eq!(cpu_limit(root, "0::/a/b\n"), None);
        write(&root.join("a"), &[("cpu.max", "150000 100000\n")]);
        assert_eq!(cpu_limit(root, "0::/a/b\n"), Some(1.5));
        write(&root.join("a/b"), &[("cpu.max", "50000 100000\n")]);
        assert_eq!(cpu_limit(root, "0::/a/b\n"), Some(0.5));
        write(&root.join("a/b"), &[("cpu.max", "50000 0\n")]);
        assert_eq!(cpu_limit(root, "0::/a/b\n"), Some(1.5));
    }

    #[test]
    fn the_nearest_cpuset_counts() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        assert_eq!(cpuset_cpus(root, "0::/a/b\n"), None);
        write(root, &[("cpuset.cpus.effective", "0-7\n")]);
        write(&root.join("a/b"), &[]);
        assert_eq!(
            cpuset_cpus(root, "0::/a/b\n"),
            Some((0..8).collect::<Vec<usize>>())
        );
        write(&root.join("a/b"), &[("cpuset.cpus.effective", "2,4\n")]);
        assert_eq!(cpuset_cpus(root, "0::/a/b\n"), Some(vec![2, 4]));
        write(&root.join("cpuset/c"), &[("cpuset.effective_cpus", "1\n")]);
        assert_eq!(cpuset_cpus(root, "7:cpuset:/c\n"), Some(vec![1]));
    }

    #[test]
    fn version_1_and_paths_of_the_host_are_understood() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let membership = "4:cpu,cpuacct:/seen/by/the/host\n2:memory:/\n0::/\n";
        write(
            &root.join("cpu"),
            &[
                ("cpu.cfs_quota_us", "-1\n"),
                ("cpu.cfs_period_us", "100000\n"),
            ],
        );
        assert_eq!(cpu_limit(root, membership), None);
        write(&root.join("cpu"), &[("cpu.cfs_quota_us", "200000\n")]);
        assert_eq!(cpu_limit(root, membership), Some(2.0));
        write(&root.join("cpu/seen/by/the/host"), &[]);
        assert_eq!(cpu_limit(root, membership), Some(2.0));
    }
}
