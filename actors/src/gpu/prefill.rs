//! Several tokens of a prompt at a time: all on the GPU. Neurons that it does not hold are streamed from the host's memory, a part
//! of a layer after the other, while the part before is multiplied.
#![allow(unsafe_code)]

use std::ops::Range;

use bytes::Bytes;
use pi_kernels::cuda::{
    Add, Device, DeviceBatch, DeviceBuffer, DeviceCache, DeviceRows, Event, Gates, GemmScratch,
    HostPlanes, HostRows, Registered, RopeAppend, RowsView, Stream, View, attend_batch, copy_in,
    gate_up_batch, gemm, is_supported, prepare_batch, rms_norm_batch, rope_append_batch, transpose,
    transposed_rows, unpack, unpack_planes,
};
use pi_kernels::ffn_sparse::sketch::planes::PlanesShape;
use pi_kernels::{ActivationMode, KernelError, Layout, MatrixShape, ROW_GROUP};

use super::gpu_model::gates_of;
use super::weights::{GpuDown, GpuFfn, GpuLayer, GpuRows, GpuWeights, values};
use crate::weights::{
    FfnShare, LayerShare, Matrix, ModelShape, ModelWeights, PlanesStore, SketchKind, UpRows,
};

/// Neurons that are multiplied together.
const NEURONS: usize = 2048;
/// Parts of layers that are on the device or on their way to it at a time.
const STAGES: usize = 4;
/// Tokens from which a product of several takes less time than one product a token.
const TOKENS_MIN: usize = 4;
/// Tokens from which streaming a layer's cold neurons takes less time than having the host compute them token by token: where it looks at
/// all gates of each token, and where predictors leave most neurons out.
const STREAMED_TOKENS_MIN: [usize; 2] = [8, 32];
/// What starts in a buffer at multiples of this suits every load.
const ALIGNMENT: usize = 256;
/// Memory is locked by pages: what is not farther apart is locked together.
const PAGE: usize = 4096;

/// Tokens from which layers' cold neurons are streamed. `predicted`: predictors name what the host looks at.
pub fn streamed_tokens_min(predicted: bool) -> usize {
    STREAMED_TOKENS_MIN[usize::from(predicted)]
}

/// Sizes that the memory for a prompt's tokens follows from.
#[derive(Debug, Clone, Copy)]
pub struct PrefillSizes {
    /// Tokens at a time.
    pub n_tokens: usize,
    /// The arithmetic.
    pub mode: ActivationMode,
    /// Bytes of the largest gate, up and down weights of a neuron, together.
    pub bundle_bytes: usize,
    /// Whether neurons of the host are streamed.
    pub streams: bool,
    /// Whether a down projection is plain, so that all of a layer's neurons are multiplied together.
    pub plain: bool,
}

impl PrefillSizes {
    /// Bytes of device memory that they take, with what rounding may add.
    pub fn bytes(&self, shape: &ModelShape) -> usize {
        /// The driver gives pieces of this many bytes, and there are about so many of them.
        const ROUNDING: usize = 24 * (2 << 20);
        /// For products in parts, of the largest devices.
        const SCRATCH: usize = 24 << 20;
        if self.n_tokens < TOKENS_MIN {
            return 0;
        }
        let part = NEURONS.min(shape.n_ff);
        // neurons whose weights and products are there at a time
        let together = if self.plain { shape.n_ff } else { part };
        let streamed = if self.streams {
            part * STAGES + together
        } else {
            0
        };
        let weight = match self.mode {
            ActivationMode::Q8 => 2,
            ActivationMode::F32 => 4,
        };
        let n_kv = shape.n_head_kv * shape.head_dim;
        let floats =
            shape.n_embd + 2 * shape.n_attn() + 2 * n_kv + 2 * shape.head_dim + 2 * together;
        let batches = shape.n_embd + shape.n_attn() + together;
        self.n_tokens * (4 * floats + weight * batches)
            + streamed * self.bundle_bytes
            + part * shape.n_embd * weight
            + SCRATCH
            + ROUNDING
    }
}

/// What is copied from the host together.
#[derive(Debug)]
struct ColdPart {
    work: ColdWork,
    /// What is copied, and where it goes in a stage: all pieces lie in these.
    copies: Vec<(Bytes, usize)>,
}

/// What is done with it.
#[derive(Debug)]
enum ColdWork {
    /// Neurons that are multiplied together.
    Neurons {
        gate: GatePiece,
        up: Piece,
        down: Piece,
    },
    /// Rows of a share whose down projection is plain: all of its neurons are multiplied when the last ones are there.
    Rows {
        rows: Piece,
        /// Gates, ups, or the down projection.
        of: usize,
        first: usize,
        /// The three matrices, if these are the last rows.
        all: Option<[DeviceRows; 3]>,
    },
}

impl ColdWork {
    /// Gates, ups and downs that are multiplied, as products take them.
    fn multiplied(&self) -> Option<[DeviceRows; 3]> {
        match self {
            ColdWork::Neurons { gate, up, down } => {
                Some([gate.device_rows(), up.shape.into(), down.shape.into()])
            }
            ColdWork::Rows { all, .. } => *all,
        }
    }
}

/// Rows within a stage.
#[derive(Debug, Clone, Copy)]
struct Piece {
    shape: MatrixShape,
    stride_bytes: usize,
    at: usize,
    bytes: usize,
}

impl Piece {
    fn rows<'a>(&self, stage: View<'a, u8>) -> HostRows<'a> {
        HostRows {
            shape: self.shape,
            stride_bytes: self.stride_bytes,
            bytes: stage.part(self.at..self.at + self.bytes),
        }
    }
}

/// Gates within a stage.
#[derive(Debug, Clone, Copy)]
enum GatePiece {
    Rows(Piece),
    /// In planes, which start there.
    Planes {
        shape: PlanesShape,
        top: usize,
        rest: usize,
    },
}

impl GatePiece {
    /// As products take them.
    fn device_rows(&self) -> DeviceRows {
        match self {
            GatePiece::Rows(piece) => DeviceRows::from(piece.shape),
            GatePiece::Planes { shape, .. } => HostPlanes::rows(*shape),
        }
    }

    /// Puts them in order, at the start of `to`.
    fn take(
        &self,
        stream: &Stream,
        stage: View<'_, u8>,
        to: &mut DeviceBuffer<u8>,
    ) -> Result<DeviceRows, KernelError> {
        let (shape, top, rest) = match *self {
            GatePiece::Rows(piece) => return take(stream, piece.rows(stage), to),
            GatePiece::Planes { shape, top, rest } => (shape, top, rest),
        };
        let planes = HostPlanes {
            shape,
            top: stage.part(top..top + shape.top_bytes()),
            rest: stage.part(rest..rest + shape.rest_bytes()),
        };
        let rows = HostPlanes::rows(shape);
        unpack_planes(stream, planes, to.view_mut(..rows.bytes()))?;
        Ok(rows)
    }
}

/// A part that is being put together.
#[derive(Default)]
struct Staged {
    copies: Vec<(Bytes, usize)>,
    end: usize,
}

impl Staged {
    fn copy(&mut self, bytes: Bytes) -> usize {
        let at = self.end.next_multiple_of(ALIGNMENT);
        self.end = at + bytes.len();
        self.copies.push((bytes, at));
        at
    }

    /// Rows `rows` of a matrix of their own; interleaved ones start at a group.
    fn matrix(&mut self, matrix: &Matrix, rows: Range<usize>) -> Piece {
        let row_bytes = matrix.shape.row_bytes();
        let together = matrix.shape.layout.rows_together();
        let end = rows.end.next_multiple_of(together);
        let bytes = matrix.bytes.slice(rows.start * row_bytes..end * row_bytes);
        let len = bytes.len();
        Piece {
            shape: MatrixShape {
                n_rows: rows.len(),
                ..matrix.shape
            },
            stride_bytes: row_bytes,
            at: self.copy(bytes),
            bytes: len,
        }
    }

    /// Rows `rows` of gates in planes, from a group's start on.
    fn planes(&mut self, planes: &PlanesStore, rows: Range<usize>) -> GatePiece {
        let shape = PlanesShape {
            n_rows: rows.len(),
            ..planes.shape
        };
        let before = PlanesShape {
            n_rows: rows.start,
            ..planes.shape
        };
        let slice = |all: &Bytes, at: usize, bytes: usize| all.slice(at..at + bytes);
        let top = slice(&planes.top, before.top_bytes(), shape.top_bytes());
        let rest = slice(&planes.rest, before.rest_bytes(), shape.rest_bytes());
        GatePiece::Planes {
            shape,
            top: self.copy(top),
            rest: self.copy(rest),
        }
    }
}

/// The share's neurons in parts, with the bytes of each; none where the device does not compute their formats.
fn parts(share: &LayerShare) -> Option<Vec<(ColdPart, usize)>> {
    let n = share.neurons.len();
    if n == 0 {
        return Some(vec![]);
    }
    let (up, rows) = match &share.ffn {
        FfnShare::Neurons { up, rows } => (up, rows),
        FfnShare::Dense { up, down } => {
            assert_eq!(share.gate.shape.n_rows, n, "no predictor has these gates");
            return parts_of_matrices([&share.gate, up, down]);
        }
    };
    let own_up = match up {
        UpRows::Interleaved(up) => Some(up),
        UpRows::Paired => None,
    };
    let up_quant = own_up.map(|up| up.shape.quant).or(rows.up)?;
    let planes = share.sketch.as_ref().and_then(|sketch| match &sketch.kind {
        SketchKind::Bits { planes, .. } => Some(planes),
        SketchKind::LowRank { .. } | SketchKind::Nothing => None,
    });
    let quants = [share.gate.shape.quant, up_quant, rows.down];
    if !quants.into_iter().all(is_supported) {
        return None;
    }
    let parts = (0..n).step_by(NEURONS).map(|first| {
        let neurons = first..(first + NEURONS).min(n);
        let mut staged = Staged::default();
        let gate = match planes {
            Some(planes) => staged.planes(planes, neurons.clone()),
            None => GatePiece::Rows(staged.matrix(&share.gate, neurons.clone())),
        };
        let record = rows.record_bytes();
        let bytes = rows
            .bytes
            .slice(neurons.start * record..neurons.end * record);
        let records = bytes.len();
        let at = staged.copy(bytes);
        let of_record = |quant, offset: usize| Piece {
            shape: MatrixShape {
                quant,
                n_rows: neurons.len(),
                n_cols: rows.n_embd,
                layout: Layout::Rows,
            },
            stride_bytes: record,
            at: at + offset,
            bytes: records - offset,
        };
        let down = of_record(rows.down, rows.up_row_bytes());
        let paired = of_record(up_quant, 0);
        let up = match own_up {
            Some(up) => staged.matrix(up, neurons),
            None => paired,
        };
        let part = ColdPart {
            work: ColdWork::Neurons { gate, up, down },
            copies: staged.copies,
        };
        (part, staged.end)
    });
    Some(parts.collect())
}

/// Parts of gates, ups and a plain down projection, `[n_embd, n_neurons]`: some rows of one of them each.
fn parts_of_matrices(matrices: [&Matrix; 3]) -> Option<Vec<(ColdPart, usize)>> {
    let shapes = matrices.map(|matrix| matrix.shape);
    if !shapes.iter().all(|shape| is_supported(shape.quant)) {
        return None;
    }
    let n = shapes[0].n_rows;
    // as much as a part of other shares has
    let bytes: usize = shapes.iter().map(MatrixShape::packed_bytes).sum();
    let most = bytes / n * NEURONS.min(n);
    let mut parts = Vec::new();
    for (of, matrix) in matrices.into_iter().enumerate() {
        let n_rows = matrix.shape.n_rows;
        let step = (most / matrix.shape.row_bytes() / ROW_GROUP).max(1) * ROW_GROUP;
        for first in (0..n_rows).step_by(step) {
            let end = (first + step).min(n_rows);
            let mut staged = Staged::default();
            let rows = staged.matrix(matrix, first..end);
            let is_last = of == matrices.len() - 1 && end == n_rows;
            let part = ColdPart {
                work: ColdWork::Rows {
                    rows,
                    of,
                    first,
                    all: is_last.then(|| shapes.map(DeviceRows::from)),
                },
                copies: staged.copies,
            };
            parts.push((part, staged.end));
        }
    }
    Some(parts)
}

const _: () = assert!(NEURONS.is_multiple_of(ROW_GROUP));

/// Where streamed weights go.
#[derive(Debug)]
struct Stage {
    bytes: DeviceBuffer<u8>,
    /// The weights are there.
    copied: Event,
    /// They have been used.
    used: Event,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Prefill {
    // first, so that it is given back before the memory that it names
    registered: Vec<Registered>,
    /// By layer.
    cold: Vec<Vec<ColdPart>>,
    copies: Stream,
    stages: Vec<Stage>,
    /// Stage of the next part.
    next: usize,
    /// Rows as products take them: gates, ups, downs; and downs by column.
    unpacked: [DeviceBuffer<u8>; 3],
    turned: DeviceBuffer<u8>,
    mode: ActivationMode,
    /// Tokens that fit.
    n_tokens_max: usize,
    /// Tokens from which it is used.
    pub n_tokens_min: usize,
    /// Residual stream `[n_tokens, n_embd]`.
    pub x: DeviceBuffer<f32>,
    pub rotation: DeviceBuffer<f32>,
    normed: DeviceBatch,
    q: DeviceBuffer<f32>,
    k: DeviceBuffer<f32>,
    v: DeviceBuffer<f32>,
    heads: DeviceBuffer<f32>,
    attn: DeviceBatch,
    gate: DeviceBuffer<f32>,
    up: DeviceBuffer<f32>,
    act: DeviceBatch,
    scratch: GemmScratch,
    /// Tokens under way.
    n_tokens: usize,
}

impl Prefill {
    /// Room for up to `n_tokens` tokens at a time; none where that gains nothing, or the device does not compute the format of the
    /// host's neurons. `tapped`: any number of tokens goes this way.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(
        weights: &GpuWeights,
        host: &ModelWeights,
        rope_len: usize,
        mode: ActivationMode,
        n_tokens: usize,
        tapped: bool,
    ) -> Result<Option<Self>, KernelError> {
        let (device, shape) = (&weights.device, &host.shape);
        let mut cold = Vec::new();
        let mut stage_bytes = 0;
        let mut predicted = weights.layers.iter().any(|layer| layer.ahead.is_some());
        for layer in &host.layers[weights.range()] {
            let mut of_layer = Vec::new();
            for share in &layer.shares {
                predicted |= share.sketch.is_some();
                let Some(parts) = parts(share) else {
                    return Ok(None);
                };
                for (part, bytes) in parts {
                    stage_bytes = stage_bytes.max(bytes);
                    of_layer.push(part);
                }
            }
            cold.push(of_layer);
        }
        let streams = cold.iter().any(|parts| !parts.is_empty());
        let n_tokens_min = match (tapped, streams) {
            (true, _) => 1,
            (false, true) => streamed_tokens_min(predicted),
            (false, false) => TOKENS_MIN,
        };
        if n_tokens < n_tokens_min {
            return Ok(None);
        }
        let plain = |ffn: &GpuFfn| matches!(ffn.down, GpuDown::Plain(_));
        let ffns = || weights.layers.iter().filter_map(|layer| layer.ffn.as_ref());
        let works = || cold.iter().flatten().map(|part| &part.work);
        let by_rows = |work: &ColdWork| matches!(work, ColdWork::Rows { .. });
        let together = match ffns().any(plain) || works().any(by_rows) {
            true => shape.n_ff,
            false => NEURONS.min(shape.n_ff),
        };
        let unpacked_bytes = |of: usize| {
            let all = works().filter_map(ColdWork::multiplied);
            all.map(|rows| rows[of].bytes()).max().unwrap_or(0)
        };
        let turned_bytes = {
            let hot = ffns().filter_map(|ffn| match ffn.down {
                GpuDown::Neurons(down) => Some(part_of(down.rows, down.rows.n_rows.min(NEURONS))),
                GpuDown::Plain(_) => None,
            });
            let cold = works().filter_map(|work| match work {
                ColdWork::Neurons { down, .. } => Some(DeviceRows::from(down.shape)),
                ColdWork::Rows { .. } => None,
            });
            let rows = hot.chain(cold);
            rows.map(|rows| transposed_rows(rows, mode).bytes()).max()
        };
        let n_kv = shape.n_head_kv * shape.head_dim;
        let floats = |n: usize| device.alloc::<f32>(n_tokens * n);
        let batch = |n: usize| DeviceBatch::new(device, mode, n_tokens, n);
        let stage = |_| {
            Ok(Stage {
                bytes: device.alloc(stage_bytes)?,
                copied: Event::new(device)?,
                used: Event::new(device)?,
            })
        };
        let n_stages = if streams { STAGES } else { 0 };
        Ok(Some(Self {
            registered: register(device, &cold),
            copies: device.stream()?,
            stages: (0..n_stages)
                .map(stage)
                .collect::<Result<_, KernelError>>()?,
            next: 0,
            unpacked: [
                device.alloc(unpacked_bytes(0))?,
                device.alloc(unpacked_bytes(1))?,
                device.alloc(unpacked_bytes(2))?,
            ],
            turned: device.alloc(turned_bytes.unwrap_or(0))?,
            cold,
            mode,
            n_tokens_max: n_tokens,
            n_tokens_min,
            x: floats(shape.n_embd)?,
            rotation: floats(rope_len)?,
            normed: batch(shape.n_embd)?,
            q: floats(shape.n_attn())?,
            k: floats(n_kv)?,
            v: floats(n_kv)?,
            heads: floats(shape.n_attn())?,
            attn: batch(shape.n_attn())?,
            gate: floats(together)?,
            up: floats(together)?,
            act: batch(together)?,
            scratch: GemmScratch::new(device)?,
            n_tokens: 0,
        }))
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        let floats = [
            &self.x,
            &self.rotation,
            &self.q,
            &self.k,
            &self.v,
            &self.heads,
            &self.gate,
            &self.up,
        ];
        let batches = [&self.normed, &self.attn, &self.act];
        let streamed = (self.unpacked.iter().chain([&self.turned]))
            .chain(self.stages.iter().map(|stage| &stage.bytes));
        floats.iter().map(|buffer| buffer.bytes()).sum::<usize>()
            + batches.iter().map(|batch| batch.bytes()).sum::<usize>()
            + streamed.map(DeviceBuffer::bytes).sum::<usize>()
            + self.scratch.bytes()
    }

    /// Bytes of a layer's neurons that are streamed.
    pub fn cold_bytes(&self, layer: usize) -> usize {
        let copies = self.cold[layer].iter().flat_map(|part| &part.copies);
        copies.map(|(bytes, _)| bytes.len()).sum()
    }

    /// Bytes of the host's memory that copies read where it is locked, and in all.
    pub fn streamed_bytes(&self) -> (usize, usize) {
        let all = (0..self.cold.len())
            .map(|layer| self.cold_bytes(layer))
            .sum();
        let locked = self.registered.iter().map(Registered::bytes).sum();
        (locked, all)
    }

    /// Takes the tokens' embeddings `[n_tokens, n_embd]` and rotations.
    ///
    /// # Errors
    /// The driver's.
    pub fn begin(&mut self, x: &[f32], rotation: &[f32]) -> Result<(), KernelError> {
        self.n_tokens = x.len() / (self.x.len() / self.n_tokens_max);
        assert!(self.n_tokens <= self.n_tokens_max, "tokens that fit");
        self.x.write(0, x)?;
        self.rotation.write(0, rotation)
    }

    /// Launches a layer's neurons, behind its attention.
    ///
    /// # Errors
    /// The driver's.
    pub fn neurons(
        &mut self,
        stream: &Stream,
        (index, layer): (usize, &GpuLayer),
        arena: &DeviceBuffer<u8>,
        shape: &ModelShape,
    ) -> Result<(), KernelError> {
        let n_x = self.n_tokens * shape.n_embd;
        rms_norm_batch(
            stream,
            self.x.view(..n_x),
            values(arena, &layer.ffn_norm),
            shape.rms_eps,
            None,
            &mut self.normed,
        )?;
        let gates = gates_of(shape, true);
        // hot and cold parts in turns, so that copies have products to hide behind
        let mut hot = match &layer.ffn {
            Some(ffn) => hot_parts(ffn),
            None => vec![],
        }
        .into_iter();
        let mut cold = 0..self.cold[index].len();
        loop {
            let (hot, cold) = (hot.next(), cold.next());
            if hot.is_none() && cold.is_none() {
                return Ok(());
            }
            if let Some(part) = cold {
                self.start_copy((index, part))?;
            }
            if let (Some(neurons), Some(ffn)) = (hot, &layer.ffn) {
                self.hot(stream, ffn, neurons, arena, gates)?;
            }
            if let Some(part) = cold {
                self.cold(stream, (index, part), gates)?;
            }
        }
    }

    /// Launches a layer's norm, queries, keys and values, attention and output projection.
    ///
    /// # Errors
    /// The driver's.
    pub fn attention(
        &mut self,
        stream: &Stream,
        layer: &GpuLayer,
        arena: &DeviceBuffer<u8>,
        shape: &ModelShape,
        (cache, position): (&mut DeviceCache, View<'_, u32>),
    ) -> Result<(), KernelError> {
        let n = self.n_tokens;
        let (n_x, n_q) = (n * shape.n_embd, n * shape.n_attn());
        let (q_rows, kv_rows) = (shape.n_attn(), shape.n_head_kv * shape.head_dim);
        let weight = values(arena, &layer.attn_norm);
        let (x, normed) = (self.x.view(..n_x), &mut self.normed);
        rms_norm_batch(stream, x, weight, shape.rms_eps, None, normed)?;
        let mut first = 0;
        for (to, n_rows) in [
            (&mut self.q, q_rows),
            (&mut self.k, kv_rows),
            (&mut self.v, kv_rows),
        ] {
            let rows = rows_of(&layer.qkv, first..first + n_rows);
            let add = match &layer.qkv_bias {
                Some(bias) => {
                    let at = bias.start + 4 * first;
                    Add::Values(values(arena, &(at..at + 4 * n_rows)))
                }
                None => Add::None,
            };
            let out = to.view_mut(..n * n_rows);
            gemm(
                stream,
                rows.view(arena),
                &self.normed,
                add,
                &mut self.scratch,
                out,
            )?;
            first += n_rows;
        }
        let n_kv = n * kv_rows;
        let rope_len = self.rotation.len() / self.n_tokens_max;
        rope_append_batch(
            stream,
            RopeAppend {
                q: self.q.view_mut(..n_q),
                k: self.k.view(..n_kv),
                v: self.v.view(..n_kv),
                rotation: self.rotation.view(..n * rope_len),
                pairs: shape.rope.pairs,
                position,
            },
            n,
            cache,
        )?;
        attend_batch(
            stream,
            self.mode,
            self.q.view(..n_q),
            n,
            cache,
            position,
            shape.window,
            shape.attn_scale,
            self.heads.view_mut(..n_q),
        )?;
        prepare_batch(stream, self.heads.view(..n_q), &mut self.attn)?;
        gemm(
            stream,
            layer.wo.view(arena),
            &self.attn,
            Add::Out,
            &mut self.scratch,
            self.x.view_mut(..n_x),
        )
    }

    /// Adds what some hot neurons give.
    fn hot(
        &mut self,
        stream: &Stream,
        ffn: &GpuFfn,
        neurons: Range<usize>,
        arena: &DeviceBuffer<u8>,
        gates: Gates,
    ) -> Result<(), KernelError> {
        let part = |rows: &GpuRows| rows_of(std::slice::from_ref(rows), neurons.clone());
        let (gate, up) = (part(&ffn.gate), part(&ffn.up));
        gate_up_products(
            stream,
            [gate.view(arena), up.view(arena)],
            &self.normed,
            &mut self.scratch,
            [&mut self.gate, &mut self.up],
            gates,
            &mut self.act,
        )?;
        match &ffn.down {
            GpuDown::Neurons(down) => {
                let turned = turn(stream, part(down).view(arena), self.mode, &mut self.turned)?;
                self.add_turned(stream, turned)
            }
            GpuDown::Plain(down) => add_products(
                stream,
                down.view(arena),
                &self.act,
                &mut self.scratch,
                &mut self.x,
            ),
        }
    }

    /// Lets a part's weights be copied to the next stage, as soon as that is free.
    fn start_copy(&mut self, (layer, part): (usize, usize)) -> Result<(), KernelError> {
        let stage = &mut self.stages[self.next];
        self.copies.wait_for(&stage.used)?;
        for (bytes, at) in &self.cold[layer][part].copies {
            let to = stage.bytes.view_mut(*at..at + bytes.len());
            // SAFETY: the bytes are written between steps alone, when streams have ended (`moving`), and this holds them;
            // streams end before it does.
            unsafe { copy_in(&self.copies, bytes, to)? };
        }
        stage.copied.record(&self.copies)
    }

    /// Adds what the neurons of a copied part give.
    fn cold(
        &mut self,
        stream: &Stream,
        (layer, part): (usize, usize),
        gates: Gates,
    ) -> Result<(), KernelError> {
        let part = &self.cold[layer][part];
        let stage = &self.stages[self.next];
        self.next = (self.next + 1) % self.stages.len();
        stream.wait_for(&stage.copied)?;
        let bytes = stage.bytes.view(..);
        // what lies as products take it is copied too: the stage is free for the next part before they begin
        let (gate, up, down) = match &part.work {
            ColdWork::Neurons { gate, up, down } => (gate, up, down.rows(bytes)),
            ColdWork::Rows {
                rows,
                of,
                first,
                all,
            } => {
                let on_device = DeviceRows::from(rows.shape);
                let at = first * on_device.row_bytes();
                let to = self.unpacked[*of].view_mut(at..at + on_device.bytes());
                unpack(stream, rows.rows(bytes), to)?;
                stage.used.record(stream)?;
                let all = *all;
                return all.map_or(Ok(()), |all| self.matrices(stream, all, gates));
            }
        };
        let [gate_rows, up_rows, downs] = &mut self.unpacked;
        let gate = gate.take(stream, bytes, gate_rows)?;
        let up = take(stream, up.rows(bytes), up_rows)?;
        let turned = match down.as_rows() {
            Some(rows) => turn(stream, rows, self.mode, &mut self.turned)?,
            None => {
                let rows = take(stream, down, downs)?;
                stream.start_next_late();
                turn(stream, dense(rows, downs), self.mode, &mut self.turned)?
            }
        };
        stage.used.record(stream)?;
        stream.start_next_late();
        let [gate_rows, up_rows, _] = &self.unpacked;
        gate_up_products(
            stream,
            [dense(gate, gate_rows), dense(up, up_rows)],
            &self.normed,
            &mut self.scratch,
            [&mut self.gate, &mut self.up],
            gates,
            &mut self.act,
        )?;
        self.add_turned(stream, turned)
    }

    /// Adds what the neurons of a share give, whose gates, ups and plain down projection are there.
    fn matrices(
        &mut self,
        stream: &Stream,
        [gate, up, down]: [DeviceRows; 3],
        gates: Gates,
    ) -> Result<(), KernelError> {
        let [gates_there, ups_there, downs_there] = &self.unpacked;
        stream.start_next_late();
        gate_up_products(
            stream,
            [dense(gate, gates_there), dense(up, ups_there)],
            &self.normed,
            &mut self.scratch,
            [&mut self.gate, &mut self.up],
            gates,
            &mut self.act,
        )?;
        let down = dense(down, downs_there);
        add_products(stream, down, &self.act, &mut self.scratch, &mut self.x)
    }

    /// Adds the products of turned rows and activations to the residual stream.
    fn add_turned(&mut self, stream: &Stream, rows: DeviceRows) -> Result<(), KernelError> {
        stream.start_next_late();
        let rows = dense(rows, &self.turned);
        add_products(stream, rows, &self.act, &mut self.scratch, &mut self.x)
    }
}

/// Adds products of rows and activations to the start of `x`, `[n_tokens, n_rows]`.
fn add_products(
    stream: &Stream,
    rows: RowsView<'_>,
    act: &DeviceBatch,
    scratch: &mut GemmScratch,
    x: &mut DeviceBuffer<f32>,
) -> Result<(), KernelError> {
    let n = act.n_tokens() * rows.rows().n_rows;
    gemm(stream, rows, act, Add::Out, scratch, x.view_mut(..n))
}

/// Activations of some neurons.
fn gate_up_products(
    stream: &Stream,
    [gate, up]: [RowsView<'_>; 2],
    x: &DeviceBatch,
    scratch: &mut GemmScratch,
    [gate_products, up_products]: [&mut DeviceBuffer<f32>; 2],
    gates: Gates,
    act: &mut DeviceBatch,
) -> Result<(), KernelError> {
    let n_rows = gate.rows().n_rows;
    let n = x.n_tokens() * n_rows;
    let products = gate_products.view_mut(..n);
    gemm(stream, gate, x, Add::None, scratch, products)?;
    gemm(stream, up, x, Add::None, scratch, up_products.view_mut(..n))?;
    act.set_columns(n_rows);
    let (gate, up) = (gate_products.view(..n), up_products.view(..n));
    gate_up_batch(stream, gate, up, gates, act)
}

/// Rows at the start of a buffer.
fn dense(rows: DeviceRows, buffer: &DeviceBuffer<u8>) -> RowsView<'_> {
    RowsView::dense(rows, buffer.view(..rows.bytes()))
}

/// Puts rows in order, at the start of `to`.
fn take(
    stream: &Stream,
    rows: HostRows<'_>,
    to: &mut DeviceBuffer<u8>,
) -> Result<DeviceRows, KernelError> {
    let on_device = DeviceRows::from(rows.shape);
    unpack(stream, rows, to.view_mut(..on_device.bytes()))?;
    Ok(on_device)
}

/// Writes the columns of `rows` to the start of `to`.
fn turn(
    stream: &Stream,
    rows: RowsView<'_>,
    mode: ActivationMode,
    to: &mut DeviceBuffer<u8>,
) -> Result<DeviceRows, KernelError> {
    let turned = transposed_rows(rows.rows(), mode);
    transpose(stream, rows, mode, to.view_mut(..turned.bytes()))?;
    Ok(turned)
}

/// Hot neurons that are multiplied together.
fn hot_parts(ffn: &GpuFfn) -> Vec<Range<usize>> {
    let n_hot = ffn.n_hot();
    let together = match ffn.down {
        GpuDown::Neurons(_) => NEURONS,
        GpuDown::Plain(_) => n_hot,
    };
    let firsts = (0..n_hot).step_by(together.max(1));
    firsts
        .map(|first| first..(first + together).min(n_hot))
        .collect()
}

fn part_of(rows: DeviceRows, n_rows: usize) -> DeviceRows {
    DeviceRows { n_rows, ..rows }
}

/// Some rows of consecutive pieces, all in one of them.
fn rows_of(pieces: &[GpuRows], rows: Range<usize>) -> GpuRows {
    let mut first = 0;
    for piece in pieces {
        let end = first + piece.rows.n_rows;
        if rows.end <= end {
            return GpuRows {
                rows: part_of(piece.rows, rows.len()),
                at: piece.at + (rows.start - first) * piece.rows.row_bytes(),
            };
        }
        first = end;
    }
    unreachable!("pieces end where queries, keys or values do")
}

/// Locks the memory that parts are copied from; what cannot be locked is copied as it is.
fn register(device: &Device, cold: &[Vec<ColdPart>]) -> Vec<Registered> {
    let copies = cold.iter().flatten().flat_map(|part| &part.copies);
    let ranges = copies.map(|(bytes, _)| {
        let start = bytes.as_ptr().expose_provenance();
        start..start + bytes.len()
    });
    let mut registered = Vec::new();
    for range in joined(ranges.collect()) {
        let bytes = range.len();
        // SAFETY: `cold` holds the memory, and what is given back after it is no longer locked; pages are mapped whole.
        match unsafe { Registered::new(device, range) } {
            Ok(locked) => registered.push(locked),
            Err(error) => {
                tracing::warn!("{bytes} bytes are copied more slowly: {error}");
            }
        }
    }
    registered
}

/// Ranges that may share a page, joined.
fn joined(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<usize>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end + PAGE => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use pi_kernels::QuantType;

    use super::*;

    fn matrix(quant: QuantType, n_rows: usize, n_cols: usize) -> Matrix {
        let shape = MatrixShape {
            quant,
            n_rows,
            n_cols,
            layout: Layout::Interleaved,
        };
        Matrix {
            shape,
            bytes: vec![0; shape.packed_bytes()].into(),
        }
    }

    /// Parts of a plain share have all rows of its matrices once, in whole groups, and are no larger than those of other shares.
    #[test]
    fn matrices_are_copied_in_parts() {
        for (n, n_embd) in [(6144usize, 256usize), (5000, 256), (32, 4096), (2048, 72)] {
            let down = matrix(QuantType::Q4_0, n_embd, n.next_multiple_of(32));
            let [gate, up] = [QuantType::Q8_0, QuantType::F16]
                .map(|quant| matrix(quant, n, n_embd.next_multiple_of(32)));
            let matrices = [&gate, &up, &down];
            let parts = parts_of_matrices(matrices).unwrap();
            let all: usize = matrices.iter().map(|matrix| matrix.bytes.len()).sum();
            let most = (all / n * NEURONS.min(n)).max(ROW_GROUP * down.shape.row_bytes());
            let mut ends = [0; 3];
            for (k, (part, bytes)) in parts.iter().enumerate() {
                let ColdWork::Rows {
                    rows,
                    of,
                    first,
                    all,
                } = &part.work
                else {
                    panic!("rows of matrices")
                };
                assert!(*bytes <= most, "{bytes} of {most}");
                assert_eq!(*first, ends[*of], "one behind the other");
                assert!(first.is_multiple_of(ROW_GROUP));
                ends[*of] += rows.shape.n_rows;
                assert_eq!(rows.bytes, *bytes);
                assert_eq!(all.is_some(), k + 1 == parts.len(), "multiplied at last");
            }
            assert_eq!(ends, matrices.map(|matrix| matrix.shape.n_rows));
            let copied: usize = parts.iter().map(|(_, bytes)| bytes).sum();
            assert_eq!(copied, all);
        }
        // (a format that does not run on GPUs)
        let other = matrix(QuantType::Q2_K, 256, 256);
        assert!(parts_of_matrices([&other, &other, &other]).is_none());
    }
}
