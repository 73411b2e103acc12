//! Loaded weights are the file's, row by row, wherever they lie.

mod common;

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use common::threads::ScopedThreads;
use common::tiny_model::{N_VOCAB, TinyModel};
use pi_actors::weights::{Embedding, FfnShare, LayerShare, Matrix, ModelWeights, UpRows};
use pi_kernels::ffn_sparse::NeuronRows;
use pi_kernels::{Layout, MatrixRef, MatrixShape, QuantType};
use pi_runtime::gguf::GgufFile;
use pi_runtime::model::footprint::Footprint;
use pi_runtime::model::node_memory::{Arena, HeapMemory, NodeMemory};
use pi_runtime::model::quantize::dequantize_row;
use pi_runtime::model::requantize::requantize_row;
use pi_runtime::model::sparsity::{DownPlan, SparsityPlan};
use pi_runtime::model::tensors::{FileMatrix, LayerTensors};
use pi_runtime::model::{Hyperparameters, Loader, ModelError, ModelTensors, Sparsity};

/// Memory that notes what was asked for.
#[derive(Default)]
struct CountingMemory(Mutex<Vec<usize>>);

impl NodeMemory for CountingMemory {
    fn allocate(&self, node: usize, bytes: usize) -> Result<Box<dyn Arena>, ModelError> {
        self.0.lock().unwrap().push(bytes);
        HeapMemory.allocate(node, bytes)
    }
}

struct Loaded {
    hyper: Hyperparameters,
    tensors: ModelTensors,
    plan: SparsityPlan,
    weights: ModelWeights,
    copied_bytes: u64,
}

fn load(model: &TinyModel, mode: Sparsity, threads: &[usize]) -> Loaded {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    model.write(&path);
    let file = GgufFile::open(&path).unwrap();
    let hyper = Hyperparameters::read(&file).unwrap();
    let tensors = ModelTensors::find(&file, &hyper).unwrap();
    let plan = SparsityPlan::resolve(Some(mode), hyper.gate, &tensors.stored_downs()).unwrap();
    let loader = Loader::new(&file, &hyper, &tensors, &plan, threads, 32).unwrap();
    let (node_bytes, copied_bytes) = (loader.node_bytes(), loader.copied_bytes());
    let (memory, last) = (CountingMemory::default(), AtomicU64::new(0));
    let progress = |bytes| {
        last.fetch_max(bytes, Ordering::Relaxed);
    };
    let team = ScopedThreads(threads.to_vec());
    let weights = loader.load(&team, &memory, &progress).unwrap();
    assert_eq!(memory.0.into_inner().unwrap(), node_bytes);
    assert_eq!(last.into_inner(), copied_bytes);
    Loaded {
        hyper,
        tensors,
        plan,
        weights,
        copied_bytes,
    }
}

fn file_row(matrix: &FileMatrix, row: usize) -> Vec<f32> {
    let mut values = vec![f32::NAN; matrix.n_cols()];
    dequantize_row(matrix.quant, matrix.rows(row..row + 1), &mut values);
    values
}

/// Rows `rows` of the file, and columns `cols` of them.
fn assert_rows(packed: &Matrix, file: &FileMatrix, rows: Range<usize>, cols: Range<usize>) {
    assert_eq!(packed.shape.layout, Layout::Interleaved);
    assert_eq!(
        (packed.shape.n_rows, packed.shape.n_cols),
        (rows.len(), cols.len())
    );
    assert_eq!(packed.bytes.len(), packed.shape.packed_bytes());
    let mut values = vec![f32::NAN; cols.len()];
    for (r, row) in rows.enumerate() {
        packed.view().dequantize_row(r, &mut values);
        let name = file.info.name();
        assert_eq!(
            values,
            file_row(file, row)[cols.clone()],
            "row {row} of {name}"
        );
    }
}

fn neuron_row(rows: &NeuronRows<'_>, neuron: usize) -> Vec<f32> {
    let shape = MatrixShape {
        quant: rows.quant,
        n_rows: 1,
        n_cols: rows.n_embd,
        layout: Layout::Rows,
    };
    let mut values = vec![f32::NAN; rows.n_embd];
    MatrixRef::new(shape, rows.row(neuron)).dequantize_row(0, &mut values);
    values
}

/// The neuron's column of a plain down projection, rounded to `to`.
fn transposed_row(down: &FileMatrix, neuron: usize, to: QuantType) -> Vec<f32> {
    let column = (0..down.n_rows()).map(|row| file_row(down, row)[neuron]);
    let column: Vec<f32> = column.collect();
    let mut bytes = vec![0; to.row_bytes(column.len())];
    requantize_row(to, &column, &mut bytes);
    let mut values = vec![f32::NAN; column.len()];
    dequantize_row(to, &bytes, &mut values);
    values
}

/// Checks up and down, and returns their matrices and bytes of records.
fn assert_ffn<'a>(
    share: &'a LayerShare,
    layer: &LayerTensors,
    plan: DownPlan,
) -> (Vec<&'a Matrix>, usize) {
    let (neurons, down) = (share.neurons.clone(), layer.down.matrix());
    let all = 0..layer.up.n_cols();
    match &share.ffn {
        FfnShare::Dense { up, down: columns } => {
            assert!(matches!(plan, DownPlan::Dense(_)), "{plan:?}");
            assert_rows(up, &layer.up, neurons.clone(), all);
            assert_rows(columns, down, 0..down.n_rows(), neurons);
            (vec![up, columns], 0)
        }
        FfnShare::Neurons { up, rows } => {
            assert_eq!(rows.n_neurons, neurons.len());
            assert_eq!(rows.bytes.len(), rows.n_neurons * rows.record_bytes());
            for (n, neuron) in neurons.clone().enumerate() {
                let expected = match plan {
                    DownPlan::NeuronRows(_) => file_row(down, neuron),
                    DownPlan::Transposed { to, .. } => transposed_row(down, neuron, to),
                    DownPlan::Dense(_) => panic!("{plan:?} became rows"),
                };
                assert_eq!(
                    neuron_row(&rows.down_rows(), n),
                    expected,
                    "neuron {neuron}"
                );
                if let Some(up) = rows.up_rows() {
                    assert_eq!(neuron_row(&up, n), file_row(&layer.up, neuron));
                }
            }
            match up {
                UpRows::Interleaved(up) => {
                    assert!(rows.up.is_none());
                    assert_rows(up, &layer.up, neurons, all);
                    (vec![up], rows.bytes.len())
                }
                UpRows::Paired => {
                    assert!(rows.up.is_some());
                    (vec![], rows.bytes.len())
                }
            }
        }
    }
}

/// Consecutive ranges that cover `0..len`, each beginning at a multiple.
fn assert_cover(ranges: impl Iterator<Item = Range<usize>>, len: usize, multiple: usize) {
    let mut end = 0;
    for range in ranges {
        assert_eq!(range.start, end, "of {len}");
        assert!(range.start.is_multiple_of(multiple) || range.start == len);
        end = range.end;
    }
    assert_eq!(end, len);
}

fn assert_faithful(loaded: &Loaded, neuron_multiple: usize) {
    let Loaded {
        hyper,
        tensors,
        plan,
        weights,
        ..
    } = loaded;
    let (n_embd, head_dim) = (hyper.n_embd, hyper.head_dim);
    let heads_per_kv = hyper.n_head / hyper.n_head_kv;
    let mut bytes = 0;
    // the first matrix of a node lies at its arena's start
    let starts: Vec<usize> = (weights.layers[0].shares.iter())
        .map(|share| share.wq.bytes.as_ptr() as usize)
        .collect();
    let mut check_place = |node: usize, matrix: &Matrix| {
        if !matrix.bytes.is_empty() {
            assert_eq!((matrix.bytes.as_ptr() as usize - starts[node]) % 64, 0);
        }
        bytes += matrix.bytes.len();
    };
    let mut record_bytes = 0;
    for ((layer, file), down) in weights.layers.iter().zip(&tensors.layers).zip(&plan.down) {
        assert_eq!(
            (&layer.attn_norm, &layer.ffn_norm),
            (&file.attn_norm, &file.ffn_norm)
        );
        let shares = || layer.shares.iter();
        assert_cover(shares().map(|s| s.kv_heads.clone()), hyper.n_head_kv, 1);
        assert_cover(shares().map(|s| s.output_rows.clone()), n_embd, 16);
        assert_cover(shares().map(|s| s.groups.clone()), 16, 1);
        assert_cover(
            shares().map(|s| s.neurons.clone()),
            hyper.n_ff,
            neuron_multiple,
        );
        for (node, share) in layer.shares.iter().enumerate() {
            let ends = [share.groups.start, share.groups.end].map(|g| weights.neuron_groups[g]);
            assert_eq!(share.neurons, ends[0]..ends[1]);
            let rows = |per_head: usize| {
                share.kv_heads.start * per_head * head_dim..share.kv_heads.end * per_head * head_dim
            };
            assert_rows(&share.wq, &file.wq, rows(heads_per_kv), 0..n_embd);
            assert_rows(&share.wk, &file.wk, rows(1), 0..n_embd);
            assert_rows(&share.wv, &file.wv, rows(1), 0..n_embd);
            let n_attn = hyper.n_head * head_dim;
            assert_rows(&share.wo, &file.wo, share.output_rows.clone(), 0..n_attn);
            assert_rows(&share.gate, &file.gate, share.neurons.clone(), 0..n_embd);
            let (ffn, records) = assert_ffn(share, file, *down);
            record_bytes += records;
            for matrix in [&share.wq, &share.wk, &share.wv, &share.wo, &share.gate] {
                check_place(node, matrix);
            }
            ffn.into_iter().for_each(|matrix| check_place(node, matrix));
        }
    }
    let head = tensors.output.as_ref().unwrap_or(&tensors.token_embd);
    assert_cover(
        weights.head.iter().map(|share| share.rows.clone()),
        N_VOCAB,
        16,
    );
    for (node, share) in weights.head.iter().enumerate() {
        assert_rows(&share.matrix, head, share.rows.clone(), 0..n_embd);
        check_place(node, &share.matrix);
    }
    assert_eq!((bytes + record_bytes) as u64, loaded.copied_bytes);
}

const NODES: [&[usize]; 5] = [&[1], &[3], &[1, 1], &[2, 1, 1], &[1, 1, 1, 1]];

#[test]
fn neuron_major_files_are_loaded_value_for_value() {
    for quant in [
        QuantType::F32,
        QuantType::BF16,
        QuantType::Q4_0,
        QuantType::Q5_1,
        QuantType::Q8_0,
    ] {
        for (threads, mode) in NODES
            .into_iter()
            .flat_map(|n| [(n, Sparsity::Off), (n, Sparsity::Exact)])
        {
            let model = TinyModel {
                quant,
                n_ff: 160,
                ..TinyModel::default()
            };
            assert_faithful(&load(&model, mode, threads), 16);
        }
    }
}

#[test]
fn plain_files_are_divided_by_columns_or_transposed() {
    for quant in [QuantType::F16, QuantType::Q4_1, QuantType::Q8_0] {
        for threads in NODES {
            let model = TinyModel {
                quant,
                neuron_major: false,
                n_ff: 416,
                ..TinyModel::default()
            };
            let block = quant.block_values().max(16);
            assert_faithful(&load(&model, Sparsity::Off, threads), block);
            assert_faithful(&load(&model, Sparsity::Exact, threads), 16);
        }
    }
}

#[test]
fn matrices_are_whole_that_several_tasks_copy() {
    for neuron_major in [true, false] {
        for mode in [Sparsity::Off, Sparsity::Exact] {
            let model = TinyModel {
                n_layer: 1,
                n_ff: 2999,
                neuron_major,
                ..TinyModel::default()
            };
            assert_faithful(&load(&model, mode, &[2]), 16);
        }
    }
}

#[test]
fn layers_and_heads_too_small_for_every_node_leave_some_empty() {
    for (neuron_major, n_ff) in [(true, 24), (false, 32)] {
        for mode in [Sparsity::Off, Sparsity::Exact] {
            let model = TinyModel {
                n_embd: 32,
                n_head_kv: 1,
                n_ff,
                neuron_major,
                quant: QuantType::Q4_0,
                ..TinyModel::default()
            };
            let loaded = load(&model, mode, &[1, 1, 1, 1]);
            assert_faithful(&loaded, 16);
            let shares = &loaded.weights.layers[0].shares;
            assert!(shares.iter().any(|share| share.neurons.is_empty()));
            assert!(shares.iter().any(|share| share.kv_heads.is_empty()));
        }
    }
}

#[test]
fn a_separate_head_leaves_the_embedding_in_the_file() {
    let tied = load(&TinyModel::default(), Sparsity::Off, &[1, 1]);
    assert!(matches!(tied.weights.embedding, Embedding::Tied));
    let model = TinyModel {
        tied: false,
        quant: QuantType::Q8_0,
        ..TinyModel::default()
    };
    let loaded = load(&model, Sparsity::Exact, &[1, 1]);
    assert_faithful(&loaded, 16);
    let Embedding::Rows(rows) = &loaded.weights.embedding else {
        panic!("embedding of its own");
    };
    let file = &loaded.tensors.token_embd;
    assert_eq!((rows.quant, rows.n_embd), (QuantType::Q8_0, 64));
    assert_eq!(rows.bytes.as_ptr(), file.bytes.as_ptr(), "no copy");
    assert_eq!(rows.bytes.len(), file.bytes.len());
}

#[test]
fn footprint_and_arenas_agree() {
    for (neuron_major, mode) in [
        (true, Sparsity::Off),
        (true, Sparsity::Exact),
        (false, Sparsity::Off),
        (false, Sparsity::Exact),
    ] {
        let model = TinyModel {
            neuron_major,
            quant: QuantType::Q4_0,
            ..TinyModel::default()
        };
        let loaded = load(&model, mode, &[2]);
        let footprint = Footprint::of(&loaded.hyper, &loaded.tensors, &loaded.plan);
        let row = QuantType::Q4_0.row_bytes(64);
        let beside = 5 * 64 * 4 + row;
        let padding = (N_VOCAB.next_multiple_of(16) - N_VOCAB) * row;
        assert_eq!(
            footprint.bytes(1.0) - beside as u64,
            loaded.copied_bytes - padding as u64
        );
        let sparse = footprint.bytes(0.0) < footprint.bytes(1.0);
        assert_eq!(sparse, mode == Sparsity::Exact);
    }
}

#[test]
fn more_context_than_the_model_knows_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    TinyModel::default().write(&path);
    let file = GgufFile::open(&path).unwrap();
    let hyper = Hyperparameters::read(&file).unwrap();
    let tensors = ModelTensors::find(&file, &hyper).unwrap();
    let plan = SparsityPlan::resolve(None, hyper.gate, &tensors.stored_downs()).unwrap();
    let error = Loader::new(&file, &hyper, &tensors, &plan, &[1], 257).unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("257") && message.contains("-c 256"),
        "{message}"
    );
}
