//! Neurons that change places between a GPU and the nodes: the contents of both, packed anew from the model's file.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pi_actors::gpu::weights::{GpuAhead, GpuDown, GpuFfn, GpuLayer, GpuRows};
use pi_actors::replan::{NeuronSource, Place, SketchValue, Swap};
use pi_kernels::Layout;

use super::copy_task::{copy_matrix, copy_planes, copy_records};
use super::gpu::pack_rows;
use super::layout::{
    ColdLayout, FfnLayout, LayerLayout, MatrixPart, Placed, PlanesPart, RecordsPart, SketchLayout,
};
use super::tensors::{FileMatrix, LayerTensors};
use crate::sidecar::{Ahead, LayerPredictors, Sketch, SketchKind};

/// Where each layer's neurons are, and what they are made from. It holds the mapped files.
#[derive(Debug)]
pub struct NeuronMoves {
    layers: Vec<Option<LayerMoves>>,
}

impl NeuronMoves {
    /// For layers as nodes and GPUs have them; a layer that is not to change is none.
    pub(super) fn new(layers: impl Iterator<Item = Option<LayerMoves>>) -> Self {
        Self {
            layers: layers.collect(),
        }
    }

    /// Layers whose neurons may change places.
    pub fn n_movable(&self) -> usize {
        self.layers.iter().flatten().count()
    }

    /// The file's neuron of each neuron of a layer, `[n_ff]`; none where it stays as it is.
    pub fn order(&self, layer: usize) -> Option<Vec<u32>> {
        let layer = self.layers[layer].as_ref()?;
        Some(locked(&layer.order).clone())
    }
}

impl NeuronSource for NeuronMoves {
    fn swap_bytes(&self, layer: usize) -> Option<usize> {
        self.layers[layer].as_ref().map(LayerMoves::swap_bytes)
    }

    fn swap(&self, layer: usize, swaps: &[Swap], put: &mut dyn FnMut(Place, &[u8])) {
        let layer = self.layers[layer].as_ref();
        let layer = layer.expect("neurons of the layer may change places");
        let order = &mut *locked(&layer.order);
        for swap in swaps {
            order.swap(swap.hot as usize, swap.cold as usize);
        }
        for swap in swaps {
            layer.put_hot(swap.hot as usize, order, put);
            for place in [swap.hot, swap.cold] {
                layer.put_ahead(place as usize, order, put);
            }
        }
        for host in &layer.host {
            let inside = swaps.iter().map(|swap| swap.cold as usize);
            let inside = inside.filter(|place| host.neurons.contains(place));
            layer.put_cold(host, &inside.collect(), order, put);
        }
    }
}

/// One layer.
#[derive(Debug)]
pub(super) struct LayerMoves {
    /// The file's neuron of each neuron of the layer, `[n_ff]`.
    order: Mutex<Vec<u32>>,
    gate: FileMatrix,
    up: FileMatrix,
    /// A row a neuron.
    down: FileMatrix,
    hot: GpuFfn,
    hot_down: GpuRows,
    ahead: Option<(Ahead, GpuAhead)>,
    sketch: Option<Sketch>,
    host: Vec<HostMoves>,
}

/// Some of its neurons on a node.
#[derive(Debug)]
struct HostMoves {
    node: usize,
    /// Whether the node computes them; else they are a copy of another node's.
    is_own: bool,
    neurons: Range<usize>,
    /// Bytes of the node's arena, and how they lie there.
    gate: Range<usize>,
    gate_layout: Layout,
    /// Of gates in planes nothing is in `gate`.
    has_gate: bool,
    records: Range<usize>,
    sketch: SketchMoves,
}

/// What their sketch has of them.
#[derive(Debug)]
enum SketchMoves {
    Nothing,
    LowRank(Range<usize>),
    Planes(Range<usize>),
}

impl HostMoves {
    /// None where there are no rows that can move.
    fn new(node: usize, is_own: bool, cold: &ColdLayout<'_>) -> Option<Self> {
        let records = match &cold.ffn {
            FfnLayout::Paired(records) if !records.part.transposed => records,
            _ => return None,
        };
        let gate = &cold.gate;
        let sketch = match &cold.sketch {
            None | Some(SketchLayout::Nothing) => SketchMoves::Nothing,
            Some(SketchLayout::LowRank { b, .. }) => SketchMoves::LowRank(b.at.clone()),
            Some(SketchLayout::Bits(planes)) => SketchMoves::Planes(planes.at.clone()),
        };
        Some(Self {
            node,
            is_own,
            neurons: records.part.neurons.clone(),
            has_gate: !gate.part.rows.is_empty(),
            gate: gate.at.clone(),
            gate_layout: gate.part.layout,
            records: records.at.clone(),
            sketch,
        })
    }
}

impl LayerMoves {
    /// A layer as `nodes` and a GPU have it; none where its neurons cannot change places: all are on one side, or up and down rows
    /// are not read one by one, or down is stored by output.
    pub(super) fn new(
        tensors: &LayerTensors,
        nodes: &[&LayerLayout<'_>],
        predictors: Option<&LayerPredictors>,
        gpu: &GpuLayer,
    ) -> Option<Self> {
        let hot = gpu.ffn.filter(|_| gpu.has_cold)?;
        let GpuDown::Neurons(hot_down) = hot.down else {
            return None;
        };
        let parts = nodes.iter().enumerate().flat_map(|(node, layer)| {
            let copies = layer.copies.iter().map(move |copy| (node, false, copy));
            [(node, true, &layer.cold)].into_iter().chain(copies)
        });
        let host = parts.map(|(node, is_own, cold)| HostMoves::new(node, is_own, cold));
        let order = match nodes.first()?.order {
            Some(order) => order.to_vec(),
            None => (0..tensors.gate.n_rows() as u32).collect(),
        };
        let ahead = predictors.and_then(|layer| layer.ahead.clone());
        Some(Self {
            order: Mutex::new(order),
            gate: tensors.gate.clone(),
            up: tensors.up.clone(),
            down: tensors.down.matrix().clone(),
            hot,
            hot_down,
            // a GPU's first layer is not predicted
            ahead: ahead.zip(gpu.ahead.clone()),
            sketch: predictors.and_then(|layer| layer.sketch.clone()),
            host: host.collect::<Option<_>>()?,
        })
    }

    /// What two neurons take, on either side.
    fn swap_bytes(&self) -> usize {
        let rows = [&self.gate, &self.up, &self.down];
        let ahead = self.ahead.iter().map(|(ahead, _)| ahead.b.row_bytes());
        2 * rows
            .into_iter()
            .map(FileMatrix::row_bytes)
            .chain(ahead)
            .sum::<usize>()
    }

    /// Rows of the hot neuron at `place`.
    fn put_hot(&self, place: usize, order: &[u32], put: &mut dyn FnMut(Place, &[u8])) {
        let rows = [
            (&self.gate, &self.hot.gate),
            (&self.up, &self.hot.up),
            (&self.down, &self.hot_down),
        ];
        for (matrix, to) in rows {
            put_row(matrix, to, place, order, put);
        }
    }

    /// What predicts the neuron at `place` from the layer before.
    fn put_ahead(&self, place: usize, order: &[u32], put: &mut dyn FnMut(Place, &[u8])) {
        let Some((ahead, on_gpu)) = &self.ahead else {
            return;
        };
        put_row(&ahead.b, &on_gpu.b, place, order, put);
        let bias = ahead.b_bias[order[place] as usize];
        let at = on_gpu.b_bias.start + size_of::<f32>() * place;
        put(Place::Gpu { at }, &bias.to_le_bytes());
    }

    /// All that a node has of its neurons at `places`. Rows that lie interleaved are packed with their group.
    fn put_cold(
        &self,
        host: &HostMoves,
        places: &BTreeSet<usize>,
        order: &[u32],
        put: &mut dyn FnMut(Place, &[u8]),
    ) {
        let matrix = |source, layout| MatrixPart {
            source,
            rows: host.neurons.clone(),
            cols: 0..source.n_cols(),
            layout,
            of_model: true,
            order: Some(order),
        };
        if host.has_gate {
            let (at, part) = (host.gate.clone(), matrix(&self.gate, host.gate_layout));
            put_matrix(host.node, &Placed { at, part }, places, put);
        }
        let part = RecordsPart {
            up: Some(&self.up),
            down: &self.down,
            down_quant: self.down.quant,
            transposed: false,
            n_embd: self.down.n_cols(),
            neurons: host.neurons.clone(),
            order: Some(order),
        };
        let at = host.records.clone();
        put_records(host.node, &Placed { at, part }, places, put);
        let Some(sketch) = &self.sketch else { return };
        match (&host.sketch, &sketch.kind) {
            // a predictor ahead decides alone: there are no values either
            (SketchMoves::Nothing, _) => return,
            (SketchMoves::LowRank(at), SketchKind::LowRank { b, .. }) => {
                let (at, part) = (at.clone(), matrix(b, Layout::Interleaved));
                put_matrix(host.node, &Placed { at, part }, places, put);
            }
            (SketchMoves::Planes(at), _) => {
                let part = PlanesPart {
                    source: &self.gate,
                    neurons: host.neurons.clone(),
                    order: Some(order),
                };
                let at = at.clone();
                put_planes(host.node, &Placed { at, part }, places, put);
            }
            (SketchMoves::LowRank(_), SketchKind::Bits { .. }) => {
                unreachable!("the layout follows the sketch")
            }
        }
        if host.is_own {
            put_values(sketch, host, places, order, put);
        }
    }
}

/// A row in a GPU's arena.
fn put_row(
    matrix: &FileMatrix,
    to: &GpuRows,
    place: usize,
    order: &[u32],
    put: &mut dyn FnMut(Place, &[u8]),
) {
    let row_bytes = to.rows.row_bytes();
    let mut row = vec![0; row_bytes];
    pack_rows(matrix, &order[place..place + 1], to.rows, &mut row);
    let at = to.at + place * row_bytes;
    put(Place::Gpu { at }, &row);
}

/// The first of the `together` rows, counted from `first`, that each of `places` is among.
fn groups(places: &BTreeSet<usize>, first: usize, together: usize) -> BTreeSet<usize> {
    let group = |place: &usize| first + (place - first) / together * together;
    places.iter().map(group).collect()
}

/// The rows of a matrix in a node's arena that lie together with those at `places`.
fn put_matrix(
    node: usize,
    placed: &Placed<MatrixPart<'_>>,
    places: &BTreeSet<usize>,
    put: &mut dyn FnMut(Place, &[u8]),
) {
    let Placed { at, part } = placed;
    let (row_bytes, together) = (part.shape().row_bytes(), part.layout.rows_together());
    let mut packed = vec![0; together * row_bytes];
    for first in groups(places, part.rows.start, together) {
        let rows = first..(first + together).min(part.rows.end);
        let start = at.start + (first - part.rows.start) * row_bytes;
        packed.fill(0);
        let part = MatrixPart {
            rows,
            ..part.clone()
        };
        copy_matrix(&part, &mut packed);
        put(Place::Host { node, at: start }, &packed);
    }
}

fn put_records(
    node: usize,
    placed: &Placed<RecordsPart<'_>>,
    places: &BTreeSet<usize>,
    put: &mut dyn FnMut(Place, &[u8]),
) {
    let Placed { at, part } = placed;
    let record_bytes = part.record_bytes();
    let mut packed = vec![0; record_bytes];
    for place in places {
        let start = at.start + (place - part.neurons.start) * record_bytes;
        let part = RecordsPart {
            neurons: *place..place + 1,
            ..part.clone()
        };
        copy_records(&part, &mut packed);
        put(Place::Host { node, at: start }, &packed);
    }
}

/// Both planes of the gates that lie together with those at `places`.
fn put_planes(
    node: usize,
    placed: &Placed<PlanesPart<'_>>,
    places: &BTreeSet<usize>,
    put: &mut dyn FnMut(Place, &[u8]),
) {
    let Placed { at, part } = placed;
    let (whole, together) = (part.shape(), pi_kernels::ROW_GROUP);
    let n_groups = whole.n_rows.div_ceil(together).max(1);
    let (top_bytes, rest_bytes) = (whole.top_bytes() / n_groups, whole.rest_row_bytes());
    for first in groups(places, part.neurons.start, together) {
        let neurons = first..(first + together).min(part.neurons.end);
        let own = first - part.neurons.start;
        let mut top = vec![0; top_bytes];
        let mut rest = vec![0; neurons.len() * rest_bytes];
        let part = PlanesPart {
            neurons,
            ..part.clone()
        };
        copy_planes(&part, &mut top, &mut rest);
        let top_at = at.start + own / together * top_bytes;
        let rest_at = at.start + whole.top_bytes() + own * rest_bytes;
        for (at, bytes) in [(top_at, &top), (rest_at, &rest)] {
            put(Place::Host { node, at }, bytes);
        }
    }
}

/// The sketch's numbers of the neurons at `places`.
fn put_values(
    sketch: &Sketch,
    host: &HostMoves,
    places: &BTreeSet<usize>,
    order: &[u32],
    put: &mut dyn FnMut(Place, &[u8]),
) {
    let two_bit_bias = match &sketch.kind {
        SketchKind::Bits { two_bit_bias } => two_bit_bias.as_ref(),
        SketchKind::LowRank { .. } => None,
    };
    let values = [
        (SketchValue::Bias, Some(&sketch.bias)),
        (SketchValue::Floor, sketch.floor.as_ref()),
        (SketchValue::TwoBitBias, two_bit_bias),
    ];
    for (value, numbers) in values {
        let Some(numbers) = numbers else { continue };
        for place in places {
            let to = Place::Sketch {
                node: host.node,
                neuron: place - host.neurons.start,
                value,
            };
            put(to, &numbers[order[*place] as usize].to_le_bytes());
        }
    }
}

fn locked<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
