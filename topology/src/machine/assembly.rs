//! Which cores belong to which NUMA node: the same for machines from hwloc and from a file.

use super::{Core, MachineNode, MemoryNode, NodeDistances};

/// A NUMA node as it is found.
#[derive(Debug, Clone)]
pub(crate) struct FoundNode {
    pub os_index: Option<usize>,
    /// 0 where it has none or nobody knows.
    pub memory_bytes: u64,
    /// What kind of memory, where the system says so.
    pub kind: Option<String>,
    /// CPUs that are local to it, ascending.
    pub cpus: Vec<usize>,
}

/// NUMA nodes with cores, and those without.
///
/// Each core is in the first node with memory that it is local to; a core without such a node is in the one that is
/// nearest to its own. Where there is no node at all, all cores are in one without a number.
pub(crate) fn assemble(
    found: &[FoundNode],
    cores: Vec<Core>,
    distances: Option<&NodeDistances>,
) -> (Vec<MachineNode>, Vec<MemoryNode>) {
    // without any memory known, nodes are as good as they are
    let is_any_known = found.iter().any(|node| node.memory_bytes > 0);
    let can_hold = |node: &FoundNode| !is_any_known || node.memory_bytes > 0;
    let mut cores_of = vec![Vec::new(); found.len()];
    let mut homeless = Vec::new();
    for core in cores {
        let has = |node: &FoundNode, cpu| node.cpus.binary_search(cpu).is_ok();
        let is_local = |node: &FoundNode| core.cpus.iter().all(|cpu| has(node, cpu));
        let home = (found.iter()).position(|node| can_hold(node) && is_local(node));
        let own = found.iter().find(|node| is_local(node));
        match home.or_else(|| nearest(found, own, can_hold, distances)) {
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
    for (node, cores) in found.iter().zip(cores_of) {
        let (os_index, memory_bytes) = (node.os_index, node.memory_bytes);
        if !cores.is_empty() {
            nodes.push(MachineNode {
                os_index,
                memory_bytes,
                cores,
            });
        } else if can_hold(node) {
            memory_nodes.push(MemoryNode {
                os_index,
                memory_bytes,
                kind: node.kind.clone(),
                local_cpus: node.cpus.clone(),
            });
        }
    }
    (nodes, memory_nodes)
}

/// Position of the node that can hold memory and is nearest to `own`, one with CPUs if there is one: the first of them
/// where distances say nothing.
fn nearest(
    found: &[FoundNode],
    own: Option<&FoundNode>,
    can_hold: impl Fn(&FoundNode) -> bool,
    distances: Option<&NodeDistances>,
) -> Option<usize> {
    let distance = |node: &FoundNode| {
        let (from, to) = own?.os_index.zip(node.os_index)?;
        distances?.between(from, to)
    };
    let candidates = (0..found.len()).filter(|&i| can_hold(&found[i]));
    candidates.min_by_key(|&i| {
        let has_no_cpus = found[i].cpus.is_empty();
        (has_no_cpus, distance(&found[i]).unwrap_or(u64::MAX))
    })
}
