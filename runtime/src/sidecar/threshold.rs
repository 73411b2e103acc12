//! The sidecar's section of thresholds: for models whose gates never close.

use pi_kernels::QuantType;

use super::{Sidecar, SidecarError};
use crate::gguf::{GgmlType, GgufError, GgufStream, GgufWriter};
use crate::model::Hyperparameters;
use crate::model::sparsity::{DownStored, writable_type};
use crate::model::threshold::{Criterion, LayerThresholds, Thresholds};

/// By layer: "gate", "product", or "none" where all neurons are computed.
const CRITERION_KEY: &str = "sparse.threshold.criterion";
/// By layer: type of the down rows in memory, or "none".
const DOWN_TYPE_KEY: &str = "sparse.threshold.down_type";
const GAINS_KEY: &str = "sparse.threshold.gains";
const NONE: &str = "none";

fn key(figure: &str) -> String {
    format!("sparse.threshold.{figure}")
}

fn tensor(layer: usize) -> String {
    format!("blk.{layer}.threshold")
}

/// What the calibration measured, against `off`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ThresholdFigures {
    /// How much perplexity may rise: 0.005 is half a percent.
    pub budget: f64,
    /// Perplexity of the calibration text in `off`.
    pub ppl_off: f64,
    /// The same with the thresholds.
    pub ppl_threshold: f64,
    /// Standard error of the relative rise.
    pub rise_error: f64,
    /// Share of all neurons left out.
    pub skipped: f64,
    /// Weight bytes read for a token in `off`.
    pub bytes_off: f64,
    /// The same with the thresholds.
    pub bytes_threshold: f64,
    /// Tokens decoded per second in `off`; 0 where it was not measured.
    pub tok_s_off: f64,
    /// The same with the thresholds.
    pub tok_s_threshold: f64,
    /// Whether the thresholds make decoding faster within the budget.
    pub gains: bool,
}

impl ThresholdFigures {
    /// How much perplexity rises: 0.01 is one percent.
    pub fn rise(&self) -> f64 {
        self.ppl_threshold / self.ppl_off - 1.0
    }

    fn numbers(&self) -> [(&'static str, f64); 9] {
        [
            ("budget", self.budget),
            ("ppl_off", self.ppl_off),
            ("ppl_threshold", self.ppl_threshold),
            ("rise_error", self.rise_error),
            ("skipped", self.skipped),
            ("bytes_off", self.bytes_off),
            ("bytes_threshold", self.bytes_threshold),
            ("tok_s_off", self.tok_s_off),
            ("tok_s_threshold", self.tok_s_threshold),
        ]
    }
}

impl std::fmt::Display for ThresholdFigures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:.1} % of the neurons skipped, perplexity {:.3} -> {:.3} ({:+.2} %, allowed {:+.2} %), {:.1} -> {:.1} MB/token",
            self.skipped * 100.0,
            self.ppl_off,
            self.ppl_threshold,
            self.rise() * 100.0,
            self.budget * 100.0,
            self.bytes_off / 1e6,
            self.bytes_threshold / 1e6,
        )?;
        if self.tok_s_off > 0.0 {
            let (off, threshold) = (self.tok_s_off, self.tok_s_threshold);
            write!(f, ", {off:.1} -> {threshold:.1} tok/s")?;
        }
        Ok(())
    }
}

/// The section.
#[derive(Debug, Clone, PartialEq)]
pub struct ThresholdSection {
    /// What runs.
    pub thresholds: Thresholds,
    /// Why.
    pub figures: ThresholdFigures,
}

impl ThresholdSection {
    /// Adds the section's keys and tensors to a header.
    ///
    /// # Errors
    /// Names that are taken.
    pub fn declare(&self, header: &mut GgufWriter) -> Result<(), GgufError> {
        let layers = &self.thresholds.layers;
        let words = |word: &dyn Fn(&LayerThresholds) -> &'static str| -> Vec<String> {
            let words = layers.iter().map(|layer| layer.as_ref().map_or(NONE, word));
            words.map(str::to_owned).collect()
        };
        header.put(CRITERION_KEY, words(&|layer| layer.criterion.name()))?;
        header.put(DOWN_TYPE_KEY, words(&|layer| layer.down.name()))?;
        header.put(GAINS_KEY, self.figures.gains)?;
        for (figure, value) in self.figures.numbers() {
            header.put(&key(figure), value as f32)?;
        }
        for (index, layer) in layers.iter().enumerate() {
            if let Some(layer) = layer {
                header.add_tensor(&tensor(index), GgmlType::F32, &[layer.values.len()])?;
            }
        }
        Ok(())
    }

    /// Writes the section's tensors.
    ///
    /// # Errors
    /// What the file system refuses.
    pub fn write(&self, file: &mut GgufStream) -> Result<(), GgufError> {
        for (index, layer) in self.thresholds.layers.iter().enumerate() {
            if let Some(layer) = layer {
                let bytes: Vec<u8> = layer.values.iter().flat_map(|v| v.to_le_bytes()).collect();
                file.write(&tensor(index), &bytes)?;
            }
        }
        Ok(())
    }

    /// The section of a sidecar, if it is there, for a model whose down projections are `stored` so.
    ///
    /// # Errors
    /// Anything in it that does not fit the model.
    pub fn read(
        sidecar: &Sidecar,
        hyper: &Hyperparameters,
        stored: &[DownStored],
    ) -> Result<Option<Self>, SidecarError> {
        let metadata = sidecar.file().metadata();
        let Some(criteria) = metadata.get_array(CRITERION_KEY)? else {
            return Ok(None);
        };
        let types = metadata.require_array(DOWN_TYPE_KEY)?;
        let (criteria, types) = (criteria.to_strs()?, types.to_strs()?);
        if [criteria.len(), types.len()] != [hyper.n_layer; 2] {
            let problem =
                format!("{CRITERION_KEY} and {DOWN_TYPE_KEY} have no word for each layer");
            return Err(bad_key(sidecar, problem));
        }
        let mut layers = Vec::with_capacity(hyper.n_layer);
        for (layer, stored) in stored.iter().enumerate() {
            let words = (criteria[layer], types[layer]);
            layers.push(read_layer(sidecar, hyper, layer, *stored, words)?);
        }
        let number = |figure| -> Result<f64, SidecarError> {
            let value = metadata.require_f32(&key(figure))?;
            if value.is_finite() {
                return Ok(f64::from(value));
            }
            Err(bad_key(sidecar, format!("{} is not finite", key(figure))))
        };
        let gains = metadata.get_bool(GAINS_KEY)?;
        let figures = ThresholdFigures {
            budget: number("budget")?,
            ppl_off: number("ppl_off")?,
            ppl_threshold: number("ppl_threshold")?,
            rise_error: number("rise_error")?,
            skipped: number("skipped")?,
            bytes_off: number("bytes_off")?,
            bytes_threshold: number("bytes_threshold")?,
            tok_s_off: number("tok_s_off")?,
            tok_s_threshold: number("tok_s_threshold")?,
            gains: gains.ok_or_else(|| sidecar.missing(GAINS_KEY))?,
        };
        let skipped = figures.skipped;
        Ok(Some(Self {
            thresholds: Thresholds { layers, skipped },
            figures,
        }))
    }
}

fn bad_key(sidecar: &Sidecar, problem: String) -> SidecarError {
    SidecarError::BadKey {
        path: sidecar.path().to_owned(),
        problem,
    }
}

fn read_layer(
    sidecar: &Sidecar,
    hyper: &Hyperparameters,
    layer: usize,
    stored: DownStored,
    (criterion, down): (&str, &str),
) -> Result<Option<LayerThresholds>, SidecarError> {
    if criterion == NONE {
        return Ok(None);
    }
    let bad = |problem: String| Err(bad_key(sidecar, problem));
    let Some(criterion) = Criterion::from_name(criterion) else {
        return bad(format!(
            "{CRITERION_KEY} of layer {layer} is \"{criterion}\""
        ));
    };
    let down = match down_type(stored, hyper, down) {
        Ok(down) => down,
        Err(problem) => {
            return bad(format!(
                "{DOWN_TYPE_KEY} of layer {layer} is \"{down}\", {problem}"
            ));
        }
    };
    let name = tensor(layer);
    let values = sidecar.vector(&name, hyper.n_ff)?;
    let values = values.ok_or_else(|| sidecar.missing(format!("tensor {name}")))?;
    if let Some(index) = values.iter().position(|value| *value < 0.0) {
        return bad(format!("value {index} of {name} is below zero"));
    }
    Ok(Some(LayerThresholds {
        criterion,
        down,
        values,
    }))
}

/// The type that rows of down can have in memory, by its name.
fn down_type(
    stored: DownStored,
    hyper: &Hyperparameters,
    name: &str,
) -> Result<QuantType, &'static str> {
    match stored {
        DownStored::NeuronMajor(quant) if quant.name() == name => Ok(quant),
        DownStored::NeuronMajor(_) => Err("but the model's rows have another type"),
        DownStored::Plain(_) => match writable_type(name) {
            Ok(quant) if hyper.n_embd.is_multiple_of(quant.block_values()) => Ok(quant),
            Ok(_) => Err("which does not divide the model's rows"),
            Err(_) => Err("which rows cannot be written in"),
        },
    }
}
