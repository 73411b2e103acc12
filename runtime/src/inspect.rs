//! `pi-runtime inspect FILE`: what a GGUF file holds, as text or JSON.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;

use serde_json::{Map, Number, Value as Json, json};

use crate::gguf::{Array, GgmlType, GgufError, GgufFile, ShardFile, TensorInfo, Value};

/// Elements of an array that are shown unless all are asked for.
const ARRAY_ITEMS_SHOWN: usize = 6;
/// Characters of a string that the text form shows unless all are asked for.
const TEXT_CHARS_SHOWN: usize = 100;

/// Options of `inspect`.
#[derive(Debug, Clone, clap::Args)]
pub struct InspectArgs {
    /// GGUF file to look into
    pub file: PathBuf,
    /// Print one JSON object instead of tables
    #[arg(long)]
    pub json: bool,
    /// Print long arrays and texts whole
    #[arg(long)]
    pub full: bool,
}

/// Why `inspect` failed.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// The file was refused.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The output could not be written.
    #[error("cannot write the output: {0}")]
    Output(io::Error),
}

/// Prints metadata, tensors and totals of the file that `args` names.
///
/// # Errors
/// The file is refused, or `out` cannot be written (a closed pipe among others).
pub fn run(args: &InspectArgs, out: &mut dyn Write) -> Result<(), InspectError> {
    let file = GgufFile::open(&args.file)?;
    let mut out = io::BufWriter::new(out);
    let printed = if args.json {
        print_json(&file, args, &mut out)
    } else {
        print_text(&file, args, &mut out)
    };
    printed
        .and_then(|()| out.flush())
        .map_err(InspectError::Output)
}

/// Sums over all tensors of one type.
#[derive(Debug, Default, Clone, Copy)]
struct Total {
    n_tensors: usize,
    n_values: u64,
    bytes: u64,
}

impl Total {
    fn add(&mut self, tensor: &TensorInfo) {
        self.n_tensors += 1;
        self.n_values = self.n_values.saturating_add(tensor.n_values() as u64);
        self.bytes += tensor.size_bytes() as u64;
    }
}

fn totals(file: &GgufFile) -> (BTreeMap<GgmlType, Total>, Total) {
    let mut by_type = BTreeMap::<GgmlType, Total>::new();
    let mut all = Total::default();
    for tensor in file.tensors() {
        by_type.entry(tensor.ggml_type()).or_default().add(tensor);
        all.add(tensor);
    }
    (by_type, all)
}

fn print_text(file: &GgufFile, args: &InspectArgs, out: &mut dyn Write) -> io::Result<()> {
    writeln!(
        out,
        "{}: {} version {}, {} bytes, data from byte {}, alignment {}",
        args.file.display(),
        file.variant().magic(),
        file.version(),
        file.len_bytes(),
        file.data_start(),
        file.alignment(),
    )?;
    if let files @ [_, _, ..] = file.files() {
        for (number, file) in (1..).zip(files) {
            writeln!(
                out,
                "  file {number}: {}, {} bytes, data from byte {}",
                path_text(file),
                file.len_bytes(),
                file.data_start(),
            )?;
        }
    }

    writeln!(out, "\n{} metadata keys", file.metadata().len())?;
    let names = || {
        file.metadata()
            .iter()
            .map(|(key, _)| key.escape_debug().to_string())
    };
    let key_width = names()
        .map(|key| key.chars().count())
        .max()
        .unwrap_or(0)
        .min(48);
    for (key, value) in file.metadata().iter() {
        let key = key.escape_debug().to_string();
        let type_name = value.type_name();
        writeln!(
            out,
            "  {key:key_width$}  {type_name:10}  {}",
            value_text(&value, args.full)
        )?;
    }

    writeln!(out, "\n{} tensors", file.tensors().len())?;
    print_tensors(file, out)?;

    let (by_type, all) = totals(file);
    writeln!(
        out,
        "\n{:10} {:>8} {:>16} {:>16}",
        "type", "tensors", "values", "bytes"
    )?;
    let rows = by_type
        .iter()
        .map(|(t, total)| (t.name(), total))
        .chain([("all", &all)]);
    for (
        name,
        Total {
            n_tensors,
            n_values,
            bytes,
        },
    ) in rows
    {
        writeln!(out, "{name:10} {n_tensors:>8} {n_values:>16} {bytes:>16}")?;
    }
    Ok(())
}

fn print_tensors(file: &GgufFile, out: &mut dyn Write) -> io::Result<()> {
    let name_of = |tensor: &TensorInfo| tensor.name().escape_debug().to_string();
    let shape_of = |tensor: &TensorInfo| format!("{:?}", tensor.shape());
    let name_width = file
        .tensors()
        .iter()
        .map(|t| name_of(t).chars().count())
        .max()
        .unwrap_or(0);
    let shape_width = file
        .tensors()
        .iter()
        .map(|t| shape_of(t).len())
        .max()
        .unwrap_or(0);
    let (name_width, shape_width) = (name_width.clamp(4, 64), shape_width.max(5));
    let sharded = file.files().len() > 1;
    writeln!(
        out,
        "  {:name_width$}  {:shape_width$}  {:10} {:>14} {:>14}{}",
        "name",
        "shape",
        "type",
        "bytes",
        "offset",
        if sharded { "  file" } else { "" }
    )?;
    for tensor in file.tensors() {
        writeln!(
            out,
            "  {:name_width$}  {:shape_width$}  {:10} {:>14} {:>14}{}",
            name_of(tensor),
            shape_of(tensor),
            tensor.ggml_type().name(),
            tensor.size_bytes(),
            tensor.file_range().start,
            if sharded {
                format!("{:>6}", tensor.shard() + 1)
            } else {
                String::new()
            },
        )?;
    }
    Ok(())
}

fn path_text(file: &ShardFile) -> String {
    file.path()
        .map_or_else(String::new, |path| path.display().to_string())
}

/// A value on one line; control characters are escaped.
fn value_text(value: &Value<'_>, full: bool) -> String {
    match value {
        Value::Str(bytes) => {
            let text = String::from_utf8_lossy(bytes);
            let shown = if full { usize::MAX } else { TEXT_CHARS_SHOWN };
            let start: String = text.chars().take(shown).collect();
            if start.len() == text.len() {
                format!("{start:?}")
            } else {
                format!("{start:?}… ({} bytes)", bytes.len())
            }
        }
        Value::Array(array) => array_text(array, full),
        Value::Bool(value) => value.to_string(),
        Value::F32(value) => value.to_string(),
        Value::F64(value) => value.to_string(),
        integer => integer
            .as_integer()
            .map_or_else(String::new, |value| value.to_string()),
    }
}

fn array_text(array: &Array<'_>, full: bool) -> String {
    let shown = if full { array.len() } else { ARRAY_ITEMS_SHOWN };
    let items: Vec<String> = array
        .iter()
        .take(shown)
        .map(|item| value_text(&item, full))
        .collect();
    let rest = if shown < array.len() { ", …" } else { "" };
    format!("[{}{rest}] ({} items)", items.join(", "), array.len())
}

fn print_json(file: &GgufFile, args: &InspectArgs, out: &mut dyn Write) -> io::Result<()> {
    let metadata: Map<String, Json> = file
        .metadata()
        .iter()
        .map(|(key, value)| (key.to_owned(), entry_json(&value, args.full)))
        .collect();
    let tensors: Vec<Json> = file
        .tensors()
        .iter()
        .map(|tensor| {
            json!({
                "name": tensor.name(),
                "shape": tensor.shape(),
                "type": tensor.ggml_type().name(),
                "bytes": tensor.size_bytes(),
                "offset": tensor.file_range().start,
                "file": tensor.shard() + 1,
            })
        })
        .collect();
    let total_json = |total: &Total| json!({ "tensors": total.n_tensors, "values": total.n_values, "bytes": total.bytes });
    let (by_type, all) = totals(file);
    let by_type: Map<String, Json> = by_type
        .iter()
        .map(|(t, total)| (t.name().to_owned(), total_json(total)))
        .collect();
    let files: Vec<Json> = file
        .files()
        .iter()
        .map(|file| {
            json!({
                "file": path_text(file),
                "file_bytes": file.len_bytes(),
                "data_offset": file.data_start(),
            })
        })
        .collect();
    let object = json!({
        "file": args.file.to_string_lossy(),
        "magic": file.variant().magic(),
        "version": file.version(),
        "file_bytes": file.len_bytes(),
        "data_offset": file.data_start(),
        "alignment": file.alignment(),
        "files": files,
        "metadata": metadata,
        "tensors": tensors,
        "totals": { "by_type": by_type, "all": total_json(&all) },
    });
    serde_json::to_writer_pretty(&mut *out, &object)?;
    writeln!(out)
}

/// `{"type", "value"}`; an array also has `"len"`, and `"value"` may be its first items only.
fn entry_json(value: &Value<'_>, full: bool) -> Json {
    match value {
        Value::Array(array) => json!({
            "type": value.type_name(),
            "len": array.len(),
            "value": array_json(array, full),
        }),
        scalar => json!({ "type": scalar.type_name(), "value": value_json(scalar, full) }),
    }
}

fn array_json(array: &Array<'_>, full: bool) -> Json {
    let shown = if full { array.len() } else { ARRAY_ITEMS_SHOWN };
    array
        .iter()
        .take(shown)
        .map(|item| value_json(&item, full))
        .collect()
}

fn value_json(value: &Value<'_>, full: bool) -> Json {
    match value {
        Value::Bool(value) => Json::Bool(*value),
        Value::Str(bytes) => Json::String(String::from_utf8_lossy(bytes).into_owned()),
        Value::Array(array) => array_json(array, full),
        // Through text: the shortest number that reads back as the same f32.
        Value::F32(value) => number_json(&value.to_string()),
        Value::F64(value) => number_json(&value.to_string()),
        Value::U64(value) => Json::from(*value),
        integer => Json::from(
            integer
                .as_integer()
                .and_then(|value| i64::try_from(value).ok()),
        ),
    }
}

/// A float as a number, or as text where JSON has no number for it (`NaN`, `inf`).
fn number_json(text: &str) -> Json {
    let number = text.parse::<f64>().ok().and_then(Number::from_f64);
    number.map_or_else(|| Json::String(text.to_owned()), Json::Number)
}
