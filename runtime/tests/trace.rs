//! `--trace`: the file of a real run, read back.

mod common;

use std::path::Path;
use std::process::Command;

use common::engine::{Greedy, Setup};
use common::running::{Folder, Ran, run, tiny};
use common::trace_file::{Span, TraceFile};
use common::{demo_model, workspace};
use pi_actors::faults::{Fault, FaultPlace, Faults};
use pi_actors::messages::ActorId;
use pi_actors::trace::TraceBounds;
use pi_runtime::trace::{ControlLog, Recording};
use serde_json::Value;
use tracing_subscriber::prelude::*;

const N_LAYER: usize = 30;
const N_PREDICT: usize = 24;

/// How often a run is tried whose reported time another program has spoilt.
const TRIES: usize = 5;

/// Most that the steps' traced time and the reported one may be apart.
const APART_MAX: f64 = 0.02;

/// Runs the demo model with a trace; again, where its two times are apart: a program that takes the
/// processor between the end of a step and the look at the clock that is reported adds to one alone.
fn traced(folder: &Folder, more: &[&str]) -> (TraceFile, Value) {
    let mut run = traced_once(folder, more);
    for _ in 1..TRIES {
        if apart(&run.0, &run.1) < APART_MAX {
            break;
        }
        std::fs::remove_file(folder.path("t.pftrace")).unwrap();
        run = traced_once(folder, more);
    }
    let (file, json) = run;
    std::fs::write(folder.path("t.json"), json.to_string()).unwrap();
    check_with_googles_own(folder);
    std::fs::remove_file(folder.path("t.json")).unwrap();
    (file, json)
}

fn traced_once(folder: &Folder, more: &[&str]) -> (TraceFile, Value) {
    let (model, file) = (demo_model(), folder.name("t.pftrace"));
    let n_predict = N_PREDICT.to_string();
    let args = [
        "-m",
        model.to_str().unwrap(),
        "-p",
        "The capital of France is",
        "-n",
        &n_predict,
        "--temp",
        "0",
        "--ignore-eos",
        "--json",
        "--trace",
        &file,
    ];
    let ran = run(&[&args[..], more].concat());
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.err.contains("trace: "), "{}", ran.err);
    assert_eq!(folder.names().len(), 2, "{:?}", folder.names());
    let json = serde_json::from_str(&ran.out).unwrap();
    (TraceFile::read(&folder.path("t.pftrace")), json)
}

/// Share by which the decoded steps' traced time differs from the reported one.
fn apart(file: &TraceFile, json: &Value) -> f64 {
    let decode = steps(file).into_iter().filter(|step| step.name == "decode");
    let traced_ms = decode.map(Span::ns).sum::<u64>() as f64 / 1e6;
    let reported_ms = json["timings"]["predicted_ms"].as_f64().unwrap();
    (traced_ms / reported_ms - 1.0).abs()
}

/// Reads the file with Google's `perfetto_trace_pb2`, where that is installed.
fn check_with_googles_own(folder: &Folder) {
    let python = |args: &[&str]| Command::new("python3").args(args).output();
    let module = "perfetto.protos.perfetto.trace.perfetto_trace_pb2";
    let import = format!("import {module}");
    if !python(&["-c", &import]).is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: python3 has no module {module} (pip install perfetto)");
        return;
    }
    let script = workspace().join("tests/check_trace.py");
    let (trace, json) = (folder.name("t.pftrace"), folder.name("t.json"));
    let output = python(&[script.to_str().unwrap(), &trace, "--json", &json]).unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{err}");
    assert!(said.contains("holds"), "{said}");
}

fn number(span: &Span, name: &str) -> u64 {
    *span
        .numbers
        .get(name)
        .unwrap_or_else(|| panic!("{} has no {name}", span.name))
}

/// Spans of steps, in order.
fn steps(file: &TraceFile) -> Vec<&Span> {
    let mut steps: Vec<&Span> = file.spans.iter().filter(|s| s.category == "step").collect();
    steps.sort_by_key(|step| step.start_ns);
    steps
}

/// Everything that a whole run's trace has to say.
fn check(file: &TraceFile, json: &Value, n_nodes: usize) {
    let threads = file.threads();
    assert_eq!(threads.len(), n_nodes);
    let steps = steps(file);
    assert_eq!(steps.len(), N_PREDICT);
    assert!(steps.iter().all(|step| step.track == threads[0]));
    assert_eq!(
        (steps[0].name.as_str(), number(steps[0], "position")),
        ("prefill", 0)
    );
    let decode = &steps[1..];
    assert!(decode.iter().all(|step| step.name == "decode"));
    let timings = &json["timings"];

    // the steps' time is the reported time
    assert!(apart(file, json) < APART_MAX, "{timings}");

    // counters are the timings' own
    let values = &file.counters[&file.track("active neurons")];
    assert_eq!(values.len(), steps.len());
    for (step, (at_ns, value)) in steps.iter().zip(values) {
        assert_eq!(*at_ns, step.start_ns);
        assert_eq!(*value as u64, number(step, "active_neurons"));
    }
    let active: i64 = values[1..].iter().map(|(_, value)| value).sum();
    let neurons: u64 = decode.iter().map(|step| number(step, "neurons")).sum();
    let share = timings["active_share"].as_f64().unwrap();
    assert_eq!(active as f64 / neurons as f64, share);
    let by_layer = &file.counters[&file.track("active neurons by layer")];
    assert_eq!(by_layer.len(), steps.len() * N_LAYER);
    let all: i64 = values.iter().map(|(_, value)| value).sum();
    assert_eq!(by_layer.iter().map(|(_, value)| value).sum::<i64>(), all);
    let cached = file.counters[&file.track("cached tokens")]
        .last()
        .unwrap()
        .1;
    let n_prompt = timings["prompt_n"].as_i64().unwrap();
    assert_eq!(cached, n_prompt + N_PREDICT as i64 - 1);

    check_layers(file, &threads, steps.len());
    check_arrows(file, n_nodes, steps.len());
    let session = file.track("session");
    for name in ["load", "tokenise", "prefill", "decode"] {
        assert_eq!(file.spans_of(session, name).count(), 1, "{name}");
    }
    let control = file.track("control");
    let started = file.instants.iter().filter(|i| i.track == control);
    let started = started.filter(|i| i.name.ends_with("started")).count();
    assert_eq!(started, 1 + N_LAYER * (1 + n_nodes));
}

/// Each thread has every layer of every step, and in it the layer's messages.
fn check_layers(file: &TraceFile, threads: &[u64], n_steps: usize) {
    for (node, thread) in threads.iter().enumerate() {
        let on_thread = |category: &str| {
            let category = category.to_owned();
            let spans = file.spans.iter().filter(|s| s.track == *thread);
            spans.filter(move |s| s.category == category)
        };
        let of = |depth: usize| if node == 0 { depth } else { depth - 1 };
        let layers: Vec<_> = on_thread("layer").collect();
        // and the head
        assert_eq!(layers.len(), n_steps * (N_LAYER + 1));
        assert!(layers.iter().all(|layer| layer.depth == of(1)));
        let messages: Vec<_> = on_thread("message").collect();
        assert!(messages.iter().all(|message| message.depth == of(2)));
        for layer in layers.iter().filter(|layer| layer.name != "head") {
            let inside = messages.iter().filter(|message| {
                layer.start_ns <= message.start_ns && message.end_ns <= layer.end_ns
            });
            let mut n_messages = 0;
            for message in inside.filter(|message| message.ns() > 0) {
                assert_eq!(number(message, "layer"), number(layer, "layer"));
                assert_eq!(number(message, "step"), number(layer, "step"));
                n_messages += 1;
            }
            assert!(n_messages >= 3, "{} messages in {layer:?}", n_messages);
        }
    }
}

/// Each message of the protocol has an arrow, from its actor to the other.
fn check_arrows(file: &TraceFile, n_nodes: usize, n_steps: usize) {
    // RunLayer, LayerDone; two shares and Compute to each node, and their answers
    let per_layer = 2 + 2 * 3 * n_nodes;
    let per_head = 2 + 2 * n_nodes;
    assert_eq!(file.flows.len(), n_steps * (N_LAYER * per_layer + per_head));
    let name = |track: u64| file.tracks[&track].name.as_str();
    for ((from, posted_ns), (to, handled_ns)) in file.flows.values() {
        let ends = [name(*from), name(*to)];
        assert!(ends.contains(&"DeviceLayer"), "{ends:?}");
        assert!(
            ends.iter()
                .any(|end| *end == "Pipeline" || end.starts_with("ColdLayer node")),
            "{ends:?}"
        );
        assert!(posted_ns <= handled_ns, "handled before it was posted");
    }
    // every post lies inside its actor's handler
    let posts = file.instants.iter().filter(|i| i.name.starts_with("post "));
    assert!(posts.clone().count() == file.flows.len());
    assert!(posts.clone().all(|post| post.depth >= 1));
}

#[test]
fn one_node_with_one_and_two_threads() {
    let folder = Folder(tempfile::tempdir().unwrap());
    std::fs::write(folder.path("other"), "").unwrap();
    for more in [
        ["-t", "1", "--sparsity", "exact"],
        ["-t", "2", "--sparsity", "off"],
    ] {
        let (file, json) = traced(&folder, &more);
        check(&file, &json, 1);
    }
}

#[test]
fn two_nodes() {
    let folder = Folder(tempfile::tempdir().unwrap());
    std::fs::write(folder.path("other"), "").unwrap();
    let topology = workspace().join("configs/two-nodes.toml");
    for sparsity in ["exact", "off"] {
        let more = [
            "--topology",
            topology.to_str().unwrap(),
            "--sparsity",
            sparsity,
        ];
        let (file, json) = traced(&folder, &more);
        check(&file, &json, 2);
    }
}

#[test]
fn a_trace_changes_no_bit() {
    let folder = tiny();
    let (model, file) = (folder.name("m.gguf"), folder.name("t.pftrace"));
    let args = [
        "-m", &model, "-p", "Hello", "-n", "8", "--temp", "0", "--json",
    ];
    let hash = |ran: Ran| {
        assert_eq!(ran.code, 0, "{}", ran.err);
        let json: Value = serde_json::from_str(&ran.out).unwrap();
        json["logits_hash"].as_str().unwrap().to_owned()
    };
    let plain = hash(run(&args));
    assert_eq!(hash(run(&[&args[..], &["--trace", &file]].concat())), plain);
}

#[test]
fn a_full_memory_loses_the_end_and_says_so() {
    let folder = Folder(tempfile::tempdir().unwrap());
    let (model, name) = (demo_model(), folder.name("t.pftrace"));
    let args = [
        "-m",
        model.to_str().unwrap(),
        "-p",
        "Once",
        "-n",
        "80",
        "--ignore-eos",
    ];
    let ran = run(&[&args[..], &["--trace", &name, "--trace-memory", "1"]].concat());
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.err.contains("later events lost"), "{}", ran.err);
    assert!(ran.err.contains("--trace-memory"), "{}", ran.err);
    // reading checks that all spans close and all arrows have two ends
    let file = TraceFile::read(&folder.path("t.pftrace"));
    let n_steps = steps(&file).len();
    assert!((10..80).contains(&n_steps), "{n_steps} steps");
    let session = file.track("session");
    let mut said = file.instants.iter().filter(|i| i.track == session);
    assert!(said.any(|i| i.name.ends_with("later events lost")));
}

#[test]
fn a_file_that_cannot_be_written_is_an_error_before_anything_is_computed() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let nowhere = folder.name("no/such/folder/t.pftrace");
    let taken = folder.0.path().to_str().unwrap();
    for path in [nowhere.as_str(), taken, "/dev/null"] {
        for command in [&["-p", "Hello"][..], &["--cnv"]] {
            let ran = run(&[&["-m", &model, "--trace", path], command].concat());
            assert_eq!((ran.code, ran.out.as_str()), (2, ""), "{path}: {}", ran.err);
            assert!(ran.err.starts_with("error: --trace "), "{}", ran.err);
            assert_eq!(ran.err.lines().count(), 1, "{}", ran.err);
        }
    }
    assert_eq!(folder.names(), ["m.gguf"]);
}

#[test]
fn a_run_that_fails_leaves_no_file() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let trace = ["--trace", &folder.name("t.pftrace")];
    for bad in [
        &["-m", &folder.name("none.gguf"), "-p", "x"][..],
        &["-m", &model, "-c", "4", "-p", "much too long for it"],
        &["-m", &model],
    ] {
        let ran = run(&[bad, &trace].concat());
        assert_eq!(ran.code, 2, "{}", ran.err);
        assert_eq!(folder.names(), ["m.gguf"], "{bad:?}");
    }
}

#[test]
fn a_chat_and_a_bench_are_traced() {
    let folder = tiny();
    let (model, name) = (folder.name("m.gguf"), folder.name("t.pftrace"));
    let bench = [
        "bench", "-m", &model, "-p", "8", "-n", "4", "-r", "2", "-t", "1,2",
    ];
    let ran = run(&[&bench[..], &["--trace", &name]].concat());
    assert_eq!(ran.code, 0, "{}", ran.err);
    let file = TraceFile::read(&folder.path("t.pftrace"));
    // an engine for each number of threads, one warm-up and two repetitions of 4 decoded tokens
    assert_eq!(file.threads().len(), 2);
    let decoded = steps(&file).iter().filter(|s| s.name == "decode").count();
    let prefilled = steps(&file).iter().filter(|s| s.name == "prefill").count();
    assert_eq!(decoded + prefilled, 2 * 3 * (4 + 1));
    let session = file.track("session");
    assert_eq!(file.spans_of(session, "test").count(), 4);
}

#[test]
fn a_restarted_actor_is_seen_and_everything_nests() {
    let control = ControlLog::default();
    tracing_subscriber::registry().with(control.layer()).init();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.pftrace");
    let recording = Recording::create(&path, control).unwrap();
    let actor = ActorId::ColdLayer { layer: 7, node: 1 };
    let faults = Faults::new([Fault {
        actor,
        after_messages: 14,
        place: FaultPlace::Handler,
        once: true,
    }]);
    let bounds = TraceBounds {
        n_steps: 100,
        node_bytes_max: 1 << 24,
    };
    let engine = Setup {
        threads: vec![1, 1],
        faults: faults.clone(),
        trace: Some(bounds),
        ..Setup::q8()
    }
    .start(&demo_model());
    recording.attach(&engine).unwrap();
    Greedy::run(&engine, &[504, 3575, 282, 4649, 314], 8);
    assert!(faults.all_happened());
    drop(engine);
    let written = recording.finish().unwrap().expect("an engine was there");
    assert_eq!((written.lost, written.events > 0), (0, true));
    assert_eq!(recording.finish().unwrap(), None);
    let file = TraceFile::read(&path);
    let steps = steps(&file);
    let failed: Vec<_> = steps
        .iter()
        .filter(|s| s.flags.contains("failed"))
        .collect();
    assert_eq!((steps.len(), failed.len()), (8 + 1, 1));
    let position = number(failed[0], "position");
    let again = |step: &&&Span| number(step, "position") == position;
    let attempts: Vec<_> = steps.iter().filter(again).collect();
    assert_eq!(attempts.len(), 2);
    let handler = file.spans.iter().filter(|s| s.category == "message");
    let mut handler = handler.filter(|s| s.flags.contains("failed"));
    assert!(handler.all(|span| span.numbers["layer"] == 7));
    let control = file.track("control");
    let told: Vec<_> = file
        .instants
        .iter()
        .filter(|i| i.track == control)
        .collect();
    let at = |words: &str| {
        let event = told.iter().find(|i| i.name.contains(words));
        event.unwrap_or_else(|| panic!("no {words:?}")).at_ns
    };
    let failed_ns = at("ColdLayer 7 on node 1 failed");
    let restarted_ns = at("ColdLayer 7 on node 1 restarted");
    assert!(failed_ns < restarted_ns);
    assert!(at("node 1 is quiet") > failed_ns);
    assert!(failed[0].start_ns < failed_ns);
    assert!(restarted_ns < attempts[1].start_ns);
}

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_writes_the_trace_so_far() {
    let folder = Folder(tempfile::tempdir().unwrap());
    let path = folder.path("t.pftrace");
    let code = interrupted(&["-p", "Once upon a time", "--ignore-eos"], &path);
    assert_eq!(code, 130);
    assert_eq!(folder.names(), ["t.pftrace"]);
    let file = TraceFile::read(&path);
    assert!(steps(&file).len() > 1);
    // while a chat waits for its next line
    let code = interrupted(&["--cnv"], &path);
    assert_eq!(code, 130);
    assert_eq!(folder.names(), ["t.pftrace"]);
    let file = TraceFile::read(&path);
    assert_eq!(file.spans_of(file.track("session"), "load").count(), 1);
}

/// Runs the demo model until it has said something or waits for a line, presses Ctrl-C, and returns
/// the exit code.
#[cfg(target_os = "linux")]
fn interrupted(args: &[&str], trace: &Path) -> i32 {
    use std::io::Read;
    use std::process::Stdio;
    let chats = args.contains(&"--cnv");
    let mut child = Command::new(env!("CARGO_BIN_EXE_pi-runtime"))
        .arg("-m")
        .arg(demo_model())
        .args(args)
        .arg("--trace")
        .arg(trace)
        .args(["--log-level", "pi_runtime=debug"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut byte = [0];
    if chats {
        let mut stderr = child.stderr.take().unwrap();
        let mut said = String::new();
        while !said.contains("is traced") || !said.ends_with('\n') {
            assert_eq!(stderr.read(&mut byte).unwrap(), 1, "{said}");
            said.push(byte[0] as char);
        }
        std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
    } else {
        // several tokens, so that more than one step has ended
        let stdout = child.stdout.as_mut().unwrap();
        stdout.read_exact(&mut [0; 64]).unwrap();
    }
    let pid = child.id().to_string();
    let kill = Command::new("kill").args(["-INT", &pid]).status().unwrap();
    assert!(kill.success());
    // `wait` would close it, and a chat whose input ends, ends by itself
    let input = child.stdin.take();
    let code = child.wait().unwrap().code().unwrap_or(-1);
    drop(input);
    code
}
