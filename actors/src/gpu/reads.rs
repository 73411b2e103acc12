//! What a GPU reads of a layer, for a token and for several of a prompt.

use std::ops::Range;

use pi_kernels::attention::KvType;

use super::weights::{GpuAhead, GpuDown, GpuLayer, GpuRows};
use crate::counters::Counters;
use crate::weights::ModelShape;

/// A layer's hot neurons in a token, as its kernels counted them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HotCounted {
    /// Those whose gate was computed.
    pub candidates: u32,
    /// Those among them whose activation was not zero.
    pub open: u32,
}

/// Which rows of a layer are read besides those of neurons that fire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RowsRead {
    /// Ups of all candidates, as gates never close.
    pub ups: bool,
    /// All rows of all candidates.
    pub all: bool,
}

/// Work of a token in a layer.
pub(super) fn of_token(layer: &GpuLayer, counted: HotCounted, read_too: RowsRead) -> Counters {
    let dense = read_too.all;
    let HotCounted { candidates, open } = counted;
    let (candidates, open) = (candidates as usize, open as usize);
    let mut bytes = attention_bytes(layer) + layer.ahead.as_ref().map_or(0, ahead_bytes);
    let mut neurons = 0;
    if let Some(ffn) = &layer.ffn {
        neurons = ffn.n_hot();
        let listed = layer.ahead.as_ref().is_some_and(|ahead| ahead.alone);
        // of a list all are read before it is known which of them fire
        let up_rows = if dense || read_too.ups || listed {
            candidates
        } else {
            open
        };
        let down_bytes = match &ffn.down {
            GpuDown::Neurons(down) if dense || listed => candidates * row_bytes(down),
            GpuDown::Neurons(down) => open * row_bytes(down),
            GpuDown::Plain(down) => down.rows.bytes(),
        };
        bytes += candidates * row_bytes(&ffn.gate) + up_rows * row_bytes(&ffn.up) + down_bytes;
    }
    Counters {
        neurons: neurons as u64,
        candidates: candidates as u64,
        active_neurons: open as u64,
        ..read(bytes)
    }
}

/// Work of several tokens in a layer, `streamed_bytes` of whose neurons come from the host: nobody counts which of them fire.
pub(super) fn of_batch(layer: &GpuLayer, streamed_bytes: usize) -> Counters {
    let hot = layer.ffn.as_ref().map_or(0, |ffn| {
        let down = match &ffn.down {
            GpuDown::Neurons(down) | GpuDown::Plain(down) => down,
        };
        [&ffn.gate, &ffn.up, down]
            .map(|rows| rows.rows.bytes())
            .iter()
            .sum()
    });
    read(attention_bytes(layer) + hot + streamed_bytes)
}

/// Work of the head, for one token.
pub(super) fn of_head(rows: &GpuRows, norm: &Range<usize>) -> Counters {
    read(rows.rows.bytes() + norm.len())
}

/// Cached keys and values that the tokens at `positions` see, once.
pub(super) fn of_cache(shape: &ModelShape, kv_type: KvType, positions: Range<usize>) -> Counters {
    let seen = positions.end - shape.first_seen(positions.start);
    let bytes = 2 * seen * shape.n_head_kv * kv_type.row_bytes(shape.head_dim);
    Counters {
        kv_bytes: bytes as u64,
        gpu_bytes: bytes as u64,
        ..Counters::default()
    }
}

fn read(weight_bytes: usize) -> Counters {
    Counters {
        weight_bytes: weight_bytes as u64,
        gpu_bytes: weight_bytes as u64,
        ..Counters::default()
    }
}

/// Both norms, and all matrices before the second.
fn attention_bytes(layer: &GpuLayer) -> usize {
    let qkv: usize = layer.qkv.iter().map(|rows| rows.rows.bytes()).sum();
    let values = [&layer.attn_norm, &layer.ffn_norm].map(Range::len);
    let bias = layer.qkv_bias.as_ref().map_or(0, Range::len);
    qkv + layer.wo.rows.bytes() + values.iter().sum::<usize>() + bias
}

fn ahead_bytes(ahead: &GpuAhead) -> usize {
    let a_bias = ahead.a_bias.as_ref().map_or(0, Range::len);
    ahead.a.rows.bytes() + ahead.b.rows.bytes() + a_bias + ahead.b_bias.len()
}

fn row_bytes(rows: &GpuRows) -> usize {
    rows.rows.row_bytes()
}
