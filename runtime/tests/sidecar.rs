//! A sidecar belongs to one model, and says so when it is given another.

mod common;

use std::path::Path;

use pi_runtime::gguf::{GgmlType, GgufFile, GgufWriter};
use pi_runtime::model::Hyperparameters;
use pi_runtime::sidecar::{Sidecar, SidecarError, model_hash, sidecar_header};

use common::demo_model;

/// Writes a sidecar for `model` with one vector, changed by `change`.
fn write(path: &Path, model: &GgufFile, values: &[f32], change: impl FnOnce(&mut GgufWriter)) {
    let hyper = Hyperparameters::read(model).unwrap();
    let mut header = sidecar_header(model, &hyper).unwrap();
    change(&mut header);
    header
        .add_tensor("v", GgmlType::F32, &[values.len()])
        .unwrap();
    let mut file = header.create(path).unwrap();
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    file.write("v", &bytes).unwrap();
    file.finish().unwrap();
}

#[test]
fn a_sidecar_is_taken_for_its_own_model_only() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sparse.gguf");
    let model = GgufFile::open(demo_model()).unwrap();
    let hyper = Hyperparameters::read(&model).unwrap();
    let open = || Sidecar::open(&path, &model, &hyper);

    write(&path, &model, &[1.0, 2.0], |_| ());
    let sidecar = open().unwrap();
    assert_eq!(sidecar.vector("v", 2).unwrap(), Some(vec![1.0, 2.0]));
    assert_eq!(sidecar.vector("w", 2).unwrap(), None);
    assert!(matches!(
        sidecar.vector("v", 3),
        Err(SidecarError::Tensor { .. })
    ));

    write(&path, &model, &[1.0, f32::NAN], |_| ());
    let damaged = open().unwrap().vector("v", 2).unwrap_err();
    assert!(matches!(damaged, SidecarError::NotFinite { index: 1, .. }));

    let put = |header: &mut GgufWriter, key: &str, value: &str| header.put(key, value).unwrap();
    write(&path, &model, &[0.0], |header| {
        put(
            header,
            "sparse.model_hash",
            "0123456789abcdef0123456789abcdef",
        );
    });
    assert!(matches!(open(), Err(SidecarError::OtherModel { .. })));
    write(&path, &model, &[0.0], |header| {
        header.put("sparse.feed_forward_length", 7u32).unwrap();
    });
    let error = open().unwrap_err();
    assert!(
        matches!(error, SidecarError::OtherShape { found: 7, .. }),
        "{error}"
    );
    write(&path, &model, &[0.0], |header| {
        header.put("sparse.version", 9u32).unwrap()
    });
    assert!(matches!(
        open(),
        Err(SidecarError::Version { version: 9, .. })
    ));
    assert!(matches!(
        Sidecar::open(&demo_model(), &model, &hyper),
        Err(SidecarError::NoSidecar { .. })
    ));
}

#[test]
fn a_changed_weight_or_key_changes_the_hash() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let hash = |name: &str, last: f32| {
        let mut header = GgufWriter::new();
        header.put("general.name", name).unwrap();
        header.add_tensor("t", GgmlType::F32, &[100_000]).unwrap();
        let mut file = header.create(&path).unwrap();
        let mut values = vec![0f32; 100_000];
        values[99_999] = last;
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        file.write("t", &bytes).unwrap();
        file.finish().unwrap();
        model_hash(&GgufFile::open(&path).unwrap())
    };
    assert_eq!(hash("a", 0.0), hash("a", 0.0));
    assert_ne!(hash("a", 0.0), hash("a", 1.0));
    assert_ne!(hash("a", 0.0), hash("b", 0.0));
}
