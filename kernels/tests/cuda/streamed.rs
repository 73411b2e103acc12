//! Weights that come as they lie on the host.

use half::f16;
use pi_kernels::cuda::{
    DeviceRows, HostPlanes, HostRows, Registered, RowsView, SUPPORTED, copy_in, transpose,
    transposed_rows, trap, unpack, unpack_planes,
};
use pi_kernels::ffn_sparse::sketch::planes::PlanesShape;
use pi_kernels::{ActivationMode, KernelError, Layout, MatrixRef, MatrixShape, QuantType};

use crate::common::{MODES, Random, column_counts, device};

#[test]
fn rows_of_the_host_become_rows_of_the_device() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    for quant in SUPPORTED {
        for (n_cols, n_rows) in column_counts(quant)
            .into_iter()
            .flat_map(|n| [(n, 5), (n, 48)])
        {
            let file = Random(9).rows(quant, n_rows, n_cols);
            let rows = DeviceRows {
                quant,
                n_rows,
                n_cols,
            };
            let mut want = vec![0; rows.bytes()];
            rows.pack(&file, rows.row_bytes(), &mut want);
            for layout in [Layout::Interleaved, Layout::Rows] {
                let shape = MatrixShape {
                    quant,
                    n_rows,
                    n_cols,
                    layout,
                };
                let mut packed = vec![0xA5; shape.packed_bytes()];
                shape.pack(&file, 0, &mut packed);
                // records have something between rows
                let gap = if layout == Layout::Rows { 6 } else { 0 };
                let stride_bytes = shape.row_bytes() + gap;
                let records: Vec<u8> = match layout {
                    Layout::Interleaved => packed,
                    Layout::Rows => packed
                        .chunks(shape.row_bytes())
                        .flat_map(|row| [row, &[0xFF; 6]].concat())
                        .collect(),
                };
                let from = device.upload(&records).unwrap();
                let host = HostRows {
                    shape,
                    stride_bytes,
                    bytes: from.view(..),
                };
                let mut to = device.upload(&vec![0x5A; rows.bytes()]).unwrap();
                unpack(&stream, host, to.view_mut(..)).unwrap();
                stream.synchronize().unwrap();
                assert_eq!(
                    to.read().unwrap(),
                    want,
                    "{quant} [{n_rows}, {n_cols}] {layout:?}"
                );
            }
        }
    }
}

#[test]
fn gates_in_planes_become_the_rows_that_they_were_made_of() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    // whole runs, and two and one block behind them; whole units, and some blocks
    for (n_rows, n_cols) in [1, 2, 3, 4, 5, 6, 7, 18, 36, 256]
        .into_iter()
        .flat_map(|blocks| [(1, 32 * blocks), (16, 32 * blocks), (83, 32 * blocks)])
    {
        let quant = QuantType::Q4_0;
        let mut file = Random(5).rows(quant, n_rows, n_cols);
        // a scale that is zero and negative
        file[1] = 0x80;
        file[0] = 0;
        let shape = PlanesShape { n_rows, n_cols };
        let mut top = vec![0xA5; shape.top_bytes()];
        let mut rest = vec![0xA5; shape.rest_bytes()];
        shape.pack(&file, 0, &mut top, &mut rest);
        let rows = HostPlanes::rows(shape);
        let mut want = vec![0; rows.bytes()];
        rows.pack(&file, rows.row_bytes(), &mut want);
        let (top, rest) = (device.upload(&top).unwrap(), device.upload(&rest).unwrap());
        let planes = HostPlanes {
            shape,
            top: top.view(..),
            rest: rest.view(..),
        };
        let mut to = device.upload(&vec![0x5A; rows.bytes()]).unwrap();
        unpack_planes(&stream, planes, to.view_mut(..)).unwrap();
        stream.synchronize().unwrap();
        assert_eq!(to.read().unwrap(), want, "[{n_rows}, {n_cols}]");
    }
}

fn halves(bytes: &[u8]) -> impl Iterator<Item = f16> + '_ {
    let (values, _) = bytes.as_chunks();
    values.iter().map(|value| f16::from_le_bytes(*value))
}

fn floats(bytes: &[u8]) -> impl Iterator<Item = f32> + '_ {
    let (values, _) = bytes.as_chunks();
    values.iter().map(|value| f32::from_le_bytes(*value))
}

#[test]
fn columns_are_the_values_of_rows() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    for quant in SUPPORTED {
        for (n_cols, n_rows) in column_counts(quant)
            .into_iter()
            .flat_map(|n| [(n, 1), (n, 83)])
        {
            let file = Random(3).rows(quant, n_rows, n_cols);
            let rows = DeviceRows {
                quant,
                n_rows,
                n_cols,
            };
            let stride = rows.row_bytes() + 32;
            let mut packed = vec![0xFF; n_rows * stride];
            rows.pack(&file, stride, &mut packed);
            let packed = device.upload(&packed).unwrap();
            let shape = MatrixShape {
                quant,
                n_rows,
                n_cols,
                layout: Layout::Rows,
            };
            let mut by_row = vec![0; shape.packed_bytes()];
            shape.pack(&file, 0, &mut by_row);
            let matrix = MatrixRef::new(shape, &by_row);
            for mode in MODES {
                let turned = transposed_rows(rows, mode);
                let mut to = device.upload(&vec![0xFFu8; turned.bytes()]).unwrap();
                let view = RowsView::new(rows, stride, packed.view(..));
                transpose(&stream, view, mode, to.view_mut(..)).unwrap();
                stream.synchronize().unwrap();
                let got = to.read().unwrap();
                let mut values = vec![0.0; n_cols];
                let mut want = vec![0u8; turned.bytes()];
                for row in 0..n_rows {
                    matrix.dequantize_row(row, &mut values);
                    for (column, value) in values.iter().enumerate() {
                        let at = column * turned.row_bytes();
                        match mode {
                            ActivationMode::Q8 => want[at + 2 * row..][..2]
                                .copy_from_slice(&f16::from_f32(*value).to_le_bytes()),
                            ActivationMode::F32 => {
                                want[at + 4 * row..][..4].copy_from_slice(&value.to_le_bytes());
                            }
                        }
                    }
                }
                // zeros of either sign are one
                let same = match mode {
                    ActivationMode::Q8 => halves(&got).eq(halves(&want)),
                    ActivationMode::F32 => floats(&got).eq(floats(&want)),
                };
                assert!(same, "{quant} [{n_rows}, {n_cols}] {mode}");
            }
        }
    }
}

#[test]
fn locked_memory_is_copied_as_it_is() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    // whole pages of its own within it
    let all: Vec<u8> = (0..100_000u32).map(|n| n.to_le_bytes()[0]).collect();
    let bytes = &all[all.as_ptr().align_offset(4096)..][..20 * 4096];
    let start = bytes.as_ptr().expose_provenance();
    // SAFETY: the vector outlives it.
    let locked = unsafe { Registered::new(&device, start..start + bytes.len()) }.unwrap();
    assert_eq!(locked.bytes(), bytes.len());
    // SAFETY: as above.
    let again = unsafe { Registered::new(&device, start..start + 1) };
    assert!(again.is_err(), "one page is locked once");
    let mut to = device.alloc::<u8>(bytes.len()).unwrap();
    // SAFETY: nobody writes them.
    unsafe { copy_in(&stream, bytes, to.view_mut(..)).unwrap() };
    stream.synchronize().unwrap();
    assert_eq!(to.read().unwrap(), bytes);
}

/// In a process of its own, as the device's context is lost with it.
#[test]
fn a_defect_of_the_device_is_an_error() {
    const ALONE: &str = "PI_KERNELS_TRAP";
    if device().is_none() {
        return;
    }
    if std::env::var_os(ALONE).is_none() {
        let name = "streamed::a_defect_of_the_device_is_an_error";
        let mut test = std::process::Command::new(std::env::current_exe().unwrap());
        let status = test.args([name, "--exact"]).env(ALONE, "1").status();
        return assert!(status.unwrap().success());
    }
    let device = device().unwrap();
    let stream = device.stream().unwrap();
    trap(&stream).unwrap();
    let error = stream.synchronize().unwrap_err();
    assert!(matches!(error, KernelError::Cuda { .. }), "{error}");
    // and so is everything behind it
    assert!(device.alloc::<u8>(1).is_err());
}
