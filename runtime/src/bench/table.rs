//! Rows of `bench` as llama-bench's Markdown table, JSON list or CSV.

use std::io::{self, Write};

use serde_json::Value;

use super::row::BenchRow;

/// Writes rows as they finish, so that a long bench shows its progress.
pub trait RowWriter {
    /// What comes before the first row.
    ///
    /// # Errors
    /// Those of `out`.
    fn header(&mut self, out: &mut dyn Write) -> io::Result<()>;
    /// One finished row.
    ///
    /// # Errors
    /// Those of `out`.
    fn row(&mut self, out: &mut dyn Write, row: &BenchRow) -> io::Result<()>;
    /// What comes after the last row.
    ///
    /// # Errors
    /// Those of `out`.
    fn footer(&mut self, out: &mut dyn Write) -> io::Result<()>;
}

/// llama-bench's table with four more columns.
#[derive(Debug, Default)]
pub struct Markdown;

/// Column name and width; negative: flush left.
const COLUMNS: [(&str, i32); 11] = [
    ("model", -30),
    ("size", 10),
    ("params", 10),
    ("backend", -10),
    ("threads", 7),
    ("test", 15),
    ("t/s", 20),
    ("active", 7),
    ("MB/token", 8),
    ("GB/s", 6),
    ("% of limit", 10),
];

impl RowWriter for Markdown {
    fn header(&mut self, out: &mut dyn Write) -> io::Result<()> {
        write!(out, "|")?;
        for (name, width) in COLUMNS {
            write!(out, " {} |", pad(name, width))?;
        }
        write!(out, "\n|")?;
        for (_, width) in COLUMNS {
            let dashes = width.unsigned_abs() as usize;
            if width < 0 {
                write!(out, " {} |", "-".repeat(dashes))?;
            } else {
                write!(out, " {}: |", "-".repeat(dashes - 1))?;
            }
        }
        writeln!(out)
    }

    fn row(&mut self, out: &mut dyn Write, row: &BenchRow) -> io::Result<()> {
        let maybe = |value: Option<f64>, places: usize| {
            value.map_or_else(String::new, |value| format!("{value:.places$}"))
        };
        let cells = [
            row.model_type.clone(),
            format!("{:.2} MiB", row.model_size as f64 / (1024.0 * 1024.0)),
            format!("{:.2} M", row.model_n_params as f64 / 1e6),
            row.backends.clone(),
            row.n_threads.to_string(),
            row.test().name(),
            format!("{:.2} ± {:.2}", row.avg_ts, row.stddev_ts),
            format!("{:.1} %", row.active_share * 100.0),
            maybe(row.bytes_per_token.map(|bytes| bytes as f64 / 1e6), 1),
            maybe(row.gb_per_s, 1),
            maybe(row.percent_of_byte_limit, 0),
        ];
        write!(out, "|")?;
        for (cell, (_, width)) in cells.iter().zip(COLUMNS) {
            write!(out, " {} |", pad(cell, width))?;
        }
        writeln!(out)
    }

    fn footer(&mut self, _out: &mut dyn Write) -> io::Result<()> {
        Ok(())
    }
}

fn pad(text: &str, width: i32) -> String {
    let columns = width.unsigned_abs() as usize;
    if width < 0 {
        format!("{text:<columns$}")
    } else {
        format!("{text:>columns$}")
    }
}

/// A JSON list of rows.
#[derive(Debug, Default)]
pub struct Json {
    n_rows: usize,
}

impl RowWriter for Json {
    fn header(&mut self, out: &mut dyn Write) -> io::Result<()> {
        write!(out, "[")
    }

    fn row(&mut self, out: &mut dyn Write, row: &BenchRow) -> io::Result<()> {
        let text = serde_json::to_string_pretty(row)?.replace('\n', "\n  ");
        write!(out, "{}\n  {text}", if self.n_rows == 0 { "" } else { "," })?;
        self.n_rows += 1;
        Ok(())
    }

    fn footer(&mut self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "\n]")
    }
}

/// Comma-separated values; every cell quoted, as llama-bench writes them, without the lists of samples.
#[derive(Debug, Default)]
pub struct Csv {
    header_written: bool,
}

impl RowWriter for Csv {
    fn header(&mut self, _out: &mut dyn Write) -> io::Result<()> {
        Ok(())
    }

    fn row(&mut self, out: &mut dyn Write, row: &BenchRow) -> io::Result<()> {
        let Value::Object(fields) = serde_json::to_value(row)? else {
            unreachable!("a struct serialises to an object")
        };
        let cells: Vec<_> = fields
            .iter()
            .filter(|(_, value)| !value.is_array())
            .collect();
        if !self.header_written {
            let names: Vec<&str> = cells.iter().map(|(name, _)| name.as_str()).collect();
            writeln!(out, "{}", names.join(","))?;
            self.header_written = true;
        }
        let values: Vec<String> = cells.iter().map(|(_, value)| csv_cell(value)).collect();
        writeln!(out, "{}", values.join(","))
    }

    fn footer(&mut self, _out: &mut dyn Write) -> io::Result<()> {
        Ok(())
    }
}

fn csv_cell(value: &Value) -> String {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    };
    format!("\"{}\"", text.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::super::row::BenchRow;
    use super::*;

    fn row() -> BenchRow {
        BenchRow {
            build_commit: "0.1.0".into(),
            build_number: 0,
            cpu_info: "Some \"CPU\"".into(),
            gpu_info: String::new(),
            backends: "CPU".into(),
            model_filename: "m.gguf".into(),
            model_type: "llama 135M Q4_0".into(),
            model_size: 90 << 20,
            model_n_params: 134_515_008,
            n_batch: 2048,
            n_ubatch: 512,
            n_threads: 2,
            type_k: "f16".into(),
            type_v: "f16".into(),
            n_gpu_layers: 0,
            n_prompt: 0,
            n_gen: 128,
            n_depth: 1536,
            test_time: "2026-01-01T00:00:00Z".into(),
            avg_ns: 1,
            stddev_ns: 0,
            avg_ts: 123.456,
            stddev_ts: 1.0,
            samples_ns: vec![1],
            samples_ts: vec![123.456],
            tier: "avx2".into(),
            activations: "q8".into(),
            sparsity: "exact".into(),
            head: "full".into(),
            token_source: "text".into(),
            active_share: 0.109_412_3,
            bytes_per_token: Some(64_000_000),
            gb_per_s: Some(7.9),
            bandwidth_gb_per_s: Some(28.0),
            percent_of_byte_limit: Some(28.2),
        }
    }

    fn written(writer: &mut dyn RowWriter, rows: usize) -> String {
        let mut out = Vec::new();
        writer.header(&mut out).unwrap();
        for _ in 0..rows {
            writer.row(&mut out, &row()).unwrap();
        }
        writer.footer(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn json_is_a_list_of_rows_with_llama_bench_names() {
        let list: Value = serde_json::from_str(&written(&mut Json::default(), 2)).unwrap();
        let rows = list.as_array().unwrap();
        assert_eq!(rows.len(), 2);
        for name in [
            "n_prompt",
            "n_gen",
            "n_depth",
            "n_threads",
            "avg_ts",
            "stddev_ts",
            "avg_ns",
            "samples_ts",
        ] {
            assert!(rows[1].get(name).is_some(), "{name} is missing");
        }
        assert_eq!(rows[0]["active_share"], 0.1094);
        assert_eq!(
            serde_json::from_str::<Value>(&written(&mut Json::default(), 0)).unwrap(),
            Value::Array(vec![])
        );
    }

    #[test]
    fn markdown_rows_have_the_header_s_columns() {
        let text = written(&mut Markdown, 1);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(
            lines
                .iter()
                .all(|line| line.matches('|').count() == COLUMNS.len() + 1),
            "{text}"
        );
        assert!(
            lines[2].contains(" tg128 @ d1536 |") && lines[2].contains("123.46 ± 1.00"),
            "{text}"
        );
    }

    #[test]
    fn csv_quotes_cells() {
        let text = written(&mut Csv::default(), 1);
        let (names, values) = text.split_once('\n').unwrap();
        assert!(
            names.starts_with("build_commit,build_number,cpu_info") && !names.contains("samples")
        );
        assert!(values.contains("\"Some \"\"CPU\"\"\""), "{values}");
    }
}
