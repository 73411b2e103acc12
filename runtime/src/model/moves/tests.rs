//! What is packed anew after neurons changed places is what a fresh load in the new order gives, byte by byte, on nodes and GPU.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Mutex;

use bytes::Bytes;
use pi_actors::gpu::weights::GpuLayer;
use pi_actors::weights::{ModelWeights, SketchKind as HostSketch};
use pi_actors::{ActorError, TeamThread};
use pi_kernels::attention::KvType;
use pi_kernels::ffn_sparse::FFN_GROUPS;
use pi_kernels::{ActivationMode, QuantType};
use pi_topology::ColdPolicy;

use super::*;
use crate::gguf::GgufFile;
use crate::model::gpu::{GpuLayout, GpuRequest, HotLayer};
use crate::model::load::model_shape;
use crate::model::node_memory::{Arena, HeapMemory, NodeMemory, NodeThreads};
use crate::model::predicting::{Predict, PredictBy, Predicting};
use crate::model::shares::Division;
use crate::model::sparsity::SparsityPlan;
use crate::model::{Hyperparameters, Loader, ModelError, ModelTensors, Sparsity};
use crate::session::Silent;
use crate::sidecar::{Sidecar, default_path};
use crate::synth::{SynthOptions, SynthShape, Synthesis};

/// One thread a node, one after the other.
struct InTurns(usize);

impl NodeThreads for InTurns {
    fn n_threads(&self) -> Vec<usize> {
        vec![1; self.0]
    }

    fn run(&self, job: &(dyn Fn(TeamThread) + Sync)) -> Result<(), ActorError> {
        (0..self.0).for_each(|node| {
            job(TeamThread {
                node,
                thread: 0,
                n_threads: 1,
            });
        });
        Ok(())
    }
}

/// Keeps the arenas.
#[derive(Default)]
struct Kept(Mutex<Vec<Bytes>>);

impl NodeMemory for Kept {
    fn allocate(&self, node: usize, bytes: usize) -> Result<Box<dyn Arena>, ModelError> {
        HeapMemory.allocate(node, bytes)
    }

    fn filled(&self, arenas: &[Bytes]) -> Result<(), ModelError> {
        *self.0.lock().unwrap() = arenas.to_vec();
        Ok(())
    }
}

const SHAPE: SynthShape = SynthShape {
    n_layer: 4,
    n_embd: 256,
    n_ff: 608,
    n_head: 4,
    n_head_kv: 2,
    n_vocab: 512,
    n_ctx: 64,
    rope_base: 1e4,
};

/// A model in a file, with its sidecar.
struct Model {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

impl Model {
    fn new(quant: QuantType) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        let options = SynthOptions {
            name: "moves".into(),
            shape: SHAPE,
            quant,
            active: 0.1,
            skew: 2.4,
            seed: 3,
        };
        let synthesis = Synthesis::new(&options).unwrap();
        assert!(synthesis.write(&path, 2, &Silent, &|| false).unwrap());
        Self {
            _folder: folder,
            path,
        }
    }
}

/// How a model is run.
#[derive(Clone, Copy, Debug)]
struct Way {
    mode: Sparsity,
    by: Option<PredictBy>,
    nodes: usize,
    cold: ColdPolicy,
}

/// All that lies somewhere.
#[derive(PartialEq)]
struct Image {
    /// By node.
    host: Vec<Vec<u8>>,
    gpu: Vec<u8>,
    /// Numbers of sketches, by layer, node and which.
    values: HashMap<(usize, usize, u8), Vec<f32>>,
}

impl Image {
    /// Writes what `moves` has of some swaps, and sees that nothing is written twice.
    fn change(&mut self, moves: &NeuronMoves, layer: usize, swaps: &[Swap]) {
        let mut written: Vec<(Option<usize>, Range<usize>)> = vec![];
        moves.swap(layer, swaps, &mut |place, bytes| {
            let (node, at, to) = match place {
                Place::Gpu { at } => (None, at, &mut self.gpu),
                Place::Host { node, at } => (Some(node), at, &mut self.host[node]),
                Place::Sketch {
                    node,
                    neuron,
                    value,
                } => {
                    let values = self.values.get_mut(&(layer, node, value as u8));
                    let number = f32::from_le_bytes(bytes.try_into().unwrap());
                    values.expect("there are such values")[neuron] = number;
                    return;
                }
            };
            let bytes_at = at..at + bytes.len();
            let overlaps = |(other, there): &(Option<usize>, Range<usize>)| {
                *other == node && there.start < bytes_at.end && bytes_at.start < there.end
            };
            assert!(!written.iter().any(overlaps), "{place:?} twice");
            to[bytes_at.clone()].copy_from_slice(bytes);
            written.push((node, bytes_at));
        });
    }

    fn assert_equal(&self, other: &Self, what: &str) {
        for (node, (ours, theirs)) in self.host.iter().zip(&other.host).enumerate() {
            assert!(ours == theirs, "{what}: node {node}");
        }
        assert!(self.gpu == other.gpu, "{what}: GPU");
        assert!(self.values == other.values, "{what}: sketches");
        assert_eq!(self.host.len(), other.host.len());
    }
}

fn values(weights: &ModelWeights) -> HashMap<(usize, usize, u8), Vec<f32>> {
    let mut all = HashMap::new();
    for (index, layer) in weights.layers.iter().enumerate() {
        for (node, share) in layer.shares.iter().enumerate() {
            let Some(sketch) = &share.sketch else {
                continue;
            };
            let two_bit_bias = match &sketch.kind {
                HostSketch::Bits { two_bit_bias, .. } => two_bit_bias.as_ref(),
                _ => None,
            };
            let kinds = [
                (SketchValue::Bias, Some(&sketch.bias)),
                (SketchValue::Floor, sketch.floor.as_ref()),
                (SketchValue::TwoBitBias, two_bit_bias),
            ];
            for (kind, values) in kinds {
                let values = values.filter(|values| !values.is_empty());
                if let Some(values) = values {
                    all.insert((index, node, kind as u8), values.to_vec());
                }
            }
        }
    }
    all
}

/// Loads the model with these hot neurons.
fn load(model: &Model, way: Way, hot: &[HotLayer]) -> (Image, NeuronMoves, Vec<GpuLayer>) {
    let file = GgufFile::open(&model.path).unwrap();
    let hyper = Hyperparameters::read(&file).unwrap();
    let tensors = ModelTensors::find(&file, &hyper).unwrap();
    let stored = tensors.stored_downs();
    let plan = SparsityPlan::resolve(Some(way.mode), hyper.gate, &stored).unwrap();
    let sidecar = Sidecar::open(&default_path(&model.path), &file, &hyper).unwrap();
    let predicting = Predicting {
        by: way.by.map_or(Predict::Auto, Predict::All),
        prefetch: true,
    };
    let predictors = (way.mode == Sparsity::Predicted).then(|| {
        let layers = sidecar.predictors(&hyper, &tensors).unwrap().unwrap();
        predicting.choose(&sidecar, &layers).unwrap()
    });
    let shape = model_shape(&hyper, &tensors, 64).unwrap();
    let request = GpuRequest {
        shape: &shape,
        tensors: &tensors,
        sparsity: &plan,
        predictors: predictors.as_deref(),
        profile: None,
        kv_type: KvType::F16,
        n_ubatch: 8,
        mode: ActivationMode::Q8,
        groups_max: FFN_GROUPS,
        layers: 0..SHAPE.n_layer,
        replans: true,
    };
    let layout = GpuLayout::new(&request, hot);
    let division = Division {
        cold: way.cold,
        ..Division::by_threads(&vec![1; way.nodes])
    };
    let loader = Loader::predicted(
        &file,
        &hyper,
        &tensors,
        &plan,
        predictors.as_deref(),
        &division,
        Some(hot),
        64,
    );
    let loader = loader.unwrap();
    let moves = loader.moves(&layout.layers);
    let memory = Kept::default();
    let weights = loader.load(&InTurns(way.nodes), &memory, &|_| ()).unwrap();
    let arenas = memory.0.into_inner().unwrap();
    let image = Image {
        host: arenas.iter().map(|arena| arena.to_vec()).collect(),
        gpu: layout.image(),
        values: values(&weights),
    };
    (image, moves, layout.layers)
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % n as u64) as usize
    }

    /// So many of these, in any order.
    fn some(&mut self, from: Range<usize>, n: usize) -> Vec<u32> {
        let mut all: Vec<u32> = from.map(|place| place as u32).collect();
        (0..n.min(all.len()))
            .map(|_| all.swap_remove(self.below(all.len())))
            .collect()
    }
}

/// Ways in which the host's neurons lie differently.
fn ways() -> Vec<Way> {
    let way = |mode, by| Way {
        mode,
        by,
        nodes: 1,
        cold: ColdPolicy::Shard,
    };
    let mut ways = vec![way(Sparsity::Exact, None)];
    ways.extend(
        [PredictBy::InLayer, PredictBy::Ahead, PredictBy::Both]
            .map(|by| way(Sparsity::Predicted, Some(by))),
    );
    for cold in [
        ColdPolicy::Shard,
        ColdPolicy::Replicate,
        ColdPolicy::Single(1),
    ] {
        ways.push(Way {
            nodes: 2,
            cold,
            ..ways[0]
        });
        ways.push(Way {
            nodes: 2,
            cold,
            ..ways[3]
        });
    }
    ways
}

#[test]
fn after_moves_all_lies_as_a_fresh_load_in_the_new_order_has_it() {
    let mut random = Random(7);
    // sketches of bits beside Q4_0, of low rank beside others
    for quant in [QuantType::Q4_0, QuantType::Q8_0, QuantType::F16] {
        let model = Model::new(quant);
        for way in ways() {
            let what = format!("{quant} {way:?}");
            let shuffled = Some(random.some(0..SHAPE.n_ff, SHAPE.n_ff));
            // a layer of which all is hot, and one of which nothing is
            let hot = [
                (5, shuffled.clone()),
                (FFN_GROUPS, shuffled.clone()),
                (0, shuffled),
                (9, None),
            ];
            let mut hot = hot.map(|(groups, order)| HotLayer { order, groups });
            let (mut image, moves, layers) = load(&model, way, &hot);
            assert_eq!(moves.n_movable(), 2, "{what}");
            let before = image.gpu.clone();
            for layer in [0, 3] {
                assert!(moves.swap_bytes(layer).unwrap() > 0);
                let n_hot = layers[layer].ffn.unwrap().n_hot();
                for n in [1, 40, 0, 7] {
                    let (ours, theirs) = (0..n_hot, n_hot..SHAPE.n_ff);
                    let pairs = random.some(ours, n).into_iter().zip(random.some(theirs, n));
                    let swaps: Vec<Swap> = pairs.map(|(hot, cold)| Swap { hot, cold }).collect();
                    image.change(&moves, layer, &swaps);
                }
                hot[layer].order = moves.order(layer);
            }
            assert!(image.gpu != before, "{what}: something moved");
            let (fresh, ..) = load(&model, way, &hot);
            image.assert_equal(&fresh, &what);
        }
    }
}

#[test]
fn there_and_back_changes_nothing() {
    let model = Model::new(QuantType::Q4_0);
    let way = ways()[3];
    let hot = vec![
        HotLayer {
            order: None,
            groups: 8
        };
        SHAPE.n_layer
    ];
    let (mut image, moves, _) = load(&model, way, &hot);
    let (before, ..) = load(&model, way, &hot);
    let swaps: Vec<Swap> = (0..20)
        .map(|n| Swap {
            hot: 7 * n,
            cold: 600 - n,
        })
        .collect();
    image.change(&moves, 1, &swaps);
    assert!(image != before);
    image.change(&moves, 1, &swaps);
    image.assert_equal(&before, "and back");
}

#[test]
fn what_is_not_read_row_by_row_stays() {
    let model = Model::new(QuantType::Q4_0);
    let way = Way {
        mode: Sparsity::Off,
        ..ways()[0]
    };
    let hot = vec![
        HotLayer {
            order: None,
            groups: 8
        };
        SHAPE.n_layer
    ];
    let (_, moves, _) = load(&model, way, &hot);
    assert_eq!(moves.n_movable(), 0);
    assert_eq!((moves.swap_bytes(0), moves.order(0)), (None, None));
}
