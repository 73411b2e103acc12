//! hwloc: what it knows of this system or of a made-up one, and the bindings that it makes.

use std::sync::OnceLock;

use hwlocality::Topology;
use hwlocality::bitmap::BitmapIndex;
use hwlocality::cpu::binding::CpuBindingFlags;
use hwlocality::cpu::cpuset::CpuSet;
use hwlocality::errors::HybridError;
use hwlocality::memory::binding::{MemoryBindingError, MemoryBindingFlags, MemoryBindingPolicy};
use hwlocality::memory::nodeset::NodeSet;
use hwlocality::object::TopologyObject;
use hwlocality::object::attributes::ObjectAttributes;
use hwlocality::object::types::ObjectType;
use hwlocality::topology::builder::BuildFlags;

use crate::error::TopologyError;
use crate::machine::{Core, MachineNode};
use crate::memory::total_memory_bytes;

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

/// Nodes with the CPUs that this process may use now.
///
/// # Errors
/// hwloc fails, or describes another machine.
pub(crate) fn system_nodes() -> Result<Vec<MachineNode>, TopologyError> {
    system()?;
    let fail = |problem: String| TopologyError::Discovery { problem };
    // A cpuset's limits are honoured by default, an affinity mask only with the first flag, which
    // asks for the second; that this is this system has just been checked.
    let topology = Topology::builder()
        .with_flags(BuildFlags::RESTRICT_CPU_TO_THIS_PROCESS | BuildFlags::ASSUME_THIS_SYSTEM)
        .map_err(|error| fail(error.to_string()))?
        .build()
        .map_err(|error| fail(error.to_string()))?;
    let mut nodes = nodes(&topology);
    // A virtual machine's only node can count less than the system has (memory balloons).
    if let ([node], false) = (nodes.as_mut_slice(), has_several_nodes()?) {
        node.memory_bytes = total_memory_bytes().unwrap_or(node.memory_bytes);
    }
    Ok(nodes)
}

/// Nodes of the machine that hwloc makes of a description.
///
/// # Errors
/// hwloc does not take the description.
pub(crate) fn synthetic_nodes(description: &str) -> Result<Vec<MachineNode>, TopologyError> {
    let fail = |problem: String| TopologyError::Description {
        description: description.to_owned(),
        problem,
    };
    let topology = Topology::builder()
        .from_synthetic(description)
        .map_err(|error| fail(error.to_string()))?
        .build()
        .map_err(|error| fail(error.to_string()))?;
    Ok(nodes(&topology))
}

/// NUMA nodes that have CPUs, each core in the first node that it is local to.
fn nodes(topology: &Topology) -> Vec<MachineNode> {
    let mut nodes: Vec<(&TopologyObject, MachineNode)> = topology
        .objects_with_type(ObjectType::NUMANode)
        .map(|object| {
            let node = MachineNode {
                os_index: object.os_index(),
                memory_bytes: local_memory_bytes(object),
                cores: Vec::new(),
            };
            (object, node)
        })
        .collect();
    let mut homeless = Vec::new();
    for (object, core) in cores(topology) {
        let home = nodes.iter_mut().find(|(node, _)| {
            let local = node.cpuset().zip(object.cpuset());
            local.is_some_and(|(node_cpus, core_cpus)| node_cpus.includes(core_cpus))
        });
        match home {
            Some((_, node)) => node.cores.push(core),
            None => homeless.push(core),
        }
    }
    // A cpuset may allow a node's CPUs and not its memory; such cores use the first node's.
    match nodes.first_mut() {
        Some((_, first)) => first.cores.append(&mut homeless),
        None if !homeless.is_empty() => {
            return vec![MachineNode {
                os_index: None,
                memory_bytes: 0,
                cores: homeless,
            }];
        }
        None => {}
    }
    nodes
        .into_iter()
        .map(|(_, node)| node)
        .filter(|node| !node.cores.is_empty())
        .collect()
}

/// Cores with their logical CPUs; logical CPUs by themselves where the system knows no cores.
fn cores(topology: &Topology) -> Vec<(&TopologyObject, Core)> {
    let has_cores = topology
        .objects_with_type(ObjectType::Core)
        .next()
        .is_some();
    let kind = if has_cores {
        ObjectType::Core
    } else {
        ObjectType::PU
    };
    topology
        .objects_with_type(kind)
        .map(|object| {
            let cpus = object
                .cpuset()
                .map_or_else(Vec::new, |set| set.iter_set().map(usize::from).collect());
            (object, Core { cpus })
        })
        .filter(|(_, core)| !core.cpus.is_empty())
        .collect()
}

fn local_memory_bytes(object: &TopologyObject) -> u64 {
    match object.attributes() {
        Some(ObjectAttributes::NUMANode(numa)) => numa.local_memory().map_or(0, u64::from),
        _ => 0,
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

/// Has the pages of `area`, which must not have been touched, taken from NUMA node `numa` only.
///
/// # Errors
/// There is no such node for this process.
pub(crate) fn bind_area(area: &[u8], numa: usize) -> Result<AreaBinding, TopologyError> {
    let topology = system()?;
    let fail = |problem: String| TopologyError::BindMemory {
        bytes: area.len(),
        numa,
        problem,
    };
    let index = BitmapIndex::try_from(numa)
        .ok()
        .filter(|_| topology.node_with_os_index(numa).is_some())
        .ok_or_else(|| fail("this process has no such node".to_owned()))?;
    let wanted = NodeSet::from(index);
    let bound = topology.bind_memory_area(
        area,
        &wanted,
        MemoryBindingPolicy::Bind,
        MemoryBindingFlags::STRICT,
    );
    match bound {
        Ok(()) => Ok(AreaBinding::Bound),
        Err(HybridError::Rust(MemoryBindingError::Unsupported)) => Ok(AreaBinding::Unsupported(
            "the system does not bind memory".to_owned(),
        )),
        // Containers commonly forbid mbind.
        Err(HybridError::Hwloc(error)) => Ok(AreaBinding::Unsupported(error.to_string())),
        Err(error) => Err(fail(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::Arena;
    use crate::config::HugePages;

    #[test]
    fn memory_is_bound_to_its_node() {
        let numa = system_nodes().unwrap()[0].os_index.unwrap();
        let arena = Arena::new(1 << 20, None, HugePages::Off).unwrap();
        match bind_area(arena.as_slice(), numa).unwrap() {
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
    fn a_node_that_is_not_there_is_refused() {
        let arena = Arena::new(4096, None, HugePages::Off).unwrap();
        for numa in [4000, usize::MAX] {
            let error = bind_area(arena.as_slice(), numa).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!(
                    "cannot bind 4096 bytes to NUMA node {numa}: this process has no such node; check the cpuset's memory nodes (Mems_allowed_list in /proc/self/status)"
                )
            );
        }
    }
}
