//! What is free on each NUMA node, held against what is to be bound there.
//!
//! Memory that is bound to a node is never taken from another one: where the node is full, the kernel ends the process
//! without a word, and be the rest of the machine empty. So it is counted before.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::config::HugePages;
use crate::error::TopologyError;
use crate::machine::Machine;
use crate::memory::kib_entry_bytes;
use crate::plan::Plan;
use crate::probe::memory_binding_problem;
use crate::reserved_pages::{HUGE_PAGE_BYTES, free_pages};

/// Bytes of a page, as the kernel counts them.
const PAGE_BYTES: u64 = 4096;

/// What can be taken of each NUMA node's memory, where memory is bound to nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeRooms {
    /// By NUMA node; without those that the system does not tell.
    free_bytes: BTreeMap<usize, u64>,
    /// Huge pages that were set aside, which no free memory is taken for.
    reserved_pages: BTreeMap<usize, usize>,
}

impl NodeRooms {
    /// So many bytes of each NUMA node.
    pub fn new(free_bytes: impl IntoIterator<Item = (usize, u64)>) -> Self {
        Self {
            free_bytes: free_bytes.into_iter().collect(),
            reserved_pages: BTreeMap::new(),
        }
    }

    /// What this system has free on the NUMA nodes of `plan`; none where its memory is not bound: on a machine with one
    /// node, and where the system does not allow it.
    ///
    /// # Errors
    /// A node that is not there.
    pub fn read(plan: &Plan) -> Result<Self, TopologyError> {
        match memory_binding_problem(plan)? {
            None => Ok(Self::of(&plan.numas())),
            Some(_) => Ok(Self::default()),
        }
    }

    /// What this system has free on `numas`; none on a machine with one node.
    pub(crate) fn of(numas: &[usize]) -> Self {
        match is_divided(Path::new("/")) {
            true => Self::read_below(Path::new("/"), numas),
            false => Self::default(),
        }
    }

    fn read_below(root: &Path, numas: &[usize]) -> Self {
        let zones = fs::read_to_string(root.join("proc/zoneinfo")).unwrap_or_default();
        let free = |numa: usize| {
            let path = root.join(format!("sys/devices/system/node/node{numa}/meminfo"));
            free_bytes(
                &fs::read_to_string(path).ok()?,
                watermark_bytes(&zones, numa),
            )
        };
        let numas = || numas.iter().copied();
        Self {
            free_bytes: numas()
                .filter_map(|numa| Some((numa, free(numa)?)))
                .collect(),
            reserved_pages: numas().map(|numa| (numa, free_pages(root, numa))).collect(),
        }
    }

    /// All memory of the nodes of a made-up or saved `machine`, as if nothing else ran there; none of one node.
    pub fn of_machine(machine: &Machine) -> Self {
        let nodes = machine.nodes.iter();
        let sizes = nodes.filter_map(|node| Some((node.os_index?, node.memory_bytes)));
        let known: BTreeMap<usize, u64> = sizes.filter(|&(_, bytes)| bytes > 0).collect();
        match machine.numas().len() {
            0 | 1 => Self::default(),
            _ => Self::new(known),
        }
    }

    /// Bytes that can be taken of NUMA node `numa`; none where memory is not bound, or the system does not tell.
    pub fn free_bytes(&self, numa: usize) -> Option<u64> {
        self.free_bytes.get(&numa).copied()
    }

    /// NUMA nodes and what can be taken of each, as far as it is known.
    pub fn iter(&self) -> impl Iterator<Item = (usize, u64)> {
        self.free_bytes.iter().map(|(&numa, &free)| (numa, free))
    }

    /// What the NUMA node of each team of `plan` is to hold, and what is free there. `weights_bytes` and `cache_bytes` are by team.
    pub fn balance(
        &self,
        plan: &Plan,
        weights_bytes: &[u64],
        cache_bytes: &[u64],
    ) -> Vec<NodeBalance> {
        let needed = self.needed(plan, weights_bytes, cache_bytes);
        let of_team = |numa: Option<usize>| {
            let known = numa.and_then(|numa| self.free_bytes(numa));
            let needed = numa.and_then(|numa| needed.get(&numa)).copied();
            NodeBalance {
                needed_bytes: needed.unwrap_or(0),
                free_bytes: known.unwrap_or(u64::MAX),
            }
        };
        plan.nodes.iter().map(|node| of_team(node.numa)).collect()
    }

    /// Refuses what does not fit into a NUMA node. `weights_bytes` and `cache_bytes` are by team of `plan`.
    ///
    /// # Errors
    /// [`TopologyError::NodeFull`] names the first node that is too small.
    pub fn check(
        &self,
        plan: &Plan,
        weights_bytes: &[u64],
        cache_bytes: &[u64],
    ) -> Result<(), TopologyError> {
        let needed = self.needed(plan, weights_bytes, cache_bytes);
        let over = needed.into_iter().find_map(|(numa, bytes)| {
            let free = self.free_bytes(numa)?;
            (bytes > free).then_some((numa, bytes, free))
        });
        match over {
            None => Ok(()),
            Some((numa, bytes, free_bytes)) => Err(TopologyError::NodeFull {
                numa,
                bytes,
                free_bytes,
                cure: self.cure(plan, numa),
            }),
        }
    }

    /// Bytes that are bound to each NUMA node beside the huge pages that were set aside there.
    fn needed(
        &self,
        plan: &Plan,
        weights_bytes: &[u64],
        cache_bytes: &[u64],
    ) -> BTreeMap<usize, u64> {
        let mut pages = self.reserved_pages.clone();
        let mut needed: BTreeMap<usize, u64> = BTreeMap::new();
        for (team, node) in plan.nodes.iter().enumerate() {
            let homes = plan.homes(team);
            let weights = weights_bytes[team];
            if !(plan.huge_pages != HugePages::Off && take_pages(&mut pages, &homes, weights)) {
                for &numa in &homes {
                    *needed.entry(numa).or_default() += weights.div_ceil(homes.len() as u64);
                }
            }
            if let Some(numa) = node.numa {
                *needed.entry(numa).or_default() += cache_bytes[team];
            }
        }
        needed
    }

    /// What else can be done than to fill NUMA node `full`.
    fn cure(&self, plan: &Plan, full: usize) -> String {
        let elsewhere = (plan.nodes.iter().enumerate())
            .filter_map(|(team, node)| Some((team, node.numa.filter(|&numa| numa != full)?)));
        let roomiest =
            elsewhere.max_by_key(|&(team, numa)| (self.free_bytes(numa), std::cmp::Reverse(team)));
        let less =
            "give a smaller context (-c) or model, or free memory there (numactl -H shows it)";
        match roomiest {
            Some((team, numa)) => format!(
                "set memory.cold = \"single:{team}\" (NUMA node {numa} has most room), leave node {full} out \
                 ([[host.node]] lists those that are used), {less}"
            ),
            None => less.to_owned(),
        }
    }
}

/// What a team's NUMA node is to hold, of all teams there, and what is free on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeBalance {
    /// Bytes of weights and caches.
    pub needed_bytes: u64,
    /// Bytes that can be had; `u64::MAX` where nobody knows.
    pub free_bytes: u64,
}

impl NodeBalance {
    /// Whether it does not fit.
    pub fn is_over(&self) -> bool {
        self.needed_bytes > self.free_bytes
    }

    /// Bytes that are left.
    pub fn left_bytes(&self) -> u64 {
        self.free_bytes.saturating_sub(self.needed_bytes)
    }
}

/// Whether the system has several NUMA nodes with memory.
fn is_divided(root: &Path) -> bool {
    let text = fs::read_to_string(root.join("sys/devices/system/node/has_memory"));
    let numas = text
        .ok()
        .and_then(|text| crate::machine::numbers(text.trim()));
    numas.is_some_and(|numas| numas.len() > 1)
}

/// Takes the huge pages for `bytes` of weights, spread over `homes`, from those that are set aside; none, and false, where
/// they do not do for all of it.
fn take_pages(pages: &mut BTreeMap<usize, usize>, homes: &[usize], bytes: u64) -> bool {
    let n_pages = bytes.div_ceil(HUGE_PAGE_BYTES as u64) as usize;
    let each = n_pages.div_ceil(homes.len().max(1));
    let has = |numa: &usize| pages.get(numa).is_some_and(|&free| free >= each);
    if bytes < HUGE_PAGE_BYTES as u64 || homes.is_empty() || !homes.iter().all(has) {
        return false;
    }
    for numa in homes {
        *pages.entry(*numa).or_default() -= each;
    }
    true
}

/// What can be taken of a NUMA node, by its `meminfo`: free pages, and pages of files and of the kernel's caches that it
/// gives up for them; less its `watermark_bytes`, which the kernel keeps for itself. `Shmem` is not among the files' lists, and cannot be had.
fn free_bytes(meminfo: &str, watermark_bytes: u64) -> Option<u64> {
    // "Node 0 MemFree:  17452112 kB"
    let entry = |key: &str| {
        let mut lines = meminfo.lines();
        lines.find_map(|line| {
            let (_, rest) = line.strip_prefix("Node ")?.split_once(' ')?;
            kib_entry_bytes(rest, key)
        })
    };
    let free = entry("MemFree:")?;
    let files = entry("Active(file):").unwrap_or(0) + entry("Inactive(file):").unwrap_or(0);
    // as in the kernel's own MemAvailable, half of the slabs may be in use
    let slabs = entry("SReclaimable:").unwrap_or(0) / 2;
    // page tables, stacks and working memory lie beside what is bound
    let beside = (entry("MemTotal:")? / 64).min(16 << 20);
    Some((free + files + slabs).saturating_sub(watermark_bytes + beside))
}

/// What the kernel wants to have free on a NUMA node, by the text of `zoneinfo`: below it pages are looked for elsewhere, and
/// somewhat below that, where they are bound here, a process is ended. With transparent huge pages it is tens of MB.
fn watermark_bytes(zoneinfo: &str, numa: usize) -> u64 {
    let node = format!("Node {numa},");
    let mut is_ours = false;
    let mut n_pages = 0;
    for line in zoneinfo.lines() {
        if line.starts_with("Node ") {
            is_ours = line.starts_with(&node);
        } else if is_ours && let Some(pages) = line.trim_start().strip_prefix("high ") {
            n_pages += pages.trim().parse::<u64>().unwrap_or(0);
        }
    }
    n_pages * PAGE_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ColdPolicy;
    use crate::machine::{MachineNode, MachineSource};
    use crate::plan::NodePlan;

    const MIB: u64 = 1 << 20;

    /// A node of 64 MiB in a virtual machine, as the kernel tells it.
    const SMALL: &str = "\
Node 1 MemTotal:          65536 kB
Node 1 MemFree:           40960 kB
Node 1 MemUsed:           24576 kB
Node 1 Active(file):       1024 kB
Node 1 Inactive(file):     3072 kB
Node 1 FilePages:         14336 kB
Node 1 Shmem:              8192 kB
Node 1 KReclaimable:       2048 kB
Node 1 SReclaimable:       2048 kB
";

    fn plan(numas: &[Option<usize>], cold: ColdPolicy) -> Plan {
        let team = |&numa: &Option<usize>| NodePlan {
            numa,
            cpus: vec![0],
        };
        Plan {
            cold,
            ..Plan::of_nodes(numas.iter().map(team).collect(), HugePages::Try)
        }
    }

    fn two(cold: ColdPolicy) -> Plan {
        plan(&[Some(0), Some(1)], cold)
    }

    #[test]
    fn what_is_free_is_what_the_kernel_would_give() {
        // 40 MiB free, 4 of files, half of 2 of slabs, less a 64th and what the kernel keeps
        assert_eq!(free_bytes(SMALL, 3 * MIB), Some((45 - 1 - 3) * MIB));
        assert_eq!(free_bytes(SMALL, 60 * MIB), Some(0));
        let large = "Node 0 MemTotal: 536870912 kB\nNode 0 MemFree: 536870912 kB\n";
        assert_eq!(free_bytes(large, 0), Some((512 << 30) - 16 * MIB));
        let zones = "\
Node 0, zone      DMA
  per-node stats
      nr_inactive_anon 1021
  pages free     3840
        boost    0
        min      10
        low      12
        high     14
        spanned  4095
    cpu: 0
              high:  63
Node 0, zone   Normal
        high     1000
Node 1, zone   Normal
        high     2560
";
        assert_eq!(watermark_bytes(zones, 0), 1014 * 4096);
        assert_eq!(watermark_bytes(zones, 1), 10 * MIB);
        assert_eq!(watermark_bytes(zones, 2), 0);
        assert_eq!(watermark_bytes("", 0), 0);
        for text in ["", "MemFree: 5 kB\n", "Node 0 MemFree: 5 kB\n", "Node x"] {
            assert_eq!(free_bytes(text, 0), None, "{text:?}");
        }
    }

    #[test]
    fn nodes_are_read_where_linux_keeps_them() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join("sys/devices/system/node").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        assert!(!is_divided(root.path()));
        write("has_memory", "0\n");
        assert!(!is_divided(root.path()));
        write("has_memory", "0-1\n");
        assert!(is_divided(root.path()));
        write("node1/meminfo", SMALL);
        write("node1/hugepages/hugepages-2048kB/free_hugepages", "3\n");
        let rooms = NodeRooms::read_below(root.path(), &[0, 1]);
        assert_eq!(rooms.free_bytes(0), None, "a node that tells nothing");
        assert_eq!(rooms.free_bytes(1), free_bytes(SMALL, 0));
        let zones = root.path().join("proc/zoneinfo");
        fs::create_dir_all(zones.parent().unwrap()).unwrap();
        fs::write(zones, "Node 1, zone Normal\n  high 256\n").unwrap();
        let rooms = NodeRooms::read_below(root.path(), &[0, 1]);
        assert_eq!(rooms.free_bytes(1), free_bytes(SMALL, MIB));
        assert_eq!(rooms.reserved_pages, [(0, 0), (1, 3)].into());
        let known: Vec<(usize, u64)> = rooms.iter().collect();
        assert_eq!(known, [(1, free_bytes(SMALL, MIB).unwrap())]);
    }

    #[test]
    fn weights_and_cache_are_counted_where_they_are_bound() {
        let rooms = NodeRooms::new([(0, 900 * MIB), (1, 40 * MIB)]);
        let needed = |cold| {
            let weights = [100 * MIB + 1, 60 * MIB];
            rooms.needed(&two(cold), &weights, &[8 * MIB, 4 * MIB])
        };
        assert_eq!(
            needed(ColdPolicy::Shard),
            [(0, 108 * MIB + 1), (1, 64 * MIB)].into()
        );
        assert_eq!(
            needed(ColdPolicy::Interleave),
            [(0, 88 * MIB + 1), (1, 84 * MIB + 1)].into()
        );
        // two teams of one NUMA node, and one whose memory the system chooses
        let plan = plan(&[Some(1), Some(1), None], ColdPolicy::Shard);
        let weights = [10 * MIB, 20 * MIB, 500 * MIB];
        assert_eq!(
            rooms.needed(&plan, &weights, &[MIB, MIB, MIB]),
            [(1, 32 * MIB)].into()
        );
    }

    #[test]
    fn a_full_node_is_refused_with_both_figures_and_a_cure() {
        let rooms = NodeRooms::new([(0, 900 * MIB), (1, 40 * MIB)]);
        let check = |cold, weights: [u64; 2]| rooms.check(&two(cold), &weights, &[MIB, MIB]);
        check(ColdPolicy::Shard, [800 * MIB, 39 * MIB]).unwrap();
        let error = check(ColdPolicy::Shard, [800 * MIB, 39 * MIB + 1]).unwrap_err();
        assert!(!error.is_environment(), "another plan would do");
        assert_eq!(
            error.to_string(),
            "NUMA node 1 would have to hold 41943041 bytes of weights and cache, but 41943040 can be had there: set \
             memory.cold = \"single:0\" (NUMA node 0 has most room), leave node 1 out ([[host.node]] lists those that are \
             used), give a smaller context (-c) or model, or free memory there (numactl -H shows it)"
        );
        check(ColdPolicy::Interleave, [70 * MIB, 8 * MIB]).unwrap();
        check(ColdPolicy::Interleave, [70 * MIB, 9 * MIB]).unwrap_err();
        let alone = plan(&[Some(1)], ColdPolicy::Shard);
        let text = rooms
            .check(&alone, &[41 * MIB], &[0])
            .unwrap_err()
            .to_string();
        assert!(text.contains("had there: give a smaller context"), "{text}");
        // where nothing is bound nothing is too small
        let unbound = NodeRooms::default();
        unbound
            .check(&two(ColdPolicy::Shard), &[1 << 50, 0], &[0, 0])
            .unwrap();
    }

    #[test]
    fn pages_that_were_set_aside_need_no_free_memory() {
        let rooms = NodeRooms {
            reserved_pages: [(0, 10), (1, 30)].into(),
            ..NodeRooms::new([(0, MIB), (1, MIB)])
        };
        let check =
            |plan: &Plan, weights: &[u64]| rooms.check(plan, weights, &vec![0; weights.len()]);
        let shard = two(ColdPolicy::Shard);
        check(&shard, &[20 * MIB, 60 * MIB]).unwrap();
        check(&shard, &[20 * MIB + 1, 60 * MIB]).unwrap_err();
        // they are taken once
        let same = plan(&[Some(0), Some(0)], ColdPolicy::Shard);
        check(&same, &[10 * MIB, 10 * MIB]).unwrap();
        check(&same, &[10 * MIB, 12 * MIB]).unwrap_err();
        check(&two(ColdPolicy::Interleave), &[20 * MIB, 20 * MIB]).unwrap();
        check(&two(ColdPolicy::Interleave), &[20 * MIB, 24 * MIB]).unwrap_err();
        let off = Plan {
            huge_pages: HugePages::Off,
            ..shard
        };
        check(&off, &[20 * MIB, 60 * MIB]).unwrap_err();
    }

    #[test]
    fn a_made_up_machine_has_all_its_memory() {
        let machine = |sizes: &[u64]| {
            let nodes = sizes.iter().enumerate();
            let nodes = nodes.map(|(index, &memory_bytes)| MachineNode {
                os_index: Some(index),
                memory_bytes,
                cores: vec![],
            });
            Machine::of_nodes(nodes.collect(), MachineSource::Hwloc)
        };
        let rooms = NodeRooms::of_machine(&machine(&[64 << 30, 8 << 30, 0]));
        assert_eq!(rooms, NodeRooms::new([(0, 64 << 30), (1, 8 << 30)]));
        assert_eq!(
            NodeRooms::of_machine(&machine(&[1])),
            NodeRooms::default(),
            "one node has no other"
        );
    }
}
