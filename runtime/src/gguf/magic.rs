//! The first bytes of a file: GGUF, PowerInfer's variant of it, or something else by name.

use super::GgufError;

/// Which of the two magics the file starts with; the container is the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// `GGUF`.
    Gguf,
    /// `PWRI`: PowerInfer's models and `.gpuidx` sidecars.
    PowerInfer,
}

impl Variant {
    /// The four bytes that the file starts with, as text.
    pub fn magic(self) -> &'static str {
        match self {
            Variant::Gguf => "GGUF",
            Variant::PowerInfer => "PWRI",
        }
    }

    /// The variant of a file by its first bytes.
    ///
    /// # Errors
    /// [`GgufError::NotGguf`], saying what the file looks like instead.
    pub(super) fn detect(head: &[u8]) -> Result<Variant, GgufError> {
        if head.starts_with(b"GGUF") {
            return Ok(Variant::Gguf);
        }
        if head.starts_with(b"PWRI") {
            return Ok(Variant::PowerInfer);
        }
        let (looks_like, cure) = other_kind(head);
        Err(GgufError::NotGguf { looks_like, cure })
    }
}

/// What a file that is not GGUF looks like, and what to do about it.
fn other_kind(head: &[u8]) -> (&'static str, &'static str) {
    const CONVERT: &str = "convert it with llama.cpp's convert_hf_to_gguf.py or download its GGUF";
    const DOWNLOAD: &str = "download the model file itself (a link with /resolve/, not /blob/)";
    let text = head.trim_ascii_start();
    let starts = |prefix: &[u8]| {
        text.get(..prefix.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(prefix))
    };
    if head.starts_with(b"version https://git-lfs") {
        return (
            "a Git LFS pointer",
            "fetch the file itself with `git lfs pull`",
        );
    }
    if starts(b"<!doctype") || starts(b"<html") || starts(b"<?xml") || starts(b"<head") {
        return ("a web page", DOWNLOAD);
    }
    if head.len() > 9 && head[8] == b'{' && head[..8].iter().rev().take(4).all(|&byte| byte == 0) {
        return ("a safetensors file", CONVERT);
    }
    if [&b"lmgg"[..], b"fmgg", b"tjgg", b"algg"]
        .iter()
        .any(|magic| head.starts_with(magic))
    {
        return ("a ggml file from before GGUF (2023)", CONVERT);
    }
    if head.starts_with(b"PK\x03\x04") {
        return ("a zip archive, as PyTorch writes them", CONVERT);
    }
    if head.starts_with(b"\x80\x02") || head.starts_with(b"\x80\x04") {
        return ("a Python pickle, as PyTorch writes them", CONVERT);
    }
    let packed = [
        &b"\x1f\x8b"[..],
        b"\x28\xb5\x2f\xfd",
        b"BZh",
        b"\xfd7zXZ",
        b"7z\xbc\xaf",
    ];
    if packed.iter().any(|magic| head.starts_with(magic)) {
        return ("a compressed file", "unpack it first");
    }
    if head.starts_with(b"\x7fELF") {
        return ("a program", "name a model file");
    }
    if starts(b"{") || starts(b"[") {
        return (
            "a JSON text",
            "name the .gguf file beside it, or convert the model to GGUF",
        );
    }
    if head.iter().take(16).all(|&byte| byte == 0) {
        return (
            "zeros: a file whose download has not finished",
            "download it again",
        );
    }
    let is_text = |byte: &u8| byte.is_ascii_graphic() || byte.is_ascii_whitespace();
    if !head.is_empty() && head.iter().take(256).all(is_text) {
        return ("a text file", "name a model file in GGUF format");
    }
    ("no format known here", "name a model file in GGUF format")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_what_a_file_looks_like() {
        let safetensors = [&300u64.to_le_bytes()[..], br#"{"__metadata__":{}}"#].concat();
        let cases: [(&[u8], &str); 13] = [
            (&safetensors, "a safetensors file"),
            (b"PK\x03\x04\x00\x00", "a zip archive"),
            (b"\n<!DOCTYPE html><html>", "a web page"),
            (b"<HTML>", "a web page"),
            (
                b"version https://git-lfs.github.com/spec/v1\n",
                "a Git LFS pointer",
            ),
            (b"tjgg\x03\x00\x00\x00", "a ggml file from before GGUF"),
            (b"lmgg\x03\x00\x00\x00", "a ggml file from before GGUF"),
            (b"\x80\x02\x8a\x0a", "a Python pickle"),
            (b"\x1f\x8b\x08", "a compressed file"),
            (b"{\"a\": 1}", "a JSON text"),
            (&[0; 64], "zeros"),
            (b"hello", "a text file"),
            (b"\x01\x02\x03", "no format known here"),
        ];
        for (head, expected) in cases {
            let message = Variant::detect(head).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
        assert!(Variant::detect(b"").is_err());
        assert!(Variant::detect(b"GGU").is_err());
    }

    #[test]
    fn knows_both_magics() {
        assert_eq!(Variant::detect(b"GGUF").unwrap(), Variant::Gguf);
        assert_eq!(Variant::detect(b"PWRI\x03").unwrap(), Variant::PowerInfer);
        assert_eq!(Variant::PowerInfer.magic(), "PWRI");
    }
}
