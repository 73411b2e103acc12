//! A GPU as the device. What needs one says *skipped* where there is none; what happens without one is tested there.

mod common;

use common::running::{Ran, run};
use common::tiny_synth;
use pi_kernels::KernelError;
use pi_kernels::cuda::Device;
use pi_runtime::session::Silent;
use pi_runtime::synth::Synthesis;
use serde_json::Value;

/// Whether there is a GPU; a line that says so where there is none.
fn has_gpu() -> bool {
    match Device::open(0) {
        Ok(_) => true,
        Err(KernelError::CudaNoDriver | KernelError::CudaNoDevice { .. }) => {
            println!("skipped: no CUDA driver");
            false
        }
        Err(error) => panic!("{error}"),
    }
}

/// A synthetic model with its sidecar, a text and topologies in a folder.
struct Model {
    folder: tempfile::TempDir,
}

impl Model {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = Self { folder };
        let synthesis = Synthesis::new(&tiny_synth::options()).unwrap();
        let path = model.path("m.gguf");
        let done = synthesis.write(path.as_ref(), 2, &Silent, &|| false);
        assert!(done.unwrap());
        let words: Vec<String> = (0..600).map(|n: u32| format!("w{}", n * n % 701)).collect();
        std::fs::write(model.path("t.txt"), words.join(" ")).unwrap();
        model
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    /// A topology with one GPU.
    fn topology(&self, keys: &str) -> String {
        let path = self.path("topology.toml");
        std::fs::write(&path, format!("[[gpu]]\n{keys}\n")).unwrap();
        path
    }

    fn run(&self, command: &[&str], keys: Option<&str>, flags: &[&str]) -> Ran {
        let model = self.path("m.gguf");
        let topology = keys.map(|keys| self.topology(keys));
        let mut args = command.to_vec();
        args.extend(["-m", &model]);
        if let Some(topology) = &topology {
            args.extend(["--topology", topology]);
        }
        args.extend(flags);
        run(&args)
    }

    /// Perplexity of the text.
    fn perplexity(&self, keys: Option<&str>, flags: &[&str]) -> f64 {
        let text = self.path("t.txt");
        let fixed = [
            "-f",
            &text,
            "-c",
            "128",
            "--chunks",
            "2",
            "--activations",
            "f32",
        ];
        let ran = self.run(&["perplexity"], keys, &[&fixed[..], flags].concat());
        assert_eq!(ran.code, 0, "{}", ran.err);
        let all = format!("{}{}", ran.out, ran.err);
        let number = all
            .split("PPL = ")
            .nth(1)
            .unwrap_or_else(|| panic!("{all}"));
        number.split_whitespace().next().unwrap().parse().unwrap()
    }

    fn hash(&self, keys: Option<&str>, flags: &[&str]) -> Value {
        let fixed = ["-p", "hello world", "-n", "40", "--temp", "0", "--json"];
        let ran = self.run(&[], keys, &[&fixed[..], flags].concat());
        assert_eq!(ran.code, 0, "{}", ran.err);
        let json: Value = serde_json::from_str(&ran.out).unwrap();
        json["logits_hash"].clone()
    }
}

const MODES: [&[&str]; 4] = [
    &["--sparsity", "off"],
    &["--sparsity", "exact"],
    &["--sparsity", "predicted", "--predictor", "in-layer"],
    &["--sparsity", "predicted", "--predictor", "both"],
];

#[test]
fn every_split_gives_the_host_s_perplexity() {
    if !has_gpu() {
        return;
    }
    let model = Model::new();
    let exact = model.perplexity(None, &["--sparsity", "exact"]);
    for percent in [100, 50, 10, 0] {
        let keys = format!("required = true\nhot_percent_max = {percent}");
        for mode in MODES {
            let got = model.perplexity(Some(&keys), mode);
            // predictors leave neurons out on the host alone
            let limit = if mode[1] == "predicted" { 0.02 } else { 1e-4 };
            let change = (got / exact - 1.0).abs();
            assert!(
                change < limit,
                "{percent} % hot, {mode:?}: {got}, not {exact}"
            );
        }
        let ahead = ["--sparsity", "predicted", "--predictor", "ahead"];
        let got = model.perplexity(Some(&keys), &ahead);
        let host = model.perplexity(None, &ahead);
        assert!(
            (got / host - 1.0).abs() < 0.05,
            "{percent} %: {got}, not {host}"
        );
    }
}

#[test]
fn one_split_gives_the_same_bits_every_time() {
    if !has_gpu() {
        return;
    }
    let model = Model::new();
    for percent in [100, 50, 0] {
        let keys = format!("required = true\nhot_percent_max = {percent}");
        for prefetch in ["on", "off"] {
            let flags = [
                "--sparsity",
                "predicted",
                "--predictor",
                "ahead",
                "--prefetch",
                prefetch,
            ];
            let first = model.hash(Some(&keys), &flags);
            assert!(first.is_string());
            for _ in 0..3 {
                assert_eq!(model.hash(Some(&keys), &flags), first, "{percent} %");
            }
        }
    }
}

#[test]
fn too_small_a_budget_is_refused_with_a_table() {
    if !has_gpu() {
        return;
    }
    let model = Model::new();
    let ran = model.run(
        &[],
        Some("required = true\nvram_budget = \"64MiB\""),
        &["-p", "x", "-n", "1"],
    );
    assert_eq!(ran.code, 2, "{}", ran.err);
    for part in [
        "does not fit",
        "hot neurons",
        "of 64 MiB",
        "raise vram_budget",
    ] {
        assert!(ran.err.contains(part), "{part}: {}", ran.err);
    }
    // not required: the host computes
    let ran = model.run(
        &[],
        Some("vram_budget = \"64MiB\""),
        &["-p", "x", "-n", "1"],
    );
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(
        ran.err.contains("the host computes in its place"),
        "{}",
        ran.err
    );
}

#[test]
fn without_a_gpu_the_host_computes_or_an_error_says_what_is_missing() {
    if has_gpu() {
        println!("skipped: there is a GPU");
        return;
    }
    let model = Model::new();
    let ran = model.run(&[], Some("required = true"), &["-p", "x", "-n", "1"]);
    assert_eq!(ran.code, 2, "{}", ran.err);
    assert!(ran.err.contains("no NVIDIA GPU"), "{}", ran.err);
    let host = model.hash(None, &[]);
    assert_eq!(model.hash(Some("required = false"), &[]), host);
}
