//! A sketch of the demo model's head, fitted to some text and tried on other text.

mod common;

use std::num::NonZeroUsize;
use std::sync::Arc;

use common::running::json_of;
use common::{demo_model, workspace};
use pi_runtime::gguf::GgufFile;
use pi_runtime::head_sketch::{
    FitOptions, Head, HeadSketch, HeadTap, agreement, fit, prepare_head,
};
use pi_runtime::model::{Hyperparameters, ModelTensors};
use pi_runtime::sampler::SamplerParams;
use pi_runtime::session::{LoadedModel, ModelOptions, Silent, TopologyFile};
use pi_runtime::sidecar::sidecar_header;
use pi_runtime::tokenizer::EncodeOptions;

fn options(n_ctx: usize) -> ModelOptions {
    ModelOptions {
        n_ctx,
        ..ModelOptions::new(demo_model())
    }
}

fn open(options: &ModelOptions) -> LoadedModel {
    let plan = TopologyFile::read(None).unwrap().plan(None).unwrap();
    LoadedModel::open(options, &plan, &Silent).unwrap()
}

/// The beginning of one of the shared texts, if it is there.
fn text(name: &str, len: usize) -> Option<String> {
    let path = workspace().join("../shared/text").join(name);
    let text = std::fs::read_to_string(&path).ok();
    if text.is_none() {
        println!("skipped: there is no {}", path.display());
    }
    let text = text?;
    let end = (0..=len.min(text.len()))
        .rev()
        .find(|end| text.is_char_boundary(*end));
    Some(text[..end?].to_owned())
}

fn write(sketch: &HeadSketch, path: &std::path::Path) {
    let model = GgufFile::open(demo_model()).unwrap();
    let hyper = Hyperparameters::read(&model).unwrap();
    let mut header = sidecar_header(&model, &hyper).unwrap();
    sketch.declare(&mut header).unwrap();
    let mut file = header.create(path).unwrap();
    sketch.write(&mut file).unwrap();
    file.finish().unwrap();
}

#[test]
fn the_demo_model_s_head_chooses_as_before_from_a_fraction_of_the_bytes() {
    let (Some(calibration), Some(held_out)) =
        (text("calibration.txt", 20_000), text("heldout.txt", 3_000))
    else {
        return;
    };
    let tap = Arc::new(HeadTap::default());
    let model = open(&ModelOptions {
        tap: Some(tap.clone()),
        ..options(512)
    });
    let encode = |text: &str| model.tokenizer.encode(text, EncodeOptions::TEXT).unwrap();
    let (calibration, held_out) = (encode(&calibration), encode(&held_out));
    let fitting = FitOptions {
        ranks: vec![64, 128],
        n_tokens_max: 6 * 512,
        n_threads: NonZeroUsize::new(2).unwrap(),
        ..FitOptions::default()
    };
    let sketch = prepare_head(
        &model,
        &tap,
        &calibration,
        &fitting,
        &Arc::default(),
        &|_| (),
    )
    .unwrap()
    .expect("a third of the model is worth a sketch");
    println!(
        "rank {}, {} groups, {:.0} candidates",
        sketch.rank, sketch.n_groups, sketch.mean_candidates
    );
    drop(model);
    let folder = tempfile::tempdir().unwrap();
    let sidecar = folder.path().join("demo.sparse.gguf");
    write(&sketch, &sidecar);

    let model = open(&ModelOptions {
        sidecar: Some(sidecar.clone()),
        head: Head::Sparse,
        ..options(512)
    });
    let chunks: Vec<Vec<u32>> = held_out
        .chunks_exact(256)
        .take(2)
        .map(<[u32]>::to_vec)
        .collect();
    let agreement = agreement(&model, &chunks, &SamplerParams::default(), 1).unwrap();
    println!("{agreement:?}");
    assert_eq!(agreement.n_positions, 512);
    assert!(agreement.greedy >= 0.998, "{agreement:?}");
    assert!(agreement.sampled >= 0.99, "{agreement:?}");
    assert!(agreement.total_variation <= 0.003, "{agreement:?}");
    assert!(
        agreement.sparse_bytes < agreement.full_bytes / 4.0,
        "{agreement:?}"
    );
    drop(model);

    let (model, sidecar) = (demo_model(), sidecar.to_str().unwrap().to_owned());
    let args = [
        "-m",
        model.to_str().unwrap(),
        "-p",
        "The capital of France is",
        "-n",
        "12",
        "--temp",
        "0",
        "--json",
    ];
    let full = json_of(&args);
    let sparse = json_of(&[&args[..], &["--head", "sparse", "--sidecar", &sidecar]].concat());
    assert_eq!(sparse["tokens"], full["tokens"]);
}

#[test]
fn a_fit_is_the_same_for_any_number_of_threads_and_says_what_it_lacks() {
    let model = GgufFile::open(demo_model()).unwrap();
    let hyper = Hyperparameters::read(&model).unwrap();
    let tensors = ModelTensors::find(&model, &hyper).unwrap();
    // what the head sees is near some of its own rows
    let mut samples = pi_runtime::head_sketch::HeadSamples {
        n_embd: hyper.n_embd,
        values: Vec::new(),
    };
    let head = tensors.head();
    let mut row = vec![0.0; hyper.n_embd];
    for token in 0..600 {
        let at = 7 * token;
        pi_runtime::model::quantize::dequantize_row(head.quant, head.rows(at..at + 1), &mut row);
        samples.values.extend(row.iter().map(|value| 20.0 * value));
    }
    let fitted = |n_threads: usize| {
        let options = FitOptions {
            ranks: vec![32],
            // whoever it is for: the fit itself is what is compared
            miss_max: 1.0,
            n_threads: NonZeroUsize::new(n_threads).unwrap(),
            ..FitOptions::default()
        };
        fit(&samples, head, &options, &|_| ()).unwrap()
    };
    let one = fitted(1).expect("few candidates are enough where all may be missed");
    assert_eq!(one.rank, 32);
    assert!(Some(one) == fitted(3));
    samples.values.truncate(100 * hyper.n_embd);
    let error = fit(&samples, head, &FitOptions::default(), &|_| ()).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("100 hidden states") && text.contains("512"),
        "{text}"
    );
}
