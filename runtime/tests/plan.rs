//! `plan` as a user meets it: what it prints, what it counts, and what it refuses.

mod common;

use std::path::Path;

use common::running::{Folder, json_of, run, text_of, tiny};
use common::tiny_model::TinyModel;
use common::tiny_synth;
use pi_runtime::gguf::{GgmlType, GgufFile};
use pi_runtime::machine_profile::MachineProfile;
use pi_runtime::model::gpu::GpuRoom;
use pi_runtime::model::{Hyperparameters, Sparsity};
use pi_runtime::plan::{PlanRequest, PlannedGpu, PromptForecast, Report};
use pi_runtime::session::{ModelOptions, Silent, TopologyFile};
use pi_runtime::sidecar::sidecar_header;
use pi_runtime::synth::Synthesis;
use pi_topology::{GpuSync, Predict, TopologyConfig};
use serde_json::{Value, json};

/// Writes a sidecar whose profile of 8 tokens has `count` for every neuron.
fn write_profile(model: &Path, path: &Path, n_tokens: u32, count: f32) {
    let model = GgufFile::open(model).unwrap();
    let hyper = Hyperparameters::read(&model).unwrap();
    let mut header = sidecar_header(&model, &hyper).unwrap();
    header.put("sparse.profile.n_tokens", n_tokens).unwrap();
    let names: Vec<String> = (0..hyper.n_layer)
        .flat_map(|layer| ["ffn_counts", "ffn_down_norm"].map(|part| format!("blk.{layer}.{part}")))
        .collect();
    for name in &names {
        header
            .add_tensor(name, GgmlType::F32, &[hyper.n_ff])
            .unwrap();
    }
    let mut file = header.create(path).unwrap();
    let counts: Vec<u8> = count.to_le_bytes().repeat(hyper.n_ff);
    for name in &names {
        file.write(name, &counts).unwrap();
    }
    file.finish().unwrap();
}

fn modes(plan: &Value) -> Vec<&str> {
    let modes = plan["modes"].as_array().unwrap().iter();
    modes
        .map(|mode| mode["sparsity"].as_str().unwrap())
        .collect()
}

/// With `replicate` each node's memory is that of all cold neurons, and a token reads no more.
#[test]
fn copies_are_counted_as_memory_and_not_as_reading() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let planned = |cold: &str| {
        let text = format!(
            "[memory]\ncold = \"{cold}\"\nhuge_pages = \"off\"\n[host]\nnodes = 2\nthreads = 1\n"
        );
        let topology = folder.file(&format!("{cold}.toml"), &text);
        let args = ["plan", "-m", &model, "--topology", &topology];
        let plan = json_of(&[&args[..], &["--sparsity", "exact", "-o", "json"]].concat());
        let mode = plan["modes"][0].clone();
        let weights = |node: usize| mode["nodes"][node]["weights_bytes"].as_u64().unwrap();
        let read = mode["bytes_per_token"].as_u64().unwrap();
        ([weights(0), weights(1)], read)
    };
    let (shard, read) = planned("shard");
    let (replicate, read_beside_copies) = planned("replicate");
    let (single, _) = planned("single:1");
    assert_eq!(read, read_beside_copies);
    assert!(replicate[0] > shard[0], "{replicate:?} {shard:?}");
    // node 1 has what it has where it is the only one, up to gaps and a page
    assert!(
        replicate[1].abs_diff(single[1]) <= 64 * 100 + 4096,
        "{replicate:?} {single:?}"
    );
}

#[test]
fn parts_add_up_to_the_token_and_memory_to_the_node() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let plan = json_of(&["plan", "-m", &model, "-t", "1", "-c", "256", "-o", "json"]);
    assert_eq!(modes(&plan), ["off", "exact"]);
    assert_eq!(plan["frequencies"]["kind"], "assumed");
    for mode in plan["modes"].as_array().unwrap() {
        let number = |value: &Value| value.as_f64().unwrap();
        let parts = mode["parts"].as_array().unwrap();
        let ms: f64 = parts.iter().map(|part| number(&part["ms"])).sum();
        assert!((ms - number(&mode["ms_per_token"])).abs() < 1e-9);
        assert!(ms > 0.0 && number(&mode["tokens_per_s"]) > 0.0);
        let bytes: u64 = parts
            .iter()
            .map(|part| part["bytes"].as_u64().unwrap())
            .sum();
        assert_eq!(Some(bytes), mode["bytes_per_token"].as_u64());
        let node = &mode["nodes"][0];
        let each = ["weights_bytes", "cache_bytes", "working_bytes"];
        let each = each.map(|key| node[key].as_u64().unwrap());
        assert!(each.iter().all(|bytes| bytes % 4096 == 0), "{node}");
        assert_eq!(Some(each.iter().sum::<u64>()), node["total_bytes"].as_u64());
        // 2 layers · 2 heads · 256 positions of 16 keys and 16 values in f16
        assert_eq!(each[1], 2 * 2 * 256 * 32 * 2);
        assert_eq!(
            mode["neuron_groups"][0]["layers"],
            serde_json::json!([0, 2])
        );
        assert_eq!(
            mode["neuron_groups"][0]["groups"],
            serde_json::json!([[0, 16]])
        );
        assert_eq!(mode["rehearsed_layers"], 2);
    }
}

#[test]
fn the_text_names_the_bottleneck_and_what_was_assumed() {
    let folder = tiny();
    let text = text_of(&["plan", "-m", &folder.name("m.gguf"), "-t", "1"]);
    for expected in [
        "15 % active is assumed, the same for all: `pi-runtime prepare` measures it",
        "exact: bottleneck ",
        "exact: measured now on 2 layers of random bytes",
        "tokens/s",
        "% of byte limit",
        "off, node 0",
    ] {
        assert!(text.contains(expected), "no {expected:?} in\n{text}");
    }
}

/// What the plan prints is what a run takes, whatever was found fastest.
#[test]
fn what_is_decided_is_printed_as_runs_take_it() {
    let folder = Folder(tempfile::tempdir().unwrap());
    let (model, n_layer) = (folder.name("m.gguf"), 4);
    let synthesis = Synthesis::new(&tiny_synth::options()).unwrap();
    let written = synthesis.write(Path::new(&model), 1, &Silent, &|| false);
    assert!(written.unwrap());
    let args = ["plan", "-m", &model, "-t", "1", "--sparsity", "predicted"];
    let plan = json_of(&[&args[..], &["-o", "json"]].concat());
    let decision = &plan["modes"][0]["decision"];
    let ways = decision["ways"].as_array().unwrap();
    let names: Vec<&str> = ways.iter().map(|way| way["by"].as_str().unwrap()).collect();
    assert_eq!(names, ["exact", "in-layer", "both"]);
    let layer_ms = |way: usize, layer: usize| ways[way]["ms_per_layer"][layer].as_f64();
    assert_eq!(layer_ms(2, 0), None, "nothing lies before layer 0");
    // of each layer the fastest, up to what a way has to save
    let list = decision["predict"].as_str().unwrap();
    let Ok(Predict::Layers(kinds)) = list.parse() else {
        panic!("{list}")
    };
    for (layer, by) in kinds.of_model(n_layer).unwrap().into_iter().enumerate() {
        let taken = names.iter().position(|name| *name == by.name()).unwrap();
        let taken_ms = layer_ms(taken, layer).unwrap();
        let least = (0..3).filter_map(|way| layer_ms(way, layer));
        assert!(
            least.fold(f64::MAX, f64::min) >= taken_ms * 0.96,
            "{decision}"
        );
    }
    let toml = decision["toml"].as_str().unwrap();
    let topology = folder.file("x.toml", toml);
    let answer = |more: &[&str]| {
        let args = [
            "-m", &model, "-p", "a b c", "-n", "8", "--temp", "0", "--json",
        ];
        let predicted = ["-t", "1", "--sparsity", "predicted"];
        json_of(&[&args[..], &predicted, more].concat())["logits_hash"].clone()
    };
    let by_file = answer(&["--topology", &topology]);
    assert!(by_file.is_string());
    assert_eq!(by_file, answer(&["--predictor", list]));

    // the text has the same lines; what is asked for is not decided
    let text = text_of(&args);
    let (_, printed) = text.split_once("\n[sparsity]\n").unwrap();
    let printed = format!("[sparsity]\n{}\n", printed.lines().next().unwrap());
    let config: TopologyConfig = toml::from_str(&printed).unwrap();
    assert!(
        matches!(config.sparsity.predict, Predict::Layers(_)),
        "{printed}"
    );
    let asked = [&args[..], &["--predictor", list, "-o", "json"]].concat();
    assert_eq!(json_of(&asked)["modes"][0]["decision"], Value::Null);
}

/// What is planned for can be said; the neurons are those of the profile.
#[test]
fn the_share_that_is_active_can_be_asked_for() {
    let folder = tiny();
    let (model, path) = (folder.name("m.gguf"), folder.path("m.sparse.gguf"));
    write_profile(Path::new(&model), &path, 8, 1.0);
    let args = ["plan", "-m", &model, "-t", "1", "--sparsity", "exact"];
    let plan = json_of(&[&args[..], &["--active", "50%", "-o", "json"]].concat());
    let share = plan["active_share"].as_f64().unwrap();
    assert!((share - 0.5).abs() < 1e-6, "{share}");
    // half of the tokens open half as many
    let rehearsed = &plan["modes"][0]["rehearsed_active_neurons"];
    let share = rehearsed.as_f64().unwrap() / 1024.0;
    assert!((share - 0.375).abs() < 0.03, "{share}");
    let text = text_of(&[&args[..], &["--active", "25"]].concat());
    assert!(text.contains("25.0 % active, as asked"), "{text}");
    for wrong in ["101", "-1", "many", "NaN"] {
        let ran = run(&[&args[..], &[&format!("--active={wrong}")]].concat());
        assert_eq!(ran.code, 2, "{wrong}: {}", ran.err);
    }
}

/// The gates of the rehearsal are the model's own kernels' work: as many open as the profile says, for every type.
#[test]
fn gates_open_as_often_as_the_profile_says() {
    use pi_kernels::QuantType;
    for quant in [QuantType::F32, QuantType::Q4_0] {
        let folder = Folder::with(&TinyModel {
            quant,
            ..TinyModel::default()
        });
        let (model, path) = (folder.name("m.gguf"), folder.path("m.sparse.gguf"));
        let args = ["plan", "-m", &model, "-t", "1", "--sparsity", "exact"];
        let active = |count: f32| {
            write_profile(Path::new(&model), &path, 8, count);
            let plan = json_of(&[&args[..], &["-o", "json"]].concat());
            assert_eq!(plan["frequencies"]["n_tokens"], 8);
            assert_eq!(plan["active_share"], f64::from(count) / 8.0);
            plan["modes"][0]["rehearsed_active_neurons"]
                .as_f64()
                .unwrap()
        };
        // half of the tokens open all 2 · 512 gates, half every other one
        let share = active(8.0) / 1024.0;
        assert!((share - 0.75).abs() < 0.03, "{quant}: {share}");
        assert_eq!(active(0.0), 0.0, "{quant}");
        let share = active(2.0) / 1024.0;
        assert!((share - 0.1875).abs() < 0.03, "{quant}: {share}");
    }
}

#[test]
fn a_bad_profile_or_another_models_is_refused() {
    let folder = tiny();
    let (model, path) = (folder.name("m.gguf"), folder.path("m.sparse.gguf"));
    let refused = |expected: &str| {
        let ran = run(&["plan", "-m", &model, "-t", "1"]);
        assert_eq!(ran.code, 2, "{}", ran.err);
        assert!(ran.err.contains(expected), "{}", ran.err);
        assert!(ran.err.contains("prepare"), "{}", ran.err);
    };
    write_profile(Path::new(&model), &path, 0, 0.0);
    refused("the profile is of 0 tokens");
    write_profile(Path::new(&model), &path, 8, 9.0);
    refused("a neuron of layer 0 fired 9 times in 8 tokens");
    let other = Folder::with(&TinyModel {
        seed: 2,
        ..TinyModel::default()
    });
    write_profile(&other.path("m.gguf"), &path, 8, 1.0);
    refused("made for a model with hash");
}

#[test]
fn models_without_relu_have_one_mode() {
    let folder = Folder::with(&TinyModel {
        gate: None,
        ..TinyModel::default()
    });
    let model = folder.name("m.gguf");
    let plan = json_of(&["plan", "-m", &model, "-t", "1", "-o", "json"]);
    assert_eq!(modes(&plan), ["off"]);
    assert_eq!(plan["frequencies"]["kind"], "dense");
    let ran = run(&["plan", "-m", &model, "-t", "1", "--sparsity", "exact"]);
    assert_eq!(ran.code, 2, "{}", ran.err);
}

#[test]
fn what_is_not_rehearsed_is_refused() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let parts = [["--sparsity", "threshold"], ["--head", "sparse"]];
    for part in parts {
        let ran = run(&[&["plan", "-m", &model, "-t", "1"][..], &part].concat());
        assert_eq!(ran.code, 2, "{part:?}: {}", ran.err);
        assert!(!ran.err.contains("panicked"), "{part:?}: {}", ran.err);
    }
}

#[test]
fn a_depth_beyond_the_context_is_refused() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let ran = run(&["plan", "-m", &model, "-c", "64", "-d", "63"]);
    assert_eq!(ran.code, 2, "{}", ran.err);
    assert!(ran.err.contains("-d 63"), "{}", ran.err);
    let plan = json_of(&["plan", "-m", &model, "-c", "64", "-d", "60", "-o", "json"]);
    assert_eq!(plan["n_depth"], 60);
}

#[test]
fn nodes_share_the_groups() {
    let folder = tiny();
    let topology = folder.file("two.toml", "[host]\nnodes = 2\nthreads = 1\n");
    let model = folder.name("m.gguf");
    let ran = run(&["plan", "-m", &model, "--topology", &topology, "-o", "json"]);
    if ran.code != 0 {
        eprintln!("skipped: two nodes cannot be had here: {}", ran.err);
        return;
    }
    let plan: Value = serde_json::from_str(&ran.out).unwrap();
    for mode in plan["modes"].as_array().unwrap() {
        assert_eq!(mode["nodes"].as_array().unwrap().len(), 2);
        let mut layers = 0;
        for run in mode["neuron_groups"].as_array().unwrap() {
            let groups = &run["groups"];
            assert_eq!((&groups[0][0], &groups[1][1]), (&0.into(), &16.into()));
            assert_eq!(groups[0][1], groups[1][0]);
            assert_eq!(run["layers"][0], layers);
            layers = run["layers"][1].as_u64().unwrap();
        }
        assert_eq!(layers, 2);
    }
}

/// A GPU that is not there, of which `groups_max` of a layer's 16 groups may be hot.
fn made_up_gpu(groups_max: usize) -> PlannedGpu {
    PlannedGpu {
        ordinal: 0,
        name: "Some GPU".to_owned(),
        room: GpuRoom {
            budget: 1 << 30,
            overhead: 0,
            groups_max,
        },
        sync: GpuSync::Flags,
        required: false,
        replan: 0,
    }
}

/// Of one thread and [`made_up_gpu`].
fn made_up_profile() -> MachineProfile {
    let time = json!({"median_ns": 6_200, "p99_ns": 9_000});
    let speed = 2e10;
    let profile = json!({
        "fingerprint": "0123456789abcdef",
        "measured": "2026-01-02T03:04:05Z",
        "cpu": "Some Processor",
        "machine": "1 NUMA node",
        "threads": [1],
        "memory": {
            "teams": [{
                "numa": 0,
                "by_threads": [{"n_threads": 1, "bytes_per_s": speed}],
                "by_row_bytes": [],
            }],
            "across": [],
            "together_bytes_per_s": speed,
        },
        "fork_join": [time],
        "hops": [],
        "gpus": [{
            "ordinal": 0,
            "name": "Some GPU",
            "to_device_bytes_per_s": 1e10,
            "to_host_bytes_per_s": 1e10,
            "flag_round_trip": time,
        }],
        "idle_cpu_percent": 0.0,
    });
    serde_json::from_value(profile).unwrap()
}

fn planned_on(
    folder: &Folder,
    gpu: PlannedGpu,
    profile: Option<MachineProfile>,
    sparsity: Sparsity,
) -> Result<Report, String> {
    let planned = pi_runtime::plan::plan(&PlanRequest {
        active: None,
        model: ModelOptions {
            sparsity: Some(sparsity),
            ..ModelOptions::new(folder.path("m.gguf"))
        },
        plan: TopologyFile::default().plan(Some(1)).unwrap(),
        depth: 0,
        profile,
        gpus: vec![gpu],
    });
    planned.map_err(|error| error.to_string())
}

/// Hand-offs and streamed prompts go by the profile's link, and by assumptions without one; the text says which.
#[test]
fn gpus_are_planned_by_what_was_measured_of_their_link() {
    let folder = tiny();
    for (profile, hand_off_us, bytes_per_s, source) in [
        (None, 5.0, 25e9, "assumed"),
        (
            Some(made_up_profile()),
            6.2,
            1e10,
            "measured on 2026-01-02T03:04:05Z",
        ),
    ] {
        let report = planned_on(&folder, made_up_gpu(8), profile, Sparsity::Exact).unwrap();
        let forecast = report.modes[0].gpu.as_ref().unwrap();
        // both layers have cold neurons: half of 512
        assert_eq!(forecast.gpus, [(0..2, [512, 1024])]);
        let near = |found: f64, expected: f64| {
            assert!((found / expected - 1.0).abs() < 1e-9, "{found}, {expected}");
        };
        near(forecast.hand_off_ms(), 2.0 * hand_off_us / 1e3);
        assert!(forecast.token_ms() > forecast.hand_off_ms());
        // three rows of 64 floats each; the context is shorter than 512
        let streamed = 512 * 3 * 64 * 4;
        let PromptForecast::Streamed {
            n_tokens,
            bytes,
            ms,
        } = forecast.prompt
        else {
            panic!("{:?}", forecast.prompt)
        };
        assert_eq!((n_tokens, bytes), (256, streamed));
        near(ms, streamed as f64 / bytes_per_s * 1e3);

        let text = report.text();
        let speed = format!("{:.1} GB/s", bytes_per_s / 1e9);
        for expected in [
            format!(
                "{speed} from the host ({source}), a layer's hand-off {hand_off_us:.2} µs ({source})"
            ),
            "exact: with GPU ".to_owned(),
            format!("at most {:.0} tokens/s ({speed} {source})", 256e3 / ms),
        ] {
            assert!(text.contains(&expected), "no {expected:?} in\n{text}");
        }
        let json = report.json();
        let when = source.strip_prefix("measured on ");
        assert_eq!(json["gpus"][0]["hand_off_us"]["measured"], json!(when));
        assert_eq!(
            json["modes"][0]["gpu"]["prompt"]["streamed_bytes"],
            streamed
        );
    }
}

#[test]
fn without_cold_neurons_nothing_passes_the_link() {
    let folder = tiny();
    let profile = Some(made_up_profile());
    let report = planned_on(&folder, made_up_gpu(16), profile, Sparsity::Exact).unwrap();
    let forecast = report.modes[0].gpu.as_ref().unwrap();
    assert_eq!(forecast.hand_off_ms(), 0.0);
    assert_eq!(forecast.hot_share(), 1.0);
    assert_eq!(forecast.prompt, PromptForecast::AllHot);
    assert!(!report.text().contains("streams"), "{}", report.text());
}

/// Layers whose `ffn_down` is plain are hot as a whole or not at all, and streamed as a whole.
#[test]
fn layers_with_plain_down_projections_are_streamed_whole() {
    let folder = Folder::with(&TinyModel {
        neuron_major: false,
        ..TinyModel::default()
    });
    let report = planned_on(&folder, made_up_gpu(8), None, Sparsity::Off).unwrap();
    let forecast = report.modes[0].gpu.as_ref().unwrap();
    assert_eq!(forecast.hot_share(), 0.0);
    let PromptForecast::Streamed {
        n_tokens, bytes, ..
    } = forecast.prompt
    else {
        panic!("{:?}", forecast.prompt)
    };
    // three matrices of 64 times 512 floats in each of two layers
    assert_eq!((n_tokens, bytes), (256, 2 * 3 * 64 * 512 * 4));
    let line = "off: with GPU a prompt of 256 tokens streams 0.001 GB";
    assert!(report.text().contains(line), "{}", report.text());
}

#[test]
fn a_model_beyond_a_gpu_s_budget_stays_on_the_host_or_is_refused() {
    let folder = tiny();
    let mut gpu = made_up_gpu(16);
    gpu.room.budget = 1 << 20;
    let report = planned_on(&folder, gpu.clone(), None, Sparsity::Exact).unwrap();
    assert_eq!(report.modes[0].gpu, None);
    gpu.required = true;
    let text = planned_on(&folder, gpu, None, Sparsity::Exact).unwrap_err();
    assert!(
        text.contains("m.gguf") && text.contains("raise vram_budget"),
        "{text}"
    );
}

#[test]
fn a_machine_s_own_plan_names_no_gpu() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let plan = json_of(&["plan", "-m", &model, "-t", "1", "-o", "json"]);
    assert_eq!(plan["gpus"], json!([]));
    assert_eq!(plan["modes"][0]["gpu"], Value::Null);
}
