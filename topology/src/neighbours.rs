//! Other processes whose threads are bound to single CPUs: two that work on one CPU wait for each other.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::machine::numbers;

/// Clock ticks of work (10 ms each) from which on a thread counts, though it sleeps now.
const TICKS_MIN: u64 = 100;

/// A process with threads that are bound to one CPU each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BoundProcess {
    /// Its number.
    pub pid: u32,
    /// Its program.
    pub program: String,
    /// CPUs that its threads are bound to, ascending.
    pub cpus: Vec<usize>,
}

/// Processes other than `own` with such threads that work or have worked; the kernel's own threads left out.
pub(crate) fn bound_processes(root: &Path, own: u32) -> Vec<BoundProcess> {
    let mut processes: BTreeMap<u32, BoundProcess> = BTreeMap::new();
    for (pid, folder) in numbered(&root.join("proc")) {
        // threads of the kernel have no command line
        let is_kernel = fs::read(folder.join("cmdline")).map_or(true, |line| line.is_empty());
        if pid == own || is_kernel {
            continue;
        }
        for (_, thread) in numbered(&folder.join("task")) {
            let Some(cpu) = only_cpu(&thread).filter(|_| has_worked(&thread)) else {
                continue;
            };
            let program = || fs::read_to_string(folder.join("comm")).unwrap_or_default();
            let process = processes.entry(pid).or_insert_with(|| BoundProcess {
                pid,
                program: program().trim().to_owned(),
                cpus: Vec::new(),
            });
            if !process.cpus.contains(&cpu) {
                process.cpus.push(cpu);
                process.cpus.sort_unstable();
            }
        }
    }
    processes.into_values().collect()
}

/// Folders below `folder` whose names are numbers.
fn numbered(folder: &Path) -> Vec<(u32, std::path::PathBuf)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.parse().ok()?;
            Some((number, entry.path()))
        })
        .collect()
}

/// The CPU that a thread is bound to, if it is one.
fn only_cpu(thread: &Path) -> Option<usize> {
    let status = fs::read_to_string(thread.join("status")).ok()?;
    let mut lines = status.lines();
    let list = lines.find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    match numbers(list.trim())?.as_slice() {
        [cpu] => Some(*cpu),
        _ => None,
    }
}

/// Whether a thread is running, or has taken as much time as a start alone does not.
fn has_worked(thread: &Path) -> bool {
    let stat = fs::read_to_string(thread.join("stat")).unwrap_or_default();
    // the name, in parentheses, may have any characters
    let Some((_, fields)) = stat.rsplit_once(')') else {
        return false;
    };
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|text| text.parse::<u64>().ok());
    // state, and behind it in user and in kernel mode
    fields.first() == Some(&"R") || ticks(11).unwrap_or(0) + ticks(12).unwrap_or(0) >= TICKS_MIN
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add_thread(root: &Path, pid: u32, thread: u32, cpus: &str, state: char, ticks: u64) {
        let process = root.join(format!("proc/{pid}"));
        let folder = process.join(format!("task/{thread}"));
        fs::create_dir_all(&folder).unwrap();
        fs::write(process.join("comm"), "poll er)\n").unwrap();
        fs::write(process.join("cmdline"), "poll\0").unwrap();
        let status = format!("Name:\tx\nCpus_allowed_list:\t{cpus}\n");
        fs::write(folder.join("status"), status).unwrap();
        let stat = format!("{thread} (poll er)) {state} 1 1 1 0 -1 0 0 0 0 0 {ticks} 3 0 0\n");
        fs::write(folder.join("stat"), stat).unwrap();
    }

    #[test]
    fn bound_threads_that_work_are_told_from_others() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        assert_eq!(bound_processes(root, 1), []);
        add_thread(root, 20, 20, "0-7", 'R', 9999);
        add_thread(root, 20, 21, "3", 'S', 500);
        add_thread(root, 20, 22, "1", 'R', 0);
        add_thread(root, 20, 23, "1", 'R', 0);
        add_thread(root, 20, 24, "5", 'S', 2);
        add_thread(root, 30, 30, "0-7", 'R', 9999);
        add_thread(root, 40, 40, "2", 'R', 9999);
        add_thread(root, 50, 50, "2", 'R', 9999);
        fs::write(root.join("proc/50/cmdline"), "").unwrap();
        let found = bound_processes(root, 40);
        let expected = BoundProcess {
            pid: 20,
            program: "poll er)".to_owned(),
            cpus: vec![1, 3],
        };
        assert_eq!(found, [expected]);
    }
}
