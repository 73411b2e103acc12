//! Thresholds that skip a wanted share of the neurons, and the bytes that they save.

use std::sync::Arc;

use pi_kernels::QuantType;

use super::distribution::thresholds;
use super::fragility::Fragility;
use super::samples::LayerStatistics;
use crate::model::Hyperparameters;
use crate::model::footprint::Footprint;
use crate::model::quantize::WRITABLE_TYPES;
use crate::model::sparsity::{DownStored, SparsityPlan};
use crate::model::tensors::{LayerTensors, ModelTensors};
use crate::model::threshold::{Criterion, LayerThresholds, Thresholds};
use crate::model::{GateKind, ModelError};

/// A way to skip: by what, and in which type rows of down lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    /// What is compared with thresholds.
    pub criterion: Criterion,
    /// Type of the rows where the file has a quantised plain down projection; the others keep theirs.
    pub down: Option<QuantType>,
    /// How many of the layers whose rows would be quantised again run as in `off`: those that bear it worst.
    pub spared: usize,
}

/// How the skipped share is divided over the layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Division {
    /// The same share in each.
    Equal,
    /// What a neuron adds is compared with the residual stream that it is added to: the same fraction of its length
    /// in each layer.
    ByResidual,
}

/// Thresholds to be tried.
#[derive(Debug, Clone)]
pub struct Proposal {
    /// Who they are for.
    pub way: Way,
    /// Share of the neurons that was wanted to be skipped, in layers with thresholds or not.
    pub wanted: f64,
    /// The thresholds; layers that would read more bytes with them have none.
    pub thresholds: Arc<Thresholds>,
    /// Weight bytes of a decoded token, by the samples.
    pub bytes: f64,
}

/// Makes proposals for a model.
#[derive(Debug)]
pub struct Proposer<'a> {
    hyper: &'a Hyperparameters,
    tensors: &'a ModelTensors,
    layers: &'a [LayerStatistics],
    division: Division,
    fragility: Option<&'a Fragility>,
    bytes_off: f64,
}

impl<'a> Proposer<'a> {
    /// For a model whose layers behave so.
    ///
    /// # Errors
    /// [`ModelError::GatesClose`] for ReLU gates.
    pub fn new(
        hyper: &'a Hyperparameters,
        tensors: &'a ModelTensors,
        layers: &'a [LayerStatistics],
        division: Division,
    ) -> Result<Self, ModelError> {
        if hyper.gate == GateKind::Relu {
            return Err(ModelError::GatesClose);
        }
        let off = SparsityPlan::resolve(None, hyper.gate, &tensors.stored_downs())?;
        Ok(Self {
            hyper,
            tensors,
            layers,
            division,
            fragility: None,
            bytes_off: Footprint::of(hyper, tensors, &off).bytes(1.0) as f64,
        })
    }

    /// The same, spared the layers that are worst by `fragility`.
    pub fn sparing(self, fragility: &'a Fragility) -> Self {
        Self {
            fragility: Some(fragility),
            ..self
        }
    }

    /// Layers whose rows of down a way quantises again.
    pub fn requantised(&self) -> Vec<usize> {
        let layers = self.tensors.layers.iter().enumerate();
        let again = layers.filter(|(_, layer)| match layer.down.stored() {
            DownStored::Plain(quant) => quant.is_quantised(),
            DownStored::NeuronMajor(_) => false,
        });
        again.map(|(index, _)| index).collect()
    }

    /// Weight bytes of a decoded token in `off`.
    pub fn bytes_off(&self) -> f64 {
        self.bytes_off
    }

    /// All ways that may save bytes, those first that save most at a given share.
    pub fn ways(&self) -> Vec<Way> {
        let plain = self
            .tensors
            .layers
            .iter()
            .filter_map(|layer| match layer.down.stored() {
                DownStored::Plain(quant) if quant.is_quantised() => Some(quant),
                _ => None,
            });
        let smallest = plain.min_by(|a, b| bits(*a).total_cmp(&bits(*b)));
        let downs: Vec<Option<QuantType>> = match smallest {
            None => vec![None],
            Some(from) => {
                let mut types: Vec<QuantType> = WRITABLE_TYPES
                    .into_iter()
                    .filter(|to| to.is_quantised() && bits(*to) >= bits(from))
                    .filter(|to| self.hyper.n_embd.is_multiple_of(to.block_values()))
                    .collect();
                types.sort_by(|a, b| bits(*a).total_cmp(&bits(*b)));
                types.into_iter().map(Some).collect()
            }
        };
        let counts = self.fragility.map_or(vec![0], Fragility::counts);
        let of = |criterion| {
            counts.iter().flat_map({
                let downs = &downs;
                move |spared| {
                    downs.iter().map(move |down| Way {
                        criterion,
                        down: *down,
                        spared: *spared,
                    })
                }
            })
        };
        of(Criterion::Product).chain(of(Criterion::Gate)).collect()
    }

    /// Thresholds that skip `share` of the neurons by `way`, in the layers where that saves bytes.
    pub fn propose(&self, way: Way, share: f64) -> Proposal {
        self.proposal(way, share, false)
    }

    /// The same in all layers that are not spared, whether it saves bytes or not.
    pub fn propose_all(&self, way: Way, share: f64) -> Proposal {
        self.proposal(way, share, true)
    }

    fn proposal(&self, way: Way, share: f64, in_all: bool) -> Proposal {
        let taus = self.taus(way.criterion, share);
        let (mut bytes, mut skipped) = (self.bytes_off, 0.0);
        let spared = self.fragility.map_or(&[][..], |of| of.worst(way.spared));
        let layers = self.layers.iter().zip(&self.tensors.layers).zip(taus);
        let layers = layers
            .enumerate()
            .map(|(index, ((statistics, tensors), tau))| {
                let share = statistics.by(way.criterion).share(tau);
                let down = down_type(way, tensors.down.stored());
                let saved = self.saved_bytes(way.criterion, tensors, down, share);
                if saved <= 0.0 && !in_all || spared.contains(&index) {
                    return None;
                }
                bytes -= saved;
                skipped += share / self.layers.len() as f64;
                Some(LayerThresholds {
                    criterion: way.criterion,
                    down,
                    values: thresholds(tau, &statistics.down_norms),
                })
            });
        let layers = layers.collect();
        Proposal {
            way,
            wanted: share,
            thresholds: Arc::new(Thresholds { layers, skipped }),
            bytes,
        }
    }

    /// Bytes of a decoded token that a layer's thresholds save.
    fn saved_bytes(
        &self,
        criterion: Criterion,
        tensors: &LayerTensors,
        down: QuantType,
        share: f64,
    ) -> f64 {
        let rows = (self.hyper.n_ff * down.row_bytes(self.hyper.n_embd)) as f64;
        let up = tensors.up.bytes.len() as f64;
        let off = up + tensors.down.matrix().bytes.len() as f64;
        let read = match criterion {
            Criterion::Gate => (1.0 - share) * (up + rows),
            Criterion::Product => up + (1.0 - share) * rows,
        };
        off - read - (self.hyper.n_ff * size_of::<f32>()) as f64
    }

    /// The largest contribution to be left out in each layer, so that `share` is left out in all.
    fn taus(&self, criterion: Criterion, share: f64) -> Vec<f32> {
        let of = |layer: &'a LayerStatistics| layer.by(criterion);
        match self.division {
            Division::Equal => self
                .layers
                .iter()
                .map(|layer| of(layer).tau(share))
                .collect(),
            Division::ByResidual => {
                let at = |fraction: f32| {
                    let taus = self
                        .layers
                        .iter()
                        .map(move |layer| fraction * layer.residual_length);
                    taus.collect::<Vec<f32>>()
                };
                let mean = |fraction: f32| {
                    let shares = self.layers.iter().zip(at(fraction));
                    let sum: f64 = shares.map(|(layer, tau)| of(layer).share(tau)).sum();
                    sum / self.layers.len() as f64
                };
                // halves of the exponent: from far below any contribution to far above
                let (mut low, mut high) = (-40.0f32, 20.0f32);
                for _ in 0..40 {
                    let middle = (low + high) / 2.0;
                    if mean(middle.exp2()) < share {
                        low = middle;
                    } else {
                        high = middle;
                    }
                }
                at(high.exp2())
            }
        }
    }
}

fn bits(quant: QuantType) -> f64 {
    quant.block_bytes() as f64 * 8.0 / quant.block_values() as f64
}

/// Type of a layer's rows: never with fewer bits than in the file, where skipping would not be what saves.
fn down_type(way: Way, stored: DownStored) -> QuantType {
    match (stored, way.down) {
        (DownStored::Plain(from), Some(to)) if from.is_quantised() => {
            if bits(to) >= bits(from) {
                to
            } else {
                QuantType::Q8_0
            }
        }
        (DownStored::Plain(from) | DownStored::NeuronMajor(from), _) => from,
    }
}
