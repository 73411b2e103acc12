//! A file that is shortened while it is mapped ends the program with the file's name, and a fault of
//! anything else ends it as before.

#![cfg(unix)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use common::running::Folder;
use common::tiny_model::TinyModel;
use pi_kernels::gemm::gemm;
use pi_kernels::{
    ActBatch, ActivationMode, Cpu, Layout, MatrixRef, MatrixShape, QuantType, StridedOut,
};
use pi_runtime::mapped_file::MappedFile;

/// The file that a child of this test binary maps; set in children only.
const CHILD_FILE: &str = "PI_TEST_MAPPED_FILE";
/// Bytes of the file: more than a page of any machine.
const FILE_BYTES: usize = 1 << 20;

/// Runs test `name` of this binary with `path` in its environment, shortens the file once the child has
/// mapped it, and lets the child read on.
fn cut_off_under(name: &str, path: &Path) -> (ExitStatus, String) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(CHILD_FILE, path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("mapped") {
        line.clear();
        assert!(out.read_line(&mut line).unwrap() > 0, "the child maps it");
    }
    std::fs::File::create(path).unwrap();
    child.stdin.take().unwrap().write_all(b"read\n").unwrap();
    let output = child.wait_with_output().unwrap();
    (output.status, String::from_utf8(output.stderr).unwrap())
}

/// In the child: says that the file is mapped, waits, and reads its last byte.
fn read_after_cut(bytes: &[u8]) {
    println!("mapped");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    let last = std::hint::black_box(bytes)[bytes.len() - 1];
    unreachable!("{last} was read from a file that has no bytes");
}

/// A product of many tokens, as a prompt has them: where there is AMX, what a signal saves of this thread is three times as much from
/// then on.
fn multiply_many() {
    let cpu = Cpu::detect(ActivationMode::Q8);
    let shape = MatrixShape {
        quant: QuantType::Q8_0,
        n_rows: 16,
        n_cols: 32,
        layout: Layout::Interleaved,
    };
    let bytes = vec![0; shape.packed_bytes()];
    let mut x = ActBatch::new(cpu.mode(), 32, 32);
    (0..32).for_each(|token| x.set(cpu, token, &[1.0; 32]));
    let mut out = [1.0; 16 * 32];
    let sums = StridedOut::from_slice(&mut out, 16, 32, 0..16);
    gemm(cpu, MatrixRef::new(shape, &bytes), &x, 0..32, 0..16, sums);
    assert_eq!(out, [0.0; 16 * 32]);
}

fn file() -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model é.gguf");
    std::fs::write(&path, vec![1; FILE_BYTES]).unwrap();
    (folder, path)
}

#[test]
fn the_file_is_named() {
    if let Some(path) = std::env::var_os(CHILD_FILE) {
        // others come and go, and one stays
        let stays = MappedFile::open(std::env::current_exe().unwrap()).unwrap();
        for _ in 0..200 {
            drop(MappedFile::open(&path).unwrap());
        }
        let file = MappedFile::open(path).unwrap();
        multiply_many();
        read_after_cut(file.bytes());
        drop(stays);
    }
    let (_folder, path) = file();
    let (status, text) = cut_off_under("the_file_is_named", &path);
    assert_eq!(status.code(), Some(1), "{status}: {text}");
    let named = format!("error: {}: the file was cut off", path.display());
    assert!(text.contains(&named) && text.contains("again"), "{text}");
}

#[test]
#[allow(unsafe_code)]
fn what_is_not_ours_is_left_to_the_system() {
    if let Some(path) = std::env::var_os(CHILD_FILE) {
        // installs the handler, and leaves the address range free for others
        drop(MappedFile::open(&path).unwrap());
        let file = std::fs::File::open(path).unwrap();
        // SAFETY: read-only; this test wants the fault.
        let map = unsafe { memmap2::Mmap::map(&file) }.unwrap();
        read_after_cut(&map);
    }
    let (_folder, path) = file();
    let (status, text) = cut_off_under("what_is_not_ours_is_left_to_the_system", &path);
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}: {text}");
    assert!(!text.contains("error: "), "{text}");
}

/// The program itself: of an untied model the embedding stays in the file.
#[test]
fn a_chat_whose_model_is_cut_off_says_so() {
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}";
    let folder = Folder::with(&TinyModel {
        tied: false,
        quant: QuantType::F32,
        keys: vec![("tokenizer.chat_template", template.into())],
        ..TinyModel::default()
    });
    let path = folder.path("m.gguf");
    let mut child = Command::new(env!("CARGO_BIN_EXE_pi-runtime"))
        .args(["-m", path.to_str().unwrap(), "-cnv", "-n", "2", "-t", "1"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    stdin.write_all(b"Hi\n").unwrap();
    // the first answer has begun: the model is loaded
    stdout.read_exact(&mut [0]).unwrap();
    std::fs::File::create(&path).unwrap();
    // refused where the rest of the first answer has ended the program already
    let _ = stdin.write_all(b"Hi again\n");
    drop(stdin);
    // an answer that nobody takes would end the program otherwise
    std::io::copy(&mut stdout, &mut std::io::sink()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("m.gguf: the file was cut off"), "{text}");
}
