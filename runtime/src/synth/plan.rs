//! Every tensor of a synthetic model, and where its rows come from.

use std::sync::Arc;

use pi_kernels::QuantType;

use super::blocks::RandomBlocks;
use super::frequencies::Offsets;
use super::gates::{GateForm, GateRows, Patterns};
use super::gaussian::{density, quantile};
use super::layout::Channels;
use super::random::Random;
use super::recency::{CONTENT, Recency};
use super::rows::{RandomRows, Rows, Vector};
use super::shape::{SynthOptions, SynthShape};
use super::sidecar::{KNOWN_AHEAD, predictor_rank};
use super::stream::Stream;
use super::vocabulary::N_NEVER_SAID;

/// Median distance of the two highest logits.
const MARGIN: f64 = 1.0;
/// Numbers of streams that belong to no tensor start here.
const FREE_STREAMS: u64 = 1 << 32;

/// A tensor to be written.
#[derive(Debug)]
pub(super) struct SynthTensor {
    pub name: String,
    pub quant: QuantType,
    pub n_cols: usize,
    pub n_rows: usize,
    /// Which random numbers its rows have.
    pub stream: u64,
    pub rows: Box<dyn Rows>,
}

impl SynthTensor {
    pub fn row_bytes(&self) -> usize {
        self.quant.row_bytes(self.n_cols)
    }

    /// In GGUF order; a vector has one dimension.
    pub fn shape(&self) -> Vec<usize> {
        match self.n_rows {
            1 => vec![self.n_cols],
            n_rows => vec![self.n_cols, n_rows],
        }
    }

    pub fn bytes(&self) -> u64 {
        (self.row_bytes() * self.n_rows) as u64
    }

    pub fn vector(name: String, values: Vec<f32>) -> Self {
        Self {
            name,
            quant: QuantType::F32,
            n_cols: values.len(),
            n_rows: 1,
            stream: 0,
            rows: Box::new(Vector(values)),
        }
    }
}

/// A layer's planted gates.
#[derive(Debug)]
pub(super) struct PlannedLayer {
    pub patterns: Arc<Patterns>,
    /// `[n_ff]`
    pub offsets: Arc<[f64]>,
    /// Whose numbers the gates have.
    pub gate_stream: u64,
}

/// All that is known about a model before it is written.
#[derive(Debug)]
pub(super) struct Plan {
    pub options: SynthOptions,
    pub channels: Channels,
    pub offsets: Offsets,
    pub stream: Stream,
    pub gate_form: GateForm,
    /// Share of a gate's energy that the patterns have.
    pub known: f64,
    pub layers: Vec<PlannedLayer>,
    pub tensors: Vec<SynthTensor>,
}

impl Plan {
    /// Plans a model; `options` are checked.
    pub fn new(options: &SynthOptions, recency: &Recency) -> Self {
        let shape = &options.shape;
        let channels = Channels::new(options.quant, shape.n_embd);
        let offsets = Offsets::new(options.active, options.skew);
        let stream = Stream::new(shape.n_layer, shape.n_ff, channels, &offsets, recency);
        // what a predictor sees of the next layer's state is the same in nearly all layers
        let seen = stream.seen_ahead_typical();
        let known = (KNOWN_AHEAD / seen).clamp(0.5, 0.9);
        let rank = predictor_rank(options.quant, shape.n_embd, shape.n_ff);
        let mut plan = Self {
            options: options.clone(),
            channels,
            gate_form: GateForm::new(options.quant, channels, rank, known),
            known,
            offsets,
            stream,
            layers: vec![],
            tensors: vec![],
        };
        plan.embedding();
        let ascending = plan.offsets.of_layer(shape.n_ff);
        for layer in 0..shape.n_layer {
            plan.attention(layer, recency);
            plan.ffn(layer, &ascending);
        }
        plan.head();
        plan
    }

    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(SynthTensor::bytes).sum()
    }

    /// Standard deviation of weights that make sums of variance 1 out of changing channels of variance 1.
    fn unit_std(&self) -> f64 {
        1.0 / (self.channels.n_changing() as f64).sqrt()
    }

    fn push(&mut self, name: String, n_rows: usize, n_cols: usize, rows: Box<dyn Rows>) {
        self.tensors.push(SynthTensor {
            name,
            quant: self.options.quant,
            n_cols,
            n_rows,
            stream: self.tensors.len() as u64,
            rows,
        });
    }

    /// A matrix that reads the residual stream, or (`token_embd`, `ffn_down_t`) whose rows are added to it.
    fn random(&mut self, name: String, n_rows: usize, std: f64, lead: Vec<f64>) {
        let rows = self.random_rows(std, lead);
        let n_embd = self.options.shape.n_embd;
        self.push(name, n_rows, n_embd, Box::new(rows));
    }

    fn random_rows(&self, std: f64, lead: Vec<f64>) -> RandomRows {
        RandomRows {
            quant: self.options.quant,
            n_constant: self.channels.n_constant,
            lead,
            blocks: RandomBlocks::new(self.options.quant, std),
            zeros: 0..0,
        }
    }

    fn norm(&mut self, name: String, variance: f64) {
        let weights = self.channels.norm_weights(variance);
        self.tensors.push(SynthTensor::vector(name, weights));
    }

    fn embedding(&mut self) {
        let n_vocab = self.options.shape.n_vocab;
        self.random("token_embd.weight".into(), n_vocab, 1.0, vec![1.0]);
    }

    fn attention(&mut self, layer: usize, recency: &Recency) {
        let shape = self.options.shape;
        let head_dim = shape.n_embd / shape.n_head;
        let name = |tensor: &str| format!("blk.{layer}.{tensor}.weight");
        let stream = self.stream.layers[layer].clone();
        self.norm(name("attn_norm"), stream.variance_in);
        let value = recency.value / self.channels.n_constant as f64;
        let planted = recency
            .planted
            .iter()
            .map(|&planted| if planted { value } else { 0.0 });
        let lead: Vec<f64> = planted.collect();
        let content = CONTENT * self.unit_std();
        self.random(name("attn_q"), shape.n_embd, content, lead.clone());
        self.random(name("attn_k"), shape.n_head_kv * head_dim, content, lead);
        self.random(
            name("attn_v"),
            shape.n_head_kv * head_dim,
            self.unit_std(),
            vec![],
        );
        // its rows are channels, of which the constant ones are left alone
        let output = RandomRows {
            n_constant: 0,
            zeros: 0..self.channels.n_constant,
            ..self.random_rows(stream.attention_std, vec![])
        };
        self.push(
            name("attn_output"),
            shape.n_embd,
            shape.n_embd,
            Box::new(output),
        );
    }

    fn ffn(&mut self, layer: usize, ascending: &[f64]) {
        let SynthShape { n_embd, n_ff, .. } = self.options.shape;
        let name = |tensor: &str| format!("blk.{layer}.{tensor}.weight");
        let stream = self.stream.layers[layer].clone();
        self.norm(name("ffn_norm"), stream.variance_mid);
        let free = |what: u64| Random::stream(self.options.seed, FREE_STREAMS + what, layer as u64);
        let mut offsets = ascending.to_vec();
        free(0).shuffle(&mut offsets);
        let planned = PlannedLayer {
            patterns: Arc::new(Patterns::new(&self.gate_form, free(1))),
            offsets: offsets.into(),
            gate_stream: self.tensors.len() as u64,
        };
        let gate = GateRows {
            patterns: Arc::clone(&planned.patterns),
            offsets: Arc::clone(&planned.offsets),
        };
        self.push(name("ffn_gate"), n_ff, n_embd, Box::new(gate));
        self.layers.push(planned);
        self.random(name("ffn_up"), n_ff, self.unit_std(), vec![]);
        self.random(name("ffn_down_t"), n_ff, stream.down_std, vec![]);
    }

    fn head(&mut self) {
        let SynthShape {
            n_embd, n_vocab, ..
        } = self.options.shape;
        self.norm("output_norm.weight".into(), self.stream.variance_out);
        let head = RandomRows {
            zeros: 0..N_NEVER_SAID,
            ..self.random_rows(logit_std(n_vocab - N_NEVER_SAID) * self.unit_std(), vec![])
        };
        self.push("output.weight".into(), n_vocab, n_embd, Box::new(head));
    }
}

/// Standard deviation of `n` normal logits whose two highest are [`MARGIN`] apart in the median.
fn logit_std(n: usize) -> f64 {
    // near the top, values come as in a Poisson process whose density grows by this factor per unit
    let top = quantile(1.0 - 1.0 / n as f64);
    let rate = n as f64 * density(top);
    MARGIN * rate / std::f64::consts::LN_2
}
