//! Lists of active neurons.

use super::buffer::{View, ViewMut};
use super::rows::NeuronList;
use super::stream::{Grid, Stream};
use crate::error::KernelError;

/// Threads of a block, and values.
const THREADS: usize = 1024;

#[repr(C)]
struct CompactArgs {
    values: u64,
    thresholds: u64,
    n: u32,
    first_id: u32,
    ids: u64,
    kept: u64,
    count: u64,
}

const _: () = assert!(size_of::<CompactArgs>() == 48);

/// Writes the ids (`first_id` + index) of the active ones of `values` (`[n]` f32) in ascending order to `ids` (`[n]`
/// u32), their values to `kept` (`[n]` f32), and how many there are to `count` (`[1]` u32). Places behind the count
/// are left alone.
///
/// Active are values above zero, as in [`crate::ffn_sparse::gate_active`]; with `thresholds` (`[n]` f32) those whose
/// magnitude is above theirs, as in [`crate::ffn_sparse::large_active`]. NaN is active in both.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes or devices do not fit.
pub fn compact(
    stream: &Stream,
    values: View<'_, f32>,
    thresholds: Option<View<'_, f32>>,
    first_id: u32,
    ids: ViewMut<'_, u32>,
    kept: Option<ViewMut<'_, f32>>,
    count: ViewMut<'_, u32>,
) -> Result<(), KernelError> {
    let n = values.len();
    assert_eq!(ids.len(), n, "room for all ids");
    assert_eq!(count.len(), 1, "one count");
    stream.check(&[values.device(), ids.device(), count.device()]);
    if let Some(thresholds) = &thresholds {
        assert_eq!(thresholds.len(), n, "a threshold for each value");
        stream.check(&[thresholds.device()]);
    }
    if let Some(kept) = &kept {
        assert_eq!(kept.len(), n, "room for all values");
        stream.check(&[kept.device()]);
    }
    let args = CompactArgs {
        values: values.address(),
        thresholds: thresholds.map_or(0, |thresholds| thresholds.address()),
        n: n as u32,
        first_id,
        ids: ids.address(),
        kept: kept.map_or(0, |kept| kept.address()),
        count: count.address(),
    };
    let grid = Grid {
        blocks: [n.div_ceil(THREADS).max(1), 1],
        threads: THREADS,
        shared_bytes: 0,
    };
    let function = stream.functions().compact;
    // SAFETY: all lengths fit (asserted).
    unsafe { stream.launch("launch compact", function, grid, args) }
}

#[repr(C)]
struct CountActiveArgs {
    act: u64,
    count: u64,
    counts: u64,
    n: u32,
}

const _: () = assert!(size_of::<CountActiveArgs>() == 32);

/// Writes to `counts` (`[2]` u32 in the host's memory) how many neurons `act` (`[n]` f32, of all neurons or of the list's) has, and how
/// many of these are not zero.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes or devices do not fit.
pub fn count_active(
    stream: &Stream,
    act: View<'_, f32>,
    list: NeuronList<'_>,
    counts: View<'_, u32>,
) -> Result<(), KernelError> {
    let (_, count, n_max) = list.raw(stream, act.len());
    assert_eq!(n_max, act.len(), "activations of all that may be listed");
    assert_eq!(counts.len(), 2, "two counts");
    stream.check(&[act.device(), counts.device()]);
    let args = CountActiveArgs {
        act: act.address(),
        count,
        counts: counts.address(),
        n: act.len() as u32,
    };
    let grid = Grid {
        blocks: [1, 1],
        threads: THREADS,
        shared_bytes: 0,
    };
    let function = stream.functions().count_active;
    // SAFETY: all lengths fit (asserted).
    unsafe { stream.launch("launch count_active", function, grid, args) }
}
