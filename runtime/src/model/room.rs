//! Shares that fit into the memory of their NUMA nodes.

use pi_kernels::attention::KvType;
use pi_kernels::ffn_sparse::FFN_GROUPS;
use pi_topology::{ColdPolicy, NodeBalance, NodeRooms, Plan, TopologyError};

use super::error::ModelError;
use super::load::Loader;
use super::shares::{Division, cold_groups};
use super::sparsity::SparsityPlan;
use super::{Hyperparameters, ModelTensors};
use crate::gguf::GgufFile;

/// What each node is to hold, bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldBytes {
    /// Its weights.
    pub weights: Vec<u64>,
    /// Keys and values of a full context.
    pub cache: Vec<u64>,
}

impl HeldBytes {
    /// Refuses what does not fit into the NUMA nodes of `plan`.
    ///
    /// # Errors
    /// [`TopologyError::NodeFull`].
    pub fn check(&self, plan: &Plan, rooms: &NodeRooms) -> Result<(), TopologyError> {
        rooms.check(plan, &self.weights, &self.cache)
    }
}

impl Loader<'_> {
    /// What each node is to hold, with a cache of `kv_type`.
    pub fn held_bytes(&self, kv_type: KvType) -> HeldBytes {
        let weights = self.node_bytes().into_iter();
        HeldBytes {
            weights: weights.map(|bytes| bytes as u64).collect(),
            cache: self.cache_bytes(kv_type),
        }
    }
}

/// The loader that `loader_of` makes of the division that `plan` asks for; where that gives a NUMA node more than its
/// memory takes, of one that gives some of its neurons to others (see [`fitting`]).
///
/// # Errors
/// Those of `loader_of`.
pub fn fitting_loader<'a, E>(
    plan: &Plan,
    sparsity: &SparsityPlan,
    rooms: &NodeRooms,
    kv_type: KvType,
    loader_of: impl Fn(&Division) -> Result<Loader<'a>, E>,
) -> Result<Loader<'a>, E> {
    let asked = Division::new(plan, sparsity);
    if sparsity.has_plain_down() {
        // its bits depend on who has which neurons, and no free memory may change them
        return loader_of(&asked);
    }
    let division = fitting(asked, plan, rooms, |division| {
        Ok(loader_of(division)?.held_bytes(kv_type))
    })?;
    loader_of(&division)
}

/// What each node of `plan` is to hold of a model without predictors and GPUs, with a cache of f16 for `n_ctx` tokens; and the
/// NUMA node that it does not fit into, with what would do.
///
/// # Errors
/// As [`Loader::new`].
pub fn held_in(
    plan: &Plan,
    rooms: &NodeRooms,
    file: &GgufFile,
    hyper: &Hyperparameters,
    tensors: &ModelTensors,
    sparsity: &SparsityPlan,
    n_ctx: usize,
) -> Result<(HeldBytes, Option<String>), ModelError> {
    let loader_of = |division: &Division| {
        Loader::predicted(file, hyper, tensors, sparsity, None, division, None, n_ctx)
    };
    let held = fitting_loader(plan, sparsity, rooms, KvType::F16, loader_of)?;
    let held = held.held_bytes(KvType::F16);
    let too_much = held.check(plan, rooms).err();
    Ok((held, too_much.map(|error| error.to_string())))
}

/// `division`, with whole groups of neurons moved from nodes whose memory they do not fit into to those with most room
/// left; as far as that goes. Only with `shard`: the other policies say themselves who has what.
///
/// `held_by` says what each node would have to hold.
///
/// # Errors
/// Those of `held_by`.
pub fn fitting<E>(
    mut division: Division,
    plan: &Plan,
    rooms: &NodeRooms,
    held_by: impl Fn(&Division) -> Result<HeldBytes, E>,
) -> Result<Division, E> {
    if division.cold != ColdPolicy::Shard {
        return Ok(division);
    }
    let balance = |division: &Division| {
        let held = held_by(division)?;
        Ok(rooms.balance(plan, &held.weights, &held.cache))
    };
    let before = group_counts(&division);
    let mut nodes = balance(&division)?;
    while let Some((from, tos)) = next_move(&division, &nodes) {
        let mut moved = None;
        for to in tos {
            let other = with_moved_group(&division, from, to);
            let found = balance(&other)?;
            if !found[to].is_over() {
                moved = Some((other, found));
                break;
            }
        }
        match moved {
            Some((other, found)) => (division, nodes) = (other, found),
            None => break,
        }
    }
    let after = group_counts(&division);
    if before != after {
        tracing::warn!(
            "the NUMA nodes' memory does not take the groups of neurons as planned, {before:?} of each layer: the nodes have \
             {after:?}"
        );
    }
    Ok(division)
}

/// Groups of neurons of each node, where none are a GPU's.
fn group_counts(division: &Division) -> Vec<usize> {
    let nodes = 0..division.neuron_parts.len();
    nodes
        .map(|node| cold_groups(division, 0, node).len())
        .collect()
}

/// The node that has to give a group away, and those that may take it, the one with most room first; none where no node
/// is too full, or it has nothing to give.
fn next_move(division: &Division, nodes: &[NodeBalance]) -> Option<(usize, Vec<usize>)> {
    let counts = group_counts(division);
    let over = (0..nodes.len()).filter(|&node| nodes[node].is_over() && counts[node] > 0);
    let from = over.max_by_key(|&node| nodes[node].needed_bytes - nodes[node].free_bytes)?;
    let mut tos: Vec<usize> = (0..nodes.len())
        .filter(|&node| !nodes[node].is_over())
        .collect();
    tos.sort_by_key(|&node| std::cmp::Reverse(nodes[node].left_bytes()));
    Some((from, tos))
}

fn with_moved_group(division: &Division, from: usize, to: usize) -> Division {
    let mut counts = group_counts(division);
    debug_assert_eq!(counts.iter().sum::<usize>(), FFN_GROUPS);
    counts[from] -= 1;
    counts[to] += 1;
    Division {
        neuron_parts: counts,
        ..division.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use pi_topology::{HugePages, NodePlan};

    use super::*;

    /// Teams on these NUMA nodes.
    fn plan(numas: &[usize], cold: ColdPolicy) -> Plan {
        let nodes = numas.iter().enumerate();
        let nodes = nodes.map(|(cpu, &numa)| NodePlan {
            numa: Some(numa),
            cpus: vec![cpu],
        });
        Plan {
            cold,
            ..Plan::of_nodes(nodes.collect(), HugePages::Off)
        }
    }

    /// Groups of each team, where a group takes 10 bytes, and all else of a team 5 and its cache 1.
    fn groups(plan: &Plan, free_bytes: &[u64]) -> Vec<usize> {
        let rooms = NodeRooms::new(free_bytes.iter().copied().enumerate());
        let asked = Division {
            cold: plan.cold,
            ..Division::by_threads(&plan.team_sizes())
        };
        let held_by = |division: &Division| {
            let counts = group_counts(division).into_iter();
            Ok::<_, Infallible>(HeldBytes {
                weights: counts.map(|count| 10 * count as u64 + 5).collect(),
                cache: vec![1; division.parts.len()],
            })
        };
        let Ok(division) = fitting(asked, plan, &rooms, held_by);
        assert_eq!(division.parts, plan.team_sizes(), "heads and rows stay");
        group_counts(&division)
    }

    #[test]
    fn a_small_node_has_as_many_groups_as_its_memory_takes() {
        let two = plan(&[0, 1], ColdPolicy::Shard);
        assert_eq!(groups(&two, &[1000, 1000]), [8, 8]);
        assert_eq!(groups(&two, &[1000, 86]), [8, 8]);
        assert_eq!(groups(&two, &[1000, 85]), [9, 7]);
        assert_eq!(groups(&two, &[1000, 36]), [13, 3]);
        assert_eq!(groups(&two, &[6, 1000]), [0, 16]);
        // all else does not fit either: as near as can be, to be refused
        assert_eq!(groups(&two, &[1000, 5]), [16, 0]);
        // no room anywhere
        assert_eq!(groups(&two, &[86, 80]), [8, 8]);
        // nothing is known
        assert_eq!(groups(&two, &[]), [8, 8]);
    }

    #[test]
    fn what_one_gives_away_goes_where_most_is_left() {
        let four = plan(&[0, 1, 2, 3], ColdPolicy::Shard);
        assert_eq!(groups(&four, &[46, 26, 66, 1000]), [4, 2, 4, 6]);
        assert_eq!(groups(&four, &[46, 26, 66, 50]), [4, 2, 6, 4]);
        // teams that share a NUMA node share its memory
        let shared = plan(&[0, 0, 1], ColdPolicy::Shard);
        let counts = groups(&shared, &[72, 1000]);
        assert_eq!(counts[0] + counts[1], 6, "{counts:?}");
    }

    #[test]
    fn other_policies_say_themselves_who_has_what() {
        for cold in [
            ColdPolicy::Replicate,
            ColdPolicy::Interleave,
            ColdPolicy::Single(1),
        ] {
            let plan = plan(&[0, 1], cold);
            let roomy = groups(&plan, &[1000, 1000]);
            assert_eq!(groups(&plan, &[1000, 10]), roomy, "{cold}");
        }
    }
}
