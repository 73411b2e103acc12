//! Gates that a small predictor knows in part, although every row is full of weights of its own type.
//!
//! The changing columns are cut into groups. For each group the layer has a few patterns, which are the predictor's
//! rows. A gate row takes in each group one of the patterns, with either sign, or (in a few of its groups) weights of
//! its own, which no predictor knows. So the known parts of all rows span the patterns' space, and the row of the
//! predictor's second matrix has ±1 where the neuron took a pattern.

use std::ops::Range;
use std::sync::Arc;

use pi_kernels::QuantType;

use super::blocks::{RandomBlocks, fill_constant, fill_negated, unit_values};
use super::layout::Channels;
use super::random::Random;
use super::rows::Rows;

/// Groups that the columns are cut into, where there are enough blocks.
const N_GROUPS: usize = 8;

/// The cut of a gate row, the same in all layers.
#[derive(Debug, Clone)]
pub(super) struct GateForm {
    pub quant: QuantType,
    pub channels: Channels,
    /// Bytes of the changing columns in each group, as ranges of the row.
    groups: Vec<Range<usize>>,
    /// Patterns of all groups: rows of the predictor's first matrix.
    pub rank: usize,
    /// Share of a row's groups that have weights of their own.
    own_share: f64,
}

/// What a neuron took in a group.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Choice {
    Own,
    Pattern { index: usize, negated: bool },
}

impl GateForm {
    /// Rows of `channels.n_embd` values of which the predictor's `rank` patterns know the share `known` of the energy.
    ///
    /// `rank` is a multiple of 32.
    pub fn new(quant: QuantType, channels: Channels, rank: usize, known: f64) -> Self {
        let unit = unit_values(quant);
        let n_units = channels.n_changing() / unit;
        // as many patterns in each group
        let n_groups = (1..=N_GROUPS.min(n_units))
            .rev()
            .find(|n_groups| rank.is_multiple_of(*n_groups))
            .unwrap_or(1);
        let column = |group: usize| channels.n_constant + n_units * group / n_groups * unit;
        let at = |group: usize| quant.row_bytes(column(group));
        Self {
            quant,
            channels,
            groups: (0..n_groups)
                .map(|group| at(group)..at(group + 1))
                .collect(),
            rank,
            own_share: 1.0 - known,
        }
    }

    fn patterns_of_group(&self) -> usize {
        self.rank / self.groups.len()
    }

    /// What a neuron takes in each group, from the start of its row's numbers.
    fn choices(&self, random: &mut Random) -> Vec<Choice> {
        let n_groups = self.groups.len();
        let own = self.own_share * n_groups as f64;
        let one_more = (random.next() >> 11) as f64 / (1u64 << 53) as f64;
        let n_own = own as usize + usize::from(one_more < own.fract());
        let mut is_own: Vec<bool> = (0..n_groups).map(|group| group < n_own).collect();
        random.shuffle(&mut is_own);
        is_own
            .into_iter()
            .map(|is_own| match is_own {
                true => Choice::Own,
                false => Choice::Pattern {
                    index: random.below(self.patterns_of_group()),
                    negated: random.next() & 1 == 1,
                },
            })
            .collect()
    }
}

/// A layer's patterns.
#[derive(Debug)]
pub(super) struct Patterns {
    form: GateForm,
    blocks: RandomBlocks,
    /// Of each group, pattern after pattern: the bytes, and with the other sign.
    bytes: Vec<[Vec<u8>; 2]>,
}

impl Patterns {
    /// Draws the patterns of a layer; gates have standard deviation 1 where channels have.
    pub fn new(form: &GateForm, mut random: Random) -> Self {
        let std = 1.0 / (form.channels.n_changing() as f64).sqrt();
        let blocks = RandomBlocks::new(form.quant, std);
        let draw = |group: &Range<usize>| {
            let mut plain = vec![0; group.len() * form.patterns_of_group()];
            blocks.fill(&mut random, &mut plain);
            let mut negated = vec![0; plain.len()];
            fill_negated(form.quant, &plain, &mut negated);
            [plain, negated]
        };
        let bytes = form.groups.iter().map(draw).collect();
        Self {
            form: form.clone(),
            blocks,
            bytes,
        }
    }

    fn pattern(&self, group: usize, index: usize, negated: bool) -> &[u8] {
        let len = self.form.groups[group].len();
        &self.bytes[group][usize::from(negated)][index * len..][..len]
    }
}

/// `ffn_gate`: `[n_ff, n_embd]`.
#[derive(Debug)]
pub(super) struct GateRows {
    pub patterns: Arc<Patterns>,
    /// `[n_ff]`
    pub offsets: Arc<[f64]>,
}

impl Rows for GateRows {
    fn write(&self, row: usize, mut random: Random, out: &mut [u8]) {
        let Patterns { form, blocks, .. } = &*self.patterns;
        let choices = form.choices(&mut random);
        let constant = form.quant.row_bytes(form.channels.n_constant);
        let value = self.offsets[row] / form.channels.n_constant as f64;
        fill_constant(form.quant, value, &mut out[..constant]);
        for (group, choice) in choices.into_iter().enumerate() {
            let part = &mut out[form.groups[group].clone()];
            match choice {
                Choice::Own => blocks.fill(&mut random, part),
                Choice::Pattern { index, negated } => {
                    part.copy_from_slice(self.patterns.pattern(group, index, negated));
                }
            }
        }
    }
}

/// The predictor's first matrix, `[rank, n_embd]`: the patterns.
#[derive(Debug)]
pub(super) struct PatternRows(pub Arc<Patterns>);

impl Rows for PatternRows {
    fn write(&self, row: usize, _: Random, out: &mut [u8]) {
        let form = &self.0.form;
        let (group, index) = (
            row / form.patterns_of_group(),
            row % form.patterns_of_group(),
        );
        out.fill(0);
        out[form.groups[group].clone()].copy_from_slice(self.0.pattern(group, index, false));
    }
}

/// The predictor's second matrix, `[n_ff, rank]` in [`CHOICE_TYPE`]: each neuron's patterns, times `scale`.
#[derive(Debug)]
pub(super) struct ChoiceRows {
    pub patterns: Arc<Patterns>,
    pub scale: f64,
}

/// Type of the predictor's second matrix.
pub(super) const CHOICE_TYPE: QuantType = QuantType::Q4_0;

impl Rows for ChoiceRows {
    /// `random` has to be that of the gate's row.
    fn write(&self, _: usize, mut random: Random, out: &mut [u8]) {
        let form = &self.patterns.form;
        let scale = half::f16::from_f64(self.scale / 7.0).to_le_bytes();
        for block in out.chunks_exact_mut(CHOICE_TYPE.block_bytes()) {
            block.fill(0x88);
            block[..2].copy_from_slice(&scale);
        }
        for (group, choice) in form.choices(&mut random).into_iter().enumerate() {
            let Choice::Pattern { index, negated } = choice else {
                continue;
            };
            let column = group * form.patterns_of_group() + index;
            let (block, k) = (column / 32, column % 32);
            let byte = &mut out[block * CHOICE_TYPE.block_bytes() + 2 + k % 16];
            let code = if negated { 8 - 7 } else { 8 + 7 };
            *byte = match k < 16 {
                true => *byte & 0xf0 | code,
                false => *byte & 0x0f | code << 4,
            };
        }
    }
}
