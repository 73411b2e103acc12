//! Models in several files: all of them are read, and files that do not belong together are refused with cause and
//! cure.

mod common;

use std::path::{Path, PathBuf};

use common::running::{Folder, TEXT, json_of, run, text_of};
use common::tiny_model::TinyModel;
use pi_runtime::gguf::{GgufFile, GgufWriter, OwnedValue};

/// Name of file `number` (from 1) of `count`.
fn name(number: usize, count: usize) -> String {
    format!("m-{number:05}-of-{count:05}.gguf")
}

/// Divides a file as `llama-gguf-split` does: metadata in the first file only. `keys` is set last, in file
/// `keys_in` (from 1).
fn split(
    whole: &Path,
    folder: &Folder,
    count: usize,
    keys_in: usize,
    keys: &[(&str, OwnedValue)],
) -> Vec<PathBuf> {
    let file = GgufFile::open(whole).unwrap();
    let n_tensors = file.tensors().len();
    let paths = (1..=count).map(|number| folder.path(&name(number, count)));
    let paths: Vec<PathBuf> = paths.collect();
    for (index, path) in paths.iter().enumerate() {
        let mut header = GgufWriter::new();
        if index == 0 {
            header.copy_metadata(file.metadata(), |_| false).unwrap();
        }
        header
            .put("split.no", OwnedValue::U16(index as u16))
            .unwrap();
        header
            .put("split.count", OwnedValue::U16(count as u16))
            .unwrap();
        header.put("split.tensors.count", n_tensors as i32).unwrap();
        if index + 1 == keys_in {
            for (key, value) in keys {
                header.put(key, value.clone()).unwrap();
            }
        }
        let tensors = &file.tensors()[n_tensors * index / count..n_tensors * (index + 1) / count];
        for tensor in tensors {
            header
                .add_tensor(tensor.name(), tensor.ggml_type(), tensor.shape())
                .unwrap();
        }
        let mut stream = header.create(path).unwrap();
        for tensor in tensors {
            stream
                .write(tensor.name(), &file.tensor_data(tensor))
                .unwrap();
        }
        stream.finish().unwrap();
    }
    paths
}

fn tiny() -> Folder {
    Folder::with(&TinyModel {
        neuron_major: false,
        ..TinyModel::default()
    })
}

/// A model in three files, one of which has other keys.
fn three_files(keys_in: usize, keys: &[(&str, OwnedValue)]) -> Folder {
    let folder = tiny();
    split(&folder.path("m.gguf"), &folder, 3, keys_in, keys);
    folder
}

#[test]
fn every_command_reads_all_files_by_the_first_one_s_name() {
    let folder = three_files(0, &[]);
    let (one, first) = (folder.name("m.gguf"), folder.name(&name(1, 3)));

    let mut answers = [&one, &first].map(|file| {
        let mut answer = json_of(&["-m", file, "-p", TEXT, "-n", "8", "--temp", "0", "--json"]);
        answer["timings"].take();
        answer
    });
    assert!(answers[0]["logits_hash"].is_string(), "{}", answers[0]);
    for answer in &mut answers {
        answer["model"].take();
    }
    assert_eq!(answers[0], answers[1]);

    let packed = [&one, &first].map(|file| {
        let out = folder.path("packed.gguf");
        text_of(&["pack", file, "-o", out.to_str().unwrap(), "--type", "Q8_0"]);
        std::fs::read(out).unwrap()
    });
    assert!(packed[0] == packed[1], "packed files differ");
}

#[test]
fn inspect_shows_the_whole_model() {
    let folder = three_files(0, &[]);
    let whole = json_of(&["inspect", &folder.name("m.gguf"), "--json"]);
    let split = json_of(&["inspect", &folder.name(&name(1, 3)), "--json"]);
    assert_eq!(split["totals"], whole["totals"]);
    let files = split["files"].as_array().unwrap();
    assert_eq!(files.len(), 3);
    let bytes = files
        .iter()
        .map(|file| file["file_bytes"].as_u64().unwrap());
    assert_eq!(split["file_bytes"].as_u64().unwrap(), bytes.sum::<u64>());
    let last = split["tensors"].as_array().unwrap().last().unwrap();
    assert_eq!(last["file"], 3);
    let text = text_of(&["inspect", &folder.name(&name(1, 3))]);
    assert!(
        text.contains("file 3: ") && text.contains(&name(3, 3)),
        "{text}"
    );
}

/// Refused by `inspect` and as a model: exit code 2, one line on stderr that has all `words`, nothing on stdout.
fn refused(file: &Path, words: &[&str]) {
    let file = file.to_str().unwrap();
    for args in [
        vec!["inspect", file],
        vec!["-m", file, "-p", "x", "-n", "1"],
    ] {
        let ran = run(&args);
        assert_eq!(
            (ran.code, ran.out.as_str()),
            (2, ""),
            "{args:?}: {}",
            ran.err
        );
        assert_eq!(ran.err.lines().count(), 1, "{}", ran.err);
        for word in words {
            assert!(ran.err.contains(word), "{:?} lacks {word:?}", ran.err);
        }
    }
}

#[test]
fn a_later_file_names_the_first() {
    let folder = three_files(0, &[]);
    let first = folder.name(&name(1, 3));
    let words = ["file 2 of a model in 3 files", "name the first", &first];
    refused(&folder.path(&name(2, 3)), &words);
    let other = folder.path("second.gguf");
    std::fs::rename(folder.path(&name(3, 3)), &other).unwrap();
    refused(&other, &["file 3 of a model in 3", "-00001-of-00003.gguf"]);
}

#[test]
fn a_missing_file_is_named() {
    let folder = three_files(0, &[]);
    std::fs::remove_file(folder.path(&name(3, 3))).unwrap();
    let words = [
        &name(3, 3),
        "no such file",
        "file 3 of the model's 3",
        "one folder",
    ];
    refused(&folder.path(&name(1, 3)), &words);
}

#[test]
fn a_first_file_by_another_name_cannot_lead_to_the_others() {
    let folder = three_files(0, &[]);
    for other in [
        "model.gguf",
        "m-00001-of-00004.gguf",
        "-00001-of-00003.gguf",
    ] {
        let other = folder.path(other);
        std::fs::copy(folder.path(&name(1, 3)), &other).unwrap();
        refused(&other, &["-00001-of-00003.gguf", "original names"]);
    }
}

#[test]
fn numbers_that_cannot_be_are_refused() {
    let cases: [(usize, &str, OwnedValue, &[&str]); 7] = [
        (
            1,
            "split.count",
            OwnedValue::U32(1 << 31),
            &["2147483648", "split.count", "65535"],
        ),
        (
            1,
            "split.count",
            OwnedValue::U64(u64::MAX),
            &["18446744073709551615"],
        ),
        (
            1,
            "split.count",
            OwnedValue::I32(-3),
            &["split.count", "-3"],
        ),
        (1, "split.no", OwnedValue::U16(9), &["number 10 of 3"]),
        (
            2,
            "split.no",
            OwnedValue::U16(2),
            &["00002-of-00003.gguf", "number 3 of 3", "as number 2"],
        ),
        (
            3,
            "split.count",
            OwnedValue::U16(4),
            &["00003-of-00003.gguf", "number 3 of 4"],
        ),
        (
            1,
            "split.no",
            OwnedValue::Str("first".into()),
            &["split.no", "str"],
        ),
    ];
    for (keys_in, key, value, words) in cases {
        let folder = three_files(keys_in, &[(key, value)]);
        refused(&folder.path(&name(1, 3)), words);
    }
}

#[test]
fn files_of_other_models_are_refused() {
    let first = |folder: &Folder| folder.path(&name(1, 3));
    let folder = three_files(2, &[("general.name", "other".into())]);
    let words = [
        "00002-of-00003.gguf",
        "general.name",
        "other",
        "different models",
    ];
    refused(&first(&folder), &words);

    let folder = three_files(3, &[("split.tensors.count", 7i32.into())]);
    let words = [
        "00003-of-00003.gguf",
        "split.tensors.count is 7",
        "different models",
    ];
    refused(&first(&folder), &words);

    // the same tensors again, and the wrong number of them
    let folder = three_files(0, &[]);
    let file = GgufFile::open(folder.path("m.gguf")).unwrap();
    let mut header = GgufWriter::new();
    for (key, value) in [("split.no", 2u32), ("split.count", 3)] {
        header.put(key, value).unwrap();
    }
    let tensor = &file.tensors()[0];
    header
        .add_tensor(tensor.name(), tensor.ggml_type(), tensor.shape())
        .unwrap();
    let third = folder.path(&name(3, 3));
    let mut stream = header.create(&third).unwrap();
    stream
        .write(tensor.name(), &file.tensor_data(tensor))
        .unwrap();
    stream.finish().unwrap();
    let words = [
        "00003-of-00003.gguf",
        "token_embd.weight",
        "files before it",
    ];
    refused(&first(&folder), &words);

    let folder = three_files(1, &[("split.tensors.count", 500i32.into())]);
    refused(&first(&folder), &["split.tensors.count"]);
}

#[test]
fn a_damaged_file_is_named() {
    let folder = three_files(0, &[]);
    let second = folder.path(&name(2, 3));
    let bytes = std::fs::read(&second).unwrap();
    std::fs::write(&second, &bytes[..bytes.len() / 2]).unwrap();
    refused(
        &folder.path(&name(1, 3)),
        &["00002-of-00003.gguf", "cut off"],
    );
    std::fs::write(&second, "").unwrap();
    refused(&folder.path(&name(1, 3)), &["00002-of-00003.gguf", "empty"]);
}

#[cfg(unix)]
#[test]
fn links_to_the_file_itself_or_in_a_circle_are_refused() {
    let folder = three_files(0, &[]);
    let (first, second, third) = (
        folder.path(&name(1, 3)),
        folder.path(&name(2, 3)),
        folder.path(&name(3, 3)),
    );
    std::fs::remove_file(&second).unwrap();
    std::os::unix::fs::symlink(&first, &second).unwrap();
    refused(
        &first,
        &["00002-of-00003.gguf", "number 1 of 3", "as number 2"],
    );
    std::fs::remove_file(&second).unwrap();
    std::fs::remove_file(&third).unwrap();
    std::os::unix::fs::symlink(&second, &third).unwrap();
    std::os::unix::fs::symlink(&third, &second).unwrap();
    refused(&first, &["00002-of-00003.gguf", "symbolic links"]);
}
