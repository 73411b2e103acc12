//! Which neurons a loader puts on a GPU: those that the placement's solver has there, to the byte. Needs no GPU.

mod common;

use common::running::Folder;
use common::tiny_model::TinyModel;
use pi_actors::weights::ModelShape;
use pi_kernels::attention::KvType;
use pi_kernels::ffn_sparse::FFN_GROUPS;
use pi_kernels::{ActivationMode, QuantType};
use pi_runtime::gguf::GgufFile;
use pi_runtime::model::gpu::{GpuModelError, GpuPart, GpuRequest, GpuRoom, HOT_SAVES, choose_on};
use pi_runtime::model::load::model_shape;
use pi_runtime::model::shares::neuron_groups;
use pi_runtime::model::sparsity::SparsityPlan;
use pi_runtime::model::{Hyperparameters, ModelTensors, Sparsity};
use pi_runtime::sidecar::profile::LayerProfile;
use pi_runtime::sidecar::{LayerPredictors, Profile, Sketch, SketchKind};
use pi_topology::placement::{HotRule, LayerLoad, hot_prefixes};

const N_CTX: usize = 64;

/// A model, and what is known of it.
struct Case {
    hyper: Hyperparameters,
    tensors: ModelTensors,
    sparsity: SparsityPlan,
    profile: Option<Profile>,
    predictors: Option<Vec<LayerPredictors>>,
    groups_max: usize,
    /// Tokens of a prompt at a time; one: nothing is streamed, and what that takes is out of the way.
    n_ubatch: usize,
}

impl Case {
    fn new(model: TinyModel, mode: Sparsity) -> Self {
        let folder = Folder::with(&model);
        let file = GgufFile::open(folder.path("m.gguf")).unwrap();
        let hyper = Hyperparameters::read(&file).unwrap();
        let tensors = ModelTensors::find(&file, &hyper).unwrap();
        let stored = tensors.stored_downs();
        Self {
            sparsity: SparsityPlan::resolve(Some(mode), hyper.gate, &stored).unwrap(),
            profile: Some(profile(&hyper)),
            hyper,
            tensors,
            predictors: None,
            groups_max: FFN_GROUPS,
            n_ubatch: 1,
        }
    }

    fn shape(&self) -> ModelShape {
        model_shape(&self.hyper, &self.tensors, N_CTX).unwrap()
    }

    fn chosen(&self, budget: usize) -> Option<GpuPart> {
        self.chosen_with(&self.shape(), budget).ok()
    }

    fn chosen_with(&self, shape: &ModelShape, budget: usize) -> Result<GpuPart, GpuModelError> {
        let request = GpuRequest {
            shape,
            tensors: &self.tensors,
            sparsity: &self.sparsity,
            predictors: self.predictors.as_deref(),
            profile: self.profile.as_ref(),
            kv_type: KvType::F16,
            n_ubatch: self.n_ubatch,
            mode: ActivationMode::Q8,
            groups_max: FFN_GROUPS,
            layers: 0..self.hyper.n_layer,
            replans: false,
        };
        let room = GpuRoom {
            budget,
            overhead: 1000,
            groups_max: self.groups_max,
        };
        let mut parts = choose_on(&[room], &request)?;
        assert_eq!(parts.len(), 1);
        Ok(parts.remove(0))
    }

    /// Neurons that the solver would have hot, of a room for `bytes` of neurons that take `bundle_bytes`.
    fn solved(&self, bytes: usize, bundle_bytes: usize) -> Vec<usize> {
        let n_ff = self.hyper.n_ff;
        let ends = self.ends();
        let whole = self.sparsity.has_plain_down();
        let ends = match whole {
            true => &ends[FFN_GROUPS..],
            false => &ends[1..=self.groups_max],
        };
        let layers = 0..self.hyper.n_layer;
        let loads = layers.clone().map(|layer| {
            let gate = self.tensors.layers[layer].gate.row_bytes() as u64;
            let bundle_bytes = bundle_bytes as u64;
            let scanned_bytes = match self.sparsity.mode {
                Sparsity::Off => bundle_bytes,
                Sparsity::Predicted if self.is_sketched(layer) => 0,
                _ => gate,
            };
            let frequency = |count: &u32| *count as f32 / 100.0;
            LayerLoad {
                fixed_bytes: 0,
                scanned_bytes,
                active_bytes: bundle_bytes - scanned_bytes,
                bundle_bytes,
                frequencies: match &self.profile {
                    Some(profile) => profile.layers[layer].counts.iter().map(frequency).collect(),
                    None => vec![1.0; n_ff],
                },
            }
        });
        let orders: Vec<Option<Vec<u32>>> = layers.map(|layer| self.order(layer)).collect();
        let rules = orders.iter().map(|order| HotRule {
            order: order.as_deref(),
            ends,
            first: self.predictors.is_some(),
        });
        let (loads, rules): (Vec<_>, Vec<_>) = (loads.collect(), rules.collect());
        hot_prefixes(&loads, &rules, bytes as u64, HOT_SAVES)
    }

    fn is_sketched(&self, layer: usize) -> bool {
        let predictors = self.predictors.as_ref();
        predictors.is_some_and(|all| all[layer].sketch.is_some())
    }

    fn ends(&self) -> [usize; FFN_GROUPS + 1] {
        let multiple = if self.sparsity.has_plain_down() {
            32
        } else {
            16
        };
        neuron_groups(self.hyper.n_ff, multiple)
    }

    /// The most frequent neurons first, where single ones can be moved.
    fn order(&self, layer: usize) -> Option<Vec<u32>> {
        let counts = &self.profile.as_ref()?.layers[layer].counts;
        let moved = !self.sparsity.has_plain_down() && self.sparsity.transposed_bytes(64, 16) == 0;
        moved.then(|| {
            let mut order: Vec<u32> = (0..counts.len() as u32).collect();
            order.sort_by_key(|&id| (std::cmp::Reverse(counts[id as usize]), id));
            order
        })
    }
}

/// Of 100 tokens; later layers fire more, and some neurons never.
fn profile(hyper: &Hyperparameters) -> Profile {
    let layer = |layer: usize| LayerProfile {
        counts: (0..hyper.n_ff)
            .map(|n| ((n * 37 + layer * 11) % 97 * (layer + 1) / 4).saturating_sub(8) as u32)
            .collect(),
        down_norms: vec![1.0; hyper.n_ff],
    };
    Profile {
        n_tokens: 100,
        layers: (0..hyper.n_layer).map(layer).collect(),
    }
}

/// Layers 0 and 2 have a sketch, the others nothing.
fn sketches(n_layer: usize, n_ff: usize) -> Vec<LayerPredictors> {
    let sketch = || Sketch {
        kind: SketchKind::Bits { two_bit_bias: None },
        bias: vec![0.0; n_ff],
        floor: None,
    };
    let layer = |layer: usize| LayerPredictors {
        sketch: layer.is_multiple_of(2).then(sketch),
        ahead: None,
    };
    (0..n_layer).map(layer).collect()
}

fn cases() -> Vec<(&'static str, Case)> {
    let of = |n_layer, n_ff, quant| TinyModel {
        n_layer,
        n_ff,
        quant,
        ..TinyModel::default()
    };
    let float = of(2, 512, QuantType::F32);
    let blocks = of(3, 768, QuantType::Q4_0);
    let plain = |model: &TinyModel| TinyModel {
        neuron_major: false,
        ..model.clone()
    };
    let mut predicted = Case::new(blocks.clone(), Sparsity::Predicted);
    predicted.predictors = Some(sketches(3, 768));
    let mut limited = Case::new(blocks.clone(), Sparsity::Exact);
    limited.groups_max = 5;
    let mut unknown = Case::new(float.clone(), Sparsity::Exact);
    unknown.profile = None;
    vec![
        ("off", Case::new(float.clone(), Sparsity::Off)),
        ("exact, floats", Case::new(float.clone(), Sparsity::Exact)),
        ("exact", Case::new(blocks.clone(), Sparsity::Exact)),
        ("exact, not all of a layer", limited),
        ("exact, without a profile", unknown),
        (
            "exact, transposed",
            Case::new(plain(&float), Sparsity::Exact),
        ),
        (
            "off, layers whole",
            Case::new(plain(&blocks), Sparsity::Off),
        ),
        ("predicted", predicted),
    ]
}

/// Memory to stream the host's neurons through is taken where there are some: a model that just fits without it is hot as a whole.
#[test]
fn what_prompts_stream_through_takes_nothing_where_all_is_hot() {
    for (name, mut case) in cases() {
        case.n_ubatch = 16;
        case.groups_max = FFN_GROUPS;
        let all = case.chosen(1 << 40).unwrap();
        let is_hot = |part: &GpuPart| part.hot.iter().all(|layer| layer.groups == FFN_GROUPS);
        assert!(is_hot(&all), "{name}");
        let just = case.chosen(all.memory.total()).unwrap();
        assert_eq!(
            just,
            GpuPart {
                memory: just.memory,
                ..all.clone()
            },
            "{name}"
        );
        assert_eq!(just.memory.working, all.memory.working, "{name}");
        case.groups_max = 5;
        let some = case.chosen(1 << 40).unwrap();
        assert!(!is_hot(&some), "{name}");
        // at least four parts and what they become
        let more = some.memory.working - all.memory.working;
        let bundle_bytes = all.memory.neurons / (case.hyper.n_layer * case.hyper.n_ff);
        assert_eq!(more, 5 * case.hyper.n_ff * bundle_bytes, "{name}");
    }
}

/// A refusal's table ends with the least budget that does: what streaming takes is in it, unless all neurons take less.
#[test]
fn the_budget_that_a_refusal_names_is_enough() {
    for (name, mut case) in cases() {
        let shape = case.shape();
        for (n_ubatch, groups_max) in [(1, 16), (16, 16), (16, 5)] {
            case.n_ubatch = n_ubatch;
            case.groups_max = groups_max;
            let named = match case.chosen_with(&shape, 2000) {
                Err(GpuModelError::OverBudget { memory }) => memory.total(),
                other => panic!("{name}: {other:?}"),
            };
            assert!(case.chosen(named).is_some(), "{name}, {groups_max} groups");
            assert!(
                case.chosen(named - 1).is_none(),
                "{name}, {groups_max} groups"
            );
        }
    }
}

#[test]
fn the_loader_has_the_solver_s_hot_sets_for_every_budget() {
    for (name, case) in cases() {
        let all = case.chosen(1 << 40).unwrap();
        let n_neurons = case.hyper.n_layer * case.hyper.n_ff;
        let bundle_bytes = all.memory.neurons / n_neurons;
        assert_eq!(all.memory.neurons, bundle_bytes * n_neurons, "{name}");
        let fixed = all.memory.total() - all.memory.hot;
        let ends = case.ends();
        let mut seen = std::collections::BTreeSet::new();
        for share in 0..=40 {
            // also bytes that are no whole neurons
            let room = all.memory.neurons * share / 40 + share % 3 * 17;
            let part = case.chosen(fixed + room).unwrap();
            let hot: Vec<usize> = part.hot.iter().map(|layer| ends[layer.groups]).collect();
            assert_eq!(hot, case.solved(room, bundle_bytes), "{name}, {room}");
            let hot_bytes = hot.iter().sum::<usize>() * bundle_bytes;
            assert_eq!(part.memory.hot, hot_bytes, "{name}");
            assert!(part.memory.total() <= fixed + room, "{name}, {room}");
            for (layer, hot) in part.hot.iter().enumerate() {
                assert_eq!(hot.order, case.order(layer), "{name}");
            }
            // what fits exactly is there, and with a byte less it is not
            let exactly = case.chosen(part.memory.total()).unwrap();
            assert_eq!(exactly.hot, part.hot, "{name}, {room}");
            if hot_bytes > 0 {
                let less = case.chosen(part.memory.total() - 1).unwrap();
                assert!(less.memory.hot < hot_bytes, "{name}, {room}");
            }
            seen.insert(hot_bytes);
        }
        let n_sizes = if case.sparsity.has_plain_down() {
            4
        } else {
            10
        };
        assert!(seen.len() >= n_sizes, "{name}: {seen:?}");
        assert_eq!(case.chosen(fixed - 1), None, "{name}");
    }
}

/// A layer whose neurons nothing names ahead has all its gates computed wherever they are.
#[test]
fn layers_that_nothing_predicts_ahead_are_hot_first() {
    use pi_runtime::model::gpu::HotLayer;
    use pi_runtime::sidecar::Ahead;
    let mut case = Case::new(
        TinyModel {
            n_layer: 3,
            ..TinyModel::default()
        },
        Sparsity::Predicted,
    );
    // any matrices do: nothing is computed
    let layer = &case.tensors.layers[0];
    let ahead = |is_there: bool| {
        is_there.then(|| Ahead {
            a: layer.wk.clone(),
            a_bias: None,
            b: layer.gate.clone(),
            b_bias: vec![0.0; 512],
            alone: true,
            prefetch: false,
        })
    };
    let predictors = [false, true, false].map(|is_there| LayerPredictors {
        sketch: None,
        ahead: ahead(is_there),
    });
    case.predictors = Some(predictors.to_vec());
    let all = case.chosen(1 << 40).unwrap();
    let groups = |room: usize| -> Vec<usize> {
        let fixed = all.memory.total() - all.memory.hot;
        let part = case.chosen(fixed + room).unwrap();
        part.hot
            .iter()
            .map(|HotLayer { groups, .. }| *groups)
            .collect()
    };
    let layer_bytes = all.memory.neurons / 3;
    for share in 1..=32 {
        let groups = groups(layer_bytes * share / 16);
        assert_eq!(groups[1], 0, "{groups:?}");
        assert_eq!(groups[0] + groups[2], share, "{groups:?}");
    }
    assert_eq!(groups(layer_bytes * 5 / 2), [16, 8, 16]);
}

/// The GPU takes over what the host sums in pairs of values.
#[test]
fn a_hidden_state_of_odd_width_is_refused() {
    let case = Case::new(TinyModel::default(), Sparsity::Exact);
    let mut shape = case.shape();
    case.chosen_with(&shape, 1 << 40).unwrap();
    shape.n_embd += 1;
    let error = case.chosen_with(&shape, 1 << 40).unwrap_err();
    assert_eq!(
        error.to_string(),
        "a hidden state of odd width does not run on a GPU: set required = false for its [[gpu]], or leave [[gpu]] out"
    );
}
