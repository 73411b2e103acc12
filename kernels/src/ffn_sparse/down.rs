//! `down`: Σ over neurons of activation · row, in the fixed order of the groups.

use std::ops::Range;

use super::NeuronRows;
use super::tree::{SUBTREES_MAX, TreeStack, n_subtrees};
use crate::activations::ActivationMode;
use crate::cpu::{Cpu, Tier};
use crate::matrix::StridedOut;
use crate::quant::{BLOCK, QuantType};

/// Whether activations are rounded to 8 bits: see [`rounded`].
fn is_rounded(cpu: Cpu, quant: QuantType) -> bool {
    cpu.mode() == ActivationMode::Q8 && quant == QuantType::Q4_0
}

/// One group of neurons, as a range of a list of active ones or of neuron ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupSpan {
    /// Number of the group, below [`super::FFN_GROUPS`].
    pub group: usize,
    /// Where its neurons are.
    pub span: Range<usize>,
}

fn owned(groups: &[GroupSpan]) -> Range<usize> {
    match (groups.first(), groups.last()) {
        (Some(first), Some(last)) => first.group..last.group + 1,
        _ => 0..0,
    }
}

fn check(down: &NeuronRows<'_>, groups: &[GroupSpan], cols: &Range<usize>, n_sums: usize) {
    assert!(
        cols.start.is_multiple_of(BLOCK) && cols.end.is_multiple_of(BLOCK),
        "whole blocks"
    );
    assert!(
        cols.end <= down.n_embd,
        "columns {cols:?} of {}",
        down.n_embd
    );
    let owned = owned(groups);
    assert_eq!(owned.len(), groups.len(), "consecutive groups");
    assert_eq!(n_subtrees(owned), n_sums, "one output per subtree");
}

/// Writes `Σ a[j] · down[ids[j]]` over columns `cols` (multiples of 32), one sum per complete
/// subtree of the groups, to `sums[n][..cols.len()]` (overwritten).
///
/// `ids` (`[n_active]`, ascending) and `a` (`[n_active]` f32) are this token's active neurons; the
/// spans of `groups` (consecutive groups) divide them.
///
/// # Panics
/// When shapes do not fit.
pub fn down_active(
    cpu: Cpu,
    down: NeuronRows<'_>,
    ids: &[u32],
    a: &[f32],
    groups: &[GroupSpan],
    cols: Range<usize>,
    sums: &mut [&mut [f32]],
) {
    check(&down, groups, &cols, sums.len());
    assert_eq!(ids.len(), a.len(), "one activation per id");
    #[cfg(target_arch = "x86_64")]
    if cpu.tier() >= Tier::Avx2 {
        let list = x86::Active {
            down,
            ids,
            a,
            groups,
        };
        // SAFETY: a `Cpu` exists only for tiers that the machine has.
        unsafe {
            match cpu.tier() {
                Tier::Avx512Vnni | Tier::Avx512Amx if is_rounded(cpu, down.quant) => {
                    rounded512::active(list, cols, sums);
                }
                _ if is_rounded(cpu, down.quant) => rounded::x86::active(list, cols, sums),
                Tier::Avx2 => x86::active_avx2(list, cols, sums),
                _ => x86::active_avx512(list, cols, sums),
            }
        }
        return;
    }
    debug_assert_eq!(cpu.tier(), Tier::Scalar);
    let mut row = vec![0.0; down.n_embd];
    let zero = vec![0.0f32; cols.len()];
    let mut join = Joiner::new();
    for GroupSpan { group, span } in groups {
        let mut y = zero.clone();
        if is_rounded(cpu, down.quant) {
            let span = GroupSpan {
                group: *group,
                span: span.clone(),
            };
            rounded::add_group(&down, ids, a, &span, cols.clone(), &mut y);
            join.push(*group, y);
            continue;
        }
        for j in span.clone() {
            down.matrix(ids[j] as usize).dequantize_row(0, &mut row);
            for (y, &w) in y.iter_mut().zip(&row[cols.clone()]) {
                *y = a[j].mul_add(w, *y);
            }
        }
        join.push(*group, y);
    }
    for (sum, y) in sums.iter_mut().zip(join.sums) {
        sum[..cols.len()].copy_from_slice(&y);
    }
}

/// Joins whole rows along the tree, as the specification has it.
struct Joiner {
    stack: TreeStack,
    sums: Vec<Vec<f32>>,
}

impl Joiner {
    fn new() -> Self {
        Self {
            stack: TreeStack::new(),
            sums: Vec::new(),
        }
    }

    fn push(&mut self, group: usize, y: Vec<f32>) {
        self.sums.push(y);
        for _ in 0..self.stack.push(group..group + 1) {
            let right = self.sums.pop().expect("a right half");
            let left = self.sums.last_mut().expect("a left half");
            for (left, right) in left.iter_mut().zip(right) {
                *left += right;
            }
        }
    }
}

/// Tokens that [`down_tokens`] takes at a time.
const TOKENS: usize = 64;
/// Neurons whose rows it holds as f32 at a time.
const NEURONS: usize = 32;
/// Columns that it holds at a time, at most.
const COLUMNS: usize = 128;
/// Values that it sums in for each subtree, at most.
const SUMS: usize = 4 * TOKENS * COLUMNS;

/// Memory that [`down_tokens`] works in, for one thread (about 1.2 MiB).
#[derive(Debug)]
pub struct DownScratch {
    rows: Vec<f32>,
    sums: Vec<f32>,
}

impl DownScratch {
    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.rows) + size_of_val(&*self.sums)
    }
}

impl Default for DownScratch {
    fn default() -> Self {
        Self {
            rows: vec![0.0; NEURONS * COLUMNS],
            sums: vec![0.0; (SUBTREES_MAX + 1) * SUMS],
        }
    }
}

/// As [`down_active`] for many tokens: `act` (`[n_tokens, stride]` f32, `stride ≥ n_neurons`)
/// holds the activation of every neuron, the spans of `groups` are ranges of neurons; `sums[n]` is
/// `[n_tokens, cols.len()]`. With `skip_zeros`, neurons whose activation is zero cost nothing. The
/// bits equal [`down_active`]'s.
///
/// # Panics
/// When shapes do not fit.
pub fn down_tokens(
    cpu: Cpu,
    down: NeuronRows<'_>,
    act: &[f32],
    stride: usize,
    groups: &[GroupSpan],
    cols: Range<usize>,
    skip_zeros: bool,
    scratch: &mut DownScratch,
    sums: &mut [StridedOut<'_>],
) {
    check(&down, groups, &cols, sums.len());
    assert!(
        stride >= down.n_neurons,
        "stride {stride} of {} neurons",
        down.n_neurons
    );
    let Some(n_tokens) = sums.first().map(StridedOut::n_tokens) else {
        return;
    };
    assert!(
        act.len() >= n_tokens.saturating_sub(1) * stride + down.n_neurons,
        "activations fit"
    );
    if cpu.tier() == Tier::Scalar {
        for t in 0..n_tokens {
            let act = &act[t * stride..][..down.n_neurons];
            let taken = |id: &u32| !skip_zeros || act[*id as usize] != 0.0;
            let ids: Vec<u32> = (0..down.n_neurons as u32).filter(taken).collect();
            let a: Vec<f32> = ids.iter().map(|&id| act[id as usize]).collect();
            let before = |neuron: usize| ids.partition_point(|&id| (id as usize) < neuron);
            let groups: Vec<GroupSpan> = groups
                .iter()
                .map(|of| GroupSpan {
                    group: of.group,
                    span: before(of.span.start)..before(of.span.end),
                })
                .collect();
            let mut rows: Vec<&mut [f32]> = sums.iter_mut().map(|sum| sum.row(t)).collect();
            down_active(cpu, down, &ids, &a, &groups, cols.clone(), &mut rows);
        }
        return;
    }
    let rounded = is_rounded(cpu, down.quant);
    #[cfg(target_arch = "x86_64")]
    let batch = |tokens: Range<usize>| x86::Batch {
        down,
        act: &act[tokens.start * stride..],
        stride,
        groups,
        tokens,
        skip_zeros,
    };
    #[cfg(target_arch = "x86_64")]
    if rounded && cpu.tier() >= Tier::Avx512Vnni {
        for first in (0..n_tokens).step_by(tokens512::TOKENS) {
            let tokens = first..(first + tokens512::TOKENS).min(n_tokens);
            // SAFETY: a `Cpu` exists only for tiers that the machine has.
            unsafe {
                if tokens512::pays(&batch(tokens.clone())) {
                    tokens512::tokens(&batch(tokens), cols.clone(), scratch, sums);
                    continue;
                }
                for first in tokens.clone().step_by(x86::TOKENS_ROUNDED) {
                    let few = first..(first + x86::TOKENS_ROUNDED).min(tokens.end);
                    rounded512::tokens(&batch(few), cols.clone(), scratch, sums);
                }
            }
        }
        return;
    }
    #[cfg(target_arch = "x86_64")]
    let step = if rounded { x86::TOKENS_ROUNDED } else { TOKENS };
    #[cfg(target_arch = "x86_64")]
    for first in (0..n_tokens).step_by(step) {
        let batch = batch(first..(first + step).min(n_tokens));
        // SAFETY: a `Cpu` exists only for tiers that the machine has; not scalar here.
        unsafe {
            match cpu.tier() {
                _ if rounded => rounded::x86::tokens(&batch, cols.clone(), scratch, sums),
                Tier::Avx2 => x86::tokens_avx2(&batch, cols.clone(), scratch, sums),
                _ => x86::tokens_avx512(&batch, cols.clone(), scratch, sums),
            }
        }
    }
}

mod rounded;
mod rounded512;
#[cfg(target_arch = "x86_64")]
mod strips;
mod tokens512;
#[cfg(target_arch = "x86_64")]
mod x86;
