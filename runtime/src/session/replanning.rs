//! Whether and how often neurons change places between GPU and host.

use std::sync::Arc;

use pi_actors::gpu::weights::GpuWeights;
use pi_actors::replan::Replan;
use pi_topology::{ArenaWriter, Plan};

use super::opening::ModelOptions;
use crate::error::RuntimeError;
use crate::model::Sparsity;
use crate::model::moves::NeuronMoves;
use crate::model::sparsity::{DownPlan, SparsityPlan};

/// Tokens after which each of the plan's GPUs is re-planned; 0: never.
///
/// # Errors
/// It was asked for on the command line, and this model never can be.
pub(super) fn intervals(
    options: &ModelOptions,
    plan: &Plan,
    sparsity: &SparsityPlan,
) -> Result<Vec<usize>, RuntimeError> {
    let gpus = plan.gpus.iter();
    let every: Vec<usize> = gpus
        .map(|gpu| options.replan.unwrap_or(gpu.replan))
        .collect();
    let is_asked = options.replan.is_some_and(|every| every > 0);
    if every.is_empty() && is_asked {
        tracing::warn!("no GPU is used: nothing is re-planned");
    }
    if every.iter().all(|every| *every == 0) {
        return Ok(every);
    }
    let Some((problem, cure)) = obstacle(sparsity) else {
        return Ok(every);
    };
    if is_asked {
        return Err(RuntimeError::Replan { problem, cure });
    }
    tracing::warn!("nothing is re-planned: {problem}; {cure}");
    Ok(vec![0; every.len()])
}

/// Why no neuron of such a model changes places, and what to do about it.
fn obstacle(sparsity: &SparsityPlan) -> Option<(&'static str, &'static str)> {
    if !matches!(sparsity.mode, Sparsity::Exact | Sparsity::Predicted) {
        let problem = "neurons change places where closed gates are skipped";
        let cure = "take --sparsity exact or predicted (ReLU models), or leave --replan out";
        return Some((problem, cure));
    }
    let is_by_neuron = |down: &DownPlan| matches!(down, DownPlan::NeuronRows(_));
    if !sparsity.down.iter().any(is_by_neuron) {
        let problem = "the file has its down projections by output, and not by neuron";
        return Some((problem, "write one that has with `pi-runtime pack`"));
    }
    None
}

/// Lets `gpus` be re-planned after as many tokens as `every` says; logs once where that changes nothing.
pub(super) fn set(
    gpus: &mut [GpuWeights],
    every: &[usize],
    moves: NeuronMoves,
    host: Option<Vec<ArenaWriter>>,
) {
    if every.iter().all(|every| *every == 0) {
        return;
    }
    let n_layer: usize = gpus.iter().map(|gpu| gpu.layers.len()).sum();
    let n_movable = moves.n_movable();
    let Some(host) = host.filter(|_| n_movable > 0) else {
        tracing::warn!(
            "nothing is re-planned: no layer has neurons both on the GPU and on the host"
        );
        return;
    };
    tracing::info!(
        layers = n_movable,
        of = n_layer,
        "neurons may change places"
    );
    let source = Arc::new(moves);
    for (gpu, every) in gpus.iter_mut().zip(every) {
        gpu.replan = (*every > 0).then(|| Replan {
            every: *every,
            source: source.clone(),
            host: host.clone(),
        });
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use pi_kernels::QuantType;
    use pi_topology::{GpuConfig, HugePages, NodePlan};

    use super::*;

    fn plan(every: &[usize]) -> Plan {
        let node = NodePlan {
            numa: None,
            cpus: vec![0],
        };
        let gpu = |&replan: &usize| GpuConfig {
            replan,
            ..GpuConfig::default()
        };
        Plan {
            gpus: every.iter().map(gpu).collect(),
            ..Plan::of_nodes(vec![node], HugePages::Off)
        }
    }

    fn sparsity(mode: Sparsity, down: &[DownPlan]) -> SparsityPlan {
        SparsityPlan {
            mode,
            down: down.to_vec(),
            thresholds: None,
            hint: None,
            predicts: mode == Sparsity::Predicted,
        }
    }

    const ROWS: DownPlan = DownPlan::NeuronRows(QuantType::Q4_0);
    const PLAIN: DownPlan = DownPlan::Transposed {
        from: QuantType::F16,
        to: QuantType::F16,
    };

    #[test]
    fn the_flag_is_for_all_gpus_and_a_key_for_one() {
        let model = sparsity(Sparsity::Exact, &[PLAIN, ROWS]);
        let get = |flag, keys: &[usize]| {
            let options = ModelOptions {
                replan: flag,
                ..ModelOptions::new(PathBuf::new())
            };
            intervals(&options, &plan(keys), &model).unwrap()
        };
        assert_eq!(get(None, &[0, 64]), [0, 64]);
        assert_eq!(get(Some(8), &[0, 64]), [8, 8]);
        assert_eq!(get(Some(0), &[3, 64]), [0, 0], "the flag wins");
        assert_eq!(get(Some(8), &[]), [0usize; 0], "the host computes");
    }

    #[test]
    fn what_can_never_move_is_an_error_where_it_was_asked_for() {
        let asked = ModelOptions {
            replan: Some(64),
            ..ModelOptions::new(PathBuf::new())
        };
        let by_key = ModelOptions::new(PathBuf::new());
        for (model, words) in [
            (
                sparsity(Sparsity::Off, &[ROWS]),
                "--sparsity exact or predicted",
            ),
            (
                sparsity(Sparsity::Exact, &[PLAIN, PLAIN]),
                "pi-runtime pack",
            ),
        ] {
            let error = intervals(&asked, &plan(&[0]), &model).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            let text = error.to_string();
            assert!(
                text.starts_with("--replan: ") && text.contains(words),
                "{text}"
            );
            assert_eq!(intervals(&by_key, &plan(&[64]), &model).unwrap(), [0]);
        }
    }
}
