//! From hwloc's objects to a [`Machine`].

use std::ffi::CStr;

use hwlocality::Topology;
use hwlocality::cpu::cpuset::CpuSet;
use hwlocality::object::TopologyObject;
use hwlocality::object::attributes::ObjectAttributes;
use hwlocality::object::types::ObjectType;
use hwlocality::topology::builder::{BuildFlags, TypeFilter};

use super::{has_several_nodes, system};
use crate::error::TopologyError;
use crate::gpu::{DISPLAY_CLASS, NVIDIA_VENDOR};
use crate::machine::{
    Cache, Core, Gpu, Machine, MachineNode, MachineSource, MemoryNode, NodeDistances, Package,
    Withheld,
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

/// The machine that hwloc makes of a description.
///
/// # Errors
/// hwloc does not take the description.
pub(crate) fn synthetic_machine(description: &str) -> Result<Machine, TopologyError> {
    let fail = |problem: String| TopologyError::Description {
        description: description.to_owned(),
        problem,
    };
    let topology = Topology::builder()
        .from_synthetic(description)
        .map_err(|error| fail(error.to_string()))?
        .build()
        .map_err(|error| fail(error.to_string()))?;
    let source = MachineSource::Synthetic(description.to_owned());
    Ok(machine(&topology, source))
}

/// The machine of the XML called `name`.
///
/// # Errors
/// hwloc does not take the text, or the machine has no CPU that its process could use.
pub(crate) fn xml_machine(name: &str, xml: &str) -> Result<Machine, TopologyError> {
    let fail = |problem: String| TopologyError::Xml {
        name: name.to_owned(),
        problem,
    };
    let topology = Topology::builder()
        .with_io_type_filter(TypeFilter::KeepImportant)
        .map_err(|error| fail(error.to_string()))?
        .from_xml(xml)
        .map_err(|_| fail("hwloc cannot read it".to_owned()))?
        .build()
        .map_err(|_| fail("hwloc cannot read it".to_owned()))?;
    let mut machine = machine(&topology, MachineSource::Xml(name.to_owned()));
    machine.gpus = gpus(&topology);
    match machine.n_cpus() {
        0 => Err(fail("the machine has no CPU".to_owned())),
        _ => Ok(machine),
    }
}

fn machine(topology: &Topology, source: MachineSource) -> Machine {
    let distances = distances(topology);
    let (nodes, memory_nodes) = nodes(topology, distances.as_ref());
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

/// NUMA nodes with CPUs, and those without. Each core is in the first node with memory that it is
/// local to; cores without such a node are in the one that is nearest to their own.
fn nodes(
    topology: &Topology,
    distances: Option<&NodeDistances>,
) -> (Vec<MachineNode>, Vec<MemoryNode>) {
    let objects: Vec<&TopologyObject> = topology.objects_with_type(ObjectType::NUMANode).collect();
    // without any memory known, nodes are as good as they are
    let is_any_known = objects.iter().any(|object| local_memory_bytes(object) > 0);
    let can_hold = |object: &TopologyObject| !is_any_known || local_memory_bytes(object) > 0;
    let mut cores_of = vec![Vec::new(); objects.len()];
    let mut homeless = Vec::new();
    for (object, core) in cores(topology) {
        let is_local = |node: &&TopologyObject| {
            let local = node.cpuset().zip(object.cpuset());
            local.is_some_and(|(node_cpus, core_cpus)| node_cpus.includes(core_cpus))
        };
        let home = (objects.iter()).position(|node| can_hold(node) && is_local(node));
        let own = objects.iter().find(|node| is_local(node));
        match home.or_else(|| nearest(&objects, own.copied(), can_hold, distances)) {
            Some(home) => cores_of[home].push(core),
            None => homeless.push(core),
        }
    }
    if !homeless.is_empty() {
        let node = MachineNode {
            os_index: None,
            memory_bytes: 0,
            cores: homeless,
        };
        return (vec![node], Vec::new());
    }
    let (mut nodes, mut memory_nodes) = (Vec::new(), Vec::new());
    for (object, cores) in objects.into_iter().zip(cores_of) {
        let (os_index, memory_bytes) = (object.os_index(), local_memory_bytes(object));
        if !cores.is_empty() {
            nodes.push(MachineNode {
                os_index,
                memory_bytes,
                cores,
            });
        } else if can_hold(object) {
            memory_nodes.push(MemoryNode {
                os_index,
                memory_bytes,
                kind: object.subtype().map(text),
                local_cpus: cpus(object),
            });
        }
    }
    (nodes, memory_nodes)
}

/// Position of the node that can hold memory and is nearest to `own`: the first of them where
/// distances say nothing.
fn nearest(
    objects: &[&TopologyObject],
    own: Option<&TopologyObject>,
    can_hold: impl Fn(&TopologyObject) -> bool,
    distances: Option<&NodeDistances>,
) -> Option<usize> {
    let distance = |node: &TopologyObject| {
        let (from, to) = own?.os_index().zip(node.os_index())?;
        distances?.between(from, to)
    };
    let has_cpus = |node: &TopologyObject| node.cpuset().is_some_and(|cpus| !cpus.is_empty());
    let candidates = || (0..objects.len()).filter(|&i| can_hold(objects[i]));
    candidates()
        .filter(|&i| has_cpus(objects[i]))
        .chain(candidates())
        .min_by_key(|&i| distance(objects[i]).unwrap_or(u64::MAX))
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
    let kinds = kind_sets(topology);
    topology
        .objects_with_type(kind)
        .map(|object| {
            let is_of = |(_, set): &(String, CpuSet)| {
                object.cpuset().is_some_and(|cpus| set.includes(cpus))
            };
            let core = Core {
                cpus: cpus(object),
                kind: kinds.iter().position(is_of).unwrap_or(0),
            };
            (object, core)
        })
        .filter(|(_, core)| !core.cpus.is_empty())
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
            true => (&there - &usable).iter_set().map(usize::from).collect(),
            false => Vec::new(),
        },
        numas: match limit(nodes_there.last_set()) {
            true => (&nodes_there - &nodes_usable)
                .iter_set()
                .map(usize::from)
                .collect(),
            false => Vec::new(),
        },
    }
}

/// NVIDIA's display controllers, with what NVML and CUDA said when the machine was saved.
fn gpus(topology: &Topology) -> Vec<Gpu> {
    let mut gpus: Vec<Gpu> = topology
        .objects_with_type(ObjectType::PCIDevice)
        .filter_map(|object| {
            let Some(ObjectAttributes::PCIDevice(pci)) = object.attributes() else {
                return None;
            };
            let is_gpu =
                pci.vendor_id() == NVIDIA_VENDOR && u32::from(pci.class_id()) >> 8 == DISPLAY_CLASS;
            is_gpu.then(|| Gpu {
                pci_address: format!(
                    "{:04x}:{:02x}:{:02x}.{:x}",
                    pci.domain(),
                    pci.bus_id(),
                    pci.bus_device(),
                    pci.function()
                ),
                pci_device: pci.device_id(),
                name: device_info(object, "GPUModel"),
                memory_bytes: device_info(object, "CUDAGlobalMemorySize")
                    .and_then(|kib| kib.parse::<u64>().ok()?.checked_mul(1024)),
                compute_capability: None,
                numa: only_node(object),
            })
        })
        .collect();
    gpus.sort_by(|a, b| a.pci_address.cmp(&b.pci_address));
    gpus
}

/// What a PCI device's drivers say of it.
fn device_info(device: &TopologyObject, name: &str) -> Option<String> {
    device
        .io_children()
        .find_map(|child| child.info(name))
        .map(text)
}

/// The NUMA node that a device hangs on, if it is one.
fn only_node(device: &TopologyObject) -> Option<usize> {
    let nodes = device.first_non_io_ancestor()?.nodeset()?;
    match nodes.weight() {
        Some(1) => nodes.first_set().map(usize::from),
        _ => None,
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
