//! The nodes' neurons: as the solver would have them on what the rehearsal showed of the nodes, and as the loader has them.

use pi_topology::placement::{
    ColdShare, LayerLoad, LayerPlacement, LayerTime, MachineSpeed, NodeSpeed, solve,
};

use super::costs::Costs;
use super::loads::LayerBytes;
use super::memory::NodeMemory;
use super::{Mode, Planning};
use crate::error::RuntimeError;
use crate::machine_profile::MachineProfile;
use crate::model::Loader;
use crate::model::shares::{NodeShare, neurons_by_threads};

impl Planning<'_> {
    /// Each layer's neurons by node, as the solver would have them, and as the loader has them.
    pub(super) fn place(
        &self,
        mode: &Mode,
        layers: &[LayerBytes],
        costs: &Costs,
        memory: &[NodeMemory],
    ) -> Result<Placed, RuntimeError> {
        let loader = self.loader(mode, None)?;
        let ends = loader.neuron_groups().to_vec();
        let loads = self.loads(mode, layers);
        let shares = loader.shares();
        let loaded = ColdShares(shares.iter().map(|share| share.groups.clone()).collect());
        let machine = self.machine(&loads, costs, memory, &loader);
        let solved = solve(&loads, &machine, &ends)?;
        let current = loaded.placement();
        let lost_s: f64 = loads
            .iter()
            .zip(&solved)
            .map(|(load, best)| {
                let time = |placement| LayerTime::of(load, placement, &machine, &ends).neurons_s();
                time(&current) - time(best)
            })
            .sum();
        Ok(Placed {
            solved,
            loaded: loaded.0,
            neurons_by_threads: neurons_by_threads(&self.request.plan, &mode.sparsity),
            lost_ms: lost_s * 1e3,
        })
    }

    /// The nodes as they did the rehearsal.
    pub(super) fn machine(
        &self,
        loads: &[LayerLoad],
        costs: &Costs,
        memory: &[NodeMemory],
        loader: &Loader<'_>,
    ) -> MachineSpeed {
        let (scanned, active, n) = loads.iter().fold((0, 0, 0), |(s, a, n), load| {
            (s + load.scanned_bytes, a + load.active_bytes, n + 1)
        });
        let mean = |bytes: u64| bytes as f64 / f64::from(n.max(1));
        let shares = loader.shares();
        let nodes = shares.iter().zip(memory);
        let shown = |share: &NodeShare, (ns, n_active): (f64, f64)| {
            let scanned = (share.neurons.len() * costs.n_layer) as f64 * mean(scanned);
            let bytes = scanned + n_active * mean(active);
            (bytes > 0.0 && ns > 0.0).then(|| bytes / ns * 1e9)
        };
        let rates: Vec<Option<f64>> = (shares.iter().zip(&costs.nodes))
            .map(|(share, cost)| shown(share, *cost))
            .collect();
        let rates = with_unseen(&rates, self.request.profile.as_ref());
        let speed = nodes.zip(rates).map(|((share, memory), bytes_per_s)| {
            let others = memory.weights_bytes + memory.cache_bytes + memory.working_bytes;
            let own: u64 = loads
                .iter()
                .map(|load| share.neurons.len() as u64 * load.bundle_bytes)
                .sum();
            NodeSpeed {
                bytes_per_s,
                budget_bytes: memory
                    .budget_bytes
                    .map_or(u64::MAX, |budget| (budget + own).saturating_sub(others)),
                // all layers are in one arena, which is rounded up once: with the weights
                granule_bytes: 1,
            }
        });
        let hand_offs: f64 = costs.classes.iter().map(|(_, cost)| cost.hand_off_ns).sum();
        MachineSpeed {
            devices: vec![],
            nodes: speed.collect(),
            hand_off_s: hand_offs / costs.classes.len().max(1) as f64 / 1e9,
        }
    }
}

/// Bytes per second of all nodes. One without neurons has not shown what it can do in the rehearsal: it gets what its
/// team reads by the profile, less by as much as the others fell short of theirs; next to nothing without a profile.
fn with_unseen(rates: &[Option<f64>], profile: Option<&MachineProfile>) -> Vec<f64> {
    let reads = |team: usize| profile.and_then(|profile| profile.memory.team_bytes_per_s(team));
    let seen = rates.iter().enumerate();
    let seen = seen.filter_map(|(team, rate)| (*rate).zip(reads(team)));
    let (done, could) = seen.fold((0.0, 0.0), |(done, could), (rate, reads)| {
        (done + rate, could + reads)
    });
    let all = rates.iter().enumerate();
    all.map(|(team, rate)| match (*rate, reads(team)) {
        (Some(rate), _) => rate,
        (None, Some(reads)) if could > 0.0 => reads * done / could,
        (None, _) => 1.0,
    })
    .collect()
}

/// A node's groups, the same in every layer.
struct ColdShares(Vec<std::ops::Range<usize>>);

impl ColdShares {
    fn placement(&self) -> LayerPlacement {
        LayerPlacement {
            hot_ids: vec![],
            cold: self.0.iter().cloned().map(ColdShare::Groups).collect(),
        }
    }
}

/// Where neurons go.
pub(crate) struct Placed {
    /// Layer by layer, as the solver would have them.
    pub solved: Vec<LayerPlacement>,
    /// Groups of each node, as the loader has them: in the plan's proportion.
    pub loaded: Vec<std::ops::Range<usize>>,
    /// Whether these go by threads, whatever the rest.
    pub neurons_by_threads: bool,
    /// What the loader's division costs more, ms a token.
    pub lost_ms: f64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine_profile::tests::profile;

    #[test]
    fn a_node_without_neurons_is_as_fast_as_its_team_reads() {
        let mut measured = profile(2e10);
        measured.memory.teams.push(measured.memory.teams[0].clone());
        measured.memory.teams[1].by_threads[1].bytes_per_s = 1e10;
        // node 0 used half of what it reads
        let rates = with_unseen(&[Some(1e10), None], Some(&measured));
        assert_eq!(rates, [1e10, 5e9]);
        assert_eq!(with_unseen(&[Some(1e10), None], None), [1e10, 1.0]);
        assert_eq!(
            with_unseen(&[Some(3.0), Some(4.0)], Some(&measured)),
            [3.0, 4.0]
        );
        assert_eq!(with_unseen(&[None], Some(&measured)), [1.0]);
    }
}
