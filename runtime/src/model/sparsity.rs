//! Which sparsity mode a model runs in, and what becomes of its down projection for it.

use std::sync::Arc;

use pi_kernels::QuantType;

use super::error::ModelError;
use super::hyperparameters::GateKind;
use super::quantize::WRITABLE_TYPES;
use super::threshold::{Criterion, Thresholds};

/// `--sparsity`: which neurons are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sparsity {
    /// All of them, with the file's own weights.
    Off,
    /// Those whose ReLU gate is open; the others contribute nothing.
    Exact,
    /// Those that predictors pick and whose gate is open.
    Predicted,
    /// Those that contribute more than a threshold, where gates never close.
    Threshold,
}

impl Sparsity {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Sparsity::Off => "off",
            Sparsity::Exact => "exact",
            Sparsity::Predicted => "predicted",
            Sparsity::Threshold => "threshold",
        }
    }
}

/// How a file stores a layer's down projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DownStored {
    /// `ffn_down_t`: one row per neuron.
    NeuronMajor(QuantType),
    /// `ffn_down`: one row per output, blocks running over neurons.
    Plain(QuantType),
}

/// What the loader makes of a layer's down projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DownPlan {
    /// Neuron rows as they are.
    NeuronRows(QuantType),
    /// Plain rows as they are.
    Dense(QuantType),
    /// Plain rows transposed to neuron rows of another type.
    Transposed {
        /// In the file.
        from: QuantType,
        /// In memory.
        to: QuantType,
    },
}

impl DownPlan {
    /// The change of values that the plan makes, in words; none where it makes none.
    pub fn lossy(self) -> Option<String> {
        match self {
            DownPlan::Transposed { from, to } if from != to || from.is_quantised() => Some(
                format!("down re-quantised {} -> {}", from.name(), to.name()),
            ),
            _ => None,
        }
    }
}

/// Which weights of a layer are read for some neurons only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Skipping {
    /// None.
    Nothing,
    /// Rows of down.
    Down,
    /// Rows of up and down, which lie side by side.
    UpAndDown,
}

/// A model's mode and what it means for each layer.
#[derive(Debug, Clone, PartialEq)]
pub struct SparsityPlan {
    /// The mode.
    pub mode: Sparsity,
    /// Down projection of each layer.
    pub down: Vec<DownPlan>,
    /// Whether neurons of some layer are predicted: not where `predicted` finds all layers `exact`.
    pub predicts: bool,
    /// Thresholds of the neurons, in `threshold`.
    pub thresholds: Option<Arc<Thresholds>>,
    /// Something the user may want to know.
    pub hint: Option<String>,
}

impl SparsityPlan {
    /// Resolves what was asked for against the model.
    ///
    /// The default is `exact` where the gate is ReLU and neuron rows are in the file or can be had without loss; on
    /// other plain files `exact` runs only when asked for.
    ///
    /// # Errors
    /// [`ModelError::GatesNeverClose`] for `exact` and `predicted` without ReLU gates; [`ModelError::GatesClose`] or
    /// [`ModelError::NoThresholds`] for `threshold`, which needs [`SparsityPlan::with_thresholds`].
    pub fn resolve(
        asked: Option<Sparsity>,
        gate: GateKind,
        stored: &[DownStored],
    ) -> Result<Self, ModelError> {
        let relu = gate == GateKind::Relu;
        let free = stored.iter().all(|down| match down {
            DownStored::NeuronMajor(_) => true,
            DownStored::Plain(quant) => !quant.is_quantised(),
        });
        let mode = match asked {
            Some(mode @ (Sparsity::Exact | Sparsity::Predicted)) if !relu => {
                return Err(ModelError::GatesNeverClose {
                    mode: mode.name(),
                    activation: gate.name(),
                });
            }
            Some(Sparsity::Threshold) if relu => return Err(ModelError::GatesClose),
            Some(Sparsity::Threshold) => return Err(ModelError::NoThresholds),
            Some(mode) => mode,
            None if relu && free => Sparsity::Exact,
            None => Sparsity::Off,
        };
        let hint = (asked.is_none() && relu && !free).then(|| {
            "this model's gates are ReLU, but its down projection is stored by output: \
             `pi-runtime pack` makes a file that runs sparse"
                .to_owned()
        });
        let down = stored.iter().map(|down| plan_down(mode, *down)).collect();
        Ok(Self {
            mode,
            down,
            predicts: mode == Sparsity::Predicted,
            thresholds: None,
            hint,
        })
    }

    /// The plan of `threshold`: layers without thresholds run as in `off`.
    ///
    /// # Errors
    /// [`ModelError::GatesClose`] for ReLU gates.
    pub fn with_thresholds(
        thresholds: Arc<Thresholds>,
        gate: GateKind,
        stored: &[DownStored],
    ) -> Result<Self, ModelError> {
        if gate == GateKind::Relu {
            return Err(ModelError::GatesClose);
        }
        let layers = stored.iter().zip(&thresholds.layers);
        let down = layers.map(|(stored, layer)| match (stored, layer) {
            (DownStored::Plain(from), Some(layer)) => DownPlan::Transposed {
                from: *from,
                to: layer.down,
            },
            (stored, _) => plan_down(Sparsity::Off, *stored),
        });
        Ok(Self {
            mode: Sparsity::Threshold,
            down: down.collect(),
            predicts: false,
            thresholds: Some(thresholds),
            hint: None,
        })
    }

    /// Whether a layer's down projection is read whole, as it is stored by output.
    pub fn has_plain_down(&self) -> bool {
        let mut downs = self.down.iter();
        downs.any(|down| matches!(down, DownPlan::Dense(_)))
    }

    /// How up and down of a layer are skipped.
    pub fn skipping(&self, layer: usize) -> Skipping {
        let thresholds = self.thresholds.as_ref();
        match self.mode {
            Sparsity::Off => Skipping::Nothing,
            Sparsity::Exact | Sparsity::Predicted => Skipping::UpAndDown,
            Sparsity::Threshold => {
                match thresholds.and_then(|thresholds| thresholds.layers[layer].as_ref()) {
                    None => Skipping::Nothing,
                    Some(layer) if layer.criterion == Criterion::Gate => Skipping::UpAndDown,
                    Some(_) => Skipping::Down,
                }
            }
        }
    }

    /// The lossy parts, each named once.
    pub fn lossy(&self) -> Vec<String> {
        let mut names: Vec<String> = self.down.iter().filter_map(|down| down.lossy()).collect();
        names.sort();
        names.dedup();
        names.extend(
            self.thresholds
                .as_ref()
                .map(|thresholds| thresholds.words()),
        );
        if self.predicts {
            names.insert(0, "predicted neurons".to_owned());
        }
        names
    }

    /// Bytes of transposed copies, for rows of `n_embd` and `n_ff` neurons a layer.
    pub fn transposed_bytes(&self, n_embd: usize, n_ff: usize) -> u64 {
        let bytes = |down: &DownPlan| match down {
            DownPlan::Transposed { to, .. } => (n_ff * to.row_bytes(n_embd)) as u64,
            _ => 0,
        };
        self.down.iter().map(bytes).sum()
    }
}

fn plan_down(mode: Sparsity, stored: DownStored) -> DownPlan {
    match (stored, mode) {
        (DownStored::NeuronMajor(quant), _) => DownPlan::NeuronRows(quant),
        (DownStored::Plain(quant), Sparsity::Off | Sparsity::Threshold) => DownPlan::Dense(quant),
        (DownStored::Plain(from), Sparsity::Exact | Sparsity::Predicted) => DownPlan::Transposed {
            from,
            to: transposed_type(from),
        },
    }
}

/// Share of neurons skipped that a re-quantised down has to pay for itself at.
const SKIPPED_SHARE: f64 = 0.3;

/// The type for a down projection's neuron rows: its own where that is lossless (floats) or as good (Q8_0), else the
/// most precise type with which the bytes read for a token still fall when 30 % of the neurons are skipped.
pub fn transposed_type(plain: QuantType) -> QuantType {
    if !plain.is_quantised() || plain == QuantType::Q8_0 {
        return plain;
    }
    let bits = |quant: QuantType| quant.block_bytes() as f64 * 8.0 / quant.block_values() as f64;
    let dense = 3.0 * bits(plain);
    let sparse = |down: QuantType| bits(plain) + (1.0 - SKIPPED_SHARE) * (bits(plain) + bits(down));
    let candidates = [QuantType::Q8_0, QuantType::Q5_0];
    *candidates
        .iter()
        .find(|down| sparse(**down) < dense)
        .unwrap_or(&QuantType::Q4_0)
}

/// The type called `name` (any case), if neuron rows can be written in it.
///
/// # Errors
/// [`ModelError::UnwritableType`] with what can be written.
pub fn writable_type(name: &str) -> Result<QuantType, ModelError> {
    let wanted = |quant: &&QuantType| quant.name().eq_ignore_ascii_case(name);
    WRITABLE_TYPES
        .iter()
        .find(wanted)
        .copied()
        .ok_or_else(|| ModelError::UnwritableType {
            name: name.to_owned(),
            possible: WRITABLE_TYPES.map(QuantType::name).join(", "),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: DownStored = DownStored::NeuronMajor(QuantType::Q4_0);
    const PLAIN: DownStored = DownStored::Plain(QuantType::Q4_0);
    const FLOAT: DownStored = DownStored::Plain(QuantType::BF16);

    fn mode(asked: Option<Sparsity>, gate: GateKind, stored: &[DownStored]) -> Sparsity {
        SparsityPlan::resolve(asked, gate, stored).unwrap().mode
    }

    #[test]
    fn default_is_exact_only_where_it_is_free() {
        assert_eq!(mode(None, GateKind::Relu, &[T, T]), Sparsity::Exact);
        assert_eq!(mode(None, GateKind::Relu, &[T, FLOAT]), Sparsity::Exact);
        assert_eq!(mode(None, GateKind::Relu, &[T, PLAIN]), Sparsity::Off);
        assert_eq!(mode(None, GateKind::Silu, &[T, T]), Sparsity::Off);
        assert_eq!(mode(None, GateKind::Gelu, &[T, T]), Sparsity::Off);
        assert_eq!(
            mode(Some(Sparsity::Exact), GateKind::Relu, &[PLAIN]),
            Sparsity::Exact
        );
        assert_eq!(
            mode(Some(Sparsity::Off), GateKind::Relu, &[T]),
            Sparsity::Off
        );
    }

    #[test]
    fn exact_without_relu_says_what_to_do() {
        for mode in [Sparsity::Exact, Sparsity::Predicted] {
            for gate in [GateKind::Silu, GateKind::Gelu] {
                let error = SparsityPlan::resolve(Some(mode), gate, &[T]).unwrap_err();
                let message = error.to_string();
                for words in [mode.name(), gate.name(), "--sparsity off"] {
                    assert!(message.contains(words), "{message}");
                }
            }
        }
    }

    #[test]
    fn only_re_quantised_down_is_lossy_and_only_relu_plain_files_get_the_hint() {
        let plan = |asked, stored| SparsityPlan::resolve(asked, GateKind::Relu, &[stored]).unwrap();
        assert_eq!(
            plan(Some(Sparsity::Exact), PLAIN).lossy(),
            ["down re-quantised Q4_0 -> Q5_0"]
        );
        assert!(plan(None, FLOAT).lossy().is_empty());
        assert!(plan(None, T).lossy().is_empty());
        assert!(plan(None, PLAIN).hint.unwrap().contains("pack"));
        assert_eq!(plan(Some(Sparsity::Off), PLAIN).hint, None);
        assert_eq!(plan(None, FLOAT).transposed_bytes(64, 10), 64 * 10 * 2);
    }

    #[test]
    fn re_quantised_types_make_the_bytes_fall() {
        let cases = [
            (QuantType::Q8_0, QuantType::Q8_0),
            (QuantType::Q4_0, QuantType::Q5_0),
            (QuantType::Q4_K, QuantType::Q5_0),
            (QuantType::Q6_K, QuantType::Q8_0),
            (QuantType::F16, QuantType::F16),
        ];
        for (plain, packed) in cases {
            assert_eq!(transposed_type(plain), packed, "{}", plain.name());
        }
    }
}
