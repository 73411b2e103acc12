//! What each node's memory has to hold, to the byte, and what there is.

use pi_topology::{HugePages, Machine, NodeRooms, Plan, TopologyError, available_memory_bytes};
use serde::Serialize;

use crate::error::RuntimeError;

/// Bytes of a page.
const PAGE_BYTES: u64 = 4096;

/// Bytes of a huge page.
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// A node's memory, each part rounded up to the pages that it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct NodeMemory {
    /// The node's share of the weights.
    pub weights_bytes: u64,
    /// Keys and values of its heads, for a full context.
    pub cache_bytes: u64,
    /// Slots and the team's working memory.
    pub working_bytes: u64,
    /// What may be used; none where the system does not tell.
    pub budget_bytes: Option<u64>,
}

impl NodeMemory {
    /// `weights`, `cache` and `working` bytes as they are asked for, in pages as `huge_pages` has them.
    pub(super) fn new(
        huge_pages: HugePages,
        weights: u64,
        cache: u64,
        working: u64,
        budget_bytes: Option<u64>,
    ) -> Self {
        Self {
            weights_bytes: weights.next_multiple_of(granule_bytes(huge_pages, weights)),
            // the cache is in small pages, so that it takes memory as it is filled
            cache_bytes: cache.next_multiple_of(PAGE_BYTES),
            working_bytes: working.next_multiple_of(PAGE_BYTES),
            budget_bytes,
        }
    }

    /// All parts.
    pub fn total_bytes(&self) -> u64 {
        self.weights_bytes + self.cache_bytes + self.working_bytes
    }
}

/// What an arena of `bytes` is rounded up to.
fn granule_bytes(huge_pages: HugePages, bytes: u64) -> u64 {
    match huge_pages {
        HugePages::Try | HugePages::Require if bytes >= HUGE_PAGE_BYTES => HUGE_PAGE_BYTES,
        _ => PAGE_BYTES,
    }
}

/// What each node may use: what is free on its NUMA node, where `rooms` says it, else that node's memory; or what is
/// available if that is less; divided by the teams there.
///
/// # Errors
/// The machine cannot be discovered.
pub(super) fn budgets(plan: &Plan, rooms: &NodeRooms) -> Result<Vec<Option<u64>>, TopologyError> {
    let machine = Machine::discover()?;
    let available = available_memory_bytes();
    let budget = |numa: Option<usize>| {
        let there = machine.nodes.iter().find(|node| node.os_index == numa);
        let there = there
            .map(|node| node.memory_bytes)
            .filter(|&bytes| bytes > 0);
        let there = numa.and_then(|numa| rooms.free_bytes(numa)).or(there);
        let sharing = plan.nodes.iter().filter(|node| node.numa == numa).count() as u64;
        let bytes = match (there, available) {
            (Some(there), Some(available)) => Some(there.min(available)),
            (there, available) => there.or(available),
        };
        bytes.map(|bytes| bytes / sharing.max(1))
    };
    Ok(plan.nodes.iter().map(|node| budget(node.numa)).collect())
}

/// Refuses what does not fit.
///
/// # Errors
/// [`TopologyError::NotEnoughMemory`] for a node without room, or all nodes together.
pub(super) fn check(nodes: &[NodeMemory]) -> Result<(), RuntimeError> {
    let total = nodes.iter().map(NodeMemory::total_bytes).sum();
    let each = nodes
        .iter()
        .map(|node| (node.total_bytes(), node.budget_bytes));
    for (bytes, available) in each.chain([(total, available_memory_bytes())]) {
        if let Some(available_bytes) = available.filter(|&available| bytes > available) {
            return Err(RuntimeError::Topology(TopologyError::NotEnoughMemory {
                purpose: "the planned model with its cache",
                bytes,
                available_bytes,
            }));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_free_on_a_node_bounds_it_and_not_what_it_has() {
        let machine = Machine::discover().unwrap();
        let plan = Plan::new(&pi_topology::TopologyConfig::default(), &machine, None).unwrap();
        let Some(numa) = plan.nodes[0].numa else {
            eprintln!("skipped: this system numbers no NUMA nodes");
            return;
        };
        let full = NodeRooms::new([(numa, 4096)]);
        assert_eq!(budgets(&plan, &full).unwrap()[0], Some(4096));
        let unknown = budgets(&plan, &NodeRooms::default()).unwrap()[0];
        assert!(unknown.is_none_or(|bytes| bytes > 1 << 20), "{unknown:?}");
    }

    #[test]
    fn arenas_are_counted_in_the_pages_that_they_take() {
        let memory = NodeMemory::new(HugePages::Try, (2 << 20) + 1, 1, 4097, None);
        assert_eq!(memory.weights_bytes, 4 << 20);
        assert_eq!((memory.cache_bytes, memory.working_bytes), (4096, 8192));
        assert_eq!(memory.total_bytes(), (4 << 20) + 4096 + 8192);
        let small = NodeMemory::new(HugePages::Try, 4097, 0, 0, None);
        assert_eq!(small.total_bytes(), 8192);
        let off = NodeMemory::new(HugePages::Off, (2 << 20) + 1, 0, 0, None);
        assert_eq!(off.weights_bytes, (2 << 20) + 4096);
    }

    #[test]
    fn a_node_over_budget_is_refused_with_both_numbers() {
        let fits = NodeMemory::new(HugePages::Off, 4096, 0, 0, Some(4096));
        check(&[fits]).unwrap();
        let over = NodeMemory {
            budget_bytes: Some(4095),
            ..fits
        };
        let text = check(&[fits, over]).unwrap_err().to_string();
        assert!(text.contains("4096") && text.contains("4095"), "{text}");
    }
}
