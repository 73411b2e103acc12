//! A GPU as the device. What needs one says *skipped* where there is none; what happens without one is tested there.

mod common;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use common::gpu::has_gpu;
use common::running::{Ran, run};
use common::tiny_synth;
use common::trace_file::TraceFile;
use pi_actors::faults::{Fault, FaultPlace, Faults};
use pi_actors::messages::ActorId;
use pi_actors::{ActorError, Feed, Feeder, LogitsWanted, Next};
use pi_kernels::cuda::Device;
use pi_runtime::session::{LoadedModel, ModelOptions, Silent};
use pi_runtime::synth::{SynthOptions, SynthShape, Synthesis};
use pi_topology::{GpuConfig, Machine, Plan, TopologyConfig};
use serde_json::Value;

/// Tests share the GPU; one has it for itself, as a budget has to hold what others have there too.
static GPU: RwLock<()> = RwLock::new(());

/// The GPU, shared with other tests; none where there is none.
fn gpu() -> Option<RwLockReadGuard<'static, ()>> {
    has_gpu().then(|| GPU.read().unwrap_or_else(PoisonError::into_inner))
}

/// The GPU while no other test has it.
fn whole_gpu() -> Option<RwLockWriteGuard<'static, ()>> {
    has_gpu().then(|| GPU.write().unwrap_or_else(PoisonError::into_inner))
}

/// A synthetic model with its sidecar, a text and topologies in a folder.
struct Model {
    folder: tempfile::TempDir,
    file: PathBuf,
}

impl Model {
    fn new() -> Self {
        Self::of(&tiny_synth::options())
    }

    fn of(options: &SynthOptions) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("m.gguf");
        let model = Self { folder, file };
        let synthesis = Synthesis::new(options).unwrap();
        let done = synthesis.write(&model.file, 2, &Silent, &|| false);
        assert!(done.unwrap());
        let words: Vec<String> = (0..600).map(|n: u32| format!("w{}", n * n % 701)).collect();
        std::fs::write(model.path("t.txt"), words.join(" ")).unwrap();
        model
    }

    /// The demo model and its sidecar, with held-out text.
    fn of_demo() -> Self {
        let model = Self {
            folder: tempfile::tempdir().unwrap(),
            file: common::demo_model(),
        };
        let text = std::fs::read_to_string(common::workspace().join("texts/heldout.txt")).unwrap();
        let start: String = text.chars().take(3000).collect();
        std::fs::write(model.path("t.txt"), start).unwrap();
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
        let model = self.file.to_str().unwrap();
        let topology = keys.map(|keys| self.topology(keys));
        let mut args = command.to_vec();
        args.extend(["-m", model]);
        if let Some(topology) = &topology {
            args.extend(["--topology", topology]);
        }
        args.extend(flags);
        run(&args)
    }

    /// Perplexity of the text, with f32 activations.
    fn perplexity(&self, keys: Option<&str>, flags: &[&str]) -> f64 {
        self.perplexity_of("f32", keys, flags)
    }

    fn perplexity_of(&self, activations: &str, keys: Option<&str>, flags: &[&str]) -> f64 {
        let text = self.path("t.txt");
        let fixed = [
            "-f",
            &text,
            "-c",
            "128",
            "--chunks",
            "2",
            "--activations",
            activations,
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

    /// In every mode, token by token and together: the host's perplexity `exact`.
    fn assert_near_host(&self, keys: &str, exact: f64) {
        for (mode, batch) in MODES
            .into_iter()
            .flat_map(|mode| [(mode, "1"), (mode, "100")])
        {
            let flags = [mode, &["-b", batch]].concat();
            let got = self.perplexity(Some(keys), &flags);
            // predictors leave neurons out on the host alone
            let limit = if mode[1] == "predicted" { 0.02 } else { 1e-4 };
            let change = (got / exact - 1.0).abs();
            assert!(change < limit, "{keys}, {flags:?}: {got}, not {exact}");
        }
    }

    /// MiB that have to be on a GPU, at most, where all neurons are more than what streaming them takes.
    fn least_mib(&self, mode: &[&str]) -> usize {
        let text = self.path("t.txt");
        let commands: [(&[&str], &[&str]); 2] = [
            (&[], &["-p", "x", "-n", "1"]),
            (&["perplexity"], &["-f", &text, "-c", "128", "-b", "100"]),
        ];
        let least = commands.map(|(command, flags)| {
            let too_small = Some("required = true\nvram_budget = \"64MiB\"");
            let ran = self.run(command, too_small, &[flags, mode].concat());
            let together = ran.err.split("together").nth(1).unwrap_or_default();
            let mib = together.split_whitespace().next().unwrap_or_default();
            mib.parse::<usize>()
                .unwrap_or_else(|_| panic!("{}", ran.err))
        });
        least[0].max(least[1])
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
    let Some(_gpu) = gpu() else {
        return;
    };
    let model = Model::new();
    let exact = model.perplexity(None, &["--sparsity", "exact"]);
    for percent in [100, 50, 10, 0] {
        let keys = format!("required = true\nhot_percent_max = {percent}");
        model.assert_near_host(&keys, exact);
        let ahead = ["--sparsity", "predicted", "--predictor", "ahead"];
        let got = model.perplexity(Some(&keys), &ahead);
        let host = model.perplexity(None, &ahead);
        assert!(
            (got / host - 1.0).abs() < 0.05,
            "{percent} %: {got}, not {host}"
        );
    }
}

/// 8-bit activations, of which the host gets blocks in place of values where it needs no more.
#[test]
fn every_split_gives_the_host_s_perplexity_with_8_bits() {
    let Some(_gpu) = gpu() else {
        return;
    };
    let model = Model::new();
    let modes: [(&[&str], f64); 3] = [
        (&["--sparsity", "off"], 0.005),
        (&["--sparsity", "exact"], 0.005),
        (&["--sparsity", "predicted", "--predictor", "ahead"], 0.05),
    ];
    for (mode, limit) in modes {
        let flags = [mode, &["-b", "1"]].concat();
        let host = model.perplexity_of("q8", None, &flags);
        for percent in [50, 0] {
            let keys = format!("required = true\nhot_percent_max = {percent}");
            let got = model.perplexity_of("q8", Some(&keys), &flags);
            let change = (got / host - 1.0).abs();
            assert!(change < limit, "{mode:?}, {percent} %: {got}, not {host}");
        }
    }
}

/// Where all neurons are hot, predictors run in blocks of the token's own launches, if these are for heads of their own or many that are
/// shared (the model of other tests has neither): they name what the host's do, and what they read is counted.
#[test]
fn predictors_beside_a_token_s_launches_name_what_the_host_s_do() {
    let Some(_gpu) = gpu() else {
        return;
    };
    let tiny = tiny_synth::options();
    let ahead = ["--sparsity", "predicted", "--predictor", "ahead"];
    for (n_head, n_head_kv) in [(4, 4), (8, 2)] {
        let shape = SynthShape {
            n_layer: 6,
            n_embd: 64 * n_head,
            n_head,
            n_head_kv,
            ..tiny.shape
        };
        let model = Model::of(&SynthOptions {
            shape,
            ..tiny.clone()
        });
        let what = format!("{n_head} heads share {n_head_kv}");
        let one_by_one = [&ahead[..], &["-b", "1"]].concat();
        let host = model.perplexity_of("q8", None, &one_by_one);
        let keys = "required = true";
        // and where the host has a part, beside
        for percent in [100, 50, 0] {
            let keys = format!("{keys}\nhot_percent_max = {percent}");
            let got = model.perplexity_of("q8", Some(&keys), &one_by_one);
            let change = (got / host - 1.0).abs();
            assert!(change < 0.05, "{what}, {percent} %: {got}, not {host}");
        }
        let events = "required = true\nsync = \"events\"";
        let flags = [&ahead[..], &["--activations", "q8"]].concat();
        let first = model.hash(Some(keys), &flags);
        for keys in [keys, events, keys] {
            assert_eq!(model.hash(Some(keys), &flags), first, "{what}, {keys}");
        }
        let bench = [
            "-p",
            "0",
            "-n",
            "20",
            "-d",
            "9",
            "-r",
            "2",
            "-o",
            "json",
            "--activations",
            "q8",
        ];
        let share = |keys| {
            let ran = model.run(&["bench"], keys, &[&bench[..], &ahead].concat());
            assert_eq!(ran.code, 0, "{}", ran.err);
            let json: Value = serde_json::from_str(&ran.out).unwrap();
            json[0]["active_share"].as_f64().unwrap()
        };
        let (host, got) = (share(None), share(Some(keys)));
        // of the first layer, which is not predicted, the host has a sketch
        assert!(
            (got / host - 1.0).abs() < 0.1,
            "{what}: {got} active, not {host}"
        );
    }
}

/// A budget between: some layers are hot as a whole, and predicted in blocks of the token's own launches; others are not, and fork.
#[test]
fn layers_that_are_hot_as_a_whole_go_together_with_others() {
    let Some(_gpu) = whole_gpu() else {
        return;
    };
    let tiny = tiny_synth::options();
    let shape = SynthShape {
        n_layer: 8,
        n_embd: 512,
        n_ff: 8192,
        n_head: 8,
        n_head_kv: 8,
        ..tiny.shape
    };
    let row_bytes = tiny.quant.row_bytes(shape.n_embd);
    let ffn_mib = (shape.n_layer * 3 * shape.n_ff * row_bytes) >> 20;
    let model = Model::of(&SynthOptions { shape, ..tiny });
    // predictors are beside with 8 bits alone
    let exact: &[&str] = &["--sparsity", "exact"];
    let ahead: &[&str] = &["--sparsity", "predicted", "--predictor", "ahead"];
    let runs = [
        (exact, "1", "f32", 1e-4),
        (exact, "100", "f32", 1e-4),
        (ahead, "1", "q8", 0.05),
    ];
    let [exact, ahead] = [exact, ahead].map(|mode| [mode, &["--activations", "q8"]].concat());
    let least = model.least_mib(&ahead);
    for percent in [20, 50, 70] {
        let keys = |sync: &str| {
            let budget = least + ffn_mib * percent / 100;
            format!("required = true\nvram_budget = \"{budget}MiB\"\nsync = \"{sync}\"")
        };
        let flags = keys("flags");
        let planned = [&exact[..], &["-o", "json"]].concat();
        let ran = model.run(&["plan"], Some(&flags), &planned);
        assert_eq!(ran.code, 0, "{}", ran.err);
        let plan: Value = serde_json::from_str(&ran.out).unwrap();
        let forecast = &plan["modes"][0]["gpu"]["prompt"];
        assert_eq!(forecast["kind"], "streamed", "{percent} %: {forecast}");
        for (mode, batch, activations, limit) in runs {
            let command = [mode, &["-b", batch]].concat();
            let host = model.perplexity_of(activations, None, &command);
            let got = model.perplexity_of(activations, Some(&flags), &command);
            let change = (got / host - 1.0).abs();
            assert!(
                change < limit,
                "{command:?}, {percent} %: {got}, not {host}"
            );
        }
        for mode in [&exact, &ahead] {
            let first = model.hash(Some(&flags), mode);
            for sync in ["events", "flags"] {
                let again = model.hash(Some(&keys(sync)), mode);
                assert_eq!(again, first, "{mode:?}, {percent} %, {sync}");
            }
        }
    }
}

/// The same where down projections are plain, so that the others' neurons are all the host's.
#[test]
fn plain_layers_that_are_hot_go_together_with_others() {
    let Some(_gpu) = whole_gpu() else {
        return;
    };
    let tiny = tiny_synth::options();
    let shape = SynthShape {
        n_layer: 8,
        n_embd: 512,
        n_ff: 2048,
        n_head: 8,
        n_head_kv: 8,
        ..tiny.shape
    };
    // in f32
    let ffn_mib = (shape.n_layer * 3 * shape.n_ff * shape.n_embd * 4) >> 20;
    let sparse = Model::of(&SynthOptions { shape, ..tiny });
    let model = Model {
        file: sparse.folder.path().join("plain.gguf"),
        ..sparse
    };
    common::plain_twin::write(&model.folder.path().join("m.gguf"), &model.file).unwrap();
    let off: &[&str] = &["--sparsity", "off"];
    let host = model.perplexity(None, off);
    let least = model.least_mib(off);
    for percent in [15, 30] {
        let budget = least + ffn_mib * percent / 100;
        let keys = format!("required = true\nvram_budget = \"{budget}MiB\"");
        let log = ["-p", "x", "-n", "1", "--log-level", "info"];
        let ran = model.run(&[], Some(&keys), &[off, &log].concat());
        assert_eq!(ran.code, 0, "{}", ran.err);
        let groups = ran.err.split("hot_groups=").nth(1).unwrap_or_default();
        let groups: usize = (groups.split_whitespace().next())
            .and_then(|groups| groups.parse().ok())
            .unwrap_or_else(|| panic!("{}", ran.err));
        assert!(
            groups > 0 && groups < 8 * 16 && groups.is_multiple_of(16),
            "{percent} %: some layers, and whole ones: {groups}"
        );
        for batch in ["1", "100"] {
            let got = model.perplexity(Some(&keys), &[off, &["-b", batch]].concat());
            let change = (got / host - 1.0).abs();
            assert!(change < 1e-4, "{percent} %, {batch}: {got}, not {host}");
        }
    }
}

#[test]
fn one_split_gives_the_same_bits_every_time() {
    let Some(_gpu) = gpu() else {
        return;
    };
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

/// However neurons are divided, tokens are the same, and so is what they read.
#[test]
fn bench_counts_what_tokens_read_on_a_gpu_too() {
    let Some(_gpu) = gpu() else {
        return;
    };
    let model = Model::new();
    for mode in ["off", "exact"] {
        let row = |keys: Option<&str>| {
            let flags = [
                "-p",
                "0",
                "-n",
                "20",
                "-d",
                "9",
                "-r",
                "2",
                "-o",
                "json",
                "--activations",
                "f32",
                "--sparsity",
                mode,
            ];
            let ran = model.run(&["bench"], keys, &flags);
            assert_eq!(ran.code, 0, "{}", ran.err);
            let json: Value = serde_json::from_str(&ran.out).unwrap();
            json[0].clone()
        };
        let host = row(None);
        for percent in [100, 50, 0] {
            for sync in ["flags", "events"] {
                let got = row(Some(&format!(
                    "required = true\nhot_percent_max = {percent}\nsync = \"{sync}\""
                )));
                for (name, limit) in [("active_share", 0.002), ("bytes_per_token", 0.01)] {
                    let ratio = got[name].as_f64().unwrap() / host[name].as_f64().unwrap();
                    let what = format!("{mode}, {percent} %, {sync}: {name} {ratio}");
                    assert!((ratio - 1.0).abs() < limit, "{what}: {got}, not {host}");
                }
                assert!(
                    got["percent_of_byte_limit"].as_f64().unwrap() > 0.0,
                    "{got}"
                );
            }
        }
    }
}

/// The demo model, in every mode and split, token by token and together.
#[test]
fn the_demo_model_gives_the_host_s_perplexity() {
    let Some(_gpu) = gpu() else {
        return;
    };
    if !common::demo_model().exists() {
        println!("skipped: the demo model is not here");
        return;
    }
    let model = Model::of_demo();
    // an f16 cache rounds what differs in its last bit to values 2^-11 apart: over so few tokens as much as what is asserted
    let exact = model.perplexity(None, &["--sparsity", "exact", "--kv", "f32"]);
    let predicted = [
        "--sparsity",
        "predicted",
        "--predictor",
        "in-layer",
        "--kv",
        "f32",
    ];
    let in_layer = model.perplexity(None, &predicted);
    for percent in [100, 50, 10, 0] {
        let keys = format!("required = true\nhot_percent_max = {percent}");
        for batch in ["1", "100"] {
            let off = ["--sparsity", "off", "--kv", "f32", "-b", batch];
            let got = model.perplexity(Some(&keys), &off);
            assert!((got / exact - 1.0).abs() < 1e-4, "off: {got}, not {exact}");
            let sparse = ["--sparsity", "exact", "--kv", "f32", "-b", batch];
            let got = model.perplexity(Some(&keys), &sparse);
            assert!(
                (got / exact - 1.0).abs() < 1e-4,
                "exact: {got}, not {exact}"
            );
        }
        // what is hot is not predicted: between exact and all predicted
        let got = model.perplexity(Some(&keys), &predicted);
        let (low, high) = (exact.min(in_layer), exact.max(in_layer));
        assert!(
            got > low * 0.998 && got < high * 1.002,
            "predicted: {got}, not {low} to {high}"
        );
    }
}

#[test]
fn events_give_the_bits_of_flags() {
    let Some(_gpu) = gpu() else {
        return;
    };
    let model = Model::new();
    let modes: [&[&str]; 4] = [
        &["--sparsity", "off"],
        &["--sparsity", "predicted", "--predictor", "in-layer"],
        &["--sparsity", "predicted", "--predictor", "both"],
        &["--sparsity", "predicted", "--predictor", "ahead"],
    ];
    for percent in [100, 50, 0] {
        let keys = format!("required = true\nhot_percent_max = {percent}");
        for mode in modes {
            let flags = model.hash(Some(&keys), mode);
            assert!(flags.is_string());
            let events = model.hash(Some(&format!("{keys}\nsync = \"events\"")), mode);
            assert_eq!(events, flags, "{percent} % hot, {mode:?}");
        }
    }
}

#[test]
fn the_timeline_shows_the_gpu_within_the_token() {
    let Some(_gpu) = gpu() else {
        return;
    };
    let model = Model::new();
    let path = model.path("t.pftrace");
    let keys = "required = true\nhot_percent_max = 50";
    let flags = [
        "--sparsity",
        "predicted",
        "--predictor",
        "ahead",
        "-p",
        "a b",
        "-n",
        "8",
        "--trace",
        &path,
    ];
    let ran = model.run(&[], Some(keys), &flags);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let file = TraceFile::read(path.as_ref());
    let (gpu, predictor) = (file.track("GPU 0"), file.track("GPU 0 predictor"));
    let steps: Vec<_> = file
        .spans
        .iter()
        .filter(|span| span.name == "decode" && span.category == "step")
        .collect();
    let mut parts: Vec<_> = file.spans.iter().filter(|span| span.track == gpu).collect();
    parts.sort_by_key(|span| span.start_ns);
    let n_layer = tiny_synth::options().shape.n_layer;
    let waits = parts
        .iter()
        .filter(|span| span.name.ends_with("wait for the host"));
    assert!(steps.len() >= 7 && waits.count() >= n_layer * steps.len());
    assert!(file.spans.iter().any(|span| span.track == predictor));
    for pair in parts.windows(2) {
        // what is between two parts of a token is nothing
        assert!(pair[0].end_ns <= pair[1].start_ns, "{pair:?}");
    }
    for step in steps {
        let number = step.numbers["step"];
        let of_step: Vec<_> = parts
            .iter()
            .filter(|part| part.numbers["step"] == number)
            .collect();
        let (Some(first), Some(last)) = (of_step.first(), of_step.last()) else {
            panic!("{step:?} has nothing on the GPU");
        };
        let error = first.numbers["clock_error_ns"];
        assert!(error < 100_000, "{error}");
        assert!(
            first.start_ns + error >= step.start_ns,
            "{first:?} {step:?}"
        );
        assert!(last.end_ns <= step.end_ns + error, "{last:?} {step:?}");
    }
}

/// Two GPUs with a part of the layers each, by budgets that one alone would not do with.
#[test]
fn two_gpus_give_the_host_s_perplexity() {
    let shared = gpu();
    if shared.is_none() || Device::open(1).is_err() {
        println!("skipped: no second GPU");
        return;
    }
    let model = Model::new();
    let exact = model.perplexity(None, &["--sparsity", "exact"]);
    for percent in [90, 50, 0] {
        let gpu = format!("required = true\nhot_percent_max = {percent}");
        for sync in ["flags", "events"] {
            let keys = format!("{gpu}\nsync = \"{sync}\"\n[[gpu]]\n{gpu}");
            model.assert_near_host(&keys, exact);
            let flags = ["--sparsity", "predicted", "--predictor", "ahead"];
            let first = model.hash(Some(&keys), &flags);
            assert_eq!(
                model.hash(Some(&keys), &flags),
                first,
                "{percent} %, {sync}"
            );
        }
    }
}

/// A prompt and tokens behind it.
struct Tokens {
    feeds: VecDeque<(usize, Vec<u32>)>,
    now: Vec<u32>,
}

impl Feeder for Tokens {
    fn next(&mut self) -> Next<'_> {
        let Some((position, tokens)) = self.feeds.pop_front() else {
            return Next::Done;
        };
        self.now = tokens;
        Next::Feed(Feed {
            tokens: &self.now,
            position,
            logits: LogitsWanted::Last,
        })
    }

    fn logits(&mut self, _: usize, _: &[f32]) {}
}

/// A GPU that fails: in the middle of a prompt, of a token, and for whoever comes after.
#[test]
fn a_lost_gpu_is_a_clear_error_and_no_hang() {
    let Some(_gpu) = gpu() else {
        return;
    };
    // the device's context is lost with it, so that each has a process of its own
    const ALONE: &str = "PI_RUNTIME_TRAP";
    let Some(after) = std::env::var_os(ALONE) else {
        for after in ["0", "2", "30"] {
            let mut test = std::process::Command::new(std::env::current_exe().unwrap());
            let name = "a_lost_gpu_is_a_clear_error_and_no_hang";
            let status = test
                .args([name, "--exact", "--nocapture"])
                .env(ALONE, after)
                .status();
            assert!(status.unwrap().success(), "after {after} messages");
        }
        return;
    };
    let after_messages: u64 = after.to_str().unwrap().parse().unwrap();
    let model = Model::new();
    let faults = Faults::new([Fault {
        actor: ActorId::DeviceLayer { layer: 1 },
        after_messages,
        place: FaultPlace::Gpu,
        once: true,
    }]);
    let config = TopologyConfig {
        gpus: vec![GpuConfig {
            hot_percent_max: 50,
            required: true,
            ..GpuConfig::default()
        }],
        ..TopologyConfig::default()
    };
    let plan = Plan::new(&config, &Machine::discover().unwrap(), None).unwrap();
    let options = ModelOptions {
        faults: faults.clone(),
        ..ModelOptions::new(model.file.clone())
    };
    let loaded = LoadedModel::open(&options, &plan, &Silent).unwrap();
    for run in 0..2 {
        let feeds = (0..20).map(|n| match n {
            0 => (0, (1..41).collect()),
            n => (39 + n, vec![7]),
        });
        let feeder = Tokens {
            feeds: feeds.collect(),
            now: vec![],
        };
        let error = loaded.engine.run(feeder).unwrap().outcome.unwrap_err();
        assert!(matches!(error, ActorError::Gpu { .. }), "{run}: {error:?}");
        let text = loaded.step_error(error).to_string();
        assert!(text.contains("GPU") || text.contains("CUDA"), "{text}");
    }
    assert!(faults.all_happened());
}

#[test]
fn too_small_a_budget_is_refused_with_a_table() {
    let Some(_gpu) = gpu() else {
        return;
    };
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

/// `plan` opens the GPUs of its topology, and forecasts a token and a prompt with them.
#[test]
fn gpus_are_planned_for() {
    let Some(_gpu) = gpu() else {
        return;
    };
    let model = Model::new();
    let keys = Some("required = true\nhot_percent_max = 50");
    let ran = model.run(&["plan"], keys, &["--sparsity", "exact", "-o", "json"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let plan: Value = serde_json::from_str(&ran.out).unwrap();
    let name = Device::open(0).unwrap().info().name.clone();
    assert_eq!(plan["gpus"][0]["name"], name);
    let forecast = &plan["modes"][0]["gpu"];
    assert!(forecast["tokens_per_s"].as_f64().unwrap() > 0.0);
    assert!(forecast["hand_off_ms"].as_f64().unwrap() > 0.0);
    assert_eq!(forecast["prompt"]["kind"], "streamed", "{forecast}");
}

/// Gates in planes go over the link, too: all neurons of a prompt are computed, with the bits that rows of gates give.
#[test]
fn prompts_are_streamed_where_gates_are_in_planes() {
    let Some(_gpu) = gpu() else {
        return;
    };
    let model = Model::new();
    let in_layer: &[&str] = &["--sparsity", "predicted", "--predictor", "in-layer"];
    let words: Vec<String> = (0..100).map(|n: u32| format!("w{}", n * n % 701)).collect();
    let prompt = words.join(" ");
    for percent in [50, 10, 0] {
        let keys = format!("required = true\nhot_percent_max = {percent}");
        let planned = [in_layer, &["-o", "json"]].concat();
        let ran = model.run(&["plan"], Some(&keys), &planned);
        assert_eq!(ran.code, 0, "{}", ran.err);
        let plan: Value = serde_json::from_str(&ran.out).unwrap();
        let forecast = &plan["modes"][0]["gpu"]["prompt"];
        assert_eq!(forecast["kind"], "streamed", "{percent} %: {forecast}");
        for activations in ["q8", "f32"] {
            let hash = |mode: &[&str]| {
                let fixed = ["-p", &prompt, "-n", "1", "--temp", "0", "--json"];
                let flags = [&fixed, &["--activations", activations][..], mode].concat();
                let ran = model.run(&[], Some(&keys), &flags);
                assert_eq!(ran.code, 0, "{}", ran.err);
                let json: Value = serde_json::from_str(&ran.out).unwrap();
                assert!(json["logits_hash"].is_string());
                json["logits_hash"].clone()
            };
            let exact = hash(&["--sparsity", "exact"]);
            assert_eq!(hash(in_layer), exact, "{percent} %, {activations}");
        }
    }
}

/// Layers whose down projection is plain are hot as a whole or not at all; those that are not are streamed, too.
#[test]
fn prompts_are_streamed_where_down_projections_are_plain() {
    let Some(_gpu) = gpu() else {
        return;
    };
    for name in ["llama-yarn", "qwen2-tied", "gemma"] {
        let fixtures = common::workspace().join("tests/fixtures");
        let model = Model {
            folder: tempfile::tempdir().unwrap(),
            file: fixtures.join(format!("family/{name}.gguf")),
        };
        std::fs::copy(fixtures.join("text/bench.txt"), model.path("t.txt")).unwrap();
        let off: &[&str] = &["--sparsity", "off"];
        let host = model.perplexity(None, off);
        for percent in [100, 50, 0] {
            let keys = format!("required = true\nhot_percent_max = {percent}");
            let ran = model.run(&["plan"], Some(&keys), &[off, &["-o", "json"]].concat());
            assert_eq!(ran.code, 0, "{}", ran.err);
            let plan: Value = serde_json::from_str(&ran.out).unwrap();
            let forecast = &plan["modes"][0]["gpu"]["prompt"];
            let kind = if percent == 100 {
                "all_hot"
            } else {
                "streamed"
            };
            assert_eq!(forecast["kind"], kind, "{name}, {percent} %: {forecast}");
            let two_nodes = format!("{keys}\n[host]\nnodes = 2");
            for (batch, nodes) in [("1", 1), ("100", 1), ("1", 2), ("100", 2)] {
                let (keys, simulated): (_, &[&str]) = match nodes {
                    1 => (&keys, &[]),
                    _ => (&two_nodes, &["--simulate"]),
                };
                let flags = [off, &["-b", batch], simulated].concat();
                let got = model.perplexity(Some(keys), &flags);
                let change = (got / host - 1.0).abs();
                assert!(
                    change < 1e-4,
                    "{name}, {percent} %, {batch}, {nodes} nodes: {got}, not {host}"
                );
            }
        }
    }
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
