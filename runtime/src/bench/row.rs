//! One result of `bench`: llama-bench's fields under their names, then ours.

use serde::{Serialize, Serializer};

/// What one test is: `n_prompt` tokens prefilled or `n_gen` decoded, after `n_depth` already in the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BenchTest {
    /// Tokens prefilled in one go; 0 in a decode test.
    pub n_prompt: usize,
    /// Tokens decoded one by one; 0 in a prefill test.
    pub n_gen: usize,
    /// Tokens in the context before the clock starts.
    pub n_depth: usize,
    /// Threads over all nodes.
    pub n_threads: usize,
}

impl BenchTest {
    /// llama-bench's name of the test: `pp512`, `tg128 @ d1536`.
    pub fn name(&self) -> String {
        let kind = if self.n_gen == 0 {
            format!("pp{}", self.n_prompt)
        } else if self.n_prompt == 0 {
            format!("tg{}", self.n_gen)
        } else {
            format!("pp{}+tg{}", self.n_prompt, self.n_gen)
        };
        if self.n_depth == 0 {
            kind
        } else {
            format!("{kind} @ d{}", self.n_depth)
        }
    }

    /// Every combination, in llama-bench's order: threads outermost, then depth, prefill before decode.
    pub fn matrix(
        n_prompt: &[u32],
        n_gen: &[u32],
        n_depth: &[u32],
        n_threads: &[usize],
    ) -> Vec<BenchTest> {
        let mut tests = Vec::new();
        for &n_threads in n_threads {
            for &n_depth in n_depth {
                let test = |n_prompt: u32, n_gen: u32| BenchTest {
                    n_prompt: n_prompt as usize,
                    n_gen: n_gen as usize,
                    n_depth: n_depth as usize,
                    n_threads,
                };
                tests.extend(n_prompt.iter().filter(|n| **n > 0).map(|&n| test(n, 0)));
                tests.extend(n_gen.iter().filter(|n| **n > 0).map(|&n| test(0, n)));
            }
        }
        tests
    }
}

/// A finished test. Serialises to llama-bench's JSON names, in its order, followed by the project's own.
#[derive(Debug, Clone, Serialize)]
pub struct BenchRow {
    /// Version of this program.
    pub build_commit: String,
    /// Always 0: this program counts versions, not builds.
    pub build_number: u32,
    /// Name of the processor.
    pub cpu_info: String,
    /// Empty: no GPU takes part.
    pub gpu_info: String,
    /// `CPU`, or `CUDA` where a GPU is the device.
    pub backends: String,
    /// Path of the model as given.
    pub model_filename: String,
    /// As llama-bench names it: architecture, size, type.
    pub model_type: String,
    /// Bytes of all tensors.
    pub model_size: u64,
    /// Values of all tensors.
    pub model_n_params: u64,
    /// Most tokens in one request.
    pub n_batch: usize,
    /// Most tokens in one pass through the layers.
    pub n_ubatch: usize,
    /// Threads over all nodes.
    pub n_threads: usize,
    /// Type of the keys in the cache.
    pub type_k: String,
    /// Type of the values in the cache.
    pub type_v: String,
    /// Always 0.
    pub n_gpu_layers: u32,
    /// Tokens prefilled.
    pub n_prompt: usize,
    /// Tokens decoded.
    pub n_gen: usize,
    /// Tokens already in the context.
    pub n_depth: usize,
    /// Start of the test, UTC.
    pub test_time: String,
    /// Mean time of a repetition.
    pub avg_ns: u64,
    /// Its sample standard deviation.
    pub stddev_ns: u64,
    /// Mean tokens per second.
    pub avg_ts: f64,
    /// Its sample standard deviation.
    pub stddev_ts: f64,
    /// Time of each repetition.
    pub samples_ns: Vec<u64>,
    /// Tokens per second of each repetition.
    pub samples_ts: Vec<f64>,
    /// Instruction set of the kernels.
    pub tier: String,
    /// `f32` or `q8`.
    pub activations: String,
    /// `off` or `exact`.
    pub sparsity: String,
    /// `full` or `sparse`: which head.
    pub head: String,
    /// `text` or `random`: what was fed.
    pub token_source: String,
    /// Share of FFN neurons whose gate was open.
    #[serde(serialize_with = "four_places")]
    pub active_share: f64,
    /// Weight and cache bytes read for a token (decode tests).
    pub bytes_per_token: Option<u64>,
    /// Those bytes times tokens per second, in 10⁹ bytes (decode tests).
    pub gb_per_s: Option<f64>,
    /// Read bandwidth measured with the same threads, in 10⁹ bytes per second; with GPUs, at which these bytes could be read where
    /// the slower of both sides is never idle (decode tests).
    pub bandwidth_gb_per_s: Option<f64>,
    /// `gb_per_s` of `bandwidth_gb_per_s` (decode tests).
    pub percent_of_byte_limit: Option<f64>,
}

fn four_places<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64((value * 1e4).round() / 1e4)
}

impl BenchRow {
    /// The test that the row reports.
    pub fn test(&self) -> BenchTest {
        BenchTest {
            n_prompt: self.n_prompt,
            n_gen: self.n_gen,
            n_depth: self.n_depth,
            n_threads: self.n_threads,
        }
    }
}

/// Times of a test's repetitions, reduced as llama-bench does.
#[derive(Debug, Clone, PartialEq)]
pub struct Samples {
    /// Time of each repetition.
    pub ns: Vec<u64>,
    /// Tokens per second of each repetition.
    pub ts: Vec<f64>,
}

impl Samples {
    /// `n_tokens` in each of `ns`.
    pub fn new(n_tokens: usize, ns: Vec<u64>) -> Self {
        let ts = ns
            .iter()
            .map(|&ns| n_tokens as f64 * 1e9 / ns.max(1) as f64)
            .collect();
        Self { ns, ts }
    }

    /// Mean and sample standard deviation of the times, in ns.
    pub fn ns_summary(&self) -> (u64, u64) {
        let values: Vec<f64> = self.ns.iter().map(|&ns| ns as f64).collect();
        let (mean, deviation) = summary(&values);
        (mean as u64, deviation as u64)
    }

    /// Mean and sample standard deviation of tokens per second.
    pub fn ts_summary(&self) -> (f64, f64) {
        summary(&self.ts)
    }
}

fn summary(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n.max(1.0);
    if values.len() < 2 {
        return (mean, 0.0);
    }
    let variance = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / (n - 1.0);
    (mean, variance.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_come_in_llama_bench_order_without_empty_ones() {
        let names: Vec<String> = BenchTest::matrix(&[512, 0], &[128], &[0, 1536], &[1])
            .iter()
            .map(BenchTest::name)
            .collect();
        assert_eq!(names, ["pp512", "tg128", "pp512 @ d1536", "tg128 @ d1536"]);
    }

    #[test]
    fn samples_reduce_with_the_sample_deviation() {
        let samples = Samples::new(100, vec![1_000_000_000, 2_000_000_000]);
        assert_eq!(samples.ns_summary(), (1_500_000_000, 707_106_781));
        let (mean, deviation) = samples.ts_summary();
        assert_eq!(mean, 75.0);
        assert!((deviation - 35.355_339).abs() < 1e-5, "{deviation}");
        assert_eq!(Samples::new(1, vec![1_000]).ts_summary(), (1e6, 0.0));
    }
}
