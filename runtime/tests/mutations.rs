//! Seeded mutations and truncations: of the demo model's head, and of whole tiny models of every kind.
//! An error or a usable file (from which tokens are generated, if it is tiny), never a panic, and
//! never more memory than the file explains.

// the program's own error, which is not passed on here
#![allow(clippy::result_large_err)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use common::demo_model;
use common::gguf_parts::{Parts, Random, mutate_bytes};
use common::tiny_kinds::kinds;
use pi_actors::ActorError;
use pi_runtime::chat::{ChatError, ChatTemplate, Message, Role};
use pi_runtime::error::RuntimeError;
use pi_runtime::gguf::{GgufFile, Value};
use pi_runtime::inspect::{InspectArgs, run};
use pi_runtime::sampler::SamplerParams;
use pi_runtime::session::{
    AnswerOptions, LoadedModel, ModelOptions, Session, Silent, TopologyFile,
};
use pi_runtime::tokenizer::EncodeOptions;

/// Mutations of the demo model's head.
const N_MUTATIONS: u64 = 500;
/// Mutations of each of the eight kinds of tiny models.
const N_MUTATIONS_OF_KIND: u64 = 240;
/// Most heap memory that opening a file with the demo model's head (1.5 MB) may take.
const OPEN_BYTES_MAX: usize = 1 << 20;
/// Most allocations for it: some for each of its 300 tensors and keys, none for its 97,000 strings.
const OPEN_ALLOCATIONS_MAX: usize = 4000;
/// Most heap memory that opening, loading and running a tiny model (some 200 KB) may take: slots and
/// scratch for a context of 16 tokens, and half a MiB for the control plane.
const RUN_BYTES_MAX: usize = 24 << 20;

/// Counts what goes through the system's allocator.
struct Counting;

static LIVE_BYTES: AtomicUsize = AtomicUsize::new(0);
static PEAK_BYTES: AtomicUsize = AtomicUsize::new(0);
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands every call on to `System` unchanged; the counters touch no memory of the caller's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE_BYTES.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK_BYTES.fetch_max(live, Relaxed);
        ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE_BYTES.fetch_sub(layout.size(), Relaxed);
        // SAFETY: `pointer` came from `System.alloc` with this `layout`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Result of `work`, the most heap bytes it held at once, and its number of allocations.
fn measured<T>(work: impl FnOnce() -> T) -> (T, usize, usize) {
    let before = LIVE_BYTES.load(Relaxed);
    let allocations = ALLOCATIONS.load(Relaxed);
    PEAK_BYTES.store(before, Relaxed);
    let result = work();
    (
        result,
        PEAK_BYTES.load(Relaxed) - before,
        ALLOCATIONS.load(Relaxed) - allocations,
    )
}

/// An offset in the head; most of them outside the long arrays in its middle.
fn place(random: &mut Random, head: &[u8]) -> usize {
    match random.below(8) {
        0 => random.below(24),
        1..=3 => random.below(3000),
        4..=6 => head.len() - 1 - random.below(18_000),
        _ => random.below(head.len()),
    }
}

/// Changes the head, or says how long the file is to be.
fn mutate(random: &mut Random, head: &mut Vec<u8>, file_bytes: u64) -> u64 {
    match random.below(10) {
        0..=3 => {
            for _ in 0..=random.below(4) {
                let at = place(random, head);
                head[at] ^= 1 << random.below(8);
            }
        }
        4..=6 => {
            let at = place(random, head).min(head.len() - 8);
            let width = [1, 4, 8][random.below(3)];
            let value = random.edge().to_le_bytes();
            head[at..at + width].copy_from_slice(&value[..width]);
        }
        7 => {
            let at = place(random, head);
            let end = (at + 1 + random.below(16)).min(head.len());
            head.drain(at..end);
        }
        8 => {
            let at = place(random, head);
            let from = place(random, head);
            let part: Vec<u8> = head[from..(from + 32).min(head.len())].to_vec();
            head.splice(at..at, part);
        }
        _ => {
            return match random.below(3) {
                0 => random.below(64) as u64,
                1 => random.below(head.len()) as u64,
                _ => random.next() % file_bytes,
            };
        }
    }
    file_bytes
}

/// Writes `head` and makes the file `file_bytes` long; what lies between is a hole.
fn write_file(file: &mut File, head: &[u8], file_bytes: u64) {
    file.set_len(0).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.write_all(head).unwrap();
    file.set_len(file_bytes).unwrap();
}

/// Reads everything that a file accepted by `open` offers.
fn use_everything(file: &GgufFile, path: &Path) {
    for (key, value) in file.metadata().iter() {
        let metadata = file.metadata();
        let _ = (
            metadata.get_u32(key),
            metadata.get_i32(key),
            metadata.get_usize(key),
        );
        let _ = (
            metadata.get_f32(key),
            metadata.get_bool(key),
            metadata.get_str(key),
        );
        if let Value::Array(array) = value {
            assert_eq!(array.iter().count(), array.len(), "{key}");
            let _ = (
                array.to_strs(),
                array.to_i32s(),
                array.to_f32s(),
                array.to_bools(),
            );
        }
    }
    for tensor in file.tensors() {
        let data = file.tensor_data(tensor);
        assert_eq!(data.len(), tensor.size_bytes());
        assert_eq!(file.tensor(tensor.name()), Some(tensor));
        let _ = (data.first(), data.last(), tensor.require_quant());
    }
    for json in [false, true] {
        let args = InspectArgs {
            file: path.to_path_buf(),
            json,
            full: false,
        };
        run(&args, &mut std::io::sink()).unwrap();
    }
}

/// Held by every test, because the allocator counts for all threads of the process.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn mutated_heads_are_refused_or_read_within_bounds() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let original = GgufFile::open(demo_model()).unwrap();
    let file_bytes = original.len_bytes() as u64;
    let head = std::fs::read(demo_model()).unwrap()[..original.data_start()].to_vec();
    drop(original);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mutated.gguf");
    let mut file = File::create(&path).unwrap();

    let (mut n_read, mut n_refused) = (0, 0);
    for seed in 0..=N_MUTATIONS {
        let mut random = Random(seed);
        let mut mutated = head.clone();
        let mut length = file_bytes;
        if seed > 0 {
            length = mutate(&mut random, &mut mutated, file_bytes);
        }
        write_file(&mut file, &mutated, length);
        let (opened, peak_bytes, n_allocations) = measured(|| GgufFile::open(&path));
        assert!(
            peak_bytes <= OPEN_BYTES_MAX,
            "seed {seed}: {peak_bytes} bytes to open"
        );
        assert!(
            n_allocations <= OPEN_ALLOCATIONS_MAX,
            "seed {seed}: {n_allocations} allocations"
        );
        match opened {
            Ok(opened) => {
                n_read += 1;
                use_everything(&opened, &path);
            }
            Err(error) => {
                assert!(seed > 0, "the unchanged head is refused: {error}");
                n_refused += 1;
                let message = error.to_string();
                assert!(
                    message.len() > 20 && message.contains("mutated.gguf"),
                    "{message}"
                );
                assert!(!error.is_environment(), "{message}");
            }
        }
    }
    println!("{n_read} read, {n_refused} refused");
    // Else the mutations miss what is checked, or everything is refused.
    assert!(
        n_read >= 50 && n_refused >= 100,
        "{n_read} read, {n_refused} refused"
    );
}

/// Opens a model, renders its template, and generates two tokens, as the program does.
fn generate(path: &Path) -> Result<(), RuntimeError> {
    let options = ModelOptions {
        n_ctx: 16,
        ..ModelOptions::new(path.to_path_buf())
    };
    let plan = TopologyFile::default().plan(Some(1))?;
    let model = LoadedModel::open(&options, &plan, &Silent)?;
    if let Some(source) = model.chat_template.clone() {
        let messages = [Message::new(Role::User, "Hello")];
        let rendered = ChatTemplate::new(&source, model.special_texts())
            .and_then(|template| template.render(&messages));
        if let Err(error @ (ChatError::Explodes { .. } | ChatError::Thread { .. })) = rendered {
            panic!("{error}");
        }
    }
    let prompt = model.tokenizer.encode("ab", EncodeOptions::PROMPT)?;
    let answer = AnswerOptions {
        sampler: SamplerParams::greedy(),
        n_predict: Some(2),
        ignore_eos: true,
        stop_texts: Vec::new(),
        shift: None,
        hash_logits: false,
        interrupt: Default::default(),
        sink: Box::new(|_| Ok(())),
    };
    Session::new(model).answer(prompt, answer).map(drop)
}

/// Fails where an error hides a panic that something caught, or a machine that is at fault.
fn assert_about_the_file(error: &RuntimeError, what: &str) {
    let caught = matches!(
        error,
        RuntimeError::Actor(
            ActorError::KeepsFailing { .. }
                | ActorError::Feeder { .. }
                | ActorError::Job { .. }
                | ActorError::Late { .. }
                | ActorError::Gone
        )
    );
    let text = error.to_string();
    assert!(!caught && error.exit_code() == 2, "{what}: {text}");
    let names_it = text.contains("mutated.gguf") || matches!(error, RuntimeError::EmptyPrompt);
    assert!(text.len() > 20 && names_it, "{what}: {text}");
}

#[test]
fn mutated_models_are_refused_or_generate_within_bounds() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mutated.gguf");
    for (kind, (name, parts)) in kinds(folder.path()).into_iter().enumerate() {
        let (mut n_run, mut n_refused) = (0, 0);
        for seed in 0..=N_MUTATIONS_OF_KIND {
            let mut random = Random(1000 * kind as u64 + seed);
            let what = format!("{name}, seed {seed}");
            std::fs::write(&path, mutated(&parts, seed, &mut random)).unwrap();
            let (outcome, peak_bytes, _) = measured(|| generate(&path));
            assert!(peak_bytes <= RUN_BYTES_MAX, "{what}: {peak_bytes} bytes");
            match outcome {
                Ok(()) => n_run += 1,
                Err(error) => {
                    assert!(seed > 0, "the unchanged {name} is refused: {error}");
                    assert_about_the_file(&error, &what);
                    n_refused += 1;
                }
            }
        }
        println!("{name}: {n_run} run, {n_refused} refused");
        // Else the mutations miss what is checked, or everything is refused.
        assert!(
            n_run >= 30 && n_refused >= 60,
            "{name}: {n_run}, {n_refused}"
        );
    }
}

/// The file itself for seed 0; else most often with a wrong field or two, at times with wrong bytes.
fn mutated(parts: &Parts, seed: u64, random: &mut Random) -> Vec<u8> {
    if seed == 0 {
        return parts.build();
    }
    let mut parts = parts.clone();
    for _ in 0..=random.below(2) {
        parts.mutate(random);
    }
    let mut file = parts.build();
    if random.below(4) == 0 {
        mutate_bytes(random, &mut file);
    }
    file
}
