//! Where memory really lies: each page's NUMA node, as the kernel tells it, held against the plan.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use serde::Serialize;
use tracing::warn;

use crate::arena::Arena;
use crate::config::{ColdPolicy, HugePages};
use crate::error::TopologyError;
use crate::huge_share::{HUGE_PERCENT_MIN, HugeShare, huge_share};
use crate::plan::Plan;

/// Bytes of a page, or of what the kernel is asked for at a time.
const PAGE_BYTES: usize = 4096;

/// Pages that the kernel is asked for in one call.
const PAGES_A_CALL: usize = 16 << 10;

/// Bytes from which interleaved memory is expected to be spread evenly: a page each decides nothing.
const EVEN_BYTES: usize = 64 << 20;

/// Of an even part one in so many may be missing: huge pages take turns too, and where some cannot be had small ones do.
const SHORT_PART: usize = 8;

/// Where all nodes' memory lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Residence {
    /// Each node's, by node; none where the system does not tell.
    pub nodes: Option<Vec<NodeResidence>>,
    /// What of the weights lies in huge pages; none where they are too small, and where the system does not tell.
    pub huge_pages: Option<HugeShare>,
    /// What is not as planned, or why nobody knows.
    pub problem: Option<String>,
}

/// Where one node's memory lies.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct NodeResidence {
    /// Bytes on each NUMA node, as the system numbers them.
    pub numa_bytes: BTreeMap<usize, usize>,
    /// Bytes of pages that are in no memory: never written, or swapped out.
    pub absent_bytes: usize,
}

impl fmt::Display for Residence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(nodes) = &self.nodes else {
            return f.write_str("not known");
        };
        let words = nodes.iter().enumerate().map(|(node, residence)| {
            let mut parts: Vec<String> = residence
                .numa_bytes
                .iter()
                .map(|(numa, &bytes)| format!("{} on NUMA node {numa}", megabytes(bytes)))
                .collect();
            if residence.absent_bytes > 0 {
                parts.push(format!(
                    "{} in no memory",
                    megabytes(residence.absent_bytes)
                ));
            }
            format!("node {node}: {}", parts.join(", "))
        });
        f.write_str(&words.collect::<Vec<String>>().join("; "))?;
        match &self.huge_pages {
            Some(huge) => write!(f, "; {huge} in huge pages"),
            None => Ok(()),
        }
    }
}

fn megabytes(bytes: usize) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

impl Plan {
    /// NUMA nodes whose memory holds the weights of team `node`; none where the system chooses.
    pub(crate) fn homes(&self, node: usize) -> Vec<usize> {
        match self.cold {
            ColdPolicy::Interleave => self.numas(),
            ColdPolicy::Shard | ColdPolicy::Replicate | ColdPolicy::Single(_) => {
                self.nodes[node].numa.into_iter().collect()
            }
        }
    }

    /// Reserves `bytes` for the weights of team `node`, as its policy and huge pages are planned.
    ///
    /// # Errors
    /// As [`Arena::new`]; where the plan is strict, also memory that cannot be bound.
    pub fn arena(&self, node: usize, bytes: usize) -> Result<Arena, TopologyError> {
        Arena::on(bytes, &self.homes(node), self.huge_pages, self.strict)
    }

    /// Reserves `bytes` for the cache of team `node`, on its node whatever the policy, in small pages: a large one would
    /// take memory for positions that are never reached.
    ///
    /// # Errors
    /// As [`Plan::arena`].
    pub fn cache_arena(&self, node: usize, bytes: usize) -> Result<Arena, TopologyError> {
        let numa = self.nodes[node].numa;
        Arena::on(bytes, numa.as_slice(), HugePages::Off, self.strict)
    }

    /// Asks the kernel for the NUMA node of each page of `areas`, the teams' weights, and warns (logged) of what is not
    /// as planned.
    ///
    /// # Errors
    /// Something is not as planned, or the kernel does not tell, and the plan is strict; or huge pages are required, and
    /// less than 90 % of the weights lie in some.
    pub fn verify(&self, areas: &[&[u8]]) -> Result<Residence, TopologyError> {
        let areas = areas.iter().map(|area| {
            let start = area.as_ptr().addr();
            start..start + area.len()
        });
        let areas: Vec<Range<usize>> = areas.collect();
        let huge_pages = huge_share(&areas);
        if let Some(huge) = huge_pages
            && self.huge_pages == HugePages::Require
            && huge.percent() < HUGE_PERCENT_MIN
        {
            return Err(TopologyError::HugePages {
                problem: format!(
                    "only {huge} of the weights lie in some, and {HUGE_PERCENT_MIN} % have to"
                ),
            });
        }
        let residence = self.verify_pages(areas.into_iter(), |node| self.homes(node))?;
        Ok(Residence {
            huge_pages,
            ..residence
        })
    }

    /// The same for the teams' caches, whose addresses these are; nothing is read there.
    ///
    /// # Errors
    /// As [`Plan::verify`].
    pub fn verify_caches(&self, areas: &[Range<usize>]) -> Result<Residence, TopologyError> {
        let home = |node: usize| self.nodes[node].numa.into_iter().collect();
        self.verify_pages(areas.iter().cloned(), home)
    }

    fn verify_pages(
        &self,
        areas: impl Iterator<Item = Range<usize>>,
        homes: impl Fn(usize) -> Vec<usize>,
    ) -> Result<Residence, TopologyError> {
        let found: Result<Vec<NodeResidence>, String> = areas.map(residence).collect();
        let (nodes, problem) = match found {
            Ok(nodes) => {
                let problem = misplaced(&nodes, homes);
                (Some(nodes), problem)
            }
            Err(problem) => {
                let problem = format!("nobody knows where memory lies: {problem}");
                (None, Some(problem))
            }
        };
        let residence = Residence {
            nodes,
            huge_pages: None,
            problem,
        };
        match &residence.problem {
            Some(problem) if self.strict => Err(TopologyError::Misplaced {
                problem: problem.clone(),
            }),
            Some(problem) => {
                warn!("{problem}");
                Ok(residence)
            }
            None => Ok(residence),
        }
    }
}

/// What of `found` is not at its team's homes.
fn misplaced(found: &[NodeResidence], homes: impl Fn(usize) -> Vec<usize>) -> Option<String> {
    let mut problems = Vec::new();
    for (node, found) in found.iter().enumerate() {
        let homes = homes(node);
        if homes.is_empty() {
            continue;
        }
        let total: usize = found.numa_bytes.values().sum();
        let at_home = |numa: &usize| found.numa_bytes.get(numa).copied().unwrap_or(0);
        let strayed = total - homes.iter().map(at_home).sum::<usize>();
        if strayed > 0 {
            let elsewhere: Vec<String> = (found.numa_bytes.keys())
                .filter(|numa| !homes.contains(numa))
                .map(usize::to_string)
                .collect();
            problems.push(format!(
                "{} of node {node}'s {} lie on NUMA node {} and not on {}",
                megabytes(strayed),
                megabytes(total),
                elsewhere.join(", "),
                crate::machine::ranges(homes.clone()),
            ));
        }
        // pages take turns, small ones to the page: what is missing of an even part went to another home, as this one is full
        let fair = total / homes.len();
        let short = (homes.iter()).find(|numa| at_home(numa) < fair - fair / SHORT_PART);
        if let Some(numa) = short.filter(|_| total >= EVEN_BYTES && strayed == 0) {
            problems.push(format!(
                "only {} of node {node}'s {}, which are spread over NUMA nodes {}, lie on {numa}",
                megabytes(at_home(numa)),
                megabytes(total),
                crate::machine::ranges(homes.clone()),
            ));
        }
    }
    (!problems.is_empty()).then(|| problems.join("; "))
}

/// Where the pages of `area` lie.
///
/// # Errors
/// Why the kernel does not tell.
#[cfg(target_os = "linux")]
fn residence(area: Range<usize>) -> Result<NodeResidence, String> {
    let mut found = NodeResidence::default();
    let first = area.start / PAGE_BYTES * PAGE_BYTES;
    let pages: Vec<usize> = (first..area.end).step_by(PAGE_BYTES).collect();
    for pages in pages.chunks(PAGES_A_CALL) {
        for status in page_nodes(pages).map_err(|error| error.to_string())? {
            match usize::try_from(status) {
                Ok(numa) => *found.numa_bytes.entry(numa).or_default() += PAGE_BYTES,
                Err(_) => found.absent_bytes += PAGE_BYTES,
            }
        }
    }
    Ok(found)
}

#[cfg(not(target_os = "linux"))]
fn residence(_area: Range<usize>) -> Result<NodeResidence, String> {
    Err("this system does not tell".to_owned())
}

/// The NUMA node of each page, or an error number below zero.
#[cfg(target_os = "linux")]
fn page_nodes(pages: &[usize]) -> std::io::Result<Vec<i32>> {
    let mut status = vec![0i32; pages.len()];
    // SAFETY: without a list of nodes the call moves nothing: it reads the list of addresses, which may be any, and
    // writes one status for each, for which there is room.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0,
            pages.len(),
            pages.as_ptr(),
            std::ptr::null::<i32>(),
            status.as_mut_ptr(),
            0,
        )
    };
    match rc {
        0.. => Ok(status),
        _ => Err(std::io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Machine;
    use crate::plan::NodePlan;

    fn plan(numas: &[Option<usize>], cold: ColdPolicy, strict: bool) -> Plan {
        let team = |&numa: &Option<usize>| NodePlan {
            numa,
            cpus: vec![0],
        };
        let nodes = numas.iter().map(team).collect();
        Plan {
            cold,
            strict,
            gpus: Vec::new(),
            ..Plan::of_nodes(nodes, HugePages::Off)
        }
    }

    fn on(bytes: &[(usize, usize)]) -> NodeResidence {
        NodeResidence {
            numa_bytes: bytes.iter().copied().collect(),
            absent_bytes: 0,
        }
    }

    fn misplaced_on(plan: &Plan, found: &[NodeResidence]) -> Option<String> {
        misplaced(found, |node| plan.homes(node))
    }

    fn addresses(arena: &Arena) -> Range<usize> {
        let start = arena.as_slice().as_ptr().addr();
        start..start + arena.len()
    }

    const MB: usize = 1_000_000;

    #[test]
    fn each_nodes_memory_has_its_home() {
        let two = plan(&[Some(0), Some(1)], ColdPolicy::Shard, false);
        assert_eq!(
            misplaced_on(&two, &[on(&[(0, 5 * MB)]), on(&[(1, 5 * MB)])]),
            None
        );
        assert_eq!(misplaced_on(&two, &[on(&[]), on(&[])]), None);
        assert_eq!(
            misplaced_on(&two, &[on(&[(0, 4 * MB), (1, MB)]), on(&[(0, 5 * MB)])]).unwrap(),
            "1.0 MB of node 0's 5.0 MB lie on NUMA node 1 and not on 0; 5.0 MB of node 1's 5.0 MB lie on NUMA node 0 and not on 1"
        );
        let anywhere = plan(&[None], ColdPolicy::Shard, false);
        assert_eq!(misplaced_on(&anywhere, &[on(&[(0, MB), (7, MB)])]), None);
    }

    #[test]
    fn interleaved_memory_is_spread_evenly() {
        let plan = plan(&[Some(0), Some(2)], ColdPolicy::Interleave, false);
        assert_eq!(plan.homes(0), [0, 2]);
        assert_eq!(plan.homes(1), [0, 2]);
        let even = on(&[(0, 60 * MB), (2, 50 * MB)]);
        assert_eq!(misplaced_on(&plan, &[even.clone(), even.clone()]), None);
        assert_eq!(
            misplaced_on(&plan, &[even, on(&[(0, 100 * MB), (2, 10 * MB)])]).unwrap(),
            "only 10.0 MB of node 1's 110.0 MB, which are spread over NUMA nodes 0,2, lie on 2"
        );
        // a full node, whose pages went to the other
        let uneven = on(&[(0, 55_100_000), (2, 30_400_000)]);
        assert_eq!(
            misplaced_on(&plan, &[uneven]).unwrap(),
            "only 30.4 MB of node 0's 85.5 MB, which are spread over NUMA nodes 0,2, lie on 2"
        );
        assert_eq!(
            misplaced_on(&plan, &[on(&[(0, MB)]), on(&[(0, MB)])]),
            None,
            "a few pages"
        );
    }

    /// The kernel's own answer for memory of this process.
    #[cfg(target_os = "linux")]
    #[test]
    fn pages_are_found_where_the_kernel_has_them() {
        let machine = Machine::discover().unwrap();
        let numa = machine.nodes[0].os_index;
        let planned = plan(&[numa], ColdPolicy::Shard, true);
        let mut arena = planned.arena(0, 100 * PAGE_BYTES).unwrap();
        let absent = match residence(addresses(&arena)) {
            Ok(found) => found,
            Err(problem) => {
                eprintln!("skipped: the kernel does not tell ({problem})");
                return;
            }
        };
        assert_eq!(
            (absent.absent_bytes, absent.numa_bytes.len()),
            (100 * PAGE_BYTES, 0)
        );
        arena.as_mut_slice()[..60 * PAGE_BYTES].fill(1);
        let found = residence(addresses(&arena)).unwrap();
        let bytes: usize = found.numa_bytes.values().sum();
        assert_eq!(
            (bytes, found.absent_bytes),
            (60 * PAGE_BYTES, 40 * PAGE_BYTES)
        );
        let residence = planned.verify(&[arena.as_slice()]).unwrap();
        assert_eq!(residence.problem, None);
        let node = numa.map_or(0, |numa| numa);
        assert_eq!(
            residence.to_string(),
            format!("node 0: 0.2 MB on NUMA node {node}, 0.2 MB in no memory")
        );
    }

    /// A cache has its home where its team is, with interleaved weights too; pages that were never written have none.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_cache_is_on_its_teams_node() {
        let numa = Machine::discover().unwrap().nodes[0].os_index;
        let planned = plan(&[numa, Some(1000)], ColdPolicy::Interleave, true);
        let mut arena = planned.cache_arena(0, 10 * PAGE_BYTES).unwrap();
        if residence(addresses(&arena)).is_err() {
            eprintln!("skipped: the kernel does not tell");
            return;
        }
        let area = addresses(&arena);
        let found = planned.verify_caches(std::slice::from_ref(&area)).unwrap();
        assert_eq!(found.nodes.unwrap()[0].absent_bytes, 10 * PAGE_BYTES);
        arena.as_mut_slice()[..3 * PAGE_BYTES].fill(1);
        let found = planned.verify_caches(std::slice::from_ref(&area)).unwrap();
        assert_eq!(found.nodes.unwrap()[0].absent_bytes, 7 * PAGE_BYTES);
        // team 1's would have to be elsewhere
        let error = planned.verify_caches(&[0..0, area]).unwrap_err();
        assert!(error.to_string().contains("of node 1's"), "{error}");
    }

    /// Pages that were asked for and did not come: here as the arena is made with small ones.
    #[cfg(target_os = "linux")]
    #[test]
    fn required_huge_pages_have_to_be_there() {
        let mut arena = Arena::new(16 << 20, None, HugePages::Off).unwrap();
        arena.as_mut_slice().fill(1);
        let tried = plan(&[None], ColdPolicy::Shard, false);
        let areas = [arena.as_slice()];
        if tried.verify(&areas).unwrap().huge_pages.is_none() {
            eprintln!("skipped: this system does not tell");
            return;
        }
        let required = Plan {
            huge_pages: HugePages::Require,
            ..tried
        };
        let error = required.verify(&areas).unwrap_err();
        assert!(!error.is_environment(), "a file asks for what there is not");
        let text = error.to_string();
        assert!(
            text.starts_with(
                "huge_pages = \"require\", but only 0.0 of 16.8 MB (0 %) of the weights lie in some, and 90 % have to: "
            ),
            "{text}"
        );
    }

    /// A plan for a node that is not the one where the pages are.
    #[cfg(target_os = "linux")]
    #[test]
    fn memory_elsewhere_is_a_warning_or_an_error() {
        let numa = Machine::discover().unwrap().nodes[0].os_index.unwrap_or(0);
        let mut arena = Arena::new(10 * PAGE_BYTES, None, HugePages::Off).unwrap();
        arena.as_mut_slice().fill(1);
        if residence(addresses(&arena)).is_err() {
            eprintln!("skipped: the kernel does not tell");
            return;
        }
        let elsewhere = Some(numa + 1000);
        let areas = [arena.as_slice()];
        let found = plan(&[elsewhere], ColdPolicy::Shard, false)
            .verify(&areas)
            .unwrap();
        let problem = found.problem.unwrap();
        assert!(
            problem.starts_with("0.0 MB of node 0's 0.0 MB lie on NUMA node"),
            "{problem}"
        );
        let error = plan(&[elsewhere], ColdPolicy::Shard, true)
            .verify(&areas)
            .unwrap_err();
        assert!(error.is_environment());
        let text = error.to_string();
        assert!(
            text.starts_with("memory.strict = true, but 0.0 MB of node 0's"),
            "{text}"
        );
    }
}
