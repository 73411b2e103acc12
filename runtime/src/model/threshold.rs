//! Thresholds below which neurons are left out, for gates that never close.

use pi_kernels::QuantType;

/// By what a neuron is compared with its threshold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Criterion {
    /// |act(gate)|: neither up nor down of small ones is read.
    Gate,
    /// |act(gate) · up|: down of small ones is not read.
    Product,
}

impl Criterion {
    /// Both.
    pub const ALL: [Criterion; 2] = [Criterion::Gate, Criterion::Product];

    /// The name in files and messages.
    pub fn name(self) -> &'static str {
        match self {
            Criterion::Gate => "gate",
            Criterion::Product => "product",
        }
    }

    /// The criterion called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|criterion| criterion.name() == name)
    }
}

/// One layer's thresholds.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerThresholds {
    /// What is compared.
    pub criterion: Criterion,
    /// Type of the down rows in memory: the file's own where it has rows of neurons.
    pub down: QuantType,
    /// `[n_ff]`, finite and not negative: a neuron is left out while its value is not above.
    pub values: Vec<f32>,
}

/// A model's thresholds.
#[derive(Debug, Clone, PartialEq)]
pub struct Thresholds {
    /// By layer; none: all neurons, as in `off`.
    pub layers: Vec<Option<LayerThresholds>>,
    /// Share of all neurons that they leave out, where they were calibrated.
    pub skipped: f64,
}

impl Thresholds {
    /// What is lossy about them.
    pub fn words(&self) -> String {
        let of_layers = || self.layers.iter().flatten();
        let names = Criterion::ALL
            .into_iter()
            .filter(|criterion| of_layers().any(|layer| layer.criterion == *criterion))
            .map(Criterion::name);
        let names: Vec<&str> = names.collect();
        match names[..] {
            [] => "threshold without effect".to_owned(),
            _ => format!(
                "threshold on {} (calibrated to skip {:.0} %)",
                names.join(" and "),
                self.skipped * 100.0
            ),
        }
    }
}
