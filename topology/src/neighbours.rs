//! Other processes whose threads are bound to a few CPUs: two that work on one CPU wait for each other.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::machine::numbers;

/// Clock ticks of work (10 ms each) from which on a thread that has one CPU counts, though it sleeps now: a start alone does
/// not take as much.
const TICKS_MIN: u64 = 100;

/// Threads that are looked at: at 20 µs each, more would hold up the start of a run.
const N_THREADS_MAX: usize = 8192;

/// A process with threads that are bound to CPUs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BoundProcess {
    /// Its number.
    pub pid: u32,
    /// Its program.
    pub program: String,
    /// CPUs that threads are bound to which have one each, ascending.
    pub cpus: Vec<usize>,
    /// Several CPUs, but not all of the machine, that a thread goes round which runs now.
    pub masks: Vec<Vec<usize>>,
}

impl BoundProcess {
    /// Whether no thread was found that counts.
    fn is_idle(&self) -> bool {
        self.cpus.is_empty() && self.masks.is_empty()
    }

    /// Adds a thread that may run on `cpus`, of `n_cpus` of the machine.
    fn add(&mut self, thread: &Path, cpus: Vec<usize>, n_cpus: usize) {
        match cpus[..] {
            [cpu] if !self.cpus.contains(&cpu) && has_worked(thread, TICKS_MIN) => {
                self.cpus.push(cpu);
                self.cpus.sort_unstable();
            }
            // whole containers have such masks: what sleeps in them disturbs nobody
            [_, _, ..]
                if cpus.len() < n_cpus
                    && !self.masks.contains(&cpus)
                    && has_worked(thread, u64::MAX) =>
            {
                self.masks.push(cpus);
            }
            _ => {}
        }
    }
}

/// Processes other than `own` with such threads, of a machine with `n_cpus`; the kernel's own threads left out.
pub(crate) fn bound_processes(root: &Path, own: u32, n_cpus: usize) -> Vec<BoundProcess> {
    let mut processes = BTreeMap::new();
    let mut n_left = N_THREADS_MAX;
    for (pid, folder) in numbered(&root.join("proc")) {
        // threads of the kernel have no command line
        let is_kernel = fs::read(folder.join("cmdline")).map_or(true, |line| line.is_empty());
        if pid == own || is_kernel {
            continue;
        }
        let mut process = BoundProcess {
            pid,
            program: String::new(),
            cpus: Vec::new(),
            masks: Vec::new(),
        };
        let threads = numbered(&folder.join("task"));
        let n_looked_at = threads.len().min(n_left);
        n_left -= n_looked_at;
        for (_, thread) in threads.into_iter().take(n_looked_at) {
            if let Some(cpus) = allowed_cpus(&thread) {
                process.add(&thread, cpus, n_cpus);
            }
        }
        if !process.is_idle() {
            let program = fs::read_to_string(folder.join("comm")).unwrap_or_default();
            process.program = program.trim().to_owned();
            processes.insert(pid, process);
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

/// The CPUs that a thread may run on.
fn allowed_cpus(thread: &Path) -> Option<Vec<usize>> {
    let status = fs::read_to_string(thread.join("status")).ok()?;
    let mut lines = status.lines();
    let list = lines.find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    numbers(list.trim())
}

/// Whether a thread is running, or has taken so much time.
fn has_worked(thread: &Path, ticks_min: u64) -> bool {
    let stat = fs::read_to_string(thread.join("stat")).unwrap_or_default();
    // the name, in parentheses, may have any characters
    let Some((_, fields)) = stat.rsplit_once(')') else {
        return false;
    };
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|text| text.parse::<u64>().ok());
    // state, and behind it in user and in kernel mode
    fields.first() == Some(&"R") || ticks(11).unwrap_or(0) + ticks(12).unwrap_or(0) >= ticks_min
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
        assert_eq!(bound_processes(root, 1, 8), []);
        add_thread(root, 20, 20, "0-7", 'R', 9999);
        add_thread(root, 20, 21, "3", 'S', 500);
        add_thread(root, 20, 22, "1", 'R', 0);
        add_thread(root, 20, 23, "1", 'R', 0);
        add_thread(root, 20, 24, "5", 'S', 2);
        add_thread(root, 30, 30, "0-7", 'R', 9999);
        add_thread(root, 40, 40, "2", 'R', 9999);
        add_thread(root, 50, 50, "2", 'R', 9999);
        fs::write(root.join("proc/50/cmdline"), "").unwrap();
        let found = bound_processes(root, 40, 8);
        let expected = BoundProcess {
            pid: 20,
            program: "poll er)".to_owned(),
            cpus: vec![1, 3],
            masks: vec![],
        };
        assert_eq!(found, [expected]);
        // several CPUs, by one that runs, one that sleeps, and one that may have the whole machine
        add_thread(root, 60, 60, "2-3", 'R', 0);
        add_thread(root, 60, 61, "2-3", 'R', 5);
        add_thread(root, 60, 62, "4-5", 'S', 9999);
        add_thread(root, 70, 70, "0-7", 'R', 9999);
        let found = bound_processes(root, 40, 8);
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!((found[1].pid, &found[1].masks), (60, &vec![vec![2, 3]]));
        assert_eq!(bound_processes(root, 40, 2).len(), 1, "two CPUs are all");
    }
}
