//! What the system says of itself: kernel, limits and settings that decide how well threads and memory can be used.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::control_group::{CGROUP_ROOT, cpu_limit, cpuset_cpus};
use crate::gpu::{NvidiaDriver, NvidiaGpu, nvidia_driver, nvidia_gpus};
use crate::machine::numbers;
use crate::memory::{available_memory_bytes, group_limit_bytes, kib_entry_bytes};
use crate::neighbours::{BoundProcess, bound_processes};

/// A system's settings; whatever the system does not tell is none, or an empty list.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SystemState {
    /// Kernel's release.
    pub kernel: Option<String>,
    /// Name of the distribution.
    pub distribution: Option<String>,
    /// What kind of container this process is in.
    pub container: Option<&'static str>,
    /// Whether this is a virtual machine.
    pub is_virtual_machine: bool,
    /// The processor's name.
    pub cpu_name: Option<String>,
    /// Logical CPUs that are running, whether or not this process may use them.
    pub n_cpus_online: Option<usize>,
    /// Processors' worth of time that control groups allow.
    pub cpu_limit: Option<f64>,
    /// Threads that were runnable over the last minute, on average.
    pub load: Option<f64>,
    /// CPUs that are switched on.
    pub online_cpus: Vec<usize>,
    /// CPUs that are there, switched on or not.
    pub present_cpus: Vec<usize>,
    /// CPUs that the kernel leaves to threads that ask for them by number (`isolcpus=`).
    pub isolated_cpus: Vec<usize>,
    /// CPUs of the control group's cpuset; none without one.
    pub cpuset_cpus: Option<Vec<usize>>,
    /// CPUs of this process's affinity mask.
    pub affinity_cpus: Vec<usize>,
    /// NUMA nodes whose memory this process may use.
    pub memory_numas: Vec<usize>,
    /// Logical CPUs of each core that has several, by the core's first CPU.
    pub core_cpus: BTreeMap<usize, Vec<usize>>,
    /// Other processes whose threads are bound to a few CPUs, and work.
    pub bound_processes: Vec<BoundProcess>,
    /// How many CPUs have which frequency governor.
    pub governors: BTreeMap<String, usize>,
    /// Whether the kernel moves pages between NUMA nodes by itself.
    pub numa_balancing: Option<bool>,
    /// Memory of the whole system.
    pub memory_bytes: Option<u64>,
    /// Memory that this process can still take without swapping.
    pub available_bytes: Option<u64>,
    /// Memory that control groups allow.
    pub memory_limit_bytes: Option<u64>,
    /// Memory that can still be promised, where the kernel promises no more than there is (overcommit mode 2).
    pub promisable_bytes: Option<u64>,
    /// Largest address space of a process (`ulimit -v`).
    pub address_space_bytes: Limit,
    /// Memory that a process may lock (`ulimit -l`).
    pub memlock_bytes: Limit,
    /// Setting of transparent huge pages: always, madvise or never.
    pub transparent_huge_pages: Option<String>,
    /// Bytes set aside as huge pages, which only programs that ask for those can use.
    pub reserved_huge_bytes: u64,
    /// NVIDIA's GPUs on the PCI bus.
    pub nvidia_gpus: Vec<NvidiaGpu>,
    /// Their driver.
    pub nvidia_driver: NvidiaDriver,
}

/// A limit of a process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Limit {
    /// The system does not tell.
    #[default]
    Unknown,
    /// There is none.
    Unlimited,
    /// So many bytes.
    Bytes(u64),
}

impl SystemState {
    /// Reads what this system says in `/proc`, `/sys` and `/etc`.
    pub fn read() -> Self {
        let available_bytes = available_memory_bytes();
        Self {
            available_bytes,
            ..Self::read_below(Path::new("/"))
        }
    }

    /// The same below another root, without what only the running process can know.
    fn read_below(root: &Path) -> Self {
        let text = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
        let word = |path: &str| Some(text(path).trim().to_owned()).filter(|word| !word.is_empty());
        let list = |path: &str| numbers(text(path).trim());
        let cpu_info = text("proc/cpuinfo");
        let memory = text("proc/meminfo");
        let limits = text("proc/self/limits");
        let status = text("proc/self/status");
        let membership = text("proc/self/cgroup");
        let groups = root.join(CGROUP_ROOT);
        let n_cpus_online = list("sys/devices/system/cpu/online").map(|cpus| cpus.len());
        Self {
            kernel: word("proc/sys/kernel/osrelease"),
            distribution: distribution(&text("etc/os-release")),
            container: container(root),
            is_virtual_machine: cpu_info
                .lines()
                .find(|line| line.starts_with("flags"))
                .is_some_and(|line| line.split(' ').any(|flag| flag == "hypervisor")),
            cpu_name: cpu_name(&cpu_info),
            n_cpus_online,
            online_cpus: list("sys/devices/system/cpu/online").unwrap_or_default(),
            present_cpus: list("sys/devices/system/cpu/present").unwrap_or_default(),
            isolated_cpus: list("sys/devices/system/cpu/isolated").unwrap_or_default(),
            cpuset_cpus: cpuset_cpus(&groups, &membership),
            affinity_cpus: listed(&status, "Cpus_allowed_list:"),
            memory_numas: listed(&status, "Mems_allowed_list:"),
            core_cpus: core_cpus(root),
            bound_processes: bound_processes(root, std::process::id(), n_cpus_online.unwrap_or(0)),
            cpu_limit: cpu_limit(&groups, &membership),
            load: first_number(&text("proc/loadavg")),
            governors: governors(root),
            numa_balancing: word("proc/sys/kernel/numa_balancing").map(|mode| mode != "0"),
            memory_bytes: kib_entry_bytes(&memory, "MemTotal:"),
            available_bytes: kib_entry_bytes(&memory, "MemAvailable:"),
            memory_limit_bytes: group_limit_bytes(&groups, &membership),
            promisable_bytes: (text("proc/sys/vm/overcommit_memory").trim() == "2")
                .then(|| {
                    let limit_bytes = kib_entry_bytes(&memory, "CommitLimit:")?;
                    let promised_bytes = kib_entry_bytes(&memory, "Committed_AS:")?;
                    Some(limit_bytes.saturating_sub(promised_bytes))
                })
                .flatten(),
            address_space_bytes: limit(&limits, "Max address space"),
            memlock_bytes: limit(&limits, "Max locked memory"),
            transparent_huge_pages: bracketed(&text("sys/kernel/mm/transparent_hugepage/enabled")),
            reserved_huge_bytes: kib_entry_bytes(&memory, "Hugetlb:").unwrap_or(0),
            nvidia_gpus: nvidia_gpus(root),
            nvidia_driver: nvidia_driver(root),
        }
    }
}

fn first_number(text: &str) -> Option<f64> {
    text.split_whitespace().next()?.parse().ok()
}

fn distribution(os_release: &str) -> Option<String> {
    let name = os_release
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
    Some(name.trim().trim_matches('"').to_owned())
}

fn container(root: &Path) -> Option<&'static str> {
    if root.join("run/.containerenv").exists() {
        return Some("podman");
    }
    if root.join(".dockerenv").exists() {
        return Some("docker");
    }
    let first_process = fs::read_to_string(root.join("proc/1/cgroup")).unwrap_or_default();
    ["kubepods", "docker", "lxc"]
        .into_iter()
        .find(|kind| first_process.contains(kind))
}

fn cpu_name(cpu_info: &str) -> Option<String> {
    let (_, name) = cpu_info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))?;
    Some(name.trim().to_owned())
}

/// The numbers behind `key` at the start of a line.
fn listed(status: &str, key: &str) -> Vec<usize> {
    let mut lines = status.lines();
    let list = lines.find_map(|line| line.strip_prefix(key));
    list.and_then(|list| numbers(list.trim()))
        .unwrap_or_default()
}

/// Cores with several CPUs, as `/sys` lists them beside each CPU.
fn core_cpus(root: &Path) -> BTreeMap<usize, Vec<usize>> {
    let mut cores = BTreeMap::new();
    let folder = root.join("sys/devices/system/cpu");
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path().join("topology/thread_siblings_list");
        let cpus = fs::read_to_string(path).ok();
        if let Some(cpus) = cpus
            .and_then(|text| numbers(text.trim()))
            .filter(|c| c.len() > 1)
        {
            cores.insert(cpus[0], cpus);
        }
    }
    cores
}

fn governors(root: &Path) -> BTreeMap<String, usize> {
    let mut governors = BTreeMap::new();
    let folder = root.join("sys/devices/system/cpu");
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path().join("cpufreq/scaling_governor");
        if let Ok(name) = fs::read_to_string(path) {
            *governors.entry(name.trim().to_owned()).or_default() += 1;
        }
    }
    governors
}

/// The soft limit in a line of `/proc/self/limits`.
fn limit(limits: &str, name: &str) -> Limit {
    let line = limits.lines().find_map(|line| line.strip_prefix(name));
    match line.and_then(|line| line.split_whitespace().next()) {
        Some("unlimited") => Limit::Unlimited,
        Some(bytes) => bytes.parse().map_or(Limit::Unknown, Limit::Bytes),
        None => Limit::Unknown,
    }
}

/// The chosen word of a setting such as `always [madvise] never`.
fn bracketed(setting: &str) -> Option<String> {
    let (_, rest) = setting.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn a_system_that_tells_nothing_has_no_settings() {
        let root = tree(&[]);
        assert_eq!(SystemState::read_below(root.path()), SystemState::default());
    }

    #[test]
    fn settings_are_read_where_linux_keeps_them() {
        let root = tree(&[
            ("proc/sys/kernel/osrelease", "6.1.0-31-amd64\n"),
            ("etc/os-release", "ID=debian\nPRETTY_NAME=\"Debian 12\"\n"),
            (".dockerenv", ""),
            (
                "proc/cpuinfo",
                "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu hypervisor avx2\n",
            ),
            ("sys/devices/system/cpu/online", "0-3,8\n"),
            ("sys/devices/system/cpu/present", "0-8\n"),
            ("sys/devices/system/cpu/isolated", "3\n"),
            (
                "sys/devices/system/cpu/cpu0/topology/thread_siblings_list",
                "0,8\n",
            ),
            (
                "sys/devices/system/cpu/cpu1/topology/thread_siblings_list",
                "1\n",
            ),
            (
                "proc/self/status",
                "Name:\tx\nCpus_allowed_list:\t0-1,8\nMems_allowed_list:\t0\n",
            ),
            ("sys/fs/cgroup/cpuset.cpus.effective", "0-2,8\n"),
            ("proc/self/cgroup", "0::/\n"),
            ("sys/fs/cgroup/cpu.max", "100000 100000\n"),
            ("sys/fs/cgroup/memory.max", "1073741824\n"),
            ("proc/loadavg", "1.25 0.50 0.10 2/300 4711\n"),
            (
                "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
                "powersave\n",
            ),
            (
                "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor",
                "powersave\n",
            ),
            ("proc/sys/kernel/numa_balancing", "1\n"),
            (
                "proc/meminfo",
                "MemTotal: 4096 kB\nMemAvailable: 2048 kB\nCommitLimit: 100 kB\n\
                 Committed_AS: 30 kB\nHugetlb: 2048 kB\n",
            ),
            ("proc/sys/vm/overcommit_memory", "2\n"),
            (
                "proc/self/limits",
                "Limit          Soft Limit Hard Limit Units\n\
                 Max locked memory         65536                65536                bytes\n\
                 Max address space         unlimited            unlimited            bytes\n",
            ),
            (
                "sys/kernel/mm/transparent_hugepage/enabled",
                "always madvise [never]\n",
            ),
        ]);
        let expected = SystemState {
            kernel: Some("6.1.0-31-amd64".to_owned()),
            distribution: Some("Debian 12".to_owned()),
            container: Some("docker"),
            is_virtual_machine: true,
            cpu_name: Some("Some CPU @ 2 GHz".to_owned()),
            n_cpus_online: Some(5),
            online_cpus: vec![0, 1, 2, 3, 8],
            present_cpus: (0..=8).collect(),
            isolated_cpus: vec![3],
            cpuset_cpus: Some(vec![0, 1, 2, 8]),
            affinity_cpus: vec![0, 1, 8],
            memory_numas: vec![0],
            core_cpus: [(0, vec![0, 8])].into(),
            cpu_limit: Some(1.0),
            load: Some(1.25),
            governors: [("powersave".to_owned(), 2)].into(),
            numa_balancing: Some(true),
            memory_bytes: Some(4 << 20),
            available_bytes: Some(2 << 20),
            memory_limit_bytes: Some(1 << 30),
            promisable_bytes: Some(70 << 10),
            address_space_bytes: Limit::Unlimited,
            memlock_bytes: Limit::Bytes(65536),
            transparent_huge_pages: Some("never".to_owned()),
            reserved_huge_bytes: 2 << 20,
            ..SystemState::default()
        };
        assert_eq!(SystemState::read_below(root.path()), expected);
    }

    #[test]
    fn odd_texts_are_not_understood_and_no_panic() {
        for text in ["3-1", "x", "", "0-99999999999", "70000"] {
            assert_eq!(numbers(text), None, "{text}");
        }
        assert_eq!(numbers("7"), Some(vec![7]));
        assert_eq!(bracketed("always madvise"), None);
        assert_eq!(
            limit("Max locked memory much", "Max locked memory"),
            Limit::Unknown
        );
        assert_eq!(distribution("NAME=x"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_system_tells_the_basics() {
        let state = SystemState::read();
        assert!(state.kernel.is_some() && state.memory_bytes.is_some());
        assert!(state.n_cpus_online.is_some_and(|n_cpus| n_cpus > 0));
        assert!(state.available_bytes <= state.memory_bytes);
        assert_ne!(state.memlock_bytes, Limit::Unknown);
    }
}
