//! hwloc: what it knows of this system or of a made-up one, and the bindings that it makes.

mod reading;

use std::sync::OnceLock;

use hwlocality::Topology;
use hwlocality::bitmap::BitmapIndex;
use hwlocality::cpu::binding::CpuBindingFlags;
use hwlocality::cpu::cpuset::CpuSet;
use hwlocality::errors::HybridError;
use hwlocality::memory::binding::{MemoryBindingError, MemoryBindingFlags, MemoryBindingPolicy};
use hwlocality::memory::nodeset::NodeSet;
use hwlocality::object::types::ObjectType;

use crate::error::TopologyError;

pub(crate) use reading::{synthetic_machine, system_machine};

/// How binding an area of memory to a node ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum AreaBinding {
    /// Its pages will be taken from the node.
    Bound,
    /// The system binds no memory, or does not let this process do it.
    Unsupported(String),
}

/// This system, loaded once: it takes milliseconds, and one is enough for all threads.
fn system() -> Result<&'static Topology, TopologyError> {
    static SYSTEM: OnceLock<Result<Topology, String>> = OnceLock::new();
    let loaded = SYSTEM.get_or_init(|| Topology::new().map_err(|error| error.to_string()));
    let topology = loaded
        .as_ref()
        .map_err(|problem| TopologyError::Discovery {
            problem: problem.clone(),
        })?;
    // Bindings on any other topology silently do nothing.
    if topology.is_this_system() {
        Ok(topology)
    } else {
        Err(TopologyError::NotThisSystem)
    }
}

/// Binds the calling thread to one logical CPU and reads the binding back.
///
/// # Errors
/// The system refuses, or says yes and does something else.
pub(crate) fn pin_thread(cpu: usize) -> Result<(), TopologyError> {
    let topology = system()?;
    let fail = |problem: String| TopologyError::Pin { cpu, problem };
    let index = BitmapIndex::try_from(cpu)
        .map_err(|_| fail("there is no CPU of that number".to_owned()))?;
    let wanted = CpuSet::from(index);
    topology
        .bind_cpu(&wanted, CpuBindingFlags::THREAD)
        .map_err(|error| fail(error.to_string()))?;
    let bound = topology
        .cpu_binding(CpuBindingFlags::THREAD)
        .map_err(|error| fail(error.to_string()))?;
    if bound == wanted {
        Ok(())
    } else {
        Err(fail(format!("the system bound it to {bound} instead")))
    }
}

/// Whether memory can lie on more than one NUMA node.
///
/// # Errors
/// hwloc fails.
pub(crate) fn has_several_nodes() -> Result<bool, TopologyError> {
    Ok(system()?.objects_with_type(ObjectType::NUMANode).count() > 1)
}

/// The node's place in a set of nodes; none where this process has no such node.
fn node_index(topology: &Topology, numa: usize) -> Result<BitmapIndex, String> {
    BitmapIndex::try_from(numa)
        .ok()
        .filter(|_| topology.node_with_os_index(numa).is_some())
        .ok_or_else(|| "this process has no such node".to_owned())
}

/// Has the pages of `area`, which must not have been touched, taken from NUMA nodes `numas` only: in turn, where they
/// are several.
///
/// # Errors
/// There is no such node for this process.
pub(crate) fn bind_area(area: &[u8], numas: &[usize]) -> Result<AreaBinding, TopologyError> {
    let topology = system()?;
    let fail = |numa: usize, problem: String| TopologyError::BindMemory {
        bytes: area.len(),
        numa,
        problem,
    };
    let mut wanted = NodeSet::new();
    for &numa in numas {
        wanted.set(node_index(topology, numa).map_err(|problem| fail(numa, problem))?);
    }
    let policy = match numas.len() {
        1 => MemoryBindingPolicy::Bind,
        _ => MemoryBindingPolicy::Interleave,
    };
    let bound = topology.bind_memory_area(area, &wanted, policy, MemoryBindingFlags::STRICT);
    match bound {
        Ok(()) => Ok(AreaBinding::Bound),
        Err(HybridError::Rust(MemoryBindingError::Unsupported)) => Ok(AreaBinding::Unsupported(
            "the system does not bind memory".to_owned(),
        )),
        // Containers commonly forbid mbind.
        Err(HybridError::Hwloc(error)) => Ok(AreaBinding::Unsupported(error.to_string())),
        Err(error) => Err(fail(numas.first().copied().unwrap_or(0), error.to_string())),
    }
}

/// As [`crate::with_memory_of`].
pub(crate) fn with_memory_of<T>(numa: usize, allocate: impl FnOnce() -> T) -> T {
    let prefer = || {
        let topology = system().map_err(|error| error.to_string())?;
        let set = NodeSet::from(node_index(topology, numa)?);
        let policy = MemoryBindingPolicy::Bind;
        let bound = topology.bind_memory(&set, policy, MemoryBindingFlags::THREAD);
        bound.map_err(|error| error.to_string())?;
        Ok::<_, String>(topology)
    };
    match prefer() {
        Ok(topology) => {
            let result = allocate();
            if let Err(error) = topology.unbind_memory(MemoryBindingFlags::THREAD) {
                tracing::debug!("a thread's memory stays on NUMA node {numa}: {error}");
            }
            result
        }
        Err(problem) => {
            tracing::debug!("memory is not taken from NUMA node {numa}: {problem}");
            allocate()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::Arena;
    use crate::config::HugePages;

    #[test]
    fn memory_is_bound_to_its_node() {
        let numa = system_machine().unwrap().nodes[0].os_index.unwrap();
        let arena = Arena::new(1 << 20, None, HugePages::Off).unwrap();
        match bind_area(arena.as_slice(), &[numa]).unwrap() {
            AreaBinding::Bound => {
                let (set, policy) = system()
                    .unwrap()
                    .area_memory_binding::<_, NodeSet>(arena.as_slice(), MemoryBindingFlags::STRICT)
                    .unwrap();
                assert_eq!(set, NodeSet::from(BitmapIndex::try_from(numa).unwrap()));
                assert_eq!(policy, Some(MemoryBindingPolicy::Bind));
            }
            AreaBinding::Unsupported(problem) => {
                eprintln!("skipped: memory cannot be bound here ({problem})");
            }
        }
    }

    #[test]
    fn a_thread_s_memory_is_of_a_node_for_a_while() {
        let numa = system_machine().unwrap().nodes[0].os_index.unwrap();
        let of_thread = || {
            let topology = system().unwrap();
            topology.memory_binding::<NodeSet>(MemoryBindingFlags::THREAD)
        };
        let Ok(before) = of_thread() else {
            eprintln!("skipped: a thread's memory policy cannot be read here");
            return;
        };
        let wanted = NodeSet::from(BitmapIndex::try_from(numa).unwrap());
        let (within, result) = with_memory_of(numa, || (of_thread().unwrap(), 7));
        assert_eq!(
            (within, result),
            ((wanted, Some(MemoryBindingPolicy::Bind)), 7)
        );
        assert_eq!(of_thread().unwrap(), before);
        // no such node: as it is
        assert_eq!(with_memory_of(4000, || of_thread().unwrap()), before);
    }

    #[test]
    fn a_node_that_is_not_there_is_refused() {
        let arena = Arena::new(4096, None, HugePages::Off).unwrap();
        for numa in [4000, usize::MAX] {
            let error = bind_area(arena.as_slice(), &[numa]).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!(
                    "cannot bind 4096 bytes to NUMA node {numa}: this process has no such node; check the cpuset's memory nodes (Mems_allowed_list in /proc/self/status)"
                )
            );
        }
    }
}
