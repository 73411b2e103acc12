//! `tojson` of chat templates: what Python's `json.dumps` writes, because models have learnt that.

use std::io;

use minijinja::value::Kwargs;
use minijinja::{Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::ser::Formatter;

/// Widest indent that is believed.
const INDENT_MAX: usize = 64;

/// `value | tojson(indent=, ensure_ascii=, sort_keys=, separators=)`.
pub fn to_json(value: &Value, indent: Option<usize>, options: Kwargs) -> Result<String, Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get::<Option<usize>>("indent")?,
    };
    let ascii = options.get::<Option<bool>>("ensure_ascii")?;
    let sorted = options.get::<Option<bool>>("sort_keys")?;
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    options.assert_all_used()?;
    let failed = |problem: String| Error::new(ErrorKind::InvalidOperation, problem);
    let indent = indent.map(|indent| indent.min(INDENT_MAX));
    let (item, key) = match separators.as_deref() {
        None => (if indent.is_some() { "," } else { ", " }, ": "),
        Some([item, key]) => (item.as_str(), key.as_str()),
        Some(_) => return Err(failed("tojson: separators must be two strings".into())),
    };
    let mut json = serde_json::to_value(value).map_err(|error| failed(error.to_string()))?;
    if sorted == Some(true) {
        json.sort_all_objects();
    }
    let python = Python {
        ascii: ascii == Some(true),
        indent,
        item,
        key,
        depth: 0,
        empty: true,
    };
    let mut out = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, python);
    json.serialize(&mut serializer)
        .map_err(|error| failed(error.to_string()))?;
    String::from_utf8(out).map_err(|error| failed(error.to_string()))
}

/// Python's spaces, line ends and escapes.
struct Python<'a> {
    ascii: bool,
    indent: Option<usize>,
    item: &'a str,
    key: &'a str,
    depth: usize,
    /// Whether the list or object that is open has no item yet.
    empty: bool,
}

impl Python<'_> {
    fn open<W: ?Sized + io::Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.empty = true;
        out.write_all(bracket)
    }

    fn close<W: ?Sized + io::Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if !self.empty {
            self.line_end(out)?;
        }
        self.empty = false;
        out.write_all(bracket)
    }

    fn begin_item<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if !first {
            out.write_all(self.item.as_bytes())?;
        }
        self.empty = false;
        self.line_end(out)
    }

    fn line_end<W: ?Sized + io::Write>(&self, out: &mut W) -> io::Result<()> {
        match self.indent {
            Some(indent) => write!(out, "\n{:1$}", "", indent * self.depth),
            None => Ok(()),
        }
    }
}

impl Formatter for Python<'_> {
    fn begin_array<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"]")
    }

    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.begin_item(out, first)
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"}")
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.begin_item(out, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(self.key.as_bytes())
    }

    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        out: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        if !self.ascii {
            return out.write_all(fragment.as_bytes());
        }
        for c in fragment.chars() {
            if c.is_ascii() {
                out.write_all(&[c as u8])?;
                continue;
            }
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(out, "\\u{unit:04x}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dumps(expression: &str) -> String {
        let mut environment = minijinja::Environment::new();
        environment.add_filter("tojson", to_json);
        environment
            .render_str(&format!("{{{{ {expression} }}}}"), ())
            .unwrap_or_else(|error| error.to_string())
    }

    #[test]
    fn writes_what_python_writes() {
        for (expression, json) in [
            (
                "{'a': [1, 2.5, none], 'b': 'é<>&\"'} | tojson",
                "{\"a\": [1, 2.5, null], \"b\": \"é<>&\\\"\"}",
            ),
            (
                "'é🦙' | tojson(ensure_ascii=true)",
                "\"\\u00e9\\ud83e\\udd99\"",
            ),
            ("'é' | tojson(ensure_ascii=False)", "\"é\""),
            (
                "{'a': [1], 'b': [], 'c': {}} | tojson(indent=2)",
                "{\n  \"a\": [\n    1\n  ],\n  \"b\": [],\n  \"c\": {}\n}",
            ),
            ("[1, 2] | tojson(4)", "[\n    1,\n    2\n]"),
            (
                "{'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':'))",
                "{\"a\":2,\"b\":1}",
            ),
        ] {
            assert_eq!(dumps(expression), json, "{expression}");
        }
        assert!(dumps("1 | tojson(separators=[','])").contains("two strings"));
    }
}
