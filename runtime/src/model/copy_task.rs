//! Pieces of work that fill an arena: each copies some rows of the file into their packed places.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use pi_kernels::{Layout, MatrixShape, QuantType, ROW_GROUP};

use super::layout::{
    ColdLayout, FfnLayout, LayerLayout, MatrixPart, NodeLayout, Placed, PlanesPart, RecordsPart,
    SketchLayout,
};
use super::tensors::FileMatrix;
use super::transpose::Transposer;
use crate::gguf::GgufFile;

/// Bytes that a task writes, about: small enough to share a layer evenly over threads.
const TASK_BYTES: usize = 256 << 10;
/// Neurons of a transposing task are multiples of this, as every task reads all rows of the matrix.
const TRANSPOSED_NEURONS: usize = 256;

/// What a task copies.
#[derive(Debug)]
enum Source<'a> {
    Matrix(MatrixPart<'a>),
    Records(RecordsPart<'a>),
    Planes(PlanesPart<'a>),
}

/// Some rows of the file, and where they go.
#[derive(Debug)]
pub(super) struct CopyTask<'a, 'm> {
    source: Source<'a>,
    to: &'m mut [u8],
    /// The rest of planes, whose top goes to `to`.
    rest: &'m mut [u8],
}

/// The tasks that fill a node's arena, in the order of the arena (and nearly that of the file).
pub(super) fn copy_tasks<'a, 'm>(
    node: &NodeLayout<'a>,
    arena: &'m mut [u8],
) -> Vec<CopyTask<'a, 'm>> {
    let mut cutting = Cutting {
        rest: arena,
        cut: 0,
        tasks: Vec::new(),
    };
    for layer in &node.layers {
        let LayerLayout {
            wq,
            wk,
            wv,
            wo,
            cold,
            copies,
            ahead,
            ..
        } = layer;
        for matrix in [wq, wk, wv, wo] {
            cutting.matrix(matrix);
        }
        cutting.cold(cold);
        copies.iter().for_each(|copy| cutting.cold(copy));
        ahead
            .iter()
            .flatten()
            .for_each(|matrix| cutting.matrix(matrix));
    }
    cutting.matrix(&node.head);
    for part in node.sketch.iter().flatten() {
        cutting.matrix(part);
    }
    cutting.tasks
}

/// Cuts an arena into the tasks' disjoint pieces, from its start to its end.
struct Cutting<'a, 'm> {
    rest: &'m mut [u8],
    /// Bytes cut off.
    cut: usize,
    tasks: Vec<CopyTask<'a, 'm>>,
}

impl<'a, 'm> Cutting<'a, 'm> {
    /// The stretch of the arena called `at`.
    fn take(&mut self, at: &Range<usize>) -> &'m mut [u8] {
        let rest = std::mem::take(&mut self.rest);
        let (taken, rest) = rest[at.start - self.cut..].split_at_mut(at.len());
        self.rest = rest;
        self.cut = at.end;
        taken
    }

    fn matrix(&mut self, placed: &Placed<MatrixPart<'a>>) {
        if placed.at.is_empty() {
            return;
        }
        let part = &placed.part;
        let row_bytes = part.shape().row_bytes();
        let step = (TASK_BYTES / row_bytes).next_multiple_of(ROW_GROUP);
        let to = self.take(&placed.at);
        let starts = part.rows.clone().step_by(step);
        for (start, to) in starts.zip(to.chunks_mut(step * row_bytes)) {
            let source = Source::Matrix(MatrixPart {
                rows: start..(start + step).min(part.rows.end),
                ..part.clone()
            });
            let rest = &mut [];
            self.tasks.push(CopyTask { source, to, rest });
        }
    }

    fn cold(&mut self, cold: &ColdLayout<'a>) {
        self.matrix(&cold.gate);
        match &cold.ffn {
            FfnLayout::Paired(records) => self.records(records),
            FfnLayout::Apart { up, down } => {
                self.matrix(up);
                self.records(down);
            }
            FfnLayout::Dense { up, down } => {
                self.matrix(up);
                self.matrix(down);
            }
        }
        match &cold.sketch {
            None | Some(SketchLayout::Nothing) => {}
            Some(SketchLayout::LowRank { a, b }) => {
                self.matrix(a);
                self.matrix(b);
            }
            Some(SketchLayout::Bits(planes)) => self.planes(planes),
        }
    }

    fn planes(&mut self, placed: &Placed<PlanesPart<'a>>) {
        if placed.at.is_empty() {
            return;
        }
        let (part, shape) = (&placed.part, placed.part.shape());
        let row_bytes = part.source.row_bytes();
        let step = (TASK_BYTES / row_bytes).next_multiple_of(ROW_GROUP);
        let top_step = step * shape.top_bytes() / shape.n_rows.next_multiple_of(ROW_GROUP);
        let (top, rest) = self.take(&placed.at).split_at_mut(shape.top_bytes());
        let tops = top.chunks_mut(top_step);
        let rests = rest.chunks_mut(step * shape.rest_row_bytes());
        let starts = part.neurons.clone().step_by(step);
        for ((start, to), rest) in starts.zip(tops).zip(rests) {
            let source = Source::Planes(PlanesPart {
                neurons: start..(start + step).min(part.neurons.end),
                ..part.clone()
            });
            self.tasks.push(CopyTask { source, to, rest });
        }
    }

    fn records(&mut self, placed: &Placed<RecordsPart<'a>>) {
        let part = &placed.part;
        let multiple = if part.transposed {
            TRANSPOSED_NEURONS
        } else {
            1
        };
        let step = (TASK_BYTES / part.record_bytes()).max(1);
        let step = step.next_multiple_of(multiple);
        let to = self.take(&placed.at);
        let starts = part.neurons.clone().step_by(step);
        for (start, to) in starts.zip(to.chunks_mut(step * part.record_bytes())) {
            let source = Source::Records(RecordsPart {
                neurons: start..(start + step).min(part.neurons.end),
                ..part.clone()
            });
            let rest = &mut [];
            self.tasks.push(CopyTask { source, to, rest });
        }
    }
}

impl<'a> CopyTask<'a, '_> {
    /// Copies, and returns the number of bytes of the arena that are ready by it.
    pub fn run(&mut self) -> usize {
        match &self.source {
            Source::Matrix(part) => copy_matrix(part, self.to),
            Source::Records(part) => copy_records(part, self.to),
            Source::Planes(part) => copy_planes(part, self.to, self.rest),
        }
        self.to.len() + self.rest.len()
    }

    /// The model's tensors read, and the rows of each if it is read row by row.
    fn tensors(&self) -> Vec<(&'a FileMatrix, Option<Range<usize>>)> {
        match &self.source {
            Source::Matrix(part) if !part.of_model => vec![],
            // rows in another order lie here and there
            Source::Planes(part) => {
                let rows = part.order.is_none().then(|| part.neurons.clone());
                vec![(part.source, rows)]
            }
            Source::Matrix(part) => {
                let whole = part.cols.len() == part.source.n_cols() && part.order.is_none();
                vec![(part.source, whole.then(|| part.rows.clone()))]
            }
            Source::Records(part) => {
                let in_order = part.order.is_none();
                let rows = (!part.transposed && in_order).then(|| part.neurons.clone());
                let up_rows = in_order.then(|| part.neurons.clone());
                let up = part.up.map(|up| (up, up_rows));
                up.into_iter().chain([(part.down, rows)]).collect()
            }
        }
    }
}

/// Rows of a matrix one after the other.
fn gathered(source: &FileMatrix, rows: &[u32]) -> Vec<u8> {
    let mut gathered = Vec::with_capacity(rows.len() * source.row_bytes());
    for &row in rows {
        gathered.extend_from_slice(source.rows(row as usize..row as usize + 1));
    }
    gathered
}

/// The planes of some gates: their signs, and the rest.
pub(super) fn copy_planes(part: &PlanesPart<'_>, top: &mut [u8], rest: &mut [u8]) {
    let rows = part.neurons.clone();
    match part.order {
        None => (part.shape()).pack(part.source.rows(rows), 0, top, rest),
        Some(order) => {
            let rows = gathered(part.source, &order[rows]);
            part.shape().pack(&rows, 0, top, rest);
        }
    }
}

pub(super) fn copy_matrix(part: &MatrixPart<'_>, to: &mut [u8]) {
    let (source, shape) = (part.source, part.shape());
    if part.cols.len() == source.n_cols() {
        match part.order {
            None => shape.pack(source.rows(part.rows.clone()), 0, to),
            Some(order) => shape.pack(&gathered(source, &order[part.rows.clone()]), 0, to),
        }
        return;
    }
    let columns = source.quant.row_bytes(part.cols.start)..source.quant.row_bytes(part.cols.end);
    let mut group = Vec::with_capacity(ROW_GROUP * columns.len());
    let group_starts = part.rows.clone().step_by(ROW_GROUP);
    for (start, to) in group_starts.zip(to.chunks_mut(ROW_GROUP * columns.len())) {
        group.clear();
        for row in start..(start + ROW_GROUP).min(part.rows.end) {
            group.extend_from_slice(&source.rows(row..row + 1)[columns.clone()]);
        }
        shape.pack(&group, 0, to);
    }
}

pub(super) fn copy_records(part: &RecordsPart<'_>, to: &mut [u8]) {
    let (up_bytes, record_bytes) = (part.up_row_bytes(), part.record_bytes());
    let row = |quant: QuantType| MatrixShape {
        quant,
        n_rows: 1,
        n_cols: part.n_embd,
        layout: Layout::Rows,
    };
    let first = part.neurons.start;
    let in_file = |neuron: usize| part.order.map_or(neuron, |order| order[neuron] as usize);
    if let Some(up) = part.up {
        let shape = row(up.quant);
        for (neuron, record) in part.neurons.clone().zip(to.chunks_exact_mut(record_bytes)) {
            let row = in_file(neuron);
            shape.pack(up.rows(row..row + 1), 0, record);
        }
    }
    let shape = row(part.down_quant);
    let mut put_down = |neuron: usize, bytes: &[u8]| {
        let record = &mut to[(neuron - first) * record_bytes..][..record_bytes];
        shape.pack(bytes, 0, &mut record[up_bytes..]);
    };
    if part.transposed {
        let mut transposer = Transposer::new(part.down, part.down_quant);
        transposer.each_row(part.neurons.clone(), put_down);
    } else {
        for neuron in part.neurons.clone() {
            let row = in_file(neuron);
            put_down(neuron, part.down.rows(row..row + 1));
        }
    }
}

/// Gives back the file's pages as tasks have copied them, so that the process never holds much of both.
#[derive(Debug)]
pub(super) struct PageDrop<'a> {
    file: &'a GgufFile,
    /// Tasks that have not read a tensor yet, by its file and place.
    readers: HashMap<(usize, usize), AtomicUsize>,
}

impl<'a> PageDrop<'a> {
    /// Expects every task of `tasks` to finish once.
    pub fn new<'t, 'm: 't>(
        file: &'a GgufFile,
        tasks: impl Iterator<Item = &'t CopyTask<'a, 'm>>,
    ) -> Self
    where
        'a: 't,
    {
        let mut readers = HashMap::new();
        for (tensor, _) in tasks.flat_map(CopyTask::tensors) {
            let count: &mut AtomicUsize = readers.entry(place(tensor)).or_default();
            *count.get_mut() += 1;
        }
        Self { file, readers }
    }

    /// Takes note that `task` has run.
    pub fn finished(&self, task: &CopyTask<'_, '_>) {
        for (tensor, rows) in task.tensors() {
            if let Some(rows) = rows {
                let bytes = tensor.row_bytes();
                let read = rows.start * bytes..rows.end * bytes;
                self.file.drop_pages(&tensor.info, read);
            }
            let readers = &self.readers[&place(tensor)];
            if readers.fetch_sub(1, Ordering::AcqRel) == 1 {
                // also the pages that two tasks shared
                self.file.drop_tensor_pages(&tensor.info);
            }
        }
    }
}

/// The file, and where the tensor starts in it.
fn place(tensor: &FileMatrix) -> (usize, usize) {
    (tensor.info.shard(), tensor.info.file_range().start)
}
