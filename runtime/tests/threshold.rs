//! `--sparsity threshold`: calibrated, written to a sidecar, run from it, and refused where it makes no sense.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::running::{Folder, TEXT, json_of, run};
use common::tiny_model::TinyModel;
use common::workspace;
use pi_kernels::QuantType;
use pi_runtime::gguf::{GgufFile, GgufWriter};
use pi_runtime::model::threshold::{Criterion, LayerThresholds, Thresholds};
use pi_runtime::model::{Hyperparameters, ModelTensors, Sparsity};
use pi_runtime::session::{ModelOptions, TopologyFile};
use pi_runtime::sidecar::{Sidecar, ThresholdFigures, ThresholdSection, sidecar_header};
use pi_runtime::threshold::proposal::{Division, Way};
use pi_runtime::threshold::{CalibrateOptions, Calibration, Step, calibrate};

fn silu(neuron_major: bool) -> TinyModel {
    TinyModel {
        gate: None,
        neuron_major,
        quant: QuantType::Q4_1,
        n_embd: 128,
        ..TinyModel::default()
    }
}

fn gelu(neuron_major: bool) -> TinyModel {
    TinyModel {
        neuron_major,
        quant: QuantType::Q4_1,
        n_embd: 128,
        head_dim: Some(64),
        ..TinyModel::gemma()
    }
}

fn options(path: &Path) -> ModelOptions {
    ModelOptions::new(path.to_path_buf())
}

/// Writes the section as `m.sparse.gguf` beside `m.gguf`, its header changed by `change`.
fn write_changed(
    folder: &Folder,
    section: &ThresholdSection,
    change: impl FnOnce(&mut GgufWriter),
) {
    let model = GgufFile::open(folder.path("m.gguf")).unwrap();
    let hyper = Hyperparameters::read(&model).unwrap();
    let mut header = sidecar_header(&model, &hyper).unwrap();
    section.declare(&mut header).unwrap();
    change(&mut header);
    let mut file = header.create(&folder.path("m.sparse.gguf")).unwrap();
    section.write(&mut file).unwrap();
    file.finish().unwrap();
}

fn write(folder: &Folder, section: &ThresholdSection) {
    write_changed(folder, section, |_| ());
}

/// A section with `value` for every neuron.
fn section(model: &TinyModel, criterion: Criterion, value: f32, gains: bool) -> ThresholdSection {
    let down = if model.neuron_major {
        model.quant
    } else {
        QuantType::Q5_0
    };
    let layer = LayerThresholds {
        criterion,
        down,
        values: vec![value; model.n_ff],
    };
    ThresholdSection {
        thresholds: Thresholds {
            layers: vec![Some(layer); model.n_layer],
            skipped: 0.25,
        },
        figures: ThresholdFigures {
            budget: 0.005,
            ppl_off: 10.0,
            ppl_threshold: 10.25,
            rise_error: 0.001,
            skipped: 0.25,
            bytes_off: 2e6,
            bytes_threshold: 1.5e6,
            tok_s_off: 100.0,
            tok_s_threshold: 90.5,
            gains,
        },
    }
}

#[test]
fn a_calibrated_model_runs_from_its_sidecar_with_equal_bits_however_it_is_run() {
    for model in [silu(true), silu(false), gelu(true), gelu(false)] {
        let neuron_major = model.neuron_major;
        let folder = Folder::with(&model);
        let plan = TopologyFile::default().plan(Some(2)).unwrap();
        let how = CalibrateOptions {
            budget: 0.02,
            chunk_tokens: 64,
            sampled_chunks: 2,
            n_samples: 32,
            scored_chunks: 2,
            bench_rounds: 0,
            bench_tokens: 4,
            ..CalibrateOptions::default()
        };
        let text = TEXT.repeat(6);
        let mut n_tried = 0;
        let mut count = |step: Step<'_>| n_tried += usize::from(matches!(step, Step::Tried { .. }));
        let found = calibrate(
            &options(&folder.path("m.gguf")),
            &plan,
            &text,
            Path::new("text"),
            &how,
            &mut count,
            &Arc::default(),
        )
        .unwrap();
        let figures = found.figures;
        assert!(n_tried > 1, "{n_tried} tried");
        assert!(figures.gains && figures.rise() <= 0.02, "{figures:?}");
        assert!(figures.skipped > 0.02 && figures.bytes_threshold < figures.bytes_off);

        write(&folder, &found);
        let model = GgufFile::open(folder.path("m.gguf")).unwrap();
        let hyper = Hyperparameters::read(&model).unwrap();
        let stored = ModelTensors::find(&model, &hyper).unwrap().stored_downs();
        let sidecar = Sidecar::open(&folder.path("m.sparse.gguf"), &model, &hyper).unwrap();
        let read = ThresholdSection::read(&sidecar, &hyper, &stored).unwrap();
        let read = read.unwrap();
        assert_eq!(read.thresholds.layers, found.thresholds.layers);
        assert!((read.figures.ppl_off / figures.ppl_off - 1.0).abs() < 1e-6);

        let path = folder.name("m.gguf");
        let args = ["-m", &path, "-p", TEXT, "-n", "12", "--temp", "0", "--json"];
        let with = |more: &[&str]| json_of(&[&args[..], more].concat());
        let one = with(&["--sparsity", "threshold", "-t", "1"]);
        let lossy = one["timings"]["lossy"].to_string();
        assert!(lossy.contains("threshold on"), "{lossy}");
        assert_eq!(lossy.contains("down re-quantised"), !neuron_major);
        let active = one["timings"]["active_share"].as_f64().unwrap();
        assert!(active < 0.99, "{active}");
        for more in [["-t", "2"], ["-b", "1"], ["-b", "7"]] {
            let other = with(&[&["--sparsity", "threshold"], &more[..]].concat());
            assert_eq!(other["logits_hash"], one["logits_hash"], "{more:?}");
        }
        let off = with(&["--sparsity", "off"]);
        assert_ne!(off["logits_hash"], one["logits_hash"]);
        assert!(
            one["timings"]["bytes_per_token"].as_u64() < off["timings"]["bytes_per_token"].as_u64()
        );
    }
}

#[test]
fn thresholds_of_zero_change_nothing_where_the_file_has_rows_of_neurons() {
    for model in [silu(true), gelu(true)] {
        let folder = Folder::with(&model);
        let path = folder.name("m.gguf");
        let args = ["-m", &path, "-p", TEXT, "-n", "8", "--temp", "0", "--json"];
        let off = json_of(&args);
        for criterion in Criterion::ALL {
            write(&folder, &section(&model, criterion, 0.0, true));
            let all = json_of(&[&args[..], &["--sparsity", "threshold"]].concat());
            assert_eq!(all["logits_hash"], off["logits_hash"], "{criterion:?}");
        }
    }
}

#[test]
fn layers_may_have_different_criteria_or_none() {
    let model = TinyModel {
        n_layer: 3,
        ..silu(false)
    };
    let folder = Folder::with(&model);
    let mut mixed = section(&model, Criterion::Gate, 0.01, true);
    mixed.thresholds.layers[1] = None;
    mixed.thresholds.layers[2].as_mut().unwrap().criterion = Criterion::Product;
    write(&folder, &mixed);
    let path = folder.name("m.gguf");
    let args = [
        "-m",
        &path,
        "-p",
        TEXT,
        "-n",
        "8",
        "--temp",
        "0",
        "--json",
        "--sparsity",
    ];
    let ran = json_of(&[&args[..], &["threshold"]].concat());
    let lossy = ran["timings"]["lossy"].to_string();
    assert!(lossy.contains("threshold on gate and product"), "{lossy}");
    let again = json_of(&[&args[..], &["threshold", "-b", "1", "-t", "1"]].concat());
    assert_eq!(again["logits_hash"], ran["logits_hash"]);
}

/// Runs the mode, which must be refused with these words.
fn refused(folder: &Folder, words: &[&str]) {
    let path = folder.name("m.gguf");
    let ran = run(&["-m", &path, "-p", "a", "-n", "2", "--sparsity", "threshold"]);
    assert_eq!(ran.code, 2, "{}", ran.err);
    for word in words {
        assert!(ran.err.contains(word), "{word}: {}", ran.err);
    }
    assert_eq!(ran.err.lines().count(), 1, "{}", ran.err);
}

#[test]
fn thresholds_that_gain_nothing_are_refused_unless_forced() {
    for model in [silu(false), gelu(false)] {
        is_refused_unless_forced(&model);
    }
}

fn is_refused_unless_forced(model: &TinyModel) {
    let folder = Folder::with(model);
    write(&folder, &section(model, Criterion::Product, 0.02, false));
    let figures = ["+2.50 %", "2.0 -> 1.5 MB", "100.0 -> 90.5 tok/s"];
    refused(&folder, &figures);
    refused(&folder, &["--sparsity off", "--force-threshold"]);
    let path = folder.name("m.gguf");
    let args = ["-m", &path, "-p", "a", "-n", "2", "--sparsity", "threshold"];
    let forced = run(&[&args[..], &["--force-threshold"]].concat());
    assert_eq!(forced.code, 0, "{}", forced.err);
}

#[test]
fn without_what_it_needs_the_mode_is_refused() {
    let relu = Folder::with(&TinyModel::default());
    refused(&relu, &["relu", "--sparsity exact"]);
    let folder = Folder::with(&gelu(true));
    refused(&folder, &["there is no", "prepare"]);
    let folder = Folder::with(&silu(true));
    refused(&folder, &["there is no", "prepare"]);

    let plan = TopologyFile::default().plan(Some(1)).unwrap();
    let calibrated = |path: &Path, text: &str| {
        let how = CalibrateOptions::default();
        let (options, interrupt) = (options(path), Arc::default());
        let quiet = &mut |_: Step<'_>| ();
        let file = Path::new("t.txt");
        let outcome = calibrate(&options, &plan, text, file, &how, quiet, &interrupt);
        outcome.unwrap_err().to_string()
    };
    let error = calibrated(&folder.path("m.gguf"), TEXT);
    assert!(
        error.contains("t.txt") && error.contains("tokens"),
        "{error}"
    );
    let error = calibrated(&relu.path("m.gguf"), TEXT);
    assert!(error.contains("--sparsity exact"), "{error}");
}

#[test]
fn a_section_that_does_not_fit_is_refused() {
    let model = silu(true);
    let folder = Folder::with(&model);
    let good = section(&model, Criterion::Gate, 0.01, true);
    let changed = |change: &dyn Fn(&mut GgufWriter), words: &[&str]| {
        write_changed(&folder, &good, |header| change(header));
        refused(&folder, words);
    };
    let put = |key: &'static str, words: [&'static str; 2]| {
        move |header: &mut GgufWriter| {
            let words: Vec<String> = words.map(str::to_owned).into();
            header
                .put(&format!("sparse.threshold.{key}"), words)
                .unwrap();
        }
    };
    changed(&put("criterion", ["gate", "up"]), &["layer 1", "\"up\""]);
    changed(&put("down_type", ["Q4_1", "Q4_0"]), &["layer 1", "Q4_0"]);
}

#[test]
fn damaged_thresholds_are_refused() {
    let model = silu(true);
    let folder = Folder::with(&model);
    let with = |change: &dyn Fn(&mut Vec<f32>), words: &[&str]| {
        let mut bad = section(&model, Criterion::Gate, 0.01, true);
        change(&mut bad.thresholds.layers[1].as_mut().unwrap().values);
        write(&folder, &bad);
        refused(&folder, words);
    };
    with(&|values| values[7] = -1.0, &["value 7", "blk.1.threshold"]);
    with(&|values| values[9] = f32::NAN, &["value 9", "not finite"]);
    with(&|values| values.truncate(500), &["blk.1.threshold", "500"]);

    // a section that the sidecar lacks
    let file = GgufFile::open(folder.path("m.gguf")).unwrap();
    let hyper = Hyperparameters::read(&file).unwrap();
    let header = sidecar_header(&file, &hyper).unwrap();
    let empty = header.create(&folder.path("m.sparse.gguf")).unwrap();
    empty.finish().unwrap();
    refused(&folder, &["no thresholds"]);
}

#[test]
fn layers_that_bear_quantising_again_badly_are_spared() {
    for neuron_major in [false, true] {
        let model = silu(neuron_major);
        let folder = Folder::with(&model);
        let options = options(&folder.path("m.gguf"));
        let plan = TopologyFile::default().plan(Some(1)).unwrap();
        let how = CalibrateOptions {
            chunk_tokens: 64,
            sampled_chunks: 1,
            n_samples: 16,
            scored_chunks: 2,
            bench_rounds: 0,
            ..CalibrateOptions::default()
        };
        let (text, file, interrupt) = (TEXT.repeat(6), Path::new("text"), Arc::default());
        let quiet = &mut |_: Step<'_>| ();
        let calibration =
            Calibration::begin(&options, &plan, &text, file, &how, quiet, &interrupt).unwrap();
        let fragility = calibration.fragility().unwrap();
        let proposer = calibration.proposer(Division::ByResidual).unwrap();
        let proposer = proposer.sparing(&fragility);
        let all: Vec<usize> = (0..model.n_layer).collect();
        let mut ordered = fragility.worst(model.n_layer).to_vec();
        ordered.sort_unstable();
        // rows of neurons in the file are taken as they are, and no layer suffers
        assert_eq!(ordered, if neuron_major { vec![] } else { all });
        assert_eq!(neuron_major, fragility.counts() == [0]);
        let most = proposer.ways().into_iter().max_by_key(|way| way.spared);
        let most = most.unwrap();
        let layers = &proposer.propose_all(most, 0.3).thresholds.layers;
        for (layer, thresholds) in layers.iter().enumerate() {
            let spared = fragility.worst(most.spared).contains(&layer);
            assert_eq!(thresholds.is_none(), spared, "layer {layer} of {most:?}");
        }
    }
}

#[test]
fn a_real_model_reads_less_and_stays_near() {
    let path = workspace().join("models/extra/SmolLM2-135M-Instruct.Q4_1.gguf");
    if !path.exists() {
        eprintln!("skipped: {} is not there", path.display());
        return;
    }
    let options = ModelOptions {
        sparsity: Some(Sparsity::Threshold),
        ..options(&path)
    };
    let how = CalibrateOptions {
        chunk_tokens: 128,
        sampled_chunks: 2,
        n_samples: 64,
        scored_chunks: 2,
        bench_rounds: 0,
        bench_tokens: 64,
        ..CalibrateOptions::default()
    };
    let plan = TopologyFile::default().plan(None).unwrap();
    let text = std::fs::read_to_string(workspace().join("tests/fixtures/text/bench.txt")).unwrap();
    let interrupt = Arc::default();
    let quiet = &mut |_: Step<'_>| ();
    let file = Path::new("bench.txt");
    let calibration =
        Calibration::begin(&options, &plan, &text, file, &how, quiet, &interrupt).unwrap();
    let proposer = calibration.proposer(Division::ByResidual).unwrap();
    let way = Way {
        criterion: Criterion::Product,
        down: Some(QuantType::Q5_0),
        spared: 0,
    };
    assert!(proposer.ways().contains(&way), "{:?}", proposer.ways());
    let proposal = proposer.propose_all(way, 0.3);
    let figures = calibration.measure(&proposal.thresholds).unwrap().figures;
    assert!((0.28..0.32).contains(&figures.skipped), "{figures:?}");
    assert!(figures.bytes_threshold < figures.bytes_off, "{figures:?}");
    // as it was calibrated, a few tokens decoded of another text are near
    let measured = figures.bytes_threshold / figures.bytes_off;
    let foretold = proposal.bytes / proposer.bytes_off();
    assert!((measured - foretold).abs() < 0.01, "{measured} {foretold}");
    assert!(figures.rise().abs() < 0.05, "{figures:?}");
}
