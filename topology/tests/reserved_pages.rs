//! Huge pages that were set aside, by the system's own count of them. A process of its own, so that no other test takes
//! any meanwhile.
#![cfg(target_os = "linux")]

use pi_topology::{Arena, HugePages};

const HUGE_PAGE_BYTES: usize = 2 << 20;

fn free() -> usize {
    let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

#[test]
fn pages_that_were_set_aside_are_taken_and_given_back() {
    let before = free();
    if before < 4 {
        eprintln!("skipped: no 4 huge pages are set aside here (sysctl vm.nr_hugepages=4)");
        return;
    }
    let mut arena = Arena::new(3 * HUGE_PAGE_BYTES - 5, None, HugePages::Require).unwrap();
    assert_eq!(free(), before - 3);
    assert_eq!(arena.len(), 3 * HUGE_PAGE_BYTES - 5);
    assert!(arena.as_slice().iter().all(|&byte| byte == 0));
    arena.as_mut_slice().fill(1);
    let off = Arena::new(HUGE_PAGE_BYTES, None, HugePages::Off).unwrap();
    // all or none of an arena
    let large = Arena::new((before + 1) * HUGE_PAGE_BYTES, None, HugePages::Try).unwrap();
    assert_eq!(free(), before - 3);
    assert_eq!(
        (off.len(), large.len()),
        (HUGE_PAGE_BYTES, (before + 1) * HUGE_PAGE_BYTES)
    );
    let frozen = arena.freeze();
    assert_eq!(free(), before - 3);
    drop(frozen);
    assert_eq!(free(), before);
}
