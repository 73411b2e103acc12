//! Makes a sidecar with nothing but a sketch of the head, and compares both heads on another text:
//! `cargo run --release --example head_sketch -- MODEL CALIBRATION.txt HELD-OUT.txt OUT.sparse.gguf [TOKENS]`

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use pi_runtime::gguf::GgufFile;
use pi_runtime::head_sketch::{FitOptions, Head, HeadSketch, HeadTap, agreement, prepare_head};
use pi_runtime::model::Hyperparameters;
use pi_runtime::sampler::SamplerParams;
use pi_runtime::session::{LoadedModel, ModelOptions, Silent, TopologyFile};
use pi_runtime::sidecar::sidecar_header;
use pi_runtime::tokenizer::EncodeOptions;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, model_path, calibration, held_out, out, rest @ ..] = &arguments[..] else {
        anyhow::bail!("give MODEL CALIBRATION.txt HELD-OUT.txt OUT.sparse.gguf [TOKENS]");
    };
    let n_held_out = rest.first().map_or(Ok(2048), |n| n.parse())?;
    let tap = Arc::new(HeadTap::default());
    let mut options = ModelOptions {
        n_ctx: 512,
        tap: Some(tap.clone()),
        ..ModelOptions::new(model_path.into())
    };
    let plan = TopologyFile::read(None)?.plan(None)?;
    let model = LoadedModel::open(&options, &plan, &Silent)?;
    let encode = |path: &str| {
        let text = std::fs::read_to_string(path).with_context(|| path.to_owned())?;
        Ok::<_, anyhow::Error>(model.tokenizer.encode(&text, EncodeOptions::TEXT)?)
    };
    let (calibration, held_out) = (encode(calibration)?, encode(held_out)?);
    let start = Instant::now();
    let fitting = FitOptions::default();
    let never = Arc::default();
    let sketch = prepare_head(&model, &tap, &calibration, &fitting, &never, &|_| ())?;
    let sketch = sketch.context("a sparse head would save too little")?;
    drop(model);
    write(&sketch, model_path, Path::new(out))?;
    println!(
        "{out}: rank {}, {} groups, {:.0} candidates, {:.2} MB, made in {:.0} s",
        sketch.rank,
        sketch.n_groups,
        sketch.mean_candidates,
        (sketch.project.len() + sketch.scores.len()) as f64 / 1e6,
        start.elapsed().as_secs_f64()
    );

    options.tap = None;
    options.sidecar = Some(out.into());
    options.head = Head::Sparse;
    let model = LoadedModel::open(&options, &plan, &Silent)?;
    let chunks: Vec<Vec<u32>> = held_out
        .chunks_exact(512)
        .take(usize::div_ceil(n_held_out, 512))
        .map(<[u32]>::to_vec)
        .collect();
    let a = agreement(&model, &chunks, &SamplerParams::default(), 1)?;
    println!(
        "{} positions: greedy {:.2} %, sampled {:.2} %, total variation {:.5}, {:.0} candidates, {:.2} of {:.2} MB",
        a.n_positions,
        a.greedy * 100.0,
        a.sampled * 100.0,
        a.total_variation,
        a.candidates,
        a.sparse_bytes / 1e6,
        a.full_bytes / 1e6
    );
    Ok(())
}

fn write(sketch: &HeadSketch, model: &str, out: &Path) -> Result<()> {
    let model = GgufFile::open(model)?;
    let hyper = Hyperparameters::read(&model)?;
    let mut header = sidecar_header(&model, &hyper)?;
    sketch.declare(&mut header)?;
    let mut file = header.create(out)?;
    sketch.write(&mut file)?;
    Ok(file.finish()?)
}
