//! What a recorded rehearsal says of each token: where its time went, layer by layer.

use std::collections::HashMap;

use pi_actors::trace::{ActorKind, Event, MessageKind, NodeEvents};

/// A layer's part of a token.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct LayerSample {
    /// Stages `attention` and `output`, of the node that took longest.
    pub attention_ns: u64,
    /// The FFN, of the node that took longest.
    pub ffn_ns: u64,
    /// The device's handlers: norms, activations, sums.
    pub device_ns: u64,
    /// All that node 0's executor handled.
    pub leader_ns: u64,
    /// From the layer's first message to the next layer's (or the head's).
    pub total_ns: u64,
    /// Active neurons of all nodes.
    pub active: u32,
}

/// A token.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TokenSample {
    pub position: usize,
    /// From the logits before to these.
    pub total_ns: u64,
    pub layers: Vec<LayerSample>,
    /// The head, of the node that took longest.
    pub head_ns: u64,
    /// FFNs of each node, all layers: ns, and active neurons.
    pub nodes: Vec<(u64, u64)>,
}

impl LayerSample {
    /// What node 0's executor did not compute: messages on their way, and waiting for other nodes.
    pub fn waiting_ns(&self) -> u64 {
        self.total_ns.saturating_sub(self.leader_ns)
    }
}

impl TokenSample {
    /// Outside the layers and the head: embedding, norm, sampling.
    pub fn other_ns(&self) -> u64 {
        let layers: u64 = self.layers.iter().map(|layer| layer.total_ns).sum();
        self.total_ns.saturating_sub(layers + self.head_ns)
    }
}

/// A token's messages, as they come.
#[derive(Debug, Clone)]
struct Gathering {
    sample: TokenSample,
    /// When each layer began, and at last the head.
    starts_ns: Vec<Option<u64>>,
    output_ns: Vec<u64>,
    /// Of each layer and node.
    ffn_ns: Vec<Vec<u64>>,
}

/// The tokens decoded one by one from position `from` on, without those that failed or are incomplete.
pub(crate) fn token_samples(nodes: &[NodeEvents], n_layer: usize, from: usize) -> Vec<TokenSample> {
    let mut tokens: HashMap<u32, Gathering> = HashMap::new();
    for event in nodes.first().into_iter().flat_map(|node| &node.events) {
        if let Event::Step {
            step,
            position,
            n_tokens: 1,
            start_t,
            end_t,
            failed: false,
            ..
        } = *event
            && position as usize >= from
        {
            let sample = TokenSample {
                position: position as usize,
                total_ns: end_t - start_t,
                layers: vec![LayerSample::default(); n_layer],
                head_ns: 0,
                nodes: vec![(0, 0); nodes.len()],
            };
            tokens.insert(
                step,
                Gathering {
                    sample,
                    starts_ns: vec![None; n_layer + 1],
                    output_ns: vec![0; n_layer],
                    ffn_ns: vec![vec![0; nodes.len()]; n_layer],
                },
            );
        }
    }
    for (node, events) in nodes.iter().enumerate() {
        for event in &events.events {
            match *event {
                Event::Handled {
                    label,
                    start_t,
                    end_t,
                    ..
                } => {
                    if let Some(token) = tokens.get_mut(&label.step) {
                        token.handled(label.kind, label.layer.into(), node, start_t, end_t);
                    }
                }
                Event::Posted {
                    label,
                    active_neurons,
                    ..
                } if label.kind == MessageKind::Partial => {
                    if let Some(token) = tokens.get_mut(&label.step) {
                        let layer = usize::from(label.layer);
                        token.sample.layers[layer].active += active_neurons;
                        token.sample.nodes[node].1 += u64::from(active_neurons);
                    }
                }
                _ => {}
            }
        }
    }
    let mut samples: Vec<TokenSample> =
        tokens.into_values().filter_map(Gathering::finish).collect();
    samples.sort_by_key(|sample| sample.position);
    samples
}

/// Whether a message is none of a layer's work.
fn is_of_head(kind: MessageKind) -> bool {
    matches!(
        kind,
        MessageKind::RunHead
            | MessageKind::ShareHead
            | MessageKind::ShareHeadSketch
            | MessageKind::ShareHeadRows
            | MessageKind::ShareDoneHead
            | MessageKind::ShareDoneHeadSketch
            | MessageKind::ShareDoneHeadRows
            | MessageKind::HeadDone
    )
}

impl Gathering {
    fn handled(&mut self, kind: MessageKind, layer: usize, node: usize, start: u64, end: u64) {
        let ns = end.saturating_sub(start);
        let n_layer = self.output_ns.len();
        let sample = &mut self.sample;
        if node == 0 && !is_of_head(kind) {
            sample.layers[layer].leader_ns += ns;
        }
        match (kind, kind.handler()) {
            (MessageKind::RunHead, _) => self.starts_ns[n_layer] = Some(start),
            (MessageKind::ShareHead, _) => sample.head_ns = sample.head_ns.max(ns),
            (kind, _) if is_of_head(kind) => {}
            (MessageKind::ShareAttention, _) => {
                let attention_ns = &mut sample.layers[layer].attention_ns;
                *attention_ns = (*attention_ns).max(ns);
            }
            (MessageKind::ShareOutput, _) => {
                self.output_ns[layer] = self.output_ns[layer].max(ns);
            }
            // candidates, wherever they come from, are part of the FFN that they are for
            (_, actor @ (ActorKind::ColdLayer | ActorKind::Predictor)) => {
                let of = layer + usize::from(actor == ActorKind::Predictor);
                self.ffn_ns[of.min(n_layer - 1)][node] += ns;
                sample.nodes[node].0 += ns;
            }
            // the device's other messages, and the pipeline's on the way to the next layer
            (_, ActorKind::DeviceLayer | ActorKind::Pipeline) => {
                if kind == MessageKind::RunLayer {
                    self.starts_ns[layer] = Some(start);
                }
                sample.layers[layer].device_ns += ns;
            }
        }
    }

    /// The sample, if all layers are there.
    fn finish(mut self) -> Option<TokenSample> {
        let starts: Vec<u64> = self.starts_ns.into_iter().collect::<Option<_>>()?;
        for (layer, sample) in self.sample.layers.iter_mut().enumerate() {
            sample.total_ns = starts[layer + 1].checked_sub(starts[layer])?;
            sample.attention_ns += self.output_ns[layer];
            sample.ffn_ns = self.ffn_ns[layer].iter().copied().max().unwrap_or(0);
        }
        Some(self.sample)
    }
}
