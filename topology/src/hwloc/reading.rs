//! From hwloc's objects to a [`Machine`].

use std::ffi::CStr;

use hwlocality::Topology;
use hwlocality::cpu::cpuset::CpuSet;
use hwlocality::object::TopologyObject;
use hwlocality::object::attributes::ObjectAttributes;
use hwlocality::object::types::ObjectType;
use hwlocality::topology::builder::BuildFlags;

use super::{has_several_nodes, system};
use crate::error::TopologyError;
use crate::machine::{
    Cache, Core, FoundNode, Machine, MachineSource, NodeDistances, Package, Withheld, assemble,
};
use crate::memory::total_memory_bytes;

/// This system with the CPUs that this process may use now; GPUs are for others to find.
///
/// # Errors
/// hwloc fails, or describes another machine.
pub(crate) fn system_machine() -> Result<Machine, TopologyError> {
    system()?;
    let fail = |problem: String| TopologyError::Discovery { problem };
    // A cpuset's limits are honoured by default, an affinity mask only with the first flag, which
    // asks for the second; that this is this system has just been checked.
    let topology = Topology::builder()
        .with_flags(BuildFlags::RESTRICT_CPU_TO_THIS_PROCESS | BuildFlags::ASSUME_THIS_SYSTEM)
        .map_err(|error| fail(error.to_string()))?
        .build()
        .map_err(|error| fail(error.to_string()))?;
    let mut machine = machine(&topology, MachineSource::Hwloc);
    // A virtual machine's only node can count less than the system has (memory balloons).
    if let ([node], false) = (machine.nodes.as_mut_slice(), has_several_nodes()?) {
        node.memory_bytes = total_memory_bytes().unwrap_or(node.memory_bytes);
    }
    Ok(machine)
}

/// CPUs of a made-up machine at most: hwloc makes any number, and takes hours for it.
const N_CPUS_MAX: u64 = 8192;

/// Objects on the lowest level of a description, as far as it is one: the product of the counts outside of parentheses
/// and brackets.
fn n_described(description: &str) -> u64 {
    let mut inside: usize = 0;
    let mut outer = String::new();
    for c in description.chars() {
        match c {
            '(' | '[' => inside += 1,
            ')' | ']' => inside = inside.saturating_sub(1),
            c if inside == 0 => outer.push(c),
            _ => {}
        }
    }
    let counts = outer.split_whitespace().filter_map(|level| {
        let (_, count) = level.rsplit_once(':').unwrap_or(("", level));
        count.parse::<u64>().ok()
    });
    counts.fold(1, u64::saturating_mul)
}

/// The machine that hwloc makes of a description.
///
/// # Errors
/// hwloc does not take the description.
pub(crate) fn synthetic_machine(description: &str) -> Result<Machine, TopologyError> {
    let fail = |problem: String| TopologyError::Description {
        description: description.to_owned(),
        problem,
    };
    if n_described(description) > N_CPUS_MAX {
        return Err(fail(format!("it has more than {N_CPUS_MAX} CPUs")));
    }
    let topology = Topology::builder()
        .from_synthetic(description)
        .map_err(|error| fail(error.to_string()))?
        .build()
        .map_err(|error| fail(error.to_string()))?;
    let source = MachineSource::Synthetic(description.to_owned());
    Ok(machine(&topology, source))
}

fn machine(topology: &Topology, source: MachineSource) -> Machine {
    let distances = distances(topology);
    let (nodes, memory_nodes) = assemble(&nodes(topology), cores(topology), distances.as_ref());
    Machine {
        packages: packages(topology),
        nodes,
        memory_nodes,
        distances,
        core_kinds: core_kinds(topology),
        caches: caches(topology),
        gpus: Vec::new(),
        withheld: withheld(topology),
        source,
    }
}

/// NUMA nodes, whatever they have.
fn nodes(topology: &Topology) -> Vec<FoundNode> {
    topology
        .objects_with_type(ObjectType::NUMANode)
        .map(|object| FoundNode {
            os_index: object.os_index(),
            memory_bytes: local_memory_bytes(object),
            kind: object.subtype().map(text),
            cpus: cpus(object),
        })
        .collect()
}

/// Cores with their logical CPUs; logical CPUs by themselves where the system knows no cores.
fn cores(topology: &Topology) -> Vec<Core> {
    let has_cores = topology
        .objects_with_type(ObjectType::Core)
        .next()
        .is_some();
    let kind = if has_cores {
        ObjectType::Core
    } else {
        ObjectType::PU
    };
    let kinds = kind_sets(topology);
    topology
        .objects_with_type(kind)
        .map(|object| {
            let is_of = |(_, set): &(String, CpuSet)| {
                object.cpuset().is_some_and(|cpus| set.includes(cpus))
            };
            Core {
                cpus: cpus(object),
                kind: kinds.iter().position(is_of).unwrap_or(0),
            }
        })
        .filter(|core| !core.cpus.is_empty())
        .collect()
}

/// Names and CPUs of the kinds of core, slowest first; none where all are alike or where nobody
/// knows which are faster.
fn kind_sets(topology: &Topology) -> Vec<(String, CpuSet)> {
    let kinds: Vec<_> = topology.cpu_kinds().into_iter().flatten().collect();
    if kinds.len() < 2 || kinds.iter().any(|kind| kind.efficiency.is_none()) {
        return Vec::new();
    }
    let mut sets: Vec<(Option<usize>, String, CpuSet)> = kinds
        .into_iter()
        .enumerate()
        .map(|(rank, kind)| {
            let mut infos = kind.infos.iter();
            let name = infos.find(|info| info.name() == c"CoreType");
            let name = name.map_or_else(|| format!("kind {rank}"), |info| text(info.value()));
            (kind.efficiency, name, kind.cpuset)
        })
        .collect();
    sets.sort_by_key(|(efficiency, ..)| *efficiency);
    sets.into_iter().map(|(_, name, set)| (name, set)).collect()
}

fn core_kinds(topology: &Topology) -> Vec<String> {
    let sets = kind_sets(topology);
    sets.into_iter().map(|(name, _)| name).collect()
}

fn packages(topology: &Topology) -> Vec<Package> {
    topology
        .objects_with_type(ObjectType::Package)
        .map(|object| Package {
            os_index: object.os_index(),
            name: object
                .info("CPUModel")
                .map(|name| text(name).trim().to_owned()),
            cpus: cpus(object),
        })
        .filter(|package| !package.cpus.is_empty())
        .collect()
}

fn caches(topology: &Topology) -> Vec<Cache> {
    [
        ObjectType::L5Cache,
        ObjectType::L4Cache,
        ObjectType::L3Cache,
        ObjectType::L2Cache,
        ObjectType::L1Cache,
    ]
    .into_iter()
    .flat_map(|kind| topology.objects_with_type(kind))
    .filter_map(|object| match object.attributes() {
        Some(ObjectAttributes::Cache(cache)) => Some(Cache {
            level: cache.depth(),
            bytes: cache.size().map_or(0, u64::from),
            line_bytes: cache.line_size().map_or(0, usize::from),
            cpus: cpus(object),
        }),
        _ => None,
    })
    .collect()
}

fn distances(topology: &Topology) -> Option<NodeDistances> {
    let matrices = topology
        .distances_with_type(None, ObjectType::NUMANode)
        .ok()?;
    let matrix = matrices
        .iter()
        .find(|matrix| matrix.name() == Some(c"NUMALatency"))?;
    let numas: Option<Vec<usize>> = matrix.objects().map(|object| object?.os_index()).collect();
    Some(NodeDistances {
        numas: numas?,
        values: matrix.distances().to_vec(),
    })
}

/// What is in the whole machine and not among what may be used.
fn withheld(topology: &Topology) -> Withheld {
    let there = topology.complete_cpuset();
    let usable = topology.cpuset();
    let nodes_there = topology.complete_nodeset();
    let nodes_usable = topology.nodeset();
    // infinite sets say nothing
    let limit = |last: Option<_>| last.is_some();
    Withheld {
        cpus: match limit(there.last_set()) {
            true => (there - usable).iter_set().map(usize::from).collect(),
            false => Vec::new(),
        },
        numas: match limit(nodes_there.last_set()) {
            true => (nodes_there - nodes_usable)
                .iter_set()
                .map(usize::from)
                .collect(),
            false => Vec::new(),
        },
    }
}

fn cpus(object: &TopologyObject) -> Vec<usize> {
    let set = object.cpuset();
    set.map_or_else(Vec::new, |set| set.iter_set().map(usize::from).collect())
}

fn local_memory_bytes(object: &TopologyObject) -> u64 {
    match object.attributes() {
        Some(ObjectAttributes::NUMANode(numa)) => numa.local_memory().map_or(0, u64::from),
        _ => 0,
    }
}

fn text(text: &CStr) -> String {
    text.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use hwlocality::topology::export::xml::XMLExportFlags;

    use super::*;

    /// What is read from a file is what hwloc says, however it has come to know it.
    #[test]
    fn files_say_the_same_as_hwloc() {
        let made_up = [
            "Package:2 [NUMANode(memory=64GiB)] L3Cache:1(size=32MiB) L2Cache:4 Core:1 PU:2",
            "Package:1 Group:2 [NUMANode(memory=8GiB)] Core:3 PU:2(indexes=0,6,1,7,2,8,3,9,4,10,5,11)",
            "NUMANode:3 PU:40",
            "Core:2 PU:1",
        ]
        .map(|description| {
            let builder = Topology::builder().from_synthetic(description).unwrap();
            builder.build().unwrap()
        });
        let saved = |topology: &Topology| {
            let xml = topology.export_xml(XMLExportFlags::empty()).unwrap();
            Machine::from_xml("x", xml.as_ref()).unwrap()
        };
        let system = Topology::new().unwrap();
        for topology in made_up.iter().chain([&system]) {
            let told = machine(topology, MachineSource::Xml("x".to_owned()));
            let found = Machine {
                gpus: Vec::new(),
                ..saved(topology)
            };
            assert_eq!(found, told);
        }
    }
}
