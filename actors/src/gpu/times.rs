//! Where the time of a token went that GPU and host computed together.

use std::fmt;

/// Tokens that are remembered.
const TOKENS_MAX: usize = 256;

/// One layer of one token, in ns. All but `host` are differences of the GPU's own clock.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LayerTimes {
    /// From the end of the layer before (that has cold neurons) until the hidden state is handed over.
    pub attention: f32,
    /// From then until the GPU has nothing left but to wait: predictor and hot neurons.
    pub hot: f32,
    /// From when the host sees the hidden state until it answers.
    pub host: f32,
    /// Time that the GPU waits for what passes between the two: both ways, beside the host's own time.
    pub hand_off: f32,
    /// Time that the GPU waits for the host's own time.
    pub bubble: f32,
}

impl LayerTimes {
    /// From how long the GPU took, waited, and the host took.
    ///
    /// Until the answer is there the GPU sees `hot + wait`, of which the host's own time is `host`: what is left is the way
    /// there and back. Of the wait, that comes first and the host's own time second; what the GPU does not wait for is not
    /// exposed.
    pub(super) fn new(attention: f32, hot: f32, wait: f32, host: f32) -> Self {
        let hand_off = (hot + wait - host).clamp(0.0, wait);
        Self {
            attention,
            hot,
            host,
            hand_off,
            bubble: wait - hand_off,
        }
    }

    fn parts(&self) -> [f32; 5] {
        let Self {
            attention,
            hot,
            host,
            hand_off,
            bubble,
        } = *self;
        [attention, hot, host, hand_off, bubble]
    }
}

/// Times of recent tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct GpuTimes {
    tokens: Vec<f32>,
    /// By layer, then token; empty for a layer without cold neurons.
    layers: Vec<Vec<LayerTimes>>,
    next: usize,
}

impl GpuTimes {
    /// Of nothing yet.
    pub(super) fn new(n_layer: usize) -> Self {
        Self {
            tokens: Vec::new(),
            layers: vec![Vec::new(); n_layer],
            next: 0,
        }
    }

    pub(super) fn push(&mut self, token: f32, layers: impl Iterator<Item = Option<LayerTimes>>) {
        put(&mut self.tokens, self.next, token);
        for (all, layer) in self.layers.iter_mut().zip(layers) {
            if let Some(layer) = layer {
                put(all, self.next, layer);
            }
        }
        self.next = (self.next + 1) % TOKENS_MAX;
    }

    /// Tokens that are remembered.
    pub fn n_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Median of the GPU's time for a token, without the head, in ms.
    pub fn token_ms(&self) -> f32 {
        median(self.tokens.clone()) / 1e6
    }

    /// Medians over tokens of each layer, in ns; none for one without cold neurons.
    pub fn layers(&self) -> Vec<Option<LayerTimes>> {
        let median_of = |times: &Vec<LayerTimes>| {
            let part = |n: usize| median(times.iter().map(|times| times.parts()[n]).collect());
            (!times.is_empty()).then(|| LayerTimes {
                attention: part(0),
                hot: part(1),
                host: part(2),
                hand_off: part(3),
                bubble: part(4),
            })
        };
        self.layers.iter().map(median_of).collect()
    }
}

/// Adds a value, or overwrites the one in its place.
fn put<T>(values: &mut Vec<T>, at: usize, value: T) {
    match values.get_mut(at) {
        Some(old) => *old = value,
        None => values.push(value),
    }
}

fn median(mut values: Vec<f32>) -> f32 {
    values.sort_by(f32::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

impl fmt::Display for GpuTimes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let layers = self.layers();
        let with_cold: Vec<_> = layers.iter().flatten().collect();
        write!(
            f,
            "GPU: {:.3} ms a token without the head, median of {}; {} of {} layers with cold neurons",
            self.token_ms(),
            self.n_tokens(),
            with_cold.len(),
            layers.len()
        )?;
        if with_cold.is_empty() {
            return Ok(());
        }
        let names = ["attention", "hot, predictor", "host", "hand-off", "bubble"];
        writeln!(f, "\n| µs | all layers | median of a layer | largest |")?;
        write!(f, "| - | -: | -: | -: |")?;
        for (n, name) in names.iter().enumerate() {
            let values: Vec<f32> = with_cold.iter().map(|times| times.parts()[n]).collect();
            let (sum, largest) = (
                values.iter().sum::<f32>() / 1e3,
                values.iter().copied().fold(0.0, f32::max) / 1e3,
            );
            let median = median(values) / 1e3;
            write!(f, "\n| {name} | {sum:.0} | {median:.1} | {largest:.1} |")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_gpu_does_not_wait_for_is_not_exposed() {
        // the host needs 30 of the 50 that pass until the answer is there
        let times = LayerTimes::new(10.0, 20.0, 30.0, 30.0);
        assert_eq!((times.hand_off, times.bubble), (20.0, 10.0));
        // hidden behind hot neurons
        let times = LayerTimes::new(10.0, 60.0, 1.0, 30.0);
        assert_eq!((times.hand_off, times.bubble), (1.0, 0.0));
        // clocks of host and GPU differ
        let times = LayerTimes::new(10.0, 1.0, 30.0, 40.0);
        assert_eq!((times.hand_off, times.bubble), (0.0, 30.0));
    }

    #[test]
    fn the_last_tokens_are_remembered() {
        let mut times = GpuTimes::new(2);
        for token in 0..TOKENS_MAX + 1 {
            let layer = LayerTimes::new(token as f32, 0.0, 0.0, 0.0);
            times.push(token as f32, [None, Some(layer)].into_iter());
        }
        assert_eq!(times.n_tokens(), TOKENS_MAX);
        assert_eq!(times.layers()[0], None);
        assert_eq!(times.layers()[1].unwrap().attention, 129.0);
        assert!(times.to_string().contains("1 of 2 layers"));
    }
}
