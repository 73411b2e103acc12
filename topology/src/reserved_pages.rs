//! Huge pages that an administrator has set aside (hugetlbfs, `vm.nr_hugepages`): never split, never swapped, and there
//! whatever else fills the memory.

use std::fs;
use std::path::Path;

/// Bytes of one.
pub(crate) const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Whether `bytes` fit into those that are free below `root`, spread evenly over NUMA nodes `numas`; over any without.
pub(crate) fn have_room(root: &Path, numas: &[usize], bytes: usize) -> bool {
    let n_pages = bytes.div_ceil(HUGE_PAGE_BYTES);
    let on_node = |numa: &usize| free_pages(root, *numa) >= n_pages.div_ceil(numas.len());
    let anywhere = free_in(&root.join("sys/kernel/mm/hugepages"));
    n_pages > 0 && anywhere >= n_pages && numas.iter().all(on_node)
}

/// Those that are free on NUMA node `numa`.
pub(crate) fn free_pages(root: &Path, numa: usize) -> usize {
    free_in(&root.join(format!("sys/devices/system/node/node{numa}/hugepages")))
}

fn free_in(folder: &Path) -> usize {
    let path = folder.join("hugepages-2048kB/free_hugepages");
    let free = fs::read_to_string(path).ok();
    let free = free.and_then(|text| text.trim().parse().ok());
    free.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_counted_on_every_node_that_is_used() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let set = |folder: &str, free: &str| {
            let folder = root.join(folder).join("hugepages-2048kB");
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("free_hugepages"), free).unwrap();
        };
        assert!(!have_room(root, &[], 1), "a system that tells nothing");
        set("sys/kernel/mm/hugepages", "10\n");
        assert!(have_room(root, &[], 10 * HUGE_PAGE_BYTES));
        assert!(!have_room(root, &[], 10 * HUGE_PAGE_BYTES + 1));
        assert!(!have_room(root, &[], 0));
        assert!(!have_room(root, &[0], 1), "a node that tells nothing");
        set("sys/devices/system/node/node0/hugepages", "3\n");
        set("sys/devices/system/node/node1/hugepages", "7\n");
        assert!(have_room(root, &[0], 3 * HUGE_PAGE_BYTES));
        assert!(!have_room(root, &[0], 4 * HUGE_PAGE_BYTES));
        assert!(have_room(root, &[1], 7 * HUGE_PAGE_BYTES));
        assert!(have_room(root, &[0, 1], 6 * HUGE_PAGE_BYTES));
        assert!(!have_room(root, &[0, 1], 7 * HUGE_PAGE_BYTES));
    }
}
