//! Threads that stay on their CPU, and what they allocate on a node.

use crate::error::TopologyError;

/// Binds the calling thread to one logical CPU (as the system numbers it).
///
/// # Errors
/// The CPU is not there or not allowed, or the binding cannot be read back as it was asked for.
pub fn pin_thread(cpu: usize) -> Result<(), TopologyError> {
    #[cfg(feature = "hwloc")]
    return crate::hwloc::pin_thread(cpu);
    #[cfg(not(feature = "hwloc"))]
    return pin_by_affinity(cpu);
}

/// Runs `allocate` with the calling thread's new pages taken from NUMA node `numa`, where that has room; behind it the thread's policy
/// is the system's own. Where the system does not allow it, or without the feature hwloc, `allocate` runs as it is.
pub fn with_memory_of<T>(numa: usize, allocate: impl FnOnce() -> T) -> T {
    #[cfg(feature = "hwloc")]
    return crate::hwloc::with_memory_of(numa, allocate);
    #[cfg(not(feature = "hwloc"))]
    {
        let _ = numa;
        allocate()
    }
}

/// Most logical CPUs that an affinity mask of the C library holds; core_affinity panics beyond.
#[cfg(not(feature = "hwloc"))]
const MASK_CPUS: usize = 1024;

#[cfg(not(feature = "hwloc"))]
fn pin_by_affinity(cpu: usize) -> Result<(), TopologyError> {
    let fail = |problem: &str| TopologyError::Pin {
        cpu,
        problem: problem.to_owned(),
    };
    if cpu >= MASK_CPUS {
        return Err(fail("there is no CPU of that number"));
    }
    if !core_affinity::set_for_current(core_affinity::CoreId { id: cpu }) {
        return Err(fail("the system refuses"));
    }
    // Elsewhere a binding is a hint that cannot be read back.
    #[cfg(target_os = "linux")]
    {
        let bound = core_affinity::get_core_ids().unwrap_or_default();
        if bound.len() != 1 || bound[0].id != cpu {
            return Err(fail("the system bound it elsewhere"));
        }
    }
    Ok(())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::machine::Machine;

    /// CPUs that the calling thread may run on, as the kernel has them.
    fn mask() -> Vec<usize> {
        // SAFETY: a mask is plain bits; the kernel is told its size and writes no more.
        let (set, rc) = unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            let rc = libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set);
            (set, rc)
        };
        assert_eq!(rc, 0);
        // SAFETY: every number is below the size of the mask.
        (0..1024)
            .filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) })
            .collect()
    }

    #[test]
    fn a_thread_runs_on_its_cpu_and_others_stay_free() {
        let machine = Machine::discover().unwrap();
        let before = mask();
        for cpu in machine.cpus() {
            std::thread::spawn(move || {
                pin_thread(cpu).unwrap();
                assert_eq!(mask(), [cpu]);
                // SAFETY: it takes nothing.
                assert_eq!(unsafe { libc::sched_getcpu() }, cpu as i32);
            })
            .join()
            .unwrap();
        }
        assert_eq!(mask(), before);
    }

    #[test]
    fn a_cpu_that_is_not_there_is_refused() {
        for cpu in [1023, 1024, 1 << 20, usize::MAX] {
            let error = std::thread::spawn(move || pin_thread(cpu))
                .join()
                .unwrap()
                .unwrap_err();
            assert!(error.is_environment());
            let text = error.to_string();
            assert!(
                text.starts_with(&format!("cannot bind a thread to CPU {cpu}: ")),
                "{text}"
            );
        }
    }
}
