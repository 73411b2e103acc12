//! What the nodes' shares of a model are in proportion to.

use std::fmt;

use serde::Serialize;

use crate::config::ColdPolicy;
use crate::measure::MemorySpeeds;
use crate::plan::Plan;

/// What the nodes' shares of a model are in proportion to. The results do not depend on it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[serde(tag = "by", content = "mb_per_s", rename_all = "lowercase")]
pub enum Proportion {
    /// Threads of each node.
    #[default]
    Threads,
    /// What each node's threads read of its own memory, as measured, 10⁶ bytes per second; 0 for a node without threads.
    Bandwidth(Vec<usize>),
}

impl Proportion {
    /// What was measured of nodes with so many threads each; threads where it was not measured of all of them.
    fn of(threads: &[usize], speeds: &MemorySpeeds) -> Self {
        let megabytes = |(team, &n_threads): (usize, &usize)| match n_threads {
            0 => Some(0),
            _ => speeds
                .threads_bytes_per_s(team, n_threads)
                .map(|bytes_per_s| ((bytes_per_s / 1e6) as usize).max(1)),
        };
        let measured: Option<Vec<usize>> = threads.iter().enumerate().map(megabytes).collect();
        measured.map_or(Self::Threads, Self::Bandwidth)
    }
}

impl fmt::Display for Proportion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Bandwidth(megabytes) = self else {
            return f.write_str("threads");
        };
        let gb_per_s = megabytes
            .iter()
            .map(|&mb| format!("{:.1}", mb as f64 / 1e3));
        let gb_per_s: Vec<String> = gb_per_s.collect();
        write!(f, "measured bandwidth, {} GB/s", gb_per_s.join(" + "))
    }
}

impl Plan {
    /// The same with shares by what was measured with these threads. Where pages go round the NUMA nodes no node's own
    /// memory counts, and shares stay by threads.
    pub fn by_bandwidth(self, speeds: &MemorySpeeds) -> Self {
        let proportion = match self.cold {
            ColdPolicy::Interleave => Proportion::Threads,
            ColdPolicy::Shard | ColdPolicy::Replicate | ColdPolicy::Single(_) => {
                Proportion::of(&self.team_sizes(), speeds)
            }
        };
        Self { proportion, ..self }
    }

    /// Numbers to which the nodes' shares are in proportion.
    pub fn parts(&self) -> Vec<usize> {
        match &self.proportion {
            Proportion::Threads => self.team_sizes(),
            Proportion::Bandwidth(megabytes) => megabytes.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::HugePages;
    use crate::measure::{TeamSpeeds, ThreadsSpeed};
    use crate::plan::NodePlan;

    /// Teams that read so many GB/s, by threads.
    fn speeds(teams: &[&[(usize, f64)]]) -> MemorySpeeds {
        let team = |speeds: &&[(usize, f64)]| TeamSpeeds {
            numa: Some(0),
            by_threads: (speeds.iter())
                .map(|&(n_threads, gb_per_s)| ThreadsSpeed {
                    n_threads,
                    bytes_per_s: gb_per_s * 1e9,
                })
                .collect(),
            by_row_bytes: vec![],
        };
        MemorySpeeds {
            teams: teams.iter().map(team).collect(),
            across: vec![],
            together_bytes_per_s: 1.0,
        }
    }

    fn plan(threads: &[usize], cold: ColdPolicy) -> Plan {
        let node = |&n_threads: &usize| NodePlan {
            numa: Some(0),
            cpus: (0..n_threads).collect(),
        };
        Plan {
            cold,
            ..Plan::of_nodes(threads.iter().map(node).collect(), HugePages::Off)
        }
    }

    #[test]
    fn without_a_profile_threads_count() {
        let plan = plan(&[3, 1], ColdPolicy::Shard);
        assert_eq!(plan.parts(), [3, 1]);
        assert_eq!(plan.proportion.to_string(), "threads");
    }

    #[test]
    fn unequal_nodes_get_what_their_threads_read() {
        let measured = speeds(&[&[(1, 8.0), (4, 30.0)], &[(1, 8.0), (4, 10.0)]]);
        for cold in [
            ColdPolicy::Shard,
            ColdPolicy::Replicate,
            ColdPolicy::Single(1),
        ] {
            let plan = plan(&[4, 4], cold).by_bandwidth(&measured);
            assert_eq!(plan.parts(), [30_000, 10_000], "{cold}");
            assert_eq!(
                plan.proportion.to_string(),
                "measured bandwidth, 30.0 + 10.0 GB/s"
            );
        }
        // at the node's number of threads, and be it next to nothing
        let plan = plan(&[1, 4], ColdPolicy::Shard).by_bandwidth(&measured);
        assert_eq!(plan.parts(), [8000, 10_000]);
        let slow = speeds(&[&[(1, 1e-9)], &[(4, 10.0)]]);
        assert_eq!(plan.by_bandwidth(&slow).parts(), [1, 10_000]);
    }

    #[test]
    fn a_node_without_threads_gets_nothing() {
        let measured = speeds(&[&[(2, 20.0)], &[(0, 5.0)]]);
        let plan = plan(&[2, 0], ColdPolicy::Shard).by_bandwidth(&measured);
        assert_eq!(plan.parts(), [20_000, 0]);
    }

    #[test]
    fn what_was_not_measured_of_all_is_not_used() {
        for measured in [
            speeds(&[]),
            speeds(&[&[(2, 20.0)]]),
            speeds(&[&[(2, 20.0)], &[(1, 9.0)]]),
        ] {
            let plan = plan(&[2, 2], ColdPolicy::Shard).by_bandwidth(&measured);
            assert_eq!(plan.proportion, Proportion::Threads);
        }
        let measured = speeds(&[&[(2, 20.0)], &[(2, 9.0)]]);
        let plan = plan(&[2, 2], ColdPolicy::Interleave).by_bandwidth(&measured);
        assert_eq!(plan.parts(), [2, 2]);
    }
}
